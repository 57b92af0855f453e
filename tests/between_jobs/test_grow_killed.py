"""``auxin grow`` killed at random moments: OUT is whole or not there, IN as it was, the next run tidies up."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from jobs import build, train

import auxin as ax
from auxin.between_jobs import grow_checkpoint

EDITS = [ax.Duplicate("blocks"), ax.Widen("blocks.*.up", by=8)]


def growing(source: Path, target: Path) -> int:
    """A process of its own that grows a checkpoint and does nothing else."""
    child = os.fork()
    if child:
        return child
    try:
        grow_checkpoint(source, target, build, EDITS)
    finally:
        os._exit(0)


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_killed_at_random_moments(tmp_path: Path, times: int, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    grower = build()
    train(grower, range(2))
    ax.save(grower, source)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    grow_checkpoint(source, tmp_path / "first", build, EDITS)  # all is imported
    begun = time.monotonic()
    os.waitpid(growing(source, tmp_path / "second"), 0)
    took = time.monotonic() - begun
    draw, found, left = random.Random(5), 0, 0
    for number in range(times):
        child = growing(source, target)
        # Half of the kills in the last tenth, in which it writes.
        time.sleep(took * (draw.uniform(0, 1.1) if number % 2 else draw.uniform(0.9, 1.0)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        names = set(os.listdir(tmp_path)) - {"in", "first", "second"}
        assert len(names) <= 1, f"what was left behind before kill {number} is still there: {names}"
        left += any(name.startswith(".out.auxin-") for name in names)
        if "out" in names:
            found += 1
            ax.load(target, build())  # whole: every file has its checksum
            target.rename(tmp_path / "first" / f"out{number}")
        assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    with capsys.disabled():
        print(f"\n{times} kills within {1.1 * took:.2f} s: {found} whole, {left} in the middle of writing, 0 half")
    grow_checkpoint(source, target, build, EDITS)
    assert set(os.listdir(tmp_path)) == {"in", "first", "second", "out"}
    losses = []
    for path in (target, tmp_path / "second"):
        job = build()
        ax.load(path, job)
        losses.append(train(job, range(2, 6)))
    assert losses[0] == losses[1]
