"""Where a run is found: a directory with its log, a directory of checkpoints, or a Grower that is at hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auxin.errors import GrowthError
from auxin.report.figures import finite
from auxin.report.log import read_log
from auxin.report.run import Decision, Moment, Run, items, mapping, read_growth, read_spent, read_weighed

if TYPE_CHECKING:
    from auxin.grower import Grower

_CHECKPOINT = re.compile(r"checkpoint-(\d{6,18})")
_LARGEST = 1 << 28  # bytes of a JSON file

Shapes = dict[str, tuple[int, ...]]


def read_directory(path: Path) -> Run:
    """The run whose files lie in a directory.

    Raises:
        GrowthError: there is no run, or nothing of it can be read.
    """
    if not path.is_dir():
        what = "is a file, not the directory of a run" if path.exists() else "does not exist"
        raise GrowthError(f"'{path}' {what}. {_HELP}")
    checkpoint = _newest_checkpoint(path)
    log, journal = path / "metrics.jsonl", path / "journal.json"
    if not journal.exists() and checkpoint is not None:
        journal = checkpoint / "journal.json"
    if not log.exists() and not journal.exists():
        raise GrowthError(f"'{path}' holds neither metrics.jsonl, journal.json nor a checkpoint. {_HELP}")
    run, problems = Run(), []
    try:
        if log.exists():
            run = read_log(log)
        else:
            run.notes.append("There is no metrics.jsonl: what was measured on the way is not known.")
    except OSError as error:
        problems.append(f"metrics.jsonl cannot be read: {error.strerror}.")
    entries, run.shapes, problem = _journal(journal)
    if problem and (entries is not None or journal.exists() or run.growths or not len(run.readings)):
        problems.append(problem)
    if entries is None and not len(run.readings) and not run.growths:
        said = " ".join([*problems, *run.notes])
        raise GrowthError(f"Nothing of the run in '{path}' can be read. {said}")
    run.notes[:0] = problems
    if checkpoint is not None:
        _add_checkpoint(run, checkpoint)
    add_entries(run, entries or [])
    return run


_HELP = "Give the directory that Grower(log=...) wrote, or that ax.save was given: auxin report run"


def read_grower(grower: Grower) -> Run:
    """The run of a Grower, from its log where it writes one, and its network as it is now."""
    place = grower.log.directory
    run = Run() if place is None or not (Path(place) / "metrics.jsonl").exists() else read_directory(Path(place))
    if not len(run.readings) and not run.growths:
        _add_undone(run, grower.undone)
        run.end = Moment(float(grower.optimizer_steps or grower.calls))
        run.unit = "step" if grower.optimizer_steps else "call"
        run.notes.append("This run keeps no log: what was measured on the way is not known.")
    add_entries(run, grower.journal.to_json())
    _add_ledger(run, grower.ledger.state_dict())
    run.shapes = {name: tuple(tensor.shape) for name, tensor in grower.model.named_parameters()}
    return run


def add_entries(run: Run, entries: Sequence[Mapping]) -> None:
    """Growths of the journal that the log does not have; and a word where both disagree."""
    kept = run.kept
    if len(entries) > len(kept):
        known = {growth.entry.get("fingerprint") for growth in kept} - {None}
        unit = "optimizer_steps" if any(_count(e, "optimizer_steps") for e in entries) else "calls"
        missing = [e for e in entries if e.get("fingerprint") not in known] if known else entries[len(kept) :]
        if kept or len(run.readings) and run.growths:
            run.notes.append(f"{len(missing)} of {len(entries)} growths are in journal.json, but not in metrics.jsonl.")
        last = 0.0
        for entry in missing:
            step = _count(entry, unit)
            last = last if step is None else step
            run.growths.append(read_growth(entry, 0, _place(run, last), _reached(run, last)))
        run.unit = "step" if unit == "optimizer_steps" or len(run.readings) else "call"
        _renumber(run)
    elif entries and len(entries) < len(kept):
        run.notes.append(f"metrics.jsonl tells of {len(kept)} growths, journal.json of {len(entries)}.")


def _add_undone(run: Run, undone: Iterable[Mapping]) -> None:
    """Growths that were rolled back, of a run without a log."""
    for entry in undone:
        growth = read_growth(entry, 0, Moment(_count(entry, "optimizer_steps") or _count(entry, "calls") or 0.0))
        growth.undone, growth.why = growth.at, "probation"
        run.growths.append(growth)
    _renumber(run)


def _add_ledger(run: Run, ledger: Mapping) -> None:
    """What was spent, and the decisions that the log does not have."""
    run.spent = read_spent(ledger.get("flops"), ledger.get("seconds"))
    known = sum(len(decision.weighed) for decision in run.decisions)
    for one in read_weighed(ledger.get("decisions"))[known:]:
        at = Moment(finite(one.get("step")) or 0.0)
        run.decisions.append(Decision(at, "", None, None, None, [one]))


def _renumber(run: Run) -> None:
    """In the order of their steps."""
    run.growths.sort(key=lambda growth: growth.at.step)
    for number, growth in enumerate(run.growths, start=1):
        growth.number = number


def _place(run: Run, step: float) -> Moment:
    """A step on the other axes too: those of the last reading before it."""
    count = _reached(run, step)
    moment = run.readings.moment(count - 1) if count else Moment()
    return Moment(step, moment.flops, moment.seconds)


def _reached(run: Run, step: float) -> int:
    """How many readings there are up to a step."""
    return max((at for at, value in enumerate(run.readings.columns["step"], start=1) if value <= step), default=0)


def _journal(path: Path) -> tuple[list[Mapping] | None, Shapes, str]:
    """The entries, the shapes of the parameters after the last one, and what is wrong with the file."""
    if not path.exists():
        return None, {}, "There is no journal.json."
    data, problem = _json(path)
    entries = data.get("entries") if isinstance(data, Mapping) else data
    if problem or not isinstance(entries, list):
        return None, {}, problem or "journal.json is not a journal."
    good = [entry for entry in entries if isinstance(entry, Mapping)]
    wrong = len(entries) - len(good)
    problem = f"{wrong} entries of journal.json are not growths and were left out." if wrong else ""
    return good, _checked(mapping(mapping(data).get("shapes"))), problem


def _json(path: Path) -> tuple[Any, str]:
    """The content of a JSON file, and what is wrong with it."""
    try:
        if path.stat().st_size > _LARGEST:
            return None, f"{path.name} is larger than any that was written."
        return json.loads(path.read_bytes()), ""
    except OSError as error:
        return None, f"{path.name} cannot be read: {error.strerror}."
    except (ValueError, RecursionError):
        return None, f"{path.name} is damaged or cut off: it is not JSON."


def _newest_checkpoint(path: Path) -> Path | None:
    """The newest ``checkpoint-...`` in a directory or in one directly below it, or the directory itself."""
    if _CHECKPOINT.fullmatch(path.name) and (path / "run.json").exists():
        return path
    try:
        inside = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
        found = [child for place in inside for child in place.iterdir() if _CHECKPOINT.fullmatch(child.name)]
    except OSError:
        return None
    whole = [place for place in found if (place / "journal.json").exists()]
    return max(whole, key=lambda place: int(place.name.rpartition("-")[2]), default=None)


def _add_checkpoint(run: Run, checkpoint: Path) -> None:
    """What a checkpoint knows: the shapes of the tensors, and where the run stood."""
    run.shapes = run.shapes or _shapes(checkpoint / "model.safetensors")
    data, _ = _json(checkpoint / "run.json") if (checkpoint / "run.json").exists() else (None, "")
    state = mapping(mapping(data).get("grower"))
    steps, calls = finite(state.get("optimizer_steps")), finite(state.get("calls"))
    if not run.spent:
        _add_ledger(run, mapping(state.get("ledger")))
    if not len(run.readings) and not run.growths:
        run.end = Moment(steps or calls or math.nan)
        _add_undone(run, [entry for entry in items(state.get("undone")) if isinstance(entry, Mapping)])


def _shapes(path: Path) -> Shapes:
    """Names and shapes from the head of a safetensors file; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(length)) if length <= _LARGEST else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return _checked({name: mapping(tensor).get("shape") for name, tensor in mapping(head).items()})


def _checked(shapes: Mapping) -> Shapes:
    """Those that are shapes."""
    found = {}
    for name, shape in shapes.items():
        if isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape):
            found[str(name)] = tuple(shape)
    return found


def _count(entry: Mapping, unit: str) -> float | None:
    return finite(mapping(entry.get("at")).get(unit))
