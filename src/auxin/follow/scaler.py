"""``torch.amp.GradScaler``: nothing to change, but never between ``unscale_`` and ``step``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from auxin.change import Change
from auxin.errors import GrowthError
from auxin.follow import follow
from auxin.safe_point import unscaled


@follow(torch.amp.GradScaler)
def follow_scaler(scaler: Any, change: Change) -> Iterator[None]:
    """Scale and growth tracker stay as they are."""
    if unscaled(scaler):
        raise GrowthError(
            "GradScaler: gradients are unscaled and scaler.update() has not run; grow after scaler.update()."
        )
    yield
    yield
