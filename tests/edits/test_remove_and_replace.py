"""Taking a module out, and putting another in its place."""

import copy
import functools
import json

import pytest
import torch
from torch import nn

import auxin as ax


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.norm, self.extra = nn.LayerNorm(8), nn.Identity()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Linear(8, 2)})

    def forward(self, x):
        x = self.extra(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return sum(head(x) for head in self.heads.values())


@pytest.fixture
def run():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model)
    x = torch.randn(16, 8)
    train(model, optimizer, average, x, 3)
    return model, optimizer, average, x


def train(model, optimizer, average, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    optimizer.zero_grad()


def test_a_block_is_taken_out_and_those_behind_move_up(run):
    model, optimizer, average, x = run
    blocks, state = list(model.blocks), optimizer.state[model.blocks[2].up.weight]
    change = ax.grow(model, ax.Remove("blocks.1"), optimizer, average, probe=x)
    assert list(model.blocks) == [blocks[0], blocks[2]] and list(model.blocks._modules) == ["0", "1"]
    assert optimizer.state[model.blocks[1].up.weight] is state
    assert str(change).startswith("Remove('blocks.1') · -280 parameters") and change.max_difference > 0
    ax.verify(model, optimizer, average)
    train(model, optimizer, average, x, 2)


def test_a_copy_that_was_added_and_removed_leaves_the_same_function(run):
    model, optimizer, average, x = run
    before = model(x)
    ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, average, probe=x)
    change = ax.grow(model, ax.Remove("blocks.3"), optimizer, average, probe=x)
    assert torch.equal(model(x), before) and "function unchanged" in str(change)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


