"""Gradient ratios: how much of the gradient reaches a new layer, against its older neighbour."""

import math
import os.path
from collections.abc import Sequence

from auxin.report.axis import Axis
from auxin.report.figure import Table, behind, drawings, note, section
from auxin.report.figures import finite, significant, whole
from auxin.report.marks import ROW
from auxin.report.markup import Markup, join, shorten, tag
from auxin.report.plot import chart, curve, layered, percent, run_axis, short, value_axis
from auxin.report.run import Flow, Run
from auxin.report.scale import Point, Scale, round_ticks, spread, thin, value_scale

MOST_LINES = 12
_HEIGHT, _LOW_HEIGHT, _AXIS = 160.0, 100.0, 28.0  # pixels
_TOP = 8.0
_ROWS = 60

Line = tuple[int, str, list[Point]]  # number of the growth, unit, (steps after birth, ratio)


def gradient_section(run: Run, axes: Sequence[Axis], detail: int) -> Markup | None:
    """Over the first steps after each birth where they were watched, else once per growth; None without any."""
    lines = _lines(run.flows)
    if lines:
        return _watched(run, lines, detail)
    known = [(growth, finite(growth.entry.get("gradient_ratio"))) for growth in run.growths]
    dots = [(growth, ratio) for growth, ratio in known if ratio is not None]
    if not dots:
        return None
    shown = [dots[at] for at in spread(len(dots), detail)]
    y = _scale([ratio for _, ratio in shown])
    said = "Gradient norm of the new weights over that of their older neighbour's, on the probe, at each growth."
    if len(shown) < len(dots):
        said += f" {len(shown)} of {len(dots):,} are drawn."

    def draw(x: Axis) -> Markup:
        bottom = _TOP + _LOW_HEIGHT
        parts = []
        for growth, ratio in shown:
            at = x.at(growth.at)
            if not math.isnan(at):
                place = {"cx": percent(at), "cy": short(_TOP + (1 - y.at(ratio)) * _LOW_HEIGHT)}
                said_of = tag("title", f"Growth {growth.number}: {significant(ratio, 3)}")
                parts.append(tag("circle", said_of, class_="dot main", r="4", **place))
        content = [run_axis(x, _TOP, bottom), value_axis(y, _TOP, _LOW_HEIGHT, 3), _one(y, _LOW_HEIGHT), *parts]
        return chart(f"gradient-chart-{x.key}", f"Gradient ratio over {x.name}", said, bottom + _AXIS, *content)

    rows = [[str(g.number), whole(g.at.step), significant(ratio, 3)] for g, ratio in dots[:_ROWS]]
    table = Table("One row per growth.", ["Growth", run.unit.capitalize(), "Ratio"], rows, frozenset({0, 1, 2}))
    drawn = drawings("gradients", axes, draw)
    return section("gradients", "Gradient ratio", note(said), drawn, behind(table, "Gradient ratio"))


