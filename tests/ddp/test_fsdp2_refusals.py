"""What is refused on a network under FSDP2, by name and on every rank, with nothing changed and training going on."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from ranked import Block, Net, share, train_step
from test_fsdp2 import EDITS, FIRST, adam, held, on_last_axis
from torch import nn
from under_fsdp import PROBE, built, full, same, set_up, shards

import auxin as ax
from auxin import fsdp2

COPIES = ax.Replace("blocks.0", nn.Identity, init="copies")


def refused(rank: int, model: Any, optimizer: Any, call: Any) -> str:
    """The text; the network is as it was, and trains on."""
    before, moments, modules = shards(model), held(optimizer), list(map(id, model.modules()))
    with pytest.raises((ax.GrowthError, ZeroDivisionError)) as error:
        call()
    assert same(before, shards(model)) and same(moments, held(optimizer)) and modules == list(map(id, model.modules()))
    train_step(model, optimizer, *share(9, rank, 2))
    set_up(model)
    optimizer.zero_grad()
    return str(error.value)


def own_start(module: nn.Module, site: Any) -> None:
    """A start of one's own."""


class Shares(Net):
    """Blocks that share a tensor, in one unit."""

    def __init__(self, dim: int = 8, depth: int = 1):
        super().__init__(dim, depth)
        self.tail = nn.ModuleList(Block(dim) for _ in range(2))
        self.tail[1].up.weight = self.tail[0].up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (self.inp, *self.blocks, *self.tail):
            x = block(x)
        return self.out(x)


def by_name(rank: int) -> dict[str, str]:
    model = built()
    optimizer = adam(model)
    columns = built(shard_placement_fn=on_last_axis)
    shares = built(build=Shares)
    copied = adam(shares)

    def without_sync() -> Any:
        model.set_requires_gradient_sync(False)
        try:
            return ax.grow(model, FIRST, optimizer, probe=PROBE)
        finally:
            model.set_requires_gradient_sync(True)

    def held_back() -> None:
        x, y = share(3, rank, 2)
        model.set_requires_gradient_sync(False)
        nn.functional.mse_loss(model(x), y).backward()
        model.set_requires_gradient_sync(True)
        optimizer.zero_grad()

    def grown_then() -> Any:
        held_back()
        return ax.grow(model, FIRST, optimizer, probe=PROBE)

    def saved_then() -> Any:
        held_back()
        return ax.save(ax.Grower(model, optimizer, edits=FIRST, when=ax.when.every(1), probe=PROBE), "never written")

    calls = {
        "held": grown_then,
        "saved": saved_then,
        "by data": lambda: ax.grow(model, ax.Widen("blocks.0.up", by=2, init="tiny"), optimizer, probe=PROBE),
        "own": lambda: ax.grow(model, ax.Widen("blocks.0.up", by=2, init=own_start), optimizer, probe=PROBE),
        "experts": lambda: ax.grow(model, ax.Widen("inp", by=2, unit="experts"), optimizer, probe=PROBE),
        "uneven": lambda: ax.grow(columns, ax.Widen("blocks.0.up", by=3), adam(columns), probe=PROBE),
        "several": lambda: ax.grow(model, [FIRST, COPIES], optimizer, probe=PROBE),
        "copies": lambda: ax.grow(model, COPIES, optimizer, probe=PROBE),
        "no sync": without_sync,
    }
    texts = {name: refused(rank, model, optimizer, call) for name, call in calls.items()}
    twice = ax.Duplicate("tail", by=1)
    ax.grow(model, ax.Repeat("blocks"), optimizer, probe=PROBE)
    again = ax.Replace("blocks.2", functools.partial(Block, 8))
    with pytest.raises(ax.GrowthError) as error:
        ax.grow(model, again, optimizer, probe=PROBE)
    texts["again"] = str(error.value)
    texts["shared"] = refused(rank, shares, copied, lambda: ax.grow(shares, twice, copied, probe=PROBE))
    return texts


NAMES = {
    "by data": "Widen('blocks.0.up'): not under FSDP2 (fully_shard): init='tiny' works with all of the network; one of",
    "own": "Widen('blocks.0.up'): not under FSDP2 (fully_shard): init=own_start works with all of the network",
    "experts": "Widen('inp'): not under FSDP2 (fully_shard): unit='experts' is not done there",
    "uneven": "shards it along axis 1 (shard_placement_fn=), which must be a multiple of the 2 ranks, and would be 19",
    "several": "Replace('blocks.0'): not under FSDP2",
    "copies": "Replace('blocks.0'): not under FSDP2 (fully_shard): init='copies' is not done there",
    "again": "blocks.2: its norm.weight is shared with the network, whose FSDP2 unit holds it already. Give it weights",
    "shared": "tail.0.up.weight is shared by the block that is to be copied and a module outside of it: not under",
    "held": "not now: the model holds gradients from while set_requires_gradient_sync or set_requires_all_reduce was",
    "saved": "save: the model holds gradients from while set_requires_gradient_sync or set_requires_all_reduce was",
    "no sync": "does not reduce its gradients (set_requires_gradient_sync(False))",
}


def test_what_is_not_done_is_refused_by_name() -> None:
    for texts in on_ranks(2, by_name, timeout=300):
        for name, text in NAMES.items():
            assert text in texts[name], name


