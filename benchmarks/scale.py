"""What a growth, a save and a load cost as the ranks get more: measured on 1, 2 and 4 processes, and worked out beyond.

    python benchmarks/scale.py measure [--processes 1 2 4] [--depths 4 8] [--rounds 3]  # adds to scale-2026-11-30.jsonl
    python benchmarks/scale.py meetings [--processes 4 16 64 128]  # how long so many ranks take to agree
    python benchmarks/scale.py model  # 8 to 1,024 GPUs, 1 B to 70 B parameters, from that file

Measured are gloo processes under FSDP2 on this machine. Bytes sent are those that the kernel has counted at the sockets
of a rank (TCP_INFO, Linux), to other ranks and to the store of the process group. Peaks count storages of tensors.
"""

import argparse
import functools
import json
import os
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT
from tensor_bytes import peak
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import auxin as ax
from auxin.ranks import Ranks

RECORD = Path(__file__).with_name("scale-2026-11-30.jsonl")
BYTES_SENT = 200  # where the kernel's struct tcp_info holds tcpi_bytes_sent


class Sent:
    """Bytes that this process has sent: [to other ranks, to the store or from it]."""

    def __init__(self, store_port: int) -> None:
        self.port = store_port

    def now(self) -> tuple[int, int]:
        sent = [0, 0]
        for name in os.listdir("/proc/self/fd"):
            try:
                if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(name))) as one:
                    if one.type != socket.SOCK_STREAM or one.family not in (socket.AF_INET, socket.AF_INET6):
                        continue
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    ports = {one.getsockname()[1], one.getpeername()[1]}
            except OSError:
                continue
            sent[self.port in ports] += struct.unpack_from("<Q", info, BYTES_SENT)[0]
        return sent[0], sent[1]

    def during(self, call: Callable[[], Any]) -> tuple[int, int]:
        before = self.now()
        call()
        after = self.now()
        return after[0] - before[0], after[1] - before[1]


