"""The files that a run writes as it goes on: ``metrics.jsonl``, a line for whatever happens, and ``journal.json``.

For reports and for a person's eyes; nothing is ever resumed from them. Loggers of other packages are told as well.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from auxin.anatomy.probe import PlanContext, Probe, tensors_in
from auxin.errors import GrowthError
from auxin.flow import Flow
from auxin.journal import FORMAT
from auxin.limit import flops_per_sample
from auxin.loggers import Loggers
from auxin.run_state import Run
from auxin.trial import Rollback

try:
    import fcntl
except ImportError:  # not on this system: two runs in one directory go unnoticed
    fcntl = None

METRICS, JOURNAL = "metrics.jsonl", "journal.json"


class Logbook:
    """Writes the files of one run into a directory, and tells loggers what has grown.

    ``metrics.jsonl`` holds one JSON object a line, each with its ``kind``: "reading" for every call of ``grower.step``,
    "decision" where the trigger had fired (with what it waits for, or why it was refused; ``weighed`` as in the
    decisions of the ledger), "ledger" behind what was weighed: FLOPs and seconds by kind, "growth", "undone" with the
    reason, "flow" for the gradients of new blocks (see ``auxin.flow``), "resumed". Numbers that are not finite are
    null. ``journal.json`` is that of a checkpoint, and the shapes of the parameters.

    A line is written at once and whole. A run that was resumed by ``load`` goes on in the same files, where its seconds
    and FLOPs go on counting; what a crash has cut short there is closed, and readers skip it. Any other run begins
    files of its own: those that are there are renamed to ``metrics-1.jsonl``, ``journal-1.json``. A full disk or a lost
    permission does not stop the training: it brings one warning, and lines will be missing.

    Args:
        to: a directory, which is made if it is not there; a logger of another package, see ``auxin.loggers``; or a list
            of a directory and loggers. None: nothing is written.
        batch: samples in one optimizer step, for the estimate of training FLOPs (a step is taken for three forwards);
            None: as many as the Grower's probe holds. Without a probe, or where it is a callable, they stay null.

    Raises:
        GrowthError: neither a directory nor a logger, or a directory that cannot be used or into which a run that is
            going on writes.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> logbook = Logbook(folder.name)
        >>> logbook.flow(Flow(0, 7, {"blocks.2": 0.8}))
        >>> print(Path(folder.name, "metrics.jsonl").read_text().strip())
        {"kind": "flow", "growth": 0, "step": 7, "ratios": {"blocks.2": 0.8}, "dead": []}
    """

    def __init__(self, to: Any, batch: int | None = None):
        given = list(to) if isinstance(to, (list, tuple)) else [] if to is None else [to]
        directories = [one for one in given if isinstance(one, (str, os.PathLike))]
        if len(directories) > 1:
            raise GrowthError(f"log={given!r}: a run writes its log into one directory.")
        self.loggers = Loggers([one for one in given if not isinstance(one, (str, os.PathLike))])
        if batch is not None and (type(batch) is not int or batch < 1):
            raise GrowthError(f"Logbook(batch={batch!r}): the samples in one optimizer step, a whole number from 1.")
        self.directory = Path(directories[0]) if directories else None
        self.batch = batch
        self.name: str | None = None  # of the metric that ``step`` is given by position, where a host knows it
        self.rollback: Rollback | None = None  # of the Grower: nothing is written in a branch of the run
        self.resuming: tuple[int, int] | None = None  # (calls, optimizer steps) to which a load has set the run
        self._began = time.monotonic()
        self._flops, self._steps = 0.0, 0
        self._per_step: float | None = None  # FLOPs of the network as it is now; None: to be counted
        self._warned = False
        self._files = [] if self.directory is None else [_locked(self.directory)]
        self._end = weakref.finalize(self, _close, self._files, os.getpid())

    def reading(self, run: Run, metric: float | None, metrics: Mapping[str, float]) -> None:
        """One call of ``grower.step``; ``run`` is the Grower."""
        if self._ready():
            self._count(run, run.optimizer_steps)
            named = {name: _finite(value) for name, value in metrics.items()}
            measured = {"flops": _finite(self._flops), "parameters": _size(run.model)}
            said = {} if self.name is None else {"name": self.name}
            told = {**measured, "metric": _finite(metric), **said, "metrics": named}
            self._write({"kind": "reading", **self._now(run), **told})
            self._tell(run)

    def decision(self, run: Run, chosen: Any, waiting: str | None = None, weighed: int | None = None) -> None:
        """The trigger has fired: what was chosen (None: nothing), why it waits, or why it was refused.

        ``weighed``: number of the first decision of the ledger that belongs to it.
        """
        if self._ready():
            told = {"fired": True, "chosen": None if chosen is None else repr(chosen), "waiting": waiting}
            new = [] if weighed is None else run.ledger.state_dict()["decisions"][weighed:]
            told |= {"weighed": _without_nan(new)} if new else {}
            self._write({"kind": "decision", **self._now(run), **told, "reason": repr(run.when)})
            if new:
                self.spent(run)
            for one in new:
                self.loggers.weighed(one, run.optimizer_steps)

    def spent(self, run: Run) -> None:
        """What was spent so far, by kind."""
        if self._ready():
            told = {"flops_by_kind": dict(run.ledger.flops), "seconds_by_kind": dict(run.ledger.seconds)}
            self._write({"kind": "ledger", **self._now(run), **told})

    def growth(self, run: Run, change: Any) -> None:
        """A growth, the last of the journal."""
        if self._ready():
            entry = run.journal.to_json()[-1]
            measured = {
                "max_difference": _finite(change.max_difference),
                "gradient_ratio": _finite(change.gradient_ratio),
                "gradient_ratios": {path: _finite(value) for path, value in change.gradient_ratios.items()},
                "parameters": _size(run.model),
            }
            line = {"kind": "growth", "number": entry["id"], **self._now(run), "entry": entry, "line": str(change)}
            self._write({**line, **measured})
            self._count(run, run.optimizer_steps, anew=True)
            self._write_journal(run)
            self._tell(run)
            self.loggers.text("auxin/growth", str(change), run.optimizer_steps)

    def undone(self, run: Run, why: str, call: int, step: int) -> None:
        """The growth behind the journal's last was taken back at that call and optimizer step."""
        if self._ready():
            line = {"kind": "undone", "number": len(run.journal), **self._now(run), "call": call, "step": step}
            self._write({**line, "why": why})
            self._count(run, step, anew=True)
            self._steps = run.optimizer_steps
            self._write_journal(run)
            self._tell(run)
            self.loggers.text("auxin/undone", f"growth {len(run.journal) + 1}: {why}", run.optimizer_steps)

    def flow(self, flow: Flow) -> None:
        """Gradients of new blocks at one optimizer step."""
        if self._ready():
            ratios = {path: _finite(value) for path, value in flow.ratios.items()}
            line = {"kind": "flow", "growth": flow.growth, "step": flow.step, "ratios": ratios}
            self._write({**line, "dead": list(flow.dead)})

    def close(self) -> None:
        """Write nothing more, and let another run have the directory."""
        self.directory, self.loggers = None, Loggers([])
        self._end()

    def _now(self, run: Run) -> dict[str, Any]:
        return {"call": run.calls, "step": run.optimizer_steps, "seconds": self._seconds()}

    def _tell(self, run: Run) -> None:
        self.loggers.reading(run.optimizer_steps, len(run.journal), _size(run.model), self._flops)

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def _count(self, run: Run, step: int, anew: bool = False) -> None:
        """Add the FLOPs of the optimizer steps up to ``step``; ``anew``: from here on the network is another one."""
        if self._per_step is None:
            self._per_step = _training_flops(run.model, run.probe, self.batch)
        self._flops += self._per_step * max(0, step - self._steps)
        self._steps = step
        self._per_step = None if anew else self._per_step

    def _ready(self) -> bool:
        """Whether there is anything to write to; opens a file, and says first that the run was resumed."""
        if not (self.directory or self.loggers) or (self.rollback is not None and self.rollback.in_branch):
            return False
        if self.directory is None:
            if self.resuming is not None:
                self._steps, self._flops, self.resuming = self.resuming[1], math.nan, None  # nobody knows them
            return True
        try:
            if len(self._files) == 1:
                self._open(self.directory)
            resuming, self.resuming = self.resuming, None
            if resuming is not None:
                self._go_on(self.directory, *resuming)
        except OSError as error:
            self._fail(error)
            return False
        return True

    def _open(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if self.resuming is None:
            _set_aside(directory)
        file = os.open(directory / METRICS, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o666)
        self._files.append(file)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")

    def _go_on(self, directory: Path, call: int, step: int) -> None:
        """Take up seconds and FLOPs where the log stood at ``call``."""
        for line in reversed((directory / METRICS).read_bytes().splitlines()):
            found = _parsed(line)
            if found.get("kind") == "reading" and found.get("call", call + 1) <= call:
                self._began = time.monotonic() - (found.get("seconds") or 0.0)
                self._flops = math.nan if found.get("flops") is None else found["flops"]
                break
        self._steps, self._per_step = step, None
        self._write({"kind": "resumed", "call": call, "step": step, "seconds": self._seconds()})

    def _write(self, line: Mapping[str, Any]) -> None:
        """Append one line; where that fails nothing of it stays."""
        if self.directory is None:
            return
        data, file = f"{json.dumps(line, allow_nan=False)}\n".encode(), self._files[1]
        size = None
        try:
            size = os.fstat(file).st_size
            while data:
                data = data[os.write(file, data) :]
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, size)
            self._fail(error)

    def _write_journal(self, run: Run) -> None:
        if self.directory is None:
            return
        shapes = {name: list(parameter.shape) for name, parameter in run.model.named_parameters()}
        text = {"format": FORMAT, "entries": run.journal.to_json(), "shapes": shapes}  # for the widths of a report
        new = self.directory / f"{JOURNAL}.new"
        try:
            new.write_text(json.dumps(text, allow_nan=False, indent=1))
            os.replace(new, self.directory / JOURNAL)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the log in {self.directory} cannot be written ({error}). Training goes on; what cannot be written "
                "will be missing there.",
                stacklevel=4,
            )


