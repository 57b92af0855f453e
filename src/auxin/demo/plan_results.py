"""The numbers of all plans: a table at equal additional FLOPs, and the sentence that they support."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from auxin.demo.demand import Demand
from auxin.demo.more_compute import PLANS, Setting
from auxin.verdict import Verdict

OLD, AS_JUDGED = "the old network", "as judged"
COLUMNS = ("blocks", "parameters", "training GFLOP", "test error per seed", "mean", "spread", "against going on")


@dataclass(frozen=True)
class Ended:
    """A network at the end of a plan.

    Attributes:
        blocks: how many it has.
        parameters: likewise.
        flops: that the plan has spent; the checks of the growth are in it.
        validation: error on the validation part.
        forecast: of the test part, (stretches, 48, forecasts) as nested lists; what happened there is looked at when
            all runs have ended.
    """

    blocks: int
    parameters: int
    flops: float
    validation: float
    forecast: list


@dataclass(frozen=True)
class Seed:
    """All runs of a seed: the verdict, and how the old network and every plan ended, by name."""

    verdict: Verdict
    ended: dict[str, Ended]


@dataclass(frozen=True)
class PlanResults:
    """What came of it.

    Attributes:
        setting: of the networks.
        naive: error of the last 24 hours, once more.
        errors: test error by plan, one per seed.
        runs: of each seed.
    """

    setting: Setting
    naive: float
    errors: dict[str, list[float]]
    runs: list[Seed]

    def mean(self, plan: str) -> float:
        """Test error, over the seeds."""
        return statistics.fmean(self.errors[plan])

    @property
    def best(self) -> str:
        """The plan with the lowest mean test error, known only after following all of them."""
        return min(PLANS, key=self.mean)

    @property
    def rival(self) -> str:
        """The better one of the plans that do not grow."""
        return min(("go on", "start anew"), key=self.mean)

    @property
    def judged(self) -> str:
        """The plan that the first seed was judged by."""
        return self.runs[0].verdict.best.name

    @property
    def cost(self) -> float:
        """FLOPs of a judgement, as a share of those that are added."""
        return statistics.fmean(run.verdict.price for run in self.runs) / self.setting.more

    @property
    def right(self) -> int:
        """In how many seeds the plan that was judged to be best was best on the test part."""
        best = [min(PLANS, key=lambda plan, at=seed: self.errors[plan][at]) for seed in range(len(self.runs))]
        return sum(run.verdict.best.name == plan for run, plan in zip(self.runs, best, strict=True))


def evaluate(data: Demand, setting: Setting, runs: list[Seed]) -> PlanResults:
    """Open the test part, once."""
    errors = {plan: [data.test.error(torch.tensor(run.ended[plan].forecast)) for run in runs] for plan in runs[0].ended}
    return PlanResults(setting, data.test.error(data.test.as_a_day_ago()), errors, runs)


def table(results: PlanResults) -> dict[str, Any]:
    """The rows as text: caption, columns, rows."""
    caption = (
        "Demand for electricity in Victoria, 2014: mean squared error of the next 48 half-hours, in units of the "
        "variance of demand, on four days of every 27, which no setting was chosen on. The plans have equal additional "
        f"FLOPs; '{AS_JUDGED}' has paid for the judgement out of them. Spread: standard deviation over the seeds."
    )
    naive = ["as a day ago", "–", "–", "–", "–", f"{results.naive:.4f}", "–", _against(results, results.naive)]
    order = (OLD, *PLANS, AS_JUDGED)
    columns, rows = ["", *COLUMNS], [naive, *(_cells(results, plan) for plan in order)]
    marked = [1 + order.index("grow")]
    return {"caption": caption, "columns": columns, "rows": rows, "marked": marked, "first": [columns.index("mean")]}


def _cells(results: PlanResults, plan: str) -> list[str]:
    ended, errors = [run.ended[plan] for run in results.runs], results.errors[plan]
    name = f"{plan} (judging paid)" if plan == AS_JUDGED else plan
    return [
        name,
        "-".join(str(blocks) for blocks in sorted({one.blocks for one in ended})),
        f"{max(one.parameters for one in ended):,}",
        f"{statistics.fmean(one.flops for one in ended) / 1e9:,.1f}",
        " ".join(f"{error:.4f}" for error in errors) if len(errors) > 1 else "–",
        f"{statistics.fmean(errors):.4f}",
        f"{statistics.stdev(errors):.4f}" if len(errors) > 1 else "–",
        "–" if plan == "go on" else _against(results, statistics.fmean(errors)),
    ]


def _against(results: PlanResults, error: float) -> str:
    return f"{100 * (error / results.mean('go on') - 1):+.0f} %"


def endings(results: PlanResults) -> str:
    """Three lines: where it started, what grew, and the best that does not grow."""
    setting, added = results.setting, f"{results.setting.more / 1e9:.3g} GFLOP more"
    rival = {"go on": "going on", "start anew": "starting anew"}[results.rival]
    return "\n".join(
        [
            f"started from  {results.mean(OLD):.4f}  {setting.small} blocks after {setting.spent / 1e9:.3g} GFLOP",
            f"grown         {results.mean('grow'):.4f}  {setting.large} blocks, {added}",
            f"best rival    {results.mean(results.rival):.4f}  {rival}, {added}",
        ]
    )


def sentence(results: PlanResults) -> str:
    """What the numbers support, whatever it is."""
    count = len(results.runs)
    plans = [run.verdict.best.name for run in results.runs]
    judged = ", ".join(f"{plan} ({plans.count(plan)} of {count})" for plan in PLANS if plan in plans)
    text = (
        f"auxin judged: {judged}, for {100 * results.cost:.0f} % of the FLOPs that were added. On the test part this "
        f"was the best plan in {results.right} of {count} runs; on their mean the best plan is to {results.best}."
    )
    for plan, name in (("go on", "going on"), ("start anew", "starting anew")):
        change = 1 - results.mean("grow") / results.mean(plan)
        text += f" Growing is {100 * abs(change):.0f} % {'better' if change > 0 else 'worse'} than {name}."
    return text + (
        f" Following the judgement, its cost paid out of the same FLOPs, ends at {results.mean(AS_JUDGED):.4f}; the "
        f"best plan, which nobody knows beforehand, at {results.mean(results.best):.4f}."
    )
