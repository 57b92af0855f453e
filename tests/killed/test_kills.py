"""A run that is killed at random moments and started again with the same call is equal to one that was never killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = ("elsewhere", "grow", "save")
SCRIPT = Path(__file__).parent / "kills.py"


def killed(folder, count, seed):
    """What `kills.py` found; it compares every loss and every checkpoint itself."""
    command = [sys.executable, SCRIPT, folder, str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads(done.stdout)
    assert sum(found["where"].values()) >= count
    return found


def test_twenty_kills_at_random_moments(tmp_path):
    found = killed(tmp_path, 20, 1)
    assert all(found["where"].get(part, 0) >= 3 for part in PARTS) and found["cut"] >= 1 and found["steps"] >= 3, found


@pytest.mark.long
def test_two_hundred_kills_at_random_moments(tmp_path):
    found = killed(tmp_path, 200, 2)
    assert all(found["where"].get(part, 0) >= 30 for part in PARTS), found
    assert found["where"].get("load", 0) >= 5 and found["cut"] >= 20 and found["ended"] >= 1, found
    assert found["steps"] >= 8, found
