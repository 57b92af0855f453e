"""A tensor that had no entries grows some."""

import dataclasses

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.anatomy.tree import planned, resized
from auxin.axes import Axis


@dataclasses.dataclass(frozen=True)
class Widen:
    def plan(self, model, context):
        swaps = [
            resized(model, "up.weight", {0: Axis.leading(0, 2)}, torch.randn(2, 4)),
            resized(model, "up.bias", {0: Axis.leading(0, 2)}),
            resized(model, "down.weight", {1: Axis.leading(0, 2)}),
        ]
        return planned(model, self, context.seed, swaps=swaps, preserves=True, how="new columns zero")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.up, self.down = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(2, 3, bias=False)
        self.up.weight, self.up.bias = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.empty(0))
        self.down.weight = nn.Parameter(torch.empty(3, 0))

    def forward(self, x):
        return self.line(x) + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
def test_its_state_starts_afresh(kind):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(8, 4)
    opt = kind(net.parameters(), lr=0.01)

    def step():
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()

    step(), step()
    opt.zero_grad()
    ax.grow(net, Widen(), opt, probe=x)
    assert net.up.weight not in opt.state and net.line.weight in opt.state
    step(), step()
    assert all(bool(p.isfinite().all()) for p in net.parameters())
