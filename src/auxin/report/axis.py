"""The horizontal axes of a run: steps, training FLOPs, seconds."""

import math
from dataclasses import dataclass

from auxin.report.figures import scaled, whole
from auxin.report.run import AXES, Moment, Run
from auxin.report.scale import Scale, round_ticks

NAMES = {"step": "Steps", "flops": "FLOPs", "seconds": "Time"}


@dataclass(frozen=True)
class Axis:
    """One of them, over the whole run.

    Attributes:
        key: "step", "flops" or "seconds".
        scale: from the run's begin to its end.
        unit: one of the axis's numbers is this many FLOPs or seconds.
        suffix: the unit's name.
    """

    key: str
    scale: Scale
    unit: float = 1.0
    suffix: str = ""

    @property
    def name(self) -> str:
        """What is measured along it, in a sentence."""
        return {"step": "steps", "flops": "training FLOPs", "seconds": "time"}[self.key]

    def at(self, moment: Moment) -> float:
        """Where a moment lies, 0 .. 1; NaN where it is not known."""
        value = moment.on(self.key)
        return value if math.isnan(value) else self.scale.at(value)

    def ticks(self) -> list[tuple[float, str]]:
        """(place, text) of about eight round numbers; the first one says the unit."""
        low, high = self.scale.low / self.unit, self.scale.high / self.unit
        values = round_ticks(low, high, 8)
        if self.key == "step":
            values = [value for value in values if value.is_integer()]
        texts = [self._text(value, high) for value in values]
        if texts:
            texts[0] = f"{self.suffix} {texts[0]}" if self.key == "step" else f"{texts[0]} {self.suffix}"
        return [(self.scale.at(value * self.unit), text) for value, text in zip(values, texts, strict=True)]

    def _text(self, value: float, high: float) -> str:
        if high >= 100_000:
            return scaled(value)
        return whole(value) if value.is_integer() else f"{value:g}"


def axes_of(run: Run) -> list[Axis]:
    """The axes on which this run can be shown: steps always, the others where they were measured."""
    found = []
    for key in AXES:
        values = [value for value in run.readings.columns[key] if not math.isnan(value)]
        values += [growth.at.on(key) for growth in run.growths] + [run.end.on(key)]
        values += [growth.undone.on(key) for growth in run.growths if growth.undone is not None]
        values = [value for value in values if not math.isnan(value)]
        if key == "step" or (len(run.readings) > 1 and len(set(values)) > 1):
            found.append(_axis(key, values, run.unit))
    return found


def _axis(key: str, values: list[float], unit: str) -> Axis:
    """From 0, unless the run began much later."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = low if low < 0 or low > 0.5 * high else 0.0
    scale = Scale(low, high if high > low else low + max(1.0, abs(low)))
    if key == "step":
        return Axis(key, scale, suffix=unit)
    if key == "seconds":
        size, suffix = next(
            pair for pair in ((3600, "h"), (60, "min"), (1, "s")) if high >= 2 * pair[0] or pair[0] == 1
        )
        return Axis(key, scale, size, suffix)
    power = max(0, min(7, math.floor(math.log10(max(high, 1)) / 3)))
    return Axis(key, scale, 1000.0**power, ["", "k", "M", "G", "T", "P", "E", "Z"][power] + "FLOP")
