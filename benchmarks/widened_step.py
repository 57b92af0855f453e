"""Is a widened network as fast as the one that a person would have written? While new entries are young, and later.

Each network is widened in place by half; its twin was built with that width. Rounds of one training step each, in turn,
in processor time; median of the ratios to the twin, of whole steps and of `optimizer.step()` in them:

- "by hand": a second twin, which shows what the machine does to two equal things;
- "ended": the bias correction of new entries has ended (`src/auxin/newborn.py`), so nothing rides on the optimizer;
- "running": it is under way.

    python benchmarks/widened_step.py [--rounds N] [--device cuda]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxin as ax
from auxin.ramp import ramps_on


class Dense(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Conv(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv2d(dim, hidden, 3, padding=1), nn.BatchNorm2d(hidden)
        self.down = nn.Conv2d(hidden, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.norm(self.up(x))))


def dense(hidden: int) -> tuple[nn.Module, Tensor]:
    """2 blocks of width 256 on 128 rows."""
    return nn.Sequential(*(Dense(256, hidden) for _ in range(2))), torch.randn(128, 256)


def conv(hidden: int) -> tuple[nn.Module, Tensor]:
    """2 blocks of 64 channels on 4 images, in the memory format channels_last."""
    model = nn.Sequential(*(Conv(64, hidden) for _ in range(2)))
    return model.to(memory_format=torch.channels_last), torch.randn(4, 64, 16, 16).to(memory_format=torch.channels_last)


Build = Callable[[int], tuple[nn.Module, Tensor]]
NETWORKS: dict[str, tuple[Build, int, int]] = {
    "dense, 1024 -> 1536 hidden": (dense, 1024, 1536),
    "convolutions, channels_last, 64 -> 96": (conv, 64, 96),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"foreach": False},
    "AdamW, foreach": {"foreach": True},
    "AdamW, fused": {"fused": True},
}


def step(model: nn.Module, optimizer: Any, x: Tensor) -> tuple[float, float]:
    """Processor seconds of a training step, and of the optimizer's part; seconds on the clock on another device."""
    clock = time.process_time if x.device.type == "cpu" else _waited
    start = clock()
    optimizer.zero_grad()
    model(x).square().mean().backward()
    middle = clock()
    optimizer.step()
    end = clock()
    return end - start, end - middle


def _waited() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def by_hand(build: Build, width: int, options: dict[str, Any], device: str) -> tuple[nn.Module, Any, Tensor]:
    """A network, its optimizer after 300 counted steps, and a batch."""
    torch.manual_seed(0)
    model, x = build(width)
    model, x = model.to(device), x.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **options)
    step(model, optimizer, x)
    for state in optimizer.state.values():
        state["step"] += 300
    return model, optimizer, x


def widened(build: Build, old: int, new: int, options: dict[str, Any], device: str) -> tuple[nn.Module, Any, Tensor]:
    """The same, by growing."""
    model, optimizer, x = by_hand(build, old, options, device)
    optimizer.zero_grad()
    ax.grow(model, ax.Widen("*.up", to=new), optimizer, probe=x[:2])
    return model, optimizer, x


def ratios(build: Build, old: int, new: int, options: dict[str, Any], rounds: int, device: str) -> None:
    """Print those of one network and one optimizer."""
    twin = by_hand(build, new, options, device)
    runs = {"twin": twin, "by hand": by_hand(build, new, options, device)}
    for name in ("ended", "running"):
        runs[name] = widened(build, old, new, options, device)
    layouts = [[(p.shape, p.stride()) for p in run[0].parameters()] for run in runs.values()]
    assert all(one == layouts[0] for one in layouts), "other shapes or strides"
    for state in runs["ended"][1].state.values():
        state["step"] += 10_000  # as if so many steps had passed
    for run in list(runs.values()) * 2:
        for _ in range(9):
            step(*run)
    assert ramps_on(runs["ended"][1]) is None and ramps_on(runs["running"][1]) is not None
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rounds):
        at = number % len(order)
        for name in order[at:] + order[:at]:
            taken[name].append(step(*runs[name]))
    for part, what in enumerate(("step", "optimizer.step()")):
        seconds = {name: [times[part] for times in own] for name, own in taken.items()}
        told = [f"{what}: twin {1e3 * statistics.median(seconds['twin']):.1f} ms"]
        for name in order[1:]:
            each = [a / b for a, b in zip(seconds[name], seconds["twin"], strict=True)]
            low, *_, high = statistics.quantiles(each, n=10)
            told.append(f"{name} {statistics.median(each):.3f} ({low:.2f} to {high:.2f})")
        print("  " + ", ".join(told), flush=True)


def main() -> None:
    """Print a line for each network and optimizer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{time.strftime('%d %B %Y')}, torch {torch.__version__}, Python {platform.python_version()}, one thread")
    for name, (build, old, new) in NETWORKS.items():
        counts = [sum(p.numel() for p in build(width)[0].parameters()) for width in (old, new)]
        print(f"{name}: {counts[1] / 1e6:.2f} M parameters, {(counts[1] - counts[0]) / 1e6:.2f} M of them new")
        for kind, options in OPTIMIZERS.items():
            print(f" {kind}")
            ratios(build, old, new, options, args.rounds, args.device)


if __name__ == "__main__":
    main()
