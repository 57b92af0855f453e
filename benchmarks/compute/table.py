"""Tables from results: losses, paired differences, who won, and what was saved."""

import math
import statistics
from collections.abc import Mapping, Sequence

Losses = Mapping[int, float]  # by seed
HINDSIGHT = "best fixed size in hindsight"


def paired(ours: Losses, theirs: Losses) -> tuple[float, float, int]:
    """Mean of ours - theirs over the seeds that both have, half of its 95 % interval (Student's t), and how many."""
    both = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in both])


def interval(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, half of its 95 % interval, and how many."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return (values[0] if values else math.nan), math.inf, count
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return statistics.mean(values), half, count


def reached(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """FLOPs at which a loss is reached, between decayed end points: linear in the logarithm of FLOPs.

    Args:
        points: (FLOPs, loss) of runs that each ended with a decay.
        target: the loss.

    Returns:
        The FLOPs; those of the shortest run where that is low enough already; None where no run is.
    """
    points = sorted(points)
    if points[0][1] <= target:
        return points[0][0]
    for (flops, loss), (more, lower) in zip(points, points[1:], strict=False):
        if lower <= target:
            part = (loss - target) / (loss - lower)
            return math.exp(math.log(flops) + part * (math.log(more) - math.log(flops)))
    return None


def saved(
    rows: Mapping[int, Sequence[tuple[float, float]]], targets: Mapping[int, tuple[float, float]], within: float
) -> tuple[list[float], int]:
    """Parts of the target's FLOPs that are saved, seed by seed, and how many seeds did not get there.

    Args:
        rows: by seed, (FLOPs, loss) of runs of a row.
        targets: by seed, FLOPs and loss of the target.
        within: how much higher the loss may be, as a part of it.
    """
    parts, missed = [], 0
    for seed in sorted(rows.keys() & targets.keys()):
        flops, loss = targets[seed]
        found = reached(rows[seed], loss * (1 + within))
        missed += found is None
        if found is not None:
            parts.append(1 - found / flops)
    return parts, missed


def winner(plans: Mapping[str, Losses]) -> tuple[str, bool]:
    """The plan of the lowest mean, and whether it beats each other one beyond the paired interval."""
    seeds = set.intersection(*(set(losses) for losses in plans.values()))
    best = min(plans, key=lambda name: statistics.mean(plans[name][seed] for seed in seeds))
    others = [paired(plans[best], losses) for name, losses in plans.items() if name != best]
    return best, all(mean + half < 0 for mean, half, _ in others)


def shown(mean: float, half: float, signed: bool = True) -> str:
    """A mean and its interval."""
    return f"{mean:+.4f} +- {half:.4f}" if signed else f"{mean:.4f} +- {half:.4f}"
