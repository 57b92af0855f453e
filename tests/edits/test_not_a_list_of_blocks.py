"""Containers that only look like a list of repeated blocks: refused with the reason, and nothing changes."""

import copy

import pytest
import torch
from torch import nn

import auxin as ax


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Summed(nn.Module):
    """Branches beside one another: a copy that returns its input would be added all the same."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(Branch() for _ in range(3))

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


class Joined(Summed):
    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], dim=-1)


class Collected(Summed):
    """One after the other, but what each of them gives is used once more."""

    def forward(self, x):
        total = 0
        for branch in self.branches:
            x = branch(x)
            total = total + x
        return total


class Named(Summed):
    """By name in forward: a fourth one never runs."""

    def forward(self, x):
        return self.branches[2](self.branches[1](self.branches[0](x)))


class Widths(Summed):
    """Blocks that change the width cannot be repeated."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 10))])

    def forward(self, x):
        for branch in self.branches:
            x = branch(x)
        return x


REASONS = {
    Summed: "uses more of what each of them gives than the next one is given",
    Joined: r"output would change from \(4, 18\) to \(4, 24\)",
    Collected: "uses more of what each of them gives than the next one is given",
    Named: r"branches\.3: the network's forward never calls it",
    Widths: "no tensors of a Sequential can be zeroed .* a gate does not make it one either",
}


@pytest.mark.parametrize("build", REASONS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("fade", [0, 100])
def test_refused(build, fade):
    model, x = build(), torch.randn(4, 6)
    twin, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters())
    before = [id(p) for p in model.parameters()]
    reason = REASONS[build] if fade or build is not Widths else "no tensors of a Sequential can be zeroed"
    with pytest.raises(ax.GrowthError, match=reason):
        ax.grow(model, ax.Duplicate("branches", by=1, fade=fade), optimizer, probe=x)
    assert [id(p) for p in model.parameters()] == before == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert torch.equal(model(x), twin(x))


def test_blocks_of_different_types_are_copied_each_as_it_is():
    torch.manual_seed(0)

    class Wide(Branch):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)

    model, x = nn.Sequential(Branch(), Wide(), Branch()), torch.randn(4, 6)
    before = model(x)
    ax.grow(model, ax.Duplicate("", order=[0, 1, 1, 2]), torch.optim.AdamW(model.parameters()), probe=x)
    assert [type(m).__name__ for m in model] == ["Branch", "Wide", "Wide", "Branch"] and torch.equal(model(x), before)