class Collectives(TorchDispatchMode):
    """Bytes of whole tensors that were gathered, or reduced and scattered, and the number of such calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        name = str(function).partition(".default")[0]
        if name == "c10d._allgather_base_":
            self.gathered += args[0].nbytes
        elif name == "_c10d_functional.all_gather_into_tensor":
            self.gathered += found.nbytes
        elif name == "c10d._reduce_scatter_base_":
            self.reduced += args[1].nbytes
        elif name.startswith(("c10d.", "_c10d_functional.")) and "reduce" in name:
            raise AssertionError(f"{name} is not counted")
        self.calls += name.startswith("c10d.") or "gather" in name
        return found

    @classmethod
    def during(cls, call: Callable[[], Any]) -> dict[str, int]:
        with cls() as one:
            call()
        return {"gathered": one.gathered, "reduced": one.reduced, "calls": one.calls}


def counted(call: Callable[[], Any]) -> int:
    """How often the ranks meet."""
    meet, times = Ranks._gather, 0

    def gather(self: Ranks, *words: Any) -> Any:
        nonlocal times
        times += 1
        return meet(self, *words)

    Ranks._gather = gather  # pyright: ignore[reportAttributeAccessIssue]
    try:
        call()
    finally:
        Ranks._gather = meet
    return times


def seconds(call: Callable[[], Any]) -> float:
    dist.barrier()
    begun = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - begun


class Job:
    """A GPT under FSDP2 with AdamW."""

    def __init__(self, depth: int, dim: int) -> None:
        torch.manual_seed(0)
        self.model: Any = GPT(depth, dim, heads=dim // 64)
        for block in self.model.blocks:
            fully_shard(block)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.ids = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(0))
        edits, never = ax.Duplicate("blocks", by=1), ax.when.at([10**9])
        self.grower = ax.Grower(self.model, self.optimizer, edits=edits, when=never, probe=self.ids)

    def sizes(self) -> dict[str, int]:
        return {"network": size_of(self.model.parameters()), "depth": len(self.model.blocks)}

    def train(self) -> None:
        self.model(self.ids).logsumexp(-1).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def growths(dim: int) -> dict[str, Callable[[int], Any]]:
    return {
        "a block more": lambda number: ax.Duplicate("blocks", by=1),
        "a block wider": lambda number: ax.Widen(f"blocks.{number}.up", by=dim),
    }


def size_of(tensors: Any) -> int:
    return sum(p.numel() * p.element_size() for p in tensors)


def measured(rank: int, port: int, depth: int, dim: int, rounds: int, folder: str) -> dict[str, Any]:
    first = Job(depth, dim)  # the first growths of a process take longer: libraries are loaded
    for edit in growths(dim).values():
        first.train()
        first.grower.grow(edit(0))
    del first
    job, sent = Job(depth, dim), Sent(port)
    job.train()
    found: dict[str, Any] = {
        "processes": dist.get_world_size(),
        "block": size_of(job.model.blocks[0].parameters()),
        "step": {
            **job.sizes(),
            **Collectives.during(job.train),
            "sent": sent.during(job.train),
            "peak": peak(job.train, job.optimizer),
            "seconds": statistics.median(seconds(job.train) for _ in range(rounds)),
        },
    }
    for name, edit in growths(dim).items():
        job = Job(depth, dim)  # as many blocks for both kinds
        job.train()
        took = []
        for number in range(rounds):
            took.append(seconds(lambda number=number, edit=edit, job=job: job.grower.grow(edit(number))))
            job.train()
        row: dict[str, Any] = {"seconds": statistics.median(took)}
        for key in ("sent", "peak", "meetings", ""):
            job = Job(depth, dim)
            job.train()
            row |= job.sizes()
            highest = functools.partial(peak, optimizer=job.optimizer)
            measure = {"sent": sent.during, "peak": highest, "meetings": counted, "": Collectives.during}[key]
            value = measure(lambda job=job, edit=edit: job.grower.grow(edit(1)))
            row |= {key: value} if key else value
            job.train()
            ax.verify(job.model, job.optimizer)
        found[name] = row
    return found | saved_and_loaded(job, sent, rounds, folder, depth, dim)


def saved_and_loaded(job: Job, sent: Sent, rounds: int, folder: str, depth: int, dim: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    saves = [seconds(lambda: ax.save(job.grower, folder)) for _ in range(rounds)]
    found["save"] = {"seconds": statistics.median(saves), "sent": sent.during(lambda: ax.save(job.grower, folder))}
    newest = max(Path(folder).glob("checkpoint-*"))
    found["save"]["bytes"] = sum(file.stat().st_size for file in newest.iterdir())
    loads = []
    for _ in range(rounds):
        fresh = Job(depth, dim)
        loads.append(seconds(lambda fresh=fresh: ax.load(folder, fresh.grower)))
    found["load"] = {"seconds": statistics.median(loads)}
    return found


def on_ranks(size: int, *words: Any) -> list[Any]:
    """What ``measured`` finds on each of some ranks, forked."""
    context = get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(size)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the system picks a free port
    children = [
        context.Process(target=_rank, args=(rank, size, store.port, ends[rank][1], words)) for rank in range(size)
    ]
    for child in children:
        child.start()
    for _, theirs in ends:
        theirs.close()
    found = [ours.recv() for ours, _ in ends]
    for child in children:
        child.join()
    return found


def _rank(rank: int, size: int, port: int, end: Any, words: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    end.send(measured(rank, port, *words))
    dist.barrier()
    dist.destroy_process_group()


class Party:
    """As much of a process group as a meeting needs: its store."""

    def __init__(self, port: int) -> None:
        self.store = dist.TCPStore("127.0.0.1", port, is_master=False)

    def get_group_store(self) -> Any:
        return self.store


SAYING: tuple[tuple[str, Callable[[Ranks], Callable[..., Any]], Callable[[int], Any]], ...] = (
    ("the same", lambda ranks: ranks.share, lambda rank: 0),
    ("of its own", lambda ranks: ranks.share, lambda rank: rank),
    ("15 kB, to rank 0", lambda ranks: getattr(ranks, "collect", ranks.share), lambda rank: f"{rank:15000}"),
)


def _meets(rank: int, size: int, port: int, end: Any, times: int) -> None:
    end.recv()  # a fork while the thread of the store is at work may inherit a lock that nobody opens
    ranks = Ranks(None)
    ranks._group, ranks.rank, ranks.size = Party(port), rank, size
    ranks.share("first", lambda: rank)  # all are there
    for _, way, say in SAYING:
        end.send(None)
        end.recv()
        begun = time.perf_counter()
        for _ in range(times):
            way(ranks)("meeting", lambda say=say: say(rank))
        end.send((time.perf_counter() - begun) / times)
    end.recv()  # nobody leaves before all are through


def meetings(size: int, times: int) -> None:
    """How long a meeting takes, and how much of it is the processor time of the process that holds the store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = get_context("fork")
    ends = [context.Pipe() for _ in range(size)]
    children = [context.Process(target=_meets, args=(n, size, store.port, ends[n][1], times)) for n in range(size)]
    for child in children:
        child.start()

    def go() -> None:
        for ours, _ in ends:
            ours.send(None)

    go()
    for name, _, _ in SAYING:
        for ours, _ in ends:
            ours.recv()
        begun = time.process_time()
        go()
        clock = max(ours.recv() for ours, _ in ends)
        busy = (time.process_time() - begun) / times
        print(f"{size} processes say {name}: {1e3 * clock:.1f} ms, of the store {1e3 * busy:.2f} ms", flush=True)
    go()
    for child in children:
        child.join()


