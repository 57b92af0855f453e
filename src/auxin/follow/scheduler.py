"""Learning-rate schedulers: new parameters join existing groups, so every schedule goes on unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import lr_scheduler

from auxin.change import Change
from auxin.errors import GrowthError
from auxin.follow import follow


def optimizer_of(scheduler: Any) -> Any:
    """The optimizer whose groups a scheduler drives."""
    found = getattr(scheduler, "optimizer", None)
    if found is None:
        inner = getattr(scheduler, "_schedulers", None) or [None]
        found = getattr(inner[0], "optimizer", None)
    return found


@follow(lr_scheduler.LRScheduler)
@follow(lr_scheduler.ReduceLROnPlateau)
def follow_scheduler(scheduler: Any, change: Change) -> Iterator[None]:
    """Check that the optimizer it drives keeps step too; nothing else depends on the number of parameters."""
    driven = optimizer_of(scheduler)
    if all(driven is not optimizer for optimizer in change.optimizers):
        raise GrowthError(
            f"{type(scheduler).__name__} drives a {type(driven).__name__} that was not given. Pass the optimizer "
            "together with its scheduler: auxin.grow(model, edit, optimizer, scheduler)."
        )
    yield
    yield
