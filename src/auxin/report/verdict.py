"""Did growing help? One sentence, and a row per growth with what was before it, after it, and what it cost."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auxin.report.curves import main_metric, said_of, within
from auxin.report.figure import Table, note, scrolled, section
from auxin.report.figures import finite, scaled, significant, span, whole
from auxin.report.markup import Markup, shorten, tag
from auxin.report.run import Growth, Run, counts, items

_MOST = 60  # rows
_RISING = re.compile(
    r"(^|[^a-z])(acc|accuracy|auc|auroc|f1|iou|precision|recall|r2|bleu|score)([^a-z]|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class Step:
    """One growth that was kept, with what the metric was around it.

    Attributes:
        growth: which.
        before: best value up to it.
        after: best value from it to the next growth, or to the end.
        ungrown: loss of the branch that did not grow, where a chooser has compared; "obtained" in the ledger.
        grown: of the branch that was chosen.
        flops: from it to the next growth, or to the end.
    """

    growth: Growth
    before: float | None
    after: float | None
    ungrown: float | None
    grown: float | None
    flops: float | None


def rising(run: Run, name: str) -> bool:
    """Whether a larger value of a metric is the better one: as its trigger says, else by its name."""
    reasons = " ".join(dict.fromkeys(decision.reason for decision in run.decisions))
    said = re.search(r"mode='(min|max)'", reasons)
    return said[1] == "max" if said else _RISING.search(name) is not None


def verdict(run: Run) -> str:
    """What the numbers of a run say about growing, in a sentence; what they cannot say, too."""
    name = main_metric(run)
    if name is None:
        return ""
    up = rising(run, name)
    found = _best(run, name, up)
    if found is None:
        return ""
    value, at = found
    steps = steps_of(run, name, up)
    best = f"Best {within(name)} {significant(value)} at {run.unit} {whole(run.readings.moment(at).step)}"
    if not steps:
        return f"{best}. Nothing has grown in this run." if not run.growths else f"{best}. No growth was kept."
    first = steps[0].before
    came = "" if first is None else f", against {significant(first)} before the first growth"
    compared = [(one.ungrown, one.grown) for one in steps if one.ungrown is not None and one.grown is not None]
    if compared:
        better = sum(grown < ungrown for ungrown, grown in compared)
        gain = sum(ungrown - grown for ungrown, grown in compared) / len(compared)
        told = "Growing helped" if better == len(compared) else "Growing did not help" if not better else "Mixed"
        rest = len(steps) - len(compared)
        more = f"; {rest} more {'was' if rest == 1 else 'were'} not compared" if rest else ""
        return (
            f"{told}: {better} of {len(compared)} growths ended below a branch that did not grow, by "
            f"{significant(gain, 3)} on the mean{more}. {best}, against {significant(compared[0][0])} in the first "
            "branch that did not grow."
        )
    worse = first is not None and (value <= first if up else value >= first)
    if worse:
        return f"Growing did not help: nothing after the first growth is better than before. {best}."
    return f"{best}{came}. No branch without growth was run, so how much of it growing has brought is not known."


def as_data(run: Run, title: str) -> dict[str, Any]:
    """The verdict and the growths that were kept, as plain data; None is "not known"."""
    name = main_metric(run)
    up = name is not None and rising(run, name)
    steps = [] if name is None else steps_of(run, name, up)
    rows = [
        {
            "number": one.growth.number,
            "step": finite(one.growth.at.step),
            "edit": one.growth.edit,
            "best_before": one.before,
            "best_after": one.after,
            "branch_not_grown": one.ungrown,
            "branch_grown": one.grown,
            "parameters": dict(zip(("before", "after"), counts(one.growth.entry), strict=True)),
            "flops_after": one.flops,
        }
        for one in steps
    ]
    undone = len(run.growths) - len(run.kept)
    told = {"verdict": verdict(run), "metric": name, "better": None if name is None else "max" if up else "min"}
    return {"title": title, **told, "growths": rows, "undone": undone, "notes": list(run.notes)}


def steps_of(run: Run, name: str, up: bool) -> list[Step]:
    """The growths that were kept, in their order."""
    live = [at for at in run.branches()[0][1] if math.isfinite(run.readings.metrics[name][at])]
    values, flops = run.readings.metrics[name], run.readings.columns["flops"]
    kept, found = run.kept, []
    best = max if up else min
    for number, growth in enumerate(kept):
        end = kept[number + 1].first if number + 1 < len(kept) else len(run.readings)
        before, after = (
            [values[at] for at in live if at < growth.first],
            [values[at] for at in live if growth.first <= at < end],
        )
        ends = [flops[at] for at in live if growth.first <= at < end and math.isfinite(flops[at])]
        cost = ends[-1] - growth.at.flops if ends and math.isfinite(growth.at.flops) else None
        ungrown, grown = _compared(run, growth)
        found.append(Step(growth, best(before, default=None), best(after, default=None), ungrown, grown, cost))
    return found


def growth_section(run: Run) -> Markup | None:
    """A row per growth that was kept; None without any, or where nothing was measured."""
    name = main_metric(run)
    if name is None or not run.kept:
        return None
    up = rising(run, name)
    steps = steps_of(run, name, up)
    known = [one.after for one in steps if one.after is not None]
    best_of = max if up else min
    best = best_of(known, default=None)
    compared = any(one.ungrown is not None for one in steps)
    rows, marked = [], set()
    for one in steps[:_MOST]:
        gained = one.before is None or one.after is None or best_of(one.before, one.after) != one.before
        if one.after is not None and one.after == best and gained:
            marked.add(len(rows))
        before, after = counts(one.growth.entry)
        change = None if one.before is None or one.after is None else one.after - one.before
        rows.append(
            [
                str(one.growth.number),
                tag("code", shorten(one.growth.edit, 60)),
                significant(one.before),
                significant(one.after),
                "–" if change is None else f"{'+' if change > 0 else ''}{significant(change, 3)}",
                *([significant(one.ungrown), significant(one.grown)] if compared else []),
                whole(one.growth.at.step),
                span(before, after, scaled),
                scaled(one.flops, "kMGTPEZ", " "),
            ]
        )
    said = f"The better one is the {'larger' if up else 'smaller'}. The best is marked, where it is better than before."
    if not compared:
        said += (
            " No branch without growth was run beside these, so they show what came with a growth, not because of it."
        )
    columns = [tag("abbr", "#", title="number of the growth"), "Grown", "Best before", "Best after", "Change"]
    columns += ["Branch not grown", "Branch grown"] if compared else []
    columns += [run.unit.capitalize(), "Parameters", "FLOPs spent after"]
    caption = f"{said_of(name)[:1].upper()}{said_of(name)[1:]} before each growth, and until the next one."
    table = Table(caption, columns, rows, frozenset({0, *range(2, len(columns))}), frozenset(marked))
    return section("growths", "Did growing help?", note(said), scrolled(table, "Did growing help?"))


def _best(run: Run, name: str, up: bool) -> tuple[float, int] | None:
    values = run.readings.metrics[name]
    live = [at for at in run.branches()[0][1] if math.isfinite(values[at])]
    if not live:
        return None
    at = (max if up else min)(live, key=values.__getitem__)
    return values[at], at


def _compared(run: Run, growth: Growth) -> tuple[float | None, float | None]:
    """The losses of the branch that did not grow and of the one that was chosen, at one growth."""
    weighed = [one for decision in run.decisions if decision.growth is growth for one in decision.weighed]
    for one in weighed:
        options = _options(one.get("options"))
        chosen = one.get("chosen")
        if type(chosen) is int and 0 <= chosen < len(options):
            stays = next((o for o in options if o.get("edit") == "as it is"), {})
            return finite(stays.get("obtained")), finite(options[chosen].get("obtained"))
    return None, None


def _options(given: object) -> Sequence[Mapping]:
    found: Iterable = items(given)
    return [one for one in found if isinstance(one, Mapping)]
