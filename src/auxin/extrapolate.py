"""From pilots to the end of a budget: learning curves carried on as powers, with what is not known drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 2000
PARTS = (0.6, 1.0)  # n steps on the n parts of a batch go as far as n to this power on whole ones: drawn so
SLOWER, SLOWER_FRESH = 0.4, 0.2  # taken off it as rates are lower then, those of a network with new weights less so
SETTLED = 0.2  # the same for a network that has been trained: its curve is flat, or becomes so after a growth
LATER = 0.1  # what a network that has grown may fall further per octave, at most: what is new learns late
STEEPEST = (0.3, 1.0)  # fall of the logarithm of a loss per octave: drawn so
AFTER = (0.4, 0.8)  # factor of the slope per octave once it was that steep: drawn so
FACTORS = (0.5, 2.5)  # by which a slope changes per octave, at the ends
DRIFT = 0.3  # spread of the logarithm of that factor
LEAST = 0.01  # relative spread of a repetition
TINY = 1e-12


@dataclass(frozen=True)
class Point:
    """A look at a pilot.

    Attributes:
        share: of the samples that the whole budget pays for, so far.
        losses: on each batch of the validation data.
    """

    share: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """A pilot.

    Attributes:
        points: its three looks, each after twice as many steps as the one before.
        fresh: whether it began with new weights throughout.
        grown: whether it began with a growth.
    """

    points: tuple[Point, ...]
    fresh: bool = False
    grown: bool = False


def forecasts(ways: Sequence[Sequence[Curve]], cut: int, seed: int = 0) -> Tensor:
    """Losses at the end of the budget, drawn at random, (draws, ways).

    The slope of a curve, loss over steps, both as logarithms, changes by a factor from octave to octave: that of its
    last looks. So curves that flatten go on flattening, and one that has hardly begun to fall falls faster until it is
    as steep as curves get, and flattens then. Of each draw the validation batches are drawn with replacement, the same
    for all ways, and so is what nobody knows: how far that factor holds, how steep curves get, and how far steps on
    parts of batches go. The spread of a repetition is added, which the pilots of a way tell.

    Args:
        ways: of each way the curves of its pilots, the longest last; a way without one is NaN.
        cut: parts of a batch in a step of the pilots.
        seed: of the draws.
    """
    random = torch.Generator().manual_seed(seed)
    count = next(len(curves[-1].points[-1].losses) for curves in ways if curves)
    chosen = torch.randint(count, (DRAWS, count), generator=random)
    power = _between(PARTS, random)
    steepest, after = _between(STEEPEST, random), _between(AFTER, random)
    ends = []
    for curves in ways:
        if not curves:
            ends.append(torch.full((DRAWS,), math.nan, dtype=torch.float64))
            continue
        points = curves[-1].points
        losses = torch.tensor([point.losses for point in points], dtype=torch.float64)
        heights = losses[:, chosen].mean(2).clamp_min(TINY).log()  # (looks, draws)
        left = -torch.log2(
            points[-1].share * cut ** (power - (SLOWER_FRESH if curves[-1].fresh else SLOWER))
        ).clamp_max(0.0)
        drift = DRIFT * torch.randn(DRAWS, generator=random, dtype=torch.float64)
        noise = _spread(curves) * torch.randn(DRAWS, generator=random, dtype=torch.float64)
        widths = [math.log2(b.share / a.share) for a, b in zip(points[:-1], points[1:], strict=True)]
        first, last = (step / width for step, width in zip(heights.diff(dim=0), widths, strict=True))
        if curves[-1].fresh:
            factor = torch.where(first < 0, last / first.clamp_max(-TINY), 1.0).clamp(*FACTORS) * drift.exp()
            fall = _fall(last, left, factor, steepest, after)
        else:
            fall = _fall((first + last) / 2, left, after, torch.full_like(left, SETTLED), after)
            later = LATER * torch.rand(DRAWS, generator=random, dtype=torch.float64)
            fall -= later * left if curves[-1].grown else 0.0
        ends.append((heights[-1] + fall + noise).exp())
    return torch.stack(ends, 1)


def _fall(slope: Tensor, left: Tensor, factor: Tensor, steepest: Tensor, after: Tensor) -> Tensor:
    """What the logarithm of a loss changes by over the octaves that are left; a curve that rises is taken to stay.

    Args:
        slope: of the last octave, (draws,).
        left: octaves.
        factor: by which the slope changes per octave.
        steepest: slope that no curve exceeds.
        after: the factor, once a curve has been that steep.
    """
    slope, total = slope.clamp_max(0.0).maximum(-steepest), torch.zeros_like(left)
    for octave in range(math.ceil(float(left.max()))):
        slope = (slope * factor).maximum(-steepest)
        factor = torch.where(slope <= -steepest, after, factor)
        total += slope * (left - octave).clamp(0.0, 1.0)
    return total


def _between(ends: tuple[float, float], random: torch.Generator) -> Tensor:
    return ends[0] + (ends[1] - ends[0]) * torch.rand(DRAWS, generator=random, dtype=torch.float64)


def _spread(curves: Sequence[Curve]) -> float:
    """Relative spread of a repetition: between where one pilot ended and where the longer one was by then."""
    found = [LEAST]
    for first, second in zip(curves[:-1], curves[1:], strict=True):
        end, other = first.points[-1], second.points
        common = min(len(end.losses), len(other[-1].losses))  # both have looked at the first of the same batches
        after = next((n for n, point in enumerate(other) if point.share >= end.share), len(other) - 1)
        right, left = other[after], other[max(0, after - 1)]
        width = math.log(right.share / left.share)
        part = min(1.0, max(0.0, math.log(end.share / left.share) / width)) if width else 1.0
        there = _height(left, common) * (1 - part) + _height(right, common) * part
        found.append((there - _height(end, common)) / math.sqrt(2))
    return math.sqrt(sum(d * d for d in found))


def _height(point: Point, count: int) -> float:
    return math.log(max(TINY, sum(point.losses[:count]) / count))
