"""An exception at every line of a way back over several growths: all of it is as before, to the bit, or it is done."""

import pytest
import torch
from attacked import Block, Run, assert_same
from faults import Fault, fault_at, lines_of

import auxin as ax
from auxin.structure_history import StructureHistory

torch.set_num_threads(1)
WRITERS = ("structure", "engine.py", "grower.py", "trial.py", "journal.py", "follow/", "progress.py", "ramp.py")
FILES = (*WRITERS, "regrouped.py", "checkpoint/groups.py", "anatomy/wrappers.py", "output_hook.py", "gate.py")


def clear(run):
    for optimizer in (run.adam, run.sgd):
        optimizer.zero_grad()


def far_ahead():
    """A run with four growths behind it, of which one resized tensors, and the state of before them."""
    run = Run(group={"lr": 1e-3})
    run.grower.history = StructureHistory()
    run.steps(2)
    clear(run)
    state = run.grower.state_dict()
    run.grower.grow(ax.Duplicate("blocks", by=1, state="copy"))
    run.steps(1)
    clear(run)
    with run.grower.surgery():  # a further block, and a tied table with one row more
        table = run.model.head.weight
        table.data = torch.cat([table.data, table.data[:1]])
        run.model.embed.num_embeddings = run.model.head.out_features = 8
        run.model.blocks.append(Block())
        run.model.order = list(run.model.blocks)
    run.steps(1)
    clear(run)
    run.grower.grow([ax.Remove("blocks.1"), ax.After("norm")])
    run.steps(1)
    clear(run)
    return run, lambda: run.grower.go_to(state)


def just_grown():
    """A run that has grown this moment, by several edits."""
    run = Run()
    run.steps(2)
    clear(run)
    run.grower.grow([ax.Duplicate("blocks", by=1, state="copy"), ax.Wake("extra"), ax.After("norm")])
    return run, run.grower.undo


def picture(run):
    """Without what leads back: what has been tried of it is gone."""
    history, run.grower.history = run.grower.history, None
    try:
        return run.picture()
    finally:
        run.grower.history = history


@pytest.mark.timeout(3600)  # a bound against hanging: every line takes some minutes
@pytest.mark.parametrize("ready", [far_ahead, just_grown])
@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.long)])
def test_a_fault_at_a_line_of_a_way_back(ready, every):
    run, back = ready()
    first = {}
    for point, line in enumerate(lines_of(back, FILES), start=1):
        first.setdefault(line, point)
    assert not len(run.grower.journal) and len(run.model.blocks) == 2
    run.grower.verify()
    outcomes = {True: 0, False: 0}
    for line, point in list(first.items())[::every]:
        run, back = ready()
        before, growths = picture(run), len(run.grower.journal)
        kind = KeyboardInterrupt if point % 2 else Fault
        try:
            assert fault_at(back, FILES, point, kind), line
        except ax.GrowthError as error:  # a follower has caught it, and it is told
            assert kind.__name__ in f"{error}{error.__cause__!r}", line
        done = not len(run.grower.journal)
        outcomes[done] += 1
        if not done:
            assert len(run.grower.journal) == growths
            assert_same(before, picture(run), str(line))
        run.grower.verify()
        assert len(run.model.blocks) == (2 if done else 3), line
    print(f"faults at every {every}. of {len(first)} lines: gone back, or not at all: {outcomes}")
    assert len(first) > 100 and outcomes[False]
