"""The averages of other packages, as their documentation builds them."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from their_optimizers import import_torchvision
from torch import nn
from torch.optim import swa_utils


def _torch(**options: Any) -> Any:
    return lambda model: swa_utils.AveragedModel(model, **options)


def _timm(kind: str, model: nn.Module, **options: Any) -> Any:
    import_torchvision()
    return getattr(importlib.import_module("timm.utils.model_ema"), kind)(model, decay=0.9, **options)


def _ema_pytorch(model: nn.Module, kind: str = "EMA", **options: Any) -> Any:
    own = {"beta": 0.9, "update_after_step": 0} if kind == "EMA" else {}
    return getattr(importlib.import_module("ema_pytorch"), kind)(model, **{**own, "update_every": 1, **options})


def _torch_ema(model: nn.Module, **options: Any) -> Any:
    return importlib.import_module("torch_ema").ExponentialMovingAverage(model.parameters(), decay=0.9, **options)


def _diffusers(model: nn.Module, **options: Any) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import_torchvision()
    kind = importlib.import_module("diffusers.training_utils").EMAModel
    return kind(model.parameters(), decay=0.9, foreach=False, **options)


def _weighted(average: Any, now: Any, count: Any) -> Any:
    return average + (now - average) * 0.1


# name: how it is built, how it takes a step, the tensors that it holds
AVERAGES = {
    **{
        f"torch AveragedModel, {said}": (
            _torch(**options),
            lambda a, m: a.update_parameters(m),
            lambda a: list(a.module.parameters()),
        )
        for said, options in {
            "equal weights": {},
            "exponential": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
            "exponential, with buffers": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
            "a function of one's own": {"avg_fn": _weighted},
        }.items()
    },
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
    "timm ModelEmaV3, warm-up, without buffers": (
        lambda m: _timm("ModelEmaV3", m, use_warmup=True, exclude_buffers=True, foreach=False),
        lambda a, m: a.update(m),
        lambda a: list(a.module.parameters()),
    ),
    "ema-pytorch EMA, some left out": (
        lambda m: _ema_pytorch(m, ignore_names={"head.bias"}, allow_different_devices=True),
        lambda a, m: a.update(),
        lambda a: list(a.ema_model.parameters()),
    ),
    "ema-pytorch EMA, every third step": (
        lambda m: _ema_pytorch(m, update_every=3, update_after_step=5),
        lambda a, m: a.update(),
        lambda a: list(a.ema_model.parameters()),
    ),
    "ema-pytorch KarrasEMA": (
        lambda m: _ema_pytorch(m, "KarrasEMA", sigma_rel=0.1),
        lambda a, m: a.update(),
        lambda a: list(a.ema_model.parameters()),
    ),
    "ema-pytorch EMA": (_ema_pytorch, lambda a, m: a.update(), lambda a: list(a.ema_model.parameters())),
    "torch-ema ExponentialMovingAverage": (_torch_ema, lambda a, m: a.update(), lambda a: a.shadow_params),
    "torch-ema ExponentialMovingAverage, no count of updates": (
        lambda m: _torch_ema(m, use_num_updates=False),
        lambda a, m: a.update(m.parameters()),
        lambda a: a.shadow_params,
    ),
    "diffusers EMAModel, warm-up": (
        lambda m: _diffusers(m, use_ema_warmup=True, power=0.75),
        lambda a, m: a.step(m.parameters()),
        lambda a: a.shadow_params,
    ),
    "diffusers EMAModel": (_diffusers, lambda a, m: a.step(m.parameters()), lambda a: a.shadow_params),
}
