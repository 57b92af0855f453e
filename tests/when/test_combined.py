"""Triggers made of triggers: who fires, that all see every reading, and states that nest."""

import json

import pytest
import torch

from auxin import when
from auxin.errors import GrowthError
from auxin.when import Reading


def reading(metric=None, calls=1, **metrics) -> Reading:
    return Reading(metric, metrics, calls, calls, growths=0, since_growth=calls)


def fires(trigger, stream) -> list[int]:
    return [i for i, value in enumerate(stream, start=1) if trigger(reading(value, i))]


def count(reading: Reading) -> bool:
    return reading.calls % 5 == 0


def test_any_of():
    assert fires(when.any_of(when.every(2), when.every(3), count), [0] * 10) == [2, 3, 4, 5, 6, 8, 9, 10]


def test_all_of():
    assert fires(when.all_of(when.every(2), when.threshold(1.0)), [1, 1, 1, 2, 2, 0]) == [2, 6]


def test_cooldown():
    assert fires(when.cooldown(when.threshold(1.0), 3), [1] * 10) == [1, 5, 9]
    assert fires(when.cooldown(when.every(2), 1), [1] * 6) == [2, 4, 6]


@pytest.mark.parametrize("build", [when.any_of, when.all_of])
def test_every_trigger_sees_every_reading(build):
    seen = []

    def watch(reading):
        seen.append(reading.calls)
        return False

    trigger = build(when.every(1), watch, when.every(3), lambda r: seen.append(-r.calls) or False)
    fires(trigger, [0] * 3)
    assert seen == [1, -1, 2, -2, 3, -3]


def test_a_paused_trigger_sees_every_reading():
    assert fires(when.cooldown(when.plateau(patience=2, cooldown=0), 3), [5, 5, 5, 4, 3, 2, 2, 2]) == [3, 8]


def test_nesting():
    trigger = when.any_of(when.cooldown(when.all_of(when.every(2), when.threshold(1)), 3), when.at([7]))
    assert fires(trigger, [1] * 12) == [2, 6, 7, 10]


@pytest.mark.parametrize(
    "build",
    [
        lambda *t: when.any_of(*t),
        lambda *t: when.all_of(*t),
        lambda *t: when.any_of(when.every(9), when.cooldown(when.all_of(*t), 2)),
    ],
)
def test_a_missing_metric_changes_nothing(build):
    signal = when.signal()
    trigger = build(when.plateau(patience=1), signal, when.plateau(patience=1, metric="accuracy"))
    trigger(reading(1.0, accuracy=1.0))
    signal.set()
    before = trigger.state_dict()
    with pytest.raises(GrowthError, match="watches 'accuracy'"):
        trigger(reading(0.5))
    assert trigger.state_dict() == before and signal.waiting
    assert trigger(reading(1.0, 3, accuracy=2.0))  # as if the wrong call had not been


def test_repr_is_the_call_that_built_it():
    text = "any_of(cooldown(plateau(patience=3), calls=2), all_of(every(n=2), threshold(value=1.0)), signal())"
    assert repr(eval(text, vars(when))) == text
    assert repr(when.any_of(count, when.every(2))) == "any_of(count, every(n=2))"
    schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], 1.0), 3)
    assert repr(when.not_while_decaying(when.every(2), schedule)) == "not_while_decaying(every(n=2), StepLR)"


class Stopping:
    def __init__(self, done):
        self.done = done

    def __call__(self, reading):
        return False


def test_done_passes_through():
    over, open_ = Stopping(True), Stopping(False)
    assert when.any_of(over, Stopping(True)).done and not when.any_of(over, open_, when.every(2)).done
    assert when.all_of(over, open_).done and not when.all_of(open_, when.every(2)).done
    assert when.cooldown(over, 2).done and not when.cooldown(when.every(2), 2).done


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: when.any_of(when.every(2)),
            "any_of(every(n=2)): pass two triggers or more, one by one: any_of(plateau(...), every(...)).",
        ),
        (lambda: when.any_of(), "any_of(): pass two triggers or more"),
        (lambda: when.all_of([when.every(2), when.every(3)]), "all_of([every(n=2), every(n=3)]): pass two triggers"),
        (
            lambda: when.all_of(when.every(2), when.plateau),
            "all_of(plateau): plateau is not a trigger yet; call it: all_of(plateau(...)).",
        ),
        (
            lambda: when.any_of(when.every(2), 3),
            "any_of(3): 3 is not a trigger; pass one such as plateau(patience=3), or any f(reading).",
        ),
        (lambda: when.cooldown(int, 3), "cooldown(<class 'int'>): <class 'int'> is not a trigger;"),
        (lambda: when.cooldown(when.every(2), 0), "cooldown(calls=0): calls takes whole numbers from 1."),
        (
            lambda: (lambda one: when.any_of(one, one))(when.every(2)),
            "any_of(every(n=2), every(n=2)): one trigger is given twice, and would see every reading twice.",
        ),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(GrowthError) as raised:
        build()
    assert str(raised.value).startswith(message)


def test_a_state_of_other_triggers_is_refused_and_changes_nothing():
    def build():
        return when.any_of(when.plateau(patience=2), when.every(2), count)

    trigger = build()
    fires(trigger, [3, 2, 1])
    before = trigger.state_dict()
    others = [
        when.any_of(when.plateau(patience=2), when.every(2)),
        when.any_of(when.plateau(patience=2), when.plateau(patience=2), count),
        when.any_of(when.plateau(patience=2), when.every(2), when.every(3)),
        when.every(3),
    ]
    for other in others:
        with pytest.raises(GrowthError, match="another trigger's"):
            trigger.load_state_dict(other.state_dict())
        assert trigger.state_dict() == before
    for wrong in ({"triggers": 3}, {"triggers": [None, None, None]}, {}):
        with pytest.raises(GrowthError, match="another trigger's"):
            trigger.load_state_dict(wrong)
        assert trigger.state_dict() == before
    trigger.load_state_dict(json.loads(json.dumps(before)))
    assert trigger.state_dict() == before
