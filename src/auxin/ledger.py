"""What a run has spent, in FLOPs and in seconds: on training, and on finding out how to grow; and what it has found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.gradients import differentiable, gradients_of
from auxin.anatomy.probe import untouched
from auxin.errors import GrowthError

ENOUGH_STEPS = 128  # of a branch, below which its verdict can mislead (arXiv:2604.04281)
KINDS = ("training", "races", "probing", "evaluation")


@dataclass(frozen=True)
class Option:
    """One way to go on that was weighed.

    Attributes:
        edit: as one writes it, or "as it is".
        predicted: what the first step on the new entries takes off the loss, to first order; None: nobody asked.
        obtained: loss at the end of a branch, lower is better; None: there was no branch.
        parameters: of the network then; None: not known.
        flops: of one of its training steps; None: not known.
        why_not: why it could not be had; "" where it could.
    """

    edit: str
    predicted: float | None = None
    obtained: float | None = None
    parameters: int | None = None
    flops: float | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Decision:
    """What a chooser has weighed, what it has chosen, and what it cost to know.

    Attributes:
        call: of ``grower.step``.
        step: of the optimizer, behind the decision.
        chooser: as it prints itself.
        options: that were weighed.
        chosen: number of the one that was chosen; None: the network stays as it is, which was not weighed.
        flops: spent on knowing; the training of a winner is none of it.
        seconds: of the same, but with the training of a winner.
        steps: of the branches that decided; None: there were none, or their length is not known.
    """

    call: int
    step: int
    chooser: str
    options: tuple[Option, ...]
    chosen: int | None
    flops: float
    seconds: float
    steps: int | None = None


@dataclass
class Ledger:
    """FLOPs and seconds by what they were spent on, and the decisions that were taken on it.

    Attributes:
        flops: of matrix products, convolutions and attention, forward and backward (a multiply-add is two), by kind:
            "training" is what the network of now has been trained with, "races" what branches that were given up have
            cost, "probing" growths that were only looked at, "evaluation" losses on validation data.
            To count, a step of each network is run once, which is not written down.
        seconds: of the same, but that all of a race is under "races", and steps of the user's own loop are not timed.
        decisions: of the choosers that weigh: ``by_gain``, ``by_trial``, ``by_race``.
    """

    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    decisions: list[Decision] = field(default_factory=list)

    @property
    def total(self) -> float:
        """FLOPs of all kinds."""
        return sum(self.flops.values())

    def spend(self, kind: str, flops: float, seconds: float = 0.0) -> None:
        """Write down what something has cost."""
        self.flops[kind] += flops
        self.seconds[kind] += seconds

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Write down the seconds that pass inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - started

    def __str__(self) -> str:
        total = self.total or 1.0
        rows = [f"{kind:<11} {self.flops[kind]:>10.3g} FLOPs {self.flops[kind] / total:>6.1%}" for kind in KINDS]
        return "\n".join([*rows, f"{'all':<11} {self.total:>10.3g} FLOPs"])

    def decided(
        self,
        run: Any,
        chooser: Any,
        options: Sequence[Option],
        chosen: int | None,
        before: Ledger,
        steps: int | None = None,
    ) -> None:
        """Write down a decision; ``before``: this ledger as it was when the chooser was asked."""
        knowing = [kind for kind in KINDS if kind != "training"]
        flops = sum(self.flops[kind] - before.flops[kind] for kind in knowing)
        seconds = sum(self.seconds[kind] - before.seconds[kind] for kind in knowing)
        at = run.calls, run.optimizer_steps
        self.decisions.append(Decision(*at, repr(chooser), tuple(options), chosen, flops, seconds, steps))

    def copy(self) -> Ledger:
        """As it is now."""
        return Ledger(dict(self.flops), dict(self.seconds), list(self.decisions))

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        decisions = [{**asdict(one), "options": [asdict(option) for option in one.options]} for one in self.decisions]
        return {"flops": dict(self.flops), "seconds": dict(self.seconds), "decisions": decisions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        try:
            flops, seconds = state["flops"], state["seconds"]
            if not set(flops) == set(seconds) == set(KINDS):
                raise ValueError("other kinds")
            self.decisions[:] = [
                Decision(**{**one, "options": tuple(Option(**option) for option in one["options"])})
                for one in state.get("decisions", ())  # earlier versions wrote none
            ]
        except (TypeError, ValueError, KeyError) as error:
            raise GrowthError(f"this is not the state of a ledger: {state!r:.80}.") from error
        self.flops.update({kind: float(value) for kind, value in flops.items()})
        self.seconds.update({kind: float(value) for kind, value in seconds.items()})


def flops_of(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, backward: bool = True) -> float:
    """FLOPs of a loss on one batch, with its backward pass; the network is left as it was.

    Raises:
        GrowthError: nothing in it is counted: no matrix product, convolution or attention; or it has no gradient.
    """
    from torch.utils.flop_counter import FlopCounterMode  # only where it is asked for

    with untouched(model), torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        value = loss(model, batch)
        if backward:
            gradients_of(differentiable(value), model)
    flops = float(counter.get_total_flops())
    if not flops:
        raise GrowthError(
            f"{type(model).__name__}: no FLOPs are counted in loss(model, batch): it runs no matrix product, no "
            "convolution and no attention. Pass a loss that runs the network."
        )
    return flops
