"""An exception at every line: whatever was half-done is taken back, to the bit, and the run goes on as if nothing was.

The points are found by running an action once under a tracer. The fast suite raises once at every eleventh line, in one
of the actions; the long one at every line, and at up to `MOST` executions of every line in every action.
"""

import functools
import sys

import pytest
import torch
from attacked import Block, Run, assert_same
from faults import Fault, fault_at, lines_of
from torch import nn

import auxin as ax

torch.set_num_threads(1)
WRITERS = ("engine.py", "surgery.py", "record.py", "grower.py", "trial.py", "journal.py", "follow/", "randomness.py")
ALONG = ("anatomy/probe.py", "proof.py", "progress.py", "safe_point.py")
PARTS = ("run", "network", "optimizer", "scheduler", "companions", "gradients", "each_rank")
LOADING = tuple(f"checkpoint/{name}.py" for name in PARTS)
FILES = (*WRITERS, *ALONG, *LOADING)
STEPS, AFTER, MOST = 5, 10, 30


def grow(edit):
    return lambda run, folder: run.grower.grow(edit)


def by_function(run, folder):
    ax.grow(run.model, ax.Duplicate("blocks", by=1), *run.companions, probe=run.probe)


def own_groups(run, folder):
    ax.grow(run.model, ax.Duplicate("blocks", by=1), *run.companions, probe=run.probe, group={"lr": 1e-3})


def own_group_in_a_sequence(run, folder):
    layer = ax.Insert("tail", LINEAR, index=1, init="identity")
    ax.grow(run.model, layer, *run.companions, probe=run.probe, group={"lr": 1e-3, "momentum": 0.5})


def surgery(run, folder):
    """A new block, a replaced layer, a resized tied table, a changed depth."""
    model = run.model
    with run.grower.surgery():
        model.blocks.append(Block())
        model.order.append(model.blocks[2])
        model.tail[0] = nn.Linear(6, 6)
        table = model.head.weight
        table.data = torch.cat([table.data, table.data[:1]])
        model.embed.num_embeddings = model.head.out_features = 8


def trial(run, folder):
    with run.grower.trial(ax.Duplicate("blocks", by=1)):
        run.steps(1)


def load(run, folder):
    ax.load(folder, run.grower)


LINEAR = functools.partial(nn.Linear, 6, 6)
ACTIONS = {
    "duplicate": grow(ax.Duplicate("blocks", by=1)),
    "duplicate with state": grow(ax.Duplicate("blocks", by=2, order="stack", state="copy")),
    "repeat that fades": grow(ax.Repeat("blocks", fade=3)),
    "untie": grow(ax.Untie("blocks")),
    "insert a block": grow(ax.Insert("blocks", Block, index=1)),
    "insert a layer": grow(ax.Insert("tail", LINEAR, index=1, init="identity")),
    "replace": grow(ax.Replace("tail.0", LINEAR)),
    "remove": grow(ax.Remove("blocks.1")),
    "wake": grow(ax.Wake("extra")),
    "by function": by_function,
    "own groups": own_groups,
    "own group in a sequence": own_group_in_a_sequence,
    "surgery": surgery,
    "trial": trial,
    "load": load,
}


