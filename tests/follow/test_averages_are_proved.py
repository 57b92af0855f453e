"""An average whose follower goes wrong is refused, whether or not the growth promises that the function stays."""

import functools

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
OTHER_FUNCTION = {  # where outputs tell nothing: what stays in the network has to stay in the average
    "Remove": ax.Remove("blocks.1"),
    "Replace": ax.Replace("late.0", nn.GELU),
    "Replace, tensors kept": ax.Replace("blocks.1", Block),
    "Repeat": ax.Repeat("blocks"),
    "Duplicate at once": ax.Duplicate("blocks", by=1, output="keep"),
    "Insert at once": ax.Insert("blocks", Block, init="default"),
    "Widen at random": ax.Widen("blocks.*.up", by=4, init="random"),
    "several": [ax.Duplicate("blocks", by=1), ax.Remove("blocks.1")],
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


def tied():
    """A run whose first block runs twice."""
    model, optimizer, average = run_of(Broken)
    average.damage = lambda net: None
    ax.grow(model, ax.Repeat("blocks", blocks=(0, 1)), optimizer, average, probe=X)
    return model, optimizer, average


def held(model, optimizer):
    tensors = [(name, id(t), t._version, t.shape) for name, t in model.state_dict(keep_vars=True).items()]
    return tensors, list(map(id, model.order)), list(map(id, optimizer.param_groups[0]["params"]))


def refused(edit, run, match, probe=X):
    model, optimizer, average = run
    before = held(model, optimizer)
    with pytest.raises(ax.GrowthError, match=match):
        ax.grow(model, edit, optimizer, average, probe=probe)
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


@pytest.mark.parametrize("name", OTHER_FUNCTION)
@pytest.mark.parametrize("damage", DAMAGE)
def test_old_values_where_the_function_changes(name, damage):
    model, optimizer, average = run_of(Broken)
    average.damage = damage
    told = r"Broken: (inp.weight|inp.bias|blocks.0.down.bias) of its averaged network would have other values"
    refused(OTHER_FUNCTION[name], (model, optimizer, average), told)


@pytest.mark.parametrize("damage", [rows_in_place, rows_elsewhere, exchanged])
def test_what_auxin_follows_by_itself_where_the_function_changes(damage, monkeypatch):
    """No sum over values is taken of an ``AveragedModel``: its tensors are the same ones, and nothing wrote to them."""
    model, optimizer, average = run_of(AveragedModel)
    regroup = followed.regroup

    def breaking(copy, known):
        damage(copy)
        return regroup(copy, known)

    monkeypatch.setattr(followed, "regroup", breaking)
    refused(ax.Remove("blocks.1"), (model, optimizer, average), "AveragedModel: .* would have other values")


@pytest.mark.parametrize("damage", [left_out, in_another_order])
def test_blocks_that_do_not_stand_as_those_of_the_network_where_the_function_changes(damage):
    for edit in (ax.Repeat("blocks"), ax.Duplicate("blocks", by=1, output="keep")):
        model, optimizer, average = run_of(Broken)
        average.damage = damage
        refused(edit, (model, optimizer, average), "Broken(: (blocks|order).* would hold| lacks blocks.0)")


@pytest.mark.parametrize("damage", [*DAMAGE, left_out, in_another_order])
def test_untied_blocks(damage):
    run = tied()
    run[-1].damage = damage
    refused(ax.Untie("blocks"), run, "Broken: (the outputs of|blocks|order).* its averaged network")


@pytest.mark.parametrize("damage", DAMAGE)
def test_old_values_where_there_is_no_probe(damage):
    model, optimizer, average = run_of(Broken)
    average.damage = damage
    edit = ax.Duplicate("blocks", by=1, output="keep")
    refused(edit, (model, optimizer, average), "Broken: .* would have other values", probe=None)


def of_another_dtype(net):
    net.blocks[-1].double()


def without_numbers(net):
    with torch.no_grad():
        net.blocks[-1].up.weight[0].fill_(float("nan"))


@pytest.mark.parametrize("name", ["Duplicate", "Insert", "Widen", "a fade"])
def test_an_average_that_does_not_run_any_more(name):
    told = {
        of_another_dtype: "Broken: .* runs on the probe, and would not run .*: .*dtype",
        without_numbers: "Broken: the outputs .* would change by inf",
    }
    for damage, words in told.items():
        model, optimizer, average = run_of(Broken)
        average.damage = damage
        refused(EDITS[name], (model, optimizer, average), words)


@pytest.mark.parametrize("kind", [AveragedModel, Broken, functools.partial(Broken, device="cpu")])
def test_what_is_not_broken_is_let_through(kind):
    for edit in EDITS.values():
        model, optimizer, average = run_of(kind)
        average.damage = lambda net: None
        before = average(X)
        ax.grow(model, edit, optimizer, average, probe=X)
        assert torch.allclose(average(X), before, atol=1e-6)
    for edit in OTHER_FUNCTION.values():
        model, optimizer, average = run_of(kind)
        average.damage = lambda net: None
        kept = average.module.inp.weight
        before = kept.detach().clone()
        ax.grow(model, edit, optimizer, average, probe=X)
        assert average.module.inp.weight is kept and torch.equal(kept, before)
