"""``auxin grow`` on the checkpoint of many ranks under FSDP2: sharded in, sharded out, and as after the live growth."""

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "ddp"))

from processes import on_ranks
from test_fsdp2_checkpoints import FIRST, Job

import auxin as ax
from auxin.between_jobs import grow_checkpoint
from auxin.checkpoint.directory import read

WIDER = ax.Widen("blocks.0.up", by=3)  # odd: the ranks hold shards of different sizes
EDITS = [FIRST, ax.Widen("blocks.*.up", by=2), ax.Replace("blocks.1.norm", functools.partial(nn.RMSNorm, 8))]


def parted(rank: int, size: int, path: str) -> Any:
    """A sharded run, with a layer that has got wider already, is saved, grows, and trains on."""
    job = Job(rank, size)
    job.train(range(2))
    job.grower.grow(WIDER)
    job.train(range(2, 4))
    ax.save(job.grower, path, extra={"step": 4, "rank": rank})
    for edit in EDITS:
        job.grower.grow(edit)
    state = job.state()
    return state, job.train(range(4, 14)), job.state()


def resumed(rank: int, size: int, path: str) -> Any:
    job = Job(rank, size)
    assert ax.load(path, job.grower) == {"step": 4, "rank": rank}
    state = job.state()
    return state, job.train(range(4, 14)), job.state()


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_ranks_go_on_as_after_the_growth_in_their_run(tmp_path: Path, all_on_disk: None) -> None:
    live = on_ranks(2, parted, 2, str(tmp_path / "in"))
    grow_checkpoint(tmp_path / "in", tmp_path / "out", lambda: Job(0, 1).grower, EDITS)
    files = read(tmp_path / "out").manifest
    assert ".metadata" in files and any(name.endswith(".distcp") for name in files)
    job = on_ranks(2, resumed, 2, str(tmp_path / "out"))
    for ours, theirs in zip(job, live, strict=True):
        assert equal(ours[0], theirs[0]) and ours[1] == theirs[1] and equal(ours[2], theirs[2])
