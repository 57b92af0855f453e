"""The program of docs/resume.md, killed for real and started again by the same command, alone and under torchrun."""

import contextlib
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from kills import child

import anew

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "resume.py"
STEP = re.compile(r"^(\d+) (\d+) (-?0x\S+) (\d+)$", re.MULTILINE)
# Without the last one torch 2.13 does not restart gloo: the new processes read the addresses of the dead ones.
OWN = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
QUIET = {**os.environ, **OWN}


def steps(text):
    """(epoch, batch) -> (loss, blocks)."""
    return {(int(e), int(b)): (float.fromhex(loss), int(blocks)) for e, b, loss, blocks in STEP.findall(text)}


def alone(*command, kill=None, seconds=90):
    """Run a program by itself; ``kill(process, line)`` is called with each line. Its exit code, and what it printed."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("out", "err")]
        os.mkfifo(files[0])
        process = anew.start(*command, files=files)
        watchdog = threading.Timer(seconds, process.terminate)
        watchdog.start()
        with open(files[0]) as printed:
            for line in printed:
                lines.append(line)
                if kill is not None:
                    kill(process, line)
        process.join()
        watchdog.cancel()
        assert process.exitcode in (0, -signal.SIGKILL, 128 + signal.SIGTERM), Path(files[1]).read_text()
    return process.exitcode, "".join(lines)


def started(command, kill=None, seconds=90):
    """The same under torchrun."""
    lines = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=QUIET, stdout=subprocess.PIPE, stderr=errors, text=True)
        watchdog = threading.Timer(seconds, process.terminate)
        watchdog.start()
        for line in process.stdout:
            lines.append(line)
            if kill is not None:
                kill(process, line)
        code = process.wait()
        watchdog.cancel()
        errors.seek(0)
        assert code in (0, -signal.SIGKILL, 128 + signal.SIGTERM), errors.read()
    return code, "".join(lines)


def after(count, number, seconds):
    """Send a signal a moment after ``count`` steps."""
    seen = []

    def kill(process, line):
        seen.append(line)
        if len(seen) == count:
            time.sleep(seconds)
            os.kill(process.pid, number)

    return kill


def whole(folder):
    """The run that is not killed, in a child of this warm process."""
    printed = folder.with_suffix(".txt")

    def run():
        with open(printed, "w") as file, contextlib.redirect_stdout(file):
            sys.argv = [str(SCRIPT), str(folder)]
            runpy.run_path(str(SCRIPT), run_name="__main__")

    assert os.waitpid(child(run), 0)[1] == 0
    return steps(printed.read_text())


def test_killed_and_started_again_by_the_same_command(tmp_path):
    expected = whole(tmp_path / "whole")
    assert [blocks for _, blocks in expected.values()].count(4) == 27 and len(expected) == 96
    command = SCRIPT, tmp_path / "run"
    code, first = alone(*command, kill=after(38, signal.SIGKILL, 0.004))
    assert code == -signal.SIGKILL and steps(first).items() <= expected.items()
    assert 37 < len(steps(first)) < 96
    # Where the machine asks it to go, it saves first, so no step is made twice.
    code, second = alone(*command, kill=after(22, signal.SIGTERM, 0.0))
    assert code == 128 + signal.SIGTERM and second.startswith("resumed at {'epoch': 2")
    code, third = alone(*command)
    done = list(expected)
    assert code == 0 and list(steps(third)) == done[done.index(list(steps(second))[-1]) + 1 :]
    assert {**steps(first), **steps(second), **steps(third)} == expected
    assert steps(second).items() <= expected.items()


def test_the_page_shows_the_program():
    shown = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "resume.md").read_text(), re.MULTILINE | re.DOTALL)
    assert SCRIPT.read_text() in shown


@pytest.mark.parametrize("own", [False, True])
def test_a_loader_without_a_generator_draws_from_the_global_one(own):
    """What the page says: a pass that begins in the middle of an epoch would move every dropout mask after it."""
    words = {"generator": torch.Generator()} if own else {}
    before = torch.get_rng_state()
    next(iter(torch.utils.data.DataLoader([1, 2], batch_sampler=[[0], [1]], **words)))
    assert torch.equal(before, torch.get_rng_state()) == own


# ---- under torchrun

TORCHRUN = "--standalone --nproc-per-node 2 --max-restarts 100 --monitor-interval 0.1".split()


def workers(torchrun):
    """Rank -> process number of what torchrun has started."""
    found = {}
    for number in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        with contextlib.suppress(OSError):
            rank = re.search(rb"\0RANK=(\d+)\0", b"\0" + Path(f"/proc/{number}/environ").read_bytes())
            if rank:
                found[int(rank[1])] = int(number)
    return found


class Killer:
    """Kills a worker of random rank, a random number of steps after it was started, ``count`` times."""

    def __init__(self, generator, count):
        self.generator, self.left, self.killed = generator, count, []
        self.steps = generator.randint(3, 40)

    def __call__(self, torchrun, line):
        self.steps -= 1
        if self.steps > 0 or not self.left:
            return
        time.sleep(self.generator.uniform(0.0, 0.05))
        rank = self.generator.randrange(2)
        with contextlib.suppress(KeyError, ProcessLookupError):
            os.kill(workers(torchrun.pid)[rank], signal.SIGKILL)
            self.killed.append(rank)
            self.left -= 1
        self.steps = self.generator.randint(1, 30)


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_ten_kills_under_torchrun(tmp_path):
    command = [Path(sys.executable).with_name("torchrun"), *TORCHRUN, SCRIPT]
    expected = steps(started([*command, tmp_path / "whole"])[1])
    assert len(expected) == 96
    generator, killed, resumed, largest = random.Random(5), [], 0, 0.0
    for number, count in enumerate((3, 3, 2, 2)):
        killer = Killer(generator, count)
        code, printed = started([*command, tmp_path / str(number)], killer, seconds=200)
        found = {}
        for at, (loss, blocks) in [(at, one) for part in printed.split("resumed") for at, one in steps(part).items()]:
            assert blocks == expected[at][1]
            largest = max(largest, abs(loss - expected[at][0]))
            found[at] = loss
        assert code == 0 and set(found) == set(expected) and largest <= 1e-6
        killed += killer.killed
        resumed += printed.count("resumed at")
    print(f"{len(killed)} kills of ranks {killed}, {resumed} resumed; losses differ by {largest:g}")
    assert len(killed) == 10 and set(killed) == {0, 1} and resumed >= 8
