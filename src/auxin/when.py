"""Triggers: when to grow. Any callable `when(reading) -> bool` is one; these are the common ones.

A trigger is called once for every `grower.step(...)`, and looks at nothing but its `Reading`. One that
remembers something has `state_dict()` and `load_state_dict()`; the values are numbers, so that they can be
stored as JSON. The arguments are not part of the state: a resumed run may use another patience.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from auxin.errors import GrowthError

Mode = Literal["min", "max"]
Unit = Literal["calls", "optimizer"]


@dataclass(frozen=True)
class Reading:
    """What a trigger sees at one call of `grower.step`.

    Args:
        metric: The number that was passed by position, `grower.step(loss)`; None if there was none.
        metrics: The numbers that were passed by keyword, `grower.step(accuracy=0.9)`.
        calls: How often `grower.step` was called, this call included: 1 at the first.
        optimizer_steps: How many optimizer steps were taken so far.
        growths: How often the network has grown.
        since_growth: Calls since the last growth, or since the start if there was none.
    """

    metric: float | None
    metrics: Mapping[str, float]
    calls: int
    optimizer_steps: int
    growths: int
    since_growth: int


Trigger = Callable[[Reading], bool]


def plateau(
    patience: int = 10,
    min_delta: float = 0.0,
    mode: Mode = "min",
    cooldown: int = 0,
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
        cooldown: Readings that are not counted after it has fired.
        metric: Name of the keyword to watch, as in `grower.step(accuracy=...)`; None watches the number that
            is passed by position, `grower.step(loss)`.

    Returns:
        A trigger.

    Raises:
        GrowthError: If an argument is out of range.

    Example:
        >>> trigger = plateau(patience=2)
        >>> [trigger(Reading(loss, {}, 1, 0, 0, 1)) for loss in (3.0, 2.0, 2.0, 2.5, 2.5)]
        [False, False, False, True, False]
    """
    _check_count("plateau", "patience", patience, at_least=1)
    _check_number("plateau", "min_delta", min_delta)
    if min_delta < 0:
        raise GrowthError(f"plateau(min_delta={min_delta!r}): an improvement cannot be negative, pass 0 or more.")
    _check_choice("plateau", "mode", mode, ("min", "max"))
    _check_count("plateau", "cooldown", cooldown, at_least=0)
    _check_metric("plateau", metric)
    return _Plateau(patience, float(min_delta), mode, cooldown, metric)


def every(n: int, unit: Unit = "calls") -> "_Every":
    """Fires at every `n`-th count: at n, 2n, 3n and so on.

    Args:
        n: The distance between two firings; at least 1.
        unit: "calls" counts calls of `grower.step`, "optimizer" counts optimizer steps. Optimizer steps are
            looked at only when `grower.step` is called: it fires at the first call at or behind a multiple of
            n, and multiples that were passed together are one firing.

    Returns:
        A trigger.

    Raises:
        GrowthError: If an argument is out of range.

    Example:
        >>> trigger = every(2)
        >>> [trigger(Reading(None, {}, call, 0, 0, call)) for call in (1, 2, 3, 4)]
        [False, True, False, True]
    """
    _check_count("every", "n", n, at_least=1)
    _check_choice("every", "unit", unit, ("calls", "optimizer"))
    return _Every(n, unit)


