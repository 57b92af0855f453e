"""Slope and diverging: fire when the improvement ends in noise, when the metric gets worse, and not before."""

import math
import random
from functools import partial
from statistics import median

import pytest

from auxin import when
from auxin.errors import GrowthError
from auxin.when import Reading


def fires(trigger, stream) -> list[int]:
    return [i for i, value in enumerate(stream) if trigger(Reading(value, {"acc": -value}, i + 1, 0, 0, i + 1))]


def curve(seed: int, *parts: tuple[int, float]) -> list[float]:
    """Pieces of (readings, slope per reading), with unit noise."""
    rng, level, stream = random.Random(seed), 50.0, []
    for length, pace in parts:
        for _ in range(length):
            level += pace
            stream.append(level + rng.gauss(0, 1))
    return stream


def test_slope_fires_on_the_stall_and_hardly_ever_before():
    first = [fires(when.slope(), curve(seed, (100, -0.3), (60, 0.0)))[0] for seed in range(40)]
    assert sum(at < 100 for at in first) <= 1
    assert 105 <= sorted(first)[20] <= 125 and max(first) < 150


def test_slope_fires_again_after_a_new_window():
    found = fires(when.slope(window=10), curve(3, (200, 0.0)))
    assert found[0] == 9 and all(b - a >= 10 for a, b in zip(found, found[1:], strict=False))


def test_slope_is_not_moved_by_spikes_and_nan():
    rng, stream = random.Random(1), curve(1, (120, -0.3))
    for at in range(0, 120, 10):
        stream[at] = rng.choice([math.nan, math.inf, -math.inf, 1e9])
    assert fires(when.slope(), stream) == []


def test_slope_min_delta_is_an_improvement_that_does_not_count():
    stream = curve(2, (120, -0.3))
    assert fires(when.slope(), stream) == []
    assert fires(when.slope(min_delta=0.3), stream)[0] < 60
    assert fires(when.slope(min_delta=0.1), stream) == []


def test_diverging_fires_soon_on_a_rise_and_hardly_ever_before():
    early, late = 0, []
    for seed in range(40):
        found = fires(when.diverging(), curve(seed, (150, -0.1), (60, 0.4)))
        early += found[0] < 150
        late.append(found[0] - 150)
    assert early == 0 and sorted(late)[20] <= 16 and max(late) < 30


def test_diverging_does_not_fire_on_noise_and_spikes():
    alarms = 0
    for seed in range(40):
        stream = [v if i % 9 else 1e6 for i, v in enumerate(curve(seed, (200, 0.0)))]
        alarms += len(fires(when.diverging(), stream))
    assert alarms <= 2


def test_diverging_fires_on_what_is_not_finite():
    assert fires(when.diverging(), [1.0, math.nan, 1.0, math.inf, -math.inf]) == [1, 3, 4]
    spoiled = [1.0, math.nan, math.inf, 1.0, math.nan, math.nan, math.nan, math.nan]
    assert fires(when.diverging(nonfinite=3), spoiled) == [6]


def test_a_hole_of_nan_does_not_fire_by_the_readings_before_it():
    rising = [float(i) for i in range(19)]
    assert fires(when.diverging(nonfinite=3), [*rising, math.nan, math.nan, 19.0]) == [21]


def test_slope_with_a_shortest_window_sees_a_steep_improvement_stop_sooner_and_not_falsely():
    def first(shortest):
        trigger = partial(when.slope, window=40, level=0.3, shortest=shortest)
        return [fires(trigger(), curve(seed, (130, -0.4), (60, 0.0)))[0] - 130 for seed in range(20)]

    whole, shorter = first(None), first(10)
    print(f"after the stall, median: {median(whole)} with the whole window, {median(shorter)} with shorter ones")
    assert min(shorter) >= 0 and median(shorter) <= 0.75 * median(whole)
    assert not any(fires(when.slope(40, shortest=10), curve(seed, (250, -0.2))) for seed in range(10))


def test_a_shortest_window_is_not_asked_before_there_is_a_past_to_compare_with():
    noisy = [curve(seed, (119, -0.1)) for seed in range(10)]
    assert [fires(when.slope(40), c) for c in noisy] == [fires(when.slope(40, shortest=10), c) for c in noisy]


@pytest.mark.parametrize("build", [lambda **k: when.slope(window=10, **k), lambda **k: when.diverging(**k)])
def test_units_mode_and_keyword(build):
    stream = curve(5, (40, -0.5), (40, 0.0), (40, 0.6))
    expected = fires(build(), stream)
    assert expected and fires(build(), [1e-9 * v for v in stream]) == expected
    assert fires(build(mode="max"), [-v for v in stream]) == expected
    assert fires(build(mode="max", metric="acc"), stream) == expected
    assert fires(build(mode="max"), stream) != expected


def test_the_trend_can_be_read():
    trigger = when.slope(window=20)
    assert math.isnan(trigger.trend)
    fires(trigger, [10.0 - 0.5 * i for i in range(30)])
    assert trigger.trend == pytest.approx(-0.5)
    trigger = when.diverging(window=20)
    fires(trigger, [10.0 - 0.5 * i for i in range(30)])
    assert trigger.trend == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: when.slope(window=7), "slope(window=7): window takes whole numbers from 8."),
        (lambda: when.slope(shortest=7), "slope(shortest=7): shortest takes whole numbers from 8."),
        (lambda: when.slope(20, shortest=30), "slope(window=20, shortest=30): shortest is at most the window."),
        (lambda: when.slope(level=0), "slope(level=0): level is a probability, above 0 and below 1."),
        (lambda: when.slope(level=math.nan), "slope(level=nan): level takes a finite number."),
        (lambda: when.slope(min_delta=-1), "slope(min_delta=-1): an improvement cannot be negative, pass 0 or more."),
        (lambda: when.slope(mode="up"), "slope(mode='up'): mode is 'min' or 'max'."),
        (lambda: when.diverging(level=2), "diverging(level=2): level is a probability, above 0 and below 1."),
        (lambda: when.diverging(nonfinite=0), "diverging(nonfinite=0): nonfinite takes whole numbers from 1."),
        (
            lambda: when.diverging(window=8),
            "diverging(window=8, level=0.0001): 8 readings that all rise have a probability of 0.0004, so it could "
            "never fire. Pass a larger level or a longer window.",
        ),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(GrowthError) as raised:
        build()
    assert str(raised.value) == message
