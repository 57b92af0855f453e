"""Widths of networks with a module under two names, with tensors as plain attributes, and with gains at zero."""

import pytest
import torch
from torch import nn

import auxin as ax

X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Shared(nn.Module):
    """One scaler is held under two names; each holds a table that is neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.ModuleDict({"scale": Scaled()}), nn.ModuleDict()
        self.second["scale"] = self.first["scale"]
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.relu(self.first["scale"](x)) + torch.tanh(self.second["scale"](x)))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = torch.ones(3), nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(x) * self.table[0]


class Residual(nn.Module):
    """As blocks of a fresh ResNet: the last gain is zero."""

    def __init__(self, frozen=False):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.BatchNorm1d(6)
        nn.init.zeros_(self.norm.weight).requires_grad_(not frozen)

    def forward(self, x):
        return x + self.norm(self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize("at", ["first.scale.layer", "second.scale.layer"])
def test_a_module_under_two_names_gets_wider(at):
    torch.manual_seed(0)
    model = Shared().double()
    before = model(X)
    assert [w.why_not for w in ax.sites(model, X).widths if not w.fits] == []
    ax.grow(model, ax.Widen(at, by=3), probe=X)
    assert model.second["scale"] is model.first["scale"] and model.first["scale"].layer.out_features == 7
    assert torch.allclose(model(X), before, rtol=0, atol=1e-13)


def test_what_stands_behind_a_gain_of_zero_is_noted_and_learns():
    torch.manual_seed(0)
    model = Residual().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    change = ax.grow(model, ax.Widen("up", by=4), optimizer, probe=X)
    assert "no gradient yet at the new entries" in str(change)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.down.weight[:, 8:].any()


def test_what_stands_behind_a_frozen_gain_of_zero_is_refused():
    model = Residual(frozen=True).double()
    with pytest.raises(ax.GrowthError, match="they would never learn"):
        ax.grow(model, ax.Widen("up", by=4), torch.optim.SGD(model.parameters(), lr=0.1), probe=X)
