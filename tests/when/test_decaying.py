"""No growth while the learning rate warms up or decays: right for each schedule at each step."""

import json
import math

import pytest
import torch
from torch.optim import lr_scheduler as lrs

import auxin as ax
from auxin import when
from auxin.when import Reading

STEPS = 100


def sgd(lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)], lr=lr)


def allowed(schedule, per_call: int = 1, steps: int = STEPS, per_step: int = 1, **words) -> list[int]:
    """Schedule steps taken at those readings at which the guard lets through what always fires."""
    guard, found = when.not_while_decaying(lambda reading: True, schedule, **words), []
    for step in range(1, steps + 1):
        schedule.optimizer.step()
        schedule.step()
        if step % per_call == 0 and all([guard(Reading(0.0, {}, step, step, 0, step)) for _ in range(per_step)]):
            found.append(step)
    return found


def test_a_schedule_that_is_built_later_is_asked_for_at_each_reading() -> None:
    built: list[torch.optim.lr_scheduler.LRScheduler] = []
    guard = when.not_while_decaying(when.every(1), lambda: built[-1])
    built.append(lrs.CosineAnnealingLR(sgd(), STEPS))
    assert guard(Reading(0.0, {}, 1, 1, 0, 1))
    built.append(lrs.LinearLR(sgd(), 0.1, 0.1))  # of a second run of the same host
    built[-1].optimizer.step()
    built[-1].step()
    assert not guard(Reading(0.0, {}, 2, 2, 0, 2))
    nothing = when.not_while_decaying(when.every(1), lambda: None)
    with pytest.raises(ax.GrowthError, match=r"not_while_decaying\(every\(n=1\), None\): the second argument is"):
        nothing(Reading(0.0, {}, 1, 1, 0, 1))


def wsd(step: int) -> float:
    """Warm-up until 10, stable until 60, down to 0 at 90, as people write it."""
    return min((step + 1) / 10, 1.0, max(0.0, (90 - step) / 30))


def sequential(optimizer):
    parts = [lrs.LinearLR(optimizer, 0.1, 1.0, 10), lrs.ConstantLR(optimizer, 1.0), lrs.LinearLR(optimizer, 1, 0, 30)]
    return lrs.SequentialLR(optimizer, parts, [10, 60])


def warm_cosine(optimizer):
    parts = [lrs.LinearLR(optimizer, 0.1, 1.0, 10), lrs.CosineAnnealingLR(optimizer, 90)]
    return lrs.SequentialLR(optimizer, parts, [10])


@pytest.mark.parametrize(
    ("build", "stable"),
    [
        # the last step at the full rate is the last of the stable phase
        (lambda o: ax.schedule.wsd(o, warmup=10, decay=30, total=90), range(9, 61)),
        (lambda o: lrs.LambdaLR(o, wsd), range(10, 61)),  # seen one step after it has come to its top
        (sequential, range(10, 61)),
        # cosine and linear: while the rate is at least half of the peak
        (lambda o: lrs.CosineAnnealingLR(o, STEPS), range(1, 51)),
        (lambda o: lrs.LinearLR(o, 1.0, 0.0, STEPS), range(1, 51)),
        (warm_cosine, range(10, 56)),
        (lambda o: lrs.LambdaLR(o, lambda step: 1 - step / STEPS), range(1, 51)),
        (lambda o: lrs.PolynomialLR(o, STEPS, power=2.0), range(1, 30)),
        (lambda o: lrs.ConstantLR(o, 1.0), range(1, 101)),
        (lambda o: lrs.OneCycleLR(o, 0.1, total_steps=101, pct_start=0.3, anneal_strategy="linear"), range(30, 65)),
    ],
)
def test_the_guard_holds_exactly_outside_of_the_stable_phase(build, stable):
    assert allowed(build(sgd())) == list(stable)


