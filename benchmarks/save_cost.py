"""``ax.save`` beside ``torch.save`` of the same content, both brought down to the disk, in turn in one process.

    python benchmarks/save_cost.py [--rounds 7] [--against PATH_TO_ANOTHER_SRC]

The content is network, AdamW's state, schedule and average of two residual MLPs: one with few large tensors, one with
many small ones. ``async_save`` is the call alone, after which training goes on. A figure is the median of the ratios
round by round. With ``--against`` the other build is measured in
a process of its own, before and after this one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from growth_scaling import Net

import auxin as ax

NETWORKS = {"few large tensors": (8, 1024), "many small tensors": (512, 16)}


def run(depth: int, dim: int) -> tuple[ax.Grower, dict[str, torch.nn.Module]]:
    model = Net(depth, dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    average = torch.optim.swa_utils.AveragedModel(model)
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    schedule.step()
    average.update_parameters(model)
    optimizer.zero_grad()
    held = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    edits = ax.Duplicate("blocks", by=1, output="keep")
    return ax.Grower(model, optimizer, schedule, average, edits=edits, when=ax.when.every(1000)), held


def seconds(work, clock) -> float:
    started = clock()
    work()
    return clock() - started


def measure(rounds: int, label: str, clock) -> None:
    torch.set_num_threads(1)
    for name, (depth, dim) in NETWORKS.items():
        grower, held = run(depth, dim)
        with tempfile.TemporaryDirectory() as place:
            ours, theirs = Path(place) / "run", Path(place) / "run.pt"

            def stock(held=held, theirs=theirs) -> None:
                torch.save({key: one.state_dict() for key, one in held.items()}, theirs)
                with open(theirs, "rb") as file:
                    os.fsync(file.fileno())

            written, rounds_of = [], []

            def later(grower=grower, ours=ours, written=written) -> None:
                written.append(ax.async_save(grower, ours, keep_last=1))

            for turn in range(rounds + 1):
                works = [lambda: ax.save(grower, ours, keep_last=1), stock, later]  # noqa: B023
                times = {}
                for work in works[:: 1 if turn % 2 else -1]:
                    times[work] = seconds(work, clock)
                    if work is later:
                        written.pop().result()
                rounds_of.append([times[work] for work in works])
            mine, other, call = (statistics.median(column) for column in zip(*rounds_of[1:], strict=True))
            ratios = [a / b for a, b, _ in rounds_of[1:]]
            calls = [c / a for a, _, c in rounds_of[1:]]
            print(
                f"{label:12}{name:20}{theirs.stat().st_size / 1e6:8.1f} MB   save {1e3 * mine:7.1f} ms   torch.save "
                f"{1e3 * other:7.1f} ms   ratio {statistics.median(ratios):5.2f} "
                f"({min(ratios):.2f} .. {max(ratios):.2f})   async_save {1e3 * call:7.1f} ms, of save "
                f"{statistics.median(calls):5.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--against", help="the src folder of another build")
    parser.add_argument("--processor", action="store_true", help="seconds of the processor, without the disk")
    parser.add_argument("--label", default="this build", help=argparse.SUPPRESS)
    args = parser.parse_args()
    other = [sys.executable, __file__, "--rounds", str(args.rounds), "--label", "other build"]
    environment = dict(os.environ, PYTHONPATH=args.against or "")
    other += ["--processor"] if args.processor else []
    if args.against:
        subprocess.run(other, env=environment, check=True)
    measure(args.rounds, args.label, time.process_time if args.processor else time.perf_counter)
    if args.against:
        subprocess.run(other, env=environment, check=True)


if __name__ == "__main__":
    main()
