"""Channels in front of a BatchNorm whose weights were chosen in eval mode, so that they do the same in train mode.

A new channel has running statistics of 0 and 1, and in train mode those of the batch: for a unit whose amplitude was
searched on a loss that is another amplitude. With the statistics that a forward has, and a gain and a shift that undo
them, the norm returns what it did in eval mode, and in train mode the same but for the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from auxin.anatomy.probe import PlanContext, untouched
from auxin.anatomy.widths.starts import Begun
from auxin.anatomy.widths.tried import standing
from auxin.change import Assign, Swap
from auxin.listing import module_at

ENOUGH = 16  # values of a channel; of fewer the variance is wrong by more than a third
NAMES = ("running_mean", "running_var", "weight", "bias")


def alike_in_train_mode(model: nn.Module, begun: Begun, assigns: Sequence[Assign], context: PlanContext) -> Begun:
    """The start with norms in which new channels do in train mode what they do in eval mode.

    Args:
        model: the network; nothing is written to it.
        begun: the start with statistics of 0 and 1.
        assigns: attributes that change with the tensors.
        context: runs the network on the probe, in eval mode.

    Returns:
        The start; where a norm stays as it is, a remark says why.
    """
    norms = _norms(model, begun.swaps)
    swaps = [_own(swap) if swap.path in norms else swap for swap in begun.swaps]
    values: dict[str, dict[str, Tensor]] = {path: {} for path in norms}
    for swap in swaps:
        if swap.path in norms and swap.name in NAMES and swap.value is not None:
            values[swap.path][swap.name] = swap.value
    settings = {path: _Setting(norms[path], values[path]) for path in norms}
    if settings:
        with untouched(model), torch.no_grad(), standing(model, swaps, assigns):
            for path, setting in settings.items():
                module_at(model, path).register_forward_pre_hook(setting, with_kwargs=True)
            context.run()
    told = [
        f"{setting.why_not}, so in train mode new channels of {path} count for another amount at first"
        for path, setting in settings.items()
        if setting.why_not
    ]
    return dataclasses.replace(begun, swaps=swaps, remarks=(*begun.remarks, *told))


class _Setting:
    """Writes the new entries of a norm before it runs for the first time, so that what stands behind sees them."""

    def __init__(self, born: Tensor, values: dict[str, Tensor]):
        self.born, self.values = born, values
        self.done, self.why_not = False, ""

    def __call__(self, norm: nn.Module, args: Any, kwargs: Any) -> None:
        arrives = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if self.done or arrives is None:
            return
        self.done = True
        rows = arrives.detach().movedim(1, -1).flatten(0, -2)[:, self.born.to(arrives.device)]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if len(rows) < ENOUGH:
            self.why_not = f"the probe has {len(rows)} values of a channel, where {ENOUGH} would do"
        elif not self.values.keys() >= {*NAMES}:
            self.why_not = "the norm has no gain and shift"
        else:
            self._set(*torch.var_mean(rows, dim=0), float(getattr(norm, "eps", 0.0)))

    def _set(self, var: Tensor, mean: Tensor, eps: float) -> None:
        """From gain (x - 0) / sqrt(1 + eps) + shift to the same with other statistics."""
        held = {name: value[self.born.to(value.device)].to(mean) for name, value in self.values.items()}
        gain = held["weight"] / math.sqrt(1 + eps)
        new = {"running_mean": mean, "running_var": var}
        new |= {"weight": gain * (var + eps).sqrt(), "bias": held["bias"] + gain * mean}
        for name, value in new.items():
            self.values[name][self.born.to(self.values[name].device)] = value.to(self.values[name])


def _norms(model: nn.Module, swaps: Sequence[Swap]) -> dict[str, Tensor]:
    """Paths of the norms that keep running statistics of channels that are new, and which those are."""
    found: dict[str, Tensor] = {}
    for swap in swaps:
        if swap.name == "running_mean" and swap.value is not None and swap.axes is not None:
            born = (swap.axes[0].index < 0).nonzero().flatten()
            if len(born) and isinstance(module_at(model, swap.path), _BatchNorm):
                found[swap.path] = born
    return found


def _own(swap: Swap) -> Swap:
    return swap if swap.value is None else dataclasses.replace(swap, value=swap.value.detach().clone())
