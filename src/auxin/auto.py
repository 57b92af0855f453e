"""``auto``: nothing to name. Where a network grows, when, and how much, is found out while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LinearLR

from auxin.anatomy.tree import unwrap
from auxin.anatomy.wrappers import with_wrappers
from auxin.candidates import candidates
from auxin.choose import by_race
from auxin.errors import GrowthError
from auxin.evidence import Evidence
from auxin.follow.own_groups import optimizers_in
from auxin.grower import Grower
from auxin.ledger import flops_of
from auxin.progress import Kept
from auxin.race import Race, step_flops, validation_flops
from auxin.ranks import Ranks
from auxin.when.spending import END, LAST, LEAST, growth_pays

LOOKS = 40  # evaluations, at most
SHARE = 0.05  # of the training that evaluations may cost
Auto = TypeVar("Auto", bound="AutoGrower")


def auto(
    model: nn.Module,
    *companions: Any,
    evidence: Evidence,
    budget: float | None = None,
    probe: Any = None,
    depth: bool = True,
    width: bool = True,
    **options: Any,
) -> AutoGrower:
    """A Grower that decides by itself: no edit, no place and no trigger to name.

    Begin with a network that is too small. At growing intervals of what was spent, the most promising ways to double it
    (`candidates`, `choose.by_race`) race against the network as it is, for equal steps on the same batches, and the run
    goes on as the winner. It stops growing once a third of the budget is spent, so that the rest trains what has grown;
    let the learning rate fall at the end, with `schedule.by_budget`.

    In your own loop call ``grower.step()`` after each optimizer step, until ``grower.finished``. Or let it train:
    ``grower.train()``.

    Args:
        model: the network, small.
        companions: optimizer, schedule, averages; see ``Grower``. Schedules that follow a budget are told of it.
        evidence: a loss, batches to train on, and ``validation=`` batches that training does not see.
        budget: FLOPs of the whole run, races and evaluations included. None: those of the steps that a schedule says
            the run has, taken by the network as it is now.
        probe: one batch to prove growths on; None: the first of the evidence.
        depth: whether lists of blocks may get longer.
        width: whether widths may get larger.
        options: of ``Grower``: ``limit``, ``log``, ``rewarm``, ``on_growth``, ``on_refused`` ("warn" here); and
            ``edits``, ``when`` or ``choose`` in place of its own.

    Raises:
        GrowthError: no validation data, no budget that a schedule would tell, or what ``Grower`` refuses.

    Source:
        Our own; measured against every fixed width in docs/benchmarks.md, misses included.
    """
    parts = parts_of(evidence, budget, probe, depth, width, options)
    if not optimizers_in(companions):
        raise GrowthError("auto(...) trains in races: pass an optimizer, auxin.auto(model, optimizer, evidence=...).")
    if budget is None:
        budget = budget_of(model, companions, evidence)
        parts = parts_of(evidence, budget, probe, depth, width, options)
    return begun(AutoGrower(model, *companions, **parts), budget, "when" not in options)


def parts_of(
    evidence: Evidence, budget: float | None, probe: Any, depth: bool, width: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a Grower that decides by itself, those in ``options`` as they are there.

    Raises:
        GrowthError: no validation data.
    """
    if not isinstance(evidence, Evidence) or evidence.validation is None:
        raise GrowthError(
            "auto(...) judges on data that training does not see: pass evidence=auxin.Evidence(loss, batches, "
            "validation=batches)."
        )
    probe = evidence.batches[0] if probe is None else probe
    parts: dict[str, Any] = {"edits": candidates(probe, depth, width), "choose": by_race()}
    parts |= {"evidence": evidence, "probe": probe}
    parts["on_refused"] = "warn"  # one of its own edits that does not fit is no reason to end the run
    if budget is not None:
        parts["when"] = growth_pays(budget)
    return {**parts, **options}


def budget_of(model: nn.Module, companions: Sequence[Any], evidence: Evidence) -> float:
    """FLOPs of as many steps of the network as it is as a schedule says that the run has.

    Raises:
        GrowthError: none says it.
    """
    steps = next((n for n in map(_steps_of, companions) if n), None)
    if steps is None:
        raise GrowthError(
            "auto(...): how long is the run? No schedule here says it. Pass budget=, the FLOPs of the whole run; "
            "auxin.ledger.flops_of(model, loss, batch) are those of one step."
        )
    ranks = Ranks.of(with_wrappers(model, companions))
    return steps * ranks.mean("auto", lambda: flops_of(unwrap(model), evidence.loss, evidence.batches[0]))


