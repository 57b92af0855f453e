"""Where growing ends."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.probe import PlanContext, Probe, tensors_in, untouched
from auxin.errors import GrowthError

FACTOR, TOKENS = 2, 20  # growth at once, and tokens a parameter, up to which growing pays reliably (arXiv:2605.13405)


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

    Examples:
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


def doubtful(before: int, after: int, tokens: int) -> str | None:
    """In words, why a growth may not pay; None where nothing says so.

    Args:
        before: parameters of the network.
        after: parameters once it has grown.
        tokens: that the network was trained on; 0 where they are not known.

    Source:
        arXiv:2605.13405: of warm starts of language models, a factor of two is the most reliable, gains shrink beyond
        20 tokens a parameter, and beyond some factor a new network is cheaper.
    """
    if before == 0:
        return None  # nothing was trained, of which new weights could be a multiple
    if after > FACTOR * before:
        return (
            f"it makes the network {after / before:.1f} times as large at once ({before:,} -> {after:,} parameters), "
            "and a factor of two is what pays most reliably. Grow in smaller steps"
        )
    if tokens > TOKENS * before:
        return (
            f"the network was trained on {tokens / before:,.0f} tokens a parameter, and beyond {TOKENS} growing gains "
            "less and less. Grow earlier"
        )
    return None


def tokens_in(batch: Any) -> int:
    """Tokens of a batch of token ids, (samples, length) in integers; 0 for any other."""
    ids = next((t for t in tensors_in(batch) if isinstance(t, Tensor)), None)
    known = ids is not None and ids.dim() == 2 and ids.dtype in (torch.int32, torch.int64)
    return ids.numel() if ids is not None and known else 0
