"""Every schedule goes on as if nothing had grown, in the same process and after a checkpoint in a new one."""

import inspect
import json

import pytest
import schedules
import torch
from growing import Block, bits
from schedules import END, GROW_AT, SAVE_AT, SETUPS, Run
from torch.optim import lr_scheduler

import anew
import auxin as ax

torch.set_num_threads(1)


def test_every_class_of_torch_has_a_set_up():
    classes = {
        cls
        for _, cls in inspect.getmembers(lr_scheduler, inspect.isclass)
        if cls.__module__ == lr_scheduler.__name__ and hasattr(cls, "step") and not cls.__name__.startswith("_")
    }
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.ones(1)]}], lr=0.1, momentum=0.9)
    covered = {type(make(optimizer)) for make in SETUPS.values()}
    assert classes - {lr_scheduler.LRScheduler} <= covered
    assert len(SETUPS) >= 17


def by_hand(name: str) -> list[list[float]]:
    """The new block as a group of its own, as torch's documentation shows."""
    run = Run(name, grows=False)
    curve = run.steps(0, GROW_AT)
    block = Block(4)
    run.model.blocks.append(block)
    run.optimizer.add_param_group({"params": list(block.parameters())})
    return curve + run.steps(GROW_AT, END)


@pytest.mark.parametrize("name", SETUPS)
def test_a_group_of_its_own_breaks_or_leaves_the_curve(name):
    try:
        curve = by_hand(name)
    except (ValueError, KeyError, RuntimeError, IndexError):
        return
    # Against the group whose default learning rate it shares.
    assert any(used[2] != used[0] for used in curve[GROW_AT:])


@pytest.mark.parametrize("name", SETUPS)
def test_old_groups_keep_their_curve(name):
    expected = Run(name, grows=False).steps(0, END)
    run = Run(name, grows=True)
    curve = run.steps(0, GROW_AT)
    assert len(run.model.blocks) == 2
    start = [p.detach().clone() for p in run.model.blocks[1].parameters()]
    curve += run.steps(GROW_AT, END)
    assert END - GROW_AT >= 50 and curve == expected
    members = {id(p) for p in run.optimizer.param_groups[1]["params"]}
    assert {id(p) for p in run.model.blocks[1].parameters()} <= members
    assert all(bits(p) != bits(s) for p, s in zip(run.model.blocks[1].parameters(), start, strict=True))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> dict[str, list[list[float]]]:
    """All set-ups, grown, saved, and continued by one new process."""
    folder = tmp_path_factory.mktemp("schedules")
    for number, name in enumerate(SETUPS):
        run = Run(name, grows=True)
        run.steps(0, SAVE_AT)
        ax.save(run.grower, folder / str(number))
    done = anew.run(schedules.__file__, folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SETUPS)
def test_the_curve_goes_on_in_a_new_process(name, resumed):
    assert resumed[name] == Run(name, grows=False).steps(0, END)[SAVE_AT:]
