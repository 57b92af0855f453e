"""A run is killed ten steps after its third growth; a new process goes on from the checkpoint to the last bit."""

import json
import signal

import pytest
import torch
from growing import Net

import anew
import killed

torch.set_num_threads(1)


def test_a_killed_run_goes_on_in_a_new_process_to_the_last_bit(tmp_path):
    first = anew.run(killed.__file__, tmp_path)
    assert first.returncode == -signal.SIGKILL, first.stderr
    second = anew.run(killed.__file__, tmp_path, "resume")
    assert second.returncode == 0, second.stderr
    found = json.loads(second.stdout)
    assert found["steps"] == killed.KILL_AT // killed.SAVE_EVERY * killed.SAVE_EVERY == 35

    run = killed.Run()
    losses = [run.step() for _ in range(found["steps"] + killed.AFTER)]
    assert len(run.model.blocks) == 4 and len(run.grower.journal) == 3
    assert found["parameters"] == {name: list(p.shape) for name, p in run.model.named_parameters()}
    assert found["losses"] == losses[found["steps"] :]


def test_by_hand_the_original_class_does_not_take_the_grown_weights():
    """Refused outright, or with strict=False loaded without the layers that had been grown, and without a word."""
    run = killed.Run()
    for _ in range(31):
        run.step()
    state, optimizer = run.model.state_dict(), run.optimizer.state_dict()
    fresh = Net(dim=8, depth=1)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict(state)
    fresh.load_state_dict(state, strict=False)
    x = torch.linspace(-1, 1, 20).reshape(4, 5)
    assert not torch.allclose(fresh.eval()(x), run.model.eval()(x), atol=1e-3)
    with pytest.raises(ValueError, match="parameter group"):
        torch.optim.AdamW(fresh.parameters()).load_state_dict(optimizer)
