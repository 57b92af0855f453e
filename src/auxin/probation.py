"""Judging a growth some time later: against the run that did not grow, extrapolated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

    Examples:
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

    def verdict(self, history: Sequence[Point], born: int) -> tuple[list[Point], str] | None:
        """The readings up to the growth at call ``born``, and how far the run is behind; None where it is not."""
        before = [point for point in history if point[0] <= born]
        after = [point for point in history if point[0] > born]
        if not self.behind(before, after):
            return None
        return before, f"probation: {self.gap(before, after):.3g} behind the run without it"

    def behind(self, before: Sequence[Point], after: Sequence[Point]) -> bool:
        """The verdict: the mean of the last third of ``after`` against the line through ``before``.

        Args:
            before: (call, metric) up to the growth; with fewer than 3 points no growth is ever behind.
            after: (call, metric) since.
        """
        known = [point for point in before if point[1] == point[1]]
        return len(known) >= 3 and len(after) > 0 and not self.gap(before, after) <= self.margin

    def gap(self, before: Sequence[Point], after: Sequence[Point]) -> float:
        """How far the mean of the last third of ``after`` is behind the line through ``before``; below 0: ahead."""
        slope, level = line([point for point in before if point[1] == point[1]][-self.window :])
        late = after[-max(1, len(after) // 3) :]
        gap = sum(metric - (level + slope * call) for call, metric in late) / len(late)
        return gap if self.mode == "min" else -gap


@dataclass(frozen=True)
class TakenBack:
    """What ``grower.step`` returns where a probation has rolled a growth back: false, since nothing has grown.

    Attributes:
        entry: of the journal, as it was, with ``undone_at`` and ``why``; the last of ``grower.undone``.

    Examples:
        >>> taken_back = TakenBack({"summary": "blocks.2 <- Linear", "undone_at": {"calls": 9}, "why": "behind"})
        >>> bool(taken_back), str(taken_back)
        (False, 'taken back at call 9 (behind): blocks.2 <- Linear')
    """

    entry: Mapping[str, Any]

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"taken back at call {self.entry['undone_at']['calls']} ({self.entry['why']}): {self.entry['summary']}"


def line(points: Sequence[Point]) -> tuple[float, float]:
    """Slope and level at 0 of the least-squares line."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return slope, mean_y - slope * mean_x
