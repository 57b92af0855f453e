"""What people do around a fade-in or a warm-up: other optimizers, copies, hooks, compiled networks."""

import copy
import dataclasses
import functools

import bert
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import auxin as ax
from auxin.gate import gated
from auxin.ramp import ramps_on

FADE = 4


class Post(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + torch.tanh(self.inner(x)))


class Net(nn.Module):
    def __init__(self, block=Post):
        super().__init__()
        self.blocks, self.out = nn.ModuleList(block() for _ in range(2)), nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = hidden(block(x))
        return self.out(x)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    note: str = dataclasses.field(default="", init=False)


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: torch.Tensor


class Structured(Post):
    """Returns the hidden states inside something; takes them as a tensor."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        y = super().forward(x)
        if self.kind == "nested":
            return {"states": {"hidden": (y, None)}}
        return Frozen(y) if self.kind == "frozen" else Output(y)


def hidden(out):
    if isinstance(out, dict):
        return out["states"]["hidden"][0]
    return out if isinstance(out, torch.Tensor) else out.hidden


def batch():
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def step(model, optimizer):
    optimizer.zero_grad()
    model(batch()).square().mean().backward()
    optimizer.step()


def ready(block=Post, *, edit=None, average=False, rewarm=0):
    """A network that has begun to fade in, two optimizer steps ago at most."""
    torch.manual_seed(0)
    model = Net(block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    companions = (AveragedModel(model),) if average else ()
    edit = edit or ax.Duplicate("blocks", by=1, fade=FADE)
    ax.grow(model, edit, optimizer, *companions, probe=batch(), rewarm=rewarm)
    step(model, optimizer)
    optimizer.zero_grad()
    return (model, optimizer, *companions)


def gates(model):
    return {path: float(block.auxin_gate) for path, block in gated(model)}


def test_a_gate_that_the_given_optimizer_does_not_open_is_named():
    model, optimizer = ready()
    ax.verify(model, optimizer)
    other = torch.optim.AdamW(model.parameters(), lr=1e-2)
    twin, copied = copy.deepcopy((model, optimizer))  # torch copies no hooks of an optimizer
    wording = r"blocks.2 has a gate, open to 0.25, that no step of these optimizers opens further"
    for network, given in ((model, other), (twin, copied)):
        with pytest.raises(ax.GrowthError, match=wording):
            ax.verify(network, given)
        with pytest.raises(ax.GrowthError, match=r"close_gate\(model.blocks\[2\]\)|close_gate"):
            ax.grow(network, ax.Duplicate("blocks", by=1), given, probe=batch())
    from auxin.gate import close_gate

    close_gate(twin.blocks[2])
    ax.verify(twin, copied)


def test_a_copy_of_a_fading_block_put_in_by_hand_is_refused():
    model, optimizer = ready()
    with pytest.raises(ax.GrowthError, match="blocks.3 has a gate"), ax.surgery(model, optimizer):
        model.blocks.append(copy.deepcopy(model.blocks[2]))
    assert len(model.blocks) == 3
    for _ in range(FADE):
        step(model, optimizer)
    assert not gates(model)


def test_an_average_built_in_mid_fade_is_named_at_once():
    run = bert.Run()
    run.grower.grow(run.edit)
    run.train(1)
    with pytest.raises(
        ax.GrowthError, match="AveragedModel has a gate at layers.2 that no step of these optimizers opens"
    ):
        ax.verify(run.model, run.optimizer, AveragedModel(run.model))


def test_the_average_of_a_compiled_network_opens_its_gates_too():
    torch.manual_seed(0)
    model = Net()
    compiled = torch.compile(model, backend="eager")
    optimizer, average = torch.optim.SGD(model.parameters(), lr=0.1), AveragedModel(compiled)
    ax.grow(compiled, ax.Duplicate("blocks", by=1, fade=FADE), optimizer, average, probe=batch())
    for k in range(1, FADE + 2):
        step(model, optimizer)
        average.update_parameters(compiled)
        assert list(gates(average).values()) == list(gates(model).values()) == ([k / FADE] if k < FADE else [])


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.ModuleList(Post() for _ in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        y = x
        for item in self.items:
            y = item(y)
        return self.norm(x + y)


@pytest.mark.parametrize("output", ["zero", "keep"])
def test_a_copy_of_a_block_that_holds_a_fading_one_is_whole(output):
    model, optimizer, average = ready(Stage, edit=ax.Duplicate("blocks.0.items", by=1, fade=FADE), average=True)
    assert list(gates(model)) == ["blocks.0.items.2"]
    edit = ax.Duplicate("blocks", order=[0, 0, 1], output=output, fade=FADE)
    ax.grow(model, edit, optimizer, average, probe=batch())
    assert set(gates(model)) == {"blocks.0.items.2", *(["blocks.1"] if output == "zero" else [])}
    for _ in range(FADE):
        step(model, optimizer)
    assert not gates(model) and not gates(average) and ramps_on(optimizer) is None


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_layer_that_wakes_warms_up(name, held):
    updates = {}
    for rewarm in (0, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), ax.Dormant(nn.Linear(8, 8)), nn.Linear(8, 2))
        parameters = [p for p in model.parameters() if held or p.requires_grad]
        optimizer = getattr(torch.optim, name)(parameters, lr=0.01)
        change = ax.grow(model, ax.Wake("1"), optimizer, probe=batch(), rewarm=rewarm)
        assert ("warms up over 4 optimizer steps" in str(change)) == bool(rewarm)
        before = model[1].weight.detach().clone(), model[0].weight.detach().clone()
        step(model, optimizer)
        updates[rewarm] = model[1].weight - before[0], model[0].weight - before[1]
    torch.testing.assert_close(updates[4][0], updates[0][0] / 4, rtol=1e-3, atol=1e-7)
    assert torch.equal(updates[4][1], updates[0][1])


def test_a_growth_in_a_hook_of_the_step_takes_part_from_the_next_step():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    edit = ax.Duplicate("blocks", by=1, fade=FADE)
    grower = ax.Grower(model, optimizer, edits=edit, when=ax.when.at([1, 2]), probe=batch(), rewarm=3)
    optimizer.register_step_post_hook(lambda *_: grower.step(1.0))
    seen = []
    for _ in range(FADE + 2):
        step(model, optimizer)
        seen.append([round(share * FADE) for share in gates(model).values()])
    assert seen == [[0], [1, 0], [2, 1], [3, 2], [3], []]


def test_a_fading_block_that_surgery_moves_goes_on_in_the_average_too():
    model, optimizer, average = ready(average=True)
    with ax.surgery(model, optimizer, average):
        model.blocks = nn.ModuleList([*model.blocks, Post()])
        model.blocks[0], model.blocks[2] = model.blocks[2], nn.Sequential(model.blocks[0])
    assert list(gates(model)) == ["blocks.0"] and list(gates(average)) == ["module.blocks.0"]
    for _ in range(FADE - 1):
        step(model, optimizer)
        average.update_parameters(model)
    assert not gates(model) and not gates(average)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none(fused):
    torch.manual_seed(0)
    model = Net()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused), torch.amp.GradScaler("cpu")
    ax.grow(model, ax.Duplicate("blocks", by=1, fade=FADE), optimizer, scaler, probe=batch(), rewarm=FADE)
    seen = []
    for factor in (1.0, float("inf"), float("inf"), 1.0, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * model(batch()).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append([round(share * FADE) for share in gates(model).values()])
    assert seen == [[1], [1], [1], [2], [3], []] and ramps_on(optimizer) is None


class Wrapper:
    """Not of torch: it has no hooks."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}

    def step(self):
        self.inner.step()


