"""DDP around a compiled network, and a compiled DDP: grown through both, and synchronised."""

from typing import Any

import pytest
import torch
from processes import on_ranks
from ranked import Net, assert_ranks_equal, share, train_step, values
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import auxin as ax


def built(rank: int, way: str) -> tuple[Any, Net]:
    """What is called, and the network in it."""
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
    return model, inner


def probe() -> torch.Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def compiled_run(rank: int, way: str) -> Any:
    model, inner = built(rank, way)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
    grower = ax.Grower(model, optimizer, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(3), probe=probe())
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


def prepared_run(rank: int, way: str) -> Any:
    model, inner = built(rank, way)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
    evidence = ax.Evidence(lambda network, xy: torch.nn.functional.mse_loss(network(xy[0]), xy[1]), [share(0, rank, 2)])
    edit = ax.Duplicate("blocks", by=1)
    grower = ax.Grower(model, optimizer, edits=edit, when=ax.when.at([]), probe=probe(), evidence=evidence)
    for step in range(3):
        train_step(model, optimizer, *share(step, rank, 2))
    optimizer.zero_grad()
    done = None if way == "eager" else grower.prepare(edit)
    before = counters["stats"]["unique_graphs"]
    grower.grow(edit)
    for step in range(3, 6):
        train_step(model, optimizer, *share(step, rank, 2))
        assert_ranks_equal(inner, f"{way}, step {step}")
    made = 0 if done is None else done.graphs
    return values(*inner.parameters()), made, counters["stats"]["unique_graphs"] - before


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["DDP around compiled", "compiled around DDP", "compiled in place"])
def test_a_prepared_growth_compiles_nothing_under_ddp(way: str) -> None:
    eager = on_ranks(2, prepared_run, "eager")[0][0]
    for found, made, new in on_ranks(2, prepared_run, way, timeout=200):
        assert (made, new) == (1, 0)
        assert float((found - eager).abs().max()) <= 1e-6
