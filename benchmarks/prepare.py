"""The first step after a growth that was prepared, beside a normal step, and beside the stall of one that was not.

Inductor with its caches off, forward and backward; each way in a process of its own, one after the other. The network
grows once as it comes, and once prepared; the prepared growth is made again and again from the same state (``undo``),
and the step after each is timed beside the three that follow it. Steps are told in processor time too, which other work
on the machine does not change; seconds of compiling are told by the clock, since inductor has processes of its own.
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
from torch import nn
from torch._dynamo.utils import counters

import auxin as ax

WAYS = {
    "as written": lambda model: model,
    "each block.compile()": lambda model: [block.compile() for block in model.blocks] and model,
    "torch.compile(model)": torch.compile,
    "model.compile()": lambda model: model.compile() or model,
}


def resident() -> float:
    """Megabytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def run(way: str, growths: int, depth: int) -> None:
    """Grow unprepared, prepare, and grow ``growths`` times from there; prints one line for each part."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(depth, dim=192, heads=6)
    call: nn.Module = WAYS[way](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(256, (4, 64))
    edit = ax.Duplicate("blocks", by=1)
    grower = ax.Grower(call, optimizer, edits=edit, when=ax.when.at([]), probe=ids, keep=True)

    def timed() -> tuple[float, float]:
        clock, busy = time.perf_counter(), time.process_time()
        train(call, optimizer, ids, 1)
        return time.perf_counter() - clock, time.process_time() - busy

    def median(steps: list[tuple[float, float]]) -> tuple[float, float]:
        return statistics.median(clock for clock, _ in steps), statistics.median(busy for _, busy in steps)

    def graphs() -> int:
        return counters["stats"]["unique_graphs"]

    very_first, normal = timed()[0], median([timed() for _ in range(9)])[0]
    optimizer.zero_grad()
    before = graphs()
    grower.grow(edit)
    stalled, stalled_graphs = timed()[0], graphs() - before
    grown = median([timed() for _ in range(9)])[0]
    optimizer.zero_grad()
    memory = resident()
    done = grower.prepare(edit, lambda: train(call, optimizer, ids, 1))
    memory, before = resident() - memory, graphs()
    firsts, others = [], []
    for number in range(growths):
        if number:
            grower.undo()
        grower.grow(edit)
        firsts.append(timed())
        others += [timed() for _ in range(3)]
    print(f"{way}: very first step {very_first:.1f} s, a normal one {1e3 * normal:.0f} ms")
    print(
        f"  not prepared: first step {1e3 * stalled:.0f} ms, {stalled_graphs} graphs; "
        f"{stalled / very_first:.3f} of the very first, {stalled / grown:.2f} of a normal step then"
    )
    print(f"  {done}; resident memory +{memory:.0f} MB")
    print(f"  prepared: first step {1e3 * firsts[0][0]:.0f} ms, {graphs() - before} graphs over {growths} growths")
    for name, first, some, step in zip(
        ("by the clock", "processor time"), firsts[0], zip(*firsts, strict=True), median(others), strict=True
    ):
        ratios = sorted(one / step for one in some)
        print(
            f"    {name}: median of the first steps / of the others {statistics.median(ratios):.2f} "
            f"(the very growth {first / step:.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--growths", type=int, default=15)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--way", choices=WAYS)
    args = parser.parse_args()
    if args.way:
        run(args.way, args.growths, args.depth)
    else:
        sizes = ["--growths", str(args.growths), "--depth", str(args.depth)]
        for way in WAYS:
            subprocess.run([sys.executable, __file__, "--way", way, *sizes], check=True)


if __name__ == "__main__":
    main()
