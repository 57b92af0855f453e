"""HSDP: replicas of a network, each sharded over some of the ranks, grow as one plain process does."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import on_ranks
from ranked import Block, Net, share, train_step
from test_fsdp2 import adam
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from under_fsdp import PROBE, assert_equal_to_one_process, full, same, set_up, shard, shards

import auxin as ax

EDITS = [
    ax.Duplicate("blocks", by=1),
    ax.Widen("blocks.0.up", by=3),
    ax.Replace("blocks.1.norm", functools.partial(nn.RMSNorm, 8)),
    ax.Insert("blocks", functools.partial(Block, 8), index=0),
    ax.Widen("blocks.*.up", by=2, init="split"),
    ax.Remove("blocks.1"),
]


def job(size: int) -> Any:
    torch.manual_seed(0)
    model, twin = Net(depth=2), Net(depth=2)
    twin.load_state_dict(model.state_dict())
    average = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    if size > 1:
        shard(model, replicas=2)
        shard(average.module, replicas=2)
    optimizer = adam(model)
    words: Any = {"edits": EDITS, "when": lambda reading: False, "probe": PROBE}
    return model, optimizer, average, ax.Grower(model, optimizer, average, **words)


def trained(rank: int, size: int, path: str) -> Any:
    model, optimizer, average, grower = job(size)
    losses: list[float] = []

    def step(times: int) -> None:
        for _ in range(times):
            losses.append(train_step(model, optimizer, *share(len(losses), rank, size)))
            average.update_parameters(model)

    for edit in EDITS:
        step(2)
        optimizer.zero_grad()
        grower.grow(edit)
    step(8)
    ax.verify(model, optimizer, average)
    if size == 1:
        return losses, dict(model.named_parameters()), dict(average.module.named_parameters())
    set_up(model)
    for p in model.parameters():
        assert p.device_mesh.ndim == 2 and p.placements[0].is_replicate() and p.placements[1].is_shard()
        assert optimizer.state[p]["exp_avg"].placements == p.placements
    ax.save(grower, path)
    resumed, _, _, other = job(size)
    ax.load(path, other)
    assert same(shards(resumed), shards(model))
    return losses, full(model), full(average.module)


@pytest.mark.distributed
def test_two_replicas_of_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    expected, *tensors = trained(0, 1, "")
    found = on_ranks(4, trained, 4, str(tmp_path), timeout=300)
    assert len(expected) == 20
    assert_equal_to_one_process(found, expected, *tensors)
