"""The page: everything about one run in a single file that needs nothing else."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from auxin.report.bars import layer_section
from auxin.report.curves import loss_section, parameter_section
from auxin.report.figures import duration, scaled, significant, span, whole
from auxin.report.forecasts import forecast_section
from auxin.report.lineage import read_layers
from auxin.report.marks import place_marks
from auxin.report.markup import Markup, join, shorten, tag
from auxin.report.reading import Growth, ends, parameter_points, read_growths, series, step_range
from auxin.report.scale import Scale
from auxin.report.style import STYLE
from auxin.report.tables import decision_section, result_section


def write_report(
    path: str | os.PathLike,
    journal: Sequence[Mapping],
    metrics: Sequence[Mapping],
    *,
    title: str,
    sentence: str = "",
    table: Mapping | None = None,
    forecasts: Iterable[Mapping] = (),
) -> Path:
    """Writes one self-contained HTML page about a run: no network, no script, under 200 KB.

    Args:
        path: of the file; missing folders are made.
        journal: what was grown, one dict per growth, as `Journal` records it.
        metrics: one dict per measurement: step, seconds, flops (cumulative), loss, validation, parameters,
            depth. Any key may be missing; None is "not measured"; NaN and infinity become gaps.
        title: of the run.
        sentence: what the numbers support.
        table: {"caption": str, "columns": [str], "rows": [[...]]}; the first column names the row.
        forecasts: {"title": str, "history": [...], "actual": [...], "forecast": [...]}; six are shown.

    Returns:
        The path that was written.

    Example:
        >>> import tempfile
        >>> where = tempfile.mkdtemp() + "/report.html"
        >>> write_report(where, [], [{"step": 0, "loss": 2.3}], title="A first run").name
        'report.html'
    """
    page = render_report(journal, metrics, title=title, sentence=sentence, table=table, forecasts=forecasts)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8", newline="\n")
    return target


def render_report(
    journal: Sequence[Mapping],
    metrics: Sequence[Mapping],
    *,
    title: str,
    sentence: str = "",
    table: Mapping | None = None,
    forecasts: Iterable[Mapping] = (),
) -> str:
    """The page of `write_report` as text; the same run gives the same bytes."""
    growths = read_growths(journal)
    x = Scale(*step_range(metrics, growths))
    marks = place_marks(growths, x)
    title, sentence = shorten(title, 300), shorten(sentence, 2000)
    header = tag(
        "header",
        tag("h1", title),
        tag("p", sentence, class_="lead") if sentence else None,
        _key_figures(metrics, growths),
    )
    main = tag(
        "main",
        header,
        loss_section(metrics, x, marks, len(growths)),
        parameter_section(parameter_points(metrics, growths), x, marks),
        layer_section(read_layers(growths), x),
        forecast_section(forecasts),
        result_section(table),
        decision_section(growths),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", main), lang="en") + "\n"


_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser itself keeps the page off the network


def _key_figures(metrics: Sequence[Mapping], growths: Sequence[Growth]) -> Markup:
    """The run in a few numbers; those that are not known are left out."""
    depth = ends(series(metrics, "depth"))
    parameters = ends(parameter_points(metrics, growths))
    loss = ends(series(metrics, "validation"))
    pairs = [
        ("Depth", span(*depth)),
        ("Parameters", span(*parameters, show=scaled)),
        ("Growths", whole(len(growths))),
        ("Validation loss", span(*loss, show=significant)),
        ("Time", duration(ends(series(metrics, "seconds"))[1])),
        ("Compute", _operations(ends(series(metrics, "flops"))[1])),
    ]
    shown = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs if value != "–"]
    return tag("dl", join(*shown), class_="figures")


def _operations(flops: float | None) -> str:
    return "–" if flops is None else scaled(flops, "kMGTPEZ", " ") + "FLOP"
