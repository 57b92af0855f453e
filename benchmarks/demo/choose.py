"""How the demo's settings score one horizon earlier, where every one of them was chosen: the M3 test parts stay unseen.

    python benchmarks/demo/choose.py 6 > result.txt

Each line: how many horizons earlier, what differs from ``Recipe()``, the row ("g" is the grown network), mean and
standard deviation of sMAPE over the seeds, sMAPE of their median, depths at the end. Two horizons earlier, only series
of 84 months or more are left.
"""

import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

from auxin.demo.main import DEPTHS, START
from auxin.demo.recipe import Recipe
from auxin.demo.series import Task, earlier, load_m3, median, smape
from auxin.demo.training import Data, Job, Run

VARIANTS = [
    {"patience": 1},
    {"patience": 3},
    {"tries": 1},
    {"tries": 3},
    {"growths": 3},
    {"hold": 0.2},
    {"hold": 0.5},
    {"readings": 200},
    {"stride": 1},
    {"learning_rate": 5e-4},
    {"learning_rate": 2e-3},
    {"flat": 0.3},
    {"batch": 256},
    {"budget": 300e9},
    {"dim": 64, "budget": 100e9},
]


def at_origin(horizons: int) -> Task:
    """The M3 series, one or two horizons earlier."""
    task = load_m3()
    if horizons == 2:
        kept = [i for i, history in enumerate(task.histories) if len(history) >= 84]
        histories, labels = [task.histories[i] for i in kept], [task.labels[i] for i in kept]
        task = earlier(Task(task.name, histories, task.futures[kept], labels, task.season))
    return earlier(task)


def trained(horizons: int, changes: dict, row: int | str, seeds: int) -> str:
    """One line of the result."""
    torch.set_num_threads(1)
    task, recipe = at_origin(horizons), replace(Recipe(), **changes)
    data = Data(task, recipe.stride)
    jobs = [Job(START, seed, True) if row == "g" else Job(int(row), seed) for seed in range(seeds)]
    outcomes = [Run(data, recipe, job).go() for job in jobs]
    forecasts = [torch.tensor(outcome.forecast) for outcome in outcomes]
    scores = [smape(task.futures, forecast) for forecast in forecasts]
    depths = " ".join(str(outcome.depth) for outcome in outcomes)
    mean, spread, joint = statistics.fmean(scores), statistics.stdev(scores), smape(task.futures, median(forecasts))
    return f"{horizons}  {changes!s:32} {row!s:2} {mean:.3f} ± {spread:.3f}  median {joint:.3f}  depths {depths}"


def main(seeds: int) -> None:
    todo = [(horizons, {}, row, seeds) for horizons in (1, 2) for row in (*DEPTHS, "g")]
    todo += [(1, changes, "g", seeds) for changes in VARIANTS]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for line in pool.map(trained, *zip(*todo, strict=True)):
            print(line, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
