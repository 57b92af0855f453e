"""What a growth costs under DistributedDataParallel, against wrapping the grown network anew.

Both happen in turn in one run, in gloo processes on this machine, on a GPT of 24 blocks and about 96 M parameters with
AdamW. The block is copied, and found out how to start, before the clock runs, and no probe is run, since both ways need
that; all else is in the figure: agreeing, sending the new values, the optimizer, the reducer, the checks, the journal.

    python benchmarks/ddp_cost.py [--rounds 7] [--processes 2]
"""

import argparse
import dataclasses
import functools
import importlib
import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpt import GPT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import auxin as ax
from auxin import agreed, ranks
from auxin.anatomy.probe import PlanContext

PLANS: list[ax.Change] = []


@dataclasses.dataclass(frozen=True)
class Ready:
    """An edit that was planned before."""

    number: int

    def plan(self, model: nn.Module, context: Any) -> ax.Change:
        return PLANS[self.number]


class Share:
    """Seconds of this process's processors inside of what only DDP needs: agreeing, the new values, the reducer."""

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False
        for owner, name in (
            (ranks.Ranks, "_meet"),
            (ranks.Ranks, "broadcast"),
            (agreed, "structure"),
            (agreed, "plan"),
            (importlib.import_module("auxin.follow.ddp"), "rebuild"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, start = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds += time.process_time() - start

        return timed

    def read(self) -> float:
        """Of all ranks together, since the last call."""
        spent = torch.tensor([self.seconds])
        self.seconds = 0.0
        dist.all_reduce(spent)
        return float(spent)


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """On the clock, and of all processors together (which a busy machine disturbs less)."""
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    work()
    busy = time.process_time() - busy
    dist.barrier()
    taken, spent = time.perf_counter() - start, torch.tensor([busy])
    dist.all_reduce(spent)
    return taken, float(spent)


def rank_main(rank: int, size: int, port: int, rounds: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    torch.manual_seed(0)
    inner = GPT(24)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(256, (1, 8), generator=torch.Generator().manual_seed(0))
    model(ids).logsumexp(-1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    grower = ax.Grower(model, optimizer, edits=Ready(0), when=lambda reading: False)
    memory: dict[str, Any] = {}
    rows, shares = [], []
    share = Share()
    for number in range(rounds):
        PLANS.append(ax.Duplicate("blocks", by=1).plan(inner, PlanContext(inner, ids, seed=number, memory=memory)))
        share.read()
        grown = seconds(lambda number=number: grower.grow(Ready(number)))
        shares.append(share.read())
        rows.append((grown, seconds(lambda: DistributedDataParallel(inner))))
        model(ids).logsumexp(-1).mean().backward()  # the reducer works, and a step ends the growth
        optimizer.step()
        optimizer.zero_grad()
    ax.verify(model, optimizer)
    if rank == 0:
        part = sorted(b[1] / a for a, (_, b) in zip(shares, rows, strict=True))
        count = sum(p.numel() for p in inner.parameters())
        print(f"{count / 1e6:.1f} M parameters after {rounds} growths, {size} processes, medians of {rounds} rounds")
        for which, name in enumerate(("clock", "processors")):
            grown, wrapped = ([both[which] for both in column] for column in zip(*rows, strict=True))
            ratios = sorted(b / a for a, b in zip(grown, wrapped, strict=True))
            print(
                f"{name}: growth {1e3 * statistics.median(grown):.1f} ms, wrapping the grown network anew "
                f"{1e3 * statistics.median(wrapped):.0f} ms; ratio round by round {statistics.median(ratios):.0f} "
                f"({ratios[0]:.0f} to {ratios[-1]:.0f})"
            )
        print(
            f"processors: of the growth, what only DDP needs {1e3 * statistics.median(shares):.1f} ms; ratio round by "
            f"round {statistics.median(part):.0f} ({part[0]:.0f} to {part[-1]:.0f})"
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the system picks a free port
    mp.spawn(rank_main, (options.processes, store.port, options.rounds), options.processes)


if __name__ == "__main__":
    main()
