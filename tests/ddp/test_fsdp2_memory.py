"""Bytes of tensors on a rank, by storage: a grown network needs what one built at that size needs."""

import functools
from typing import Any

import torch
from processes import on_ranks
from ranked import Net, train_step
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from under_fsdp import built

import auxin as ax
from auxin.sharded import here

DIM, DEPTH, MORE, WIDER = 128, 6, 3, 288
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


class Bytes(TorchDispatchMode):
    """The most bytes that lived at once in storages that some operation has touched."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, StorageWeakRef] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                storage = here(tensor.detach()).untyped_storage()
                self.known[storage._cdata] = StorageWeakRef(storage)
        self.most = max(self.most, sum(map(alive, self.known.values())))
        return result


def alive(ref: StorageWeakRef) -> int:
    storage = None if ref.expired() else torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return 0 if storage is None else storage.nbytes()


def peak(call: Any) -> int:
    with Bytes() as counted:
        call()
    return counted.most


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
    grown = peak(lambda: train_step(model, optimizer, *batch(rank)))
    optimizer.zero_grad()
    widest = ax.grow(model, ax.Widen("blocks.*.up", to=WIDER), optimizer, probe=probe)
    assert widest.moves
    train_step(model, optimizer, *batch(rank))
    wider = peak(lambda: train_step(model, optimizer, *batch(rank)))
    other = built(DEPTH + MORE, BIG)
    others = adam(other)
    train_step(other, others, *batch(rank))
    fresh = peak(lambda: train_step(other, others, *batch(rank)))
    wide = built(DEPTH + MORE, Wide)
    its = adam(wide)
    train_step(wide, its, *batch(rank))
    return [grown, fresh, wider, peak(lambda: train_step(wide, its, *batch(rank)))]


def test_a_grown_network_needs_what_one_built_so_does() -> None:
    for rank, (grown, fresh, wider, wide) in enumerate(on_ranks(2, measured, timeout=300)):
        print(f"rank {rank}: peak bytes deeper {grown:,}, built so {fresh:,}; wider {wider:,}, built so {wide:,}")
        assert abs(grown - fresh) <= 0.05 * fresh
        assert abs(wider - wide) <= 0.05 * wide
