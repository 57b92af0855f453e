"""Tables: the results that the caller hands over, and the decisions of the journal."""

from collections.abc import Mapping, Sequence

from auxin.report.figures import finite, significant, whole
from auxin.report.markup import Markup, join, shorten, tag
from auxin.report.reading import Growth

_BYTES = 20_000  # of rows; what does not fit is counted
_CELL = 200  # characters
_COLUMNS = 40


def result_section(table: Mapping | None) -> Markup | None:
    """The caller's table; None without one.

    Args:
        table: {"caption": str, "columns": names, "rows": a list of rows}; the first column names its row.
    """
    if not table:
        return None
    columns = list(table.get("columns") or ())[:_COLUMNS]
    rows = [list(row)[:_COLUMNS] for row in table.get("rows") or ()]
    numeric = {place: _decimals(rows, place) for place in range(_COLUMNS) if _numeric(rows, place)}
    head = [_cell("th", name, place in numeric, "col") for place, name in enumerate(columns)]
    lines = [join(*(_result(value, place, numeric) for place, value in enumerate(row))) for row in rows]
    caption = shorten(table.get("caption") or "Results", 400)
    return _section("Results", caption, head, lines)


def decision_section(growths: Sequence[Growth]) -> Markup:
    """One row per growth of the journal."""
    if not growths:
        return tag(
            "section",
            tag("h2", "Decisions", id="decisions"),
            tag("p", "The journal is empty: nothing was grown.", class_="note"),
            aria_labelledby="decisions",
        )
    names = (
        ("", True),
        ("Step", True),
        ("Edit", False),
        ("Metric", False),
        ("Parameters added", True),
        ("Preserved, max |d|", False),
        ("Gradient ratio", True),
        ("Time in ms", True),
    )
    number = tag("abbr", "#", title="number of the growth")
    head = [_cell("th", name or number, right, "col") for name, right in names]
    caption = "What was grown, and what was checked. New layers by their names then, sources by those before."
    return _section("Decisions", caption, head, [_decision(growth) for growth in growths])


def _decision(growth: Growth) -> Markup:
    entry = growth.entry
    added = "; ".join(f"{layer.path} ← {layer.source}" if layer.source else layer.path for layer in growth.added)
    said = added or entry.get("summary")
    edit = join(
        tag("code", shorten(growth.edit, 60)),
        tag("span", shorten(said, _CELL), class_="sub") if said else None,
    )
    seconds = finite(entry.get("seconds"))
    ratio = finite(entry.get("gradient_ratio"))
    return join(
        _cell("th", growth.number, True, "row"),
        _cell("td", whole(growth.step), True),
        _cell("td", edit, False),
        _cell("td", _metric(entry.get("metrics")), False),
        _cell("td", _grown(growth), True),
        _cell("td", _preserved(entry), False),
        _cell("td", significant(ratio, 3) + "×" if ratio is not None else "–", True),
        _cell("td", significant(seconds * 1000, 3) if seconds is not None else "–", True),
    )


def _metric(metrics: object) -> str:
    if not isinstance(metrics, Mapping):
        return "–" if metrics is None else significant(metrics)
    return ", ".join(f"{name} {significant(value)}" for name, value in list(metrics.items())[:3]) or "–"


def _grown(growth: Growth) -> str:
    """Parameters added: from the totals, or where they are not known, from the layers."""
    totals = growth.entry.get("parameters")
    if isinstance(totals, Mapping):
        before, after = finite(totals.get("before")), finite(totals.get("after"))
        if before is not None and after is not None:
            share = f" ({(after - before) / before * 100:+.0f} %)" if before else ""
            return f"{after - before:+,.0f}{share}"
    counts = [finite(layer.parameters) for layer in growth.added]
    known = [count for count in counts if count is not None]
    return f"{sum(known):+,.0f}" if known else "–"


def _preserved(entry: Mapping) -> str:
    preserved, difference = entry.get("preserved"), finite(entry.get("max_difference"))
    word = "–" if preserved is None else "yes" if preserved else "no"
    if difference is None:
        return word if entry.get("max_difference") is None else f"{word}, {entry['max_difference']}"
    return f"{word}, {'0 (to the bit)' if difference == 0 else significant(difference, 2)}"


def _section(name: str, caption: str, head: Sequence[Markup], rows: Sequence[Markup]) -> Markup:
    """A table that scrolls inside its own box, which the keyboard can reach."""
    kept, size = [], 0
    for row in rows:
        size += len(row.encode())
        if size > _BYTES:
            break
        kept.append(tag("tr", row))
    table = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", *head)) if head else None,
        tag("tbody", *kept),
    )
    hidden = len(rows) - len(kept)
    identity = name.lower()
    return tag(
        "section",
        tag("h2", name, id=identity),
        tag("div", table, class_="scroll", role="region", aria_label=f"{name}, table", tabindex="0"),
        tag("p", f"Not shown: {hidden:,} more.", class_="note") if hidden else None,
        aria_labelledby=identity,
    )


def _cell(name: str, value: object, right: bool, scope: str | None = None) -> Markup:
    content = value if isinstance(value, Markup) else shorten(value, _CELL)
    return tag(name, content, class_="n" if right else None, scope=scope)


def _result(value: object, place: int, numeric: Mapping[int, int | None]) -> Markup:
    """A cell of the caller's table; the numbers of a column share their decimals."""
    decimals = numeric.get(place)
    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "–"}[value]
    elif decimals is not None and finite(value) is not None:
        text = f"{finite(value):,.{decimals}f}"
    else:
        text = significant(value) if _is_number(value) else str(value)
    return _cell("td" if place else "th", text, place in numeric, None if place else "row")


def _decimals(rows: Sequence[Sequence], place: int) -> int | None:
    """The fewest decimals that give a column's numbers four significant digits; None: none would do."""
    texts = [significant(row[place]) for row in rows if place < len(row) and finite(row[place]) is not None]
    if any("e" in text for text in texts):
        return None
    return max((len(text.partition(".")[2].rstrip("0")) for text in texts), default=None)


def _is_number(value: object) -> bool:
    return not isinstance(value, str | bool) and hasattr(value, "__float__")


def _numeric(rows: Sequence[Sequence], place: int) -> bool:
    """Whether a column holds numbers (or nothing), so that they line up on the right."""
    values = [row[place] for row in rows if place < len(row) and row[place] is not None]
    return bool(values) and all(_is_number(value) for value in values)
