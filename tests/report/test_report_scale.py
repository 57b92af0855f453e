"""Scales, ticks, thinning, and numbers in words."""

import math
import random

import pytest

from auxin.report.figures import duration, finite, scaled, significant, span
from auxin.report.plot import tick_name
from auxin.report.scale import Scale, log_ticks, round_ticks, spread, thin, value_scale


@pytest.mark.parametrize("high", [1, 7, 37, 600, 9999, 123456, 3e9])
def test_ticks_are_round_and_inside(high: float) -> None:
    ticks = round_ticks(0, high, 8)
    assert 3 <= len(ticks) <= 9
    assert ticks[0] == 0 and ticks[-1] <= high
    first = f"{ticks[1]:.6e}"
    assert first[0] in "125" and float(first.split("e")[0]) in (1, 2, 5)


def test_a_scale_is_logarithmic_where_values_span_much() -> None:
    assert value_scale([1.2, 4.6]) == Scale(1.0, 5.0)
    assert value_scale([0.01, 8.0]).log
    assert not value_scale([0.0, 8.0]).log
    assert log_ticks(0.015, 9.0, 5) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    assert Scale(0.01, 100, log=True).at(1) == pytest.approx(0.5)
    assert Scale(0.01, 100, log=True).at(-1) == 0


@pytest.mark.parametrize("values", [[], [0.0], [3.0, 3.0], [math.nan], [1e16, 1e16 + 2], [-5.0, -5.0]])
def test_a_scale_has_room_even_for_one_value(values: list[float]) -> None:
    scale = value_scale(values)
    assert scale.low < scale.high and scale.ticks(5)
    assert all(0 <= scale.at(value) <= 1 for value in values if not math.isnan(value))


def test_thinning_keeps_spikes_gaps_and_order() -> None:
    noise = random.Random(0)
    values = [noise.random() for _ in range(10_000)]
    values[1234], values[8000] = 50.0, math.nan
    kept = thin(values, 400)
    assert len(kept) <= 1202
    assert kept == sorted(set(kept)) and (kept[0], kept[-1]) == (0, 9999)
    assert {1234, 8000} <= set(kept)
    known = [value for value in values if not math.isnan(value)]
    assert min(values[i] for i in kept if not math.isnan(values[i])) == min(known)
    assert thin(values[:500], 400) == list(range(500))
    assert thin([1.0] * 1000, 10)[-1] == 999  # a level line keeps its length
    assert thin([math.inf] * 100, 3) == [0, 33, 66, 99]


def test_spreading_keeps_both_ends() -> None:
    assert spread(1000, 3) == [0, 499, 999]
    assert spread(0, 3) == [] and spread(2, 3) == [0, 1]


def test_numbers_for_people() -> None:
    assert [significant(v) for v in (1.41234, 108288.0, 2.4e-7, 0, None, math.nan)] == [
        "1.412",
        "108,288",
        "2.4e-7",
        "0",
        "–",
        "nan",
    ]
    assert [scaled(v) for v in (0, 999, 999.9, 33408, 2e6, 7e9, 1e30)] == [
        "0",
        "999",
        "1k",
        "33.4k",
        "2M",
        "7B",
        "1.00e+18T",
    ]
    assert [duration(v) for v in (0.0031, 8.2, 725, 12000)] == ["3.1 ms", "8.2 s", "12 min 5 s", "3 h 20 min"]
    assert (span(1, 4), span(4, 4), span(None, 4), span(None, None)) == ("1 → 4", "4", "4", "–")
    assert [finite(v) for v in (True, "3", 10**400, math.inf, 2)] == [None, None, None, None, 2.0]


def test_ticks_share_their_decimals() -> None:
    assert [tick_name(v, [0, 0.5, 1.0]) for v in (0, 0.5, 1.0)] == ["0.0", "0.5", "1.0"]
    assert [tick_name(v, [0, 50_000, 100_000]) for v in (0, 50_000)] == ["0", "50k"]
    assert [tick_name(v, [1.0, 1.002, 1.004]) for v in (1.0, 1.004)] == ["1.000", "1.004"]
    assert [tick_name(v, [0.02, 0.1, 5.0]) for v in (0.02, 0.1, 5.0)] == ["0.02", "0.1", "5"]
