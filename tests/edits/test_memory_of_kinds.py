"""A Grower remembers how blocks of a kind have started, so that the next one needs no batch."""

import functools

import pytest
import torch
from torch import nn

import auxin as ax

torch.set_num_threads(1)


class Block(nn.Module):
    """A residual block, whose last writers can be zero."""

    def __init__(self, dim=4):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class PostNorm(Block):
    """No zeroing makes it return its input: it fades in."""

    def __init__(self, dim=4):
        super().__init__(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(super().forward(x))


def grown_once(edit, kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), kind())
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(16, 4)
    grower = ax.Grower(model, optimizer, edits=edit, when=ax.when.every(1), probe=x)
    assert grower.step() is not None
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    grower.probe = None
    return model, grower, x


@pytest.mark.parametrize("edit", [ax.Insert("", Block), ax.Insert("", Block, index=1), ax.Duplicate("", by=1)])
def test_the_second_block_of_a_kind_needs_no_probe(edit):
    model, grower, x = grown_once(edit, Block)
    before = model(x)
    change = grower.step()
    assert len(model) == 4
    assert change.preserves and change.how == "last writers zero"
    assert torch.equal(model(x), before)
    new = dict(change.added)
    (block,) = (one.module for one in new.values())
    assert block.up.weight.any() and not block.down.weight.any()


def test_what_a_duplicate_has_found_serves_an_insert_and_the_other_way_round():
    model, grower, x = grown_once(ax.Duplicate("", by=1), Block)
    before = model(x)
    assert grower.grow(ax.Insert("", Block)).preserves
    assert torch.equal(model(x), before)
    model, grower, x = grown_once(ax.Insert("", Block), Block)
    before = model(x)
    assert grower.grow(ax.Duplicate("", by=1)).preserves
    assert torch.equal(model(x), before)


def test_a_kind_that_fades_in_does_so_again():
    model, grower, x = grown_once(ax.Insert("", PostNorm), PostNorm)
    before = model(x)
    change = grower.step()
    assert change.gates == ("3",) and change.how == "fade-in"
    assert torch.equal(model(x), before)
    with pytest.raises(ax.GrowthError, match="could only fade in when one of its kind was added before; pass fade=100"):
        grower.grow(ax.Insert("", PostNorm, fade=0))


def test_another_shape_is_another_kind_and_asks_for_a_probe():
    _, grower, _ = grown_once(ax.Insert("", Block), Block)

    with pytest.raises(ax.GrowthError, match="init='preserve' needs one batch"):
        grower.grow(ax.Insert("", functools.partial(nn.Linear, 4, 4)))
