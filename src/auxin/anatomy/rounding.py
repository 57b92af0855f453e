"""How far equal outputs of a network lie apart because sums over a wider axis are taken in another order."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from auxin.anatomy.probe import PlanContext, tensors_in, untouched
from auxin.fsdp2 import is_unit
from auxin.randomness import random_state
from auxin.sharded import here

Outputs = list[Tensor]
FAR, SHAKES, OVER = 64.0, 3, 4.0  # how far rounding is looked for, in how many tries, and what is granted over them
EPSILONS = 64.0  # of the output's dtype: above what another order of summation does, below what a changed weight does


def distance(before: Outputs, after: Outputs) -> float:
    """Return the largest absolute difference of outputs.

    It is infinite where shapes or whole numbers differ, or where only one of both is NaN.
    """
    difference = 0.0
    if [t.shape for t in before] != [t.shape for t in after]:
        return math.inf
    for a, b in zip(before, after, strict=True):
        if a.is_floating_point() or a.is_complex():
            gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs())
            largest = float(gap.max()) if gap.numel() else 0.0
            difference = max(difference, math.inf if math.isnan(largest) else largest)
        elif not torch.equal(a, b):
            difference = math.inf
    return difference


def tolerance(before: Outputs) -> float:
    """Return how far equal outputs may lie apart because sums are taken in another order."""
    limit = 0.0
    for t in before:
        if t.is_floating_point() or t.is_complex():
            size = float(t[t.isfinite()].abs().max()) if t.isfinite().any() else 0.0
            limit = max(limit, EPSILONS * torch.finfo(t.dtype).eps * max(1.0, size))
    return limit


def outputs_of_copy(copy: nn.Module, context: PlanContext) -> Outputs:
    """The output tensors of a copy of the network on the probe, in eval mode; raises what its forward raises."""
    with untouched(copy), torch.no_grad():
        return [t.detach().clone() for t in tensors_in(context.run_of(copy))]


def if_it_runs(copy: nn.Module, context: PlanContext) -> Outputs | None:
    """``outputs_of_copy``; None where it does not run."""
    try:
        return outputs_of_copy(copy, context)
    except Exception:  # whatever a user's forward raises, on another device, say
        return None


def by_rounding(network: nn.Module, outputs: Outputs, difference: float, limit: float, context: PlanContext) -> float:
    """Return how far outputs lie apart when every weight moves by less than a rounding error; 0 where that cannot
    explain the difference.

    Sums over a wider axis are taken in another order. A deep network may enlarge that far beyond what one sum does, and
    this measures by how much. Where it computes something in a narrower dtype than its outputs have, as a norm in
    float32 of a network in float64, that is moved too, by less than a rounding error of that dtype.
    """
    narrow = None if is_unit(network) else _Narrower(outputs)
    if not difference <= FAR * limit:
        if narrow is not None:
            _outputs_under(narrow, network, context)
        if narrow is None or not difference <= FAR * limit * narrow.times:
            return 0.0
    kept = [(t := here(p.data), t.clone()) for p in network.parameters() if p.is_floating_point() and not p.is_meta]
    worst = 0.0
    try:
        for seed in range(SHAKES):
            with torch.no_grad(), random_state(seed):
                for p, value in kept:
                    p.copy_(value * (1 + torch.finfo(p.dtype).eps * (2 * torch.rand_like(value) - 1)))
            again = _outputs_under(narrow, network, context)
            worst = max(worst, 0.0 if again is None else distance(outputs, again))
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)
    return OVER * worst


def _outputs_under(narrow: _Narrower | None, network: nn.Module, context: PlanContext) -> Outputs | None:
    with narrow or contextlib.nullcontext():
        return if_it_runs(network, context)


class _Narrower(TorchDispatchMode):
    """Moves all that is computed in a narrower dtype than outputs have by less than a rounding error of that dtype.

    Attributes:
        times: by how much the coarsest such dtype rounds coarser than the finest of the outputs.
    """

    def __init__(self, outputs: Outputs):
        super().__init__()
        self.fine = min((torch.finfo(t.dtype).eps for t in outputs if t.is_floating_point()), default=1.0)
        self.times, self.draw = 1.0, torch.Generator().manual_seed(0)  # the network's own draws stay as they are

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and move what it makes."""
        out = func(*args, **(kwargs or {}))
        return out if func.is_view or func._schema.is_mutable else tree_map_only(Tensor, self._moved, out)

    def _moved(self, made: Tensor) -> Tensor:
        eps = torch.finfo(made.dtype).eps if made.is_floating_point() else 0.0
        if eps <= self.fine:
            return made
        self.times = max(self.times, eps / self.fine)
        noise = torch.rand(made.shape, generator=self.draw).to(made.device)
        return (made * (1 + eps * (2 * noise - 1))).to(made.dtype)
