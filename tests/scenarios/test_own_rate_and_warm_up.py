"""A tenth of the learning rate for a new layer, and a warm-up of 200 steps: both hold at every step, the old ones never
notice.
"""

import functools

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import auxin as ax

GROWN_AT, WARM_UP, END = 30, 200, 300
SCHEDULES = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=END + 1, cycle_momentum=False),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, END),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 50)),
    "WSD": lambda o: ax.schedule.wsd(o, 20, 60, total=END),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def run(name, grow):
    """Rates of all groups, and how far the new parameters moved, at each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SCHEDULES[name](optimizer)
    x = torch.randn(8, 4)
    rates, moves, new = [], [], []
    for step in range(END):
        optimizer.zero_grad()
        if step == GROWN_AT and grow:
            base = optimizer.param_groups[0]["initial_lr"]
            group, edit = {"lr": 0.1 * base}, ax.Insert("", functools.partial(Block), index=1)
            new = ax.grow(model, edit, optimizer, schedule, probe=x, group=group, rewarm=WARM_UP).parameters
        model(x).square().mean().backward()
        before = [p.detach().clone() for p in new]
        wanted = [optimizer.param_groups[-1]["lr"] * p.grad for p in new]
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        moves.append([(b - p.detach(), w) for b, p, w in zip(before, new, wanted, strict=True)])
        schedule.step()
    return rates, moves


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_tenth_of_the_rate_after_a_warm_up(name):
    rates, moves = run(name, grow=True)
    assert [r[0] for r in rates] == [r[0] for r in run(name, grow=False)[0]]
    for step in range(GROWN_AT, END):
        old, own = rates[step]
        assert own == pytest.approx(0.1 * old, rel=1e-9)
        share = min(1.0, (step - GROWN_AT + 1) / WARM_UP)
        for moved, full in moves[step]:
            torch.testing.assert_close(moved, share * full, rtol=1e-3, atol=1e-7)
