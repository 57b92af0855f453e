"""What the page needs from metrics and journal, with whatever is missing or not finite made harmless."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from auxin.report.figures import finite
from auxin.report.scale import Point


@dataclass(frozen=True)
class Added:
    """One layer that a growth brought: its path after that growth, where it was copied from, its size."""

    path: str
    source: str | None = None
    parameters: object = None


@dataclass(frozen=True)
class Growth:
    """One journal entry, read.

    Attributes:
        number: 1 for the first growth.
        step: where it lies on the page's axis.
        edit: in words, "Duplicate blocks".
        added: the layers that it brought.
        removed: paths, before the growth, of layers that it took away.
        renamed: old path to new path.
        entry: the journal's own record.
    """

    number: int
    step: float
    edit: str
    added: tuple[Added, ...] = ()
    removed: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    entry: Mapping[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What grew, as short as it can be said."""
        names = [layer.path for layer in self.added]
        if len(names) > 2:
            return f"{names[0]} and {len(names) - 1} more"
        return ", ".join(names) or self.edit


def read_growths(journal: Sequence[Mapping]) -> list[Growth]:
    """The journal's entries in their order, at their optimizer steps, or calls where no optimizer stepped."""
    unit = "optimizer_steps" if any(_count(entry, "optimizer_steps") for entry in journal) else "calls"
    growths, last = [], 0.0
    for number, entry in enumerate(journal, start=1):
        step = _count(entry, unit)
        last = last if step is None else step
        edit = _mapping(entry.get("edit"))
        name = str(edit.get("type") or "surgery").rpartition(":")[2].rpartition(".")[2]
        place = edit.get("at")
        removed = entry.get("removed") or ([place] if name == "Remove" and place else [])
        growths.append(
            Growth(
                number=number,
                step=last,
                edit=f"{name} {place}" if place else name,
                added=tuple(_added(layer) for layer in entry.get("added") or ()),
                removed=tuple(_added(layer).path for layer in removed),
                renamed={str(old): str(new) for old, new in _mapping(entry.get("renamed")).items()},
                entry=entry,
            )
        )
    return growths


def series(metrics: Sequence[Mapping], key: str) -> list[Point]:
    """The (step, value) pairs of one metric, sorted by step.

    None is "not measured" and is left out; NaN and infinity become NaN, a gap in the line. Where no entry has
    a step, the position in the list takes its place.
    """
    numbered = any(finite(metric.get("step")) is not None for metric in metrics)
    points = []
    for position, metric in enumerate(metrics):
        step = finite(metric.get("step")) if numbered else float(position)
        value = metric.get(key)
        if step is not None and value is not None:
            number = finite(value)
            points.append((step, math.nan if number is None else number))
    return sorted(points, key=lambda point: point[0])


def ends(points: Sequence[Point]) -> tuple[float | None, float | None]:
    """The first and the last finite value."""
    known = [value for _, value in points if not math.isnan(value)]
    return (known[0], known[-1]) if known else (None, None)


def parameter_points(metrics: Sequence[Mapping], growths: Sequence[Growth]) -> list[Point]:
    """Parameters over steps: as measured, and as each growth says that it left them."""
    points = [(step, value) for step, value in series(metrics, "parameters") if not math.isnan(value)]
    for growth in growths:
        counts = _mapping(growth.entry.get("parameters"))
        before, after = finite(counts.get("before")), finite(counts.get("after"))
        if before is not None and not any(step <= growth.step for step, _ in points):
            points.insert(0, (0.0, before))
        if after is not None:
            points.append((growth.step, after))
    return sorted(points, key=lambda point: point[0])


def step_range(metrics: Sequence[Mapping], growths: Sequence[Growth]) -> tuple[float, float]:
    """The steps that the page shows: from 0, unless the run began much later (a resumed one)."""
    steps = [step for step in (finite(metric.get("step")) for metric in metrics) if step is not None]
    steps = steps or [float(position) for position in range(len(metrics))]
    steps += [growth.step for growth in growths]
    low, high = min(steps, default=0.0), max(steps, default=1.0)
    low = low if low < 0 or low > 0.5 * high else 0.0
    return low, high if high > low else low + 1.0


def _count(entry: Mapping, unit: str) -> float | None:
    return finite(_mapping(entry.get("at")).get(unit))


def _added(layer: object) -> Added:
    if not isinstance(layer, Mapping):
        return Added(str(layer))
    source = layer.get("from")
    path = str(layer.get("path", "?"))
    return Added(path, None if source is None else str(source), layer.get("parameters"))


def _mapping(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}
