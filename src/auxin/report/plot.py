"""The frame of a chart: an SVG whose marks stretch with the page while its text keeps its size.

Horizontal places are percentages of the plot's width, vertical ones pixels, so one drawing serves a phone and
a wide screen. Curves cannot be given in percentages; they lie in an inner SVG with a viewBox that stretches,
with strokes that do not.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from auxin.report.axis import Axis
from auxin.report.figures import scaled
from auxin.report.markup import Markup, join, tag
from auxin.report.scale import Point, Scale

WIDTH = 1000  # of the inner viewBox


def percent(fraction: float) -> str:
    """A horizontal place: 0.25 -> 25%."""
    return f"{fraction * 100:.2f}".rstrip("0").rstrip(".") + "%"


def short(value: float) -> str:
    """A coordinate with one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def chart(name: str, title: str, description: str, height: float, *content: object) -> Markup:
    """One SVG as wide as its box, with a title and a description for those who do not see it.

    Args:
        name: unique on the page; ids are made from it.
        title: what is drawn.
        description: what it shows.
        height: in pixels.
        *content: elements.
    """
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", description, id=f"{name}-desc"),
        *content,
        class_="chart",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        width="100%",
        height=short(height),
    )


def layered(top: float, height: float, *content: object) -> Markup:
    """An inner SVG over the whole width, 1000 wide and `height` high, for curves."""
    return tag(
        "svg",
        *content,
        class_="curves",
        x="0",
        y=short(top),
        width="100%",
        height=short(height),
        viewBox=f"0 0 {WIDTH} {short(height)}",
        preserveAspectRatio="none",
    )


def curve(points: Sequence[Point], y: Scale, height: float, class_: str) -> Markup:
    """A line through the points, in the coordinates of `layered`, broken where a value is NaN."""
    pieces, pen, run = [], "M", 0
    for at, value in [*points, (0.0, math.nan)]:
        if math.isnan(value):
            if run == 1:
                pieces.append("h0")  # a dot, by its round cap
            pen, run = "M", 0
            continue
        pieces.append(f"{pen}{short(at * WIDTH)} {short((1 - y.at(value)) * height)}")
        pen, run = ("L" if run == 0 else " "), run + 1
    return tag("path", class_=f"line {class_}", d="".join(pieces), vector_effect="non-scaling-stroke")


def steps_curve(points: Sequence[Point], y: Scale, height: float) -> tuple[Markup, Markup]:
    """A line that holds its value until the next, and the area below it."""
    path, level = "", None
    for at, value in points:
        across, down = short(at * WIDTH), short((1 - y.at(value)) * height)
        if level is None:
            path = f"M{across} {down}"
        elif down != level:
            path += f"H{across}V{down}"
        level = down
    if points:
        path += f"H{short(points[-1][0] * WIDTH)}"
    first = short(points[0][0] * WIDTH) if points else "0"
    area = f"{path}V{short(height)}H{first}Z" if points else ""
    line = tag("path", class_="line main", d=path, vector_effect="non-scaling-stroke")
    return line, tag("path", class_="area", d=area)


def run_axis(x: Axis, top: float, bottom: float) -> Markup:
    """Faint vertical lines at round places and, below, their numbers; every second one stays on a phone."""
    lines, texts = [], []
    for index, (at, text) in enumerate(x.ticks()):
        place = percent(at)
        lines.append(tag("line", class_="grid", x1=place, x2=place, y1=short(top), y2=short(bottom)))
        anchor = "start" if index == 0 and at < 0.02 else "middle"
        seen = "tick" if index % 2 == 0 else "tick wide"
        texts.append(tag("text", text, class_=seen, x=place, y=short(bottom + 18), text_anchor=anchor))
    return join(*lines, *texts)


def value_axis(y: Scale, top: float, height: float, count: int = 5) -> Markup:
    """Faint horizontal lines at round values, and their numbers to the left of the plot."""
    ticks = y.ticks(count)
    parts = []
    for value in ticks:
        place = short(top + (1 - y.at(value)) * height)
        parts.append(tag("line", class_="grid", x1="0", x2="100%", y1=place, y2=place))
        parts.append(
            tag(
                "text",
                tick_name(value, ticks),
                class_="tick",
                x="-10",
                y=place,
                dy="0.32em",
                text_anchor="end",
            )
        )
    return join(*parts)


def tick_name(value: float, ticks: Sequence[float]) -> str:
    """A tick's number, with as many decimals as its neighbours need."""
    largest = max(abs(tick) for tick in ticks)
    if value and (largest >= 10_000 or abs(value) < 1e-4):
        return scaled(value) if abs(value) >= 1 else f"{value:.0e}".replace("e-0", "e-")
    distance = min((b - a for a, b in pairwise(ticks)), default=1.0)
    smallest = min((abs(tick) for tick in ticks if tick), default=1.0)
    logarithmic = largest > 20 * smallest  # linear ticks are fewer than that
    return f"{value:,.{_decimals(abs(value) if logarithmic else distance)}f}"


def _decimals(distance: float) -> int:
    return max(0, -math.floor(math.log10(distance) + 1e-9)) if distance > 0 else 0
