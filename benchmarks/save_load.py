"""Saving and loading a run of a 98 M GPT with AdamW, beside torch.save and torch.load of the same state."""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from gpt import GPT, train

import auxin as ax


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(depth: int) -> tuple[GPT, torch.optim.Optimizer, ax.Grower]:
    model = GPT(depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    edits = ax.Duplicate("blocks", by=1, output="keep")
    return model, optimizer, ax.Grower(model, optimizer, edits=edits, when=ax.when.every(1000))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, optimizer, grower = run(args.depth)
    ids = torch.randint(256, (1, 32))
    train(model, optimizer, ids, 1)
    optimizer.zero_grad()
    rows: dict[str, list[float]] = {"save / torch.save": [], "load / torch.load and load_state_dict": []}
    with tempfile.TemporaryDirectory() as place:
        ours, theirs = Path(place) / "run", Path(place) / "run.pt"

        def stock() -> None:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, theirs)
            with open(theirs, "rb") as file:
                os.fsync(file.fileno())

        def stock_load() -> None:
            state = torch.load(theirs)
            fresh.load_state_dict(state["model"])
            other.load_state_dict(state["optimizer"])

        for _ in range(args.rounds):
            rows["save / torch.save"].append(seconds(lambda: ax.save(grower, ours, keep_last=1)) / seconds(stock))
            fresh, other, again = run(args.depth)
            loaded = seconds(lambda again=again: ax.load(ours, again))
            rows["load / torch.load and load_state_dict"].append(loaded / seconds(stock_load))
        size = sum(f.stat().st_size for f in ours.rglob("*") if f.is_file())
        print(f"{size / 1e9:.2f} GB; torch.save writes {theirs.stat().st_size / 1e9:.2f} GB (both flushed to the disk)")
    for name, values in rows.items():
        print(f"{name}: median {statistics.median(values):.2f}   ({min(values):.2f} .. {max(values):.2f})")


if __name__ == "__main__":
    main()
