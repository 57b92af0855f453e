"""A run under FSDP2, killed again and again under torchrun, ends as the one that was not."""

import random
import sys
from pathlib import Path

import pytest
from sharded import EDITS, STEPS
from test_example import TORCHRUN, Killer, started, steps


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
@pytest.mark.timeout(3600)
def test_twenty_kills_under_torchrun(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("torchrun"), *TORCHRUN, Path(__file__).with_name("sharded.py")]
    expected = steps(started([*command, tmp_path / "whole"], seconds=900)[1])
    assert len(expected) == STEPS and len({blocks for _, blocks in expected.values()}) == 3
    generator, killed, resumed, ended = random.Random(7), [], 0, 0
    while len(killed) < 20:
        killer = Killer(generator, min(5, 20 - len(killed)))
        code, printed = started([*command, tmp_path / str(ended)], killer, seconds=1500)
        found = steps(printed)
        assert code == 0 and found == expected  # to the bit, also the steps that were made twice
        for part in printed.split("resumed"):
            assert steps(part).items() <= expected.items()
        killed += killer.killed
        resumed += printed.count("resumed at")
        ended += 1
    print(f"{len(killed)} kills of ranks {killed}: {ended} runs of {len(EDITS)} growths ended, {resumed} resumed")
    assert set(killed) == {0, 1}
