"""Processes that save to one path at once. Those that are killed: tests/killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from savers import LOADS

SCRIPT = Path(__file__).parent / "savers.py"


@pytest.mark.parametrize("keep", [1, 3])
def test_two_processes_save_to_one_path_and_a_third_loads_from_it(tmp_path, keep):
    (folder := tmp_path / "run").mkdir()
    command = [sys.executable, SCRIPT, folder, "6", str(keep)]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["codes"] == [0, 0] and len(found["names"]) == keep, found
    assert sum(found["seen"].values()) >= LOADS  # it used to be refused nearly every time, as damaged
