"""What the network sees: windows over the series, each relative to its own level."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """How a series is cut.

    Attributes:
        lookback: values that the network sees.
        horizon: values that it forecasts.
        level: the mean of the last ``level`` absolute values is the unit of a window.
        season: values after which the pattern repeats; how short series are continued backwards.
    """

    lookback: int
    horizon: int
    level: int
    season: int

    @classmethod
    def of(cls, horizon: int, season: int) -> "Shape":
        """Two seasons back, in units of the last season; a dozen values where there is no season."""
        repeat = season if season > 1 else 12
        return cls(lookback=2 * repeat, horizon=horizon, level=repeat, season=season)


@dataclass(frozen=True)
class Windows:
    """Windows ready to train on.

    Attributes:
        past: (windows, lookback), relative to the window's level, minus 1.
        future: (windows, horizon), likewise; 0 where the series has ended.
        known: (windows, horizon), 1 where the series goes on, else 0.
    """

    past: Tensor
    future: Tensor
    known: Tensor

    def __len__(self) -> int:
        return len(self.past)


def training_windows(histories: list[Tensor], shape: Shape) -> Windows:
    """Every window whose past is at least one level long and whose future has begun.

    Args:
        histories: what may be trained on, and nothing else.
        shape: how to cut.
    """
    width = shape.lookback + shape.horizon
    values, known = [], []
    for history in histories:
        if len(history) <= shape.level:
            continue
        ahead = torch.full((shape.horizon - 1,), torch.nan)
        whole = torch.cat([_before(history, shape), history, ahead]).unfold(0, width, 1)
        values.append(whole.nan_to_num())
        known.append((~whole[:, shape.lookback :].isnan()).float())
    if not values:
        return Windows(torch.empty(0, shape.lookback), torch.empty(0, shape.horizon), torch.empty(0, shape.horizon))
    cut = torch.cat(values)
    unit = level(cut[:, : shape.lookback], shape)
    relative = cut / unit - 1
    mask = torch.cat(known)
    return Windows(relative[:, : shape.lookback].contiguous(), relative[:, shape.lookback :] * mask, mask)


def last_windows(histories: list[Tensor], shape: Shape) -> tuple[Tensor, Tensor]:
    """The end of each series, from which its forecast is made.

    Returns:
        (series, lookback) relative to the level, minus 1; and the level, (series, 1).
    """
    ends = torch.stack([torch.cat([_before(history, shape), history])[-shape.lookback :] for history in histories])
    unit = level(ends, shape)
    return ends / unit - 1, unit


def level(past: Tensor, shape: Shape) -> Tensor:
    """(windows, lookback) -> (windows, 1), the unit of each window: how large its last values are."""
    unit = past[:, -shape.level :].abs().mean(dim=1, keepdim=True)
    return torch.where(unit > 1e-9, unit, torch.ones_like(unit))


def _before(history: Tensor, shape: Shape) -> Tensor:
    """Values before the first one: its first season, repeated backwards; (lookback - level,)."""
    repeat = min(shape.level, len(history))
    steps = torch.arange(-(shape.lookback - shape.level), 0) % repeat
    return history[:repeat][steps]
