"""One run as the page needs it: readings in columns, growths, decisions, gradient ratios; nothing else is kept."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from auxin.report.figures import finite

AXES = ("step", "flops", "seconds")
UNKNOWN = math.nan  # not measured
BROKEN = math.inf  # measured, and not finite: a gap in the line


@dataclass(frozen=True)
class Moment:
    """A time in the run on each of the three axes; NaN where it is not known."""

    step: float = UNKNOWN
    flops: float = UNKNOWN
    seconds: float = UNKNOWN

    def on(self, axis: str) -> float:
        """Its place on an axis."""
        return getattr(self, axis)


@dataclass(frozen=True)
class Added:
    """One layer that a growth brought: its path after that growth, where it was copied from, its size."""

    path: str
    source: str | None = None
    parameters: float | None = None


@dataclass
class Growth:
    """One growth, as the journal or the log has it.

    Attributes:
        number: 1 for the first one that happened; growths that were undone count too.
        at: when.
        edit: in words, "Duplicate blocks".
        added: the layers that it brought.
        removed: paths, before the growth, of layers that it took away.
        renamed: old path to new path.
        entry: the journal's own record.
        first: index of the first reading after it.
        undone: when it was rolled back; None: it was kept.
        last: index after the last reading before it was rolled back.
        why: the reason of the way back.
    """

    number: int
    at: Moment
    edit: str
    added: tuple[Added, ...] = ()
    removed: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    entry: Mapping[str, object] = field(default_factory=dict)
    first: int = 0
    undone: Moment | None = None
    last: int = 0
    why: str = ""

    @property
    def label(self) -> str:
        """What grew, as short as it can be said."""
        names = [layer.path for layer in self.added]
        if len(names) > 2:
            return f"{names[0]} and {len(names) - 1} more"
        return ", ".join(names) or self.edit


@dataclass(frozen=True)
class Decision:
    """A trigger that fired, or a decision that had to wait; ``growth`` where it led to one.

    ``weighed`` is what a chooser has weighed, as the ledger of the run has it.
    """

    at: Moment
    reason: str
    chosen: str | None = None
    waiting: str | None = None
    growth: Growth | None = None
    weighed: Sequence[Mapping] = ()


@dataclass(frozen=True)
class Flow:
    """Gradient ratios, newborn over counterpart, of one growth's units at one step."""

    growth: Growth
    step: float
    ratios: Mapping[str, float]
    dead: tuple[str, ...] = ()


class Readings:
    """What was measured on the way, one column per quantity, so that a million readings fit.

    ``columns`` holds the axes and "parameters", ``metrics`` what was read under each name.
    """

    def __init__(self) -> None:
        self.columns: dict[str, array] = {name: array("d") for name in (*AXES, "parameters")}
        self.metrics: dict[str, array] = {}

    def __len__(self) -> int:
        return len(self.columns["step"])

    def add(self, places: Mapping[str, object], metrics: Mapping[str, object]) -> None:
        """One reading. A metric that is absent was not measured; one that is no finite number is a gap."""
        before = len(self)
        for name, column in self.columns.items():
            number = finite(places.get(name))
            column.append(UNKNOWN if number is None else number)
        for name, value in metrics.items():
            number = finite(value)
            if name not in self.metrics:
                self.metrics[name] = array("d", [UNKNOWN]) * before
            self.metrics[name].append(BROKEN if number is None else number)
        for column in self.metrics.values():
            if len(column) == before:
                column.append(UNKNOWN)

    def cut(self, length: int) -> None:
        """Forget all readings from index ``length`` on."""
        for column in (*self.columns.values(), *self.metrics.values()):
            del column[length:]

    def settle(self) -> None:
        """A metric that is mostly without a number was not measured then, rather than not finite."""
        for name, column in self.metrics.items():
            broken = sum(map(math.isinf, column))
            if broken > sum(map(math.isfinite, column)):
                self.metrics[name] = array("d", (UNKNOWN if math.isinf(value) else value for value in column))

    def moment(self, index: int) -> Moment:
        """When a reading was made."""
        return Moment(*(self.columns[axis][index] for axis in AXES))


