"""A configuration that is a dict follows the depth, as an object does: else a reloaded model lacks a block."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import auxin as ax

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Frozen(OrderedDict):
    """Cannot be written to; its entries are attributes too."""

    def __init__(self, *given):
        super().__init__(*given)
        self.__dict__.update(self)
        self.__dict__["frozen"] = True

    def __setitem__(self, key, value):
        if self.__dict__.get("frozen"):
            raise TypeError("frozen")
        super().__setitem__(key, value)

    def __deepcopy__(self, memo):
        return type(self)(copy.deepcopy(dict(self), memo))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.outer(torch.relu(self.inner(x)))


class Held(nn.Module):
    """Keeps the arguments of its constructor in a frozen dict, which ``config`` returns."""

    def __init__(self, num_layers=2, width=8, layer_kinds=("a", "b")):
        super().__init__()
        self._arguments = Frozen({"num_layers": num_layers, "width": width, "layer_kinds": list(layer_kinds)})
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))

    config = property(lambda self: self._arguments)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Plain(Held):
    """Keeps them in a dict of its own."""

    def __init__(self, num_layers=2, width=8, layer_kinds=("a", "b")):
        super().__init__(num_layers, width, layer_kinds)
        self._arguments = self.my_config = dict(self._arguments)


@pytest.mark.parametrize("kind", [Held, Plain])
def test_it_follows_and_comes_back(kind):
    model = kind()
    average, before = AveragedModel(model), model.config  # its copy has one of its own
    was = dict(before)
    optimizer = torch.optim.AdamW(model.parameters())
    grower = ax.Grower(model, optimizer, average, edits=ax.Duplicate("layers", by=1), when=ax.when.every(9), probe=X)
    grower.grow(ax.Duplicate("layers", by=1))
    assert {**was, "num_layers": 3, "layer_kinds": ["a", "b", "b"]} == model.config
    assert model.config["num_layers"] == average.module.config["num_layers"] == 3
    built = kind(**model.config)
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(X), model(X))
    grower.undo()
    assert model.config is before and model.config == average.module.config == was


def test_a_frozen_one_grows_twice_and_is_taken_out_of():
    model = Held()
    for depth in (3, 4):
        ax.grow(model, ax.Duplicate("layers", by=1), probe=X)
        assert model.config["num_layers"] == model.config.num_layers == depth
    ax.grow(model, ax.Remove("layers.0"), probe=X)
    assert model.config["num_layers"] == 3 and type(model.config) is Frozen
    assert copy.deepcopy(model).config == model.config