def ready(name):
    """The run as it is when the action comes."""
    run = Run(keep=name == "duplicate with state")
    run.steps(0 if name == "load" else STEPS)
    for optimizer in (run.adam, run.sgd):
        optimizer.zero_grad()
    if name == "untie":
        run.grower.grow(ax.Repeat("blocks"))
    if name == "trial":
        with run.grower.trial(None):  # its buffers are there from the first one on
            pass
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a run that has grown."""
    run, folder = ready("duplicate"), tmp_path_factory.mktemp("saved")
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.steps(3)
    for optimizer in (run.adam, run.sgd):
        optimizer.zero_grad()
    run.model(run.probe).square().mean().backward()  # gradients that wait for their step
    ax.save(run.grower, folder)
    return folder


def losses_without(name):
    return ready(name).steps(AFTER)


@functools.cache
def losses_with(name, folder):
    """Those of a run whose action nothing disturbs."""
    run = ready(name)
    ACTIONS[name](run, folder)
    return run.steps(AFTER)


def attempt(name, action, run, folder, point, kind):
    """Raise at one point; whether it came out as an exception (or was caught on the way, and another one came out)."""
    run.grower._memory.clear()
    caught, before = [], sys.unraisablehook
    sys.unraisablehook = caught.append  # a fault in what the garbage collector runs
    try:
        came_out = fault_at(functools.partial(action, run, folder), FILES, point, kind)
        return came_out or ("not reached" if came_out is None else "not raised")
    except ax.GrowthError as error:
        return isinstance(error.__cause__, kind) or error
    finally:
        sys.unraisablehook = before
        if caught:
            return "swallowed"  # noqa: B012


def attack(name, folder, points, deep):
    """Raise at every one of ``points``; ``deep``: at every how-manyth to train on and compare the losses."""
    action, expected, run = ACTIONS[name], losses_without(name), None
    for number, point in enumerate(points):
        if run is None:
            run = ready(name)
            before = run.picture()
        kind = KeyboardInterrupt if number % 3 == 2 else Fault
        outcome = attempt(name, action, run, folder, point, kind)
        where = f"{name}, point {point}:"
        assert torch.is_grad_enabled(), where
        if outcome == "swallowed":  # after the last write: all of it is there
            run.grower.verify()
            assert name == "load" and len(run.grower.journal) == 1, where
            run = None
            continue
        if outcome in ("not raised", "not reached"):
            # Caught on purpose (a cache that cannot be copied), or the run, attacked before, remembers what it was once
            # told and takes fewer lines: the action is whole.
            assert kind is Fault or outcome == "not reached", where
            assert run.steps(AFTER) == losses_with(name, folder), where
            run = None
            continue
        assert outcome is True, f"{where} {outcome!r}"
        assert_same(before, run.picture(), where)
        if number % deep == 0:
            assert run.steps(AFTER) == expected, where
            run = None
    return len(points)


def points_of(name, folder, most):
    """Line -> the points at which it runs, at most ``most`` of them, the first and the last among them."""
    run = ready(name)
    found = {}
    for point, line in enumerate(lines_of(functools.partial(ACTIONS[name], run, folder), FILES), start=1):
        found.setdefault(line, []).append(point)
    step = {line: max(1, -(-len(points) // most)) for line, points in found.items()}
    return {line: sorted({*points[:: step[line]], points[-1]}) for line, points in found.items()}


@pytest.mark.timeout(3600)  # a bound against hanging: 40 s on an idle core, and 200 s for every line
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.long)])
def test_a_fault_at_a_line_leaves_everything_as_it_was(every, folder):
    """Each ``every``-th line in one of the actions, in turn; at its first execution there or its last.

    Some lines of every file and of every action are among them.
    """
    everywhere = {name: points_of(name, folder, most=1) for name in ACTIONS}
    homes = {}
    for name, lines in everywhere.items():
        for line in lines:
            homes.setdefault(line, []).append(name)
    chosen = {name: set() for name in ACTIONS}
    first = {file: (file, line) for file, line in sorted(homes, reverse=True)}
    tried_lines = sorted({*sorted(homes)[::every], *first.values()})
    for number, line in enumerate(tried_lines):
        names = homes[line]
        name = names[number % len(names)]
        chosen[name].add(everywhere[name][line][-(number % 2)])
    tried = sum(attack(name, folder, sorted(points), deep=12) for name, points in chosen.items())
    print(f"{tried} faults at as many of {len(homes)} lines, each in one of {len(ACTIONS)} actions")
    assert len(homes) > 700 and tried == len(tried_lines) > 700 // every
    assert all(chosen.values()) and {file for file, _ in tried_lines} == {file for file, _ in homes}


@pytest.mark.long
@pytest.mark.timeout(14400)  # up to 11,000 faults in an action, each a tenth of a second or two
@pytest.mark.parametrize("name", ACTIONS)
def test_a_fault_at_every_point_leaves_everything_as_it_was(name, folder):
    lines = points_of(name, folder, most=MOST)
    points = sorted(point for points in lines.values() for point in points)
    attack(name, folder, points, deep=3)
    print(f"{name}: {len(points)} faults at {len(lines)} lines")


def test_a_fault_that_is_not_taken_back_is_seen(monkeypatch):
    """The attack itself: where a follower forgets to take back, it says so."""
    from auxin import structure

    monkeypatch.setattr(structure, "undo", lambda undos: undos.clear())
    monkeypatch.setattr("auxin.engine.undo", lambda undos: undos.clear())
    name = "duplicate"
    lines = points_of(name, None, most=1)
    last = max(point for (file, _), points in lines.items() if file == "follow/optimizer.py" for point in points)
    with pytest.raises(AssertionError, match="differ"):
        attack(name, None, [last], deep=99)
