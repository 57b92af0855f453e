import io
import json
import math
import random
from collections.abc import Callable, Iterable

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from auxin import when
from auxin.errors import GrowthError
from auxin.when import Reading

NAN, INF = math.nan, math.inf


def reading(metric=None, calls=1, optimizer_steps=0, **metrics) -> Reading:
    return Reading(metric, metrics, calls, optimizer_steps, growths=0, since_growth=calls)


def readings(stream: Iterable[float], steps_per_call: int = 7) -> list[Reading]:
    return [
        Reading(x, {"accuracy": -x}, i, i * steps_per_call, growths=0, since_growth=i)
        for i, x in enumerate(stream, start=1)
    ]


def fires(trigger, stream: Iterable[float]) -> list[int]:
    """The calls, counted from 1, at which a trigger fires."""
    return [r.calls for r in readings(stream) if trigger(r)]


def noisy_descent(rng: random.Random, length: int = 120) -> list[float]:
    """A falling metric with noise, jumps, ties, and now and then NaN or an infinity."""
    level, stream = 5.0, []
    for _ in range(length):
        level *= rng.uniform(0.93, 1.01)
        value = level + rng.choice([0.0, 0.0, rng.gauss(0, 0.2), rng.uniform(0, 3)])
        stream.append(rng.choice([NAN, INF, -INF]) if rng.random() < 0.01 else round(value, 2))
    return stream


# plateau


def test_plateau_fires_at_the_patience_th_reading_without_improvement() -> None:
    assert fires(when.plateau(patience=3), [5, 4, 4, 4, 4]) == [5]
    assert fires(when.plateau(patience=1, cooldown=0), [5, 4, 4, 4]) == [3, 4]


def test_plateau_starts_again_after_firing() -> None:
    assert fires(when.plateau(patience=2, cooldown=0), [1] * 8) == [3, 5, 7]


def test_plateau_leaves_what_has_grown_time_by_itself():
    assert fires(when.plateau(patience=2), [1] * 16) == [3, 9, 15]
    assert fires(when.plateau(patience=3), [1] * 22) == [4, 13, 22]
    # An improvement in the pause is kept as the best, and the count begins behind the pause.
    assert fires(when.plateau(patience=2), [2, 2, 2, 1, 1, 1, 1, 1, 1]) == [3, 9]


def test_a_plateau_saved_by_an_earlier_version_loads():
    trigger = when.plateau(patience=2)
    trigger.load_state_dict({"best": 1.0, "wait": 1, "cooling": 0})
    assert fires(trigger, [1] * 8) == [1, 7]


def test_an_improvement_clears_the_count() -> None:
    assert fires(when.plateau(patience=2), [5, 5, 4, 4, 3, 3, 3]) == [7]


def test_plateau_mode_max() -> None:
    assert fires(when.plateau(patience=2, mode="max"), [1, 2, 3, 2, 3, 4]) == [5]


def test_an_improvement_must_be_larger_than_min_delta() -> None:
    assert fires(when.plateau(patience=2, min_delta=0.5), [5.0, 4.5, 4.25, 3.75, 3.75]) == [5]
    assert fires(when.plateau(patience=2, min_delta=0.5), [5.0, 4.5, 4.5]) == [3]


def test_cooldown_readings_are_not_counted() -> None:
    assert fires(when.plateau(patience=2, cooldown=3), [1] * 12) == [3, 8]


def test_an_improvement_during_cooldown_is_kept_as_the_best() -> None:
    trigger = when.plateau(patience=1, cooldown=2)
    assert fires(trigger, [5, 5, 3, 4, 4]) == [2, 5]
    assert trigger.best == 3


def test_the_best_is_kept_over_a_growth_and_a_jump_does_not_fire_at_once() -> None:
    # Grown after the fifth call, which makes the metric jump.
    assert fires(when.plateau(patience=3, cooldown=0), [3, 2, 2, 2, 2, 9, 8, 1, 1, 1, 1]) == [5, 11]
    assert fires(when.plateau(patience=3, cooldown=0), [3, 2, 2, 2, 2, 9, 8, 7, 6]) == [5, 8]
    assert fires(when.plateau(patience=3, cooldown=4), [3, 2, 2, 2, 2, 9, 8, 7, 6]) == [5]


