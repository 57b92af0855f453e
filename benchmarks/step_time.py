"""Is a grown network as fast as the one that a person would have written? Steps in turn, median of the ratios."""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from gpt import GPT
from torch import nn

import auxin as ax


class Dense(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Conv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(torch.relu(self.conv(x)))


class Chain(nn.Module):
    def __init__(self, block: type[nn.Module], dim: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(dim) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


FAMILIES = {
    "mlp": (lambda depth: Chain(Dense, 256, depth), torch.randn(128, 256)),
    "cnn": (lambda depth: Chain(Conv, 32, depth), torch.randn(8, 32, 24, 24)),
    "gpt": (lambda depth: GPT(depth, dim=128, heads=4), torch.randint(256, (4, 64))),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    return time.perf_counter() - start


def grown(build: Callable[[int], nn.Module], x: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    """Four blocks grown to eight, and eight as a person builds them."""
    model = build(4).to(x.device)
    ax.grow(model, ax.Duplicate("blocks"), probe=x)
    return model, build(8).to(x.device)


def repeated(build: Callable[[int], nn.Module], x: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    """Four blocks that run twice, and a list that holds the same four modules twice."""
    model, written = build(4).to(x.device), build(4).to(x.device)
    ax.grow(model, ax.Repeat("blocks"), probe=x)
    written.blocks = nn.ModuleList([*written.blocks] * 2)
    return model, written


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for (name, (build, x)), pair in itertools.product(FAMILIES.items(), (grown, repeated)):
        x = x.to(args.device)
        runs = [(model, torch.optim.AdamW(model.parameters())) for model in pair(build, x)]
        for _ in range(5):
            for model, optimizer in runs:
                step(model, optimizer, x)
        ratios = []
        for turn in range(args.rounds):
            times = {id(m): step(m, o, x) for m, o in (runs if turn % 2 else reversed(runs))}
            ratios.append(times[id(runs[0][0])] / times[id(runs[1][0])])
        low, *_, high = statistics.quantiles(ratios, n=20)
        median = statistics.median(ratios)
        print(
            f"{name}: {pair.__name__} / hand-written step time, median {median:.3f}   (5-95 %: {low:.2f} .. {high:.2f})"
        )


if __name__ == "__main__":
    main()
