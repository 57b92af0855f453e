"""A trigger for data that have changed: the loss has moved up and stays there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from auxin.errors import GrowthError
from auxin.when.checks import as_built, check_choice, check_count, check_metric, check_number, check_state
from auxin.when.reading import Mode, Reading, watched
from auxin.when.robust import noise

# One reading counts for this many standard deviations at most, so that a single spike cannot fire.
_CLIP = 3.0


def drift(
    threshold: float = 8.0,
    delta: float = 1.0,
    window: int = 30,
    mode: Mode = "min",
    metric: str | None = None,
) -> "_Drift":
    """Fires when the metric has moved for the worse and stays there, as a loss does when the data change.

    The test of Page and Hinkley, with everything estimated from the readings themselves: a sum of how far each one
    lies above the usual level, in standard deviations of the noise, less `delta`; the sum never falls below 0, and
    fires above `threshold`. Level and noise are medians over the last `window` usual readings; readings during which
    the sum is above 0 are under suspicion, and become usual when it returns to 0. One reading adds at most
    3 - `delta`, so that it takes several to fire. After firing the readings under suspicion are the start of the new
    usual ones.

    NaN is not counted. An infinity counts as one reading far off. The first `window` readings only teach it what is
    usual; while a loss falls fast, a rise must be seen against that fall. With the defaults, noise alone fires in about
    one run in a hundred of 300 readings.

    Args:
        threshold: Where the sum fires, in standard deviations; at least 3. Higher: fewer false alarms, later.
        delta: Standard deviations that do not count, half the smallest shift that matters; at least 0, below 3.
        window: Usual readings from which level and noise are estimated; at least 5.
        mode: "min" for a metric that should be low (a loss), "max" for one that should be high (an accuracy).
        metric: Name of the keyword to watch, as in `grower.step(accuracy=...)`; None watches the number that is
            passed by position, `grower.step(loss)`.

    Returns:
        A trigger.

    Raises:
        GrowthError: If an argument is out of range.

    Source:
        E. S. Page, Continuous inspection schemes (1954); D. V. Hinkley, Inference about the change-point from
        cumulative sum tests (1971). Medians, the clipping and the suspicion are ours.

    Examples:
        >>> trigger = drift(window=5)
        >>> losses = [1.0, 1.1, 0.9, 1.0, 1.1, 9.0, 1.0, 2.0, 2.1, 1.9, 2.0]
        >>> [trigger(Reading(loss, {}, 1, 0, 0, 1)) for loss in losses].index(True)
        10
    """
    check_number("drift", "threshold", threshold)
    check_number("drift", "delta", delta)
    check_count("drift", "window", window, at_least=5)
    check_choice("drift", "mode", mode, ("min", "max"))
    check_metric("drift", metric)
    if threshold < _CLIP:
        raise GrowthError(f"drift(threshold={threshold!r}): threshold is at least 3, or a single spike would fire.")
    if not 0 <= delta < _CLIP:
        raise GrowthError(f"drift(delta={delta!r}): delta is at least 0 and below 3, where readings are clipped.")
    return _Drift(float(threshold), float(delta), window, mode, metric)


@dataclass(eq=False, repr=False)
class _Drift:
    threshold: float = 8.0
    delta: float = 1.0
    window: int = 30
    mode: Mode = "min"
    metric: str | None = None
    usual: list[float] = field(init=False, default_factory=list)
    suspects: list[float] = field(init=False, default_factory=list)
    sum: float = field(init=False, default=0.0)

    def __call__(self, reading: Reading) -> bool:
        value = watched(reading, self.metric, self)
        if self.mode == "max":
            value = -value
        if math.isnan(value):
            return False
        if len(self.usual) < self.window:
            self._learn([value])
            return False
        self.sum = max(0.0, self.sum + self._above(value) - self.delta)
        self.suspects.append(value)
        fires = self.sum > self.threshold
        if fires:
            self.usual, self.sum = [], 0.0
        if self.sum == 0.0:
            self._learn(self.suspects)
            self.suspects = []
        elif len(self.suspects) > self.window:
            self._learn([self.suspects.pop(0)])
        return fires

    def _above(self, value: float) -> float:
        """Standard deviations of the noise above the usual level, at most `_CLIP` either way."""
        level = median(self.usual)
        scale = max(noise(self.usual), 1e-6 * abs(level), 1e-300)
        return max(-_CLIP, min(_CLIP, (value - level) / scale))

    def _learn(self, values: list[float]) -> None:
        self.usual = [*self.usual, *(value for value in values if math.isfinite(value))][-self.window :]

    def state_dict(self) -> dict[str, Any]:
        return {"usual": list(self.usual), "suspects": list(self.suspects), "sum": self.sum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(self, state, ("usual", "suspects", "sum"))
        usual, suspects = ([float(value) for value in state[name]] for name in ("usual", "suspects"))
        self.usual, self.suspects, self.sum = usual, suspects, float(state["sum"])

    def __repr__(self) -> str:
        return as_built("drift", self)
