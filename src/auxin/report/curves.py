"""What was measured, over the run."""

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from auxin.report.axis import Axis
from auxin.report.figure import Table, behind, drawings, note, number, readable, section
from auxin.report.figures import duration, scaled, significant, span, whole
from auxin.report.marks import ROW, draw_lines, draw_marks, draw_spans, place_marks, rows_of
from auxin.report.markup import Markup, join, shorten, tag
from auxin.report.plot import chart, curve, layered, percent, run_axis, short, value_axis
from auxin.report.run import AXES, Growth, Run
from auxin.report.scale import Point, Scale, spread, thin, value_scale

MOST_PANELS = 5
_HEIGHT, _LOW_HEIGHT, _AXIS = 280.0, 160.0, 28.0  # pixels: of the first plot, of the others, of the ticks below
_FAR = 3.0  # a line this many times above the other gets a chart of its own
_LOSS = re.compile("loss|validation|^metric$", re.IGNORECASE)
_SAID = {"loss": "training loss", "validation": "validation loss", "metric": "metric given to step"}
_ROWS, _READ = 40, 300  # of the table behind, and of what the pointer reads
_NOT_DRAWN = {"depth"}


@dataclass(frozen=True)
class Panel:
    """One figure: at most two metrics that share a scale. ``key`` is for ids."""

    key: str
    names: Sequence[str]
    run: Run
    detail: int
    marks: int
    first: bool

    @property
    def height(self) -> float:
        """Of the plot, in pixels."""
        return _HEIGHT if self.first else _LOW_HEIGHT

    @property
    def title(self) -> str:
        """The heading."""
        said = "loss" if len(self.names) > 1 else said_of(self.names[0])
        return shorten(said[:1].upper() + said[1:], 60)

    def values(self, name: str) -> Sequence[float]:
        """All readings of one metric."""
        return self.run.readings.metrics[name]

    def style(self, name: str) -> str:
        """The class of a metric's line."""
        return "main" if name == self.names[0] else "second"


def said_of(name: str) -> str:
    """A metric's name in words."""
    return _SAID.get(name, name)


def within(name: str) -> str:
    """A metric's name inside of a sentence, before its value."""
    return name if name == "metric" else said_of(name)


def metric_sections(run: Run, axes: Sequence[Axis], detail: int, marks: int) -> Markup:
    """A figure per metric, with a mark for each growth; training and validation loss share one where they can.

    Args:
        run: to show.
        axes: to draw on.
        detail: columns of a drawing; a line has at most three points in each.
        marks: places for marks on an axis.
    """
    names = [n for n, values in run.readings.metrics.items() if n not in _NOT_DRAWN and any(map(math.isfinite, values))]
    if not names:
        missing = "No loss was recorded; grower.step(loss) records one."
        return section("metrics", "Loss", note(missing), _lone_marks(run, axes, marks))
    groups = _groups(names, run)
    parts = []
    for at, group in enumerate(groups[:MOST_PANELS]):
        parts.append(_panel(Panel(f"metric-{at}", group, run, detail, marks, not at), axes))
    left = [shorten(name, 40) for group in groups[MOST_PANELS:] for name in group]
    if left:
        parts.append(
            tag("p", f"Not drawn: {', '.join(left[:20])}{' and more' if len(left) > 20 else ''}.", class_="note")
        )
    return join(*parts)


def main_metric(run: Run) -> str | None:
    """The metric that a run is judged by: validation, what was given to ``step`` by position, loss, or the first."""
    known = [name for name, values in run.readings.metrics.items() if any(map(math.isfinite, values))]
    known = [name for name in known if name not in _NOT_DRAWN]
    return next((name for name in ("validation", run.given, "loss") if name in known), known[0] if known else None)