def test_nan_counts_as_a_reading_without_improvement() -> None:
    assert fires(when.plateau(patience=2, cooldown=0), [NAN, NAN, 1, NAN, NAN]) == [2, 5]
    assert fires(when.plateau(patience=3), [2, NAN, 1, NAN, 2, NAN]) == [6]


def test_infinities() -> None:
    assert fires(when.plateau(patience=2, cooldown=0), [INF, INF, 1, INF, INF]) == [2, 5]
    assert fires(when.plateau(patience=2), [-INF, -INF, -INF]) == [3]
    assert fires(when.plateau(patience=2, mode="max", cooldown=0), [-INF, -INF, INF, 3, 3]) == [2, 5]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("seed", range(100))
def test_plateau_fires_where_torch_reduces_one_patience_later(seed: int, mode: str) -> None:
    rng = random.Random(seed)
    patience, cooldown = rng.randrange(1, 9), rng.choice([0, 0, 1, 5])
    min_delta = rng.choice([0.0, 0.01, 0.3])
    stream = [x if mode == "min" else -x for x in noisy_descent(rng)]

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = ReduceLROnPlateau(
        optimizer,
        mode=mode,
        factor=0.999,
        patience=patience - 1,
        threshold=min_delta,
        threshold_mode="abs",
        cooldown=cooldown,
        eps=0.0,
    )
    expected, lr = [], 1.0
    for call, value in enumerate(stream, start=1):
        scheduler.step(value)
        if optimizer.param_groups[0]["lr"] < lr:
            lr = optimizer.param_groups[0]["lr"]
            expected.append(call)

    trigger = when.plateau(patience, min_delta=min_delta, mode=mode, cooldown=cooldown)
    assert fires(trigger, stream) == expected


# every, at


def test_every_counts_calls() -> None:
    assert fires(when.every(3), [0] * 10) == [3, 6, 9]
    assert fires(when.every(1), [0] * 3) == [1, 2, 3]


def test_every_counts_optimizer_steps_and_several_multiples_fire_once() -> None:
    trigger = when.every(100, unit="optimizer")
    seen = [0, 99, 100, 101, 350, 399, 400, 401]
    assert [s for s in seen if trigger(reading(optimizer_steps=s))] == [100, 350, 400]


def test_at_fires_once_per_count_in_any_order() -> None:
    assert fires(when.at([7, 2, 3]), [0] * 10) == [2, 3, 7]
    assert fires(when.at(range(4, 6)), [0] * 10) == [4, 5]
    assert fires(when.at([]), [0] * 3) == []


def test_at_loses_no_count_that_was_passed_between_two_calls() -> None:
    trigger = when.at([100, 120, 900], unit="optimizer")
    seen = [50, 130, 131, 132, 1000]
    assert [trigger(reading(optimizer_steps=s)) for s in seen] == [False, True, True, False, True]


# threshold


def test_threshold_fires_while_the_metric_is_there() -> None:
    assert fires(when.threshold(2.0), [3, 2, 1, 2.5]) == [2, 3]
    assert fires(when.threshold(2.0, mode="max"), [3, 2, 1, 2.5]) == [1, 2, 4]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_threshold_never_fires_on_nan(mode: str) -> None:
    assert fires(when.threshold(0.0, mode=mode), [NAN] * 3) == []


def test_threshold_and_infinity() -> None:
    assert fires(when.threshold(0.0), [INF, -INF]) == [2]
    assert fires(when.threshold(0.0, mode="max"), [INF, -INF]) == [1]


# which metric


def test_a_keyword_can_be_watched() -> None:
    trigger = when.threshold(0.9, mode="max", metric="accuracy")
    assert trigger(reading(0.1, accuracy=0.95))
    assert not trigger(reading(0.95, accuracy=0.1))
    assert fires(when.plateau(patience=2, mode="max", metric="accuracy"), [3, 2, 2, 2]) == [4]


