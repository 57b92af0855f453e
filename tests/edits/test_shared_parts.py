"""Blocks that share a module or a tensor with one another: a copy shares it too, and nobody else's weights change."""

import copy

import pytest
import torch
from torch import nn

import auxin as ax


class Block(nn.Module):
    """x + place(x), then a residual branch; all blocks have the same ``place``."""

    def __init__(self, place):
        super().__init__()
        self.place, self.up, self.down = place, nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        x = x + self.place(x)
        return x + self.down(torch.relu(self.up(x)))


class SharedPlace(nn.Module):
    def __init__(self, owned):
        super().__init__()
        place = nn.Linear(6, 6)
        if owned:
            self.place = place
        self.blocks = nn.ModuleList(Block(place) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class TiedDown(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(nn.Linear(6, 6)) for _ in range(3))
        for block in self.blocks:
            block.down.weight = self.blocks[0].down.weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


BUILDS = {
    "held by the network too": lambda: SharedPlace(True),
    "held by the blocks only": lambda: SharedPlace(False),
    "a tied last writer": TiedDown,
}


@pytest.mark.parametrize("content", ["copy", "fresh"])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
def test_what_is_shared_stays_and_the_copy_fades_in(build, content):
    model, x = build(), torch.randn(4, 6)
    before, was = model(x).detach(), {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    change = ax.grow(model, ax.Duplicate("blocks", by=1, content=content), optimizer, probe=x)
    assert change.gates == ("blocks.3",)
    assert torch.equal(model(x), before)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in was.items())


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
def test_refused_without_a_fade_and_nothing_changes(build):
    model, x = build(), torch.randn(4, 6)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ax.GrowthError, match="tied weights.*it can fade in: fade=100"):
        ax.grow(model, ax.Duplicate("blocks", by=1, fade=0), optimizer, probe=x)
    assert len(model.blocks) == 3
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert model.blocks[0].place is model.blocks[1].place or build is TiedDown
