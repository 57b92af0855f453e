"""``verdict``: go on with the network that is there, grow it, or start a larger one anew?"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.tree import unwrap
from auxin.change import Edit
from auxin.errors import GrowthError, reason
from auxin.evidence import Evidence
from auxin.extrapolate import Curve, Kind, Past, Point, forecasts, foreseen
from auxin.grower import Grower
from auxin.pilots import ANEW, GO_ON, GROW, Anew, Bench, Look, Parts, finer, finest
from auxin.race import check_evidence, shown
from auxin.when import signal

SHARE = 0.1  # of the budget that a verdict may cost
FIRST = 0.2  # of that, for the first round
WEIGHTS = {GO_ON: 1, GROW: 2, ANEW: 4}  # of a round; what moves more needs longer pilots to be told
LOOKS = 3  # at each pilot, each after twice as many steps as the one before
LOOKING = 0.25  # of a round, at most, for losses on validation data
LEAST = 4  # steps of a pilot, below which it tells nothing
EARLY = 4  # by which factor an error has to be less likely for the first round to end it
WORTH = 0.01  # relative gain over the next best from which on a way is named
JUDGES = 8  # batches of validation data to look at, at least
QUANTILES = (0.05, 0.5, 0.95)
NAME = 60  # letters of a way in a table
SAME = "no difference"
KINDS: dict[str, Kind] = {GO_ON: "old", GROW: "grown", ANEW: "fresh"}
TOLD, BACK = 4, 4  # points that a past has at least, and the factor between its first step and its last


@dataclass(frozen=True)
class Plan:
    """One way to spend the budget, and what it is expected to come to.

    Attributes:
        name: "go on", "grow" or "start anew".
        edit: what it grows by, as one writes it; "" for the others.
        parameters: of its network.
        steps: that the whole budget pays for.
        pilots: of each pilot, in each look: the part of the budget, and the loss on validation data.
        expected: the loss at the end of the whole budget, lower is better; NaN: no pilot was run, or it diverged.
        between: 5 and 95 % of what it may be.
        best: the probability that it ends lowest.
    """

    name: str
    edit: str
    parameters: int
    steps: int
    pilots: tuple[tuple[tuple[float, float], ...], ...]
    expected: float
    between: tuple[float, float]
    best: float


@dataclass(frozen=True)
class Verdict:
    """What to do with a budget; prints itself as a table.

    Attributes:
        plans: going on first, then each growth, then starting anew.
        winner: the name of the best plan, or "no difference" where that is not sure, or by less than a hundredth.
        edit: the edit of the winner, if it grows; else None.
        gain: by which part the loss of the best plan is expected to end below that of the next one; 1: all others
            have diverged.
        sure: the probability that the best plan is the best.
        budget: that was judged, in FLOPs.
        spent: FLOPs by kind, as in a ledger: "races" are the pilots, "probing" the checks of growths, "evaluation" the
            losses on validation data.
        rounds: of pilots.
        seconds: that it took.
        words: why nothing could be found out; "" where it could.
    """

    plans: tuple[Plan, ...]
    winner: str
    edit: Any
    gain: float
    sure: float
    budget: float
    spent: dict[str, float]
    rounds: int
    seconds: float
    words: str = ""

    @property
    def price(self) -> float:
        """FLOPs that it has cost in all."""
        return sum(self.spent.values())

    @property
    def best(self) -> Plan:
        """The plan that is expected to end lowest, sure or not."""
        return max(self.plans, key=lambda plan: plan.best)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        named = self.best.edit if self.edit is not None else ""
        return _plain({**asdict(replace(self, edit=None)), "edit": named, "price": self.price})

    def __str__(self) -> str:
        names = [_short(f"{plan.name} {plan.edit}".strip()) for plan in self.plans]
        width = max(map(len, names))
        lines = [
            f"  {'':<{width}}  {'parameters':>12} {'steps':>9} {'pilots':>10} {'expected at the end':>30} {'best':>6}"
        ]
        for name, plan in zip(names, self.plans, strict=True):
            mark = "*" if plan.name == self.winner and plan is self.best else " "
            last = f"{plan.pilots[-1][-1][1]:.4g}" if plan.pilots and plan.pilots[-1] else "-"
            told = f"{plan.expected:.4g} [{plan.between[0]:.4g}, {plan.between[1]:.4g}]"
            if math.isnan(plan.expected):
                told = "-"
            lines.append(
                f"{mark} {name:<{width}}  {plan.parameters:>12,} {plan.steps:>9,} {last:>10} {told:>30} "
                f"{plan.best:>6.0%}"
            )
        if self.words:
            lines.append(f"{SAME} could be found out: {self.words}")
        elif self.winner == SAME:
            best = names[self.plans.index(self.best)]
            lines.append(f"{SAME} that is sure: {best} is best with {self.sure:.0%}, by {self.gain:.1%}")
        else:
            lines.append(f"{self.winner}: {self.gain:.1%} below the next best, sure to {self.sure:.0%}")
        part = self.price / self.budget
        lines.append(
            f"price: {self.price:.3g} FLOPs, {part:.1%} of the budget of {self.budget:.3g}, in {self.rounds} "
            f"round{'' if self.rounds == 1 else 's'} of pilots and {self.seconds:.1f} s"
        )
        return "\n".join(lines)


def _short(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME - 3]}..."


def _plain(value: Any) -> Any:
    """Without what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict(
    model: nn.Module | Grower,
    *companions: Any,
    budget: float,
    evidence: Evidence | None = None,
    edits: Edit | Iterable[Edit | Sequence[Edit]] = (),
    anew: Anew | None = None,
    probe: Any = None,
    history: Iterable[tuple[float, float]] | None = None,
    sure: float = 0.7,
    **options: Any,
) -> Verdict:
    """Judge what to do with more compute: go on training the network, grow it, or start a larger one anew.

    Every way is tried in short pilots on parts of the batches, at a constant rate with averaged weights in place of a
    decay; where it would end after the whole budget, with a decay at its end, is extrapolated. The ways are compared on
    the same batches, the uncertainty comes from the validation data, from the seeds, and from what is not known about
    learning curves. It ends early when it is sure, costs a tenth of the budget at most, and leaves network, companions
    and random generators as they were, bit for bit.

    Args:
        model: the network, trained so far; or a ``Grower``, whose network, companions and evidence are judged then, and
            whose ledger counts the price.
        companions: optimizers, schedules and averages, as for ``Grower``. The rates of the optimizers as they stand are
            those at which training would go on: after a decay, put them back first.
        budget: FLOPs that there are to spend; ``steps * auxin.ledger.flops_of(model, loss, batch)``.
        evidence: a loss, batches to train on, and ``validation=`` batches to judge on.
        edits: ways to grow: one edit, or several; a list inside the list is one growth.
        anew: ``anew() -> (model, optimizer)`` builds the larger network that would start anew, with new weights each
            time; with ``Evidence(step=...)`` it returns a step of its own too.
        probe: one batch to prove growths on; None: a part of the first of the evidence.
        history: how training went so far, from your log: pairs of optimizer steps and the loss on the validation data
            then, the last that of now. It is judged better then, and small budgets at all.
        sure: the probability from which on it names a winner, and ends.
        options: of ``Grower``, for the growths: ``rewarm``, ``group``, ``stock``.

    Returns:
        The verdict.

    Raises:
        GrowthError: there is no validation data, nothing to compare with, a budget below one step, a history that is
            too short, a loss that is negative or not finite, an edit that does not fit, or an ``anew`` that builds
            something else; nothing is changed then.

    Source:
        Our own; measured in docs/verdict.md, misses included.

    Example:
        >>> import torch
        >>> from auxin import Widen
        >>> x = torch.randn(256, 4)
        >>> batches = [*zip(x.split(32), x.prod(1, keepdim=True).split(32))]
        >>> evidence = Evidence(lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), batches[:6], validation=batches[6:])
        >>> def build(width):
        ...     net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        ...     return net, torch.optim.Adam(net.parameters(), lr=1e-2)
        >>> told = verdict(*build(2), edits=Widen("0", by=6), anew=lambda: build(8), evidence=evidence, budget=1e6)
        >>> told.winner in ("go on", "grow", "start anew", "no difference") and told.price <= 1e5
        True
    """
    started = time.perf_counter()
    if not isinstance(sure, (int, float)) or not 0.5 <= sure < 1:
        raise GrowthError(f"verdict(sure={sure!r}): pass a probability from 0.5 and below 1.")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < math.inf:
        raise GrowthError(f"verdict(budget={budget!r}): pass FLOPs, as steps * auxin.ledger.flops_of(model, loss, x).")
    past = None if history is None else _past(history)
    grower = _grower_of(model, companions, evidence, edits, probe, options)
    with _without_gradients(grower.model):
        return Judged(grower, anew, float(budget), past).verdict(float(sure), started)