def other_units(rank: int) -> list[str]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    mixed = Net(depth=2)
    fully_shard(mixed.blocks[0], mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))
    fully_shard(mixed.blocks[1])
    fully_shard(mixed)
    whole = fully_shard(Net(depth=2))
    grown = adam(whole)
    found, fsdp2.GROUPING = fsdp2.GROUPING, (*fsdp2.GROUPING, "moved")  # a torch without a private part
    with pytest.raises(ax.GrowthError) as removed:
        ax.grow(whole, ax.Remove("blocks.0"), grown, probe=PROBE)
    with pytest.raises(ax.GrowthError) as error:
        ax.grow(mixed, FIRST, adam(mixed), probe=PROBE)
    change = ax.grow(whole, FIRST, grown, probe=PROBE)
    with pytest.raises(ax.GrowthError) as kept:
        ax.grow(whole, ax.Replace("blocks.2", functools.partial(Block, 8)), grown, probe=PROBE)
    fsdp2.GROUPING = found
    train_step(whole, grown, *share(0, rank, 2))
    return [str(removed.value), str(error.value), str(change), str(kept.value)]


def test_units_of_another_policy_and_blocks_that_are_no_units() -> None:
    for removed, mixed, change, kept in on_ranks(2, other_units):
        assert "blocks.2: its norm.weight is shared with the network, whose FSDP2 unit holds it already" in kept
        assert "blocks.0 is no FSDP2 unit of its own" in removed
        assert "blocks.1 is sharded by another policy than blocks.0" in mixed
        assert "blocks.2 is an FSDP2 unit of its own, those beside it belong to the unit around them" in change


def failing(dim: int) -> nn.Module:
    if dist.get_rank() == 1:
        raise ValueError("no layer here")
    return Block(dim)


class Deaf(nn.Linear):
    """On one rank it takes nothing; the others go on and try other starts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == 1:
            raise RuntimeError("nothing heard")
        return super().forward(x)


def on_one_rank(rank: int) -> dict[str, str]:
    model = built()
    optimizer = adam(model)
    layer = functools.partial(failing, 8)
    cut = PROBE[: 4 - rank]
    calls = {
        "layer": lambda: ax.grow(model, ax.Insert("blocks", layer), optimizer, probe=PROBE),
        "deaf": lambda: ax.grow(model, ax.Insert("blocks", functools.partial(Deaf, 8, 8)), optimizer, probe=PROBE),
        "probe": lambda: ax.grow(model, FIRST, optimizer, probe=cut),
        "edit": lambda: ax.grow(model, EDITS[rank], optimizer, probe=PROBE),
        "last": lambda: ax.Grower(
            model, optimizer, edits=FIRST, when=ax.when.every(1), probe=PROBE, on_growth=lambda change: 1 // (1 - rank)
        ).grow(FIRST),
    }
    return {name: refused(rank, model, optimizer, call) for name, call in calls.items()}


def test_what_one_rank_refuses_no_rank_does() -> None:
    first, second = on_ranks(2, on_one_rank, patience=20)
    for name, text in {
        "layer": "no layer here",
        "deaf": "rank 1: Insert(at='blocks', index=2)",
        "probe": "(4, 4)",
        "edit": "Insert",
        "last": "ZeroDivision",
    }.items():
        assert "rank 1" in first[name] and text in first[name], (name, first[name])
        assert name == "last" or "rank 1" in second[name]


def without_private_parts(rank: int) -> Any:
    """The new block is a root of its own: right, and said so."""
    fsdp2.OF_ROOT = ("_is_root", "_moved")
    model = built()
    optimizer = adam(model)
    train_step(model, optimizer, *share(0, rank, 2))
    optimizer.zero_grad()
    change = ax.grow(model, FIRST, optimizer, probe=PROBE)
    for step in range(1, 4):
        train_step(model, optimizer, *share(step, rank, 2))
    weights = full(model)
    fsdp2.OF_STATE = (*fsdp2.OF_STATE, "_moved_too")
    with pytest.raises(ax.GrowthError) as error:
        ax.grow(model, FIRST, optimizer, probe=PROBE)
    fsdp2.OF_ROOT, fsdp2.OF_STATE = fsdp2.OF_ROOT[:1], fsdp2.OF_STATE[:-1]
    fsdp2.MAKING = (*fsdp2.MAKING, "and_more")
    optimizer.zero_grad()
    with pytest.raises(ax.GrowthError) as again:
        ax.grow(model, ax.Repeat("blocks"), optimizer, probe=PROBE)
    with pytest.raises(ax.GrowthError) as wider:
        ax.grow(model, ax.Widen("blocks.0.up", by=2), optimizer, probe=PROBE)
    return str(change), str(error.value), weights, str(wider.value), str(again.value)


def test_a_torch_whose_private_parts_have_moved() -> None:
    from ranked import batch
    from under_fsdp import plain

    model = plain()
    optimizer = adam(model)
    for step in range(4):
        train_step(model, optimizer, *batch(step))
        if step == 0:
            optimizer.zero_grad()
            ax.grow(model, FIRST, optimizer, probe=PROBE)
    for change, text, weights, wider, again in on_ranks(2, without_private_parts, timeout=300):
        assert "Repeat('blocks'): not under FSDP2 (fully_shard): for that auxin needs the private FSDPParam(" in again
        assert "resizes tensors, for which auxin needs the private FSDPParam(param, module_info" in wider
        assert (
            "blocks.2 is an FSDP2 root of its own, since this torch has no _is_root or _moved: right, but not" in change
        )
        assert "whose private FSDPState._moved_too auxin reads" in text
        assert max(float((weights[n] - p).abs().max()) for n, p in model.named_parameters()) <= 1e-6
