"""What a growth costs under FSDP2, against building and sharding the grown network anew.

Both happen in turn in one run, in gloo processes on this machine, on a GPT of about 100 M parameters with AdamW. The
plan is made, and the start of the block found, before the clock runs, and no probe is run, since both ways need that;
all else is in the figure: agreeing, the new values, sharding them, the optimizer and its moments, the root, the checks,
the journal. Anew: the plain network is built on the meta device, sharded, given memory, filled with the shards that the
grown one has, and so is an optimizer with its moments: what a job would do that keeps the tensors and reads no file.

    python benchmarks/fsdp_cost.py [--rounds 5] [--processes 2] [--depth 24]
"""

import argparse
import os
import statistics
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ddp_cost import PLANS, Ready, seconds
from gpt import GPT
from torch import nn
from torch.distributed.fsdp import fully_shard

import auxin as ax
from auxin import sharded
from auxin.anatomy.probe import PlanContext


def shard(model: Any) -> Any:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def anew(model: Any, optimizer: Any, plain: Callable[[], nn.Module]) -> None:
    """The network that has grown, and its optimizer, built and sharded again."""
    with torch.device("meta"):
        other = shard(plain())
    other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    again = torch.optim.AdamW(other.parameters(), lr=1e-4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        again.state[q] = {key: value.clone() for key, value in optimizer.state.get(p, {}).items()}


def train(model: Any, optimizer: Any, ids: torch.Tensor) -> None:
    model(ids).logsumexp(-1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def rank_main(rank: int, size: int, port: int, rounds: int, depth: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    torch.manual_seed(0)
    model: Any = shard(GPT(depth))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(256, (1, 8), generator=torch.Generator().manual_seed(0))
    train(model, optimizer, ids)
    grower = ax.Grower(model, optimizer, edits=Ready(0), when=lambda reading: False)
    rows: dict[str, list[tuple[Any, Any]]] = {"a block more": [], "a block wider": []}
    memory: dict[str, Any] = {}
    wide = next(name for name, m in model.blocks[0].named_modules() if isinstance(m, nn.Linear) and _is_up(m))
    for number in range(rounds):
        for kind in rows:
            sharded.settle(model)
            place = f"blocks.{number}.{wide}"
            edit = ax.Duplicate("blocks", by=1) if kind == "a block more" else ax.Widen(place, by=256)
            PLANS.append(edit.plan(model, PlanContext(model, ids, seed=number, memory=memory)))
            sharded.settle(model)
            which = Ready(len(PLANS) - 1)
            grown = seconds(lambda which=which: grower.grow(which))
            shapes = [(name, p.shape) for name, p in model.named_parameters()]
            rows[kind].append((grown, seconds(lambda s=shapes: anew(model, optimizer, lambda: _of(model, s)))))
            train(model, optimizer, ids)
    ax.verify(model, optimizer)
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{count / 1e6:.1f} M parameters after {2 * rounds} growths, {size} processes, {rounds} rounds")
        for kind, row in rows.items():
            for which, name in enumerate(("clock", "processors")):
                ratios = sorted(b[which] / a[which] for a, b in row)
                grown, other = (statistics.median(one[which] for one in column) for column in zip(*row, strict=True))
                print(
                    f"{kind}, {name}: growth {1e3 * grown:.0f} ms, sharding the grown network anew {1e3 * other:.0f} "
                    f"ms; ratio round by round {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
                )
    dist.barrier()
    dist.destroy_process_group()


def _is_up(module: nn.Linear) -> bool:
    return module.out_features == 4 * module.in_features


def _of(model: Any, shapes: list[tuple[str, torch.Size]]) -> nn.Module:
    """A plain network of the same classes, as deep and as wide."""
    plain = GPT(len(model.blocks))
    for name, shape in shapes:
        path, _, leaf = name.rpartition(".")
        owner = plain.get_submodule(path)
        if getattr(owner, leaf).shape != shape:
            setattr(owner, leaf, nn.Parameter(torch.empty(shape)))
    return plain


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--depth", type=int, default=24)
    options = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the system picks a free port
    mp.spawn(rank_main, (options.processes, store.port, options.rounds, options.depth), options.processes)


if __name__ == "__main__":
    main()
