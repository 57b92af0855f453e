"""``auxin upscale`` killed at random moments: OUT is whole or not there, IN as it was, the next run tidies up."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import model_of, same_bytes, save, tensors, upscaled

pytest.importorskip("transformers")

# Planned once; then the writing alone is killed, which takes long enough to be met in the middle.
PROGRAM = """
import sys
from auxin.upscale import plan_upscale, write_upscale
plan = plan_upscale(sys.argv[1], sys.argv[2], order=[0, 0, 1, 1, 2, 2, 3, 3], output="keep")
print("ready", flush=True)
sys.stdin.readline()
write_upscale(plan, sys.argv[2])
print("done", flush=True)
"""


def start(source: Path, target: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PROGRAM, str(source), str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_killed_at_random_moments(tmp_path: Path, times: int, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(model_of("llama", hidden_size=512, intermediate_size=1024), tmp_path / "in")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    expected = upscaled(tensors(source), [0, 0, 1, 1, 2, 2, 3, 3])
    process, begun = start(source, tmp_path / "first"), time.monotonic()
    begun = time.monotonic()
    go(process)
    assert process.stdout is not None and process.stdout.readline() == "done\n"
    took = time.monotonic() - begun
    process.communicate()
    draw, whole, left = random.Random(5), 0, 0
    for i in range(times):
        process = start(source, tmp_path / "out")
        go(process)
        time.sleep(draw.uniform(0, 1.2 * took))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        names = set(os.listdir(tmp_path)) - {"in", "first"}
        assert len(names) <= 1, f"what was left behind before kill {i} is still there: {names}"
        left += any(name.startswith(".out.upscale-") for name in names)
        if "out" in names:
            whole += 1
            assert same_bytes(tensors(tmp_path / "out"), expected) == []
            assert (tmp_path / "out" / "config.json").exists() and (tmp_path / "out" / "auxin.json").exists()
            (tmp_path / "out").rename(tmp_path / "first" / f"out{i}")
        assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    with capsys.disabled():
        print(f"\n{times} kills within {1.2 * took:.2f} s: {whole} whole, {left} in the middle, 0 half")
    process = start(source, tmp_path / "out")
    go(process)
    process.communicate()
    assert set(os.listdir(tmp_path)) == {"in", "first", "out"}
    assert same_bytes(tensors(tmp_path / "out"), expected) == []


def test_a_living_process_keeps_its_directory(tmp_path: Path) -> None:
    from auxin.upscale.directory import whole

    torch.manual_seed(0)
    with whole(tmp_path / "out", 1) as first:
        (first / "a").write_text("first")
        with whole(tmp_path / "out", 1) as second:
            (second / "a").write_text("second")
            assert first.exists()
        (tmp_path / "out" / "a").unlink()
    assert (tmp_path / "out" / "a").read_text() == "first"
