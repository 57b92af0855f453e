"""From pilots and from the past to the end of a budget: curves carried on, what is not known drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DRAWS = 2000
PARTS = (0.6, 1.0)  # n steps on the n parts of a batch go as far as n to this power on whole ones: drawn so
SLOWER, SLOWER_FRESH = 0.4, 0.2  # taken off it as rates are lower then, those of a network with new weights less so
SETTLED = 0.2  # the same for a network that has been trained: its curve is flat, or becomes so after a growth
STEEPEST = (0.3, 1.0)  # fall of the logarithm of a loss per octave: drawn so
AFTER = (0.4, 0.8)  # factor of the slope per octave once it was that steep: drawn so
FACTORS = (0.5, 2.5)  # by which a slope changes per octave, at the ends
DRIFT = 0.3  # spread of the logarithm of that factor
LEAST = 0.01  # relative spread of a repetition
TINY = 1e-12
# Where the past is told. What is drawn are logarithms of losses, slopes of them per octave of steps, and octaves.
PAST, PAST_FRESH = 0.5, 0.75  # weight of the past beside the pilots; for new weights these tell less
WINDOW = 0.25  # octaves on both sides over which the past is averaged
SLOPES = (-0.6, 0.3)  # of the past, at the ends
HOLDS = (0.3, 1.2)  # how much of its last slope holds in what follows
DECAY = (-0.05, 0.2)  # what the decay at the end of a run takes off
AHEAD = (0.3, 2.0)  # octaves by which a larger network is ahead after equally many steps
ROOM = (0.0, 0.5)  # what a growth takes off when the steps that follow double those of the past, per octave
BLUR, BLUR_FRESH = 0.03, 0.15  # what else there is


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
    """

    points: tuple[Point, ...]
    fresh: bool = False


class Past:
    """How the loss on validation data fell while the network that is there was trained.

    Args:
        points: steps so far and the loss then, of which the last is that of now.
    """

    def __init__(self, points: Sequence[tuple[float, float]]):
        self.octaves = [math.log2(steps) for steps, _ in points]
        self.heights = [math.log(max(TINY, loss)) for _, loss in points]

    @property
    def steps(self) -> float:
        """All of them."""
        return 2 ** self.octaves[-1]

    def height(self, octave: float) -> float:
        """The logarithm of the loss after so many octaves of steps; before the first the curve is carried back."""
        first = self.octaves[0]
        if octave < first:
            return self.height(first) - (first - octave) * min(0.0, self.height(first + 1) - self.height(first))
        points = list(zip(self.octaves, self.heights, strict=True))
        near = [height for at, height in points if abs(at - octave) <= WINDOW]
        if near:
            return sum(near) / len(near)
        for (a, low), (b, high) in zip(points[:-1], points[1:], strict=True):
            if a <= octave <= b:
                return low + (high - low) * (octave - a) / (b - a)
        return self.heights[-1]

    def slope(self, octave: float) -> float:
        """Of that per octave, over the last one before."""
        return min(max(self.height(octave) - self.height(octave - 1.0), SLOPES[0]), SLOPES[1])


Kind = Literal["old", "grown", "fresh"]


def foreseen(past: Past, ways: Sequence[tuple[Kind, float]], seed: int = 0) -> Tensor:
    """Logarithms of the losses at the end by the past alone, drawn at random, (draws, ways).

    A network with new weights goes the way that the smaller one went, some octaves ahead of it. One that is there goes
    on along its last slope; one that has grown too, over the fewer steps that it gets, and with room to fall further.

    Args:
        past: of the network that is there.
        ways: for each what its network is, and the steps that the budget pays for.
        seed: of the draws.
    """
    random = torch.Generator().manual_seed(seed)
    now, decay, holds = past.octaves[-1], _between(DECAY, random), _between(HOLDS, random)
    found: list[Tensor] = []
    for kind, steps in ways:
        blur = torch.randn(DRAWS, generator=random, dtype=torch.float64)
        if kind == "fresh":
            ahead = _between(AHEAD, random)
            end = min(math.log2(max(steps, 1.0)), now)
            octaves = ahead + math.log2(max(1.0, steps / past.steps)) * holds
            found.append(past.height(end) + octaves * min(0.0, past.slope(end)) - decay + BLUR_FRESH * blur)
            continue
        told = past.height(now) + math.log2(1 + steps / past.steps) * past.slope(now) * holds + BLUR * blur
        room = _between(ROOM, random) if kind == "grown" else 0.0
        found.append(told - decay - math.log2(1 + 2 * steps / past.steps) * room)
    return torch.stack(found, 1)


def forecasts(
    ways: Sequence[Sequence[Curve]], cut: int, seed: int = 0, past: tuple[float, Tensor] | None = None
) -> Tensor:
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
        past: the logarithm of the loss now, to which the first look of the first way is set, and what ``foreseen``
            found.
    """
    random = torch.Generator().manual_seed(seed)
    count = next(len(curves[-1].points[-1].losses) for curves in ways if curves)
    chosen = torch.randint(count, (DRAWS, count), generator=random)
    power = _between(PARTS, random)
    steepest, after = _between(STEEPEST, random), _between(AFTER, random)
    level = past[0] - _height(ways[0][-1].points[0], count) if past and ways[0] else 0.0
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
        end = heights[-1] + fall + noise
        if past is not None:
            luck = heights[-1] - heights[-1].mean()  # of the batches that were drawn
            weight = PAST
            if curves[-1].fresh:  # of what is below the smaller network already, its way tells nothing
                weight = torch.where(heights[-1] + level < past[0] + luck, 0.0, PAST_FRESH)
            end = weight * (past[1][:, len(ends)] + luck) + (1 - weight) * (end + level)
        ends.append(end.exp())
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