def _past(history: Iterable[tuple[float, float]]) -> Past:
    """What a user's log tells.

    Raises:
        GrowthError: it is none, or too short to tell anything.
    """
    try:
        points = [(float(steps), float(loss)) for steps, loss in history]
    except (TypeError, ValueError) as error:
        raise GrowthError(
            f"verdict(history=...): {reason(error)}. Pass pairs of optimizer steps and the loss on the validation data "
            "then, as [(100, 0.9), (200, 0.7), ...]."
        ) from error
    steps = [step for step, _ in points]
    rising = all(a < b for a, b in itertools.pairwise([0.0, *steps]))
    if not rising or not all(math.isfinite(value) and value >= 0 for point in points for value in point):
        raise GrowthError(
            "verdict(history=...): its steps have to rise from above 0, and its losses to be finite and not negative. "
            "Leave out what came before a restart, and points without a loss."
        )
    if len(points) < TOLD or steps[-1] < BACK * steps[0]:
        between = f" from step {steps[0]:g} to {steps[-1]:g}" if steps else ""
        raise GrowthError(
            f"verdict(history=...): {len(points)} points{between} tell too little: pass {TOLD} or more, of which the "
            f"last has {BACK} times the steps of the first or more; or leave it out."
        )
    return Past(points)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Set gradients aside inside: those of the last step of a loop are left over, and no growth may stand on them."""
    held = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    try:
        for p, _ in held:
            p.grad = None
        yield
    finally:
        for p, gradient in held:
            p.grad = gradient


def _grower_of(
    model: nn.Module | Grower, companions: Sequence[Any], evidence: Any, edits: Any, probe: Any, options: dict[str, Any]
) -> Grower:
    """A Grower for the trials: the user's, or one that is gone afterwards.

    Raises:
        GrowthError: there is no evidence with validation data, or what ``Grower`` refuses.
    """
    if isinstance(model, Grower):
        if companions or options or edits or evidence or probe:
            raise GrowthError(
                "verdict(grower, budget=..., anew=...): a Grower has companions, edits, evidence, probe and options of "
                "its own. Pass it without these, or the network with all of them."
            )
        evidence = model.evidence
    if not isinstance(evidence, Evidence) or evidence.validation is None:
        raise GrowthError(
            "verdict(...) judges on data that training does not see: pass evidence=auxin.Evidence(loss, batches, "
            "validation=batches)."
        )
    if isinstance(model, Grower):
        known = model
    else:
        probe = Parts(evidence.batches, finest(unwrap(model), evidence))[0] if probe is None else probe
        none = isinstance(edits, (tuple, list)) and not edits
        chosen = {} if none else {"edits": edits, "when": signal()}
        known = Grower(model, *companions, **chosen, evidence=evidence, probe=probe, **options)
    if not known.ranks.alone:
        raise GrowthError(
            f"verdict(...) judges in one process, and there are {known.ranks.size}: call it in one alone."
        )
    if not known.optimizers:
        raise GrowthError("verdict(...) trains in pilots: pass an optimizer, auxin.verdict(model, optimizer, ...).")
    if not any(group["lr"] > 0 for one in known.optimizers for group in one.param_groups):
        raise GrowthError(
            "verdict(...): every learning rate is 0, as at the end of a decay, so nothing would go on. Set the rates "
            "at which training would go on first."
        )
    check_evidence(known, "verdict(...) trains by itself")
    return known


class Judged:
    """One judgement, as it goes on.

    Args:
        grower: of the network that is there.
        anew: builds the larger one.
        budget: FLOPs that there are.
        past: of that network, where it is told.

    Raises:
        GrowthError: there is nothing to compare with, something does not fit, or the budget is below one step.
    """

    def __init__(self, grower: Grower, anew: Anew | None, budget: float, past: Past | None = None):
        assert grower.evidence is not None
        self.grower, self.budget, self.price, self.past = grower, budget, SHARE * budget, past
        edits = grower.edits()
        if not edits and anew is None:
            raise GrowthError("verdict(...): there is nothing to compare with. Pass edits=, or anew=, or both.")
        evidence, cut = finer(grower.model, grower.evidence), finest(grower.model, grower.evidence)
        self.bench = Bench(grower, anew, evidence, cut, budget)
        self.ways = self.bench.ways(edits)
        dearest = max(way.flops for way in self.ways)
        if budget < dearest:
            raise GrowthError(
                f"verdict(budget={budget:.3g}): that is below one training step of the largest network, {dearest:.3g} "
                "FLOPs. Pass the FLOPs of the whole run that is judged: steps * auxin.ledger.flops_of(model, loss, x)."
            )
        self.pilots: list[list[tuple[Look, ...]]] = [[] for _ in self.ways]

    @property
    def spent(self) -> float:
        """FLOPs so far."""
        return sum(self.bench.spent.values())

    def verdict(self, sure: float, started: float) -> Verdict:
        """Pilots until it is sure, or the price is spent."""
        rounds, ends = 0, None
        for number, upto in enumerate((FIRST, 1.0)):
            steps, judges = self._affordable(upto)
            if min(steps) < LEAST:  # the whole price may pay for one round, where a part of it pays for none
                continue
            self.pilots = [[*pilots[-1:]] for pilots in self.pilots]
            for at, count in enumerate(steps):
                looks = sorted({max(1, count >> n) for n in range(LOOKS)})
                self.pilots[at].append(self.bench.pilot(self.ways[at], count, looks, number, judges))
            rounds, ends = rounds + 1, self._ends()
            chances = _chances(ends)
            if max(chances) >= 1 - (1 - sure) / EARLY:
                break
        for kind, flops in self.bench.spent.items():
            self.grower.ledger.spend(kind, flops)
        if ends is None and self.past is not None:
            ends = self._foreseen(self.past).exp()
        return self._result(ends, sure, rounds, time.perf_counter() - started)

    def _affordable(self, upto: float) -> tuple[list[int], int]:
        """Steps of the pilot of each way, and batches of validation data to look at, within a part of the price."""
        ways = self.ways
        left = upto * self.price - self.spent - sum(way.check for way in ways)
        look = LOOKS * sum(way.look for way in ways)
        assert self.bench.evidence.validation is not None
        judges = min(len(self.bench.evidence.validation), max(JUDGES, int(LOOKING * left / look)))
        left -= judges * look
        weights = [WEIGHTS[way.name] for way in ways]
        shares = [weight / sum(weights) for weight in weights]
        most = [int(self.budget / way.flops) for way in ways]
        each = [int(left * share / way.flops * self.bench.cut) for way, share in zip(ways, shares, strict=True)]
        return list(map(min, each, most)), judges

    def _curves(self) -> list[list[Curve]]:
        """The pilots of each way, those that have diverged left out."""
        curves = []
        for way, pilots in zip(self.ways, self.pilots, strict=True):
            fine = [one for one in pilots if all(math.isfinite(loss) for _, losses in one for loss in losses)]
            share = way.flops / self.bench.cut / self.budget
            points = [tuple(Point(steps * share, losses) for steps, losses in one) for one in fine]
            curves.append([Curve(one, way.name == ANEW) for one in points])
        return curves

    def _ends(self) -> Tensor:
        """Losses at the end of the budget, drawn at random, (draws, ways).

        Raises:
            GrowthError: every pilot has diverged, or a loss is negative.
        """
        curves = self._curves()
        if not any(curves):
            raise GrowthError(
                "verdict(...): in the pilots the loss of every way became infinite or NaN, so nothing can be judged. "
                "Lower the learning rate, or leave out the batch with such values."
            )
        if any(sum(point.losses) < 0 for held in curves for curve in held for point in curve.points):
            raise GrowthError(
                "verdict(...): losses below 0 cannot be carried on as powers of the steps. Return a loss that is 0 "
                "where nothing is left to learn: an error, or a cross-entropy."
            )
        past = None if self.past is None else (self.past.height(self.past.octaves[-1]), self._foreseen(self.past))
        return forecasts(curves, self.bench.cut, past=past)

    def _foreseen(self, past: Past) -> Tensor:
        """The same by the past alone, as logarithms."""
        return foreseen(past, [(KINDS[way.name], self.budget / way.flops) for way in self.ways])

    def _result(self, ends: Tensor | None, sure: float, rounds: int, seconds: float) -> Verdict:
        names = range(len(self.ways))
        chances = _chances(ends) if ends is not None else [0.0 for _ in names]
        plans = tuple(self._plan(at, chances[at], None if ends is None else ends[:, at]) for at in names)
        best = max(names, key=lambda at: chances[at])
        way, gain = self.ways[best], 0.0
        if ends is not None:
            others = ends[:, [at for at in names if at != best]].nan_to_num(math.inf).amin(1)
            gain = 1 - float((ends[:, best] / others).median())
        named = chances[best] >= sure and gain >= WORTH
        words = f"a tenth of the budget pays for fewer than {LEAST} steps of each pilot. Judge a larger budget."
        told = way.name if named else SAME, way.edit if named else None
        return Verdict(
            plans,
            *told,
            gain,
            chances[best],
            self.budget,
            dict(self.bench.spent),
            rounds,
            seconds,
            words if ends is None else "",
        )

    def _plan(self, at: int, chance: float, ends: Tensor | None) -> Plan:
        way, curves = self.ways[at], self._curves()[at]
        pilots = tuple(tuple((p.share, sum(p.losses) / len(p.losses)) for p in curve.points) for curve in curves)
        low, middle, high = (math.nan,) * 3 if ends is None else map(float, ends.quantile(ends.new_tensor(QUANTILES)))
        edit = "" if way.edit is None else shown(way.edit)
        steps = int(self.budget / way.flops)
        return Plan(way.name, edit, way.parameters, steps, pilots, middle, (low, high), chance)


def _chances(ends: Tensor) -> list[float]:
    """The probability of each way to end lowest; one that is not known does not."""
    lowest = ends.nan_to_num(math.inf).argmin(1)
    return torch.bincount(lowest, minlength=ends.shape[1]).div(len(ends)).tolist()
