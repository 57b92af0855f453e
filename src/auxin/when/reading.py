"""What a trigger sees at one call of `grower.step`, and how it takes the number that it watches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
        flops: FLOPs of training so far, with all that was spent on races and evaluations; 0 unless the trigger has a
            true `counts_flops` and the Grower has evidence to count them on.
    """

    metric: float | None
    metrics: Mapping[str, float]
    calls: int
    optimizer_steps: int
    growths: int
    since_growth: int
    flops: float = 0.0


Trigger = Callable[[Reading], bool]


def watched(reading: Reading, metric: str | None, trigger: object) -> float:
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


def counted(reading: Reading, unit: Unit) -> int:
    """Calls of `grower.step`, or optimizer steps."""
    return reading.calls if unit == "calls" else reading.optimizer_steps
