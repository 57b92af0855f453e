"""Axes that meet where rows are added, written and spread by index, or made after another tensor's shape."""

import random

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.anatomy.widths.terms import Term, product
from auxin.anatomy.widths.tracer import Trace

torch.set_num_threads(1)


class Messages(nn.Module):
    """A layer of a graph network."""

    def __init__(self):
        super().__init__()
        self.inp, self.message, self.out = nn.Linear(3, 8), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x, edges):
        x = self.inp(x)
        sent = torch.tanh(self.message(torch.cat([x[edges[0]], x[edges[1]]], -1)))
        x = x + torch.zeros_like(x).index_add(0, edges[1], sent)
        whole = x.new_zeros(1, x.shape[1])
        return self.out(whole.index_add(0, torch.zeros(len(x)).long(), x))


class Pictures(nn.Module):
    """Features of a picture take the places that a text leaves for them."""

    def __init__(self):
        super().__init__()
        self.embed, self.picture, self.out = nn.Embedding(9, 8), nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, ids, picture):
        x = self.embed(ids)
        mask = (ids == 0).unsqueeze(-1).expand_as(x)
        return self.out(x.masked_scatter(mask, self.picture(picture)))


class Actor(nn.Module):
    """Means, and deviations that no layer makes."""

    def __init__(self):
        super().__init__()
        self.trunk, self.mean, self.spread = nn.Linear(4, 8), nn.Linear(8, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        mean = self.mean(torch.tanh(self.trunk(x)))
        return mean, self.spread.exp().expand_as(mean)


class Physics(nn.Module):
    """What it gives holds its own derivative."""

    def __init__(self):
        super().__init__()
        self.inp, self.hidden, self.out = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            h = torch.sin(self.inp(x))
            y = self.out(h + torch.sin(self.hidden(h)))
            return torch.cat([y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]], -1)


class Sided(nn.Module):
    """The side of its pictures is checked, and is the width of a layer by accident."""

    def __init__(self):
        super().__init__()
        self.side, self.proj, self.out = 8, nn.Conv2d(3, 8, 4), nn.Linear(8, 2)

    def forward(self, x):
        if x.shape[-1] != self.side:
            raise ValueError(f"a picture of {x.shape[-1]}, not {self.side}")
        return self.out(self.proj(x).mean((2, 3)))


def outputs(model, probe):
    out = model(*probe)
    return [t.detach() for t in (out if isinstance(out, tuple) else (out,))]


EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
CASES = {
    "added by index": (Messages, (torch.randn(4, 3), EDGES), ax.Widen("inp", by=4)),
    "made after a shape": (Messages, (torch.randn(4, 3), EDGES), ax.Widen("message", by=4)),
    "written where a mask is": (Pictures, (torch.tensor([[3, 0, 0, 5]]), torch.randn(2, 4)), ax.Widen("embed", by=4)),
    "beside a number of the same value": (Sided, (torch.randn(2, 3, 8, 8),), ax.Widen("proj", by=2)),
    "run backwards": (Physics, (torch.randn(5, 2),), ax.Widen("inp", by=2)),
    "spread as another": (Actor, (torch.randn(5, 4),), ax.Widen("mean", by=2, outputs=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_meets_gets_wider_together(case):
    kind, probe, edit = CASES[case]
    model = kind()
    before = outputs(model, probe)
    change = ax.grow(model, edit, torch.optim.AdamW(model.parameters()), probe=probe)
    for old, new in zip(before, outputs(model, probe), strict=True):
        torch.testing.assert_close(new[..., : old.shape[-1]], old, rtol=1e-5, atol=1e-6)
    assert change.added_parameters > 0 and (not edit.outputs or model.spread.shape == (5,))


def test_what_an_axis_is_made_of_is_not_told_of_one_that_is_gone():
    trace, parts, order = Trace(), [Term(3), Term(5)], random.Random(0)
    for _ in range(200):  # what is made may have the address of what is gone
        one, other = order.sample(parts, 2)
        inside = trace.inside(product([one, Term(2)]))
        assert id(one) in inside and id(other) not in inside
