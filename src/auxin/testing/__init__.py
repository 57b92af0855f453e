"""Checks of a growth on a user's own network, for a user's own tests."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from auxin.anatomy.probe import Probe
from auxin.change import Change, Edit, Grouping
from auxin.follow import follow
from auxin.randomness import random_data, random_state
from auxin.testing import checks, lasting
from auxin.testing.before import Before
from auxin.testing.checks import Grown, fail
from auxin.testing.exact import exact
from auxin.testing.run import Recipe, Run, check_forms

__all__ = ["Report", "check"]

WARM = 2  # steps before the growth: enough for momentum, averages and schedules to hold something


@dataclasses.dataclass(frozen=True)
class Report:
    """What was checked, and what was measured.

    Attributes:
        change: the growth in one line.
        preserves: whether it promised to keep the function.
        difference: max |difference| of the outputs in eval mode; None where nothing was promised.
        train_difference: the same in train mode with dropout at 0; None where that could not be compared.
        parameters: number of new tensors.
        checks: the names of the checks that ran.
        notes: what could not be checked, and why.
        seconds: of the whole check.
    """

    change: str
    preserves: bool
    difference: float | None
    train_difference: float | None
    parameters: int
    checks: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float


def check(
    model: nn.Module,
    edit: Any,
    optimizer: Any,
    probe: Probe,
    *,
    companions: Any = (),
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    steps: int = 10,
    group: Grouping = None,
) -> Report:
    """Try an edit on copies of your network and check all that a growth must not break.

    Checked: the function is kept where the edit promises it (to the bit; an identity layer may round); every new
    trainable tensor gets a gradient within three steps; the optimizers hold each trainable parameter once, in its old
    order and groups; old parameters, buffers, optimizer state and averages are the same objects to the bit; learning
    rates go on as in a run that never grew; a growth that fails at the last moment leaves no trace; global random
    generators do not move; the journal survives JSON, replays on a fresh network and on the meta device; after ``save``
    and ``load`` into fresh objects training goes on to the bit.

    Args:
        model: the network as training starts with it; neither it nor anything else that is passed is touched.
        edit: an edit, or a function ``f(model)`` that changes the network by hand (it runs inside ``surgery``).
        optimizer: ``f(model) -> optimizer`` or a list of them; or the optimizer itself.
        probe: one batch, or a callable that returns one.
        companions: ``f(model, optimizer, ...) -> [scheduler, average, ...]``; or the objects themselves.
        loss: ``loss(model, batch) -> scalar``; None: mean squared distance of all outputs from fixed random numbers.
        steps: optimizer steps after the growth.
        group: of new parameters, as in ``grow``.

    Returns:
        What was checked and measured.

    Raises:
        AssertionError: a check failed; says which, and what was found.
        GrowthError: the edit was refused on this network.

    Examples:
        >>> import functools, torch, auxin
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> edit = auxin.Insert("", functools.partial(nn.Linear, 4, 4), index=2)
        >>> check(net, edit, lambda m: torch.optim.Adam(m.parameters()), torch.randn(8, 4)).difference
        0.0
    """
    started = time.perf_counter()
    check_forms(optimizer, companions)
    with random_state(seed=0):
        batch = probe() if callable(probe) and not isinstance(probe, Tensor) else probe
        recipe = Recipe(model, optimizer, companions, batch, loss)
        grown = _grow(recipe, edit, group)
        for one in (checks.randomness, checks.old_tensors, checks.inherited, checks.optimizers, checks.state):
            one(grown)
        for one in (checks.others, checks.averages, checks.function):
            one(grown)
        lasting.replays(grown, lasting.journal(grown))
        twin = _rolled_back(recipe, edit, group)
        _train_on(grown, twin, steps)
    return _report(grown, time.perf_counter() - started)


def _grow(recipe: Recipe, edit: Any, group: Grouping) -> Grown:
    run = recipe.run(WARM)
    before, ungrown = Before(run), copy.deepcopy(run.model)
    run.reached.clear()
    start = exact(random_data())
    change = run.grow(edit, group)
    moved = start.values() != exact(random_data()).values()
    return Grown(recipe, edit, group, run, before, change, ungrown, moved)


def _rolled_back(recipe: Recipe, edit: Any, group: Grouping) -> Run:
    """A run that never grew: what it tried was taken back, without a trace."""
    run = recipe.run(WARM)
    everything = {"network": run.model, "optimizers": run.optimizers, "companions": run.companions}
    before = exact(everything), exact(random_data()).values()
    attempts: list[tuple[str, Callable[[], Change]]] = [
        ("an exception at the last moment", lambda: run.grow(edit, group, last=(_Interrupt(),)))
    ]
    if isinstance(edit, Edit):
        attempts.append(("dry_run=True", lambda: run.grow(edit, group, dry_run=True)))
    for what, attempt in attempts:
        try:
            attempt()
        except _Interruption:
            pass
        after = exact(everything), exact(random_data()).values()
        differences = before[0].differences(after[0])
        if differences:
            fail("rollback", f"after {what} {', '.join(differences[:3])} is not as before")
        if before[1] != after[1]:
            fail("rollback", f"after {what} a global random generator is not where it was")
    return run


def _train_on(grown: Grown, twin: Run, steps: int) -> None:
    saved = None if lasting.opaque(grown) else lasting.Saved(grown)
    steps = max(steps, checks.GRADIENT_STEPS)
    history = grown.run.train(steps, seed=2)
    checks.learning(grown)
    checks.schedule(history, twin.train(steps, seed=2))
    if saved is not None:
        saved.goes_on(steps, seed=2)


class _Interruption(Exception):
    """Stops a growth after everything was applied."""


class _Interrupt:
    """A companion that fails when everyone before it has changed already."""


@follow(_Interrupt)
def _follow_interrupt(companion: _Interrupt, change: Change) -> Iterator[None]:
    yield
    raise _Interruption


def _report(grown: Grown, seconds: float) -> Report:
    names = ("random", "old tensors", "inherited", "optimizer", "state", "schedule", "average", "function", "learning")
    return Report(
        change=str(grown.change),
        preserves=grown.change.preserves,
        difference=grown.figures.get("eval"),
        train_difference=grown.figures.get("train"),
        parameters=len(grown.born),
        checks=(*names, "journal", "replay", "rollback", "checkpoint"),
        notes=tuple(dict.fromkeys(grown.notes)),
        seconds=seconds,
    )