class Layers(nn.Module):
    """Every kind of container, with a sleeping layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.blocks = nn.ModuleList([Block(), Block()])
        self.again = list(self.blocks)
        self.named = nn.ModuleDict({"first": Block(), "last": Block()})

    def forward(self, x):
        x = self.stem(x)
        for block in (*self.again, *self.named.values()):
            x = block(x)
        return x


def all_of(model, optimizer, average):
    """Names, identities, values, order, state, averages, plain lists."""
    group = optimizer.param_groups[0]
    held = group["param_names"], [id(p) for p in group["params"]]
    return {
        "network": [(n, id(p), p.detach().clone().numpy().tobytes()) for n, p in model.named_parameters()],
        "modules": [(n, id(m)) for n, m in model.named_modules()],
        "list": [id(m) for m in model.again],
        "held": held,
        "state": {id(p): repr(s) for p, s in optimizer.state.items()},
        "average": [(n, id(p), p.detach().numpy().tobytes()) for n, p in average.module.named_parameters()],
        "average list": [id(m) for m in average.module.again],
    }


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    "edit",
    [
        ax.Insert("blocks", Block),
        ax.Insert("blocks", Block, index=0, init="default"),
        ax.Insert("stem", functools.partial(nn.Linear, 8, 8), index=1, init="default"),
        ax.Insert("named", Block, key="middle", before="last"),
        ax.Duplicate("blocks", by=1),
        ax.Duplicate("blocks", by=1, order="last", output="keep", state="copy"),
    ],
)
def test_remove_is_the_inverse_of_insert_and_duplicate(edit, steps):
    """Everything but what was trained in between is as if the block had never been."""
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(16, 8)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, average, x, 3)
    before = all_of(model, optimizer, average)
    change = ax.grow(model, edit, optimizer, average, probe=x)
    assert all_of(model, optimizer, average) != before
    train(model, optimizer, average, x, steps)
    ax.grow(model, ax.Remove(change.added[0][0]), optimizer, average, probe=x)
    after = all_of(model, optimizer, average)
    structure = ("modules", "list", "held", "average list")
    assert [after[k] for k in structure] == [before[k] for k in structure]
    assert after["state"].keys() == before["state"].keys() and (steps or after == before)
    ax.verify(model, optimizer, average)


def test_a_woken_layer_in_a_container_is_taken_out_and_not_put_to_sleep():
    model = nn.Sequential(nn.Linear(8, 8), ax.Dormant(nn.Linear(8, 8)), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    x = torch.randn(4, 8)
    function = model(x)
    ax.grow(model, ax.Wake("1"), optimizer, probe=x)
    ax.grow(model, ax.Remove("1"), optimizer, probe=x)
    assert torch.equal(model(x), function) and [type(m) for m in model] == [nn.Linear, nn.Linear]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_a_sleeping_layer_is_taken_out_too():
    model = nn.Sequential(nn.Linear(8, 8), ax.Dormant(nn.Linear(8, 8)), nn.Linear(8, 2))
    for held in (model.parameters(), [p for p in model.parameters() if p.requires_grad]):
        net = copy.deepcopy(model) if not isinstance(held, list) else model
        optimizer = torch.optim.Adam(net.parameters() if net is not model else held)
        change = ax.grow(net, ax.Remove("1"), optimizer, probe=torch.randn(4, 8))
        assert change.max_difference == 0 and len(net) == 2 and len(optimizer.param_groups[0]["params"]) == 4


def test_a_tensor_tied_to_another_layer_stays_there():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    ax.grow(model, ax.Remove("1"), optimizer, probe=torch.randn(4, 8))
    assert any(p is model[0].weight for p in optimizer.param_groups[0]["params"])
    ax.verify(model, optimizer)


@pytest.mark.parametrize(
    ("share", "where"),
    [
        (lambda m: m.add_module("c", nn.ModuleDict({"d": m.blocks[0]})), "c.d"),
        (lambda m: setattr(m, "first", m.blocks[0]), "first"),
        (lambda m: setattr(m, "some", [m.blocks[0]]), "some"),
        (lambda m: setattr(m, "by_name", {"a": m.blocks[0]}), "by_name"),
        (lambda m: object.__setattr__(m, "quiet", m.blocks[0]), "quiet"),
    ],
)
def test_a_block_that_others_share_is_refused_by_name(run, share, where):
    model, _, _, x = run
    share(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ax.GrowthError, match=rf"Remove\(at='blocks\.0'\).*also stands at {where}, which would go on"):
        ax.grow(model, ax.Remove("blocks.0"), optimizer, probe=x)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ax.verify(model, optimizer)


def test_a_named_child_is_taken_out(run):
    model, optimizer, average, x = run
    ax.grow(model, ax.Remove("heads.a"), optimizer, average, probe=x)
    assert list(model.heads) == ["b"]
    ax.verify(model, optimizer, average)


def test_an_identity_becomes_a_block_that_starts_as_one(run):
    model, optimizer, average, x = run
    before = model(x)
    change = ax.grow(model, ax.Replace("extra", Block, init="preserve"), optimizer, average, probe=x)
    assert torch.equal(model(x), before) and change.preserves and change.max_difference == 0
    ax.verify(model, optimizer, average)
    weight = model.extra.down.weight.clone()
    train(model, optimizer, average, x, 2)
    assert not torch.equal(model.extra.down.weight, weight)


def test_tensors_that_fit_are_kept_with_their_state(run):
    model, optimizer, average, x = run
    gain, state = model.norm.weight, optimizer.state[model.norm.weight]
    averaged = average.module.norm.weight.clone()
    change = ax.grow(model, ax.Replace("norm", functools.partial(nn.RMSNorm, 8)), optimizer, average, probe=x)
    assert model.norm.weight is gain and optimizer.state[gain] is state and "1 tensors kept" in str(change)
    assert torch.equal(average.module.norm.weight, averaged) and type(average.module.norm) is nn.RMSNorm
    ax.verify(model, optimizer, average)
    train(model, optimizer, average, x, 2)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.rnn, self.head = nn.LSTM(8, 8), nn.Linear(8, 2)
        self.register_module("later", None)

    def forward(self, x):
        x = self.norm(self.first(x))
        x = self.rnn(x)[0] if self.later is None else x
        return self.head(x)


@pytest.fixture
def recurrent():
    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(16, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    train(model, optimizer, average, x, 3)
    return model, optimizer, average, x


def test_a_recurrent_layer_that_kept_its_tensors_still_trains_them(recurrent):
    model, optimizer, average, x = recurrent
    expected, averaged, old = model(x), average(x), list(model.rnn.parameters())
    ax.grow(model, ax.Replace("rnn", functools.partial(nn.LSTM, 8, 8)), optimizer, average, probe=x)
    assert all(a is b for a, b in zip(model.rnn.parameters(), old, strict=True))
    assert torch.equal(model(x), expected) and torch.equal(average(x), averaged)
    weight = model.rnn.weight_hh_l0.clone()
    train(model, optimizer, average, x, 2)
    assert not torch.equal(model.rnn.weight_hh_l0, weight)


def test_running_statistics_are_kept_and_other_buffers_are_the_new_ones(recurrent):
    model, optimizer, average, x = recurrent
    mean, count = model.norm.running_mean, model.norm.num_batches_tracked
    values, averaged = mean.clone(), average.module.norm.running_mean.clone()
    model.eval()
    expected = model(x)
    edit = ax.Replace("norm", functools.partial(nn.BatchNorm1d, 8, momentum=0.01))
    change = ax.grow(model, edit, optimizer, average, probe=x)
    assert model.norm.running_mean is mean and model.norm.num_batches_tracked is count and torch.equal(mean, values)
    assert torch.equal(average.module.norm.running_mean, averaged) and model.norm.momentum == 0.01
    assert torch.equal(model(x), expected) and "5 tensors kept" in str(change)

    model = Rotated(1.0)
    optimizer = torch.optim.Adam(model.parameters())
    change = ax.grow(model, ax.Replace("turn", functools.partial(Turn, 2.0)), optimizer, probe=x)
    assert float(model.turn.angle) == 2.0 and "1 tensors kept" in str(change)  # the gain, not the angle


class Turn(nn.Module):
    def __init__(self, angle):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))
        self.register_buffer("angle", torch.tensor(angle), persistent=False)

    def forward(self, x):
        return x * self.gain * self.angle


class Rotated(nn.Module):
    def __init__(self, angle):
        super().__init__()
        self.turn, self.head = Turn(angle), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.turn(x))


def test_children_that_are_none_stay_so(recurrent):
    model, optimizer, average, x = recurrent
    ax.grow(model, ax.Replace("first", functools.partial(nn.Linear, 8, 8)), optimizer, average, probe=x)
    assert model.later is None and average.module.later is None
    train(model, optimizer, average, x, 1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def test_ties_inside_the_new_module_hold(run):
    model, optimizer, average, x = run
    with ax.surgery(model, optimizer, average):
        model.extra = Tied()
    weight = model.extra.a.weight
    ax.grow(model, ax.Replace("extra", Tied), optimizer, average, probe=x)
    assert model.extra.a.weight is weight and model.extra.b.weight is weight
    ax.verify(model, optimizer, average)


def test_plain_lists_follow_a_replacement_or_are_named(run):
    model, _, _, x = run
    model.stack = list(model.blocks)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ax.grow(model, ax.Replace("blocks.1", Block), optimizer, average, probe=x)
    assert model.stack[1] is model.blocks[1] and average.module.stack[1] is average.module.blocks[1]
    model.stack.pop()
    with pytest.raises(ax.GrowthError, match="stack refers to the old module as well"):
        ax.grow(model, ax.Replace("blocks.1", Block), optimizer, average, probe=x)


def test_a_better_layer_takes_the_state_along_step_for_step(run):
    """Linear -> Linear with the same tensors: training goes on as if nothing had been replaced, to the bit."""
    model, optimizer, average, x = run
    twin, twin_average = copy.deepcopy(model), copy.deepcopy(average)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ax.grow(model, ax.Replace("heads.a", functools.partial(nn.Linear, 8, 2)), optimizer, average, probe=x)
    train(model, optimizer, average, x, 3)
    train(twin, other, twin_average, x, 3)
    assert torch.equal(model(x), twin(x)) and torch.equal(average(x), twin_average(x))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (ax.Remove("norm"), "attribute of a Net.*Replace\\('norm', torch.nn.Identity\\)"),
        (ax.Remove(""), "the model itself"),
        (ax.Remove("blocks.9"), "no child '9'"),
        (ax.Replace("nope", nn.GELU), "no child 'nope'"),
        (ax.Replace("norm", functools.partial(nn.Linear, 8, 9)), "does not run on the probe"),
        (ax.Replace("norm", functools.partial(nn.Linear, 8, 9), init="preserve"), "cannot leave the function"),
    ],
)
def test_refusals(run, edit, words):
    model, optimizer, average, x = run
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ax.GrowthError, match=words):
        ax.grow(model, edit, optimizer, average, probe=x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ax.verify(model, optimizer, average)


def test_hooks_are_not_lost_without_a_word(run):
    model, optimizer, _, x = run
    handle = model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ax.GrowthError, match="hooks, which would never fire again"):
        ax.grow(model, ax.Replace("norm", functools.partial(nn.RMSNorm, 8)), optimizer, probe=x)
    with pytest.raises(ax.GrowthError, match="norm was replaced, and the hooks"), ax.surgery(model, optimizer):
        model.norm = nn.RMSNorm(8)
    handle.remove()
    ax.grow(model, ax.Replace("norm", functools.partial(nn.RMSNorm, 8)), optimizer, probe=x)


def test_both_replay_and_load(run, tmp_path):
    model, optimizer, average, x = run
    edits = [ax.Remove("blocks.0"), ax.Replace("norm", functools.partial(nn.RMSNorm, 8))]
    grower = ax.Grower(model, optimizer, average, edits=edits, when=ax.when.every(1), probe=x)
    for edit in edits:
        grower.grow(edit)
    train(model, optimizer, average, x, 2)
    fresh = ax.replay(Net(), json.loads(json.dumps(grower.journal.to_json())))
    assert [(n, p.shape) for n, p in fresh.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    ax.save(grower, tmp_path / "run")
    again = Net()
    optimizer_2 = torch.optim.AdamW(again.parameters(), lr=1e-2)
    average_2 = torch.optim.swa_utils.AveragedModel(again)
    grower_2 = ax.Grower(again, optimizer_2, average_2, edits=edits, when=ax.when.every(1), probe=x)
    ax.load(tmp_path / "run", grower_2)
    train(model, optimizer, average, x, 3)
    train(again, optimizer_2, average_2, x, 3)
    assert torch.equal(model(x), again(x)) and torch.equal(average(x), average_2(x))


def test_a_growth_whose_callback_raises_is_taken_back(run):
    model, optimizer, average, x = run

    def refuse(change):
        raise ZeroDivisionError

    grower = ax.Grower(
        model, optimizer, average, edits=lambda model: [], when=ax.when.every(1), probe=x, on_growth=refuse
    )
    with pytest.raises(ZeroDivisionError):
        grower.grow(ax.Duplicate("blocks", by=1))
    assert len(model.blocks) == 3 and len(grower.journal) == 0
    grower.verify()
