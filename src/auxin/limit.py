"""Where growing ends."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from auxin.anatomy.probe import PlanContext, Probe, tensors_in, untouched
from auxin.errors import GrowthError


class LimitReached(GrowthError):
    """A proved growth would go beyond the limit; it was taken back."""


@dataclass(frozen=True)
class Limit:
    """Where growing ends, whichever comes first.

    Args:
        parameters: most parameters of the whole network.
        flops: most FLOPs of one forward per sample, counted on the probe (a multiply-add is two).
        growths: most growths.

    Raises:
        GrowthError: a limit is not a number from 0.

    Example:
        >>> Limit(parameters=5e6, growths=4).growths
        4
    """

    parameters: float | None = None
    flops: float | None = None
    growths: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0):
                raise GrowthError(f"Limit({field.name}={value!r}): pass a number from 0, e.g. {field.name}=1e6.")

    @classmethod
    def of(cls, limit: Any) -> Limit:
        """The limit itself, or one without an end for None.

        Raises:
            GrowthError: it is something else.
        """
        if limit is not None and not isinstance(limit, cls):
            raise GrowthError(f"limit={limit!r}: pass auxin.Limit(parameters=..., flops=..., growths=...).")
        return limit or cls()

    def check(self, model: nn.Module, probe: Probe) -> None:
        """Check that a network that has grown is within the limit.

        Raises:
            LimitReached: it is not.
        """
        too_large = self.exceeded(model, probe)
        if too_large is not None:
            raise LimitReached(f"grow: the network would have {too_large}.")

    def exceeded(self, model: nn.Module, probe: Probe) -> str | None:
        """In words, what of a network is larger than allowed; None if nothing is."""
        size = 0 if self.parameters is None else sum(p.numel() for p in model.parameters())
        if self.parameters is not None and size > self.parameters:
            return f"{size:,} parameters, more than limit=Limit(parameters={self.parameters:g})"
        flops = 0.0 if self.flops is None else flops_per_sample(model, probe)
        if self.flops is not None and flops > self.flops:
            return f"{flops:,.0f} FLOPs per sample, more than limit=Limit(flops={self.flops:g})"
        return None


def flops_per_sample(model: nn.Module, probe: Probe) -> float:
    """FLOPs of one forward per sample (a multiply-add is two), counted on the probe."""
    from torch.utils.flop_counter import FlopCounterMode  # only where it is asked for

    context = PlanContext(model, probe)
    with untouched(model), FlopCounterMode(display=False) as counter:
        context.run()
    batch = next((t.shape[0] for t in tensors_in(context.batch) if t.dim()), 1)
    return counter.get_total_flops() / batch
