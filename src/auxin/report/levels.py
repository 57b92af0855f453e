"""Parameters over the run."""

import math
from collections.abc import Sequence

from auxin.report.axis import Axis
from auxin.report.figure import Table, behind, drawings, note, section
from auxin.report.figures import scaled, span, whole
from auxin.report.marks import draw_lines, draw_spans, place_marks
from auxin.report.markup import Markup, tag
from auxin.report.plot import chart, layered, percent, run_axis, short, steps_curve, value_axis
from auxin.report.run import Moment, Run
from auxin.report.scale import Scale, spread, value_scale

_HEIGHT, _TOP, _AXIS = 130.0, 8.0, 28.0  # pixels
_ROWS = 40


def parameter_section(run: Run, axes: Sequence[Axis], detail: int, most: int) -> Markup | None:
    """A line of stairs; None where the number of parameters is not known."""
    points = run.parameters()
    if not points:
        return None
    if not math.isnan(run.end.step) and run.end.step > points[-1][0].step:
        points.append((run.end, points[-1][1]))
    points = [points[at] for at in spread(len(points), detail)]
    y = value_scale([value for _, value in points], zero=True, pieces=3)
    first, last = points[0][1], points[-1][1]
    said = f"{span(first, last)}." if first == last else f"{span(first, last)}, {_times(first, last)}."
    return section(
        "parameters",
        "Parameters",
        note(said),
        drawings("parameters", axes, lambda axis: _drawing(run, points, axis, y, most)),
        behind(_table(points, run.unit), "Parameters"),
    )


def _drawing(run: Run, points: Sequence[tuple[Moment, float]], x: Axis, y: Scale, most: int) -> Markup:
    placed = [(x.at(moment), value) for moment, value in points if not math.isnan(x.at(moment))]
    line, area = steps_curve(placed, y, _HEIGHT)
    bottom, value = _TOP + _HEIGHT, points[-1][1]
    height = short(_TOP + (1 - y.at(value)) * _HEIGHT)
    end = percent(placed[-1][0]) if placed else "100%"
    return chart(
        f"parameter-chart-{x.key}",
        f"Parameters over {x.name}",
        f"Parameters: {span(points[0][1], value)}.",
        bottom + _AXIS,
        draw_spans(run.growths, x, _TOP, bottom),
        run_axis(x, _TOP, bottom),
        value_axis(y, _TOP, _HEIGHT, 3),
        draw_lines(place_marks(run.growths, x, most), _TOP, bottom),
        layered(_TOP, _HEIGHT, area, line),
        tag("text", scaled(value), class_="end wide main", x=end, y=height, dx="10", dy="0.32em"),
    )


def _times(first: float, last: float) -> str:
    return f"{last / first:.3g} times as many" if first and last else f"{whole(last)} at the end"


def _table(points: Sequence[tuple[Moment, float]], unit: str) -> Table:
    kept = [points[at] for at in spread(len(points), _ROWS)]
    rows = [[whole(moment.step), whole(value)] for moment, value in kept]
    caption = "Where the number of parameters changed, and the last reading."
    return Table(caption, [unit.capitalize(), "Parameters"], rows, frozenset({0, 1}))
