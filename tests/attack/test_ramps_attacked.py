"""Fade-ins and warm-ups under attack: states that are not theirs, half-way failures, cycles of all that is new."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from attacked import assert_same, picture

import auxin as ax

sys.path.insert(0, str(Path(__file__).parents[1] / "ramp"))
import bert

torch.set_num_threads(1)
FADE = {"kind": "fade", "optimizer": 0, "names": ["layers.1"], "total": 9, "taken": 1}
WARM = {"kind": "rewarm", "optimizer": 0, "names": ["head.bias"], "total": 9, "taken": 1}
STRANGE = {
    "a block that is not there": [FADE | {"names": ["nowhere"]}],
    "the network itself": [FADE | {"names": [""]}],
    "one block twice": [FADE | {"names": ["layers.1", "layers.1"]}],
    "a text for a list": [FADE | {"names": "layers"}],
    "a good one and a bad one": [FADE, WARM | {"names": ["nowhere"]}],
    "no such optimizer": [FADE | {"optimizer": 7}],
    "an optimizer from the end": [FADE | {"optimizer": -1}],
    "no end": [FADE | {"total": float("inf")}],
    "beyond the end": [FADE | {"taken": 9}],
    "a flag for a count": [WARM | {"taken": True}],
    "another kind": [FADE | {"kind": "what"}],
    "a number": 5,
    "a mapping": {"a": 1},
    "nothing": None,
}


@pytest.mark.parametrize("name", STRANGE)
def test_ramps_that_do_not_fit_change_nothing(name):
    """By ``grower.load_state_dict``, in mid-fade: the gates used to be gone, and the hooks."""
    run = bert.Run(rewarm=4)
    run.train(2)
    run.grower.grow(run.edit)
    run.train(2)
    state = {**copy.deepcopy(run.grower.state_dict()), "ramps": STRANGE[name]}
    before, own = picture(run.model, run.optimizer, run.schedule, run.average), repr(run.grower.state_dict())
    with pytest.raises(ax.GrowthError, match="the ramps of the checkpoint do not fit this run"):
        run.grower.load_state_dict(state)
    assert_same(before, picture(run.model, run.optimizer, run.schedule, run.average))
    assert repr(run.grower.state_dict()) == own
