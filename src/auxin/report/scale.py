"""From values to places on the page: linear and logarithmic scales, round ticks, fewer points."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]  # (0 .. 1 along the plot, value); a value of NaN breaks the line

_LOG_FROM = 30.0  # largest / smallest value from which a logarithmic scale reads better


@dataclass(frozen=True)
class Scale:
    """Values `low` .. `high` onto 0 .. 1."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where `value` lies, held inside 0 .. 1."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self, count: int) -> list[float]:
        """About `count` round values inside the scale."""
        return log_ticks(self.low, self.high, count) if self.log else round_ticks(self.low, self.high, count)


def value_scale(values: Iterable[float], zero: bool = False, log: bool | None = None, pieces: int = 5) -> Scale:
    """A scale that holds every finite value.

    Args:
        values: may hold NaN.
        zero: begin at zero.
        log: None = where all values are positive and the largest is 30 times the smallest.
        pieces: about how many ticks it will get.
    """
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = (min(0.0, *known) if zero else min(known)), max(known)
    if log is None:
        log = not zero and low > 0 and high / low >= _LOG_FROM
    if log and low > 0 and high > low:
        room = (high / low) ** 0.03
        return Scale(low / room, high * room, log=True)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) * 0.1 or 1.0
        low, high = (0.0 if zero else low - room), high + room
    step = _round_step(low, high, pieces)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten.

    Examples:
        >>> round_ticks(0, 600, 6)
        [0.0, 100.0, 200.0, 300.0, 400.0, 500.0, 600.0]
    """
    step = _round_step(low, high, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, min(last, first + 3 * count) + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there is room."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = last - first
    factors = (1, 2, 5) if decades <= 3 else (1,)
    every = max(1, math.ceil(decades / max(1, count)))
    found = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in found if low <= tick <= high]


def _round_step(low: float, high: float, count: int) -> float:
    """The round distance that cuts low .. high into about `count` pieces."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)


def thin(values: Sequence[float], columns: int) -> list[int]:
    """Which of many values to draw: the ends, and per column the smallest, the largest, and a break if it holds one.

    Spikes survive, which taking every n-th value would lose.

    Args:
        values: in their order.
        columns: about as many as there are pixels.

    Returns:
        Indices, ascending.
    """
    count = len(values)
    if count <= 2 * columns:
        return list(range(count))
    kept = {0, count - 1}
    for column in range(columns):
        bucket = range(column * count // columns, (column + 1) * count // columns)
        known = [at for at in bucket if math.isfinite(values[at])]
        if known:
            kept |= {min(known, key=values.__getitem__), max(known, key=values.__getitem__)}
        if len(known) < len(bucket):
            kept.add(next(at for at in bucket if not math.isfinite(values[at])))
    return sorted(kept)


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` indices of ``count``, evenly over all, both ends among them.

    Examples:
        >>> spread(10, 4), spread(3, 4)
        ([0, 3, 6, 9], [0, 1, 2])
    """
    if count <= most:
        return list(range(count))
    return [at * (count - 1) // (most - 1) for at in range(most)]
