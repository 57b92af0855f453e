"""A run on one page: what grew, when, and what it did to the loss."""

from __future__ import annotations

import html
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auxin.errors import GrowthError
from auxin.report.log import from_metrics
from auxin.report.page import render
from auxin.report.run import Run
from auxin.report.source import add_entries, read_directory, read_grower
from auxin.report.verdict import as_data

if TYPE_CHECKING:
    from auxin.grower import Grower

__all__ = ["Report"]

_HEIGHT = 900  # pixels of the frame in a notebook


@dataclass(frozen=True, eq=False)
class Report:
    """A run as one self-contained HTML page: no network, under 200 KB, light and dark; shows itself in a notebook.

    Make one with ``Report.read`` (a directory), ``Report.of`` (a Grower) or ``Report.from_metrics`` (plain data).

    Args:
        run: what is known of the run.
        title: of the page.
        sentence: what the numbers support; empty: a summary of the growths.
        table: {"caption": str, "columns": [str], "rows": [[...]]}, results to show; the first column names the row.
        forecasts: {"title": str, "history": [...], "actual": [...], "forecast": [...]}; six are shown.

    Examples:
        >>> import tempfile
        >>> report = Report.from_metrics([], [{"step": 0, "loss": 2.3}, {"step": 10, "loss": 1.9}], title="A first run")
        >>> report.write(tempfile.mkdtemp() + "/report.html").name
        'report.html'
    """

    run: Run
    title: str
    sentence: str = ""
    table: Mapping[str, Any] | None = None
    forecasts: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def read(cls, directory: str | os.PathLike[str], title: str | None = None) -> Report:
        """The run whose log (``metrics.jsonl``, ``journal.json``) or checkpoints lie in a directory.

        Args:
            directory: what ``Grower(log=...)`` or ``auxin.save`` was given.
            title: of the page; None: the directory's name.

        Raises:
            GrowthError: there is no run, or nothing of it can be read.
        """
        path = Path(directory)
        return cls(read_directory(path), title or path.resolve().name)

    @classmethod
    def of(cls, grower: Grower, title: str | None = None) -> Report:
        """The run of a ``Grower`` up to now: from its log where it writes one, else from its journal."""
        if not hasattr(grower, "journal") or not hasattr(grower, "model"):
            kind = type(grower).__name__
            raise GrowthError(f"Report.of(grower): got a {kind}. For a directory use Report.read(directory).")
        return cls(read_grower(grower), title or type(grower.model).__name__)

    @classmethod
    def from_metrics(
        cls,
        journal: Sequence[Mapping[str, Any]],
        metrics: Iterable[Mapping[str, Any]],
        *,
        title: str,
        sentence: str = "",
        table: Mapping[str, Any] | None = None,
        forecasts: Iterable[Mapping[str, Any]] = (),
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> Report:
        """A run from plain data.

        Args:
            journal: ``Journal.to_json()``.
            metrics: one dict per measurement: step, seconds, flops (cumulative), loss, validation, parameters, depth.
                Any key may be missing; None is "not measured"; NaN and infinity become gaps.
            title: of the page.
            sentence: what the numbers support.
            table: results to show.
            forecasts: to show beside what happened.
            shapes: of the final network's parameters, by name: for the widths of the layers.
        """
        run = from_metrics(metrics)
        run.shapes = dict(shapes or {})
        add_entries(run, journal)
        return cls(run, title, sentence, table, tuple(forecasts))

    def to_json(self) -> dict[str, Any]:
        """The verdict, and what was around each growth that was kept, as plain data; null is "not known"."""
        return as_data(self.run, self.title)

    def html(self) -> str:
        """The page."""
        return render(self.run, self.title, self.sentence, self.table, self.forecasts)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all; missing folders are made, a page that is there is replaced.

        Returns:
            The path that was written.

        Raises:
            GrowthError: it cannot be written there; nothing is left behind.
        """
        target, page = Path(path), self.html().encode()
        beside = target.with_name(f".{target.name[:80]}-{secrets.token_hex(4)}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                beside.write_bytes(page)
                os.replace(beside, target)
            except BaseException:
                with suppress(OSError):
                    beside.unlink()
                raise
        except OSError as error:
            raise GrowthError(
                f"Cannot write the report to '{target}': {error.strerror}. Write it somewhere else: "
                "report.write('report.html'), or auxin report RUN --out report.html."
            ) from error
        return target

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame of its own, so that neither's styles reach the other."""
        page = html.escape(self.html())
        frame = (
            f'title="{html.escape(self.title)}" sandbox="allow-scripts" style="width:100%;border:0" height="{_HEIGHT}"'
        )
        return f'<iframe {frame} srcdoc="{page}"></iframe>'

    def __repr__(self) -> str:
        run = self.run
        return f"Report({self.title!r}: {len(run.readings):,} readings, {len(run.kept)} growths)"
