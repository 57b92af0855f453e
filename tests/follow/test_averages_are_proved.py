"""An average whose follower goes wrong is refused with every edit that promises that the function stays."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import auxin as ax
from auxin.follow import average as followed

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.order = list(self.blocks)
        self.late = nn.Sequential(nn.ReLU(), ax.Dormant(nn.Linear(8, 8)))

    def forward(self, x):
        x = self.inp(x)
        for block in self.order:
            x = block(x)
        return self.out(self.late(x))


class Broken(AveragedModel):
    """An average that ``damage`` meets after each growth."""


@ax.follow(Broken, wraps=lambda average: [average.module])
def follow_broken(average, change):
    steps = followed.follow_average(average, change)
    next(steps)
    yield
    next(steps)
    damage, average.damage = average.damage, lambda net: None  # once, also where several edits are one growth
    damage(average.module)
    try:
        yield
    except BaseException as error:
        steps.throw(error)


@torch.no_grad()
def rows_in_place(net):
    net.inp.weight.copy_(net.inp.weight.flip(0))


def rows_elsewhere(net):
    net.inp.weight.data = net.inp.weight.data.flip(0)


def rows_unseen(net):
    """By a way that no version counter sees."""
    net.inp.weight.data.copy_(net.inp.weight.data.flip(0))


def exchanged(net):
    net.inp.bias, net.blocks[0].down.bias = net.blocks[0].down.bias, net.inp.bias


def left_out(net):
    net.order.pop()


def in_another_order(net):
    net.blocks._modules = dict(reversed(net.blocks._modules.items()))


def not_inserted(net):
    del net.blocks[-1]


EDITS = {
    "Duplicate": ax.Duplicate("blocks", by=1),
    "Duplicate the last": ax.Duplicate("blocks", by=1, order="last"),
    "Insert": ax.Insert("blocks", Block),
    "a fade": ax.Duplicate("blocks", by=1, fade=5),
    "After": ax.After("inp"),
    "Wake": ax.Wake("late.1", fade=5),
    "Widen": ax.Widen("blocks.*.up", by=4),
    "Repeat": ax.Repeat("blocks", fade=5),
    "several": [ax.Duplicate("blocks", by=1), ax.After("inp")],
}
DAMAGE = [rows_in_place, rows_elsewhere, rows_unseen, exchanged]


def run_of(kind):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = kind(model)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return model, optimizer, average


def held(model, optimizer):
    tensors = [(name, id(t), t._version, t.shape) for name, t in model.state_dict(keep_vars=True).items()]
    return tensors, list(map(id, model.order)), list(map(id, optimizer.param_groups[0]["params"]))


def refused(edit, run, match):
    model, optimizer, average = run
    before = held(model, optimizer)
    with pytest.raises(ax.GrowthError, match=match):
        ax.grow(model, edit, optimizer, average, probe=X)
    assert held(model, optimizer) == before


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_old_values_of_an_average_that_are_no_longer_its_own(name, damage):
    model, optimizer, average = run_of(Broken)
    average.damage = damage
    refused(EDITS[name], (model, optimizer, average), "Broken: the outputs of its averaged network .* would change by")


@pytest.mark.parametrize("name", ["Duplicate", "Duplicate the last", "Insert"])
@pytest.mark.parametrize("damage", [left_out, in_another_order])
def test_blocks_of_an_average_that_do_not_stand_as_those_of_the_network(name, damage):
    model, optimizer, average = run_of(Broken)
    average.damage = damage
    told = (
        "Broken: blocks.* of its averaged network would hold|Broken: order of its averaged network would hold of them"
    )
    refused(EDITS[name], (model, optimizer, average), told)


@pytest.mark.parametrize("name", ["Duplicate", "Insert"])
def test_a_block_that_is_not_inserted(name):
    model, optimizer, average = run_of(Broken)
    average.damage = not_inserted
    refused(EDITS[name], (model, optimizer, average), "Broken lacks blocks.2.up.weight")


@pytest.mark.parametrize("damage", [rows_in_place, rows_elsewhere, exchanged, left_out])
def test_an_average_that_is_not_run_is_compared_tensor_by_tensor(damage, monkeypatch):
    """Copies at rest: an ``AveragedModel`` is not run for them, and yet nothing of it may have become other."""
    model, optimizer, average = run_of(AveragedModel)
    runs = []
    average.module.register_forward_hook(lambda *_: runs.append(1))
    ax.grow(model, EDITS["Duplicate"], optimizer, average, probe=X, dry_run=True)
    assert not runs
    regroup = followed.regroup

    def breaking(copy, known):
        damage(copy)
        return regroup(copy, known)

    monkeypatch.setattr(followed, "regroup", breaking)
    told = "no longer be the same" if damage is not left_out else "order of its averaged network would hold"
    refused(EDITS["Duplicate"], (model, optimizer, average), f"AveragedModel: .*{told}")


def test_what_is_not_broken_is_let_through():
    for edit in EDITS.values():
        for kind in (AveragedModel, Broken):
            model, optimizer, average = run_of(kind)
            average.damage = lambda net: None
            before = average(X)
            ax.grow(model, edit, optimizer, average, probe=X)
            assert torch.allclose(average(X), before, atol=1e-6)