def at(counts: Iterable[int], unit: Unit = "calls") -> "_At":
    """Fires once at each of the given counts.

    Args:
        counts: When to fire: whole numbers from 1, in any order, none twice.
        unit: "calls" counts calls of `grower.step`, "optimizer" counts optimizer steps. Optimizer steps are
            looked at only when `grower.step` is called: it fires at the first call at or behind a count;
            counts that were passed together fire at that call and the next ones, so that no growth is lost.

    Returns:
        A trigger.

    Raises:
        GrowthError: If a count is not a whole number from 1, or is given twice.

    Example:
        >>> trigger = at([1, 4])
        >>> [trigger(Reading(None, {}, call, 0, 0, call)) for call in (1, 2, 3, 4)]
        [True, False, False, True]
    """
    if isinstance(counts, str | bytes) or not isinstance(counts, Iterable):
        raise GrowthError(f"at({counts!r}): pass the counts as a list, at([{counts}]).")
    wanted = tuple(counts)
    for count in wanted:
        _check_count("at", "counts", count, at_least=1)
    if len(set(wanted)) < len(wanted):
        raise GrowthError(f"at({list(wanted)!r}): a count is given twice. One call grows at most once.")
    _check_choice("at", "unit", unit, ("calls", "optimizer"))
    return _At(tuple(sorted(wanted)), unit)


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

    Example:
        >>> trigger = threshold(0.9, mode="max", metric="accuracy")
        >>> [trigger(Reading(None, {"accuracy": a}, 1, 0, 0, 1)) for a in (0.8, 0.9, 0.95)]
        [False, True, True]
    """
    _check_number("threshold", "value", value)
    _check_choice("threshold", "mode", mode, ("min", "max"))
    _check_metric("threshold", metric)
    return _Threshold(float(value), mode, metric)


@dataclass(eq=False, repr=False)
class _Plateau:
    patience: int
    min_delta: float = 0.0
    mode: Mode = "min"
    cooldown: int = 0
    metric: str | None = None
    best: float = field(init=False)
    wait: int = field(init=False, default=0)
    cooling: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.best = math.inf if self.mode == "min" else -math.inf

    def __call__(self, reading: Reading) -> bool:
        value = _watched(reading, self.metric, self)
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
        self.cooling = self.cooldown
        return True

    def _improves(self, value: float) -> bool:
        if self.mode == "min":
            return value < self.best - self.min_delta
        return value > self.best + self.min_delta

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "wait": self.wait, "cooling": self.cooling}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        _check_state(self, state, ("best", "wait", "cooling"))
        self.best = float(state["best"])
        self.wait = int(state["wait"])
        self.cooling = int(state["cooling"])

    def __repr__(self) -> str:
        return _as_built("plateau", self)


@dataclass(eq=False, repr=False)
class _Every:
    n: int
    unit: Unit = "calls"
    seen: int = field(init=False, default=0)

    def __call__(self, reading: Reading) -> bool:
        now = _counted(reading, self.unit)
        passed = now // self.n > self.seen // self.n
        self.seen = now
        return passed

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        _check_state(self, state, ("seen",))
        self.seen = int(state["seen"])

    def __repr__(self) -> str:
        return _as_built("every", self)


@dataclass(eq=False, repr=False)
class _At:
    counts: tuple[int, ...]
    unit: Unit = "calls"
    last: int = field(init=False, default=0)

    def __call__(self, reading: Reading) -> bool:
        now = _counted(reading, self.unit)
        due = [count for count in self.counts if self.last < count <= now]
        if due:
            self.last = due[0]
        return bool(due)

    def state_dict(self) -> dict[str, int]:
        return {"last": self.last}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        _check_state(self, state, ("last",))
        self.last = int(state["last"])

    def __repr__(self) -> str:
        return _as_built("at", self)


@dataclass(eq=False, repr=False)
class _Threshold:
    value: float
    mode: Mode = "min"
    metric: str | None = None

    def __call__(self, reading: Reading) -> bool:
        now = _watched(reading, self.metric, self)
        return now <= self.value if self.mode == "min" else now >= self.value

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        _check_state(self, state, ())

    def __repr__(self) -> str:
        return _as_built("threshold", self)


def _watched(reading: Reading, metric: str | None, trigger: object) -> float:
    """The number that a trigger watches, or a GrowthError that shows how to pass it."""
    value = reading.metric if metric is None else reading.metrics.get(metric)
    if value is None:
        raise GrowthError(_missing(reading, metric, trigger))
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        what = "the metric" if metric is None else repr(metric)
        raise GrowthError(
            f"{trigger!r} needs a number, but {what} is a {type(value).__name__}. "
            "Pass one number, grower.step(float(loss))."
        ) from error


def _missing(reading: Reading, metric: str | None, trigger: object) -> str:
    got = ", ".join(f"{name}=..." for name in reading.metrics)
    if metric is None:
        message = f"{trigger!r} needs a metric, but grower.step({got}) got none by position. "
        message += "Call grower.step(loss)"
        if reading.metrics:
            message += f", or watch a keyword with metric={next(iter(reading.metrics))!r}"
        return message + "."
    by_position = "" if reading.metric is None else "loss"
    call = ", ".join(part for part in (by_position, got) if part)
    return f"{trigger!r} watches {metric!r}, but grower.step({call}) has none. Call grower.step({metric}=...)."


def _counted(reading: Reading, unit: Unit) -> int:
    return reading.calls if unit == "calls" else reading.optimizer_steps


def _as_built(name: str, trigger: "_Plateau | _Every | _At | _Threshold") -> str:
    """The call that made `trigger`, without what was left at its default."""
    given = []
    for argument in fields(trigger):
        value = getattr(trigger, argument.name)
        if argument.init and (argument.default is MISSING or value != argument.default):
            given.append(f"{argument.name}={list(value) if isinstance(value, tuple) else value!r}")
    return f"{name}({', '.join(given)})"


def _check_count(trigger: str, name: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise GrowthError(f"{trigger}({name}={value!r}): {name} takes whole numbers from {at_least}.")


def _check_number(trigger: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise GrowthError(f"{trigger}({name}={value!r}): {name} takes a finite number.")


def _check_choice(trigger: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        one_of = " or ".join(repr(choice) for choice in choices)
        raise GrowthError(f"{trigger}({name}={value!r}): {name} is {one_of}.")


def _check_metric(trigger: str, metric: object) -> None:
    if metric is not None and not (isinstance(metric, str) and metric.isidentifier()):
        raise GrowthError(
            f"{trigger}(metric={metric!r}): metric is the name of a keyword of grower.step, "
            "as 'accuracy' in grower.step(accuracy=...)."
        )


def _check_state(trigger: object, state: Mapping[str, float], names: tuple[str, ...]) -> None:
    if set(state) != set(names):
        raise GrowthError(
            f"{trigger!r}: this state holds {sorted(state)}, expected {sorted(names)}: "
            "it is another trigger's. Build the Grower with the trigger that it was saved with."
        )
