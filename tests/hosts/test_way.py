"""The way back to an earlier structure: every edit, grown here or in another process."""

from functools import partial

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.hosts.way import Way
from auxin.journal import fingerprint


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.inner(torch.relu(self.norm(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(8, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.late = nn.Sequential(nn.ReLU(), ax.Dormant(nn.Linear(8, 8)))

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.late(x))


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
EDITS = {
    "Duplicate": ax.Duplicate("blocks", by=1),
    "Insert": ax.Insert("blocks", Block, index=1),
    "After": ax.After("inp"),
    "Wake": ax.Wake("late.1"),
    "Replace": ax.Replace("blocks.0", partial(nn.Linear, 8, 8)),
    "Remove": ax.Remove("blocks.1"),
    "a fade": ax.Insert("blocks", partial(nn.Linear, 8, 8), index=1, fade=50),
}


def built(edit, **options):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model)
    return ax.Grower(model, optimizer, average, edits=edit, when=ax.when.every(1), probe=X, **options), average


def trained(grower, steps=2):
    optimizer = grower.optimizers[0]
    for _ in range(steps):
        grower.model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def picture(grower):
    model, (group,) = grower.model, grower.optimizers[0].param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    children = {path: list(module._modules) for path, module in model.named_modules()}
    return fingerprint(model), list(model.state_dict()), trains, children, [names[id(p)] for p in group["params"]]


@pytest.mark.parametrize("name", EDITS)
def test_back_to_before_a_growth_and_forward_again(name):
    grower, average = built(EDITS[name])
    way = Way()
    trained(grower)
    before, state = picture(grower), grower.state_dict()
    weights = {key: t.clone() for key, t in grower.model.state_dict().items()}
    output = grower.model(X)
    with way.noting(grower.model, 0):
        assert grower.step() is not None
    after, grown = picture(grower), grower.state_dict()
    trained(grower)
    way.to(grower, state)
    assert picture(grower) == before and not grower.journal.entries
    assert list(average.module.state_dict()) == list(weights)
    grower.model.load_state_dict(weights)
    assert torch.equal(grower.model(X), output)
    grower.verify()
    grower.state_dict()
    trained(grower)
    way.to(grower, grown)
    assert picture(grower) == after and len(grower.journal) == 1
    grower.verify()
    trained(grower)


@pytest.mark.parametrize("name", EDITS)
def test_back_to_before_a_growth_of_another_process(name):
    grower, _ = built(EDITS[name])
    state, before = grower.state_dict(), picture(grower)
    assert grower.step() is not None
    trained(grower)
    grown, way = grower.state_dict(), Way()
    if name in ("Wake", "Replace", "Remove"):
        with pytest.raises(ax.GrowthError, match="no way back to before this growth: .* Build the network that it was"):
            way.to(grower, state)
        assert grower.state_dict() == grown
    else:
        way.to(grower, state)
        assert picture(grower) == before
        grower.verify()


def test_what_others_have_changed_since_stays():
    grower, _ = built(EDITS["Duplicate"])
    way, state = Way(), grower.state_dict()
    with way.noting(grower.model, 0):
        grower.step()
    grower.model.attached = "by a host"
    way.to(grower, state)
    assert grower.model.attached == "by a host"


def test_a_growth_that_was_rolled_back_in_between():
    grower, _ = built([EDITS["Duplicate"], EDITS["Insert"]])
    way = Way()
    with way.noting(grower.model, 0):
        grower.grow(EDITS["Duplicate"])
    first = grower.state_dict()
    grower.undo()
    with way.noting(grower.model, 0):
        grower.grow(EDITS["Insert"])
    trained(grower)
    way.to(grower, first)
    assert [type(entry.edit) for entry in grower.journal] == [ax.Duplicate] and len(grower.model.blocks) == 3
    grower.verify()
