"""Processes that save to one path at once. Those that are killed: tests/killed."""

import json
from pathlib import Path

import pytest
from savers import LOADS

import anew

SCRIPT = Path(__file__).parent / "savers.py"


@pytest.mark.parametrize("seconds", [2, pytest.param(6, marks=pytest.mark.long)])
@pytest.mark.parametrize("keep", [1, 3])
def test_two_processes_save_to_one_path_and_a_third_loads_from_it(tmp_path, keep, seconds):
    (folder := tmp_path / "run").mkdir()
    done = anew.run(SCRIPT, folder, seconds, keep, cwd=SCRIPT.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["codes"] == [0, 0] and len(found["names"]) == keep, found
    assert sum(found["seen"].values()) >= LOADS  # it used to be refused nearly every time, as damaged
