"""One bar per layer, from its birth to the end: its height the width of the layer, its colour the age."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from auxin.report.axis import Axis
from auxin.report.figure import Table, behind, drawings, note, section
from auxin.report.figures import whole
from auxin.report.lineage import Layer
from auxin.report.markup import Markup, join, shorten, tag
from auxin.report.plot import chart, percent, run_axis, short

SHADES = 6  # from the oldest to the youngest; the style sheet has as many
MOST_ROWS = 48

_TALLEST, _LOWEST, _PLAIN = 26.0, 3.0, 12.0  # pixels: of the widest layer, of any, of one whose width is not known
_ABOVE, _BETWEEN, _TOP = 20.0, 8.0, 4.0  # pixels: for the label over a bar, between rows, above the first
_LETTER = 6.9  # pixels
_LAYOUTS = {"wide": (620.0, 0.7), "narrow": (280.0, 0.5)}  # pixels of the plot; births after this are "late"


@dataclass(frozen=True)
class Row:
    """A layer with its place on the picture."""

    layer: Layer
    top: float
    height: float
    shade: int


def layer_section(layers: Sequence[Layer], axes: Sequence[Axis], most: int = MOST_ROWS) -> Markup:
    """The bars in the order of the final network, original layers from the first step."""
    if not layers:
        return section("layers", "Layers", note("No layer was added in this run."))
    rows = _rows(_choose(layers, most), axes[0])
    said = _said(layers)
    hidden = len(layers) - len(rows)
    return section(
        "layers",
        "Layers",
        note(said),
        _shade_key(any(layer.birth and layer.birth.undone for layer in layers)),
        drawings("layers", axes, lambda axis: _drawing(rows, axis, said)),
        note(f"Not drawn: {hidden:,} more." if hidden else ""),
        behind(_table(layers, axes[0].suffix, 4 * most), "Layers"),
    )


def _drawing(rows: Sequence[Row], x: Axis, said: str) -> Markup:
    places = {row.layer.path: row for row in rows if row.layer.living}
    bottom = rows[-1].top + rows[-1].height + 10
    return chart(
        f"layer-chart-{x.key}",
        f"Layers over {x.name}",
        " ".join([said, *(_spoken(row.layer) for row in rows[:24])]),
        bottom + 26,
        run_axis(x, _TOP, bottom),
        *(_connector(row, places, x) for row in rows),
        *(_bar(row, x) for row in rows),
    )


def _choose(layers: Sequence[Layer], most: int) -> list[Layer]:
    """At most so many layers; grown ones first, all in their order."""
    if len(layers) <= most:
        return list(layers)
    grown = [at for at, layer in enumerate(layers) if layer.birth is not None]
    old = [at for at, layer in enumerate(layers) if layer.birth is None]
    return [layers[at] for at in sorted([*grown, *old][:most])]


def _rows(layers: Sequence[Layer], steps: Axis) -> list[Row]:
    """Heights in proportion to the widths, from zero."""
    widest = max((layer.units or 0 for layer in layers), default=0)
    rows, top = [], _TOP
    for layer in layers:
        height = max(_LOWEST, _TALLEST * layer.units / widest) if layer.units and widest else _PLAIN
        begin = steps.at(layer.birth.at) if layer.birth else 0.0
        shade = min(SHADES - 1, int((0.0 if math.isnan(begin) else begin) * SHADES))
        rows.append(Row(layer, top + _ABOVE, height, shade))
        top += _ABOVE + height + _BETWEEN
    return rows


def _said(layers: Sequence[Layer]) -> str:
    old = sum(layer.birth is None for layer in layers)
    undone = sum(layer.birth is not None and layer.birth.undone is not None for layer in layers)
    gone = sum(layer.death is not None for layer in layers)
    grown = len(layers) - old - undone
    widened = sum(bool(layer.widened) for layer in layers)
    counted = {"from the start": old, "grown": grown, "widened": widened, "undone": undone, "removed": gone}
    said = ", ".join(f"{count} {what}" for what, count in counted.items() if count or what == "from the start") + ". "
    widths = [layer.units for layer in layers if layer.units]
    if widths:
        said += f"A bar's height is the layer's width, the rows of its largest weight: at most {max(widths):,} units. "
        said += "It steps up where the layer was widened. " if any(layer.widened for layer in layers) else ""
    else:
        said += "All bars are equally high: the widths of the layers are not known. "
    return said + "Names as in the final network."


def _shade_key(undone: bool) -> Markup:
    """What the colours say."""
    shades = [tag("span", class_=f"swatch block shade{shade}", aria_hidden="true") for shade in range(SHADES)]
    swatch = tag("span", class_="swatch block undone", aria_hidden="true")
    return tag(
        "p",
        tag("span", "oldest ", tag("span", *shades, class_="ramp"), " youngest"),
        tag("span", swatch, "undone") if undone else None,
        class_="key",
    )


def _life(layer: Layer, x: Axis) -> tuple[float, float]:
    """Begin and end along the plot; NaN where this axis does not know the birth."""
    begin = x.at(layer.birth.at) if layer.birth else 0.0
    end = 1.0
    if layer.death:
        end = x.at(layer.death.at)
    elif layer.birth and layer.birth.undone:
        end = x.at(layer.birth.undone)
    return begin, begin if end < begin else end


def _bar(row: Row, x: Axis) -> Markup | None:
    layer = row.layer
    begin, end = _life(layer, x)
    if math.isnan(begin) or math.isnan(end):
        return None
    undone = layer.birth is not None and layer.birth.undone is not None
    rects = [
        tag(
            "rect",
            class_="bar undone" if undone else f"bar shade{row.shade}",
            x=percent(start),
            y=short(row.top + (row.height - height) / 2),
            width=percent(max(stop - start, 0.002)),
            height=short(height),
            rx="2",
        )
        for start, stop, height in _spans(row, begin, end, x)
    ]
    labels = [_text(layer, begin, row.top - 5, layout) for layout in _LAYOUTS]
    units = None
    if layer.units and end == 1.0:
        middle = row.top + row.height / 2
        units = tag("text", f"{layer.units:,}", class_="units wide", x="100%", y=short(middle), dx="10", dy="0.32em")
    return tag("g", tag("title", _spoken(layer)), *rects, *labels, units, class_="layer")


def _spans(row: Row, begin: float, end: float, x: Axis) -> Iterator[tuple[float, float, float]]:
    """Begin, end and height of each part of a bar: as wide as the layer was then."""
    start = begin
    for growth, units in row.layer.widened:
        stop = x.at(growth.at)
        if start < stop < end:
            yield start, stop, max(_LOWEST, row.height * units / (row.layer.units or units))
            start = stop
    yield start, end, row.height


def _text(layer: Layer, begin: float, height: float, layout: str) -> Markup:
    """The label above a bar, from its begin on, or where the bar is short, before it."""
    pixels, turn = _LAYOUTS[layout]
    room = (begin if begin > turn else 1 - begin) * pixels
    shift = "-5" if begin > turn else "5"
    return tag(
        "text",
        tag("tspan", layer.birth.number, class_="number") if layer.birth else None,
        " " if layer.birth else None,
        _label(layer, max(8, min(42, int(room / _LETTER) - 3))),
        class_=f"path {layout}",
        x=percent(begin),
        y=short(height),
        dx=shift if layer.birth and begin > 0 else None,
        text_anchor="end" if begin > turn else None,
    )


def _label(layer: Layer, limit: int) -> str:
    """`blocks.2 ← blocks.1`, the source shortened first where it is long."""
    if not layer.source or not layer.living:
        return shorten(layer.path, limit)
    text = f"{layer.path} ← {layer.source}"
    parent = layer.path.rpartition(".")[0]
    if len(text) > limit and parent and layer.source.startswith(parent + "."):
        text = f"{layer.path} ← {layer.source[len(parent) + 1 :]}"
        if len(text) > limit and "." in parent:
            text = "…" + text[len(parent.rpartition(".")[0]) + 1 :]
    return shorten(text, limit)


def _spoken(layer: Layer) -> str:
    """The row in words."""
    path = shorten(layer.path, 60)
    if not layer.birth:
        said = f"{path}: from the start"
    else:
        said = f"{path}: growth {layer.birth.number}, step {layer.birth.at.step:g}"
        if layer.source:
            said += f", from {shorten(layer.source, 60)}"
        if layer.born_as != layer.path:
            said += f", born as {shorten(layer.born_as, 60)}"
    said += f", {layer.units:,} units" if layer.units else ""
    grown = [f"{units:,} before growth {growth.number}" for growth, units in layer.widened]
    said += f" ({', '.join(grown)})" if grown else ""
    return f"{said}; {_ended(layer)}." if _ended(layer) else f"{said}."


def _ended(layer: Layer) -> str:
    if layer.death:
        return f"removed at step {layer.death.at.step:g}"
    if layer.birth and layer.birth.undone:
        return f"undone at step {layer.birth.undone.step:g}"
    return ""


def _connector(row: Row, places: dict[str, Row], x: Axis) -> Markup | None:
    """A thin line from the source's bar to the new one, at its birth."""
    layer = row.layer
    source = places.get(layer.source or "")
    if not layer.birth or source is None or math.isnan(x.at(layer.birth.at)):
        return None
    place = percent(x.at(layer.birth.at))
    start, stop = (at.top + at.height / 2 for at in (source, row))
    return join(
        tag("line", class_="branch", x1=place, x2=place, y1=short(start), y2=short(stop)),
        tag("circle", class_="branch-dot", cx=place, cy=short(start), r="3"),
    )


def _history(layer: Layer) -> str:
    """The widths that a layer has had: ``32 → 64``."""
    return " → ".join(whole(units) for units in (*(before for _, before in layer.widened), layer.units))


def _table(layers: Sequence[Layer], unit: str, most: int) -> Table:
    shown = layers[:most]
    rows = []
    for layer in shown:
        born = f"growth {layer.birth.number}, {unit} {whole(layer.birth.at.step)}" if layer.birth else "from the start"
        size = next((a.parameters for a in layer.birth.added if a.path == layer.born_as), None) if layer.birth else None
        rows.append([shorten(layer.path, 60), born, shorten(layer.source or "–", 60), _history(layer), whole(size)])
        rows[-1].append(_ended(layer) or "at the end")
    columns = ["Layer", "Born", "Copy of", "Width in units", "Parameters at birth", "Last seen"]
    caption = f"{'All' if len(shown) == len(layers) else f'{len(shown)} of'} {len(layers):,} layers."
    return Table(caption, columns, rows, frozenset({3, 4}))
