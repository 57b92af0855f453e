"""Tables: the results that the caller hands over, and the decisions of the run."""

import re
from collections.abc import Mapping, Sequence

from auxin.report.figure import Table, note, scrolled, section
from auxin.report.figures import finite, scaled, significant, span, whole
from auxin.report.markup import Markup, join, shorten, tag
from auxin.report.run import Decision, Growth, Run, counts, items

_CELL = 200  # characters
_COLUMNS = 40
_SHAPES = 3  # of a growth's resized tensors
ENOUGH_STEPS = 128  # of a branch, as in auxin.ledger, which a page does without


def result_section(table: Mapping | None, most: int = 20_000) -> Markup | None:
    """The caller's table; None without one.

    Args:
        table: {"caption": str, "columns": names, "rows": a list of rows}; the first column names its row. It may hold
            "marked", indices of rows that stand out, and "first", indices of columns that come next to the names.
        most: bytes of rows; what does not fit is counted.
    """
    if not table:
        return None
    rows = [_ordered(list(row)[:_COLUMNS], table) for row in table.get("rows") or ()]
    numeric = {place: _decimals(rows, place) for place in range(_COLUMNS) if _numeric(rows, place)}
    written = {place for place in range(1, _COLUMNS) if _written(rows, place)}
    lines = [[_result(value, place, numeric) for place, value in enumerate(row)] for row in rows]
    columns = _ordered(list(table.get("columns") or ())[:_COLUMNS], table)
    caption = shorten(table.get("caption") or "Results", 400)
    marked = frozenset(at for at in items(table.get("marked")) if type(at) is int)
    return _shown("Results", Table(caption, columns, lines, frozenset({*numeric, *written}), marked), most)


def _ordered(row: list, table: Mapping) -> list:
    """A row with what matters most next to its name, where a narrow page shows it."""
    first = [at for at in items(table.get("first")) if type(at) is int and 0 < at < len(row)]
    return [*row[:1], *(row[at] for at in first), *(cell for at, cell in enumerate(row) if at and at not in first)]


def decision_section(run: Run, most: int = 20_000) -> Markup:
    """One row per growth, and per decision that had to wait."""
    events = _events(run)
    if not events:
        return section("decisions", "Decisions", note("The journal is empty: nothing was grown."))
    columns = [
        tag("abbr", "#", title="number of the growth"),
        run.unit.capitalize(),
        "Edit",
        "Why",
        "Outcome",
        "Parameters added",
        "Function kept",
        "Gradient ratio",
        "Time in ms",
    ]
    ratios = _watched_ratios(run)
    rows = [_growth(e.growth, e, ratios) if e.growth else _waiting(e, count) for e, count in events]
    caption = (
        "What was decided, and what was checked. New layers by their names then, sources by those before. "
        "Function kept: the largest difference of the probe's outputs. Gradient ratio: at the last step that was "
        "watched, as in its chart; where none was, on the probe."
    )
    return _shown("Decisions", Table(caption, columns, rows, frozenset({0, 1, 5, 7, 8})), most)


def weighed_section(run: Run, most: int = 20_000) -> Markup | None:
    """One row per way to go on that a chooser has weighed, what knowing it has cost, and what the run has spent."""
    decisions = [(decision, one) for decision in run.decisions for one in decision.weighed]
    if not decisions and not any(flops for flops, _ in run.spent.values()):
        return None
    columns = [
        run.unit.capitalize(),
        "Way to go on",
        "",
        "Predicted gain",
        "Loss obtained",
        "Parameters",
        "FLOPs a step",
    ]
    rows = [row for decision, one in decisions for row in _weighed(decision, one)]
    caption = (
        "What was weighed. Predicted gain: what the first step on the new entries takes off the loss, to first order. "
        "Loss obtained: on validation data, at the end of a branch. Cost: of knowing; the training of a winner is kept."
    )
    table = Table(caption, [*columns, "Cost in FLOPs"], rows, frozenset({0, 3, 4, 5, 6, 7}))
    return join(_shown("Weighed", table, most) if rows else None, _spent(run))


