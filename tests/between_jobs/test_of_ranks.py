"""``auxin grow`` on the checkpoint of many ranks under FSDP2: sharded in, sharded out, and as after the live growth."""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ddp"))

from processes import on_ranks
from test_fsdp2_checkpoints import FIRST, Job

import auxin as ax
from auxin.between_jobs import grow_checkpoint
from auxin.checkpoint.directory import read


def parted(rank: int, size: int, path: str) -> Any:
    """A sharded run is saved, grows, and trains on."""
    job = Job(rank, size)
    job.train(range(4))
    ax.save(job.grower, path, extra={"step": 4, "rank": rank})
    job.grower.grow(FIRST)
    state = job.state()
    return state, job.train(range(4, 8)), job.state()


def resumed(rank: int, size: int, path: str) -> Any:
    job = Job(rank, size)
    assert ax.load(path, job.grower) == {"step": 4, "rank": rank}
    state = job.state()
    return state, job.train(range(4, 8)), job.state()


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_ranks_go_on_as_after_the_growth_in_their_run(tmp_path: Path, all_on_disk: None) -> None:
    live = on_ranks(2, parted, 2, str(tmp_path / "in"))
    grow_checkpoint(tmp_path / "in", tmp_path / "out", lambda: Job(0, 1).grower, [FIRST])
    files = read(tmp_path / "out").manifest
    assert ".metadata" in files and any(name.endswith(".distcp") for name in files)
    job = on_ranks(2, resumed, 2, str(tmp_path / "out"))
    for ours, theirs in zip(job, live, strict=True):
        assert equal(ours[0], theirs[0]) and ours[1] == theirs[1] and equal(ours[2], theirs[2])
