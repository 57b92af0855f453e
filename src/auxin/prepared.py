"""Compiling ahead of a growth: a few training steps on a trial of it, all of which is taken back.

What torch guards its graphs by are classes, lengths and shapes, and no identities of modules or parameters. So graphs
that a trial has made serve the growth itself, and nothing else of the trial has to be kept. A second trial shows
whether that is so: torch may guard by more, as it does by the tensors of an optimizer's state.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from auxin import dynamo
from auxin.change import Change, Edit
from auxin.edits.several import as_edit
from auxin.errors import GrowthError
from auxin.gate import close_gate
from auxin.listing import module_at
from auxin.race import shown
from auxin.run_state import Run

STEPS = 2  # the first finds fresh optimizer state, the second does not: a compiled optimizer has a graph for each


@dataclass(frozen=True)
class Prepared:
    """What ``Grower.prepare`` has compiled.

    Attributes:
        edit: the growth that it is for.
        graphs: how many, on this rank.
        seconds: that all of it took.
        again: functions that torch compiles at the growth all the same.
    """

    edit: Any
    graphs: int
    seconds: float
    again: tuple[str, ...] = ()

    def __str__(self) -> str:
        made = f"{self.graphs} graph{'s' * (self.graphs != 1)} compiled" if self.graphs else "nothing to compile"
        then = f"; compiled again at the growth: {', '.join(self.again)}" if self.again else ""
        return f"prepared {shown(self.edit)}: {made}, {self.seconds:.1f} s{then}"


def prepare(run: Run, edit: Any, step: Callable[[], Any] | None, network: nn.Module) -> Prepared:
    """``Grower.prepare``.

    Args:
        run: the run.
        edit: the growth to come.
        step: takes one training step; None: one on the first batch of the evidence.
        network: what the Grower was given: the network, or what stands around it.

    Raises:
        GrowthError: see ``Grower.prepare``.
    """
    edit, began, before = as_edit(edit), time.perf_counter(), dynamo.graphs()
    if network is run.model:  # a DistributedDataParallel may have come as a companion
        network = next((c for c in run.companions if isinstance(c, DistributedDataParallel)), network)
    with run.ranks.agree("prepare"):
        take = _step_of(run, edit, step, network)
    called, again = network if step is None else None, ()
    try:
        _try(run, edit, take, called)
        made = dynamo.graphs() - before
        if any(run.ranks.share("prepare", lambda: made > 0)):
            again = _try(run, edit, take, called)
            with run.trial(None):  # with its first hooks a growth makes torch drop graphs of what is there already
                take()
    finally:
        run.rollback.free()
    done = Prepared(edit, made, time.perf_counter() - began, again)
    if again:
        warnings.warn(
            f"{done}. Torch ties these graphs to the very tensors of one growth, as it does with the state of a "
            "compiled optimizer step. Leave that step uncompiled, or let it be compiled after each growth.",
            stacklevel=3,
        )
    return done


def _step_of(run: Run, edit: Any, step: Callable[[], Any] | None, network: nn.Module) -> Callable[[], Any]:
    """Check the arguments; what takes one training step."""
    if not isinstance(edit, Edit):
        raise GrowthError(f"prepare({edit!r}): pass the edit that is to come, such as Duplicate('blocks').")
    if step is not None:
        if not callable(step):
            raise GrowthError(f"prepare(edit, step={step!r}): pass step(), which takes one training step of your loop.")
        return step
    evidence = run.evidence
    if evidence is None:
        raise GrowthError(
            "prepare(edit) takes training steps by itself: pass prepare(edit, step=f), where f() takes one step of "
            "your loop, or give the Grower evidence=auxin.Evidence(loss, batches)."
        )
    others = [c for c in run.companions if not isinstance(c, DistributedDataParallel)]  # ``network`` has it inside
    return lambda: evidence.train(network, others, 1, run.optimizer_steps)


def _try(run: Run, edit: Any, take: Callable[[], Any], called: nn.Module | None) -> tuple[str, ...]:
    """Take training steps on a trial of the growth, also behind a fade-in; the functions that were compiled."""
    with run.trial(edit) as change:
        assert change is not None  # there is an edit
        if called is not None:
            _check_called(change, called)
        before = dynamo.graphs_of()
        for _ in range(STEPS):
            take()
        if change.gates:
            for path in change.gates:
                close_gate(module_at(run.model, path))
            take()
        after = dynamo.graphs_of()
        return tuple(sorted({code.co_qualname for code, count in after.items() if count > before.get(code, 0)}))


def _check_called(change: Change, called: nn.Module) -> None:
    """Check that a step through what the Grower knows of runs the compiled code there is.

    Raises:
        GrowthError: the compiled call is another one.
    """
    if change.compiling is not None and all(dynamo.compiler_of(module) is None for module in called.modules()):
        raise GrowthError(
            "prepare(edit): compiled code runs through this network, but not by what this Grower was given. Give it "
            "what you call, auxin.Grower(torch.compile(model), ...), or pass prepare(edit, step=f), where f() takes "
            "one step of your loop."
        )