def begun(grower: Auto, budget: float, own_trigger: bool = True) -> Auto:
    """Give a Grower its budget, tell it to the schedules that follow one, and warn of what will not work out.

    Args:
        grower: built with ``parts_of``.
        budget: FLOPs of the whole run.
        own_trigger: whether it decides when ``growth_pays`` says so.
    """
    grower.budget = float(budget)
    assert grower.evidence is not None
    for companion in grower.companions:
        if _steps_of(companion) and not hasattr(companion, "grower"):
            warnings.warn(_counted(companion), stacklevel=3)
        known = getattr(companion, "grower", companion)  # a host builds a Grower for each of its runs
        if known is None or (isinstance(known, AutoGrower) and known.model is grower.model):
            companion.grower = grower
    if own_trigger and not grower.calls:
        _warn_of_a_budget_that_ends_first(grower.budget, step_flops(grower))
    return grower


def warn_unless_spent(grower: AutoGrower | None, raise_it: str) -> None:
    """Warn where a host's training has ended with budget left; ``raise_it``: what makes it longer."""
    if grower is not None and not grower.finished:
        warnings.warn(
            f"auto(...): the training ended with {grower.spent:.0%} of its budget spent, so a schedule by the budget "
            f"is not at its end, and growing may not be either. Raise {raise_it}, or pass a budget of "
            f"{grower.ledger.total:.3g}.",
            stacklevel=3,
        )


class AutoGrower(Grower):
    """What ``auto`` returns: a Grower with a budget.

    Attributes:
        budget: FLOPs of the whole run.
    """

    budget: float
    counts_flops = True

    @property
    def spent(self) -> float:
        """The part of the budget that is spent, from 0 on."""
        return self.ledger.total / self.budget if hasattr(self, "budget") else 0.0

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.spent >= 1

    @property
    def races(self) -> Sequence[Race]:
        """The races so far: what stood against what, and how it ended."""
        return getattr(self.choose, "races", ())

    def train(self) -> float:
        """Train on the evidence until the budget is spent, and leave the run where it did best on validation data.

        That may be before its last growth, or early, where it has learnt nothing since.

        Returns:
            The loss there on the validation data.

        Raises:
            GrowthError: a growth was refused; see ``Grower.step``.
        """
        assert self.evidence is not None
        best, due = Kept(self._standing), 0.0
        least: float | None = None
        while not self.finished:
            with self.ledger.timed("training"):
                self.evidence.train(self.model, self.companions, 1, self.optimizer_steps)
            self.step()
            if self.spent >= due or self.finished:
                now = self._validated()
                self.log.reading(self, None, {"validation": now})
                if least is None or least != least or now < least:
                    least = now
                    best.take()
                costs = validation_flops(self) / self.budget
                due = self.spent + max(1 / LOOKS, costs / SHARE)
        if least is None:  # the budget was spent already
            return self._validated()
        grown, call, step = len(self.progress.entries), self.calls, self.optimizer_steps
        best.restore()
        self.rollback.forget()
        for _ in range(grown - len(self.progress.entries)):
            self.log.undone(self, "the run did best on validation data before it", call, step)
        self.log.spent(self)
        return least

    def _validated(self) -> float:
        evidence = self.evidence
        assert evidence is not None
        with self.ledger.timed("evaluation"):
            self.ledger.spend("evaluation", validation_flops(self))
            return self.ranks.mean("auto: the validation loss", lambda: evidence.validate(self.model))


def _warn_of_a_budget_that_ends_first(budget: float, step: float) -> None:
    """Say so where the first decision would come when it is too late to grow."""
    needed = LEAST * step / min(LAST, END / 2)
    if budget < needed:
        warnings.warn(
            f"auto(budget={budget:.3g}): that is {budget / step:.0f} training steps of the network as it is. The first "
            f"decision falls after {LEAST} steps and within the first third of the budget, so nothing will grow: pass "
            f"budget={needed:.2g} or more, or when=auxin.when.growth_pays(budget, least=...) with fewer steps.",
            stacklevel=4,
        )


def _counted(schedule: Any) -> str:
    """What becomes of a schedule that counts steps."""
    return (
        f"auto(...): {type(schedule).__name__} counts {_steps_of(schedule)} steps, and the budget pays for fewer once "
        "the network has grown: the learning rate will not reach the end of its fall. "
        "auxin.schedule.by_budget(optimizer) follows the budget; it needs budget=."
    )


def _steps_of(schedule: Any) -> int | None:
    """How many steps a schedule says that the run has; one that only rises, or ends at its full rate, says nothing."""
    if isinstance(schedule, (ConstantLR, LinearLR)) and getattr(schedule, "end_factor", 1.0) >= 1:
        return None
    for name in ("total", "total_steps", "T_max", "total_iters"):
        steps = getattr(schedule, name, None)
        if type(steps) is int and steps > 0:
            return steps
    return None
