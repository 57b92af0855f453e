"""The frame of a figure: heading, sentence, one drawing per axis, what the pointer reads, and the table behind it."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from auxin.report.axis import NAMES, Axis
from auxin.report.figures import significant
from auxin.report.markup import Markup, join, shorten, tag

_CELL = 120  # characters


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure.

    Attributes:
        caption: what they are, and of how many.
        columns: names; those of ``numeric`` stand on the right.
        rows: of text; the first cell names its row.
        numeric: indices of columns.
        marked: indices of rows that stand out.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    numeric: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()

    def drawn(self) -> Markup:
        """The table itself."""
        head = [_cell("th", name, at in self.numeric, "col") for at, name in enumerate(self.columns)]
        lines = [
            tag("tr", *(self._body(at, value) for at, value in enumerate(row)), class_=self._class(number))
            for number, row in enumerate(self.rows)
        ]
        return tag(
            "table",
            tag("caption", tag("span", self.caption)),
            tag("thead", tag("tr", *head)) if head else None,
            tag("tbody", *lines),
        )

    def _class(self, number: int) -> str | None:
        return "marked" if number in self.marked else None

    def _body(self, at: int, value: object) -> Markup:
        return _cell("td" if at else "th", value, at in self.numeric, None if at else "row")


def _cell(name: str, value: object, right: bool, scope: str | None) -> Markup:
    content = value if isinstance(value, Markup) else shorten(value, _CELL)
    return tag(name, content, class_="n" if right else None, scope=scope)


def section(name: str, heading: str, *content: object) -> Markup:
    """A part of the page under a heading."""
    return tag("section", tag("h2", heading, id=name), *content, aria_labelledby=name)


def drawings(name: str, axes: Sequence[Axis], draw: Callable[[Axis], Markup]) -> Markup:
    """One drawing per axis; the style sheet shows the one that was chosen."""
    return join(
        *(tag("div", draw(axis), class_=f"plot labelled by-{axis.key}", id=f"{name}-{axis.key}") for axis in axes)
    )


def scrolled(table: Table, name: str) -> Markup:
    """A table in a box of its own that scrolls, which the keyboard can reach."""
    return tag("div", table.drawn(), class_="scroll", role="region", aria_label=f"{name}, table", tabindex="0")


def behind(table: Table, name: str) -> Markup:
    """The table behind a figure, folded."""
    return tag("details", tag("summary", f"{name} as a table"), scrolled(table, name))


def note(text: str) -> Markup | None:
    """A sentence under a heading; None where there is nothing to say."""
    return tag("p", text, class_="note") if text else None


def readable(name: str, axes: Sequence[Axis], names: Sequence[str], rows: Sequence[Sequence[float]]) -> Markup:
    """The numbers that pointer and arrow keys read, and the line in which they appear.

    Args:
        name: of the figure.
        axes: those of its drawings.
        names: of the values.
        rows: a place on each axis (in the order of ``axes``), then the values.
    """
    data = {
        "axes": [[axis.key, axis.scale.low, axis.scale.high] for axis in axes],
        "names": [
            *(("call" if axis.suffix == "call" else axis.key) for axis in axes),
            *(shorten(n, 40) for n in names),
        ],
        "rows": [[None if not math.isfinite(value) else float(f"{value:.6g}") for value in row] for row in rows],
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return join(
        tag("p", "", class_="readout", aria_live="polite", id=f"{name}-readout"),
        tag("script", Markup(text), type="application/json", class_="data", data_for=name),
    )


def axis_switch(axes: Sequence[Axis]) -> Markup | None:
    """Buttons that choose the axis of all figures; None where there is one only."""
    if len(axes) < 2:
        return None
    buttons = []
    for axis in axes:
        box = {"type": "radio", "name": "axis", "id": f"axis-{axis.key}", "value": axis.key}
        checked = "checked" if axis.key == "step" else None
        buttons.append(tag("label", tag("input", **box, checked=checked), tag("span", NAMES[axis.key])))
    return tag("fieldset", tag("legend", "Horizontal axis"), *buttons, class_="switch")


def number(value: float | None, digits: int = 4) -> str:
    """A value of a table: a dash where it was not measured."""
    return (
        "–" if value is None or math.isnan(value) else "not finite" if math.isinf(value) else significant(value, digits)
    )
