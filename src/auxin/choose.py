"""Choosers: which of the edits comes next. Any callable `choose(edits, grower) -> edit or None` is one.

A chooser is called when the trigger has fired. None means that nothing is grown this time. One that remembers
something has `state_dict()` and `load_state_dict()`.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

from auxin.engine import BadMoment
from auxin.errors import GrowthError
from auxin.evidence import Evidence
from auxin.ledger import ENOUGH_STEPS, Option
from auxin.race import NEEDED, Branch, Probed, Race, check_evidence, probed, shown, step_flops
from auxin.race import check as check_race
from auxin.run_state import Run

E = TypeVar("E")
EQUAL = 4  # edits up to which branches of equal length cost less than rounds that begin anew


def first(edits: Sequence[E], grower: object) -> E | None:
    """The first edit, every time.

    Args:
        edits: What the grower may do, in the order that the user gave.
        grower: The grower that asks; not looked at.

    Returns:
        The first edit, or None if there is none.

    Examples:
        >>> first(["deeper", "wider"], grower=None)
        'deeper'
    """
    return edits[0] if edits else None


def cycle() -> "_Cycle":
    """One edit after the other, and from the start again.

    Returns:
        A chooser that remembers its place. Where the list of edits changes its length on the way, it goes on
        at the same place modulo the new length.

    Examples:
        >>> choose = cycle()
        >>> [choose(["deeper", "wider"], grower=None) for _ in range(3)]
        ['deeper', 'wider', 'deeper']
    """
    return _Cycle()


class _Cycle:
    def __init__(self) -> None:
        self.turn = 0

    def __call__(self, edits: Sequence[E], grower: object) -> E | None:
        if not edits:
            return None
        chosen = edits[self.turn % len(edits)]
        self.turn += 1
        return chosen

    def state_dict(self) -> dict[str, int]:
        return {"turn": self.turn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if set(state) != {"turn"}:
            raise GrowthError(
                f"cycle(): this state holds {sorted(state)}, expected ['turn']: it is another chooser's. "
                "Build the Grower with the chooser that it was saved with."
            )
        self.turn = int(state["turn"])

    def __repr__(self) -> str:
        return "cycle()"


def least_change() -> "_LeastChange":
    """Pruning: of the edits, the one that changes the outputs on the Grower's ``probe`` least.

    For edits such as ``lambda model: [Remove(f"blocks.{i}") for i in range(len(model.blocks))]``. Each is carried out,
    proved and taken back (``grower.trial``, which copies the run once for each). The measure is the largest absolute
    difference of any output; where two are equal the last one is taken. What is refused (a block that others share) is
    passed over.

    Returns:
        A chooser; its ``results`` hold what the last decision was made on, as (edit, difference or why not). It chooses
        None, with a warning that names the reasons, where no edit could be measured.

    Raises:
        GrowthError: when it is asked, if the Grower has no probe.

    Examples:
        >>> least_change()
        least_change()
    """
    return _LeastChange()


class _LeastChange:
    def __init__(self) -> None:
        self.results: list[tuple[Any, float | str]] = []

    def __call__(self, edits: Sequence[E], grower: Run) -> E | None:
        if grower.probe is None:
            raise GrowthError("least_change() compares outputs on a batch: give the Grower probe=batch.")
        measured = [self._measure(edit, grower) for edit in edits]
        self.results = list(zip(edits, measured, strict=True))
        sizes = [(size, -place) for place, size in enumerate(measured) if not isinstance(size, str)]
        if sizes:
            return edits[-min(sizes)[1]]
        if edits:
            reasons = "\n  ".join(f"{edit!r}: {why}" for edit, why in self.results[:12])
            warnings.warn(f"least_change() chose nothing, since none could be measured:\n  {reasons}", stacklevel=2)
        return None

    def _measure(self, edit: Any, grower: Run) -> float | str:
        try:
            with grower.trial(edit) as change:
                size = None if change is None else change.max_difference
        except BadMoment:
            raise
        except GrowthError as error:
            return str(error)
        return "the shape of the output would change" if size is None else _worst_if_nan(size)

    def __repr__(self) -> str:
        return "least_change()"


def by_trial(
    score: Callable[[Any], float] | None = None,
    steps: int | Callable[[Any], None] = ENOUGH_STEPS,
    margin: float = 0.0,
) -> "_ByTrial":
    """Try every edit in a branch on the same data, and take the best one if it beats not growing.

    Each branch starts from the very same state, random generators included, and leaves no trace (`grower.trial`).
    It is judged at its end, after the new layer has had `steps` steps, not at its first loss: probes of 16 steps
    mislead, and a verdict wants 128 or more (arXiv:2604.04281). Of more than four edits all have half of the
    steps, and only the best two, beside the network as it is, the whole: successive halving (Jamieson and Talwalkar
    2016, arXiv:1502.07943) in two rounds. With a first round of 32 steps it missed 2 of 10 planted winners.

    What is refused, or beyond the Grower's limit, is passed over; where nothing else is left it is chosen, for the
    Grower to say why not.

    Args:
        score: `score(model) -> number`, lower is better, NaN is worst; None: the loss on the validation data of the
            Grower's `evidence`, or on its batches. Under DistributedDataParallel its mean over the ranks counts.
        steps: optimizer steps on the Grower's `evidence`; or `steps(grower)`, which trains by itself, all edits alike.
        margin: by how much the best must beat the branch that did not grow.

    Returns:
        A chooser; its `results` hold what the last decision was made on, as (edit or None, score or why not).

    Raises:
        GrowthError: when the Grower is built, if it needs evidence and the Grower has none.
    """
    return _ByTrial(score, steps, margin)


class _ByTrial:
    def __init__(self, score: Callable[[Any], float] | None, steps: int | Callable[[Any], None], margin: float) -> None:
        if not callable(steps) and (type(steps) is not int or steps < 1):
            raise GrowthError(f"by_trial(steps={steps!r}): pass a whole number of steps from 1, or steps(grower).")
        self.score, self.steps, self.margin = score, steps, margin
        self.results: list[tuple[Any, float | str]] = []
        self.needs_evidence = (
            ""
            if score is not None and callable(steps)
            else (
                "by_trial(...) needs a loss and batches to branch on: give the Grower "
                "evidence=auxin.Evidence(loss, batches), or by_trial a score(model) and steps(grower)."
            )
        )

    def __call__(self, edits: Sequence[E], grower: Run) -> E | None:
        if grower.evidence is None and self.needs_evidence:
            raise GrowthError(self.needs_evidence)
        if grower.evidence is not None:
            check_evidence(grower, repr(self), backward=False)  # a step of their own may do without
        before, scores = grower.ledger.copy(), dict[int, float | str]()
        left = list(range(len(edits)))
        for steps, most in self._rounds(len(edits)):
            scores |= {number: self._try(edits[number], grower, steps) for number in left}
            tried = sorted((_worst_if_nan(v), n) for n in left if not isinstance(v := scores[n], str))
            left = [number for _, number in tried[:most]]
            for score, number in tried[most:]:
                scores[number] = f"behind after {steps} of {self.steps} steps, at {score:.5g}"
        unchanged = self._branch(None, grower, self.steps)
        self.results = [(None, unchanged), *((edit, scores[number]) for number, edit in enumerate(edits))]
        wins = bool(left) and _worst_if_nan(cast(float, scores[left[0]])) < _worst_if_nan(unchanged) - self.margin
        steps = None if callable(self.steps) else self.steps
        options = list(map(_tried, self.results))
        grower.ledger.decided(grower, self, options, 1 + left[0] if wins else 0, before, steps)
        if not left:
            return edits[0] if edits else None
        return edits[left[0]] if wins else None

    def _rounds(self, count: int) -> list[tuple[Any, int]]:
        """How long the branches of each round are, and how many of them go on; the last one is to the end."""
        if callable(self.steps) or count <= EQUAL or self.steps < 2:
            return [(self.steps, count)]
        return [(self.steps // 2, 2), (self.steps, 2)]

    def _try(self, edit: Any, grower: Run, steps: Any) -> float | str:
        try:
            return self._branch(edit, grower, steps)
        except BadMoment:
            raise
        except GrowthError as error:
            return str(error)

    def _branch(self, edit: Any, grower: Run, steps: Any) -> float:
        with grower.trial(edit):
            too_large = None if edit is None else grower.limit.exceeded(grower.model, grower.probe)
            if too_large is not None:
                raise GrowthError(f"the network would have {too_large}.")
            evidence = cast(Evidence, grower.evidence)  # checked above, where it is needed
            with grower.ledger.timed("races"):
                if callable(steps):
                    steps(grower)
                else:
                    evidence.train(grower.model, grower.companions, steps, grower.optimizer_steps)
                    grower.ledger.spend("races", steps * _flops(grower))
                score = self.score or evidence.validate
                return grower.ranks.mean("by_trial: the score", lambda: float(score(grower.model)))

    def __repr__(self) -> str:
        return f"by_trial(steps={self.steps!r}, margin={self.margin!r})"


def by_gain(per: Literal["flop", "parameter"] = "flop", least: float = 0.0) -> "_ByGain":
    """The edit whose new entries take most off the loss, for what they cost.

    Each edit is carried out for a look and taken back. Its gain is what the first optimizer step on the new entries
    alone takes off the loss on unseen data (`evidence.validation`; without, on the same), to first order: exact for a
    small step, over depth and width alike. It says nothing of what follows, so it is for choosing which few of many
    places are worth a race (`by_race`) or a trial.

    Args:
        per: What the gain is divided by: "flop", the FLOPs that are added to a training step, or "parameter".
        least: Gains per cost that are no larger are not worth growing: None is chosen.

    Returns:
        A chooser; its `looks` hold what each decision was made on.

    Raises:
        GrowthError: When it is asked, if the Grower has no evidence.
    """
    return _ByGain(per, least)


class _ByGain:
    needs_evidence = f"by_gain(): gains are of a loss on batches: {NEEDED}"

    def __init__(self, per: str, least: float) -> None:
        if per not in ("flop", "parameter"):
            raise GrowthError(f"by_gain(per={per!r}): pass 'flop' or 'parameter'.")
        if isinstance(least, bool) or not isinstance(least, (int, float)) or not least >= 0:
            raise GrowthError(f"by_gain(least={least!r}): pass a number from 0.")
        self.per, self.least = per, least
        self.looks: list[list[Probed]] = []

    def __call__(self, edits: Sequence[E], grower: Run) -> E | None:
        check_evidence(grower, "by_gain(): gains are of a loss on batches")
        before = grower.ledger.copy()
        looks = [probed(grower, cast(Any, edit), 8) for edit in edits]
        self.looks.append(looks)
        known = [look for look in looks if not look.why_not]
        if not known:
            return edits[0] if edits else None  # for the Grower to say why not
        best = max(known, key=lambda look: _least_if_nan(self.rate(look, grower)))
        pays = self.rate(best, grower) > self.least
        chosen = looks.index(best) if pays else None
        grower.ledger.decided(grower, self, list(map(_looked_at, looks)), chosen, before)
        return best.edit if pays else None

    def rate(self, look: Probed, grower: Run) -> float:
        """The gain of an edit for each FLOP, or parameter, that it adds."""
        if self.per == "parameter":
            return look.gain / max(1, look.parameters - sum(p.numel() for p in grower.model.parameters()))
        return look.gain / max(1.0, look.flops - step_flops(grower))

    def __repr__(self) -> str:
        return f"by_gain(per={self.per!r}, least={self.least!r})"


def by_race(
    cost: float = 1.0,
    rivals: int = 2,
    least: int = 20,
    shrink: float = 0.5,
    averaged: float = 0.5,
    sure: float = 1.0,
    ahead: float = 1.0,
) -> "_ByRace":
    """Let the most promising edits race against the network as it is, and go on as the winner.

    Each edit is carried out for a look, which tells what a training step then costs, and how much the first step on
    what is new takes off the loss. Those with most of it per added FLOP race, for equal steps on the same batches; all
    branches begin with weights that are shrunk alike (`Grower.race`). The winner's training is kept, so that a race
    costs what its losers cost.

    Args:
        cost: of a race, as a part of all that was spent before it.
        rivals: most edits that race.
        least: fewest steps of a race.
        shrink: factor of the weights of all layers together as a race begins, of n layers each by its nth root; 1
            leaves them.
        averaged: part of the steps over which the weights that are judged are averaged.
        sure: by how many standard errors growing has to be better, paired over at least 8 batches of validation data:
            of two branches that are alike one is always ahead.
        ahead: where the Grower has a budget (`auto`), an edit races only if the rest of it pays for this many times the
            steps taken so far, of the larger network: races of equal steps do not see that it takes fewer.

    Returns:
        A chooser; its `races` hold what was decided and on what.

    Raises:
        GrowthError: when the Grower is built, if that has no evidence.
    """
    return _ByRace(cost, rivals, least, shrink, averaged, sure, ahead)


class _ByRace:
    needs_evidence = f"by_race() trains by itself: {NEEDED}"

    def __init__(
        self, cost: float, rivals: int, least: int, shrink: float, averaged: float, sure: float, ahead: float
    ) -> None:
        for name, value in (("rivals", rivals), ("least", least)):
            if type(value) is not int or value < 1:
                raise GrowthError(f"by_race({name}={value!r}): pass a whole number from 1.")
        if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not cost > 0:
            raise GrowthError(f"by_race(cost={cost!r}): pass a part of what was spent, above 0.")
        if isinstance(ahead, bool) or not isinstance(ahead, (int, float)) or not 0 <= ahead < math.inf:
            raise GrowthError(f"by_race(ahead={ahead!r}): pass a multiple of the steps taken so far, 0 for none.")
        check_race(least, shrink, averaged, sure)
        self.cost, self.rivals, self.least, self.words = cost, rivals, least, (shrink, averaged, sure)
        self.ahead = ahead
        self.races: list[Race] = []
        self.looks: list[list[Probed]] = []

    def __call__(self, edits: Sequence[Any], grower: Run) -> Any:
        before = grower.ledger.copy()
        if not edits:
            warnings.warn(
                f"by_race(): there is no edit to race, {type(grower.model).__name__} stays as it is", stacklevel=2
            )
        check_evidence(grower, "by_race() trains by itself")
        looks = [probed(grower, edit, 4 if len(edits) > self.rivals else 0) for edit in edits]
        self.looks.append(looks)
        known = [look for look in looks if not look.why_not]
        if not known:
            return edits[0] if edits else None  # for the Grower to say why not
        known = [look for look in known if self._in_time(look, grower)]
        if not known:
            grower.ledger.decided(grower, self, list(map(_looked_at, looks)), None, before)
            return None
        alone = step_flops(grower)
        known.sort(key=lambda look: -_least_if_nan(look.gain / max(look.flops - alone, 1.0)))
        chosen = known[: self.rivals]
        steps = int(self.cost * before.total / (alone + sum(look.flops for look in chosen)))
        race = grower.race([look.edit for look in chosen], max(self.least, steps), *self.words)
        self.races.append(race)
        rest = [_looked_at(look) for look in looks if look not in chosen]
        predicted = [math.nan, *(look.gain for look in chosen)]
        raced = [_raced(branch, gain) for branch, gain in zip(race.branches, predicted, strict=True)]
        grower.ledger.decided(grower, self, [*raced, *rest], race.winner, before, race.steps)
        return race.change

    def _in_time(self, look: Probed, grower: Run) -> bool:
        """Whether what is left of a budget pays for enough steps of the network that has grown."""
        left = getattr(grower, "budget", math.inf) - grower.ledger.total
        return left >= self.ahead * grower.optimizer_steps * look.flops

    def __repr__(self) -> str:
        shrink, averaged, sure = self.words
        words = f"shrink={shrink!r}, {averaged=}, {sure=}, ahead={self.ahead!r}"
        return f"by_race(cost={self.cost!r}, rivals={self.rivals!r}, {words})"


def _tried(result: tuple[Any, float | str]) -> Option:
    edit, score = result
    words = "as it is" if edit is None else shown(edit)
    return Option(words, why_not=score) if isinstance(score, str) else Option(words, obtained=score)


def _looked_at(look: Probed) -> Option:
    if look.why_not:
        return Option(shown(look.edit), why_not=look.why_not)
    return Option(shown(look.edit), _none_if_nan(look.gain), None, look.parameters, look.flops)


def _raced(branch: Branch, gain: float) -> Option:
    words = "as it is" if branch.edit is None else shown(branch.edit)
    if branch.why_not:
        return Option(words, why_not=branch.why_not)
    return Option(words, _none_if_nan(gain), branch.score, branch.parameters, branch.flops)


def _flops(grower: Run) -> float:
    """FLOPs of a training step; 0 where there is nothing that is counted."""
    try:
        return step_flops(grower)
    except GrowthError:
        return 0.0


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _least_if_nan(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _worst_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
