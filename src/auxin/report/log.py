"""Reading ``metrics.jsonl``: one JSON object a line, in the order in which things happened."""

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from auxin.report.figures import finite
from auxin.report.run import (
    Decision,
    Flow,
    Growth,
    Moment,
    Run,
    items,
    mapping,
    read_growth,
    read_spent,
    read_weighed,
)

_LONGEST = 1 << 22  # bytes of a line; longer ones are junk
_PLACES = frozenset({"kind", "call", "step", "seconds", "flops", "parameters", "metric", "metrics"})
_PLAIN = ("loss", "validation")  # metrics of lines without a kind, as the demo writes them


def read_log(path: Path) -> Run:
    """A run as its log tells it; lines that cannot be read are counted in ``notes``.

    Raises:
        OSError: the file cannot be read.
    """
    history = _History()
    wrong: list[int] = []
    number, cut = 0, False
    for number, text in enumerate(_lines(path), start=1):
        line = _parsed(text)
        if line is None:
            wrong.append(number)
            cut = not text.endswith(b"\n")
        else:
            history.take(line)
    history.close(wrong, number, cut)
    return history.run


def from_metrics(lines: Iterable[Mapping]) -> Run:
    """A run from plain readings: step, seconds, flops, parameters, depth, loss, validation; None is "not measured"."""
    history = _History()
    for line in lines:
        history.take(line)
    return history.run


def _lines(path: Path) -> Iterator[bytes]:
    """The lines that are not blank."""
    with open(path, "rb") as file:
        while line := file.readline(_LONGEST):
            if line.strip():
                yield line


def _parsed(text: bytes) -> Mapping | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # ValueError: no JSON, or no UTF-8
        return None
    return line if isinstance(line, Mapping) else None


