"""Processes that are killed while they grow and save, and processes that save to one path at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from killed_savers import LOADS, STEPS

SCRIPT = Path(__file__).parent / "killed_savers.py"


def played(folder, *words):
    command = [sys.executable, SCRIPT, folder, *map(str, words)]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


def check_killed(folder, count):
    found = played(folder, "kill", count, 11)
    assert found["loaded"] >= count // 2 and found["cut"] >= 1
    assert len(found["names"]) == 2 and all(name.startswith("checkpoint-") for name in found["names"])
    return found


def test_runs_that_are_killed_leave_a_checkpoint_that_goes_on_to_the_bit(tmp_path):
    check_killed(tmp_path, 20)


@pytest.mark.long
def test_two_hundred_runs_that_are_killed(tmp_path):
    assert len(check_killed(tmp_path, 200)["steps"]) == STEPS


@pytest.mark.parametrize("keep", [1, 3])
def test_two_processes_save_to_one_path_and_a_third_loads_from_it(tmp_path, keep):
    (folder := tmp_path / "run").mkdir()
    found = played(folder, "both", 6, keep)
    assert found["codes"] == [0, 0] and len(found["names"]) == keep, found
    assert sum(found["seen"].values()) >= LOADS  # it used to be refused nearly every time, as damaged
