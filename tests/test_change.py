"""A change holds a plan, where its parameters go and what was measured; all of it is read off the change itself."""

import dataclasses

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.change import Change, Measured, Placement

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def grown(edit, **words):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return ax.grow(model, edit, optimizer, probe=X, **words), optimizer


@pytest.mark.parametrize("several", [False, True])
def test_placement_and_measurements_are_read_off_a_change(several):
    edit = ax.Duplicate("", by=1, output="keep")
    change, optimizer = grown([edit, edit] if several else edit, group={"lr": 1e-4}, rewarm=3)
    assert change.optimizers == (optimizer,) and change.group == {"lr": 1e-4} and change.placement.rewarm == 3
    assert len(change.groups) == len(change.steps) and len(change.joins) == 2 * len(change.steps)
    assert change.max_difference > 0 and change.gradient_ratio > 0 and change.seconds > 0
    for held in (change.placement, change.measured):
        names = [field.name for field in dataclasses.fields(held) if field.name not in ("notes", "rewarm")]
        assert all(getattr(change, name) is getattr(held, name) for name in names)
        with pytest.raises(AttributeError):
            setattr(change, names[0], None)


def test_notes_are_those_of_the_plan_of_the_placement_and_of_the_measurements_in_this_order():
    change = Change(None, remarks=("a",), placement=Placement(notes=("b",)), measured=Measured(notes=("c",)))
    assert change.notes == ("a", "b", "c")
    more = change.with_measured("d", seconds=2.0).with_measured(max_difference=0.5)
    assert more.notes == ("a", "b", "c", "d") and more.seconds == 2.0 and more.max_difference == 0.5
    assert change.seconds == 0 and change.notes == ("a", "b", "c")