# ---- the cost model

GBIT = 100e9 / 8  # bytes a second
PER_MEETING = 0.11e-3  # seconds of the store's processor for each rank at a meeting: `meetings` prints it
SHAPES = {"1 B": (16, 2048), "8 B": (36, 4096), "30 B": (56, 6656), "70 B": (86, 8192)}  # depth, width
VOCABULARY = 128_000
GPUS = (8, 64, 256, 1024)
Row = dict[str, Any]


def fitted(rows: list[tuple[list[float], float]]) -> list[float]:
    """Factors of the least squares, of relative errors."""
    a = torch.tensor([[x / y for x in row] for row, y in rows], dtype=torch.float64)
    return torch.linalg.lstsq(a, torch.ones(len(rows), 1, dtype=torch.float64)).solution.flatten().tolist()


class Model:
    """What one kind of growth costs, by the size of the network N, that of a block B, the depth L and the ranks P.

    gathered = a N + b B, reduced = c N + d B, meetings = e + f L, peak = g N / P + h B. A rank sends the part
    (P - 1) / P of what is gathered, and of what is reduced; twice as much of the latter over gloo, which reduces all
    on every rank.
    """

    def __init__(self, records: list[Row], kind: str) -> None:
        rows = [(one[kind], one["block"], one["processes"]) for one in records]
        several = [(row, block) for row, block, size in rows if size > 1]
        self.gathered = fitted([([row["network"], block], row["gathered"]) for row, block in several])
        self.reduced = fitted([([row["network"], block], row["reduced"]) for row, block in several])
        self.meetings = fitted([([1, row["depth"]], row["meetings"]) for row, _ in several])
        self.peak = fitted([([row["network"] / size, block], row["peak"]) for row, block, size in rows])

    def sent(self, network: float, block: float, size: int, over_gloo: bool = False) -> float:
        gathered, reduced = (f[0] * network + f[1] * block for f in (self.gathered, self.reduced))
        return (size - 1) / size * (gathered + (1 + over_gloo) * reduced)

    def highest(self, network: float, block: float, size: int) -> float:
        return self.peak[0] * network / size + self.peak[1] * block


