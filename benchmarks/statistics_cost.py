"""What second moments cost in a training step, against the products of matrices that they are made of.

A training step of 512-512-512 (ReLU, SGD), whose pair of layers is watched with all five moments (X^T X, H^T H, X^T H,
X^T D, H^T D), and one of a small convolutional network, also with the two that ``Widen(init="tiny")`` needs (X^T X and
X^T D). In turn, in one process, in processor time:

- "plain": the step as it is;
- "floor": the step, and bare products of matrices of the same shapes after it, added up in place in float32;
- "watched": the step inside `auxin.statistics.watch`;
- "one in n": the same with a duty cycle, the mean over its n steps;
- "gromo": the step of gromo 0.1.0's own network of those sizes, with its statistics (for TINY) on.

    python benchmarks/statistics_cost.py [--rounds N]            # gromo's rows need gromo 0.1.0
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auxin.statistics import Pair, watch

Step = Callable[[], object]


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))


def convolutions() -> nn.Sequential:
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), *pooled
    )


def stepping(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

    def step() -> None:
        F.mse_loss(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_floor(step: Step, shapes: list[tuple[int, int, int]]) -> Step:
    """The step, and products of (rows, a)^T with (rows, b)."""
    factors = [(torch.zeros(a, b), torch.randn(rows, a), torch.randn(rows, b)) for rows, a, b in shapes]

    def both() -> None:
        step()
        for total, left, right in factors:
            total.addmm_(left.T, right)

    return both


def watched(net: nn.Module, step: Step, pair: Pair, every: int = 1) -> Step:
    seen = watch(net, [pair], quiet=every > 1, every=every)
    seen.__enter__()
    return step if every == 1 else lambda: [step() for _ in range(every)]


def of_gromo(x: Tensor, y: Tensor) -> Step:
    from gromo.containers.growing_mlp import GrowingMLP

    net = GrowingMLP(512, 512, 512, 1, nn.ReLU(), device=torch.device("cpu"))
    net.init_computation()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

    def step() -> None:
        F.mse_loss(net(x), y).backward()
        net.update_computation()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compared(steps: dict[str, tuple[Step, int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each, by step, in turn."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, (step, count) in steps.items():
            begin = time.process_time()
            step()
            found[name].append((time.process_time() - begin) / count)
    return {name: times[2:] for name, times in found.items()}


def ratio(found: dict[str, list[float]], what: str, to: str) -> tuple[float, str]:
    ratios = sorted(a / b for a, b in zip(found[what], found[to], strict=True))
    tenth = len(ratios) // 10
    median = statistics.median(ratios)
    return median, f"{median:.3f} ({ratios[tenth]:.2f} to {ratios[-1 - tenth]:.2f})"


def show(
    name: str,
    make: Callable[[], nn.Sequential],
    data: tuple[Tensor, Tensor],
    shapes: list[tuple[int, int, int]],
    rounds: int,
    pair: Pair,
    every: int,
) -> None:
    print(f"\n{name}")
    nets = [make() for _ in range(4)]
    plain, floor, on, cycle = (stepping(net, *data) for net in nets)
    mean = f"one in {every}"
    steps = {
        "plain": (plain, 1),
        "floor": (with_floor(floor, shapes), 1),
        "watched": (watched(nets[2], on, pair), 1),
        mean: (watched(nets[3], cycle, pair, every), every),
    }
    if make is dense and importlib.util.find_spec("gromo"):
        steps["gromo"] = (of_gromo(*data), 1)
    found = compared(steps, rounds)
    print(f"  plain step {1000 * statistics.median(found['plain']):.2f} ms")
    asked = {("watched", "floor"): 1.15, (mean, "plain"): 1.1}
    pairs = [*asked, ("floor", "plain"), ("watched", "plain")]
    for what, to in [*pairs, *([("gromo", "plain"), ("gromo", "watched")] if "gromo" in steps else [])]:
        median, told = ratio(found, what, to)
        most = asked.get((what, to))
        verdict = "" if most is None else f"   asked: at most {most}, {'met' if median <= most else 'MISSED'}"
        print(f"  {what} / {to}: {told}{verdict}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, one thread; {rounds} rounds, processor time;"
    )
    print("median of the ratios within a round, and the middle eight of ten")
    for batch in (128, 512):
        data = torch.randn(batch, 512), torch.randn(batch, 512)
        shapes = [(batch, 513, 513), (batch, 513, 513), (batch, 513, 513), (batch, 513, 512), (batch, 513, 512)]
        show(f"512-512-512, batches of {batch}", dense, data, shapes, rounds, Pair("0", "2"), every=20)
    data = torch.randn(64, 16, 14, 14), torch.randn(64, 10)
    rows, i, n = 64 * 14 * 14, 16 * 9 + 1, 32 * 9 + 1
    two = [(rows, i, i), (rows, i, 9 * 32)]
    five = [*two, (rows, n, n), (rows, i, 9 * n), (rows, n, 32)]
    name = "two convolutions 16-32-32 of 3 x 3 on 14 x 14, batches of 64"
    show(f"{name}: X^T X, X^T D", convolutions, data, two, rounds // 5, Pair("0", "2", direct=True), every=100)
    show(f"{name}: all five", convolutions, data, five, rounds // 10, Pair("0", "2"), every=200)


if __name__ == "__main__":
    main()