def _weighed(decision: Decision, one: Mapping) -> list[list[object]]:
    """The rows of one decision; the first says when it was, and what it has cost."""
    rows: list[list[object]] = []
    for number, option in enumerate(option for option in items(one.get("options")) if isinstance(option, Mapping)):
        first, why_not = number == 0, option.get("why_not")
        chosen, steps = number == one.get("chosen"), finite(one.get("steps"))
        length = f" after {steps:,.0f} steps" if steps is not None else ""
        length += f", where a verdict wants {ENOUGH_STEPS}" if steps is not None and steps < ENOUGH_STEPS else ""
        rows.append(
            [
                whole(decision.at.step) if first else "",
                tag("code", shorten(str(option.get("edit")), 100)),
                f"chosen{length}" if chosen else f"no: {shorten(str(why_not), 100)}" if why_not else "",
                significant(finite(option.get("predicted")), 3),
                significant(finite(option.get("obtained"))),
                whole(option.get("parameters")),
                scaled(option.get("flops")),
                scaled(one.get("flops")) if first else "",
            ]
        )
    return rows


def _spent(run: Run) -> Markup | None:
    """The ledger."""
    total = sum(flops for flops, _ in run.spent.values())
    if not total:
        return None
    rows = [
        [kind, scaled(flops), f"{flops / total:.1%}", significant(seconds, 3) if seconds or not flops else "not timed"]
        for kind, (flops, seconds) in run.spent.items()
    ]
    caption = (
        "What the run has spent. The seconds of races hold what their winners trained; a loop of your own is not timed."
    )
    return _shown("Spent", Table(caption, ["On", "FLOPs", "Share", "Seconds"], rows, frozenset({1, 2, 3})), 4_000)


def _events(run: Run) -> list[tuple[Decision, int]]:
    """Growths and waits in their order; a wait that repeats itself is counted."""
    told = {id(decision.growth) for decision in run.decisions if decision.growth is not None}
    rest = [Decision(growth.at, "", growth=growth) for growth in run.growths if id(growth) not in told]
    everything = [*(one for one in run.decisions if one.reason or one.waiting or one.growth), *rest]
    everything = everything if not rest else sorted(everything, key=_when)
    found: list[tuple[Decision, int]] = []
    for event in everything:
        if found and event.growth is None and found[-1][0].growth is None:
            before, count = found[-1]
            if (before.waiting, before.reason, before.chosen) == (event.waiting, event.reason, event.chosen):
                found[-1] = (before, count + 1)
                continue
        found.append((event, 1))
    return found


def _when(event: Decision) -> float:
    return event.growth.number if event.growth else event.at.step


def _watched_ratios(run: Run) -> Mapping[int, Sequence[float]]:
    """By the number of a growth, the last ratio of each of its units."""
    last: dict[tuple[int, str], float] = {}
    for flow in run.flows:
        last.update({(flow.growth.number, unit): ratio for unit, ratio in flow.ratios.items()})
    found: dict[int, list[float]] = {}
    for (number, _), ratio in last.items():
        found.setdefault(number, []).append(ratio)
    return found


def _ratio(entry: Mapping, watched: Sequence[float]) -> str:
    """One ratio, or from the lowest to the highest of several units."""
    if watched:
        return span(min(watched), max(watched), lambda ratio: significant(ratio, 3)).replace(" → ", " to ") + "×"
    ratio = finite(entry.get("gradient_ratio"))
    return f"{significant(ratio, 3)}× (probe)" if ratio is not None else "–"


def _growth(growth: Growth, event: Decision, ratios: Mapping[int, Sequence[float]]) -> list[object]:
    entry = growth.entry
    added = "; ".join(f"{layer.path} ← {layer.source}" if layer.source else layer.path for layer in growth.added)
    said = added or _resized(str(entry.get("summary") or ""))
    edit = join(
        tag("code", shorten(growth.edit, 60)),
        tag("span", shorten(said, _CELL), class_="sub") if said else None,
    )
    seconds = finite(entry.get("seconds"))
    outcome = "kept"
    if growth.undone is not None:
        outcome = f"undone at {whole(growth.undone.step)}{f': {shorten(growth.why, 60)}' if growth.why else ''}"
    return [
        str(growth.number),
        whole(growth.at.step),
        edit,
        _why(event.reason, _metric(entry.get("metrics"))),
        outcome,
        _grown(growth),
        _preserved(entry),
        _ratio(entry, ratios.get(growth.number, ())),
        significant(seconds * 1000, 3) if seconds is not None else "–",
    ]


