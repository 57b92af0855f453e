"""Is a grown network as fast as the one that a person would have written? Steps in turn, median of the ratios."""

import argparse
import statistics
import time

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, (build, x) in FAMILIES.items():
        x = x.to(args.device)
        grown, written = build(4).to(args.device), build(8).to(args.device)
        optimizer, other = torch.optim.AdamW(grown.parameters()), torch.optim.AdamW(written.parameters())
        for _ in range(4):
            ax.grow(grown, ax.Duplicate("blocks", by=1), optimizer, probe=x)
            step(grown, optimizer, x)
            optimizer.zero_grad()
        for _ in range(5):
            step(grown, optimizer, x), step(written, other, x)
        ratios = []
        for turn in range(args.rounds):
            pair = [(grown, optimizer), (written, other)]
            times = {id(m): step(m, o, x) for m, o in (pair if turn % 2 else reversed(pair))}
            ratios.append(times[id(grown)] / times[id(written)])
        low, high = statistics.quantiles(ratios, n=20)[0], statistics.quantiles(ratios, n=20)[-1]
        median = statistics.median(ratios)
        print(f"{name}: grown / hand-written step time, median {median:.3f}   (5-95 %: {low:.2f} .. {high:.2f})")


if __name__ == "__main__":
    main()