@pytest.mark.parametrize("per_step", [1, 5])
def test_a_schedule_by_the_epoch_and_a_grower_by_the_step(per_step):
    assert allowed(lrs.CosineAnnealingLR(sgd(), STEPS), per_step=per_step) == list(range(1, 51))
    assert allowed(lrs.LambdaLR(sgd(), wsd), per_step=per_step) == list(range(10, 61))


def test_a_schedule_by_the_step_and_a_grower_by_the_epoch():
    assert allowed(lrs.CosineAnnealingLR(sgd(), STEPS), per_call=10) == [10, 20, 30, 40, 50]
    assert allowed(ax.schedule.wsd(sgd(), 10, 30, total=90), per_call=10) == [10, 20, 30, 40, 50, 60]
    # The rate rose between the readings at 8 and 16: only the one at 24 can tell that the top is reached.
    assert allowed(lrs.LambdaLR(sgd(), wsd), per_call=8) == [24, 32, 40, 48, 56]


def test_restarts_are_stable_again():
    assert allowed(lrs.CosineAnnealingWarmRestarts(sgd(), 20), steps=40) == [*range(1, 11), *range(20, 31), 40]


def test_below_moves_the_end():
    assert allowed(lrs.LinearLR(sgd(), 1.0, 0.0, STEPS), below=0.75) == list(range(1, 26))


def test_a_cut_by_reduce_lr_on_plateau_blocks_for_good():
    optimizer = sgd()
    schedule = lrs.ReduceLROnPlateau(optimizer, factor=0.1, patience=3)
    guard, found = when.not_while_decaying(when.every(1), schedule), []
    for call in range(1, 13):
        schedule.step(1.0)
        found.append(guard(Reading(1.0, {}, call, call, 0, call)))
    assert found == [True] * 4 + [False] * 8


def test_wsd_of_a_grower_opens_and_closes():
    class Stub:
        done = False

    grower = Stub()
    schedule = ax.schedule.wsd(sgd(), 3, 5, grower=grower)
    assert allowed(schedule, steps=20) == list(range(2, 21))
    grower.done = True
    assert allowed(schedule, steps=10) == []


def test_the_inner_trigger_sees_every_reading():
    seen = []
    guard = when.not_while_decaying(lambda r: seen.append(r.calls) or True, lrs.LinearLR(sgd(), 0.1, 1.0, 5))
    for call in range(1, 4):
        assert not guard(Reading(0.0, {}, call, 0, 0, call))
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("cut", [0, 1, 5, 11, 40, 59, 60, 61, 75])
@pytest.mark.parametrize("build", [lambda o: lrs.LambdaLR(o, wsd), sequential, warm_cosine])
def test_a_restored_guard_goes_on(build, cut):
    def run(guard, schedule, steps):
        found = []
        for step in steps:
            schedule.optimizer.step()
            schedule.step()
            found.append(guard(Reading(1.0, {}, step, step, 0, step)))
        return found

    def fresh():
        schedule = build(sgd())
        return when.not_while_decaying(when.plateau(patience=2), schedule), schedule

    expected = run(*fresh(), range(1, STEPS + 1))
    first, schedule = fresh()
    found = run(first, schedule, range(1, cut + 1))
    second = when.not_while_decaying(when.plateau(patience=2), schedule)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + run(second, schedule, range(cut + 1, STEPS + 1)) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: when.not_while_decaying(when.plateau, None),
            "not_while_decaying(plateau): plateau is not a trigger yet; ",
        ),
        (
            lambda: when.not_while_decaying(when.every(2), None),
            "not_while_decaying(every(n=2), None): the second argument is the learning-rate scheduler, an object with",
        ),
        (
            lambda: when.not_while_decaying(when.every(2), lrs.StepLR(sgd(), 3), below=1.5),
            "not_while_decaying(below=1.5): below is a part of the peak, above 0 and at most 1.",
        ),
        (
            lambda: when.not_while_decaying(when.every(2), lrs.StepLR(sgd(), 3), below=math.nan),
            "not_while_decaying(below=nan): below takes a finite number.",
        ),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(ax.GrowthError) as raised:
        build()
    assert str(raised.value).startswith(message)