def compared(records: list[Row], kind: str, model: Model) -> None:
    factors = (model.gathered, model.reduced, model.meetings, model.peak)
    print(
        f"\n{kind}: "
        + "; ".join(f"{n} = {_told(f)}" for n, f in zip(("a, b", "c, d", "e, f", "g, h"), factors, strict=True))
    )
    print("\n| processes | blocks | sent, MB | model | peak, MB | model | meetings | model | growth / step, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one in sorted(records, key=lambda one: (one["step"]["depth"], one["processes"])):
        row, block, size = one[kind], one["block"], one["processes"]
        sent = model.sent(row["network"], block, size, over_gloo=True)
        highest = model.highest(row["network"], block, size)
        meet = model.meetings[0] + model.meetings[1] * row["depth"]
        print(
            f"| {size} | {row['depth']} | {row['sent'][0] / 1e6:.1f} | {sent / 1e6:.1f} | {row['peak'] / 1e6:.1f} "
            f"| {highest / 1e6:.1f} | {row['meetings']} | {meet:.0f} | {row['seconds'] / one['step']['seconds']:.1f} |"
        )


def saved(records: list[Row]) -> None:
    print("\n| processes | blocks | three times the weights, MB | checkpoint, MB | sent, kB | save, s | load, s |")
    print("|---|---|---|---|---|---|---|")
    for one in sorted(records, key=lambda one: (one["step"]["depth"], one["processes"])):
        save, step = one["save"], one["step"]
        print(
            f"| {one['processes']} | {step['depth']} | {3 * step['network'] / 1e6:.1f} | {save['bytes'] / 1e6:.1f} | "
            f"{sum(save['sent']) / 1e3:.0f} | {save['seconds']:.2f} | {one['load']['seconds']:.2f} |"
        )


def _told(factors: list[float]) -> str:
    return ", ".join(f"{factor:.2f}" for factor in factors)


def sizes(depth: int, dim: int) -> tuple[float, float]:
    """Bytes of a network and of one of its blocks, in float32."""
    block = 4 * 12 * dim * dim
    return depth * block + 4 * VOCABULARY * dim, block


def worked_out(models: dict[str, Model], records: list[Row]) -> None:
    print("\n| parameters | blocks | a training step sends, GB | s at 100 Gb/s |", end="")
    print("".join(f" {kind} sends | s | steps |" for kind in models))
    print("|---|---|---|---|" + "---|---|---|" * len(models))
    for name, (depth, dim) in SHAPES.items():
        network, block = sizes(depth, dim)
        step = 3 * network
        cells = [name, str(depth), f"{step / 1e9:.0f}", f"{step / GBIT:.1f}"]
        for model in models.values():
            sent = model.sent(network, block, 1024)
            cells += [f"{sent / 1e9:.0f}", f"{sent / GBIT:.1f}", f"{sent / step:.2f}"]
        print("| " + " | ".join(cells) + " |")
    several = [(one["step"], one["block"], one["processes"]) for one in records if one["processes"] > 1]
    least = fitted([([row["network"] / size, block], row["peak"]) for row, block, size in several])
    print(f"\na training step: {_told(least)}")
    print("\n| GB on each GPU |" + "".join(f" {size} GPUs |" for size in GPUS))
    print("|---|" + "---|" * len(GPUS))
    for name, (depth, dim) in SHAPES.items():
        network, block = sizes(depth, dim)
        cells = []
        for size in GPUS:
            step = least[0] * network / size + least[1] * block
            growth = max(model.highest(network, block, size) for model in models.values())
            cells.append(f"{3 * network / size / 1e9:.1f}, {step / 1e9:.1f}, {growth / 1e9:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| s of agreeing |" + "".join(f" {size} GPUs |" for size in GPUS))
    print("|---|" + "---|" * len(GPUS))
    for name, (depth, _) in SHAPES.items():
        times = [sum(f * x for f, x in zip(m.meetings, (1, depth), strict=True)) for m in models.values()]
        print(f"| {name} | " + " | ".join(f"{max(times) * size * PER_MEETING:.1f}" for size in GPUS) + " |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["measure", "meetings", "model"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "model":
        records = [json.loads(line) for line in RECORD.read_text().splitlines()]
        models = {kind: Model(records, kind) for kind in growths(64)}
        for kind, model in models.items():
            compared(records, kind, model)
        saved(records)
        worked_out(models, records)
        return
    if options.what == "meetings":
        for size in options.processes:
            meetings(size, 20)
        return
    for depth in options.depths:
        for size in options.processes:
            with tempfile.TemporaryDirectory() as folder:
                row = on_ranks(size, depth, options.dim, options.rounds, folder)[-1]
            print(json.dumps(row), flush=True)
            with open(RECORD, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
