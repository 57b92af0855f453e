"""What a Grower costs in every training step: the hooks of its watches on ``optimizer.step()``, on a small MLP.

    python benchmarks/watched_step.py [--rounds 60]

Training steps with the plain network and optimizer, with a Grower around them, and right after a growth, when the
gradients of the new block are read in 20 steps. All in turn in one process, some steps at a time; a figure is the
median of the ratios round by round, of seconds of the processor.
"""

import argparse
import statistics
import time

import torch
from growth_scaling import Net

import auxin as ax

STEPS = 10  # at a time


class Training:
    def __init__(self, watched: bool, inputs: torch.Tensor) -> None:
        torch.manual_seed(0)
        self.model, self.inputs = Net(2, 64), inputs
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        edit = ax.Duplicate("blocks", by=1)
        when = ax.when.every(1)
        self.grower = ax.Grower(self.model, self.optimizer, edits=edit, when=when, probe=inputs) if watched else None

    def seconds(self) -> float:
        started = time.process_time()
        for _ in range(STEPS):
            self.model(self.inputs).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    inputs = torch.randn(64, 8)
    bare, watched = Training(False, inputs), Training(True, inputs)
    ratios: dict[str, list[float]] = {"watched / bare": [], "after a growth / bare": []}
    for turn in range(args.rounds + 1):
        grown, deeper = Training(True, inputs), Training(False, inputs)
        grown.seconds(), deeper.seconds()
        grown.grower.step()
        ax.grow(deeper.model, ax.Duplicate("blocks", by=1), deeper.optimizer, probe=inputs)
        for name, pair in zip(ratios, ((watched, bare), (grown, deeper)), strict=True):
            times = {one: one.seconds() for one in (pair if turn % 2 else pair[::-1])}
            if turn:
                ratios[name].append(times[pair[0]] / times[pair[1]])
    for name, found in ratios.items():
        print(f"{name}: median {statistics.median(found):.3f}   ({min(found):.2f} .. {max(found):.2f})")


if __name__ == "__main__":
    main()
