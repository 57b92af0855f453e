"""Judging a growth some time later: against the run that did not grow, extrapolated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from auxin.errors import GrowthError

Point = tuple[float, float]  # (call, metric)


@dataclass(frozen=True)
class Probation:
    """Roll a growth back if, some calls later, the run is behind where it would have been without it.

    The un-grown run is a straight line through its last ``window`` readings. A loss usually flattens, so the line asks
    more of the growth than the run itself would have reached: a growth that passes has paid.

    Args:
        calls: of ``grower.step`` until the verdict.
        window: readings before the growth from which the line is drawn, at least 3.
        margin: how far behind is still accepted, in the metric's own units.
        metric: the keyword of ``grower.step(loss=...)`` that is judged; None: the number passed by position.
        mode: "min" where a lower metric is better, "max" where a higher one is.

    Example:
        >>> falling = [(call, 10.0 - call) for call in range(5)]
        >>> Probation(calls=3).behind(falling, [(5, 5.2), (6, 4.6), (7, 4.0)])
        True
    """

    calls: int = 10
    window: int = 10
    margin: float = 0.0
    mode: Literal["min", "max"] = "min"
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.calls < 1 or self.window < 3 or self.mode not in ("min", "max"):
            raise GrowthError(f"{self!r}: calls is at least 1, window at least 3, mode 'min' or 'max'.")

    def verdict(self, history: Sequence[Point], born: int) -> list[Point] | None:
        """The readings up to the growth at call ``born`` if the run is behind without it, else None."""
        before = [point for point in history if point[0] <= born]
        after = [point for point in history if point[0] > born]
        return before if self.behind(before, after) else None

    def behind(self, before: Sequence[Point], after: Sequence[Point]) -> bool:
        """The verdict: the mean of the last third of ``after`` against the line through ``before``.

        Args:
            before: (call, metric) up to the growth; with fewer than 3 points no growth is ever behind.
            after: (call, metric) since.
        """
        before = [point for point in before if point[1] == point[1]][-self.window :]
        if len(before) < 3 or not after:
            return False
        slope, level = line(before)
        late = after[-max(1, len(after) // 3) :]
        gap = sum(metric - (level + slope * call) for call, metric in late) / len(late)
        return not (gap if self.mode == "min" else -gap) <= self.margin


def line(points: Sequence[Point]) -> tuple[float, float]:
    """Slope and level at 0 of the least-squares line."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return slope, mean_y - slope * mean_x