def _locked(directory: Path) -> int:
    """Make the directory and hold it until the file that is returned is closed.

    Raises:
        GrowthError: that cannot be done, or somebody else holds it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = os.open(directory, os.O_RDONLY)
        if not os.access(directory, os.W_OK | os.X_OK):
            os.close(held)
            raise PermissionError("no permission to write there")
    except OSError as error:
        raise GrowthError(f"log={str(directory)!r}: this directory cannot be written to ({error}).") from error
    try:
        if fcntl is not None:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise GrowthError(
            f"log={str(directory)!r}: another run is writing its log into this directory. Give each run one of its "
            "own, or call grower.log.close() on the Grower that holds it."
        ) from None
    except OSError:  # a file system without locks
        pass
    return held


def _close(files: list[int], owner: int) -> None:
    """Close what is open; a process that was forked leaves the lock to its parent."""
    if fcntl is not None and files and os.getpid() == owner:
        with contextlib.suppress(OSError):
            fcntl.flock(files[0], fcntl.LOCK_UN)
    while files:
        with contextlib.suppress(OSError):
            os.close(files.pop())


def _set_aside(directory: Path) -> None:
    """Rename the files of an earlier run."""
    if not any((directory / name).exists() for name in (METRICS, JOURNAL)):
        return
    names = [name.split(".") for name in (METRICS, JOURNAL)]
    number = 1
    while any((directory / f"{stem}-{number}.{kind}").exists() for stem, kind in names):
        number += 1
    for stem, kind in names:
        with contextlib.suppress(FileNotFoundError):
            os.rename(directory / f"{stem}.{kind}", directory / f"{stem}-{number}.{kind}")


def _parsed(line: bytes) -> dict[str, Any]:
    """One line of a log; empty where it is cut or something else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _training_flops(model: nn.Module, probe: Probe, batch: int | None) -> float:
    """Of one optimizer step, forward and backward; not a number where the probe does not tell."""
    if probe is None or (callable(probe) and not isinstance(probe, Tensor)):
        return math.nan  # a callable may draw from the data, which a log must not
    try:
        samples = next((t.shape[0] for t in tensors_in(PlanContext(model, probe).batch) if t.dim()), 1)
        return 3.0 * flops_per_sample(model, probe) * (samples if batch is None else batch)
    except Exception:  # whatever a user's forward raises: training will say it
        return math.nan


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _without_nan(value: Any) -> Any:
    """Plain data, with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
