"""Where a copy of the last block cannot start silent, the order that copies another one is offered, and works."""

import re

import pytest
import torch
from torch import nn

import auxin as ax

X = torch.randn(5, 8)


class Block(nn.Module):
    def __init__(self, width=8, out=None):
        super().__init__()
        self.fc, self.skip = nn.Linear(width, out or width), nn.Linear(width, out) if out else nn.Identity()

    def forward(self, x):
        return self.skip(x) + self.fc(x)


def blocks(*widths):
    return nn.Sequential(*(Block(a, None if a == b else b) for a, b in zip(widths, widths[1:], strict=False)))


@pytest.mark.parametrize(
    ("widths", "edit", "order"),
    [
        ((8, 8, 8, 16), ax.Duplicate("", by=1), [0, 1, 1, 2]),
        ((8, 8, 16, 4), ax.Duplicate("", by=2, order="last"), [0, 0, 1, 2]),
        ((8, 16, 16, 4), ax.Duplicate(""), [0, 1, 1, 2]),
        ((8, 16, 4), ax.Duplicate("", by=1), None),
    ],
)
def test_the_order_that_is_offered_works(widths, edit, order):
    model = blocks(*widths)
    with pytest.raises(ax.GrowthError, match="so that a copy returns its input") as refusal:
        ax.grow(model, edit, probe=X)
    found = re.search(r"order=(\[.*?\])", str(refusal.value))
    assert (found and found[1]) == (order and str(order))
    if order:
        before = model(X)
        change = ax.grow(model, ax.Duplicate("", order=order), probe=X)
        assert torch.equal(model(X), before) and change.preserves
