"""The numbers of all runs: a table at equal training FLOPs, and the sentence that they support."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from auxin.demo.series import Task, median, seasonal_naive, smape
from auxin.demo.training import Outcome

# Makridakis and Hibon (2000), International Journal of Forecasting 16(4), 451-476: symmetric MAPE on the monthly
# series, average over horizons 1 to 18. docs/demo.md says what of it we could check.
PUBLISHED = {"Theta (competition, published)": 13.85, "Naive2 (competition, published)": 16.91}

COLUMNS = ("depth", "parameters", "training GFLOP", "sMAPE per seed", "mean", "spread", "against depth {start}")


@dataclass(frozen=True)
class Row:
    """One line of the table; None is "does not apply".

    Attributes:
        name: what was forecast with.
        depth: blocks of each run at its end.
        parameters: largest of the runs.
        flops: of training one run, all that was spent.
        scores: test sMAPE per seed, in percent.
        differences: scores minus those of the depth that growing starts from, seed by seed.
    """

    name: str
    scores: list[float]
    depth: list[int] | None = None
    parameters: int | None = None
    flops: float | None = None
    differences: list[float] | None = None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Results:
    """All rows, and what follows from them.

    Attributes:
        task: whose futures were looked at.
        naive: the seasonal naive forecast.
        fixed: by depth.
        grown: the growing network.
        ensemble: the median of the grown ones.
        members: how many those were.
        rivals: the median of the runs of the best fixed depth, once that is known.
        published: names and figures of others.
        start: the depth that growing starts from.
    """

    task: Task
    naive: Row
    fixed: dict[int, Row]
    grown: Row
    ensemble: Row
    members: int
    rivals: Row
    published: list[Row]
    start: int

    @property
    def best(self) -> int:
        """The fixed depth with the lowest mean, known only after trying all of them."""
        return _best(self.fixed)

    @property
    def flops_of_trying(self) -> float:
        """What it costs to train every fixed depth once."""
        return sum(row.flops or 0.0 for row in self.fixed.values())

    @property
    def behind(self) -> float:
        """How much worse the grown network's mean is than the best fixed depth's, as a share; below 0: better."""
        return self.grown.mean / self.fixed[self.best].mean - 1

    @property
    def gained(self) -> float:
        """By how much the grown network's mean error is below that of the depth it started from, seed by seed."""
        return -statistics.fmean(self.grown.differences or [0.0])

    @property
    def rows(self) -> list[Row]:
        """In the order of the table."""
        best = self.fixed[self.best]
        all_depths = ", ".join(str(depth) for depth in self.fixed)
        trying = Row(
            f"best of depths {all_depths}: all tried", best.scores, best.depth, best.parameters, self.flops_of_trying
        )
        return [self.naive, *self.fixed.values(), self.grown, trying, self.ensemble, self.rivals, *self.published]


def evaluate(task: Task, outcomes: list[Outcome], seeds: int, published: dict[str, float]) -> Results:
    """Open the test part, once.

    Args:
        task: with the futures.
        outcomes: of every run.
        seeds: the first so many of each kind make the table; further grown ones are in the ensemble only.
        published: figures of others for the same series.
    """
    forecasts = {id(outcome): torch.tensor(outcome.forecast) for outcome in outcomes}
    scores = {id(outcome): smape(task.futures, forecasts[id(outcome)]) for outcome in outcomes}
    grown = sorted((o for o in outcomes if o.job.grows), key=lambda o: o.job.seed)
    start = grown[0].job.depth
    by_depth: dict[int, list[Outcome]] = {}
    for outcome in sorted((o for o in outcomes if not o.job.grows), key=lambda o: (o.job.depth, o.job.seed)):
        by_depth.setdefault(outcome.job.depth, []).append(outcome)
    baseline = [scores[id(outcome)] for outcome in by_depth[start][:seeds]]

    def row(name: str, runs: list[Outcome], compare: bool) -> Row:
        own = [scores[id(outcome)] for outcome in runs]
        differences = [score - base for score, base in zip(own, baseline, strict=True)] if compare else None
        flops = statistics.fmean(outcome.flops for outcome in runs)
        depths, parameters = [outcome.depth for outcome in runs], max(outcome.parameters for outcome in runs)
        return Row(name, own, depths, parameters, flops, differences)

    def combined(name: str, runs: list[Outcome], flops: float) -> Row:
        score = smape(task.futures, median([forecasts[id(outcome)] for outcome in runs]))
        return Row(name, [score], [o.depth for o in runs], sum(o.parameters for o in runs), flops)

    fixed = {d: row(f"fixed depth {d}", runs[:seeds], d != start) for d, runs in by_depth.items()}
    best = _best(fixed)
    tried = sum(runs[0].flops for runs in by_depth.values())
    return Results(
        task=task,
        naive=Row("seasonal naive" if task.season > 1 else "naive", [smape(task.futures, seasonal_naive(task))]),
        fixed=fixed,
        grown=row(f"grown from depth {start}", grown[:seeds], True),
        ensemble=combined(f"median of {len(grown)} grown", grown, sum(o.flops for o in grown)),
        rivals=combined(
            f"median of {seeds} fixed depth {best}: all tried",
            by_depth[best][:seeds],
            tried + sum(o.flops for o in by_depth[best][1:seeds]),
        ),
        members=len(grown),
        published=[Row(name, [figure]) for name, figure in published.items()],
        start=start,
    )


