"""Bytes of tensors on a rank, by storage: a grown network needs what one built at that size needs."""

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from processes import on_ranks
from ranked import Net, train_step
from torch import nn
from under_fsdp import built

import auxin as ax

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from tensor_bytes import peak

DIM, DEPTH, MORE, WIDER = 128, 4, 2, 288
BIG = functools.partial(Net, DIM)


class Wide(Net):
    """A network that was built as wide as another one has grown."""

    def __init__(self, depth: int):
        super().__init__(DIM, depth)
        for block in self.blocks:
            block.up, block.down = nn.Linear(DIM, WIDER), nn.Linear(WIDER, DIM)


def batch(rank: int) -> Any:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(rank))
    return x, x.sum(1, keepdim=True)


def adam(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def measured(rank: int) -> list[int]:
    model = built(DEPTH, BIG)
    optimizer = adam(model)
    train_step(model, optimizer, *batch(rank))
    optimizer.zero_grad()
    edit = ax.Duplicate("blocks", by=1)
    probe = batch(0)[0]
    for _ in range(MORE):
        ax.grow(model, edit, optimizer, probe=probe)
    train_step(model, optimizer, *batch(rank))
    grown = peak(lambda: train_step(model, optimizer, *batch(rank)), optimizer)
    optimizer.zero_grad()
    widest = ax.grow(model, ax.Widen("blocks.*.up", to=WIDER), optimizer, probe=probe)
    assert widest.moves
    train_step(model, optimizer, *batch(rank))
    wider = peak(lambda: train_step(model, optimizer, *batch(rank)), optimizer)
    other = built(DEPTH + MORE, BIG)
    others = adam(other)
    train_step(other, others, *batch(rank))
    fresh = peak(lambda: train_step(other, others, *batch(rank)), others)
    wide = built(DEPTH + MORE, Wide)
    its = adam(wide)
    train_step(wide, its, *batch(rank))
    return [grown, fresh, wider, peak(lambda: train_step(wide, its, *batch(rank)), its)]


def test_a_grown_network_needs_what_one_built_so_does() -> None:
    for rank, (grown, fresh, wider, wide) in enumerate(on_ranks(2, measured, timeout=300)):
        print(f"rank {rank}: peak bytes deeper {grown:,}, built so {fresh:,}; wider {wider:,}, built so {wide:,}")
        assert abs(grown - fresh) <= 0.05 * fresh
        assert abs(wider - wide) <= 0.05 * wide
