"""What does a sleeping layer cost? Steps of a network with and without one in turn, median of the ratios."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from gpt import GPT, Block
from torch import nn

import auxin as ax


class Chain(nn.Module):
    """Six layers; the fourth place may hold a sleeping one as large as the others."""

    def __init__(self, dim: int, asleep: bool) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(dim, dim), nn.ReLU()) for _ in range(6)]
        self.layers = nn.Sequential(*layers)
        if asleep:
            self.layers.insert(3, ax.Dormant(nn.Sequential(nn.Linear(dim, dim), nn.ReLU())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def gpt(asleep: bool) -> nn.Module:
    model = GPT(depth=6, dim=128, heads=4)
    if asleep:
        model.blocks.insert(3, ax.Dormant(Block(128, 4)))
    return model


FAMILIES: dict[str, tuple[Callable[[bool], nn.Module], torch.Tensor]] = {
    "mlp": (lambda asleep: Chain(256, asleep), torch.randn(128, 256)),
    "gpt": (gpt, torch.randint(256, (4, 64))),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, (build, x) in FAMILIES.items():
        for held in ("all parameters", "trainable ones"):
            runs = []
            for asleep in (True, False, False):  # the second without one is there to show the noise
                model = build(asleep)
                given = [p for p in model.parameters() if p.requires_grad or held == "all parameters"]
                runs.append((model, torch.optim.AdamW(given)))
            for _ in range(5):
                for model, optimizer in runs:
                    step(model, optimizer, x)
            ratios: list[list[float]] = [[], []]
            for turn in range(args.rounds):
                order = [0, 1, 2] if turn % 2 else [2, 1, 0]
                times = {i: step(*runs[i], x) for i in order}
                ratios[0].append(times[0] / times[1])
                ratios[1].append(times[2] / times[1])
            told = [(statistics.median(r), *statistics.quantiles(r, n=20)[::18]) for r in ratios]
            (median, low, high), (noise, *_) = told
            print(
                f"{name}, optimizer holds {held}: with a sleeping layer / without, median {median:.3f} "
                f"(5-95 %: {low:.2f} .. {high:.2f}); two without {noise:.3f}"
            )


if __name__ == "__main__":
    main()
