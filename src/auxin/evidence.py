"""What choosers and data-driven weights look at: a loss and a few batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError


@dataclass(frozen=True)
class Evidence:
    """A loss and the batches that it is taken on.

    Args:
        loss: ``loss(model, batch) -> scalar``, a mean over samples.
        batches: in memory, used in this order every time, so that candidates see the same data.

    Example:
        >>> from torch.nn.functional import mse_loss
        >>> batches = [(torch.ones(2, 1), torch.ones(2, 1))]
        >>> evidence = Evidence(lambda model, batch: mse_loss(model(batch[0]), batch[1]), batches)
        >>> evidence.mean(nn.Identity())
        0.0
    """

    loss: Callable[[nn.Module, Any], Tensor]
    batches: Sequence[Any]

    def __post_init__(self) -> None:
        if not callable(self.loss) or not hasattr(self.batches, "__getitem__") or len(self.batches) == 0:
            raise GrowthError("Evidence(loss, batches): pass loss(model, batch) -> scalar and a list of batches.")

    def mean(self, model: nn.Module) -> float:
        """Mean loss over the batches in eval mode; train flags are put back."""
        modes = {m: m.training for m in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                return sum(float(self.loss(model, batch)) for batch in self.batches) / len(self.batches)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def train(self, model: nn.Module, optimizers: Sequence[Any], steps: int) -> None:
        """Take ``steps`` plain optimizer steps over the batches, round and round."""
        for step in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.loss(model, self.batches[step % len(self.batches)]).backward()
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
