"""Places that are registered and hold None: they stay, are filled and emptied, in averages and replays too."""

import json

import pytest
import torch
from torch import nn

import auxin as ax


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_module("later", None)

    def forward(self, x):
        for layer in (self.first, self.second, self.later, getattr(self, "more", None)):
            x = x if layer is None else layer(x)
        return x


def add(model):
    model.more = nn.Linear(4, 4)


def fill(model):
    model.later = nn.Linear(4, 4)


def empty(model):
    model.second = None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (add, ["first", "second", "later", "more"]),
        (fill, ["first", "second", "later"]),
        (empty, ["first", "second", "later"]),
    ],
)
def test_names_of_empty_places_stay(change, expected):
    model, x = Net(), torch.randn(2, 4)
    optimizer = torch.optim.Adam(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    with ax.surgery(model, optimizer, average, probe=x) as done:
        change(model)
    journal = ax.Journal()
    journal.record(model, done.change)
    replayed = ax.replay(Net(), json.loads(json.dumps(journal.to_json())))
    layout = [(name, type(child)) for name, child in model._modules.items()]
    assert [name for name, _ in layout] == expected
    for twin in (average.module, replayed):
        assert [(name, type(child)) for name, child in twin._modules.items()] == layout
        assert twin(x).shape == (2, 4)
    ax.verify(model, optimizer, average)


def test_an_empty_place_beside_a_replaced_layer_survives_an_exception():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ZeroDivisionError), ax.surgery(model, optimizer):
        model.second = None
        raise ZeroDivisionError
    assert model.later is None and isinstance(model.second, nn.Linear)
