"""The averages of other packages, as their documentation builds them."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from their_optimizers import import_torchvision
from torch import nn


def _timm(kind: str, model: nn.Module) -> Any:
    import_torchvision()
    return getattr(importlib.import_module("timm.utils.model_ema"), kind)(model, decay=0.9)


def _ema_pytorch(model: nn.Module) -> Any:
    return importlib.import_module("ema_pytorch").EMA(model, beta=0.9, update_after_step=0, update_every=1)


def _torch_ema(model: nn.Module) -> Any:
    return importlib.import_module("torch_ema").ExponentialMovingAverage(model.parameters(), decay=0.9)


def _diffusers(model: nn.Module) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import_torchvision()
    kind = importlib.import_module("diffusers.training_utils").EMAModel
    return kind(model.parameters(), decay=0.9, foreach=False)


# name: how it is built, how it takes a step, the tensors that it holds
AVERAGES = {
    "timm ModelEma": (lambda m: _timm("ModelEma", m), lambda a, m: a.update(m), lambda a: list(a.ema.parameters())),
    "timm ModelEmaV2": (
        lambda m: _timm("ModelEmaV2", m),
        lambda a, m: a.update(m),
        lambda a: list(a.module.parameters()),
    ),
    "timm ModelEmaV3": (
        lambda m: _timm("ModelEmaV3", m),
        lambda a, m: a.update(m),
        lambda a: list(a.module.parameters()),
    ),
    "ema-pytorch EMA": (_ema_pytorch, lambda a, m: a.update(), lambda a: list(a.ema_model.parameters())),
    "torch-ema ExponentialMovingAverage": (_torch_ema, lambda a, m: a.update(), lambda a: a.shadow_params),
    "diffusers EMAModel": (_diffusers, lambda a, m: a.step(m.parameters()), lambda a: a.shadow_params),
}
