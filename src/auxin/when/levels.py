"""Triggers on the level of a metric: it stopped improving on its best, or it has reached a value."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from auxin.errors import GrowthError
from auxin.when.checks import as_built, check_choice, check_count, check_metric, check_number, check_state
from auxin.when.reading import Mode, Reading, watched


def plateau(
    patience: int = 10,
    min_delta: float = 0.0,
    mode: Mode = "min",
    cooldown: int | None = None,
    metric: str | None = None,
) -> "_Plateau":
    """Fires when the metric has not improved on its best for `patience` readings in a row.

    Counted as early stopping counts: the trigger fires **at** the `patience`-th reading without an
    improvement, so `patience=1` fires at the first. (`torch.optim.lr_scheduler.ReduceLROnPlateau` acts one
    reading later: its `patience=9` is `patience=10` here. Its `threshold` is relative by default, `min_delta`
    is absolute.)

    After it has fired, the count starts again and the next `cooldown` readings are not counted, though an
    improvement among them is kept as the best. The best is kept over a growth: a loss that jumps up by
    growing does not fire at once, it has `cooldown + patience` readings to get below where it was. NaN is no
    improvement, so it counts as a reading without one; so does an infinity in the wrong direction.

    Args:
        patience: Readings without an improvement, in a row, that fire; at least 1.
        min_delta: An improvement must be larger than this, in the units of the metric.
        mode: "min" for a metric that should fall (a loss), "max" for one that should rise (an accuracy).
        cooldown: Readings that are not counted after it has fired, for what has grown to learn; None: twice the
            patience. 0: while nothing improves it fires again after every `patience` readings.
        metric: Name of the keyword to watch, as in `grower.step(accuracy=...)`; None watches the number that
            is passed by position, `grower.step(loss)`.

    Returns:
        A trigger.

    Raises:
        GrowthError: If an argument is out of range.

    Examples:
        >>> trigger = plateau(patience=2)
        >>> [trigger(Reading(loss, {}, 1, 0, 0, 1)) for loss in (3.0, 2.0, 2.0, 2.5, 2.5)]
        [False, False, False, True, False]
    """
    check_count("plateau", "patience", patience, at_least=1)
    check_number("plateau", "min_delta", min_delta)
    if min_delta < 0:
        raise GrowthError(f"plateau(min_delta={min_delta!r}): an improvement cannot be negative, pass 0 or more.")
    check_choice("plateau", "mode", mode, ("min", "max"))
    if cooldown is not None:
        check_count("plateau", "cooldown", cooldown, at_least=0)
    check_metric("plateau", metric)
    return _Plateau(patience, float(min_delta), mode, cooldown, metric)


def threshold(value: float, mode: Mode = "min", metric: str | None = None) -> "_Threshold":
    """Fires at every reading where the metric has reached `value`.

    It remembers nothing: while the metric stays there it fires again at each call. To grow once, give the
    Grower `limit=Limit(growths=1)`.

    Args:
        value: Finite. Mode "min" fires at `metric <= value`, "max" at `metric >= value`; NaN never fires.
        mode: "min" for a metric that should fall (a loss), "max" for one that should rise (an accuracy).
        metric: Name of the keyword to watch, as in `grower.step(accuracy=...)`; None watches the number that
            is passed by position, `grower.step(loss)`.

    Returns:
        A trigger.

    Raises:
        GrowthError: If an argument is out of range.

    Examples:
        >>> trigger = threshold(0.9, mode="max", metric="accuracy")
        >>> [trigger(Reading(None, {"accuracy": a}, 1, 0, 0, 1)) for a in (0.8, 0.9, 0.95)]
        [False, True, True]
    """
    check_number("threshold", "value", value)
    check_choice("threshold", "mode", mode, ("min", "max"))
    check_metric("threshold", metric)
    return _Threshold(float(value), mode, metric)


@dataclass(eq=False, repr=False)
class _Plateau:
    patience: int
    min_delta: float = 0.0
    mode: Mode = "min"
    cooldown: int | None = None
    metric: str | None = None
    best: float = field(init=False)
    wait: int = field(init=False, default=0)
    cooling: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.best = math.inf if self.mode == "min" else -math.inf

    def __call__(self, reading: Reading) -> bool:
        value = watched(reading, self.metric, self)
        if self._improves(value):
            self.best = value
            self.wait = 0
        else:
            self.wait += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.wait = 0
        if self.wait < self.patience:
            return False
        self.wait = 0
        self.cooling = 2 * self.patience if self.cooldown is None else self.cooldown
        return True

    def _improves(self, value: float) -> bool:
        if self.mode == "min":
            return value < self.best - self.min_delta
        return value > self.best + self.min_delta

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "wait": self.wait, "cooling": self.cooling}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        check_state(self, state, ("best", "wait", "cooling"))
        self.best = float(state["best"])
        self.wait = int(state["wait"])
        self.cooling = int(state["cooling"])

    def __repr__(self) -> str:
        return as_built("plateau", self)


@dataclass(eq=False, repr=False)
class _Threshold:
    value: float
    mode: Mode = "min"
    metric: str | None = None

    def __call__(self, reading: Reading) -> bool:
        now = watched(reading, self.metric, self)
        return now <= self.value if self.mode == "min" else now >= self.value

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        check_state(self, state, ())

    def __repr__(self) -> str:
        return as_built("threshold", self)
