"""Blocks that differ in a plain number: copies are warned about, and a factory that takes ``index`` goes on with it."""

import functools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import auxin as ax
from auxin.anatomy.probe import PlanContext
from auxin.journal import Journal, replay

X = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(3))


class Dilated(nn.Module):
    """A block of a temporal convolutional network: the dilation doubles with the position."""

    def __init__(self, width, index, layer_idx=None, drop=0.0):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=2**index, dilation=2**index)
        self.layer_idx, self.drop = index if layer_idx is None else layer_idx, drop

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


def by_depth(depth, width=4):
    return Dilated(width, depth - 1)


def with_default(index=0, width=4):
    return Dilated(width, index)


def series(depth=3):
    torch.manual_seed(0)
    return nn.Sequential(*(Dilated(4, i) for i in range(depth)))


def dilations(model):
    return [block.conv.dilation[0] for block in model]


def test_copies_of_blocks_that_differ_in_a_number_are_warned_about_by_name():
    model = series()
    change = ax.grow(model, ax.Duplicate("", by=1), probe=X)
    assert dilations(model) == [1, 2, 4, 4]
    assert change.notes == (
        "blocks differ in conv.padding (1, 2, 4) and conv.dilation (1, 2, 4); the copy keeps 4 and 4; Insert('', a "
        "factory that takes index) continues a series",
    )
    assert change.notes[0] in str(change) and "\n" not in str(change)


def test_several_copies_and_other_numbers():
    model = nn.Sequential(*(Dilated(4, 0, layer_idx=i, drop=0.1 * i) for i in range(3)))
    change = ax.grow(model, ax.Duplicate(""), probe=X)
    (note,) = change.notes
    assert note.startswith("blocks differ in drop (0, 0.1, 0.2); the copies keep 0, 0.1, 0.2; Insert")
    # The position number is renumbered, so it is no matter; equal numbers are none either.
    assert [block.layer_idx for block in model] == [0, 1, 2, 3, 4, 5]
    alike = nn.Sequential(*(Dilated(4, 0, layer_idx=i) for i in range(3)))
    assert ax.grow(alike, ax.Duplicate("", by=1), probe=X).notes == ()


class Gated(Dilated):
    """Another kind of block, with numbers of its own."""


def test_blocks_are_compared_with_their_own_kind():
    mixed = nn.Sequential(Dilated(4, 0, 0), Gated(4, 1, 1), Dilated(4, 0, 2), Gated(4, 1, 3))
    assert ax.grow(mixed, ax.Duplicate("", by=2, order="last"), probe=X).notes == ()
    pair = nn.ModuleDict({"only": nn.Sequential(Dilated(4, 2, 0))})
    edit = ax.Duplicate("only", by=1, output="keep")
    assert edit.plan(pair, PlanContext(pair)).notes == ()


@pytest.mark.parametrize("layer", [functools.partial(Dilated, 4), by_depth, functools.partial(Dilated, width=4)])
def test_insert_continues_the_series(layer):
    model = series()
    optimizer = torch.optim.Adam(model.parameters())
    average = AveragedModel(model)
    for _ in range(2):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    journal, before = Journal(), model(X)
    for _ in range(2):
        change = ax.grow(model, ax.Insert("", layer), optimizer, average, probe=X)
        journal.record(model, change)
    assert dilations(model) == dilations(average.module) == [1, 2, 4, 8, 16]
    assert torch.equal(model(X), before)
    data = journal.to_json()
    for twin in (series(), series()):
        replay(twin, data, allow=[by_depth])
        assert dilations(twin) == [1, 2, 4, 8, 16]
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(X), model(X))


def test_the_position_is_the_one_in_the_list_and_a_seed_draws_the_same():
    weights = []
    for _ in range(2):
        model = series()
        ax.grow(model, ax.Insert("", functools.partial(Dilated, 4), index=-2), probe=X)
        assert dilations(model) == [1, 2, 2, 4]
        weights.append(model[1].conv.weight.clone())
    assert torch.equal(*weights)


def test_what_a_partial_says_stays_and_a_default_is_not_overruled():
    model = series()
    ax.grow(model, ax.Insert("", functools.partial(Dilated, 4, index=0)), probe=X)
    ax.grow(model, ax.Insert("", with_default), probe=X)
    assert dilations(model) == [1, 2, 4, 1, 1]


def test_after_and_replace_give_the_position_too():
    model = series()
    ax.grow(model, ax.After("2", functools.partial(Dilated, 4)), probe=X)
    assert dilations(model) == [1, 2, 4, 8]
    ax.grow(model, ax.After("0.conv", functools.partial(Dilated, 4)), probe=X)
    assert model[0].conv._grown[0].conv.dilation == (1,)
    ax.grow(model, ax.Replace("3", by_depth), probe=X)
    assert dilations(model) == [1, 2, 4, 8]
    with pytest.raises(ax.GrowthError, match="it takes index, the place in a container, and stands in none"):
        ax.grow(model, ax.Replace("1.conv", functools.partial(Dilated, 4)), probe=X)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"a": Dilated(4, 0), "b": Dilated(4, 1)})

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


def test_in_a_dict_it_is_the_position_among_the_keys_and_saved_runs_go_on(tmp_path):
    def grower():
        torch.manual_seed(0)
        model = Named()
        optimizer = torch.optim.Adam(model.parameters())
        edit = ax.Insert("layers", functools.partial(Dilated, 4), key="c", before="b")
        return model, ax.Grower(model, optimizer, edits=edit, when=ax.when.every(1), probe=X)

    model, first = grower()
    first.step(1.0)
    assert {key: block.conv.dilation for key, block in model.layers.items()} == {"a": (1,), "c": (2,), "b": (2,)}
    ax.save(first, tmp_path / "run")
    loaded, second = grower()
    ax.load(tmp_path / "run", second)
    assert loaded.layers["c"].conv.dilation == (2,) and torch.equal(loaded(X), model(X))
