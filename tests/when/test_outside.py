"""Signs from outside: any callable, a signal from another thread, a file."""

import json
import os
import threading
import warnings

import pytest
import torch
from torch import nn

import auxin as ax
from auxin import when
from auxin.when import Reading


def step(trigger, call: int = 1) -> bool:
    return trigger(Reading(None, {}, call, 0, 0, call))


def steps(trigger, n: int) -> list[bool]:
    return [step(trigger) for _ in range(n)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


def grower_with(trigger) -> ax.Grower:
    model = nn.Sequential(Block())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return ax.Grower(model, optimizer, edits=ax.Duplicate("", by=1), when=trigger, probe=torch.ones(2, 4))


def test_any_callable_is_a_trigger():
    asked = []

    def at_night(reading):
        asked.append(reading.calls)
        return reading.calls == 3

    grower = grower_with(at_night)
    assert [bool(grower.step()) for _ in range(4)] == [False, False, True, False]
    assert asked == [1, 2, 3, 4]


# signal


def test_a_signal_fires_once_at_the_next_step():
    trigger = when.signal()
    assert steps(trigger, 2) == [False, False]
    trigger.set()
    trigger.set()
    assert trigger.waiting and steps(trigger, 3) == [True, False, False]


def test_a_signal_from_another_thread_grows_once():
    trigger = when.signal()
    grower = grower_with(trigger)
    assert grower.step() is None
    thread = threading.Thread(target=trigger.set)
    thread.start()
    thread.join()
    assert grower.step() is not None and grower.step() is None and len(grower.model) == 2


def test_no_signal_is_lost_between_threads():
    trigger, told, seen = when.signal(), 50, 0
    gate = threading.Semaphore(0)

    def tell():
        for _ in range(told):
            trigger.set()
            gate.acquire()

    thread = threading.Thread(target=tell)
    thread.start()
    while seen < told:
        if step(trigger):
            seen += 1
            gate.release()
    thread.join()
    assert not step(trigger)


def test_a_signal_that_waits_is_saved(tmp_path):
    trigger = when.signal()
    grower = grower_with(trigger)
    trigger.set()
    ax.save(grower, tmp_path / "run")
    again = when.signal()
    resumed = grower_with(again)
    ax.load(tmp_path / "run", resumed)
    assert again.waiting and resumed.step() is not None and resumed.step() is None


def test_going_back_does_not_unsay_a_signal():
    trigger = when.signal()
    grower = grower_with(trigger)
    with grower.trial(None):
        trigger.set()
    assert grower.step() is not None


def test_a_loaded_signal_waits_for_one_firing():
    trigger = when.signal()
    trigger.set()
    trigger.load_state_dict({"waiting": True})
    assert steps(trigger, 2) == [True, False]


# file


def test_a_file_fires_once_and_is_moved_aside(tmp_path):
    trigger = when.file(tmp_path / "grow")
    assert not step(trigger)
    (tmp_path / "grow").write_text("please")
    assert steps(trigger, 3) == [True, False, False]
    assert [p.name for p in tmp_path.iterdir()] == ["grow.taken"]
    (tmp_path / "grow").write_text("again")
    assert steps(trigger, 2) == [True, False]
    assert (tmp_path / "grow.taken").read_text() == "again"


def test_a_file_that_is_there_at_the_start_fires_at_the_first_step(tmp_path):
    (tmp_path / "grow").touch()
    assert steps(when.file(tmp_path / "grow"), 2) == [True, False]


def test_only_one_of_several_processes_gets_the_file(tmp_path):
    triggers = [when.file(tmp_path / "grow") for _ in range(4)]
    (tmp_path / "grow").touch()
    assert sum(step(trigger) for trigger in triggers) == 1


def test_a_half_written_file_fires_once_and_loses_nothing(tmp_path):
    trigger = when.file(tmp_path / "grow")
    with (tmp_path / "grow").open("w") as half:
        half.write("first ")
        half.flush()
        assert steps(trigger, 2) == [True, False]
        half.write("and second")
    assert steps(trigger, 2) == [False, False]
    assert (tmp_path / "grow.taken").read_text() == "first and second"


def test_an_unreadable_file_and_a_broken_link_fire(tmp_path):
    trigger = when.file(tmp_path / "grow")
    (tmp_path / "grow").touch(mode=0o000)
    assert steps(trigger, 2) == [True, False]
    (tmp_path / "grow").symlink_to(tmp_path / "nowhere")
    assert steps(trigger, 2) == [True, False]


def test_a_directory_of_that_name_does_not_fire_and_is_named_once(tmp_path):
    trigger = when.file(tmp_path / "grow")
    (tmp_path / "grow").mkdir()
    with pytest.warns(UserWarning, match=r"does not fire: .*cannot be moved to 'grow.taken' \(it is a directory\)"):
        assert not step(trigger)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps(trigger, 3) == [False] * 3
        (tmp_path / "grow").rmdir()
        (tmp_path / "grow").touch()
        assert steps(trigger, 2) == [True, False]


def test_what_cannot_be_moved_does_not_fire_for_ever(tmp_path):
    trigger = when.file(tmp_path / "grow")
    (tmp_path / "grow.taken").mkdir()
    (tmp_path / "grow").touch()
    with pytest.warns(UserWarning, match="Remove what is in the way"):
        assert steps(trigger, 3) == [False] * 3
    (tmp_path / "grow.taken").rmdir()
    assert steps(trigger, 2) == [True, False]


def test_a_directory_that_goes_away_is_no_error(tmp_path):
    (tmp_path / "run").mkdir()
    trigger = when.file(tmp_path / "run" / "grow")
    (tmp_path / "run").rmdir()
    assert not step(trigger)


def test_a_relative_path_stays_where_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trigger = when.file("grow")
    (tmp_path / "grow").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert step(trigger) and repr(trigger) == "file(path='grow')"


def test_bad_places_are_refused_by_name(tmp_path):
    missing = os.fspath(tmp_path / "run" / "grow")
    with pytest.raises(ax.GrowthError) as raised:
        when.file(missing)
    assert str(raised.value) == (
        f"file(path={missing!r}): there is no directory {str(tmp_path / 'run')!r} where the file could appear. "
        f"Create it first: os.makedirs({str(tmp_path / 'run')!r})."
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ax.GrowthError, match=r"this is a directory\. Name a file in it, file\('.*/grow'\)"):
        when.file(tmp_path)
    for wrong in (3, None, b"grow", ["grow"]):
        with pytest.raises(ax.GrowthError, match=r"pass the path of a file, file\('run/grow'\)"):
            when.file(wrong)


@pytest.mark.parametrize("build", [when.signal, lambda: when.file("grow")])
def test_states_are_plain_and_of_one_trigger(build):
    trigger = build()
    state = json.loads(json.dumps(trigger.state_dict()))
    trigger.load_state_dict(state)
    with pytest.raises(ax.GrowthError, match="it is another trigger's"):
        trigger.load_state_dict({**state, "best": 1.0})
    assert trigger.state_dict() == state
