"""Triggers on the trend of a metric: it has ceased to improve, or it gets worse."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from auxin.errors import GrowthError
from auxin.when.checks import as_built, check_choice, check_count, check_metric, check_number, check_state
from auxin.when.reading import Mode, Reading, watched
from auxin.when.robust import mann_kendall, noise, probability_above, theil_sen

_CLEAR = 6.0  # a standard score, chosen on the tuning curves of benchmarks/triggers.py


def slope(
    window: int = 20,
    level: float = 0.5,
    min_delta: float = 0.0,
    mode: Mode = "min",
    metric: str | None = None,
    shortest: int | None = None,
) -> "_Slope":
    """Fires when the improvement over the last `window` readings can no longer be told from noise.

    The test of Mann and Kendall asks in how many pairs of readings the later one is better. It fires where that many
    or more would come by chance with a probability above `level` if nothing improved. Only the order of the readings
    counts, so neither the units nor single outliers matter. After firing it waits for a new window.

    A window too short for the noise fires on a loss that still falls: over `window` readings the metric should improve
    by twice the noise or more while it is worth waiting. NaN and infinities are not counted. A reading costs
    `window` squared comparisons, well below a millisecond.

    With `shortest` a steep improvement that stops is seen before the whole window is level: windows of `shortest`,
    `shortest + 5`, ... readings are looked at too, each where the readings before it (two whole windows of them)
    improved so steadily that the shorter window would show it clearly, by a score of 6 if that went on.

    Args:
        window: Readings that are looked at; at least 8.
        level: Probability above which the improvement may be chance, above 0 and below 1. Lower: fires sooner, also
            on an improvement that is only slow. At the default, 0.5, it fires when no more pairs improve than get
            worse. In our measurements short windows with a high level were right sooner, and on more kinds of
            curves, than long ones with a low level (`docs/benchmarks.md`).
        min_delta: Improvement per reading that does not count as one, in the units of the metric; at least 0.
        mode: "min" for a metric that should fall (a loss), "max" for one that should rise (an accuracy).
        metric: Name of the keyword to watch, as in `grower.step(accuracy=...)`; None watches the number that is
            passed by position, `grower.step(loss)`.
        shortest: The shortest window, from 8 to `window`; None: the whole window alone.

    Returns:
        A trigger; its `trend` is the slope over the window.

    Raises:
        GrowthError: If an argument is out of range.

    Source:
        H. B. Mann, Nonparametric tests against trend (1945); M. G. Kendall, Rank Correlation Methods (1975); for
        `trend`: P. K. Sen, Estimates of the regression coefficient based on Kendall's tau (1968).

    Examples:
        >>> trigger = slope(window=8, level=0.05)
        >>> losses = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.1, 0.9, 1.2, 1.0, 1.1, 1.3, 0.9]
        >>> [trigger(Reading(loss, {}, 1, 0, 0, 1)) for loss in losses].index(True)
        12
    """
    _check("slope", window, level, mode, metric)
    check_number("slope", "min_delta", min_delta)
    if min_delta < 0:
        raise GrowthError(f"slope(min_delta={min_delta!r}): an improvement cannot be negative, pass 0 or more.")
    if shortest is not None:
        check_count("slope", "shortest", shortest, at_least=8)
        if shortest > window:
            raise GrowthError(f"slope(window={window}, shortest={shortest}): shortest is at most the window.")
    return _Slope(window, float(level), float(min_delta), mode, metric, shortest)


def diverging(
    window: int = 20,
    level: float = 1e-4,
    nonfinite: int = 1,
    mode: Mode = "min",
    metric: str | None = None,
) -> "_Diverging":
    """Fires when the metric gets worse over the last `window` readings, or is NaN or infinite.

    The test of Mann and Kendall, as in `slope`: it fires where so many pairs of readings, of which the later one is
    worse, come by chance with a probability below `level`. It does not ask how much worse. After firing it waits for a
    new window. A step up that stays is a trend to this test as well, see `drift`.

    Args:
        window: Readings that are looked at; at least 8.
        level: Probability below which it is no chance, above 0 and below 1. The test is made at every reading, so
            this is small.
        nonfinite: So many readings in a row that are NaN or infinite fire; at least 1. Fewer are not counted.
        mode: "min" for a metric that should fall (a loss), "max" for one that should rise (an accuracy).
        metric: Name of the keyword to watch, as in `grower.step(accuracy=...)`; None watches the number that is
            passed by position, `grower.step(loss)`.

    Returns:
        A trigger; its `trend` is the slope over the window.

    Raises:
        GrowthError: If an argument is out of range, or no window of this length can be that significant.

    Source:
        As for `slope`.

    Examples:
        >>> trigger = diverging(window=10)
        >>> losses = [1.0, 1.1, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.2, 2.9, 3.9]
        >>> [trigger(Reading(loss, {}, 1, 0, 0, 1)) for loss in losses].index(True)
        11
    """
    _check("diverging", window, level, mode, metric)
    check_count("diverging", "nonfinite", nonfinite, at_least=1)
    best = probability_above(mann_kendall(range(window)))
    if level <= best:
        raise GrowthError(
            f"diverging(window={window}, level={level!r}): {window} readings that all rise have a probability of "
            f"{best:.1g}, so it could never fire. Pass a larger level or a longer window."
        )
    return _Diverging(window, float(level), nonfinite, mode, metric)


def _check(name: str, window: object, level: Any, mode: object, metric: object) -> None:
    check_count(name, "window", window, at_least=8)
    check_number(name, "level", level)
    if not 0 < level < 1:
        raise GrowthError(f"{name}(level={level!r}): level is a probability, above 0 and below 1.")
    check_choice(name, "mode", mode, ("min", "max"))
    check_metric(name, metric)


@dataclass(eq=False, repr=False)
class _Slope:
    window: int = 20
    level: float = 0.5
    min_delta: float = 0.0
    mode: Mode = "min"
    metric: str | None = None
    shortest: int | None = None
    values: list[float] = field(init=False, default_factory=list)

    def __call__(self, reading: Reading) -> bool:
        value = watched(reading, self.metric, self)
        if not math.isfinite(value):
            return False
        kept = self.window if self.shortest is None else 3 * self.window
        self.values = [*self.values, value][-kept:]
        if len(self.values) < self.window:
            return False
        sign = 1 if self.mode == "max" else -1
        gains = [sign * value - self.min_delta * i for i, value in enumerate(self.values)]
        fires = self._level(gains, self.window) or any(
            self._level(gains, short) and self._would_show(gains, short)
            for short in range(self.shortest or self.window, self.window, 5)
        )
        if fires:
            self.values = []
        return fires

    def _level(self, gains: list[float], last: int) -> bool:
        return probability_above(mann_kendall(gains[-last:])) > self.level

    def _would_show(self, gains: list[float], last: int) -> bool:
        """Whether a window of that length would show the improvement of the readings before it."""
        past = gains[:-last][-2 * self.window :]
        if len(past) < 2 * self.window:
            return False
        slope, start = theil_sen(past)
        rest = noise([gain - start - slope * i for i, gain in enumerate(past)])
        return slope * math.sqrt(last**3 / 12) >= _CLEAR * rest  # the standard error of a slope, from independent noise

    @property
    def trend(self) -> float:
        """Slope per reading over the window; NaN with fewer than two readings."""
        last = self.values[-self.window :]
        return theil_sen(last)[0] if len(last) > 1 else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(self, state, ("values",))
        self.values = [float(value) for value in state["values"]]

    def __repr__(self) -> str:
        return as_built("slope", self)


@dataclass(eq=False, repr=False)
class _Diverging:
    window: int = 20
    level: float = 1e-4
    nonfinite: int = 1
    mode: Mode = "min"
    metric: str | None = None
    values: list[float] = field(init=False, default_factory=list)
    broken: int = field(init=False, default=0)

    def __call__(self, reading: Reading) -> bool:
        value = watched(reading, self.metric, self)
        if math.isfinite(value):
            self.broken = 0
            self.values = [*self.values, value][-self.window :]
        else:
            self.broken += 1
        fires = self.broken >= self.nonfinite or (self.broken == 0 and self._rises())
        if fires:
            self.values, self.broken = [], 0
        return fires

    def _rises(self) -> bool:
        if len(self.values) < self.window:
            return False
        sign = 1 if self.mode == "min" else -1
        return probability_above(mann_kendall([sign * value for value in self.values])) < self.level

    @property
    def trend(self) -> float:
        """Slope per reading over the window; NaN with fewer than two readings."""
        return theil_sen(self.values)[0] if len(self.values) > 1 else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values), "broken": self.broken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(self, state, ("values", "broken"))
        self.values, self.broken = [float(value) for value in state["values"]], int(state["broken"])

    def __repr__(self) -> str:
        return as_built("diverging", self)
