"""The first part of the demo: a forecaster that is too small, and a quarter more compute."""

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from auxin.demo.demand import LEAD, Demand
from auxin.demo.folder import SMOKE, closing, one_thread, prepare, save_run
from auxin.demo.more_compute import PLANS, Bench, Setting, judge, old_network, planned
from auxin.demo.plan_results import AS_JUDGED, OLD, Ended, PlanResults, Seed, endings, evaluate, sentence, table
from auxin.demo.results import printed
from auxin.demo.screen import Screen
from auxin.report import Report
from auxin.verdict import Verdict

_LOGGED = 100  # readings of the run that is shown


def run_electricity(data: Demand, setting: Setting, seeds: int, out: Path, screen: Screen) -> PlanResults:
    """Judge which plan to follow, then follow every one, so that everybody sees whether the judgement was right.

    Args:
        data: demand.
        setting: of the networks, and how much compute there is.
        seeds: runs of each plan; the first is shown.
        out: directory for checkpoint, journal.json, metrics.jsonl and report.html.
        screen: where to show it.

    Raises:
        DemoError: the directory cannot be written.
    """
    begin = time.perf_counter()
    prepare(out)
    with one_thread(), ProcessPoolExecutor(2, get_context("spawn")) as pool:
        waiting = [pool.submit(run_seed, data, setting, seed) for seed in range(1, seeds)]
        try:
            shown = Shown(data, setting, screen)
            runs = [shown.go(), *(one.result() for one in waiting)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    results = evaluate(data, setting, runs)
    content, text = table(results), SMOKE if setting.smoke else sentence(results)
    bench = shown.bench
    journal = bench.grower.journal.to_json()
    save_run(out, bench.grower, journal, shown.metrics, {"steps": bench.steps, "flops": bench.spent})
    report = Report.from_metrics(
        journal,
        shown.metrics,
        title="auxin demo: demand for electricity in Victoria",
        sentence=text,
        table=content,
        forecasts=_examples(data, torch.tensor(runs[0].ended["grow"].forecast)),
        shapes={name: tuple(parameter.shape) for name, parameter in bench.network.named_parameters()},
    )
    report.write(out / "report.html")
    ended = "" if setting.smoke else f"\n{endings(results)}\n"
    screen.line(f"{ended}\n{printed(content)}\n\n{content['caption']}\n\n{text}\n")
    screen.line(closing(time.perf_counter() - begin, out))
    return results


def follow_all(old: Bench, setting: Setting, verdict: Verdict) -> Iterator[tuple[str, Bench, Iterator[float]]]:
    """Every plan in turn from the same old network, the one that grows last, which stays; take all of its losses."""
    for plan in (*(one for one in PLANS if one != "grow"), AS_JUDGED):
        followed, paid = (verdict.best.name, verdict.price) if plan == AS_JUDGED else (plan, 0.0)
        with old.branch():
            yield plan, *planned(followed, old, setting.more - paid)
    yield "grow", *planned("grow", old, setting.more)


def run_seed(data: Demand, setting: Setting, seed: int) -> Seed:
    """All runs of one seed."""
    torch.set_num_threads(1)
    old, losses = old_network(data, setting, seed)
    _all(losses)
    ended = {OLD: _ended(data, old, 0.0)}
    before = old.spent
    verdict = judge(old, setting.more)
    for plan, bench, losses in follow_all(old, setting, verdict):
        _all(losses)
        ended[plan] = _ended(data, bench, before)
    return Seed(verdict, ended)


class Shown:
    """The runs of the first seed, with what is to be seen of them.

    Args:
        data: demand.
        setting: of the networks.
        screen: where to show it.
    """

    def __init__(self, data: Demand, setting: Setting, screen: Screen):
        self.data, self.setting, self.screen = data, setting, screen
        self.metrics: list[dict[str, Any]] = []
        self.bench, self._losses = old_network(data, setting, 0)
        self._begin = time.perf_counter()

    def go(self) -> Seed:
        """Train, judge, and follow every plan."""
        setting, screen, old = self.setting, self.screen, self.bench
        screen.line(
            "Demand for electricity in Victoria, half-hourly: the next 24 hours are forecast. A network of "
            f"{setting.small} blocks, which looks back {_hours(setting.small)}, trains for {setting.spent / 1e9:.3g} "
            f"GFLOP. Then there are {setting.more / 1e9:.3g} GFLOP more: to go on, to grow to {setting.large} blocks "
            f"({_hours(setting.large)}), or to start anew with as many."
        )
        self._watch(old, self._losses, setting.spent, "the old network")
        ended = {OLD: _ended(self.data, old, 0.0)}
        before = old.spent
        screen.line(f"trained; error on the validation part {ended[OLD].validation:.4f}. Pilots of the three plans:")
        verdict = judge(old, setting.more)
        screen.line(f"{verdict}\n")
        for plan, bench, losses in follow_all(old, setting, verdict):
            if plan == "grow":
                screen.line(f"grown: {old.grower.journal.to_json()[-1]['summary']}")
                self._watch(old, losses, before + setting.more, plan)
            else:
                _all(losses)
                screen.line(f"{plan}: done")
            ended[plan] = _ended(self.data, bench, before)
        return Seed(verdict, ended)

    def _watch(self, bench: Bench, losses: Iterator[float], end: float, name: str) -> None:
        """Take the losses, and show and write down their means; what is validated here decides nothing."""
        some: list[float] = []
        begin = due = bench.spent
        for loss in losses:
            some.append(loss)
            if bench.spent < due:
                continue
            due += (self.setting.spent + self.setting.more) / _LOGGED
            validation = self.data.validation.error(self.data.validation.forecast(bench.network))
            self.metrics.append(
                {
                    "step": bench.steps,
                    "seconds": round(time.perf_counter() - self._begin, 3),
                    "flops": bench.spent,
                    "loss": sum(some) / len(some),
                    "validation": validation,
                    "parameters": _size(bench),
                    "depth": len(bench.network.blocks),
                }
            )
            some.clear()
            share = (bench.spent - begin) / (end - begin)
            self.screen.bar(min(1.0, share), f"{name}: validation {validation:.4f} · {bench.spent / 1e9:.0f} GFLOP")
        self.screen.close()


def _all(losses: Iterator[float]) -> None:
    for _ in losses:
        pass


def _ended(data: Demand, bench: Bench, before: float) -> Ended:
    return Ended(
        blocks=len(bench.network.blocks),
        parameters=_size(bench),
        flops=bench.spent - before,
        validation=data.validation.error(data.validation.forecast(bench.network)),
        forecast=data.test.forecast(bench.network).tolist(),
    )


def _size(bench: Bench) -> int:
    return sum(parameter.numel() for parameter in bench.network.parameters())


def _hours(blocks: int) -> str:
    """How far back a network looks."""
    return f"{2**blocks - 1} h"


def _examples(data: Demand, forecast: torch.Tensor, count: int = 6) -> list[dict[str, Any]]:
    """A few forecasts of the test part beside what happened: spread evenly over the year, not the best ones."""
    stretches = len(forecast)
    chosen = sorted({(2 * place + 1) * stretches // (2 * count) for place in range(count)})
    place = forecast.shape[2] // 2

    def gigawatts(values: torch.Tensor) -> list[float]:
        return (values * data.size + data.mean).tolist()

    return [
        {
            "title": f"Test days {one + 1} of {stretches}: demand in gigawatts",
            "history": gigawatts(data.test.known[one, 0, : LEAD + place]),
            "actual": gigawatts(data.test.actual[one, :, place]),
            "forecast": gigawatts(forecast[one, :, place]),
        }
        for one in chosen
    ]
