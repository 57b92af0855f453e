"""Which block is missed least? Blocks out of a trained network one by one: the least change, the last, at random.

A residual network of eight blocks is trained on a regression. Then blocks are removed without further training. Loss on
a test set / before, medians of five seeds.
"""

import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import auxin as ax

DEPTH, WIDTH, STEPS, REMOVED = 8, 24, 800, (1, 2, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def removals(model: nn.Module) -> list[ax.Remove]:
    return [ax.Remove(f"blocks.{i}") for i in range(len(model.blocks))]


def at_random(seed: int) -> Callable[[list[ax.Remove], object], ax.Remove]:
    generator = random.Random(seed)
    return lambda edits, grower: generator.choice(edits)


CHOOSERS: dict[str, Callable[[int], Any]] = {
    "least_change": lambda seed: ax.choose.least_change(),
    "the last": lambda seed: lambda edits, grower: edits[-1],
    "at random": at_random,
}


def run(kind: str, seed: int) -> list[float]:
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = torch.Generator().manual_seed(1000 + seed)
    wanted, test = torch.randn(8, 4, generator=data), torch.randn(1024, 8, generator=data)
    for _ in range(STEPS):
        x = torch.randn(64, 8, generator=data)
        loss = nn.functional.mse_loss(model(x), (x @ wanted).sin())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    grower = ax.Grower(
        model, optimizer, edits=removals, when=ax.when.every(1), choose=CHOOSERS[kind](seed), probe=test[:64]
    )
    losses = []
    for _ in range(1 + max(REMOVED)):
        with torch.no_grad():
            losses.append(nn.functional.mse_loss(model(test), (test @ wanted).sin()).item())
        grower.step()
    assert len(model.blocks) == DEPTH - 1 - max(REMOVED)
    return [losses[count] / losses[0] for count in REMOVED]


def main() -> None:
    torch.set_num_threads(1)
    print(f"| taken out | {' | '.join(f'{n} of {DEPTH}' for n in REMOVED)} |")
    print(f"|---|{'---|' * len(REMOVED)}")
    for kind in CHOOSERS:
        rows = [run(kind, seed) for seed in range(5)]
        print(f"| {kind} | {' | '.join(f'{statistics.median(c):.2f}' for c in zip(*rows, strict=True))} |")


if __name__ == "__main__":
    main()