def test_a_one_element_tensor_is_a_number() -> None:
    assert when.threshold(0.9)(reading(torch.tensor(0.5)))


def test_a_metric_may_be_named_as_loggers_name_it():
    trigger = when.threshold(0.5, metric="val/loss")
    assert [trigger(reading(**{"val/loss": loss})) for loss in (0.9, 0.4)] == [False, True]


@pytest.mark.parametrize(
    ("trigger", "seen", "message"),
    [
        (
            when.plateau(patience=3),
            reading(),
            "plateau(patience=3) needs a metric, but grower.step() got none by position. Call grower.step(loss).",
        ),
        (
            when.threshold(0.5),
            reading(loss=1.0),
            "threshold(value=0.5) needs a metric, but grower.step(loss=...) got none by position. "
            "Call grower.step(loss), or watch a keyword with metric='loss'.",
        ),
        (
            when.plateau(patience=3, metric="accuracy"),
            reading(1.0, loss=1.0),
            "plateau(patience=3, metric='accuracy') watches 'accuracy', "
            "but grower.step(loss, loss=...) has none. Call grower.step(accuracy=...).",
        ),
        (
            when.threshold(0.5),
            reading(torch.zeros(2)),
            "threshold(value=0.5) needs a number, but the metric is a Tensor. "
            "Pass one number, grower.step(float(loss)).",
        ),
        (
            when.threshold(0.5, metric="loss"),
            reading(loss="low"),
            "threshold(value=0.5, metric='loss') needs a number, but 'loss' is a str. "
            "Pass one number, grower.step(float(loss)).",
        ),
    ],
)
def test_a_missing_metric_is_explained(trigger, seen: Reading, message: str) -> None:
    with pytest.raises(GrowthError) as raised:
        trigger(seen)
    assert str(raised.value) == message


def test_a_missing_metric_changes_nothing() -> None:
    trigger = when.plateau(patience=2)
    before = trigger.state_dict()
    with pytest.raises(GrowthError):
        trigger(reading())
    assert trigger.state_dict() == before


# arguments


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: when.plateau(patience=0), "plateau(patience=0): patience takes whole numbers from 1."),
        (lambda: when.plateau(patience=2.5), "plateau(patience=2.5): patience takes whole numbers from 1."),
        (lambda: when.plateau(patience=True), "plateau(patience=True): patience takes whole numbers from 1."),
        (lambda: when.plateau(cooldown=-1), "plateau(cooldown=-1): cooldown takes whole numbers from 0."),
        (lambda: when.plateau(min_delta=NAN), "plateau(min_delta=nan): min_delta takes a finite number."),
        (
            lambda: when.plateau(min_delta=-0.1),
            "plateau(min_delta=-0.1): an improvement cannot be negative, pass 0 or more.",
        ),
        (lambda: when.plateau(mode="rel"), "plateau(mode='rel'): mode is 'min' or 'max'."),
        (
            lambda: when.plateau(metric="val loss"),
            "plateau(metric='val loss'): metric is the name of a keyword of grower.step, "
            "as 'accuracy' in grower.step(accuracy=...).",
        ),
        (lambda: when.every(0), "every(n=0): n takes whole numbers from 1."),
        (lambda: when.every(5, unit="epochs"), "every(unit='epochs'): unit is 'calls' or 'optimizer'."),
        (lambda: when.at(5), "at(5): pass the counts as a list, at([5])."),
        (lambda: when.at([0]), "at(counts=0): counts takes whole numbers from 1."),
        (lambda: when.at([3, 3]), "at([3, 3]): a count is given twice. One call grows at most once."),
        (lambda: when.at([3], unit="steps"), "at(unit='steps'): unit is 'calls' or 'optimizer'."),
        (lambda: when.threshold(INF), "threshold(value=inf): value takes a finite number."),
        (lambda: when.threshold("low"), "threshold(value='low'): value takes a finite number."),
        (lambda: when.threshold(1.0, mode="up"), "threshold(mode='up'): mode is 'min' or 'max'."),
    ],
)
def test_arguments_out_of_range_are_explained(build: Callable[[], object], message: str) -> None:
    with pytest.raises(GrowthError) as raised:
        build()
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("trigger", "text"),
    [
        (when.plateau(), "plateau(patience=10)"),
        (when.plateau(3, mode="max"), "plateau(patience=3, mode='max')"),
        (when.every(5), "every(n=5)"),
        (when.every(5, unit="optimizer"), "every(n=5, unit='optimizer')"),
        (when.at([3, 1]), "at(counts=[1, 3])"),
        (when.threshold(1, metric="loss"), "threshold(value=1.0, metric='loss')"),
        (when.drift(), "drift()"),
        (when.slope(30, level=0.1), "slope(window=30, level=0.1)"),
        (when.diverging(nonfinite=3), "diverging(nonfinite=3)"),
        (when.autogrow(3, 0.05, policy="periodic"), "autogrow(interval=3, threshold=0.05, policy='periodic')"),
        (when.signal(), "signal()"),
        (when.drift(threshold=5, metric="loss"), "drift(threshold=5.0, metric='loss')"),
    ],
)
def test_repr_is_the_call_that_built_it(trigger, text: str) -> None:
    assert repr(trigger) == text
    assert repr(eval(text, vars(when))) == text


