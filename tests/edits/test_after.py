"""A layer behind any module: where it goes, what it leaves as it was, and what is refused."""

import copy
import functools
import io
import json
import pickle

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.modules import ResidualLinear
from auxin.output_hook import grown_hook

torch.set_num_threads(1)
WIDTH = 8


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.fc, self.drop = nn.Linear(width, width), nn.Dropout(0.0)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.fc(x)))


class Net(nn.Module):
    """Entries of containers, and modules with names of their own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU())
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def companions(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, torch.optim.swa_utils.AveragedModel(model)


def train(model, optimizer, average, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    optimizer.zero_grad()


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("at", "new"),
    [
        ("head", "head._grown.0.weight"),
        ("norm", "norm._grown.0.weight"),
        ("blocks.1.fc", "blocks.1.fc._grown.0.weight"),
        ("blocks.1.drop", "blocks.1.drop._grown.0.weight"),
        ("blocks.1", "blocks.2.weight"),
        ("stem.0", "stem.1.weight"),
        ("stem", "stem.2.weight"),
        ("", "_grown.0.weight"),
    ],
)
def test_the_layer_stands_where_it_was_asked_for_and_learns(at, new):
    model = build()
    optimizer, average = companions(model)
    train(model, optimizer, average, X, 3)
    before = model(X)
    change = ax.grow(model, ax.After(at), optimizer, average, probe=X)
    assert torch.equal(model(X), before) and change.max_difference == 0
    assert [move.name for move in change.moves if move.added] == [new]
    weight = model.get_parameter(new)
    ax.verify(model, optimizer, average)
    train(model, optimizer, average, X, 2)
    assert weight.any() and average.module.get_parameter(new).any()
    assert not torch.equal(model(X), before)


def test_outside_of_containers_no_old_name_moves():
    model = build()
    names = list(model.state_dict())
    ax.grow(model, ax.After("blocks.1.fc"), probe=X)
    assert [name for name in model.state_dict() if "_grown" not in name] == names
    model.load_state_dict(build().state_dict(), strict=False)


def test_as_hook_keeps_the_names_in_a_container_too():
    model = build()
    ax.grow(model, ax.After("blocks.1", as_hook=True), probe=X)
    assert len(model.blocks) == 3 and "blocks.1._grown.0.weight" in model.state_dict()
    with pytest.raises(ax.GrowthError, match="a child _grown would run twice. Leave as_hook out"):
        ax.grow(model, ax.After("stem", as_hook=True), probe=X)
    with pytest.raises(ax.GrowthError, match="stands in no container"):
        ax.grow(model, ax.After("head", as_hook=False), probe=X)


def test_a_second_layer_goes_behind_the_first_and_the_hook_goes_with_the_last():
    model = build()
    optimizer, average = companions(model)
    ax.grow(model, ax.After("head"), optimizer, average, probe=X)
    train(model, optimizer, average, X, 2)
    first = model.head._grown[0]
    before = model(X)
    ax.grow(model, ax.After("head"), optimizer, average, probe=X)
    ax.grow(model, ax.After("head._grown"), optimizer, average, probe=X)
    assert list(model.head._grown)[0] is first and len(model.head._grown) == 3 and torch.equal(model(X), before)
    for _ in range(2):
        ax.grow(model, ax.Remove("head._grown.1"), optimizer, average, probe=X)
    assert torch.equal(model(X), before)
    ax.grow(model, ax.Remove("head._grown.0"), optimizer, average, probe=X)
    for network in (model, average.module):
        assert not network.head._forward_hooks and not network.head._modules
    assert list(model.state_dict()) == list(build().state_dict())
    ax.verify(model, optimizer, average)
    train(model, optimizer, average, X, 2)


def test_copies_files_and_exports_carry_it():
    model = build().eval()
    ax.grow(model, ax.After("head"), probe=X)
    with torch.no_grad():
        model.head._grown[0].weight.normal_()
    expected = model(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(X), expected)
        with torch.no_grad():
            twin.head._grown[0].weight.zero_()
        assert not torch.equal(twin(X), expected) and torch.equal(model(X), expected)
    assert torch.equal(torch.export.export(model, (X,)).module()(X), expected)


def outer(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def one_block(model):
    model.blocks[1].compile(backend="eager")
    return model


def wrapped_block(model):
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


@pytest.mark.parametrize("compiled", [outer, in_place, one_block, wrapped_block])
@pytest.mark.parametrize("at", ["blocks.1.fc", "norm", "blocks.1"])
def test_compiled_code_runs_the_layer_and_forgets_it_again(compiled, at):
    torch.compiler.reset()
    model = build()
    run = compiled(model)
    if compiled is wrapped_block and at == "blocks.1.fc":
        at = "blocks.1._orig_mod.fc"
    for _ in range(2):
        before = run(X)
    change = ax.grow(run, ax.After(at, as_hook=True), probe=X)
    assert torch.equal(run(X), before)
    with torch.no_grad():
        change.parameters[0].normal_()
    assert not torch.allclose(run(X), before)
    ax.grow(run, ax.Remove(f"{change.added[0][0]}.0"), probe=X)
    assert torch.equal(run(X), before)


def test_undo_and_trial_are_exact():
    model = build()
    optimizer, average = companions(model)
    grower = ax.Grower(model, optimizer, average, edits=ax.After("norm"), when=ax.when.every(1), probe=X, keep=True)
    train(model, optimizer, average, X, 2)
    names, before = list(model.state_dict()), model(X)
    with grower.trial(ax.After("blocks.0.fc")):
        train(model, optimizer, average, X, 2)
        assert "blocks.0.fc._grown.0.weight" in average.module.state_dict()
    assert torch.equal(model(X), before)
    grower.grow(ax.After("norm"))
    grower.undo()
    grower.grow(ax.After("norm"))
    train(model, optimizer, average, X, 2)
    grower.undo()
    for network in (model, average.module):
        assert list(network.state_dict()) == names
        assert not any(m._forward_hooks for m in network.modules())
    assert torch.equal(model(X), before)


def test_a_failed_growth_leaves_nothing():
    model = build()
    optimizer, average = companions(model)
    grower = ax.Grower(model, optimizer, average, edits=ax.After("norm"), when=ax.when.every(1), probe=X)
    with pytest.raises(ax.GrowthError, match="output shape|turns"):
        grower.grow(ax.After("head", functools.partial(nn.Linear, 3, 5)))
    with pytest.raises(ax.GrowthError, match="output would change"):
        grower.grow(ax.After("head", functools.partial(nn.Linear, 3, 5), init="default"))
    for network in (model, average.module):
        assert not any(m._forward_hooks or "_grown" in m._modules for m in network.modules())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_journal_rebuilds_it(device):
    model = build()
    grower = ax.Grower(model, edits=ax.After("norm"), when=ax.when.every(1), probe=X)
    for at in ("head", "head", "blocks.1", "stem.0", "norm"):
        grower.grow(ax.After(at))
    grower.grow(ax.Remove("norm._grown.0"))
    journal = json.loads(json.dumps(grower.journal.to_json()))
    with torch.device(device):
        twin = Net()
    ax.replay(twin, journal)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert [list(m._forward_hooks.values()) for m in twin.modules()] == [
        list(m._forward_hooks.values()) for m in model.modules()
    ]
    twin.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(twin(X), model(X))


def run_of(model):
    optimizer, average = companions(model)
    return (
        optimizer,
        average,
        ax.Grower(model, optimizer, average, edits=ax.After("norm"), when=ax.when.every(1), probe=X),
    )


def test_a_checkpoint_goes_on_to_the_bit(tmp_path):
    model = build()
    optimizer, average, grower = run_of(model)
    train(model, optimizer, average, X, 2)
    grower.grow(ax.After("head"))
    grower.grow(ax.After("norm", functools.partial(nn.LayerNorm, WIDTH), fade=6))
    assert "norm._grown.0.auxin_gate" in model.state_dict()
    train(model, optimizer, average, X, 3)
    ax.save(grower, tmp_path / "run")
    other = build()
    resumed, averaged, again = run_of(other)
    ax.load(tmp_path / "run", again)
    train(model, optimizer, average, X, 5)
    train(other, resumed, averaged, X, 5)
    assert "norm._grown.0.auxin_gate" not in model.state_dict()
    for a, b in ((model, other), (average, averaged)):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    net = build()
    ax.save(grower, tmp_path / "run")
    ax.load(tmp_path / "run", net)
    assert torch.equal(net(X), model(X))


class Conv(nn.Module):
    """Channels in the second axis, in the last one, and in the middle of three."""

    def __init__(self):
        super().__init__()
        self.two, self.last, self.one = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), nn.Conv1d(5, 7, 1, bias=False)
        self.act = nn.GELU()

    def forward(self, x):
        x = self.last(self.two(x).permute(0, 2, 3, 1))
        return self.act(self.one(x.flatten(1, 2).transpose(1, 2)))


@pytest.mark.parametrize(("at", "width", "axis"), [("two", 6, 1), ("last", 5, -1), ("one", 7, 1), ("act", 7, 1)])
def test_the_default_layer_stands_over_the_channels(at, width, axis):
    torch.manual_seed(0)
    model, x = Conv(), torch.randn(2, 3, 9, 9)
    before = model(x)
    ax.grow(model, ax.After(at), probe=x)
    layer = model.get_submodule(at)._grown[0]
    assert type(layer) is ResidualLinear and (layer.features, layer.axis) == (width, axis)
    assert torch.equal(model(x), before)


def test_a_residual_layer_along_an_axis_is_a_matrix_product():
    layer = ResidualLinear(3, axis=1)
    with torch.no_grad():
        layer.weight.normal_()
    x = torch.randn(2, 3, 4, 5)
    assert torch.allclose(layer(x), x + torch.einsum("oc,nchw->nohw", layer.weight, x), atol=1e-6)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, :-1],  # as padding that is cut off
        lambda x: x.transpose(0, 2)[:4],
        lambda x: x[:, :1].expand(-1, 3, -1),
        lambda x: x[..., ::2],
        lambda x: x.unfold(2, 4, 1)[..., 0, :],
    ],
)
def test_the_layout_stays_what_it_was(view):
    """What follows runs another kernel on another layout, which rounds otherwise."""
    base = torch.randn(4, 3, 9, requires_grad=True)
    x = view(base)
    layer = ResidualLinear(x.shape[-1])
    out = layer(x)
    overlapping = 0 in x.stride()
    assert torch.equal(out, x) and (overlapping or out.stride() == x.stride())
    assert torch.equal(nn.functional.gelu(out), nn.functional.gelu(x)) or overlapping
    out.square().sum().backward()
    assert (
        torch.allclose(base.grad, torch.autograd.grad(view(base).square().sum(), base)[0]) and layer.weight.grad.any()
    )


def test_other_precisions_stay_what_they_are():
    model = build().to(torch.bfloat16)
    change = ax.grow(model, ax.After("norm"), probe=X.to(torch.bfloat16))
    assert change.parameters[0].dtype == torch.bfloat16 and change.max_difference == 0


def test_layers_of_ones_own_fade_in_or_start_otherwise():
    model = build()
    optimizer, average = companions(model)
    change = ax.grow(model, ax.After("norm", functools.partial(Block, WIDTH)), optimizer, average, probe=X)
    assert change.how == "last writers zero" and change.max_difference == 0
    change = ax.grow(model, ax.After("head", functools.partial(nn.Linear, 3, 3)), optimizer, average, probe=X)
    assert change.how == "identity"
    layer = functools.partial(nn.LayerNorm, WIDTH)
    change = ax.grow(model, ax.After("blocks.0.fc", layer, fade=3), optimizer, average, probe=X)
    assert change.gates == ("blocks.0.fc._grown.0",) and change.max_difference == 0
    train(model, optimizer, average, X, 4)
    for network in (model, average.module):
        assert not list(network.get_submodule("blocks.0.fc._grown.0").buffers())
    change = ax.grow(model, ax.After("norm", layer, init="default"), optimizer, average, probe=X)
    assert change.max_difference > 0


def test_without_a_probe_it_says_what_it_needs():
    model = build()
    with pytest.raises(ax.GrowthError, match="needs one batch: pass probe=batch"):
        ax.grow(model, ax.After("head"))
    with pytest.raises(ax.GrowthError, match="init='preserve' needs one batch"):
        ax.grow(model, ax.After("head", functools.partial(nn.Linear, 3, 3)))
    ax.grow(model, ax.After("head", functools.partial(nn.Linear, 3, 3), init="identity"))
    assert type(model.head._grown[0]) is nn.Linear


class Odd(nn.Module):
    """Modules behind which nothing can stand."""

    def __init__(self):
        super().__init__()
        self.inp, self.out, self.idle = nn.Linear(4, 8), nn.Linear(6, 2), nn.Linear(4, 4)
        self.narrow, self.ignored, self.written = nn.Linear(8, 6), nn.Linear(8, 8), nn.ReLU(inplace=True)
        self.drop, self.lstm, self.pick = nn.Dropout(0.0), nn.LSTM(8, 8), Pick()
        self.own, self.chain = Own(), Chain(nn.Linear(8, 8), nn.Linear(8, 8))
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8)))

    def forward(self, x):
        x = self.drop(self.inp(x))
        self.ignored(x)
        self.written(x)
        x, _ = self.lstm(x)
        self.pick(x)
        x = self.scripted(self.chain(self.own(x)))
        return self.out(self.drop(self.narrow(x)))


class Pick(nn.Module):
    def forward(self, x):
        return x.argmax(-1)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self._grown = nn.Linear(8, 8)

    def forward(self, x):
        return self._grown(x)


class Chain(nn.Sequential):
    """Runs its children in a way of its own."""

    def forward(self, x):
        return sum(child(x) for child in self)


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("idle", "the network never calls it"),
        ("ignored", "does not depend on what it returns"),
        ("written", "does not depend on what it returns"),
        ("drop", "returns 6, 8 channels, which no one layer fits"),
        ("lstm", "returns a tuple, not one floating tensor"),
        ("pick", "returns a tensor of int64, not one floating tensor"),
        ("own", "has an attribute '_grown' of its own"),
        ("chain", "runs all of its children, in a way of its own"),
        ("scripted", "is a ScriptModule"),
        ("scripted.0", "scripted is a ScriptModule"),
        ("nowhere", "has no child 'nowhere'"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_refused_leaves_everything(at, words):
    torch.manual_seed(0)
    model = Odd()
    x = torch.randn(5, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model(x)
    tensors = [(name, id(t), t.detach().clone()) for name, t in model.named_parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ax.GrowthError, match=words):
        ax.grow(model, ax.After(at), optimizer, probe=x)
    after = [(name, id(t), t) for name, t in model.named_parameters()]
    for (name, key, value), (name_after, key_after, now) in zip(tensors, after, strict=True):
        assert (name, key) == (name_after, key_after) and torch.equal(value, now)
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert torch.equal(model(x), before) and sum(len(g["params"]) for g in optimizer.param_groups) == len(tensors)


def test_a_named_layer_must_fit_all_calls():
    model = Odd()
    with pytest.raises(ax.GrowthError, match=r"returns tensors of several sizes \(\(5, 8\), \(5, 6\)\)"):
        ax.grow(model, ax.After("drop", functools.partial(nn.Linear, 8, 8)), probe=torch.randn(5, 4))


class Taps(nn.Module):
    """A list whose entries are counted, zipped, or sliced: another entry would shift what runs."""

    def __init__(self):
        super().__init__()
        self.tapped = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.layers, self.norms = (nn.ModuleList(kind(4) for _ in range(2)) for kind in (Square, nn.LayerNorm))
        self.sliced = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    def forward(self, x):
        taps = []
        for i, layer in enumerate(self.tapped):
            x = torch.tanh(layer(x))
            taps += [x] if i in (0, 2) else []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x))
        return self.sliced[:2](x) + self.sliced[2](x) + sum(taps)


class Square(nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)


@pytest.mark.parametrize("at", ["tapped.0", "tapped.2", "layers.0", "norms.1", "sliced.0", "sliced.1", "sliced.2"])
def test_a_list_that_does_not_simply_run_keeps_its_length(at):
    torch.manual_seed(0)
    model, x = Taps(), torch.randn(3, 4)
    before = model(x)
    change = ax.grow(model, ax.After(at), probe=x)
    assert torch.equal(model(x), before) and change.added[0][0] == f"{at}._grown"


def test_shared_modules_get_one_layer_for_all_their_calls():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act = nn.Linear(4, 4), nn.Tanh()
            self.again = self.act

        def forward(self, x):
            return self.again(self.a(self.act(self.a(x))))

    torch.manual_seed(0)
    model, x = Shared(), torch.randn(3, 4)
    ax.grow(model, ax.After("again"), probe=x)
    with torch.no_grad():
        model.act._grown[0].weight.normal_()
    layer = model.act._grown[0]
    assert torch.allclose(model(x), layer(model.a(layer(model.a(x).tanh())).tanh()))


def test_the_hook_is_a_function_that_any_process_finds():
    assert pickle.loads(pickle.dumps(grown_hook)) is grown_hook


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(x + torch.tanh(self.fc(x)))


def test_behind_a_block_that_fades_in_it_waits():
    model = build()
    optimizer, average = companions(model)
    block = functools.partial(PostNorm)
    ax.grow(model, ax.Insert("blocks", block, index=1, fade=3), optimizer, average, probe=X)
    with pytest.raises(ax.GrowthError, match="blocks.1 is still fading in. Grow behind it once it is whole"):
        ax.grow(model, ax.After("blocks.1", as_hook=True), optimizer, average, probe=X)
    train(model, optimizer, average, X, 4)
    ax.grow(model, ax.After("blocks.1", as_hook=True), optimizer, average, probe=X)


def test_a_copy_of_a_block_with_a_trained_layer_behind_it_fades_in(tmp_path):
    model = build()
    optimizer, average, grower = run_of(model)
    grower.grow(ax.After("blocks.1", functools.partial(PostNorm), as_hook=True, init="default"))
    train(model, optimizer, average, X, 3)
    before = model.eval()(X)
    change = grower.grow(ax.Duplicate("blocks", by=1, order=[0, 1, 1, 2], fade=6))
    assert change.how == "fade-in" and torch.equal(model(X), before)
    train(model, optimizer, average, X, 2)
    ax.save(grower, tmp_path / "run")
    other = build()
    resumed, averaged, again = run_of(other)
    ax.load(tmp_path / "run", again)
    train(model, optimizer, average, X, 6)
    train(other, resumed, averaged, X, 6)
    for a, b in ((model, other), (average.module, averaged.module)):
        assert a.state_dict().keys() == b.state_dict().keys() and torch.equal(a.eval()(X), b.eval()(X))


def test_all_that_was_grown_goes_at_once():
    model = build()
    optimizer, average = companions(model)
    for _ in range(2):
        ax.grow(model, ax.After("head"), optimizer, average, probe=X)
    ax.grow(model, ax.Remove("head._grown"), optimizer, average, probe=X)
    assert list(model.state_dict()) == list(build().state_dict()) and not model.head._forward_hooks
    ax.verify(model, optimizer, average)


def test_replacing_a_module_does_not_lose_what_was_grown_behind_it():
    model = build()
    ax.grow(model, ax.After("blocks.1.fc"), probe=X)
    words = r"grown behind blocks.1.fc, .* Remove\('blocks.1.fc._grown'\)"
    for at in ("blocks.1.fc", "blocks.1"):
        with pytest.raises(ax.GrowthError, match=words):
            ax.grow(model, ax.Replace(at, functools.partial(Block, WIDTH)), probe=X)
    ax.grow(model, ax.Remove("blocks.1.fc._grown"), probe=X)
    ax.grow(model, ax.Replace("blocks.1", functools.partial(Block, WIDTH)), probe=X)


def test_surgery_beside_it_and_on_it():
    model = build()
    optimizer, average = companions(model)
    ax.grow(model, ax.After("head"), optimizer, average, probe=X)
    with ax.surgery(model, optimizer, average):
        model.blocks.append(Block())
        model.head._grown.append(nn.Linear(3, 3))
    train(model, optimizer, average, X, 2)
    assert len(average.module.head._grown) == 2
    before = [list(model.state_dict()), model(X)]
    with pytest.raises(KeyError), ax.surgery(model, optimizer, average):
        model.head = nn.Linear(WIDTH, 3)
        raise KeyError
    assert before[0] == list(model.state_dict()) and torch.equal(before[1], model(X))


def test_a_grower_grows_behind_one_place_again_and_again():
    model = build()
    optimizer, average = companions(model)
    grower = ax.Grower(
        model, optimizer, average, edits=ax.After("norm"), when=ax.when.every(1), probe=X, limit=ax.Limit(growths=3)
    )
    for _ in range(5):
        train(model, optimizer, average, X, 1)
        grower.step(1.0)
    assert [type(m) for m in model.norm._grown] == [ResidualLinear] * 3
    assert [entry.edit.at for entry in grower.journal] == ["norm"] * 3