ax.follow(Wrapper, like=torch.optim.AdamW)


@pytest.mark.parametrize("given", [{"output": "zero"}, {"output": "keep"}])
def test_an_optimizer_without_hooks_is_refused(given):
    model = Net()
    optimizer = Wrapper(torch.optim.AdamW(model.parameters()))
    edit = ax.Duplicate("blocks", by=1, **given)
    rewarm = 0 if given["output"] == "zero" else 4
    with pytest.raises(ax.GrowthError, match="Wrapper has no register_step_pre_hook .* so no fade-in and no warm-up"):
        ax.grow(model, edit, optimizer, probe=batch(), rewarm=rewarm)
    assert len(model.blocks) == 2 and len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    ax.grow(model, ax.Duplicate("blocks", by=1, output="keep"), optimizer, probe=batch())


def test_compiled_the_gate_is_applied_ramped_and_gone():
    for whole in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net()
        for block in () if whole else model.blocks:
            block.compile(backend="eager")
        called = torch.compile(model, backend="eager") if whole else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        before = called(batch())
        ax.grow(called, ax.Duplicate("blocks", by=1, fade=FADE), optimizer, probe=batch())
        moved = []
        for _ in range(FADE + 2):
            out = called(batch())
            with torch.compiler.set_stance("force_eager"):
                assert torch.equal(out, model(batch()))
            moved.append(float((out - before).norm().detach()))
            step(called, optimizer)
        assert moved[0] == 0 and not gates(model)
        assert moved[1:-1] == pytest.approx([k * moved[1] for k in range(1, FADE + 1)], rel=1e-3)


