"""The schedules of other packages, as their documentation builds them."""

from __future__ import annotations

import importlib
from typing import Any

from their_optimizers import import_torchvision


def _timm(name: str, **options: Any) -> Any:
    def build(optimizer: Any) -> Any:
        import_torchvision()
        return getattr(importlib.import_module("timm.scheduler"), name)(optimizer, **options)

    return build


def _transformers(name: str, **options: Any) -> Any:
    return lambda optimizer: getattr(importlib.import_module("transformers"), name)(optimizer, **options)


def _warmup(name: str, **options: Any) -> Any:
    return lambda optimizer: getattr(importlib.import_module("pytorch_warmup"), name)(optimizer, **options)


def _by_number(schedule: Any, number: int) -> None:
    schedule.step(number)


def _alone(schedule: Any, number: int) -> None:
    schedule.step()


def _dampened(schedule: Any, number: int) -> None:
    with schedule.dampening():
        pass


# name: how it is built, how it takes a step
SCHEDULES = {
    "timm CosineLRScheduler": (_timm("CosineLRScheduler", t_initial=20), _by_number),
    "timm CosineLRScheduler, warm-up": (_timm("CosineLRScheduler", t_initial=20, warmup_t=4), _by_number),
    "timm StepLRScheduler": (_timm("StepLRScheduler", decay_t=5, decay_rate=0.5), _by_number),
    "timm MultiStepLRScheduler": (_timm("MultiStepLRScheduler", decay_t=[5, 14], decay_rate=0.5), _by_number),
    "timm PolyLRScheduler": (_timm("PolyLRScheduler", t_initial=20), _by_number),
    "timm TanhLRScheduler": (_timm("TanhLRScheduler", t_initial=20), _by_number),
    "transformers get_linear_schedule_with_warmup": (
        _transformers("get_linear_schedule_with_warmup", num_warmup_steps=4, num_training_steps=40),
        _alone,
    ),
    "transformers get_cosine_schedule_with_warmup": (
        _transformers("get_cosine_schedule_with_warmup", num_warmup_steps=4, num_training_steps=40),
        _alone,
    ),
    "transformers get_wsd_schedule": (
        _transformers("get_wsd_schedule", num_warmup_steps=4, num_decay_steps=8, num_training_steps=40),
        _alone,
    ),
    "transformers get_inverse_sqrt_schedule": (
        _transformers("get_inverse_sqrt_schedule", num_warmup_steps=4),
        _alone,
    ),
    "pytorch-warmup LinearWarmup": (_warmup("LinearWarmup", warmup_period=8), _dampened),
    "pytorch-warmup UntunedLinearWarmup": (_warmup("UntunedLinearWarmup"), _dampened),
}
