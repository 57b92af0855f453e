"""Loss and parameters over the steps."""

import math
from collections.abc import Mapping, Sequence

from auxin.report.figures import scaled, significant, span, whole
from auxin.report.marks import ROW, Mark, draw_lines, draw_marks, rows_of
from auxin.report.markup import Markup, join, shorten, tag
from auxin.report.plot import (
    COLUMNS,
    chart,
    curve,
    layered,
    percent,
    short,
    step_axis,
    steps_curve,
    value_axis,
)
from auxin.report.reading import ends, series
from auxin.report.scale import Point, Scale, thin, value_scale

_HEIGHT = 280.0
_LOW_HEIGHT = 130.0
_AXIS = 28.0  # pixels for the steps below a plot
_FAR = 3.0  # a line this many times above the other gets a chart of its own
_NAMES = {"loss": "training", "validation": "validation"}


def loss_section(metrics: Sequence[Mapping], x: Scale, marks: Sequence[Mark], growths: int) -> Markup:
    """Training and validation loss with a mark per growth: on one chart, or on two where their units differ."""
    lines = {key: series(metrics, key) for key in _NAMES}
    known = {key: points for key, points in lines.items() if _finite(points)}
    if not known:
        heading = tag("h2", "Loss", id="loss")
        return tag("section", heading, tag("p", "No loss was recorded.", class_="note"), aria_labelledby="loss")
    if _apart(known):
        panels = [("validation", "Validation loss"), ("loss", "Training loss")]
        return join(*(_panel({key: known[key]}, name, key, x, marks, growths) for key, name in panels))
    return _panel(lines, "Loss", "loss", x, marks, growths)


def _finite(points: Sequence[Point]) -> list[float]:
    return [value for _, value in points if math.isfinite(value)]


def _apart(lines: Mapping[str, Sequence[Point]]) -> bool:
    """Whether two lines lie so far apart that on one scale both would look flat."""
    if len(lines) < 2:
        return False
    low, high = sorted((_finite(points) for points in lines.values()), key=max)
    return min(high) > _FAR * max(low) > 0


def _panel(
    lines: Mapping[str, Sequence[Point]], name: str, key: str, x: Scale, marks: Sequence[Mark], growths: int
) -> Markup:
    """One chart of one or two lines."""
    y = value_scale([value for points in lines.values() for _, value in points if not math.isnan(value)])
    said = _said(lines, growths, y)
    top = ROW * rows_of(marks) + 6.0
    bottom = top + _HEIGHT
    drawn = [curve(thin(points, COLUMNS), x, y, _HEIGHT, line) for line, points in lines.items()]
    picture = chart(
        f"{key}-chart",
        f"{name} over steps",
        said,
        bottom + _AXIS,
        step_axis(x, top, bottom),
        value_axis(y, top, _HEIGHT),
        draw_marks(marks, top, bottom),
        layered(top, _HEIGHT, *drawn),
        _end_labels(lines, x, y, top),
    )
    return tag(
        "section",
        tag("h2", name, id=key),
        tag("p", said, class_="note"),
        _key(lines),
        tag("div", picture, class_="plot labelled"),
        aria_labelledby=key,
    )


def parameter_section(points: Sequence[Point], x: Scale, marks: Sequence[Mark]) -> Markup | None:
    """Parameters over steps, a line of stairs; None where they are not known."""
    if not points:
        return None
    y = value_scale([value for _, value in points], zero=True, pieces=3)
    first, last = ends(points)
    line, area = steps_curve(thin(points, COLUMNS // 2), x, y, _LOW_HEIGHT)
    top = 8.0
    end = percent(x.at(points[-1][0]))
    height = short(top + (1 - y.at(points[-1][1])) * _LOW_HEIGHT)
    picture = chart(
        "parameter-chart",
        "Parameters over steps",
        f"Parameters: {span(first, last)}.",
        top + _LOW_HEIGHT + _AXIS,
        step_axis(x, top, top + _LOW_HEIGHT),
        value_axis(y, top, _LOW_HEIGHT, 3),
        draw_lines(marks, top, top + _LOW_HEIGHT),
        layered(top, _LOW_HEIGHT, area, line),
        tag("text", scaled(last), class_="end wide validation", x=end, y=height, dx="10", dy="0.32em"),
    )
    note = f"{span(first, last)}." if first == last else f"{span(first, last)}, {_times(first, last)}."
    return tag(
        "section",
        tag("h2", "Parameters", id="parameters"),
        tag("p", note, class_="note"),
        tag("div", picture, class_="plot labelled"),
        aria_labelledby="parameters",
    )


def _times(first: float | None, last: float | None) -> str:
    return f"{last / first:.3g} times as many" if first and last else f"{whole(last)} at the end"


def _said(lines: Mapping[str, Sequence[Point]], growths: int, y: Scale) -> str:
    """What the chart shows, in a sentence or two."""
    parts = []
    for key in ("validation", "loss"):
        first, last = ends(lines.get(key, ()))
        if last is not None:
            parts.append(f"{_NAMES[key]} loss {span(first, last, significant)}")
    text = " and ".join(parts)
    text = text[0].upper() + text[1:] + "."
    if growths:
        text += " The vertical mark is a growth." if growths == 1 else f" Vertical marks: {growths:,} growths."
    if y.log:
        text += " Logarithmic scale."
    missing = sum(math.isnan(value) for points in lines.values() for _, value in points)
    if missing:
        text += f" {missing:,} value{'s' if missing > 1 else ''} not finite: a gap in the line."
    return text


def _key(lines: Mapping[str, Sequence[Point]]) -> Markup:
    """The key of a narrow page, where the lines' ends have no room for names."""
    parts = []
    for key in ("validation", "loss"):
        last = ends(lines.get(key, ()))[1]
        if last is not None:
            swatch = tag("span", class_=f"swatch {key}", aria_hidden="true")
            parts.append(tag("span", swatch, f"{_NAMES[key]} {significant(last)}"))
    return tag("p", *parts, class_="key narrow")


def _end_labels(lines: Mapping[str, Sequence[Point]], x: Scale, y: Scale, top: float) -> Markup:
    """The name and last value at the end of each line, pushed apart where they would touch."""
    places = []
    for key, points in lines.items():
        last = next((point for point in reversed(points) if not math.isnan(point[1])), None)
        if last is not None:
            places.append((top + (1 - y.at(last[1])) * _HEIGHT, key, last))
    places.sort()
    heights = [place[0] for place in places]
    if len(heights) == 2 and heights[1] - heights[0] < 34:
        middle = min(max(sum(heights) / 2, top + 17), top + _HEIGHT - 17)
        heights = [middle - 17, middle + 17]
    parts = []
    for height, (down, key, (step, value)) in zip(heights, places, strict=True):
        at = percent(x.at(step))
        parts.append(tag("circle", class_=f"dot {key}", cx=at, cy=short(down), r="3.5"))
        for shift, text in ((-2, _NAMES[key]), (13, shorten(significant(value), 12))):
            label = tag("text", text, class_=f"end wide {key}", x=at, y=short(height + shift), dx="12")
            parts.append(label)
    return join(*parts)
