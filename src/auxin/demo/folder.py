"""What the parts of the demo share: a directory for what is left behind, and one thread."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import auxin as ax
from auxin.demo.series import DemoError

SMOKE = "This was a smoke test with a fraction of the training: that it runs is all that it says. auxin demo measures."


def closing(seconds: float, out: Path) -> str:
    """The last two lines: what is where, and the page as a link."""
    page = (out / "report.html").resolve().as_uri()
    return f"{seconds:.0f} s. Checkpoint, journal, metrics and report.html are in {out}\n{page}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices are slower on several threads, and results must not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(out: Path) -> None:
    """Make an empty directory.

    Raises:
        DemoError: it is not empty, or cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise DemoError(f"{out} is not empty; choose another directory with --out.")
    except OSError as error:
        raise DemoError(f"cannot write to {out}: {error.strerror}; choose another directory with --out.") from error


def save_run(
    out: Path,
    grower: ax.Grower,
    journal: list[dict[str, Any]],
    metrics: list[dict[str, Any]],
    extra: dict[str, Any],
) -> None:
    """Checkpoint, journal and metrics of the run that was shown."""
    ax.save(grower, out / "checkpoint", extra=extra)
    (out / "journal.json").write_text(json.dumps(journal, indent=1) + "\n", encoding="utf-8")
    (out / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics), encoding="utf-8")
