"""What a widening in the middle of training does to the loss: right after it, and at the end; ten seeds.

Two networks on real data, each example seen once, in batches as a training loop draws them: an MLP that forecasts the
monthly series of the M3 competition, and a small GPT on the sources of Python's standard library. At half of the steps
a hidden width of each block (or two heads) is widened, and AdamW goes on:

- "mapped": as `ax.grow` leaves it, with the optimizer's state;
- "no correction": the same without the bias correction of new entries (`src/auxin/newborn.py`);
- "new AdamW": the same widened network, the state thrown away, as many loops do it;
- "not widened": the network as it was, on the same batches.

    pip install 'auxin[demo]'
    python benchmarks/widened_loss.py
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxin as ax
from auxin.ramp import ramps_on

SHORT, LR = 20, 1e-3
WAYS = ("mapped", "no correction", "new AdamW")
INITS = ("zero", "split")
STARTS: dict[str, dict[str, Any]] = {init: {"init": init} for init in INITS}
STARTS["split, copies without state"] = {"init": "split", "state": "reset"}
PAST, AHEAD, WORDS = 24, 12, 64


class Dense(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Forecaster(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(PAST, 64), nn.Linear(64, AHEAD)
        self.blocks = nn.ModuleList(Dense(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.out, self.dense = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), Dense(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(x + self.out(y.transpose(1, 2).reshape(batch, length, -1)))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, 64), nn.Parameter(torch.zeros(WORDS, 64))
        self.blocks = nn.ModuleList(Block(64, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Task:
    """A network, the edits that are tried on it, and data: (inputs, targets) of a batch, and what is held out."""

    name: str
    build: Callable[[], nn.Module]
    edits: dict[str, ax.Widen]
    steps: int
    batch: int
    train: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


def months() -> Task:
    from auxin.demo.series import load_m3

    parts: list[list[Tensor]] = [[], []]
    for number, history in enumerate(load_m3().histories):
        windows = history.unfold(0, PAST + AHEAD, 1)
        parts[number % 10 == 0].append(windows / windows[:, :PAST].mean(1, keepdim=True) - 1)
    train, held = (torch.cat(part) for part in parts)
    up = {f"{name}: 64 -> 96 hidden units": ax.Widen("blocks.*.up", by=32, **kind) for name, kind in STARTS.items()}
    pairs = [(rows[:, :PAST], rows[:, PAST:]) for rows in (train, held[::4])]
    return Task("M3, monthly (mean absolute error)", Forecaster, up, 1200, 64, pairs[0], pairs[1], F.l1_loss)


def sources() -> Task:
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [b"".join(f.read_bytes() for n, f in enumerate(files) if (n % 10 == 0) is held) for held in (False, True)]
    train, held = (torch.tensor(list(text)).unfold(0, WORDS + 1, WORDS) for text in texts)
    pairs = [(rows[:, :-1], rows[:, 1:]) for rows in (train, held[::8])]
    edits = {f"{init}: 128 -> 192 hidden units": ax.Widen("blocks.*.dense.up", by=64, init=init) for init in INITS}
    edits["zero: 4 -> 6 heads"] = ax.Widen("blocks.*.qkv", by=2, unit="heads")
    loss = lambda out, wanted: F.cross_entropy(out.flatten(0, 1), wanted.flatten())  # noqa: E731
    return Task("bytes of the standard library (cross entropy)", Gpt, edits, 800, 8, pairs[0], pairs[1], loss)


def batches(task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same for every way: examples in a random order, none twice."""
    order = torch.randperm(len(task.train[0]), generator=torch.Generator().manual_seed(seed))
    assert task.steps * task.batch <= len(order), (len(order), task.batch)
    for at in order[: task.steps * task.batch].split(task.batch):
        yield task.train[0][at], task.train[1][at]


def train(task: Task, model: nn.Module, optimizer: Any, given: Any) -> list[float]:
    """One step for each batch; the losses before each."""
    losses = []
    for x, wanted in given:
        loss = task.loss(model(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fresh(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)


@torch.no_grad()
def held_out(task: Task, model: nn.Module) -> float:
    return task.loss(model(task.held[0]), task.held[1]).item()


@dataclass(frozen=True)
class Outcome:
    """Peak of 20 steps over the mean of the 20 before; the same over the twin that was not widened; the end."""

    peak: float
    beyond: float
    end: float


def one_seed(task: Task, seed: int) -> dict[tuple[str, str], Outcome]:
    """All widenings of one network in the middle of its training."""
    torch.manual_seed(seed)
    model = task.build()
    optimizer = fresh(model)
    given = list(batches(task, seed))
    before = statistics.mean(train(task, model, optimizer, given[: task.steps // 2])[-SHORT:])
    found: dict[tuple[str, str], Outcome] = {}
    plain = None
    for name, edit in {"not widened": None, **task.edits}.items():
        for way in WAYS if edit is not None else ("",):
            net, opt = copy.deepcopy((model, optimizer))
            opt.zero_grad()
            if edit is not None:
                ax.grow(net, edit, opt, probe=task.held[0][:8], seed=seed)
            if way == "no correction":
                ramps = ramps_on(opt)
                if ramps is None:  # copies that keep their state are as old as what they are copies of
                    continue
                ramps.forget()
            opt = fresh(net) if way == "new AdamW" else opt
            losses = train(task, net, opt, given[task.steps // 2 :])
            plain = losses if plain is None else plain
            short = list(zip(losses, plain, strict=True))[:SHORT]
            peak, beyond = max(losses[:SHORT]) / before, max(a / b for a, b in short)
            found[name, way] = Outcome(peak, beyond, held_out(task, net))
    return found


def interval(values: list[float]) -> str:
    """Median, and where the middle eight of ten lie."""
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
    return f"{statistics.median(values):.3f} ({low:.3f} to {high:.3f})"


def resampled(values: list[float]) -> str:
    """Mean, and its 95 % interval by 10,000 resamples of the seeds."""
    drawn = torch.randint(len(values), (10_000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = torch.tensor(values)[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{statistics.mean(values):+.2f} % ({low:+.2f} to {high:+.2f})"


def report(task: Task, found: list[dict[tuple[str, str], Outcome]]) -> None:
    """A line for each widening and way."""
    print(
        f"\n{task.name}; AdamW, lr {LR}; {task.steps} steps of {task.batch}, widened at {task.steps // 2}; "
        f"{len(found)} seeds"
    )
    print(
        "| widening | optimizer | peak of 20 / before | worst / twin not widened | held-out loss | against new AdamW |"
    )
    print("|---|---|---|---|---|---|")
    for name, way in found[0]:
        own = [one[name, way] for one in found]
        against = "" if (name, "new AdamW") not in found[0] or way == "new AdamW" else _paired(found, name, way)
        end = statistics.mean(o.end for o in own)
        print(
            f"| {name} | {way} | {interval([o.peak for o in own])} | {interval([o.beyond for o in own])} "
            f"| {end:.4f} | {against} |"
        )


def _paired(found: list[dict[tuple[str, str], Outcome]], name: str, way: str) -> str:
    pairs = [(one[name, way].end, one[name, "new AdamW"].end) for one in found]
    better = sum(a < b for a, b in pairs)
    return f"{resampled([100 * (a / b - 1) for a, b in pairs])}, lower in {better} of {len(pairs)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", choices=("months", "sources"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{time.strftime('%d %B %Y')}, torch {torch.__version__}, Python {platform.python_version()}, one thread")
    for build in (months, sources):
        if args.only in (None, build.__name__):
            task = build()
            report(task, [one_seed(task, seed) for seed in range(args.seeds)])


if __name__ == "__main__":
    main()
