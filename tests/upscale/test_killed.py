"""``auxin upscale`` killed at random moments: OUT is whole or not there, IN as it was, the next run tidies up."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from checkpoints import model_of, same_bytes, save, tensors, upscaled

from auxin.upscale import Plan, plan_upscale, write_upscale

pytest.importorskip("transformers")
SOURCES = [0, 0, 1, 1, 2, 2, 3, 3]


def writing(plan: Plan, target: Path) -> int:
    """A process of its own that writes and does nothing else."""
    child = os.fork()
    if child:
        return child
    try:
        write_upscale(plan, target)
    finally:
        os._exit(0)


@pytest.mark.parametrize("times", [20, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_killed_at_random_moments(tmp_path: Path, times: int, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    save(model_of("llama", hidden_size=512, intermediate_size=1024), source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    expected = upscaled(tensors(source), SOURCES)
    plan, begun = plan_upscale(source, target, order=SOURCES, output="keep"), time.monotonic()
    os.waitpid(writing(plan, tmp_path / "first"), 0)
    took = time.monotonic() - begun
    draw, found, left = random.Random(5), 0, 0
    for i in range(times):
        child = writing(plan, target)
        time.sleep(draw.uniform(0, 1.2 * took))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        names = set(os.listdir(tmp_path)) - {"in", "first"}
        assert len(names) <= 1, f"what was left behind before kill {i} is still there: {names}"
        left += any(name.startswith(".out.auxin-") for name in names)
        if "out" in names:
            found += 1
            assert same_bytes(tensors(target), expected) == []
            assert (target / "config.json").exists() and (target / "auxin.json").exists()
            target.rename(tmp_path / "first" / f"out{i}")
        assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    with capsys.disabled():
        print(f"\n{times} kills within {1.2 * took:.2f} s: {found} whole, {left} in the middle, 0 half")
    write_upscale(plan, target)
    assert set(os.listdir(tmp_path)) == {"in", "first", "out"}
    assert same_bytes(tensors(target), expected) == [] and left >= 1


def test_a_living_process_keeps_its_directory(tmp_path: Path) -> None:
    from auxin.whole_directory import whole

    torch.manual_seed(0)
    with whole(tmp_path / "out", 1) as first:
        (first / "a").write_text("first")
        with whole(tmp_path / "out", 1) as second:
            (second / "a").write_text("second")
            assert first.exists()
        (tmp_path / "out" / "a").unlink()
    assert (tmp_path / "out" / "a").read_text() == "first"