@dataclass
class Run:
    """Everything that is known of a run.

    Attributes:
        readings: in the order in which they were made.
        growths: in the order in which they happened, undone ones too.
        decisions: likewise.
        flows: likewise.
        shapes: of the final network's tensors by name; empty where they are not known.
        end: step, FLOPs and seconds at the end, where known beyond the last reading.
        spent: FLOPs and seconds by what they were spent on.
        notes: what is missing, in sentences.
        unit: what a step is.
        given: the name of the metric that was passed to ``step`` by position.
    """

    readings: Readings = field(default_factory=Readings)
    growths: list[Growth] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    end: Moment = field(default_factory=Moment)
    spent: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unit: str = "step"
    given: str = "metric"

    @property
    def kept(self) -> list[Growth]:
        """The growths that were not undone."""
        return [growth for growth in self.growths if growth.undone is None]

    def branches(self) -> list[tuple[Growth | None, list[int]]]:
        """Indices of readings: the run itself (None), then each undone span."""
        spans = [growth for growth in self.growths if growth.undone is not None and growth.last > growth.first]
        outside = bytearray(len(self.readings))
        found: list[tuple[Growth | None, list[int]]] = []
        for growth in spans:
            found.append((growth, list(range(growth.first, growth.last))))
            outside[growth.first : growth.last] = b"\1" * (growth.last - growth.first)
        return [(None, [index for index, out in enumerate(outside) if not out]), *found]

    def parameters(self) -> list[tuple[Moment, float]]:
        """Parameters over the run, undone spans left out: as measured, and as each growth says."""
        column = self.readings.columns["parameters"]
        indices = [i for i in self.branches()[0][1] if not math.isnan(column[i])]
        turns = [i for at, i in enumerate(indices) if at == 0 or column[i] != column[indices[at - 1]]]
        points = [(self.readings.moment(i), column[i]) for i in dict.fromkeys([*turns, *indices[-1:]])]
        for growth in self.kept:
            before, after = counts(growth.entry)
            if before is not None and not any(moment.step <= growth.at.step for moment, _ in points):
                points.insert(0, (Moment(0.0, 0.0, 0.0), before))
            if after is not None:
                points.append((growth.at, after))
        return sorted(points, key=lambda point: point[0].step)


def counts(entry: Mapping) -> tuple[float | None, float | None]:
    """Parameters before and after a growth, by its journal entry."""
    known = mapping(entry.get("parameters"))
    return finite(known.get("before")), finite(known.get("after"))


def edits_of(entry: Mapping) -> list[tuple[str, Mapping]]:
    """The kind and the arguments of the edit of a journal entry; of each where several were one growth."""
    whole = mapping(entry.get("edit"))
    parts = [mapping(part) for part in plain_items(whole.get("edits"))]
    found = [(part.get("type"), mapping(part.get("v"))) for part in parts] or [(whole.get("type"), whole)]
    return [(str(kind or "surgery").rpartition(":")[2].rpartition(".")[2], edit) for kind, edit in found]


def plain_items(value: object) -> Iterable:
    """A list or tuple as the journal writes it."""
    return items(mapping(value).get("v") if isinstance(value, Mapping) else value)


def read_growth(entry: Mapping, number: int, at: Moment, first: int = 0) -> Growth:
    """A journal entry, whatever it holds."""
    edits = edits_of(entry)
    taken_out = [edit.get("at") for name, edit in edits if name == "Remove" and edit.get("at")]
    removed = items(entry.get("removed")) or taken_out
    return Growth(
        number=number,
        at=at,
        edit=", ".join(f"{name} {edit['at']}" if edit.get("at") else name for name, edit in edits),
        added=tuple(_added(layer) for layer in items(entry.get("added"))),
        removed=tuple(_added(layer).path for layer in removed),
        renamed={str(old): str(new) for old, new in mapping(entry.get("renamed")).items()},
        entry=entry,
        first=first,
    )


def read_spent(flops: object, seconds: object) -> dict[str, tuple[float, float]]:
    """A ledger, whatever it holds: FLOPs and seconds by kind."""
    times = mapping(seconds)
    return {str(kind): (finite(value) or 0.0, finite(times.get(kind)) or 0.0) for kind, value in mapping(flops).items()}


def read_weighed(decisions: object) -> list[Mapping]:
    """Decisions of a ledger, whatever they hold."""
    return [one for one in items(decisions) if isinstance(one, Mapping)]


def mapping(value: object) -> Mapping:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: object) -> Iterable:
    """The value where it is a list or tuple, else an empty one."""
    return value if isinstance(value, list | tuple) else ()


def _added(layer: object) -> Added:
    if not isinstance(layer, Mapping):
        return Added(str(layer))
    source = layer.get("from")
    path = str(layer.get("path", "?"))
    return Added(path, None if source is None else str(source), finite(layer.get("parameters")))
