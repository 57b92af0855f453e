"""Fade-ins and warm-ups under attack: states that are not theirs, and cycles of all that is new."""

import copy
import gc
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


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("optimizer_steps", None, "optimizer_steps is None, not a count"),
        ("calls", {"lr": 1}, "calls is .*, not a count"),
        ("when", 5, "the state of a trigger or chooser"),
        ("when", {"seen": float("nan")}, "the state of a trigger or chooser"),
        ("when", {"seen": [1]}, "the state of a trigger or chooser"),
    ],
)
def test_counts_and_triggers_that_do_not_fit_change_nothing(field, value, match):
    """They used to end in a TypeError."""
    run = bert.Run(rewarm=4)
    run.train(1)
    run.grower.grow(run.edit)
    run.train(2)
    state = {**copy.deepcopy(run.grower.state_dict()), field: value}
    before, own = picture(run.model, run.optimizer, run.schedule, run.average), repr(run.grower.state_dict())
    with pytest.raises(ax.GrowthError, match=match):
        run.grower.load_state_dict(state)
    assert_same(before, picture(run.model, run.optimizer, run.schedule, run.average))
    assert repr(run.grower.state_dict()) == own


def live():
    """Bytes of all tensors that are alive."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    dense = [t.untyped_storage() for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in dense}.values())


def hooks(run):
    of_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in run.model.modules())
    return len(run.optimizer._optimizer_step_post_hooks), len(run.optimizer._optimizer_step_pre_hooks), of_modules


@pytest.mark.parametrize("cycles", [12, pytest.param(52, marks=pytest.mark.long)])
@pytest.mark.parametrize("steps", [0, 2, 8], ids=["at once", "in mid-fade", "folded"])
def test_fade_ins_that_are_taken_back_leave_nothing(steps, cycles, tmp_path):
    run = bert.Run(keep=steps > 0)
    words = {"edits": run.edit, "when": ax.when.every(10**6), "probe": run.probe, "keep": steps > 0}
    companions = (run.optimizer, run.schedule, run.average)
    run.grower = ax.Grower(run.model, *companions, **words, rewarm=3, group={"lr": 1e-3}, log=tmp_path)
    start = hooks(run)
    for cycle in range(cycles):
        run.grower.grow(run.edit)
        run.train(steps)
        run.grower.undo()
        run.train(1)
        if cycle == 1:
            first = live()
    print(f"tensor bytes {first} -> {live()}, hooks {start} -> {hooks(run)}")
    assert live() <= 1.01 * first and hooks(run) == start
    members = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in members for p in run.optimizer.state)
    run.grower.verify()
