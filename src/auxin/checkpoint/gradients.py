"""Gradients that wait for their optimizer step: a run that accumulates them over batches goes on with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError
from auxin.safe_point import StepWatch, unscaled
from auxin.sharded import here

FILE = "gradients.safetensors"


def waiting_gradients(model: nn.Module, companions: tuple[Any, ...], watch: StepWatch) -> dict[str, Tensor]:
    """Those that no optimizer step has used, by name; without those that are zero.

    Raises:
        GrowthError: one process cannot save them for all.
    """
    if any(unscaled(companion) for companion in companions):
        raise GrowthError("save: gradients are unscaled and scaler.update() has not run. Save after scaler.update().")
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and not watch.used(p)}
    found = {name: grad for name, grad in found.items() if grad.is_sparse or bool(here(grad).count_nonzero())}
    if found and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise GrowthError(
            f"save: {next(iter(found))} has a gradient that no optimizer step has used, and each process has its own. "
            "Save right after optimizer.step(), or after zero_grad()."
        )
    return found


def check_gradients(model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Check that every gradient has its parameter.

    Raises:
        GrowthError: names those that have none, or one of another shape.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    wrong = [name for name, grad in gradients.items() if shapes.get(name) != grad.shape]
    if wrong:
        raise GrowthError(f"the checkpoint has gradients of {', '.join(wrong[:12])}, which this model does not have.")


def write_gradients(model: nn.Module, gradients: Mapping[str, Tensor], watch: StepWatch) -> None:
    """Give parameters the gradients that were waiting; take from the others those that would wait here."""
    for name, p in model.named_parameters():
        if name in gradients:
            p.grad = gradients[name].to(p.device, copy=True)
        elif p.grad is not None and not watch.used(p):
            p.grad = None
