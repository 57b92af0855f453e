"""The statistics against scipy, and against outliers."""

import itertools
import math
import random

import pytest

from auxin.when.robust import mann_kendall, noise, probability_above, theil_sen


def sample(seed: int, ties: bool = False) -> list[float]:
    rng = random.Random(seed)
    values = [rng.uniform(-1, 1) * i + rng.gauss(0, 3) for i in range(rng.randrange(8, 40))]
    return [round(v) for v in values] if ties else values


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ties", [False, True])
def test_theil_sen_as_in_scipy(seed, ties):
    stats = pytest.importorskip("scipy.stats")
    values = sample(seed, ties)
    expected = stats.theilslopes(values, range(len(values)), method="joint")
    slope, level = theil_sen(values)
    assert slope == pytest.approx(expected.slope) and level == pytest.approx(expected.intercept)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ties", [False, True])
def test_mann_kendall_as_kendalls_tau_in_scipy(seed, ties):
    """Without the step for continuity the squared score is that of scipy's asymptotic test."""
    stats = pytest.importorskip("scipy.stats")
    values = sample(seed, ties)
    tau = stats.kendalltau(range(len(values)), values, method="asymptotic")
    n = len(values)
    balance = sum((b > a) - (b < a) for i, a in enumerate(values) for b in values[i + 1 :])
    assert math.copysign(1, balance) == math.copysign(1, tau.statistic)
    if abs(balance) == 1:
        assert mann_kendall(values) == 0
        return
    whole = mann_kendall(values) * balance / (balance - math.copysign(1, balance))
    assert 2 * probability_above(abs(whole)) == pytest.approx(tau.pvalue, rel=1e-6), n


def test_mann_kendall_against_all_orders_of_seven():
    """How often a score comes by chance, by counting: the normal curve is near from few values on."""
    scores = [mann_kendall(order) for order in itertools.permutations(range(7))]
    for score in {s for s in scores if s > 0}:
        share = sum(s >= score for s in scores) / len(scores)
        assert share == pytest.approx(probability_above(score), abs=0.01)


def test_probability_as_in_scipy():
    stats = pytest.importorskip("scipy.stats")
    for score in (-3.0, 0.0, 0.5, 2.0, 8.0):
        assert probability_above(score) == pytest.approx(stats.norm.sf(score))


def test_outliers_do_not_move_them():
    values = [2.0 * i for i in range(20)]
    broken = [1e12 if i % 5 == 2 else v for i, v in enumerate(values)]
    assert theil_sen(values) == (2.0, 0.0)
    assert theil_sen(broken)[0] == pytest.approx(2.0, rel=0.2)
    assert mann_kendall(broken) > 2 and mann_kendall([1.0] * 9) == 0


@pytest.mark.parametrize("slope", [0.0, 0.05])
def test_noise_is_the_standard_deviation_spikes_and_a_slow_trend_or_not(slope):
    found = []
    for seed in range(50):
        rng = random.Random(seed)
        found.append(noise([slope * i + rng.gauss(0, 2.0) + (500 if i % 25 == 7 else 0) for i in range(60)]))
    assert 1.9 < sorted(found)[25] < 2.7
