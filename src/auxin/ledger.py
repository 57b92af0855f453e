"""What a run has spent, in FLOPs and in seconds: on training, and on finding out how to grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.gradients import gradients_of
from auxin.anatomy.probe import untouched
from auxin.errors import GrowthError

KINDS = ("training", "races", "probing", "evaluation")


@dataclass
class Ledger:
    """FLOPs and seconds by what they were spent on.

    Attributes:
        flops: of matrix products, convolutions and attention, forward and backward (a multiply-add is two), by kind:
            "training" is what the network of now has been trained with, "races" what branches that were given up have
            cost, "probing" growths that were only looked at, "evaluation" losses on validation data.
            To count, a step of each network is run once, which is not written down.
        seconds: of the same, but that all of a race is under "races", and steps of the user's own loop are not timed.
    """

    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

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

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain data."""
        return {"flops": dict(self.flops), "seconds": dict(self.seconds)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from ``state_dict``."""
        if set(state) != {"flops", "seconds"} or any(set(held) != set(KINDS) for held in state.values()):
            raise GrowthError(f"this is not the state of a ledger: {state!r:.80}.")
        self.flops.update({kind: float(value) for kind, value in state["flops"].items()})
        self.seconds.update({kind: float(value) for kind, value in state["seconds"].items()})


def flops_of(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, backward: bool = True) -> float:
    """FLOPs of a loss on one batch, with its backward pass; the network is left as it was.

    Raises:
        GrowthError: nothing in it is counted: no matrix product, convolution or attention.
    """
    from torch.utils.flop_counter import FlopCounterMode  # only where it is asked for

    with untouched(model), torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        value = loss(model, batch)
        if backward:
            gradients_of(value, model)
    flops = float(counter.get_total_flops())
    if not flops:
        raise GrowthError(
            f"{type(model).__name__}: no FLOPs are counted in loss(model, batch): it runs no matrix product, no "
            "convolution and no attention. Pass a loss that runs the network."
        )
    return flops