def _watched(run: Run, lines: Sequence[Line], detail: int) -> Markup:
    """A line per new unit over the steps after its birth."""
    said = "Gradient norm of each new unit over that of its older neighbour, in the first steps after its birth."
    shown = lines[-MOST_LINES:]
    if len(shown) < len(lines):
        said += f" The last {len(shown)} of {len(lines):,} are drawn."
    last = max(at for _, _, points in shown for at, _ in points)
    x = Scale(0.0, max(1.0, last))
    y = _scale([ratio for _, _, points in shown for _, ratio in points])
    curves = []
    for at, (_, _, points) in enumerate(shown):
        kept = [points[i] for i in thin([ratio for _, ratio in points], detail // 2)]
        shade = at * 6 // len(shown)
        curves.append(curve([(x.at(step), ratio) for step, ratio in kept], y, _HEIGHT, f"flow tone{shade}"))
    picture = chart(
        "gradient-chart",
        "Gradient ratio over the steps after birth",
        said,
        _TOP + _HEIGHT + _AXIS,
        _birth_axis(x),
        value_axis(y, _TOP, _HEIGHT, 4),
        _one(y, _HEIGHT),
        layered(_TOP, _HEIGHT, *curves),
        _names(shown, x, y),
    )
    return section(
        "gradients",
        "Gradient ratio",
        note(said),
        _dead(run.flows),
        tag("div", picture, class_="plot labelled"),
        behind(_table(lines), "Gradient ratio"),
    )


def _lines(flows: Sequence[Flow]) -> list[Line]:
    """Steps after birth, ratio; one line per growth and unit, in the order of the growths."""
    found: dict[tuple[int, str], list[Point]] = {}
    for flow in flows:
        for unit, ratio in flow.ratios.items():
            after = flow.step - (0.0 if math.isnan(flow.growth.at.step) else flow.growth.at.step)
            found.setdefault((flow.growth.number, unit), []).append((max(0.0, after), ratio))
    return [(number, unit, points) for (number, unit), points in found.items()]


def _birth_axis(x: Scale) -> Markup:
    parts = []
    for value in round_ticks(0.0, x.high, 8):
        if not value.is_integer():
            continue
        place = percent(x.at(value))
        parts.append(tag("line", class_="grid", x1=place, x2=place, y1=short(_TOP), y2=short(_TOP + _HEIGHT)))
        name = whole(value) if value else "birth"
        anchor = "middle" if value else "start"
        y = short(_TOP + _HEIGHT + 18)
        parts.append(tag("text", name, class_="tick", x=place, y=y, text_anchor=anchor))
    return join(*parts)


def _scale(ratios: Sequence[float]) -> Scale:
    """From 0 and beyond 1; logarithmic where the ratios are far apart."""
    scale = value_scale([1.0, *ratios], pieces=3)
    return scale if scale.log else value_scale([1.0, *ratios], zero=True, pieces=3)


def _one(y: Scale, height: float) -> Markup:
    """The line of equal gradients."""
    place = short(_TOP + (1 - y.at(1.0)) * height)
    return tag("line", class_="one", x1="0", x2="100%", y1=place, y2=place)


def _names(lines: Sequence[Line], x: Scale, y: Scale) -> Markup:
    """The growth and unit at the end of each line, from above to below without touching."""
    places = sorted((_TOP + (1 - y.at(points[-1][1])) * _HEIGHT, at) for at, (_, _, points) in enumerate(lines))
    parts, floor, labels = [], -math.inf, short_names([unit for _, unit, _ in lines], 11)
    for height, at in places:
        number, _, points = lines[at]
        floor = max(height, floor + ROW - 2)
        text = join(tag("tspan", number, class_="number"), " ", labels[at])
        place = {"x": percent(x.at(points[-1][0])), "y": short(floor), "dx": "10", "dy": "0.32em"}
        dot = {"cx": place["x"], "cy": short(height), "r": "3.5"}
        parts.append(tag("circle", class_=f"dot shade{at * 6 // len(lines)}", **dot))
        parts.append(tag("text", text, class_="end wide", **place))
    return join(*parts)


def short_names(paths: Sequence[str], limit: int) -> list[str]:
    """Paths of at most `limit` characters; where these would be alike, without what all of them begin with.

    Examples:
        >>> short_names(["layers.0.mlp.2", "layers.1.mlp.2"], 11)
        ['…0.mlp.2', '…1.mlp.2']
    """
    names = [shorten(path, limit) for path in paths]
    if len(set(names)) == len(set(paths)):
        return names
    shared = len(os.path.commonprefix(list(paths)).rpartition(".")[0])
    return [shorten(f"…{path[shared + 1 :]}", limit) for path in paths] if shared else names


def _dead(flows: Sequence[Flow]) -> Markup | None:
    """New parameters that no gradient has reached."""
    latest: dict[int, tuple[str, ...]] = {flow.growth.number: flow.dead for flow in flows}
    found = [f"{shorten(name, 60)} (growth {number})" for number, names in latest.items() for name in names]
    if not found:
        return None
    more = f" and {len(found) - 8:,} more" if len(found) > 8 else ""
    return tag("p", f"No gradient has reached: {', '.join(found[:8])}{more}.", class_="warning")


def _table(lines: Sequence[Line]) -> Table:
    rows = []
    for number, unit, points in lines[:_ROWS]:
        ratios = [ratio for _, ratio in points]
        ends = [ratios[0], min(ratios), max(ratios), ratios[-1]]
        rows.append([str(number), shorten(unit, 60), str(len(points)), *(significant(ratio, 3) for ratio in ends)])
    caption = f"{'All' if len(lines) <= _ROWS else f'{_ROWS} of'} {len(lines):,} new units."
    columns = ["Growth", "Unit", "Steps watched", "First", "Lowest", "Highest", "Last"]
    return Table(caption, columns, rows, frozenset({0, 2, 3, 4, 5, 6}))