def _resized(summary: str) -> str:
    """The tensors that a change says it has given another shape, the first few; the rest has its own columns."""
    shapes = [part for part in summary.split(" · ") if re.search(r"\) -> \(", part)]
    further = re.search(r"and (one|\d+) more tensor", summary)
    more = len(shapes[_SHAPES:]) + (int(further[1].replace("one", "1")) if further else 0)
    told = [part.partition(") (")[0].removesuffix(")") + ")" for part in shapes[:_SHAPES]]
    told += [f"and {more} more tensor{'s'[: more > 1]}"] if more else []
    return "; ".join(told).replace("->", "→") or summary


def _waiting(event: Decision, count: int) -> list[object]:
    """A decision that did not grow, or not yet."""
    grew_not = "not grown" if event.chosen else "stays as it is" if event.weighed else "nothing to grow"
    outcome = f"waited: {event.waiting}" if event.waiting else grew_not
    outcome = shorten(outcome, 120) + (f" ({count:,} times)" if count > 1 else "")
    chosen = tag("code", shorten(event.chosen, 60)) if event.chosen else "–"
    return ["–", whole(event.at.step), chosen, _why(event.reason, ""), outcome, "–", "–", "–", "–"]


def _why(reason: str, metric: str) -> Markup:
    """The trigger, and below it what it had read."""
    parts = [shorten(text, 100) for text in (reason, metric) if text]
    return join(parts[0] if parts else "–", *(tag("span", part, class_="sub") for part in parts[1:]))


def _metric(metrics: object) -> str:
    if not isinstance(metrics, Mapping):
        return "" if metrics is None else significant(metrics)
    return ", ".join(f"{name} {significant(value)}" for name, value in list(metrics.items())[:3])


def _grown(growth: Growth) -> str:
    """Parameters added: from the totals, or where they are not known, from the layers."""
    before, after = counts(growth.entry)
    if before is not None and after is not None:
        share = f" ({(after - before) / before * 100:+.0f} %)" if before else ""
        return f"{after - before:+,.0f}{share}"
    known = [layer.parameters for layer in growth.added if layer.parameters is not None]
    return f"{sum(known):+,.0f}" if known else "–"


def _preserved(entry: Mapping) -> str:
    preserved, difference = entry.get("preserved"), finite(entry.get("max_difference"))
    word = "–" if preserved is None else "yes" if preserved else "no"
    if difference is None:
        return word if entry.get("max_difference") is None else f"{word}, {entry['max_difference']}"
    return f"{word}, {'0 (to the bit)' if difference == 0 else significant(difference, 2)}"


def _shown(name: str, table: Table, most: int) -> Markup:
    """A table in its own section; rows beyond so many bytes are counted."""
    kept, size = [], 0
    for row in table.rows:
        size += len(Table("", [], [row], table.numeric).drawn().encode())
        if size > most:
            break
        kept.append(row)
    hidden = len(table.rows) - len(kept)
    shown = Table(table.caption, table.columns, kept, table.numeric, table.marked)
    return section(name.lower(), name, scrolled(shown, name), note(f"Not shown: {hidden:,} more." if hidden else ""))


def _result(value: object, place: int, numeric: Mapping[int, int | None]) -> str:
    """A cell of the caller's table; the numbers of a column share their decimals."""
    decimals = numeric.get(place)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if decimals is not None and finite(value) is not None:
        return f"{finite(value):,.{decimals}f}"
    return significant(value) if _is_number(value) else str(value)


def _decimals(rows: Sequence[Sequence], place: int) -> int | None:
    """The fewest decimals that give a column's numbers four significant digits; None: none would do."""
    texts = [significant(row[place]) for row in rows if place < len(row) and finite(row[place]) is not None]
    if any("e" in text for text in texts):
        return None
    return max((len(text.partition(".")[2].rstrip("0")) for text in texts), default=None)


_WRITTEN = re.compile(r"[-+−]?\d[\d,.]*(?:[- ]\d[\d,.]*)*%?|–|")


def _written(rows: Sequence[Sequence], place: int) -> bool:
    """Whether a column holds numbers that the caller has written out, so that they too line up on the right."""
    texts = [row[place] for row in rows if place < len(row) and row[place] is not None]
    return bool(texts) and all(isinstance(text, str) and _WRITTEN.fullmatch(text) for text in texts)


def _is_number(value: object) -> bool:
    return not isinstance(value, str | bool) and hasattr(value, "__float__")


def _numeric(rows: Sequence[Sequence], place: int) -> bool:
    """Whether a column holds numbers (or nothing), so that they line up on the right."""
    values = [row[place] for row in rows if place < len(row) and row[place] is not None]
    return bool(values) and all(_is_number(value) for value in values)
