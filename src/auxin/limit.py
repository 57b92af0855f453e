"""Where growing ends."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from auxin.anatomy.probe import Look, Probe, tensors_in, untouched


@dataclass(frozen=True)
class Limit:
    """Where growing ends, whichever comes first.

    Args:
        parameters: of the whole network.
        flops: of one forward per sample, on the probe.
        growths: how many.
    """

    parameters: float | None = None
    flops: float | None = None
    growths: int | None = None

    def exceeded(self, model: nn.Module, probe: Probe) -> bool:
        """Whether a network is larger than allowed."""
        if self.parameters is not None and sum(p.numel() for p in model.parameters()) > self.parameters:
            return True
        return self.flops is not None and flops_per_sample(model, probe) > self.flops


def flops_per_sample(model: nn.Module, probe: Probe) -> float:
    """FLOPs of one forward per sample (a multiply-add is two), counted on the probe."""
    from torch.utils.flop_counter import FlopCounterMode  # only where it is asked for

    look = Look(model, probe)
    with untouched(model), FlopCounterMode(display=False) as counter:
        look.run()
    batch = next((t.shape[0] for t in tensors_in(look.batch) if t.dim()), 1)
    return counter.get_total_flops() / batch
