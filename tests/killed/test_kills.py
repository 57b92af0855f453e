"""A run that is killed at random moments and started again with the same call is equal to one that was never killed."""

import json
from pathlib import Path

import pytest

import anew

PARTS = ("elsewhere", "grow", "save")
SCRIPT = Path(__file__).parent / "kills.py"


def killed(folder, count, seed):
    """What `kills.py` found; it compares every loss and every checkpoint itself."""
    done = anew.run(SCRIPT, folder, count, seed, seconds=1700)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads(done.stdout)
    assert sum(found["where"].values()) >= count
    return found


@pytest.mark.parametrize("count", [8, pytest.param(20, marks=pytest.mark.long)])
def test_kills_at_random_moments(tmp_path, count):
    found = killed(tmp_path, count, 1)
    assert all(found["where"].get(part, 0) >= count // 6 for part in PARTS), found
    assert found["steps"] >= count // 6 and (count < 20 or found["cut"] >= 1), found


@pytest.mark.long
def test_two_hundred_kills_at_random_moments(tmp_path):
    found = killed(tmp_path, 200, 2)
    assert all(found["where"].get(part, 0) >= 30 for part in PARTS), found
    assert found["where"].get("load", 0) >= 5 and found["cut"] >= 20 and found["ended"] >= 1, found
    assert found["steps"] >= 8, found
