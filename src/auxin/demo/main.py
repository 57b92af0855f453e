"""The second part of the demo, and all of it on series of one's own: train, grow, compare, leave everything behind."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from auxin.demo.folder import SMOKE, closing, one_thread, prepare, save_run
from auxin.demo.recipe import Recipe
from auxin.demo.results import Results, endings, evaluate, printed, sentence, table
from auxin.demo.screen import Screen, described
from auxin.demo.series import Task
from auxin.demo.training import Data, Job, Outcome, Run
from auxin.report import Report

DEPTHS = (0, 1, 2, 4, 8)
START = 1
PROCESSES = 2


def run_demo(task: Task, recipe: Recipe, seeds: int, out: Path, screen: Screen, published: dict[str, float]) -> Results:
    """Grow one network where it can be seen, train the others beside each other, and write what came of it.

    Args:
        task: the series.
        recipe: the settings.
        seeds: runs of each kind.
        out: directory for checkpoint, journal.json, metrics.jsonl and report.html.
        screen: where to show it.
        published: figures of others for the table.

    Raises:
        DemoError: the directory cannot be written.
    """
    begin = time.perf_counter()
    prepare(out)
    with one_thread():
        data = Data(task, recipe.stride)
        recipe = recipe.for_windows(len(data.after))
        screen.line(
            f"{task.name}: {len(task.histories):,} series, {task.horizon} ahead, {len(data.after):,} training windows. "
            f"Budget of every run: {recipe.budget / 1e9:.3g} GFLOP of training."
        )
        shown = Run(
            data,
            recipe,
            Job(START, 0, grows=True),
            on_metrics=lambda entry: screen.bar(min(1.0, entry["flops"] / recipe.budget), described(entry)),
            on_growth=lambda change: screen.line(f"grown: {change}"),
        )
        first = shown.go()
        screen.close()
        assert shown.grower is not None
        journal = shown.grower.journal.to_json()
        save_run(out, shown.grower, journal, first.metrics, {"steps": first.steps, "flops": first.flops})
        outcomes = [first, *_train_rest(data, recipe, _jobs(seeds, recipe.extra_members), screen)]
    results = evaluate(task, outcomes, seeds, published)
    content, text = table(results), SMOKE if recipe.smoke else sentence(results)
    report = Report.from_metrics(
        journal,
        first.metrics,
        title=f"auxin demo: {task.name}",
        sentence=text,
        table=content,
        forecasts=_examples(task, first),
        shapes={name: tuple(parameter.shape) for name, parameter in shown.network.named_parameters()},
    )
    report.write(out / "report.html")
    ended = "" if recipe.smoke else f"\n{endings(results)}\n"
    screen.line(f"{ended}\n{printed(content)}\n\n{content['caption']}\n\n{text}\n")
    screen.line(closing(time.perf_counter() - begin, out))
    return results


def _jobs(seeds: int, extra_members: int) -> list[Job]:
    """All runs but the one that is shown, the longest first."""
    fixed = [Job(depth, seed) for depth in DEPTHS for seed in range(seeds)]
    return fixed + [Job(START, seed, grows=True) for seed in range(1, seeds + extra_members)]


def _train_rest(data: Data, recipe: Recipe, jobs: list[Job], screen: Screen) -> Iterator[Outcome]:
    """Train jobs in two processes of one thread each; in this one where there is little to do."""
    total = len(jobs)
    workers = min(PROCESSES, os.cpu_count() or 1)
    if recipe.budget < 20e9 or workers == 1:
        for number, job in enumerate(jobs, start=1):
            yield Run(data, recipe, job).go()
            screen.bar(number / total, f"{number} of {total} further runs")
        screen.close()
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker, (data.task, recipe)) as pool:
        waiting = [pool.submit(_work, job) for job in jobs]
        try:
            for number, done in enumerate(as_completed(waiting), start=1):
                yield done.result()
                screen.bar(number / total, f"{number} of {total} further runs: every depth at the same training FLOPs")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    screen.close()


_worker: tuple[Data, Recipe] | None = None


def _begin_worker(task: Task, recipe: Recipe) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Data(task, recipe.stride), recipe


def _work(job: Job) -> Outcome:
    assert _worker is not None
    return Run(*_worker, job).go()


def _examples(task: Task, outcome: Outcome, count: int = 6) -> list[dict[str, Any]]:
    """A few forecasts beside what happened: series spread evenly over the data, not the best ones."""
    total = len(task.histories)
    chosen = sorted({(2 * place + 1) * total // (2 * count) for place in range(count)})
    return [
        {
            "title": task.labels[index],
            "history": task.histories[index][-5 * max(12, task.horizon) // 2 :].tolist(),
            "actual": task.futures[index].tolist(),
            "forecast": outcome.forecast[index],
        }
        for index in chosen
    ]