def test_compiled_a_gate_that_comes_back_with_a_checkpoint_is_applied(tmp_path):
    """torch.compile does not look whether hooks have been added to a module that it has seen before."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net()
    compiled, optimizer = torch.compile(model, backend="eager"), torch.optim.SGD(model.parameters(), lr=0.0)
    edit = ax.Duplicate("blocks", by=1, fade=FADE)
    grower = ax.Grower(model, optimizer, edits=edit, when=ax.when.every(10**6), probe=batch())
    grower.grow(edit)
    step(compiled, optimizer)
    ax.save(grower, tmp_path)
    for _ in range(FADE):
        step(compiled, optimizer)
    assert not gates(model)
    ax.load(tmp_path, grower)
    assert gates(model) == {"blocks.2": 1 / FADE}
    out = compiled(batch())
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(out, model(batch()))


@pytest.mark.parametrize("kind", ["init=False", "frozen", "nested"])
def test_blocks_that_return_structures(kind):
    block = functools.partial(Structured, kind)
    torch.manual_seed(0)
    model = Net(block)
    before = model(batch())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    change = ax.grow(model, ax.Duplicate("blocks", by=1, fade=FADE), optimizer, probe=batch())
    assert change.gates == ("blocks.2",) and torch.equal(model(batch()), before)
    for _ in range(FADE):
        step(model, optimizer)
    assert not gates(model)


class Zeros(Post):
    """One matrix behind the other, both zero: never anything but zero, with a gate or without."""

    def __init__(self, first=False, bias=False):
        super().__init__()
        self.outer = nn.Linear(8, 8)
        for layer in (self.outer,) if first else (self.inner, self.outer):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, 1.0 if bias else 0.0)

    def forward(self, x):
        return self.norm(x + self.outer(torch.tanh(self.inner(x))))


class ZerosBeforeNorm(Zeros):
    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(self.norm(x))))


@pytest.mark.parametrize("layer", [Zeros, ZerosBeforeNorm])
def test_g3_a_product_of_zeros_is_refused(layer):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.raises(ax.GrowthError, match="inner.weight, outer.weight of the new Zeros.* are all zeros"):
        ax.grow(model, ax.Insert("blocks", layer), optimizer, probe=batch())
    assert len(model.blocks) == 2 and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("given", [{"first": True}, {"bias": True}], ids=str)
def test_zeros_that_come_alive_fade_in(given):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ax.grow(model, ax.Insert("blocks", functools.partial(Zeros, **given), fade=FADE), optimizer, probe=batch())
    for _ in range(FADE + 2):
        step(model, optimizer)
    assert all(p.grad.any() for p in model.parameters()) and not gates(model)


class Checkpointed(Net):
    reentrant: bool | None = None

    def forward(self, x):
        if self.reentrant is None:
            return super().forward(x)
        x = x.requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.out(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_change_nothing(reentrant):
    networks = []
    for chosen in (None, reentrant):
        torch.manual_seed(0)
        model = Checkpointed()
        model.reentrant = chosen
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        change = ax.grow(model, ax.Duplicate("blocks", by=1, fade=FADE), optimizer, probe=batch())
        assert change.gradient_ratio > 0.1 and all(p.grad is None for p in model.parameters())
        for _ in range(FADE + 1):
            step(model, optimizer)
        assert not gates(model)
        networks.append(model.state_dict())
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[1])
