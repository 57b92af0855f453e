"""What growing costs under ``torch.compile``: seconds of compiling and graphs per growth, against the first compile.

Inductor with its caches off, forward and backward; each way in a process of its own, one after the other.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
from gpt import GPT, train
from torch._dynamo.utils import counters

import auxin as ax

WAYS = {
    "as written": lambda model: model,
    "each block.compile()": lambda model: [block.compile() for block in model.blocks] and model,
    "torch.compile(model)": torch.compile,
    "model.compile()": lambda model: model.compile() or model,
}


def run(way: str, growths: int, depth: int) -> None:
    """Grow ``growths`` times in this process; prints one line per growth and a summary."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(depth, dim=64, heads=4)
    call = WAYS[way](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(256, (2, 32))
    start = time.perf_counter()
    train(call, optimizer, ids, 1)
    first = time.perf_counter() - start
    graphs = [counters["stats"]["unique_graphs"]]
    steps, changes = [], []
    for _ in range(growths):
        optimizer.zero_grad()
        changes.append(ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=ids))
        start = time.perf_counter()
        train(call, optimizer, ids, 1)
        steps.append(time.perf_counter() - start)
        graphs.append(counters["stats"]["unique_graphs"])
    seconds = [change.compiling.seconds if change.compiling is not None else 0.0 for change in changes]
    new = [b - a for a, b in zip(graphs, graphs[1:], strict=False)]
    print(f"{way}: first step {first:.2f} s, {graphs[0]} graphs")
    print(f"  compiling per growth, s:  {' '.join(f'{s:.2f}' for s in seconds)}")
    print(f"  first step after each, s: {' '.join(f'{s:.2f}' for s in steps)}")
    print(f"  new graphs per growth:    {' '.join(map(str, new))}")
    grown = 1e3 * statistics.median(change.seconds for change in changes)
    print(
        f"  median step after a growth / first step {statistics.median(steps) / first:.3f}, "
        f"the last {steps[-1] / first:.3f}; growing itself {grown:.0f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--growths", type=int, default=12)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--way", choices=WAYS)
    args = parser.parse_args()
    if args.way:
        run(args.way, args.growths, args.depth)
        return
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--growths", str(args.growths), "--depth", str(args.depth)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
