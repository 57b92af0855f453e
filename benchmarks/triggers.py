"""How late do triggers see a planted change, at the same rate of false alarms as detectors of ruptures and river?

Three questions, 200 curves each, and changes planted into three real loss curves (`triggers_curves.json`):

- shift: the loss moves up at once and stays (drift);
- rise: the loss begins to climb (diverging);
- stall: the loss stops falling (slope, plateau).

Half of the curves have no change. All have noise (normal, heavy-tailed or correlated), spikes and NaN. Each detector's
settings are chosen on 100 other curves: the shortest median delay with at most 5 % of the curves alarmed too early.
Peers read the curve in units of its noise, without NaN, as it is or against the median of the 30 readings before, or,
for a stall, as the improvement over some readings; whatever is best for them. Peers that are not installed are skipped.

    python benchmarks/triggers.py
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import Pool
from pathlib import Path
from statistics import median
from typing import Any

from auxin import when
from auxin.when import Reading
from auxin.when.robust import noise, theil_sen

LENGTH, TUNING, FALSE_ALARMS = 300, 100, 0.05
REAL = Path(__file__).with_name("triggers_curves.json")


@dataclass(frozen=True)
class Curve:
    """A loss curve; `change` is the first changed reading, None where nothing changes."""

    values: tuple[float, ...]
    change: int | None


# Planted curves. The unit of everything is the standard deviation of the noise.


def noises(rng: random.Random) -> list[float]:
    """Unit noise of one of three kinds."""
    kind = rng.choice(["normal", "heavy", "correlated"])
    if kind == "heavy":  # Student's t with 4 degrees of freedom, scaled to unit variance
        return [rng.gauss(0, 1) / math.sqrt(rng.gammavariate(2, 0.5)) / math.sqrt(2) for _ in range(LENGTH)]
    carry, last, found = (0.5 if kind == "correlated" else 0.0), 0.0, []
    for _ in range(LENGTH):
        last = carry * last + math.sqrt(1 - carry**2) * rng.gauss(0, 1)
        found.append(last)
    return found


def spoiled(rng: random.Random, values: list[float]) -> tuple[float, ...]:
    """With spikes and NaN."""
    out = []
    for value in values:
        lot = rng.random()
        out.append(math.nan if lot < 0.01 else value + rng.uniform(4, 20) if lot < 0.03 else value)
    return tuple(out)


def descent(rng: random.Random) -> list[float]:
    """A falling mean: a power law, an exponential, or flat from the start."""
    kind, height = rng.choice(["power", "exponential", "flat"]), rng.uniform(10, 60)
    if kind == "power":
        return [height * (1 + t / 5) ** -rng_exponent for rng_exponent in [rng.uniform(0.3, 1)] for t in range(LENGTH)]
    if kind == "exponential":
        return [height * math.exp(-t / pace) for pace in [rng.uniform(15, 60)] for t in range(LENGTH)]
    return [height] * LENGTH


def planted(question: str, rng: random.Random, change: int | None) -> Curve:
    """One curve of one question."""
    if question == "stall":
        start, pace = rng.uniform(20, 80), 0.4 * 8 ** -rng.random()
        early = rng.uniform(0, 20)
        mean = [start - pace * t + early * math.exp(-t / 15) for t in range(LENGTH)]
        mean = [m if change is None or t < change else mean[change] for t, m in enumerate(mean)]
    else:
        mean, size = descent(rng), rng.uniform(1.5, 5)
        pace = rng.uniform(0.1, 0.5)
        for t in range(LENGTH if change is None else change, LENGTH):
            mean[t] += size if question == "shift" else pace * (t - change + 1)
    scale, base = 10 ** rng.uniform(-3, 1), rng.uniform(0, 100)
    noisy = [m + e for m, e in zip(mean, noises(rng), strict=True)]
    return Curve(tuple(scale * (base + v) for v in spoiled(rng, noisy)), change)


def curves(question: str, seed: int, count: int) -> list[Curve]:
    """Half of them with a change between a third and two thirds."""
    rng = random.Random(f"{question} {seed}")
    return [planted(question, rng, rng.randrange(100, 201) if i % 2 else None) for i in range(count)]


def smoothed(values: list[float], reach: int = 15) -> list[float]:
    """The level of a curve: a robust line through the readings around each one."""
    out = []
    for t in range(len(values)):
        low = max(0, t - reach)
        slope, level = theil_sen(values[low : t + reach + 1])
        out.append(level + slope * (t - low))
    return out


def real_curves(question: str) -> list[Curve]:
    """Changes planted into recorded curves: each unchanged, and with 20 changes."""
    found = []
    for name, values in json.loads(REAL.read_text()).items():
        rng, level = random.Random(f"{question} {name}"), smoothed(values)
        rest = [v - m for v, m in zip(values, level, strict=True)]
        if question != "stall":
            found += [Curve(tuple(values), None)]
        for _ in range(20):
            change = rng.randrange(100, 201) if question != "stall" else rng.randrange(40, 81)
            unit = noise(rest[change - 30 : change + 30])
            size, pace = rng.uniform(1.5, 5) * unit, rng.uniform(0.1, 0.5) * unit
            out = list(values)
            for t in range(change, len(values)):
                extra = size if question == "shift" else pace * (t - change + 1)
                out[t] = level[change] + rest[t] if question == "stall" else values[t] + extra
            found.append(Curve(tuple(out), change))
    return found


# Detectors: (values, setting) -> readings that alarm, as first reading of all for each threshold.

Alarms = dict[Any, int | None]


def first_above(scores: list[float], thresholds: list[float]) -> Alarms:
    """The first reading whose score is above each threshold."""
    return {h: next((t for t, s in enumerate(scores) if s > h), None) for h in thresholds}


def grid(**choices: list[Any]) -> list[dict[str, Any]]:
    """Every combination."""
    found: list[dict[str, Any]] = [{}]
    for name, values in choices.items():
        found = [{**setting, name: value} for setting in found for value in values]
    return found


def ours(build: Callable[..., Any], settings: list[dict[str, Any]], values: tuple[float, ...]) -> Alarms:
    found: Alarms = {}
    for setting in settings:
        trigger = build(**setting)
        readings = (Reading(v, {}, t + 1, 0, 0, t + 1) for t, v in enumerate(values))
        found[repr(trigger)] = next((r.calls - 1 for r in readings if trigger(r)), None)
    return found


def prepared(values: tuple[float, ...], way: str) -> tuple[list[float], list[int]]:
    """A curve as the peers read it, and which reading each of its values is."""
    kept = [(t, v) for t, v in enumerate(values) if math.isfinite(v)]
    index, raw = [t for t, _ in kept], [v for _, v in kept]
    unit, start = noise(raw[:30]), median(raw[:30])
    plain = [(v - start) / unit for v in raw]
    if way == "plain":
        return plain, index
    lag = int(way.split()[1])
    if way.startswith("against"):
        return [plain[i] - median(plain[i - lag : i]) for i in range(lag, len(plain))], index[lag:]
    return [plain[i] - plain[i - lag] for i in range(lag, len(plain))], index[lag:]


def river_alarms(kind: str, question: str, values: tuple[float, ...]) -> Alarms:
    ways = ["plain", "against 30"] if question != "stall" else [f"lag {k}" for k in (5, 15, 30)]
    found: Alarms = {}
    for way in ways:
        signal, index = prepared(values, way)
        for name, i in (kswin if kind == "KSWIN" else online)(kind, signal):
            found[f"{name}, {way}"] = None if i is None else index[i]
    return found


def online(kind: str, signal: list[float]) -> Iterator[tuple[str, int | None]]:
    """Settings of a detector and their first alarms; ADWIN, which is two-sided, is believed where the mean goes up."""
    from river import drift

    if kind == "ADWIN":
        settings = grid(delta=[0.3, 0.1, 0.03, 0.01, 2e-3, 1e-4, 1e-6, 1e-9], clock=[1], grace_period=[5])
    else:
        settings = grid(
            threshold=[4, 6, 8, 10, 15, 20, 30, 40, 60, 80, 120], delta=[0.005, 0.5, 1.0], alpha=[0.9999, 0.97]
        )
    for setting in settings:
        extra = {"mode": "up"} if kind == "PageHinkley" else {}
        detector, alarm = getattr(drift, kind)(**setting, **extra), None
        for i, value in enumerate(signal):
            before = getattr(detector, "estimation", 0.0)
            detector.update(value)
            if detector.drift_detected and (kind != "ADWIN" or detector.estimation > before):
                alarm = i
                break
        yield f"{kind}({', '.join(f'{k}={v}' for k, v in setting.items())})", alarm


def kswin(kind: str, signal: list[float]) -> Iterator[tuple[str, int | None]]:
    """The same for KSWIN: up to its first alarm its p-values do not depend on alpha."""
    from river import drift

    for window, late in ((60, 15), (100, 30), (60, 8)):
        detector = drift.KSWIN(alpha=1e-300, window_size=window, stat_size=late, seed=0)
        scores = []
        for i, value in enumerate(signal):
            detector.update(value)
            after, before = signal[max(0, i + 1 - late) : i + 1], signal[max(0, i + 1 - window) : max(0, i + 1 - late)]
            up = before and sum(after) / len(after) > sum(before) / len(before)
            scores.append(-math.log(max(detector.p_value, 1e-300)) if up and i + 1 >= window else 0.0)
        for alpha in (0.01, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6, 1e-8):
            alarm = first_above(scores, [-math.log(alpha)])
            yield f"KSWIN(alpha={alpha}, window_size={window}, stat_size={late})", next(iter(alarm.values()))


def ruptures_alarms(kind: str, question: str, values: tuple[float, ...]) -> Alarms:
    """One split of the readings at hand: its gain, where the level (for a stall, the slope) goes up at it."""
    found: Alarms = {}
    model = {"stall": ("linear", "clinear")}.get(question, ("l2", "l1"))
    ways = ["plain", "against 30"] if question != "stall" else ["plain"]
    for way in ways:
        signal, index = prepared(values, way)
        for m in model:
            for width in (30, 80):
                scores = [math.nan] * len(values)
                for t, score in _gains(kind, signal, m, width):
                    scores[index[t]] = score
                for h, alarm in first_above(scores, [1.25**k for k in range(0, 36)]).items():
                    found[f"{kind}({m}, {width}) above {h:.3g}, {way}"] = alarm
    return found


def _gains(kind: str, signal: list[float], model: str, width: int) -> Iterator[tuple[int, float]]:
    import numpy as np
    import ruptures as rpt

    x = np.asarray(signal, float)
    time = np.arange(len(x), dtype=float)
    data = np.column_stack([x, time, np.ones(len(x))]) if model == "linear" else x[:, None]
    if kind == "Window":
        if model == "clinear":
            return
        window = rpt.Window(width=width, model=model, jump=1, min_size=3).fit(data)
        half = width // 2
        for t, score in zip(window.inds, window.score, strict=True):
            if t + half <= len(x) and _up(x[t - half : t], x[t : t + half], model):
                yield t + half - 1, float(score)
        return
    for t in range(width, len(x) + 1):
        split = rpt.Binseg(model=model, min_size=4, jump=4).fit(data[t - width : t])
        at = split.predict(n_bkps=1)[0]
        gain = split.cost.error(0, width) - split.cost.error(0, at) - split.cost.error(at, width)
        if at < width and _up(x[t - width : t - width + at], x[t - width + at : t], model):
            yield t - 1, float(gain)


def _up(before: Any, after: Any, model: str) -> bool:
    import numpy as np

    if "linear" not in model:
        return after.mean() > before.mean()
    return np.polyfit(range(len(after)), after, 1)[0] > np.polyfit(range(len(before)), before, 1)[0]


# The contest.


OURS: dict[str, dict[str, Any]] = {
    "shift": {
        "drift": partial(
            ours, when.drift, grid(threshold=[4, 5, 6, 7, 8, 10, 12, 15], delta=[0.25, 0.5, 1.0], window=[20, 30, 50])
        )
    },
    "rise": {
        "diverging": partial(
            ours,
            when.diverging,
            grid(window=[15, 20, 30, 40], level=[1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5], nonfinite=[5]),
        )
    },
    "stall": {
        "slope": partial(
            ours,
            when.slope,
            grid(window=[15, 20, 25, 30, 40], level=[0.9, 0.7, 0.5, 0.3, 0.1, 0.05, 0.02, 0.01, 3e-3, 1e-3, 1e-4])
            + grid(window=[20, 30, 40], level=[0.7, 0.5, 0.3, 0.1, 0.05], shortest=[10, 15, 20]),
        ),
        "plateau": partial(ours, when.plateau, grid(patience=[5, 8, 10, 15, 20, 25, 30, 40, 50, 60])),
    },
}


def detectors(question: str) -> dict[str, Callable[[tuple[float, ...]], Alarms]]:
    found = dict(OURS[question])
    if find_spec("river") is not None:
        found |= {f"river {k}": partial(river_alarms, k, question) for k in ("PageHinkley", "ADWIN", "KSWIN")}
    if find_spec("ruptures") is not None:
        found |= {f"ruptures {k}": partial(ruptures_alarms, k, question) for k in ("Window", "Binseg")}
    return found


@dataclass(frozen=True)
class Score:
    """Of one detector on many curves."""

    false_alarms: float
    delay: float
    missed: float


def score(alarms: list[int | None], on: list[Curve]) -> Score:
    """Share of curves alarmed without a change or before it; median delay of the others (missed: for ever)."""
    early = [a is not None and (c.change is None or a < c.change) for a, c in zip(alarms, on, strict=True)]
    delays = [
        math.inf if a is None else a - c.change
        for a, c, e in zip(alarms, on, early, strict=True)
        if c.change is not None and not e
    ]
    missed = sum(map(math.isinf, delays)) / max(1, len(delays))
    return Score(sum(early) / len(early), median(delays) if delays else math.inf, missed)


def contest(question: str, pool: Any, count: int, only: str) -> list[tuple[str, str, Score, Score | None]]:
    """(detector, its best setting, score on fresh curves, score on real curves)."""
    tuning, fresh = curves(question, 1, TUNING), curves(question, 2, count)
    real = real_curves(question) if REAL.exists() else []
    rows = []
    for name, detect in detectors(question).items():
        if only not in name:
            continue
        everything = pool.map(detect, [c.values for c in tuning + fresh + real], chunksize=5)
        tuned, tested, on_real = everything[:TUNING], everything[TUNING : TUNING + count], everything[TUNING + count :]
        fits = {key: score([a[key] for a in tuned], tuning) for key in tuned[0]}
        fair = [key for key, s in fits.items() if s.false_alarms <= FALSE_ALARMS]
        if not fair:
            rows.append((name, "none", Score(min(s.false_alarms for s in fits.values()), math.inf, 1), None))
            continue
        best = min(fair, key=lambda key: (fits[key].delay, fits[key].missed, fits[key].false_alarms))
        last = score([a[best] for a in on_real], real) if real else None
        rows.append((name, best, score([a[best] for a in tested], fresh), last))
        print(question, *rows[-1], sep=" | ", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="curves for each question")
    parser.add_argument("--questions", nargs="*", default=["shift", "rise", "stall"])
    parser.add_argument("--only", default="", help="detectors whose name holds this")
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    for peer in ("river", "ruptures"):
        print(f"{peer} {version(peer)}" if find_spec(peer) else f"{peer} is not installed: skipped")
    print("| question | detector | false alarms | delay | missed | real: false alarms | delay | missed | setting |")
    with Pool(chosen.processes) as pool:
        for question in chosen.questions:
            for name, setting, fresh, real in contest(question, pool, chosen.count, chosen.only):
                cells = [question, name, f"{fresh.false_alarms:.1%}", f"{fresh.delay:g}", f"{fresh.missed:.0%}"]
                cells += (
                    ["", "", ""]
                    if real is None
                    else [f"{real.false_alarms:.1%}", f"{real.delay:g}", f"{real.missed:.0%}"]
                )
                print("|", " | ".join([*cells, setting]), "|")


if __name__ == "__main__":
    main()
