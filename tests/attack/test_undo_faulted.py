"""An exception at every line of an undo with a snapshot: it is not done yet, and can be done again, or it is done."""

import pytest
import torch
from attacked import Run, assert_same
from faults import Fault, fault_at, lines_of

import auxin as ax

torch.set_num_threads(1)
FILES = ("trial.py", "grower.py", "progress.py", "record.py", "randomness.py", "ramp.py", "flow.py", "safe_point.py")


def grown():
    """A run with a growth behind it, and a picture of it before."""
    run = Run(keep=True)
    run.steps(2)
    clear(run)
    before = run.picture()
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.steps(1)
    clear(run)
    return run, before


def clear(run):
    for optimizer in (run.adam, run.sgd):
        optimizer.zero_grad()


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.long)])
def test_a_fault_at_a_line_of_an_undo(every):
    """An interrupt used to leave the network as before the growth, and the journal as after it."""
    run, _ = grown()
    first = {}
    for point, line in enumerate(lines_of(run.grower.undo, FILES), start=1):
        first.setdefault(line, point)
    for line, point in list(first.items())[::every]:
        run, before = grown()
        assert fault_at(run.grower.undo, FILES, point, KeyboardInterrupt if point % 2 else Fault), line
        if len(run.grower.journal):
            run.grower.undo()
        assert_same(before, run.picture(), str(line))
    print(f"a fault at every {every}. of {len(first)} lines")
    assert len(first) > 60
