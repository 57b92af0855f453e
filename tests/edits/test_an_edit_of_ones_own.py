"""An edit that widens two Linears, written in this one file: every companion follows it."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax
from auxin.anatomy.tree import planned, resized
from auxin.axes import Axis
from auxin.change import Assign, Swap
from auxin.listing import module_at

sys.path.insert(0, str(Path(__file__).parent.parent / "conformance"))
sys.path.insert(0, str(Path(__file__).parent.parent / "ddp"))
from companions import SCHEDULES, SIMPLE
from processes import on_ranks

torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True)
class Widen:
    """More hidden units between two Linears: their incoming weights random, their outgoing ones zero."""

    first: str
    second: str
    by: int

    def plan(self, model, context):
        up = module_at(model, self.first)
        size = up.out_features
        axis = Axis.leading(size, size + self.by)
        random = torch.randn(size + self.by, up.in_features, generator=torch.Generator().manual_seed(context.seed))
        return planned(
            model,
            self,
            context.seed,
            swaps=[
                resized(model, f"{self.first}.weight", {0: axis}, 0.3 * random),
                resized(model, f"{self.first}.bias", {0: axis}),
                resized(model, f"{self.second}.weight", {1: axis}),
            ],
            assigns=[
                Assign(self.first, "out_features", size, size + self.by),
                Assign(self.second, "in_features", size, size + self.by),
            ],
            preserves=True,
            how="new columns zero",
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def ready(kind=torch.optim.AdamW, schedule="none", **options):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), Block(), Block(), nn.Linear(8, 2)), torch.randn(16, 4)
    opt = kind(net.parameters(), **options)
    make = SCHEDULES[schedule]
    sched = [] if make is None else [make(opt)]
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    train(net, opt, sched, ema, x, 3)
    opt.zero_grad()
    return net, opt, sched, ema, x


def train(net, opt, sched, ema, x, steps):
    for _ in range(steps):
        opt.zero_grad()
        (net(x) - x[:, :2].sin()).square().mean().backward()
        opt.step()
        for one in sched:
            one.step(1.0) if isinstance(one, torch.optim.lr_scheduler.ReduceLROnPlateau) else one.step()
        ema.update_parameters(net)


EDIT = Widen("1.up", "1.down", 5)


@pytest.mark.parametrize("optimizer", [*SIMPLE, "LBFGS"])
def test_every_optimizer_and_average_follows(optimizer):
    kind, options = SIMPLE.get(optimizer, (torch.optim.SGD, {"lr": 0.1}))
    net, opt, _, ema, x = ready(kind, **options)
    if optimizer == "LBFGS":
        opt = torch.optim.LBFGS(net.parameters(), max_iter=3)
        opt.step(lambda: _loss(net, opt, x))
        opt.zero_grad()
    before, averaged = net(x).detach(), ema(x).detach()
    old = {n: p.detach().clone() for n, p in ema.module.named_parameters()}
    change = ax.grow(net, EDIT, opt, ema, probe=x)
    assert net[1].up.weight.shape == (17, 8) and net[1].down.in_features == 17
    assert torch.allclose(net(x), before, atol=1e-6) and torch.allclose(ema(x), averaged, atol=1e-6)
    assert torch.equal(ema.module[1].up.weight[:12], old["1.up.weight"])
    assert "1.up.weight (12, 8) -> (17, 8)" in str(change) and change.preserves
    if optimizer == "LBFGS":
        opt.step(lambda: _loss(net, opt, x))
    else:
        train(net, opt, [], ema, x, 3)
    ax.verify(net, opt, ema)


def _loss(net, opt, x):
    opt.zero_grad()
    loss = (net(x) - x[:, :2].sin()).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_notices(schedule):
    net, opt, sched, ema, x = ready(torch.optim.SGD, schedule, lr=0.01, momentum=0.5)
    twin, topt, tsched, tema, _ = ready(torch.optim.SGD, schedule, lr=0.01, momentum=0.5)
    ax.grow(net, EDIT, opt, *sched, ema, probe=x)
    for _ in range(4):
        train(net, opt, sched, ema, x, 1)
        train(twin, topt, tsched, tema, x, 1)
        assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in topt.param_groups]


def test_old_entries_take_the_same_first_step_and_a_rewarm_holds_only_the_new_ones_back():
    net, opt, _, ema, x = ready(lr=0.01)
    twin, topt, _, tema, _ = ready(lr=0.01)
    change = ax.grow(net, EDIT, opt, ema, probe=x, rewarm=4)
    start = net[1].down.weight.detach().clone()
    train(net, opt, [], ema, x, 1), train(twin, topt, [], tema, x, 1)
    assert torch.allclose(net[1].up.weight[:12], twin[1].up.weight, atol=1e-6)
    assert torch.allclose(net[1].down.weight[:, :12], twin[1].down.weight, atol=1e-6)
    moved = (net[1].down.weight - start)[:, 12:].abs()
    assert 0 < moved.max() < 0.26 * 0.0101 and "warms up over 4 optimizer steps" in str(change)


def test_a_rewarm_goes_on_with_its_entries_through_a_further_growth_and_a_checkpoint(tmp_path):
    def run():
        net, opt, _, ema, x = ready(lr=0.01)
        grower = ax.Grower(net, opt, ema, edits=EDIT, when=ax.when.every(10**9), probe=x, rewarm=6)
        return net, opt, ema, x, grower

    net, opt, ema, x, grower = run()
    grower.grow(EDIT)
    train(net, opt, [], ema, x, 2)
    opt.zero_grad()
    grower.grow(dataclasses.replace(EDIT, by=2))
    train(net, opt, [], ema, x, 1)
    ax.save(grower, tmp_path)
    twin, topt, tema, _, again = run()
    ax.load(tmp_path, again, allow=[Widen])
    train(net, opt, [], ema, x, 4), train(twin, topt, [], tema, x, 4)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_trial_undo_replay_and_flow():
    net, opt, _, ema, x = ready(lr=0.01)
    grower = ax.Grower(net, opt, ema, edits=EDIT, when=ax.when.every(1), probe=x)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with grower.trial(EDIT):
        train(net, opt, [], ema, x, 2)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    opt.zero_grad()
    grower.step()
    grower.undo()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters()) and net[1].up.out_features == 12
    change = grower.grow(EDIT)
    assert change.gradient_ratio is not None
    train(net, opt, [], ema, x, 2)
    assert grower.flow.readings and set(grower.flow.readings[-1].ratios) == {"1.up", "1.down"}
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 8), Block(), Block(), nn.Linear(8, 2))
    ax.replay(empty, grower.journal, allow=[Widen])
    assert [p.shape for p in empty.parameters()] == [p.shape for p in net.parameters()]


def test_what_is_new_in_part_cannot_be_frozen_or_grouped_alone():
    net, opt, _, ema, x = ready(lr=0.01)
    grower = ax.Grower(net, opt, ema, edits=EDIT, when=ax.when.every(1), probe=x)
    grower.grow(EDIT)
    with pytest.raises(ax.GrowthError, match="1.up.weight is new only in part"):
        grower.freeze_old()
    with pytest.raises(ax.GrowthError, match="stays in its group, which holds whole tensors"):
        ax.grow(net, EDIT, opt, ema, probe=x, group={"lr": 0.1})


class Wrong(Widen):
    """Maps that do not fit."""


def broken(model, edit, **words):
    change = Widen.plan(edit, model, dataclasses.make_dataclass("PlanContext", [("seed", int)])(1))
    first = change.swaps[0]
    return dataclasses.replace(change, swaps=(dataclasses.replace(first, **words), *change.swaps[1:]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"axes": (Axis.leading(11, 17), Axis.same(8))}, "1.up.weight: the map of axis 0 leads from 11 to 17"),
        ({"axes": (Axis.leading(12, 16), Axis.same(8))}, "1.up.weight: the map of axis 0 leads from 12 to 16"),
        ({"axes": (Axis.leading(12, 17),)}, "1.up.weight: 1 axes are given"),
        ({"value": torch.zeros(17, 8, dtype=torch.float64)}, "would become torch.float64"),
        ({"name": "weights"}, "1.up.weights is to go on in another shape, and Linear has no such tensor"),
    ],
)
def test_maps_that_do_not_fit_are_refused_and_nothing_changes(words, message, monkeypatch):
    net, opt, _, ema, x = ready(lr=0.01)
    before = [t.clone() for t in (*net.state_dict().values(), *ema.state_dict().values())]
    monkeypatch.setattr(Wrong, "plan", lambda self, model, context: broken(model, self, **words))
    with pytest.raises(ax.GrowthError, match=message):
        ax.grow(net, Wrong("1.up", "1.down", 5), opt, ema, probe=x)
    after = (*net.state_dict().values(), *ema.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    train(net, opt, [], ema, x, 1)


def test_both_factors_zero_never_learn_and_are_refused():
    net, opt, _, ema, x = ready(lr=0.01)

    @dataclasses.dataclass(frozen=True)
    class Dead(Widen):
        def plan(self, model, context):
            change = super().plan(model, context)
            first = resized(model, f"{self.first}.weight", {0: Axis.leading(12, 17)})
            return dataclasses.replace(change, swaps=(first, *change.swaps[1:]))

    globals()["Dead"], Dead.__qualname__ = Dead, "Dead"
    with pytest.raises(ax.GrowthError, match="no gradient reaches the new entries"):
        ax.grow(net, Dead("1.up", "1.down", 5), opt, ema, probe=x)
    assert net[1].up.out_features == 12


def wrapped_and_grown(rank):
    net, opt, _, ema, x = ready(lr=0.01)
    ddp = DistributedDataParallel(net)
    half = x[rank::2]
    train(ddp, opt, [], ema, half, 2)
    opt.zero_grad()
    ax.grow(ddp, EDIT, opt, ema, probe=half)
    train(ddp, opt, [], ema, half, 3)
    return torch.cat([p.detach().flatten() for p in (*net.parameters(), *ema.module.parameters())]).numpy()


def test_two_ranks_grow_alike():
    """DistributedDataParallel: both ranks hold the same."""
    one, other = on_ranks(2, wrapped_and_grown)
    assert one.tobytes() == other.tobytes() and one.size


def test_a_swap_says_what_it_holds():
    net = nn.Linear(2, 2)
    swap = resized(net, "weight", {0: Axis.inserted(2, 0, 1)}, 7.0)
    assert isinstance(swap, Swap) and swap.value[0].tolist() == [7, 7] and torch.equal(swap.value[1:], net.weight)
    with pytest.raises(ax.GrowthError, match="has no tensor 'weights'"):
        resized(net, "weights", {})
    with pytest.raises(ax.GrowthError, match="leads from 3 to 4"):
        resized(net, "weight", {0: Axis.leading(3, 4)})
