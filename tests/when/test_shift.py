"""Drift: the loss has moved up and stays there; spikes, NaN and a falling loss do not fire."""

import math
import random

import pytest

from auxin import when
from auxin.errors import GrowthError
from auxin.when import Reading
from auxin.when.robust import noise


def fires(trigger, stream) -> list[int]:
    return [i for i, value in enumerate(stream) if trigger(Reading(value, {"acc": -value}, i + 1, 0, 0, i + 1))]


def noisy(seed: int, length: int, level: float = 0.0) -> list[float]:
    rng = random.Random(seed)
    return [level + rng.gauss(0, 1) for _ in range(length)]


@pytest.mark.parametrize("seed", range(20))
def test_a_shift_fires_once_and_soon(seed):
    stream = noisy(seed, 100) + noisy(seed + 1000, 100, level=4.0)
    found = fires(when.drift(), stream)
    assert len(found) == 1 and 100 <= found[0] <= 110


def test_noise_spikes_and_nan_hardly_ever_fire():
    alarms = 0
    for seed in range(60):
        rng, stream = random.Random(seed), noisy(seed, 300)
        for at in range(40, 300, 20):
            stream[at] = rng.choice([math.nan, math.inf, -math.inf, 50.0, 1e30])
        alarms += len(fires(when.drift(), stream))
    assert alarms <= 2


@pytest.mark.parametrize("spike", [math.nan, math.inf, -math.inf, 1e30, 10.0])
def test_one_spike_does_not_fire_even_at_the_lowest_threshold(spike):
    assert fires(when.drift(threshold=3.0, delta=0.0, window=5), [1.0] * 20 + [spike] + [1.0] * 9) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_falling_loss_does_not_fire(seed):
    stream = [60 / (1 + t / 8) + e for t, e in enumerate(noisy(seed, 300))]
    assert fires(when.drift(), stream) == []


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_units_do_not_matter(scale):
    stream = noisy(3, 60) + noisy(4, 40, level=5.0)
    assert fires(when.drift(), [scale * v for v in stream]) == fires(when.drift(), stream) != []


def test_mode_max_and_a_keyword():
    stream = noisy(3, 60) + noisy(4, 40, level=5.0)
    assert fires(when.drift(mode="max", metric="acc"), stream) == fires(when.drift(), stream)
    assert fires(when.drift(mode="max"), stream) == []


def test_a_constant_metric_that_moves():
    assert fires(when.drift(window=5), [2.0] * 20 + [2.1] * 10) == [24]
    assert fires(when.drift(window=5), [2.0, 2.0 + 1e-9] * 30) == []


def test_after_firing_the_new_level_is_usual():
    stream = noisy(1, 60) + noisy(2, 150, level=6.0) + noisy(3, 60, level=12.0)
    first, second = fires(when.drift(), stream)
    assert 60 <= first < 66 and 210 <= second < 216


def test_a_small_shift_becomes_usual():
    trigger = when.drift()
    assert fires(trigger, noisy(5, 60) + noisy(6, 300, level=0.7)) == []
    assert len(trigger.suspects) <= trigger.window


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_sum_of_page_and_hinkley(seed):
    """The slow twin: while nothing has become usual yet, the sum is the running sum less its smallest value."""
    start, stream = noisy(seed, 30), noisy(seed + 50, 15, level=1.0)
    trigger = when.drift(threshold=1000.0, delta=0.5)
    fires(trigger, start)
    middle, unit, total, lowest = sorted(start)[14:16], noise(start), 0.0, 0.0
    for t, value in enumerate(stream):
        trigger(Reading(value, {}, 1, 0, 0, 1))
        z = max(-3.0, min(3.0, (value - sum(middle) / 2) / unit))
        total += z - 0.5
        lowest = min(lowest, total)
        if trigger.sum == 0.0:
            return  # from here on the level moves
        assert trigger.sum == pytest.approx(total - lowest), t


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 2}, "drift(threshold=2): threshold is at least 3, or a single spike would fire."),
        ({"threshold": math.inf}, "drift(threshold=inf): threshold takes a finite number."),
        ({"delta": 3}, "drift(delta=3): delta is at least 0 and below 3, where readings are clipped."),
        ({"delta": -1}, "drift(delta=-1): delta is at least 0 and below 3, where readings are clipped."),
        ({"window": 4}, "drift(window=4): window takes whole numbers from 5."),
        ({"mode": "up"}, "drift(mode='up'): mode is 'min' or 'max'."),
        ({"metric": "a b"}, "drift(metric='a b'): metric is the name of a keyword of grower.step, as 'accuracy' in "),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(GrowthError) as raised:
        when.drift(**arguments)
    assert str(raised.value).startswith(message)
