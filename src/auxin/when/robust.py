"""Statistics that single outliers cannot move: trend, its significance, and the size of the noise.

Sources: H. Theil, A rank-invariant method of linear and polynomial regression analysis (1950); P. K. Sen, Estimates
of the regression coefficient based on Kendall's tau (1968); H. B. Mann, Nonparametric tests against trend (1945);
M. G. Kendall, Rank Correlation Methods (1975).
"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median

# A normal variable is within 0.6745 of its mean half of the time.
_QUARTILE = 0.6744897501960817


def theil_sen(values: Sequence[float]) -> tuple[float, float]:
    """Slope per step, and level at the first value, of the line through equally spaced values.

    The slope is the median of the slopes between all pairs, the level the median of what is left. Three values in
    ten may be anything.

    Args:
        values: at least two finite numbers.

    Examples:
        >>> theil_sen([1.0, 2.0, 300.0, 4.0, 5.0])
        (1.0, 1.0)
    """
    n = len(values)
    slope = median((values[j] - values[i]) / (j - i) for i in range(n) for j in range(i + 1, n))
    return slope, median(value - slope * i for i, value in enumerate(values))


def mann_kendall(values: Sequence[float]) -> float:
    """Standard score of the trend in a sequence: positive where it rises, 0 where there is none.

    Counts in how many pairs the later value is larger, and in how many it is smaller; without a trend the difference
    has mean 0 and a known variance (ties reduce it), and is close to normal from about ten values on. One step of the
    difference is taken off for continuity.

    Args:
        values: numbers; infinities count as what they are.

    Examples:
        >>> round(mann_kendall([5, 4, 3, 3, 2, 1]), 2)
        -2.49
    """
    n = len(values)
    pairs = ((values[j] > values[i]) - (values[j] < values[i]) for i in range(n) for j in range(i + 1, n))
    balance = sum(pairs)
    ties = sum(t * (t - 1) * (2 * t + 5) for t in Counter(values).values())
    variance = (n * (n - 1) * (2 * n + 5) - ties) / 18
    if balance == 0 or variance <= 0:
        return 0.0
    return (balance - math.copysign(1, balance)) / math.sqrt(variance)


def probability_above(score: float) -> float:
    """Probability that a standard normal variable is above `score`.

    Examples:
        >>> round(probability_above(1.645), 3)
        0.05
    """
    return math.erfc(score / math.sqrt(2)) / 2


def noise(values: Sequence[float]) -> float:
    """Standard deviation of the noise around a level that moves slowly.

    The larger of two estimates: from the distances between neighbours, which a slow trend does not touch, and from
    the distances to the median, which see noise that is alike from value to value. Both are medians.

    Args:
        values: at least two finite numbers.

    Examples:
        >>> round(noise([1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 500.0]), 2)
        2.97
    """
    steps = median(abs(b - a) for a, b in zip(values[:-1], values[1:], strict=True)) / math.sqrt(2)
    middle = median(values)
    return max(steps, median(abs(value - middle) for value in values)) / _QUARTILE