def ends(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The first and the last finite value."""
    known = [value for value in values if math.isfinite(value)]
    return (known[0], known[-1]) if known else (None, None)


def _groups(names: Sequence[str], run: Run) -> list[tuple[str, ...]]:
    """Two losses on one chart unless that would flatten one of them; all else on its own."""
    first = ["validation", run.given]
    order = sorted(names, key=lambda name: first.index(name) if name in first else 2)
    losses = [name for name in order if _LOSS.search(name)]
    if len(losses) != 2 or _apart([_finite(run.readings.metrics[name]) for name in losses]):
        return [(name,) for name in order]
    pair = (losses[0], losses[1])
    return [pair, *((name,) for name in order if name not in pair)]


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _apart(lines: Sequence[Sequence[float]]) -> bool:
    """Whether two lines lie so far apart that on one scale both would look flat."""
    low, high = sorted(lines, key=max)
    return min(high) > _FAR * max(low) > 0


def _panel(panel: Panel, axes: Sequence[Axis]) -> Markup:
    run = panel.run
    y = value_scale([value for name in panel.names for value in _finite(panel.values(name))])
    said = _said(panel, y)
    branches = run.branches()
    rows = [at for at in branches[0][1] if any(not math.isnan(panel.values(n)[at]) for n in panel.names)]
    read = [rows[at] for at in spread(len(rows), _READ)]
    moments = [run.readings.moment(at) for at in read]
    numbers = [
        [*(moment.on(axis.key) for axis in axes), *(panel.values(name)[at] for name in panel.names)]
        for at, moment in zip(read, moments, strict=True)
    ]
    return section(
        panel.key,
        panel.title,
        note(said),
        _key(panel),
        drawings(panel.key, axes, lambda axis: _drawing(panel, axis, y, branches, said)),
        readable(panel.key, axes, [within(name) for name in panel.names], numbers),
        behind(_table(panel, rows), panel.title),
    )


def _drawing(panel: Panel, x: Axis, y: Scale, branches: list, said: str) -> Markup:
    run, height = panel.run, panel.height
    marks = place_marks(run.growths, x, panel.marks)
    top = (ROW * rows_of(marks) if panel.first else 0) + 6.0
    bottom = top + height
    first, *others = panel.names
    order = [(name, None, branches[0][1]) for name in others]
    order += [(first, growth, indices) for growth, indices in reversed(branches)]  # undone spans, and the run upon them
    lines = []
    for name, growth, indices in order:
        style = panel.style(name) + (" undone" if growth else "")
        lines.append(curve(_points(panel, name, growth, indices, x), y, height, style))
    return chart(
        f"{panel.key}-chart-{x.key}",
        f"{panel.title} over {x.name}",
        said,
        bottom + _AXIS,
        draw_spans(run.growths, x, top, bottom),
        run_axis(x, top, bottom),
        value_axis(y, top, height, 5 if height > 200 else 3),
        draw_marks(marks, top, bottom) if panel.first else draw_lines(marks, top, bottom),
        layered(top, height, *lines),
        _end_labels(panel, x, y, top, branches[0][1]),
    )


def _points(panel: Panel, name: str, growth: Growth | None, indices: Sequence[int], x: Axis) -> list[Point]:
    """A metric's points on one axis, thinned; an undone span begins at the reading before it."""
    values, column = panel.values(name), panel.run.readings.columns[x.key]
    lead = [growth.first - 1] if growth is not None and growth.first else []
    known = [at for at in [*lead, *indices] if not math.isnan(values[at]) and not math.isnan(column[at])]
    kept = [known[i] for i in thin([values[at] for at in known], panel.detail)]
    points = [(x.scale.at(column[at]), _gap(values[at])) for at in kept]
    if growth is None and x.key != "step":  # steps go back where a growth is undone, FLOPs and time do not
        for span in reversed([g for g in panel.run.growths if g.undone is not None and g.last > g.first]):
            after = bisect_left(kept, span.last)
            points[after:after] = [(0.0, math.nan)]
    return points


def _gap(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _lone_marks(run: Run, axes: Sequence[Axis], most: int) -> Markup | None:
    """The growths on their own, where nothing was measured."""
    if not run.growths:
        return None

    def draw(axis: Axis) -> Markup:
        marks = place_marks(run.growths, axis, most)
        top = ROW * rows_of(marks) + 6.0
        spans = draw_spans(run.growths, axis, top, top + 30)
        content = [spans, run_axis(axis, top, top + 30), draw_marks(marks, top, top + 30)]
        said = f"{len(run.growths):,} growths."
        return chart(f"growths-chart-{axis.key}", f"Growths over {axis.name}", said, top + 30 + _AXIS, *content)

    return drawings("growths", axes, draw)


def _said(panel: Panel, y: Scale) -> str:
    """What the chart shows, in a sentence or two."""
    run = panel.run
    live = run.branches()[0][1]
    parts = []
    for name in panel.names:
        known = ends([panel.values(name)[at] for at in live])
        parts.append(f"{shorten(said_of(name), 60)} {span(*known, significant)}")
    text = " and ".join(parts)
    text = text[0].upper() + text[1:] + "."
    if run.growths and panel.first:
        one = len(run.growths) == 1
        text += " The vertical mark is a growth." if one else f" Vertical marks: {len(run.growths):,} growths."
    undone = len(run.growths) - len(run.kept)
    if undone and panel.first:
        text += f" {undone:,} of them {'was' if undone == 1 else 'were'} undone: shaded, with a dashed line."
    if y.log:
        text += " Logarithmic scale."
    broken = sum(math.isinf(value) for name in panel.names for value in panel.values(name))
    if broken:
        text += f" {broken:,} value{'s' if broken > 1 else ''} not finite: a gap in the line."
    return text


def _key(panel: Panel) -> Markup | None:
    """The key of a narrow page, where the lines' ends have no room for names."""
    parts = []
    live = panel.run.branches()[0][1]
    for name in panel.names:
        last = ends([panel.values(name)[at] for at in live])[1]
        swatch = tag("span", class_=f"swatch {panel.style(name)}", aria_hidden="true")
        parts.append(tag("span", swatch, f"{shorten(said_of(name), 40)} {number(last)}"))
    return tag("p", *parts, class_="key narrow")


def _end_labels(panel: Panel, x: Axis, y: Scale, top: float, live: Sequence[int]) -> Markup:
    """The name and last value at the end of each line, pushed apart where they would touch."""
    places = []
    for name in panel.names:
        values = panel.values(name)
        last = next((at for at in reversed(live) if math.isfinite(values[at])), None)
        if last is not None:
            at = x.at(panel.run.readings.moment(last))
            places.append((top + (1 - y.at(values[last])) * panel.height, name, at, values[last]))
    places = sorted(place for place in places if not math.isnan(place[2]))
    heights = [place[0] for place in places]
    if len(heights) == 2 and heights[1] - heights[0] < 34:
        middle = min(max(sum(heights) / 2, top + 17), top + panel.height - 17)
        heights = [middle - 17, middle + 17]
    parts = []
    for height, (down, name, at, value) in zip(heights, places, strict=True):
        style = panel.style(name)
        parts.append(tag("circle", class_=f"dot {style}", cx=percent(at), cy=short(down), r="3.5"))
        word = {"loss": "training"}.get(name, name)
        for shift, said in ((-2, shorten(word, 12)), (13, shorten(significant(value), 12))):
            parts.append(tag("text", said, class_=f"end wide {style}", x=percent(at), y=short(height + shift), dx="12"))
    return join(*parts)


def _table(panel: Panel, rows: Sequence[int]) -> Table:
    """Some readings, evenly over the run."""
    readings = panel.run.readings
    kept = [rows[at] for at in spread(len(rows), _ROWS)]
    show = (whole, lambda value: scaled(value, "kMGTPEZ", " "), duration)
    used = [at for at, axis in enumerate(AXES) if any(not math.isnan(readings.columns[axis][row]) for row in kept)]
    names = [panel.run.unit.capitalize(), "FLOP", "Time"]
    lines = []
    for row in kept:
        places = [readings.columns[AXES[at]][row] for at in used]
        shown = [show[at](None if math.isnan(value) else value) for at, value in zip(used, places, strict=True)]
        lines.append([*shown, *(number(panel.values(name)[row]) for name in panel.names)])
    columns = [*(names[at] for at in used), *(said_of(name) for name in panel.names)]
    all_of = "All" if len(kept) == len(rows) else f"{len(kept)} of"
    left = ", undone spans left out" if len(panel.run.kept) < len(panel.run.growths) else ""
    caption = f"{all_of} {len(rows):,} readings{left}."
    return Table(caption, columns, lines, frozenset(range(len(columns))))
