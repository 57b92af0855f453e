"""What takes longer: two processes, and libraries on top of Lightning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_processes_grow_as_one(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "lightning_ranks.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    print(found)
    assert found["wrapped"][-1] == "DistributedDataParallel"
    assert found["blocks"] == 4 and found["before"] == 2 and found["steps"] == 6
    assert found["spread"] == found["resumed spread"] == found["resumed"] == 0
    assert found["alone"] <= 1e-12  # in float64
