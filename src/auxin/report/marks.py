"""The growths as vertical marks, with labels that do not run into each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from auxin.report.axis import Axis
from auxin.report.markup import Markup, join, shorten, tag
from auxin.report.plot import percent, short
from auxin.report.run import Growth

ROW = 17  # pixels per row of labels
ROWS = 4

_LETTER, _GAP = 6.6, 10.0  # pixels
_COLUMNS = 500  # growths that fall into one of them cannot be told apart
_TURN = 0.8  # from here on, labels stand to the left of their mark
_WIDE, _NARROW = 620.0, 250.0  # the narrowest plot of either layout, in pixels


@dataclass(frozen=True)
class Mark:
    """A growth at its place.

    Attributes:
        growth: which.
        at: 0 .. 1 along the plot.
        row: of its label, 0 next to the plot; None: it has no label.
        name: what grew, for a wide page; empty where the names of all growths have no room.
    """

    growth: Growth
    at: float
    row: int | None
    name: str


def place_marks(growths: Sequence[Growth], x: Axis, most: int) -> list[Mark]:
    """The marks that can be told apart, with number and name, or if not all names have room, the number.

    Args:
        growths: to mark.
        x: along which.
        most: marks; where there are more growths, neighbours share one.
    """
    columns = most if len(growths) > most else _COLUMNS
    places: dict[int, tuple[Growth, float]] = {}
    for growth in growths:
        at = x.at(growth.at)
        if not math.isnan(at):
            places.setdefault(round(at * columns), (growth, at))
    names = [_name(growth) for growth, _ in places.values()]
    rows = _fit([(at, f"{g.number} {n}") for (g, at), n in zip(places.values(), names, strict=True)], _WIDE, False)
    if None in rows:
        names = [""] * len(places)
        rows = _fit([(at, str(growth.number)) for growth, at in places.values()], _NARROW, True)
    return [Mark(growth, at, row, name) for (growth, at), row, name in zip(places.values(), rows, names, strict=True)]


def draw_spans(growths: Sequence[Growth], x: Axis, top: float, bottom: float) -> Markup:
    """A band from each growth that was undone to its way back."""
    parts = []
    for growth in growths:
        begin, end = x.at(growth.at), x.at(growth.undone or growth.at)
        if growth.undone is None or not end > begin:
            continue
        said = f"Growth {growth.number} was undone: step {growth.at.step:g} to {growth.undone.step:g}."
        place = {"x": percent(begin), "y": short(top), "width": percent(end - begin), "height": short(bottom - top)}
        parts.append(tag("rect", tag("title", said), class_="span", **place))
    return join(*parts)


def rows_of(marks: Sequence[Mark]) -> int:
    """How many rows of labels the marks need."""
    return max((mark.row + 1 for mark in marks if mark.row is not None), default=0)


def draw_marks(marks: Sequence[Mark], top: float, bottom: float) -> Markup:
    """The marks with their labels above `top`."""
    return join(*(_draw(mark, top, bottom) for mark in marks))


def draw_lines(marks: Sequence[Mark], top: float, bottom: float) -> Markup:
    """The marks without labels, for charts below the first."""
    places = [percent(mark.at) for mark in marks]
    return join(*(tag("line", class_="mark", x1=at, x2=at, y1=short(top), y2=short(bottom)) for at in places))


def _name(growth: Growth) -> str:
    return "undone" if growth.undone else shorten(growth.label, 28)


def _fit(labels: Sequence[tuple[float, str]], pixels: float, centred: bool) -> list[int | None]:
    """For each (place, text) the first row where it touches no other, or None."""
    ends = [-math.inf] * ROWS
    rows: list[int | None] = []
    for at, text in labels:
        width = _LETTER * len(text) + _GAP
        shift = 0.5 if centred else float(at > _TURN)
        begin = at * pixels - width * shift
        row = next((row for row in range(ROWS) if begin >= ends[row]), None)
        if row is not None:
            ends[row] = begin + width
        rows.append(row)
    return rows


def _draw(mark: Mark, top: float, bottom: float) -> Markup:
    place, growth = percent(mark.at), mark.growth
    said = growth.label
    said = f"{said}; undone at step {growth.undone.step:g}" if growth.undone else said
    begin, labels = top, []
    if mark.row is not None:
        base = top - ROW * mark.row - 5  # of the text
        begin = base - 9 if mark.name else base + 3
        labels = _labels(mark, place, base)
    return tag(
        "g",
        tag("title", f"Growth {growth.number}, step {growth.at.step:g}: {shorten(said, 80)}"),
        tag("line", class_="mark", x1=place, x2=place, y1=short(begin), y2=short(bottom)),
        *labels,
        class_="growth undone" if growth.undone else "growth",
    )


def _labels(mark: Mark, place: str, base: float) -> list[Markup]:
    """Number and name beside the mark (a narrow page drops the name), or the number alone on top of it."""
    number = tag("tspan", mark.growth.number, class_="number")
    if not mark.name:
        return [tag("text", number, class_="label", x=place, y=short(base), text_anchor="middle")]
    turned = mark.at > _TURN
    frame = {
        "x": place,
        "y": short(base),
        "dx": "-4" if turned else "4",
        "text_anchor": "end" if turned else None,
    }
    return [
        tag("text", number, " " + mark.name, class_="label wide", **frame),
        tag("text", number, class_="label narrow", **frame),
    ]
