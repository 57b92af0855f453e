"""The schedules of other packages, as their documentation builds them."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from their_optimizers import import_torchvision
from torch.optim.lr_scheduler import LambdaLR


def _timm(name: str, **options: Any) -> Any:
    def build(optimizer: Any) -> Any:
        import_torchvision()
        return getattr(importlib.import_module("timm.scheduler"), name)(optimizer, **options)

    return build


def _named(kind: str, **specific: Any) -> Any:
    def build(optimizer: Any) -> Any:
        import_torchvision()
        get = importlib.import_module("transformers").get_scheduler
        return get(kind, optimizer, num_warmup_steps=4, num_training_steps=40, scheduler_specific_kwargs=specific)

    return build


def _optimizers(name: str, **options: Any) -> Any:
    def build(optimizer: Any) -> Any:
        import_torchvision()
        return getattr(importlib.import_module("pytorch_optimizer.lr_scheduler"), name)(optimizer, **options)

    return build


class Ramp:
    """A function of the step that knows its own numbers."""

    def __init__(self, length: int):
        self.length = length

    def rate(self, step: int) -> float:
        return min(1.0, (step + 1) / self.length)


def _lambda(kind: str) -> Any:
    """torch's own around functions of several kinds."""
    length, ramp = 8, Ramp(8)
    rates: dict[str, Any] = {
        "closure": lambda step: min(1.0, (step + 1) / length),
        "method": ramp.rate,
        "partial": functools.partial(lambda step, length: min(1.0, (step + 1) / length), length=length),
    }
    return lambda optimizer: LambdaLR(optimizer, rates[kind])


def _warmup(name: str, **options: Any) -> Any:
    return lambda optimizer: getattr(importlib.import_module("pytorch_warmup"), name)(optimizer, **options)


def _by_number(schedule: Any, number: int) -> None:
    schedule.step(number)


def _alone(schedule: Any, number: int) -> None:
    schedule.step()


def _with_number_and_metric(schedule: Any, number: int) -> None:
    schedule.step(number, (0.5, 0.25, 0.4, 0.4)[number % 4])


def _by_metric(schedule: Any, number: int) -> None:
    schedule.step((0.5, 0.25, 0.4, 0.4)[number % 4])


def _dampened(schedule: Any, number: int) -> None:
    with schedule.dampening():
        pass


KINDS: dict[str, dict[str, Any]] = {  # of get_scheduler, and what each of them asks for besides
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 8},
}
# name: how it is built, how it takes a step
SCHEDULES = {
    "timm CosineLRScheduler": (_timm("CosineLRScheduler", t_initial=20), _by_number),
    "timm CosineLRScheduler, warm-up": (_timm("CosineLRScheduler", t_initial=20, warmup_t=4), _by_number),
    "timm StepLRScheduler": (_timm("StepLRScheduler", decay_t=5, decay_rate=0.5), _by_number),
    "timm MultiStepLRScheduler": (_timm("MultiStepLRScheduler", decay_t=[5, 14], decay_rate=0.5), _by_number),
    "timm PolyLRScheduler": (_timm("PolyLRScheduler", t_initial=20), _by_number),
    "timm TanhLRScheduler": (_timm("TanhLRScheduler", t_initial=20), _by_number),
    "timm WSDLRScheduler": (_timm("WSDLRScheduler", t_initial=20, decay_t=6, warmup_t=4), _by_number),
    "timm PlateauLRScheduler": (_timm("PlateauLRScheduler", patience_t=2, mode="min"), _with_number_and_metric),
    **{f"transformers {kind}": (_named(kind, **specific), _alone) for kind, specific in KINDS.items()},
    "transformers reduce_lr_on_plateau": (_named("reduce_lr_on_plateau", patience=2), _by_metric),
    "transformers greedy": (_named("greedy", patience=2), _by_metric),
    **{
        f"pytorch-optimizer {name}": (_optimizers(name, **options), _alone)
        for name, options in {
            "CosineAnnealingWarmupRestarts": {"first_cycle_steps": 9, "cycle_mult": 1.5, "warmup_steps": 3},
            "CosineScheduler": {"t_max": 40, "max_lr": 1e-2, "warmup_steps": 4},
            "LinearScheduler": {"t_max": 40, "max_lr": 1e-2, "warmup_steps": 4},
            "PolyScheduler": {"t_max": 40, "max_lr": 1e-2, "warmup_steps": 4},
            "REXScheduler": {"total_steps": 40, "max_lr": 1e-2},
            "get_chebyshev_schedule": {"num_epochs": 40},
            "get_wsd_schedule": {"num_warmup_steps": 4, "num_stable_steps": 6, "num_decay_steps": 20},
        }.items()
    },
    **{f"torch LambdaLR around a {kind}": (_lambda(kind), _alone) for kind in ("closure", "method", "partial")},
    "pytorch-warmup LinearWarmup": (_warmup("LinearWarmup", warmup_period=8), _dampened),
    "pytorch-warmup ExponentialWarmup": (_warmup("ExponentialWarmup", warmup_period=8), _dampened),
    "pytorch-warmup UntunedLinearWarmup": (_warmup("UntunedLinearWarmup"), _dampened),
    "pytorch-warmup UntunedExponentialWarmup": (_warmup("UntunedExponentialWarmup"), _dampened),
    "pytorch-warmup RAdamWarmup": (_warmup("RAdamWarmup"), _dampened),
}