def table(results: Results) -> dict[str, Any]:
    """The rows as text: caption, columns, rows."""
    caption = (
        f"{results.task.name}: sMAPE in percent on the last {results.task.horizon} values of "
        f"{len(results.task.histories):,} series, which no setting was chosen on. Equal training FLOPs: deeper "
        "networks take fewer steps, each run with its own fully decayed learning rate. Spread: standard deviation "
        "over the seeds."
    )
    columns = ["", *(name.format(start=results.start) for name in COLUMNS)]
    rows, mean = results.rows, columns.index("mean")
    marked = [at for at, row in enumerate(rows) if row is results.grown]
    return {
        "caption": caption,
        "columns": columns,
        "rows": [_cells(r) for r in rows],
        "marked": marked,
        "first": [mean],
    }


def endings(results: Results) -> str:
    """Three lines: where it started, what grew, and the best that does not grow."""
    best, start = results.fixed[results.best], results.fixed[results.start]
    return "\n".join(
        [
            f"started from  {start.mean:.2f}  fixed {_blocks(results.start)}",
            f"grown         {results.grown.mean:.2f}  {_depths(results.grown)} blocks",
            f"best rival    {best.mean:.2f}  fixed {_blocks(results.best)}, the best of {len(results.fixed)} depths",
        ]
    )


def sentence(results: Results) -> str:
    """What the numbers support, whatever it is."""
    grown, best, start = results.grown, results.fixed[results.best], results.fixed[results.start]
    depths = sorted(set(grown.depth or []))
    ended = _blocks(depths[0]) if len(depths) == 1 else f"{depths[0]} to {_blocks(depths[-1])}"
    place = f"{100 * abs(results.behind):.1f} % {'worse' if results.behind > 0 else 'better'} than"
    verb = "better than" if results.gained > 0 else "worse than"
    share = (grown.flops or 0.0) / results.flops_of_trying
    text = (
        f"The network that grew by itself from {_blocks(results.start)} to {ended} forecasts with a sMAPE of "
        f"{grown.mean:.2f} % (mean of {len(grown.scores)}): {place} the best fixed depth ({_blocks(results.best)}, "
        f"{best.mean:.2f}), which only trying {', '.join(map(str, results.fixed))} reveals, at {share:.3f} of the "
        f"training FLOPs of trying; and {abs(results.gained):.2f} points {verb} the depth that it started from "
        f"({start.mean:.2f})."
    )
    worth = ""
    if results.gained <= 0:
        worth = " Growing did not pay here: staying at the depth of the start would have done as well."
    elif results.behind > 0:
        worth = f" Whoever knew beforehand that {_blocks(results.best)} do best had no need to grow."
    ensemble = f" The median of {results.members} grown networks reaches {results.ensemble.mean:.2f}"
    theirs = "".join(f", {row.name} {row.mean:.2f}" for row in results.published)
    return text + worth + ensemble + theirs + "."


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"


def printed(content: dict[str, Any]) -> str:
    """A table as plain text, columns aligned."""
    lines = [content["columns"], *content["rows"]]
    widths = [max(len(str(line[place])) for line in lines) for place in range(len(content["columns"]))]
    text = []
    for line in lines:
        cells = [str(value).rjust(width) for value, width in zip(line, widths, strict=True)]
        cells[0] = str(line[0]).ljust(widths[0])
        text.append("  ".join(cells).rstrip())
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join(text)


def _best(fixed: dict[int, Row]) -> int:
    return min(fixed, key=lambda depth: fixed[depth].mean)


def _depths(row: Row) -> str:
    depths = sorted(set(row.depth or []))
    return "-".join(map(str, depths[:1] + depths[1:][-1:]))


def _cells(row: Row) -> list[str]:
    differences = row.differences
    return [
        row.name,
        _depths(row) or "–",
        "–" if row.parameters is None else f"{row.parameters:,}",
        "–" if row.flops is None else f"{row.flops / 1e9:,.1f}",
        " ".join(f"{score:.2f}" for score in row.scores) if len(row.scores) > 1 else "–",
        f"{row.mean:.2f}",
        "–" if row.spread is None else f"{row.spread:.2f}",
        "–" if differences is None else f"{statistics.fmean(differences):+.2f}",
    ]
