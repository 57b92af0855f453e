"""Numbers that blocks carry: a repeated one is refused in surgery, what only looks like one is not."""

import copy

import pytest
import torch
from torch import nn

import auxin as ax

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, index, block_size=4):
        super().__init__()
        self.index, self.block_size, self.inner = index, block_size, nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


def ready(count, **options):
    model = nn.Sequential(*(Block(i, **options) for i in range(count)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_number_that_is_there_already(at):
    model, optimizer = ready(3)
    ids = [id(m) for m in model]
    source = min(at, 2)
    words = rf"surgery: {at}\.index is {source}, as in {source + (source >= at)}\. .*Give each block its position"
    with pytest.raises(ax.GrowthError, match=words), ax.surgery(model, optimizer):
        model.insert(at, copy.deepcopy(model[source]))
    assert [id(m) for m in model] == ids


def test_numbered_anew_by_hand():
    model, optimizer = ready(3)
    with ax.surgery(model, optimizer):
        model.insert(1, copy.deepcopy(model[0]))
        for i, block in enumerate(model):
            block.index = i
    assert len(model) == 4
    ax.verify(model, optimizer)


def of_one(model):
    model.append(copy.deepcopy(model[0]))


def alike(model):
    for block in model:
        block.index = 7
    model.append(copy.deepcopy(model[0]))


def of_another_name(model):
    for block in model:
        block.rate = block.__dict__.pop("index")
    model.append(copy.deepcopy(model[0]))


@pytest.mark.parametrize(("count", "change"), [(1, of_one), (3, alike), (3, of_another_name)])
def test_what_is_no_number(count, change):
    """The only one of its kind, the same everywhere, or called otherwise."""
    model, optimizer = ready(count)
    with ax.surgery(model, optimizer):
        change(model)
    assert len(model) == count + 1