class _History:
    """What the lines so far have said. A resumed run repeats lines; the later ones hold."""

    def __init__(self) -> None:
        self.run = Run()
        self.calls = array("d")  # of the readings
        self.growths: dict[int, tuple[float, object]] = {}  # by our number: (call, number in the log)
        self.decided: list[float] = []  # calls of the decisions
        self.resumed = False
        self.repeated = 0
        self.unknown = 0

    def take(self, line: Mapping) -> None:
        """One line."""
        kind = line.get("kind")
        call = finite(line.get("call"))
        if self.resumed and call is not None and kind != "resumed":
            self._forget(call)
        if kind == "reading":
            self._reading(line, call)
        elif kind == "growth":
            self._growth(line, call)
        elif kind == "undone":
            self._undone(line)
        elif kind == "flow":
            self._flow(line)
        elif kind == "decision":
            self._decision(line, call)
        elif kind == "ledger":
            self.run.spent = read_spent(line.get("flops_by_kind"), line.get("seconds_by_kind"))
        elif kind == "resumed":
            self.resumed = True
        elif kind is None:
            self._plain(line)
        else:
            self.unknown += 1

    def close(self, wrong: list[int], total: int, cut: bool) -> None:
        """Say what could not be used."""
        self.run.readings.settle()
        notes = self.run.notes
        if cut and wrong[-1] == total:
            wrong.pop()
            notes.append("The last line of metrics.jsonl is cut off and was left out.")
        if wrong:
            count = "1 line" if len(wrong) == 1 else f"{len(wrong):,} lines"
            notes.append(f"{count} of {total:,} in metrics.jsonl could not be read, the first is line {wrong[0]:,}.")
        if self.unknown:
            notes.append(f"{self.unknown:,} lines of metrics.jsonl are of a kind that this version does not know.")
        if self.repeated:
            notes.append(f"{self.repeated:,} readings were made again after a resume; the later ones are shown.")

    def _reading(self, line: Mapping, call: float | None) -> None:
        metrics = {str(name): value for name, value in mapping(line.get("metrics")).items()}
        if "metric" in line:
            self.run.given = str(line.get("name") or self.run.given)
            metrics = {self.run.given: line["metric"], **metrics}
        self.calls.append(float("nan") if call is None else call)
        self.run.readings.add(line, metrics)

    def _plain(self, line: Mapping) -> None:
        """A line without a kind; where it has no step either, its position takes the place."""
        metrics = {name: line[name] for name in (*_PLAIN, "depth") if line.get(name) is not None}
        places = dict(line)
        if line.get("step") is None:
            places["step"] = len(self.run.readings)
        self.calls.append(float("nan"))
        self.run.readings.add(places, metrics)

    def _moment(self, line: Mapping) -> Moment:
        """When a line was written; what it does not say is that of the reading before it."""
        readings = self.run.readings
        last = readings.moment(len(readings) - 1) if len(readings) else Moment()
        said = {axis: finite(line.get(axis)) for axis in ("step", "flops", "seconds")}
        return Moment(*(last.on(axis) if value is None else value for axis, value in said.items()))

    def _growth(self, line: Mapping, call: float | None) -> None:
        growths = self.run.growths
        entry = {**mapping(line.get("entry"))}
        for key in ("max_difference", "gradient_ratio"):
            entry.setdefault(key, line.get(key))
        entry.setdefault("summary", line.get("line"))
        growth = read_growth(entry, len(growths) + 1, self._moment(line), len(self.run.readings))
        growths.append(growth)
        self.growths[growth.number] = (float("nan") if call is None else call, line.get("number"))
        for at in range(len(self.run.decisions) - 1, -1, -1):
            decision = self.run.decisions[at]
            if decision.growth is None and decision.chosen and self.decided[at] == call:
                self.run.decisions[at] = replace(decision, at=growth.at, waiting=None, growth=growth)
                return
        self.run.decisions.append(Decision(growth.at, "", None, None, growth))
        self.decided.append(float("nan") if call is None else call)

    def _undone(self, line: Mapping) -> None:
        growth = self._named(line.get("number"), kept=True)
        if growth is None:
            self.unknown += 1
            return
        moment = self._moment(line)
        for later in self.run.growths[growth.number - 1 :]:
            if later.undone is None:
                later.undone, later.last, later.why = moment, len(self.run.readings), str(line.get("why") or "")

    def _flow(self, line: Mapping) -> None:
        growth, step = self._named(line.get("growth")), finite(line.get("step"))
        known = {str(name): finite(value) for name, value in mapping(line.get("ratios")).items()}
        if growth is None or step is None:
            self.unknown += 1
            return
        ratios = {name: value for name, value in known.items() if value is not None}
        self.run.flows.append(Flow(growth, step, ratios, tuple(str(name) for name in items(line.get("dead")))))

    def _decision(self, line: Mapping, call: float | None) -> None:
        reason, chosen, waiting = (str(line.get(key) or "") for key in ("reason", "chosen", "waiting"))
        weighed = line.get("weighed")
        if not line.get("fired") and not waiting:
            return
        decision = Decision(self._moment(line), reason, chosen or None, waiting or None, None, read_weighed(weighed))
        last = self.run.decisions[-1] if self.run.decisions and self.decided[-1] == call else None
        if weighed and last is not None and last.growth is not None and not last.reason:
            self.run.decisions[-1] = replace(decision, at=last.at, growth=last.growth)  # a race has grown already
            return
        self.run.decisions.append(decision)
        self.decided.append(float("nan") if call is None else call)

    def _named(self, number: object, kept: bool = False) -> Growth | None:
        """The latest growth that the log gave this number."""
        for growth in reversed(self.run.growths):
            if self.growths[growth.number][1] == number and not (kept and growth.undone):
                return growth
        return None

    def _forget(self, call: float) -> None:
        """Drop what the resumed run does again: everything from this call on that was not undone."""
        self.resumed = False
        run = self.run
        length = len(run.readings)
        spans = [(growth.first, growth.last) for growth in run.growths if growth.undone is not None]
        while length and not (
            self.calls[length - 1] < call and not any(first < length <= last for first, last in spans)
        ):
            length -= 1
        self.repeated += len(run.readings) - length
        run.readings.cut(length)
        del self.calls[length:]
        known = [self.growths[growth.number][0] for growth in run.growths]
        stays = [g.first <= length and not born >= call for g, born in zip(run.growths, known, strict=True)]
        del run.growths[([*stays, False]).index(False) :]
        for growth in run.growths:
            growth.last = min(growth.last, length)
        numbers = {growth.number for growth in run.growths}
        self.growths = {number: known for number, known in self.growths.items() if number in numbers}
        kept = [at for at, known in enumerate(self.decided) if not known >= call]
        run.decisions[:] = [run.decisions[at] for at in kept]
        self.decided = [self.decided[at] for at in kept]
        last = run.readings.moment(length - 1).step if length else 0.0
        run.flows[:] = [flow for flow in run.flows if flow.growth.number in numbers and not flow.step > last]
