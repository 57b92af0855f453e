"""DDP around a compiled network, and a compiled DDP: grown through both, and synchronised."""

from typing import Any

import pytest
import torch
from processes import on_ranks
from ranked import Net, assert_ranks_equal, share, train_step, values
from torch.nn.parallel import DistributedDataParallel

import auxin as ax


def compiled_run(rank: int, way: str) -> Any:
    torch.manual_seed(rank)
    inner = Net()
    if way == "DDP around compiled":
        model: Any = DistributedDataParallel(torch.compile(inner, backend="eager"))
    elif way == "compiled around DDP":
        model = torch.compile(DistributedDataParallel(inner), backend="eager")
    else:
        if way == "compiled in place":
            inner.compile(backend="eager")
        model = DistributedDataParallel(inner)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
    probe = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    grower = ax.Grower(model, optimizer, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(3), probe=probe)
    for step in range(9):
        train_step(model, optimizer, *share(step, rank, 2))
        grower.step()
        assert_ranks_equal(inner, f"{way}, step {step}")
    assert len(inner.blocks) == 4
    return values(*inner.parameters())


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["DDP around compiled", "compiled around DDP", "compiled in place"])
def test_compiled_networks_grow_under_ddp(way: str) -> None:
    eager = on_ranks(2, compiled_run, "eager")[0]
    for found in on_ranks(2, compiled_run, way, timeout=200):
        assert float((found - eager).abs().max()) <= 1e-6
