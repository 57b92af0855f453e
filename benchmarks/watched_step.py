"""What a Grower costs in every training step: the hooks of its watches on ``optimizer.step()``, on a small MLP.

    python benchmarks/watched_step.py [--rounds 60]

Training steps with the plain network and optimizer, with a Grower around them, and right after a growth, when the
gradients of the new block are read in 20 steps. The two of a pair take turns step by step in one process; a figure is
the median of the ratios of ten steps each, of seconds of the processor. The calls of Python functions in a step do not
depend on what else the machine does.
"""

import argparse
import statistics
import sys
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

    def step(self) -> float:
        started = time.process_time()
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - started


def compared(one: Training, other: Training) -> float:
    """Seconds of some steps of one over those of the other."""
    spent = {one: 0.0, other: 0.0}
    for turn in range(STEPS):
        for training in (one, other) if turn % 2 else (other, one):
            spent[training] += training.step()
    return spent[one] / spent[other]


def calls(training: Training) -> int:
    """Python functions that one step calls."""
    counted = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal counted
        counted += event == "call"

    sys.setprofile(count)
    training.step()
    sys.setprofile(None)
    return counted


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
        grown.step(), deeper.step()
        grown.grower.step()
        ax.grow(deeper.model, ax.Duplicate("blocks", by=1), deeper.optimizer, probe=inputs)
        for name, pair in zip(ratios, ((watched, bare), (grown, deeper)), strict=True):
            found = compared(*pair)
            if turn:
                ratios[name].append(found)
    counts = ((calls(watched), calls(bare)), (calls(grown), calls(deeper)))
    for (name, found), (own, plain) in zip(ratios.items(), counts, strict=True):
        print(f"{name}: median {statistics.median(found):.3f}   ({min(found):.2f} .. {max(found):.2f})")
        print(f"    calls of Python functions in a step: {own} / {plain}")


if __name__ == "__main__":
    main()
