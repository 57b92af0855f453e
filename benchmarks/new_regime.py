"""How the settings of examples/new_regime.py were chosen, on the time before the summer; then the summer, once.

    python benchmarks/new_regime.py 300e6 > benchmarks/new_regime-300e6-DATE.txt    # training FLOPs a day

1. Each way tries twelve settings on the winter, with three seeds that the example does not use: the drift is declared
   at the beginning of June, and the nights until the end of August are scored.
2. The trigger is the quickest of six that takes nothing before the summer for a drift, on six such seeds.
3. With these, five other seeds live through the whole year, and the errors of the summer are printed.
4. The same where the drift is declared on the tenth night of the summer, whether the trigger sees it or not.
"""

import dataclasses
import functools
import itertools
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

import auxin as ax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from electricity import load
from new_regime import WAYS, live, row

TUNED, WATCHED = range(10, 13), range(10, 16)  # seeds
JUNE, SEPTEMBER, NEVER = 85, 177, 10**9  # nights, counted from 8 March
RATES = (2.5e-4, 3.5e-4, 5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3, 1.1e-2)
PAIRS = list(itertools.product((5e-4, 1e-3, 2e-3, 4e-3), (0.2, 0.4, 0.6)))
# threshold, delta; the quickest first: a reading adds at most 3 - delta, so each needs threshold / (3 - delta) nights
TRIGGERS = [(8.0, 1.0), (4.0, 2.0), (8.0, 1.5), (6.0, 2.0), (10.0, 1.5), (8.0, 2.0)]


def candidates(way):
    """Twelve settings of a way."""
    if way.at_drift == "go on":
        return [dataclasses.replace(way, lr=lr) for lr in RATES]
    return [dataclasses.replace(way, lr=lr, burst=burst) for lr, burst in PAIRS]


def winter(flops, job):
    """Megawatts, mean over the winter's nights."""
    way, seed = job
    data = load()
    errors, drift, *_ = live(way, data, seed, data.nights[:SEPTEMBER], ax.when.at([JUNE + 1]), flops)
    assert drift == JUNE
    return statistics.mean(errors[JUNE:])


def before_summer(flops, seed):
    """The errors of a network that goes on as it is."""
    data = load()
    return live(WAYS[0], data, seed, data.nights[: data.summer], ax.when.at([NEVER]), flops)[0]


def alarm(trigger, errors):
    """The first night that a trigger takes for a drift, or None."""
    when = ax.when.drift(*trigger)
    fired = (
        night for night, error in enumerate(errors) if when(ax.when.Reading(error, {}, night + 1, 0, 0, night + 1))
    )
    return next(fired, None)


def summer(flops, trigger, way):
    return row(way, load(), range(5), flops, dict(zip(("threshold", "delta"), trigger, strict=True)))


def told(flops, way):
    data = load()
    tenth = data.summer + 9
    runs = [live(way, data, seed, data.nights, ax.when.at([tenth + 1]), flops) for seed in range(5)]
    whole, after = ([statistics.mean(errors[first:]) for errors, *_ in runs] for first in (data.summer, tenth + 1))
    columns = "  ".join(f"{statistics.mean(v):.0f} +- {statistics.stdev(v):.0f}" for v in (whole, after))
    return f"{way.name:<38}{columns}  {' -> '.join(f'{statistics.mean(run[i] for run in runs):.0f}' for i in (2, 3))}"


def main(flops):
    pool = ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,))
    jobs = [(way, seed) for kind in WAYS for way in candidates(kind) for seed in TUNED]
    scores = dict(zip(jobs, pool.map(functools.partial(winter, flops), jobs), strict=True))
    best = []
    print(f"{flops / 1e6:.0f} MFLOP a day; the winter, MW: mean, and each seed")
    for kind in WAYS:
        print(kind.name)
        means = {way: statistics.mean(scores[way, seed] for seed in TUNED) for way in candidates(kind)}
        best.append(min(means, key=means.__getitem__))
        for way, value in means.items():
            each = " ".join(f"{scores[way, seed]:6.1f}" for seed in TUNED)
            print(f"  lr {way.lr:<8} burst {way.burst}  {value:6.1f}   {each}{'   <- best' if way == best[-1] else ''}")
    curves = list(pool.map(functools.partial(before_summer, flops), WATCHED))
    alarms = {trigger: [alarm(trigger, errors) for errors in curves] for trigger in TRIGGERS}
    quiet = [trigger for trigger, nights in alarms.items() if not any(nights)] or TRIGGERS[-1:]
    for trigger, nights in alarms.items():
        chosen = "   <- chosen" if trigger == quiet[0] else ""
        print(f"drift{trigger} takes for a drift before the summer: {nights}{chosen}")
    print("the summer, MW; after the drift; held-out days before it -> at its end; night of the drift", flush=True)
    for line in pool.map(functools.partial(summer, flops, quiet[0]), best):
        print(line, flush=True)
    print("the same, the drift declared on the tenth night: the summer, after the drift, held-out days")
    for line in pool.map(functools.partial(told, flops), best):
        print(line, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
