"""What the demo shows while it runs: a live bar on a terminal, plain lines elsewhere."""

import sys
from typing import Any, Protocol


class Screen(Protocol):
    """Where a run is shown."""

    def line(self, text: str) -> None:
        """Something that stays."""

    def bar(self, share: float, text: str) -> None:
        """How far the present task is, 0 to 1, and in words."""

    def close(self) -> None:
        """No more bars."""


def open_screen() -> Screen:
    """A live bar where standard error is a terminal and rich is installed, else plain lines."""
    if sys.stderr.isatty():
        try:
            return LiveScreen()
        except ImportError:
            pass
    return PlainScreen()


def described(entry: dict[str, Any]) -> str:
    """Metrics in words: loss, depth, parameters, FLOPs."""
    parts = [f"loss {entry['loss']:.4f}"]
    if entry["validation"] is not None:
        parts.append(f"validation {entry['validation']:.2f} %")
    blocks = "block" if entry["depth"] == 1 else "blocks"
    parts += [f"{entry['depth']} {blocks}", f"{entry['parameters']:,} parameters", f"{entry['flops'] / 1e9:.0f} GFLOP"]
    return " · ".join(parts)


class PlainScreen:
    """Lines on standard error; a bar is one line per tenth."""

    def __init__(self) -> None:
        self._tenth = -1

    def line(self, text: str) -> None:
        """Print it."""
        print(text, file=sys.stderr, flush=True)

    def bar(self, share: float, text: str) -> None:
        """Print it where another tenth is done."""
        tenth = int(10 * share + 1e-9)
        if tenth != self._tenth:
            self._tenth = tenth
            self.line(f"{100 * share:4.0f} %  {text}")

    def close(self) -> None:
        """The next bar begins anew."""
        self._tenth = -1


class LiveScreen:
    """A bar that rich draws."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        columns = (BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f} %  {task.description}"))
        self._new = lambda: Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
        self._progress: Any = None

    def line(self, text: str) -> None:
        """Print it above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def bar(self, share: float, text: str) -> None:
        """Move the bar."""
        from rich.markup import escape

        if self._progress is None:
            self._progress = self._new()
            self._progress.start()
            self._progress.add_task("", total=1.0)
        self._progress.update(self._progress.task_ids[0], completed=share, description=escape(text))

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