# state

TRIGGERS = [
    lambda: when.plateau(patience=3, min_delta=0.05, cooldown=2),
    lambda: when.plateau(patience=2, mode="max", metric="accuracy"),
    lambda: when.every(4),
    lambda: when.every(25, unit="optimizer"),
    lambda: when.at([3, 20, 57]),
    lambda: when.at([10, 11, 12, 200], unit="optimizer"),
    lambda: when.threshold(2.0),
    lambda: when.drift(threshold=4.0, window=5),
    lambda: when.drift(window=5, mode="max", metric="accuracy"),
    lambda: when.slope(window=8, level=0.3),
    lambda: when.slope(window=12, shortest=8),
    lambda: when.slope(window=12, min_delta=0.01, mode="max", metric="accuracy"),
    lambda: when.diverging(window=9, level=0.01),
    lambda: when.diverging(window=9, level=0.01, nonfinite=2),
    lambda: when.autogrow(interval=4, threshold=0.1),
    lambda: when.any_of(when.plateau(patience=3), when.every(7)),
    lambda: when.all_of(when.every(3), when.any_of(when.threshold(2.0), when.drift(window=5))),
    lambda: when.cooldown(when.any_of(when.plateau(patience=2), when.at([5, 50])), calls=4),
]


@pytest.mark.parametrize("build", TRIGGERS)
@pytest.mark.parametrize("cut", [0, 1, 19, 60])
def test_a_restored_trigger_goes_on_as_if_nothing_had_happened(build, cut: int) -> None:
    stream = readings(noisy_descent(random.Random(cut)))
    whole, before, after = build(), build(), build()
    expected = [whole(r) for r in stream]
    fired = [before(r) for r in stream[:cut]]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert fired + [after(r) for r in stream[cut:]] == expected


@pytest.mark.parametrize("build", TRIGGERS)
def test_state_survives_torch_load_of_weights_only(build) -> None:
    file = io.BytesIO()
    torch.save(build().state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == build().state_dict()


@pytest.mark.parametrize("build", TRIGGERS)
def test_state_of_another_trigger_is_refused(build) -> None:
    with pytest.raises(GrowthError, match="it is another trigger's"):
        build().load_state_dict({"patience": 3})


def test_a_state_does_not_carry_the_arguments() -> None:
    old, new = when.plateau(patience=5), when.plateau(patience=2)
    fires(old, [1, 1, 1])
    new.load_state_dict(old.state_dict())
    assert fires(new, [1]) == [1]
