"""One bar per layer, from its birth to the end."""

from collections.abc import Sequence

from auxin.report.lineage import Layer
from auxin.report.markup import Markup, join, shorten, tag
from auxin.report.plot import chart, percent, short, step_axis
from auxin.report.scale import Scale

SHADES = 6  # of the accent, from the first birth to the last; the style sheet has as many
MOST_ROWS = 64

_PITCH, _BAR, _ABOVE = 36.0, 10.0, 20.0  # pixels: from row to row, of the bar, of the label above it
_TOP = 4.0
_LETTER = 6.9  # pixels
_LAYOUTS = {"wide": (620.0, 0.7), "narrow": (300.0, 0.5)}  # pixels of the plot; births after this are "late"


def layer_section(layers: Sequence[Layer], x: Scale) -> Markup:
    """The bars, one row per layer in the order of the final network, original ones from the first step."""
    heading = tag("h2", "Layers", id="layers")
    if not any(layer.birth for layer in layers):
        note = tag("p", "No layer was added in this run.", class_="note")
        return tag("section", heading, note, aria_labelledby="layers")
    shown = _choose(layers)
    rows = {layer.path: row for row, layer in enumerate(shown) if layer.death is None}
    bottom = _TOP + _PITCH * len(shown) + 6
    old = sum(layer.birth is None for layer in layers)
    said = f"{old} from the start, {len(layers) - old} grown. Names as in the final network."
    picture = chart(
        "layer-chart",
        "Layers over steps",
        " ".join([said, *(_spoken(layer) for layer in shown[:24])]),
        bottom + 26,
        step_axis(x, _TOP, bottom),
        *(_connector(layer, row, rows, x) for row, layer in enumerate(shown)),
        *(_bar(layer, row, x) for row, layer in enumerate(shown)),
    )
    hidden = len(layers) - len(shown)
    return tag(
        "section",
        heading,
        tag("p", said, class_="note"),
        _shade_key(),
        tag("div", picture, class_="plot labelled"),
        tag("p", f"Not drawn: {hidden:,} more.", class_="note") if hidden else None,
        aria_labelledby="layers",
    )


def _choose(layers: Sequence[Layer]) -> list[Layer]:
    """At most `MOST_ROWS` layers; grown ones first, in their order."""
    if len(layers) <= MOST_ROWS:
        return list(layers)
    room = MOST_ROWS - sum(layer.birth is not None for layer in layers)
    kept = []
    for layer in layers:
        if layer.birth is None:
            room -= 1
        if len(kept) < MOST_ROWS and (layer.birth is not None or room >= 0):
            kept.append(layer)
    return kept


def _shade_key() -> Markup:
    """What the colours say."""
    shades = [tag("span", class_=f"swatch block shade{shade}", aria_hidden="true") for shade in range(SHADES)]
    original = tag("span", class_="swatch block original", aria_hidden="true")
    return tag(
        "p",
        tag("span", original, "from the start"),
        tag("span", "born early ", tag("span", *shades, class_="ramp"), " late"),
        class_="key",
    )


def _bar(layer: Layer, row: int, x: Scale) -> Markup:
    begin = x.at(layer.birth.step) if layer.birth else 0.0
    end = x.at(layer.death.step) if layer.death else 1.0
    top = _TOP + _PITCH * row + _ABOVE
    rect = tag(
        "rect",
        class_=f"bar {_shade(begin) if layer.birth else 'original'}",
        x=percent(begin),
        y=short(top),
        width=percent(max(end - begin, 0.002)),
        height=short(_BAR),
        rx="2",
    )
    labels = [_text(layer, begin, top - 5, layout) for layout in _LAYOUTS]
    return tag("g", tag("title", _spoken(layer)), rect, *labels, class_="layer")


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
        dx=shift if layer.birth else None,
        text_anchor="end" if begin > turn else None,
    )


def _label(layer: Layer, limit: int) -> str:
    """`blocks.2 ← blocks.1`, the source shortened first where it is long."""
    if not layer.source:
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
        said = f"{path}: growth {layer.birth.number}, step {layer.birth.step:g}"
        if layer.source:
            said += f", from {shorten(layer.source, 60)}"
        if layer.born_as != layer.path:
            said += f", born as {shorten(layer.born_as, 60)}"
    return f"{said}; removed at step {layer.death.step:g}." if layer.death else f"{said}."


def _shade(begin: float) -> str:
    return f"shade{min(SHADES - 1, int(begin * SHADES))}"


def _connector(layer: Layer, row: int, rows: dict[str, int], x: Scale) -> Markup | None:
    """A thin line from the source's bar to the new one, at its birth."""
    if not layer.birth or layer.source not in rows:
        return None
    place = percent(x.at(layer.birth.step))
    start, stop = (_TOP + _PITCH * at + _ABOVE + _BAR / 2 for at in (rows[layer.source], row))
    return join(
        tag("line", class_="branch", x1=place, x2=place, y1=short(start), y2=short(stop)),
        tag("circle", class_="branch-dot", cx=place, cy=short(start), r="3"),
    )
