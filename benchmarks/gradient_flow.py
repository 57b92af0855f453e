"""What watching the gradients of a new block costs per optimizer step, and the hook that stays when nothing is watched.

The same network takes every step in three ways in turn: with a block under watch, with the idle hook, without a hook.
A figure is the median of the ratios round by round; on the CPU of CPU time, on one thread.
"""

import argparse
import statistics
import time

import torch
from gpt import GPT
from torch import nn

import auxin as ax
from auxin.flow import FlowWatch


class Dense(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Mlp(nn.Module):
    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Dense(dim) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


NETWORKS = {
    "small MLP, 4 of 8 blocks new": (lambda: Mlp(64, 4), lambda: torch.randn(64, 64), 4),
    "MLP, 1 of 9 blocks new": (lambda: Mlp(256, 8), lambda: torch.randn(128, 256), 1),
    "GPT, 1 of 5 blocks new": (lambda: GPT(4, dim=128, heads=4), lambda: torch.randint(256, (4, 64)), 1),
}


def measure(build, batch, blocks: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Ratios of step times, round by round; the hooks are exchanged between steps, so that all else is equal."""
    torch.manual_seed(0)
    model, x = build().to(device), batch().to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    change = ax.grow(model, ax.Duplicate("blocks", by=blocks), optimizer, probe=x)
    watch = FlowWatch([optimizer])
    held = optimizer._optimizer_step_pre_hooks
    clock = time.perf_counter if x.is_cuda else time.process_time  # CPU time: other programs do not count
    hook = dict(held)

    def one(watched: bool, hooked: bool) -> float:
        held.clear()
        held.update(hook if hooked else {})
        watch.forget()
        if watched:
            watch.begin(change, 0, 0)
        start = clock()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if watched:
            watch.stepped(optimizer)
        if x.is_cuda:
            torch.cuda.synchronize()
        return clock() - start

    ways = {"watched": (True, True), "idle hook": (False, True), "no hook": (False, False)}
    for _ in range(10):
        for way in ways.values():
            one(*way)
    ratios: dict[str, list[float]] = {"watched": [], "idle hook": []}
    for turn in range(rounds):
        names = list(ways)[turn % 3 :] + list(ways)[: turn % 3]
        times = {name: one(*ways[name]) for name in names}
        for name, values in ratios.items():
            values.append(times[name] / times["no hook"])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, (build, batch, blocks) in NETWORKS.items():
        for way, values in measure(build, batch, blocks, args.rounds, args.device).items():
            spread = statistics.quantiles(values, n=20)
            print(
                f"{name}: step {way} / without a hook, median {statistics.median(values):.4f}   "
                f"(5-95 %: {spread[0]:.3f} .. {spread[-1]:.3f})"
            )


if __name__ == "__main__":
    main()
