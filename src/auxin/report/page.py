"""The page: everything about one run in a single file that needs nothing else."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from auxin.report.axis import axes_of
from auxin.report.bars import layer_section
from auxin.report.curves import ends, main_metric, metric_sections, said_of
from auxin.report.figure import axis_switch
from auxin.report.figures import duration, scaled, significant, span, whole
from auxin.report.forecasts import forecast_section
from auxin.report.gradients import gradient_section
from auxin.report.levels import parameter_section
from auxin.report.lineage import read_layers
from auxin.report.markup import Markup, join, shorten, tag
from auxin.report.run import Run
from auxin.report.script import FINGERPRINT, SCRIPT
from auxin.report.style import STYLE
from auxin.report.tables import decision_section, result_section, weighed_section
from auxin.report.verdict import growth_section, verdict

LIMIT = 200_000  # bytes


@dataclass(frozen=True)
class Detail:
    """How much a page holds: columns of a drawing, bars, marks on an axis, bytes of a table."""

    columns: int
    bars: int
    marks: int
    rows: int


_DETAILS = (
    Detail(240, 48, 60, 24_000),
    Detail(120, 32, 40, 12_000),
    Detail(50, 16, 20, 6_000),
    Detail(20, 8, 10, 2_000),
)


def render(
    run: Run,
    title: str,
    sentence: str = "",
    table: Mapping | None = None,
    forecasts: Iterable[Mapping] = (),
) -> str:
    """The page as text, below ``LIMIT`` bytes; the same run gives the same bytes.

    Args:
        run: to show.
        title: of the page.
        sentence: what the numbers support.
        table: {"caption": str, "columns": [str], "rows": [[...]]}; the first column names the row.
        forecasts: {"title": str, "history": [...], "actual": [...], "forecast": [...]}; six are shown.
    """
    forecasts = list(forecasts)
    page = ""
    for detail in _DETAILS:
        page = _page(run, shorten(title, 300), shorten(sentence, 2000), _more(forecasts, table, detail), detail)
        if len(page.encode()) < LIMIT:
            break
    return page


def _more(forecasts: Sequence[Mapping], table: Mapping | None, detail: Detail) -> Markup:
    return join(forecast_section(forecasts), result_section(table, detail.rows))


def _page(run: Run, title: str, sentence: str, more: Markup, detail: Detail) -> str:
    axes = axes_of(run)
    main = tag(
        "main",
        tag(
            "header",
            tag("h1", title),
            tag("p", sentence or _summary(run), class_="lead"),
            _notes(run),
            _key_figures(run),
        ),
        axis_switch(axes),
        metric_sections(run, axes, detail.columns, detail.marks),
        growth_section(run),
        layer_section(read_layers(run.growths, run.shapes), axes, detail.bars),
        parameter_section(run, axes, detail.columns // 2, detail.marks),
        gradient_section(run, axes, detail.columns),
        more,
        decision_section(run, detail.rows),
        weighed_section(run, detail.rows),
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
    body = tag("body", main, tag("script", Markup(SCRIPT)))
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"


# The browser itself keeps the page off the network, and runs no script but ours.
_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{FINGERPRINT}'"


def _summary(run: Run) -> str:
    """The run in a few sentences, for those who give none: whether growing has helped, and what has grown."""
    judged = verdict(run)
    grown, undone = len(run.kept), len(run.growths) - len(run.kept)
    if not run.growths:
        return judged or "Nothing has grown in this run."
    said = f"{grown:,} growth{'' if grown == 1 else 's'}"
    said += f", and {undone:,} that {'was' if undone == 1 else 'were'} undone" if undone else ""
    places = [p[1] for p in run.parameters()]
    if places and places[0] != places[-1]:
        said += f": from {places[0]:,.0f} to {places[-1]:,.0f} parameters"
    return f"{judged} {said}.".lstrip()


def _notes(run: Run) -> Markup | None:
    """What is missing."""
    if not run.notes:
        return None
    return tag("ul", *(tag("li", shorten(text, 300)) for text in run.notes[:8]), class_="notes", aria_label="Missing")


def _key_figures(run: Run) -> Markup:
    """The run in a few numbers; those that are not known are left out."""
    columns = run.readings.columns
    live = run.branches()[0][1]
    parameters = [value for _, value in run.parameters()]
    depth = ends(run.readings.metrics.get("depth", ()))
    main = main_metric(run)
    loss = ends([run.readings.metrics[main][at] for at in live]) if main else (None, None)
    name = said_of(main or "")
    spent = sum(flops for flops, _ in run.spent.values())  # races and evaluations too, which no reading counts
    pairs = [
        ("Depth", span(*depth)),
        ("Parameters", span(*((parameters[0], parameters[-1]) if parameters else (None, None)), show=scaled)),
        ("Growths", whole(len(run.kept))),
        ("Undone", whole(len(run.growths) - len(run.kept)) if len(run.growths) > len(run.kept) else "–"),
        (name[:1].upper() + name[1:], span(*loss, show=significant)),
        (f"{run.unit.capitalize()}s", _last(columns["step"], run.end.step, whole)),
        ("Time", _last(columns["seconds"], run.end.seconds, duration)),
        ("Compute", _operations(spent) if spent else _last(columns["flops"], run.end.flops, _operations)),
    ]
    shown = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs if value != "–"]
    return tag("dl", join(*shown), class_="figures")


def _last(values: Sequence[float], end: float, show: Callable[[float | None], str]) -> str:
    known = ends(values)[1]
    return show(known if math.isnan(end) else end)


def _operations(flops: float | None) -> str:
    return "–" if flops is None else scaled(flops, "kMGTPEZ", " ") + "FLOP"
