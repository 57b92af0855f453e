"""Choosers: which of the edits comes next. Any callable `choose(edits, grower) -> edit or None` is one.

A chooser is called when the trigger has fired. None means that nothing is grown this time. One that remembers
something has `state_dict()` and `load_state_dict()`.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from auxin.engine import BadMoment
from auxin.errors import GrowthError
from auxin.evidence import Evidence
from auxin.run_state import Run

E = TypeVar("E")


def first(edits: Sequence[E], grower: object) -> E | None:
    """The first edit, every time.

    Args:
        edits: What the grower may do, in the order that the user gave.
        grower: The grower that asks; not looked at.

    Returns:
        The first edit, or None if there is none.

    Example:
        >>> first(["deeper", "wider"], grower=None)
        'deeper'
    """
    return edits[0] if edits else None


def cycle() -> "_Cycle":
    """One edit after the other, and from the start again.

    Returns:
        A chooser that remembers its place. Where the list of edits changes its length on the way, it goes on
        at the same place modulo the new length.

    Example:
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

    Example:
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
    steps: int | Callable[[Any], None] = 32,
    margin: float = 0.0,
) -> "_ByTrial":
    """Try every edit in a short branch on the same data, and take the best one if it beats not growing.

    Each branch starts from the very same state, random generators included, and leaves no trace (`grower.trial`).
    It is judged at its end, after the new layer has had `steps` steps, not at its first loss: short probes can
    mislead all the same (arXiv:2604.04281), so give them as many steps as you can afford. What is refused, or beyond
    the Grower's limit, is passed over; where nothing else is left it is chosen, for the Grower to say why not.

    Args:
        score: `score(model) -> number`, lower is better, NaN is worst; None: the mean of the Grower's `evidence`.
        steps: optimizer steps on the Grower's `evidence`; or `steps(grower)`, which trains by itself.
        margin: by how much the best must beat the branch that did not grow.

    Returns:
        A chooser; its `results` hold what the last decision was made on, as (edit or None, score or why not).

    Raises:
        GrowthError: when it is asked, if it needs evidence and the Grower has none.
    """
    return _ByTrial(score, steps, margin)


class _ByTrial:
    def __init__(self, score: Callable[[Any], float] | None, steps: int | Callable[[Any], None], margin: float) -> None:
        if not callable(steps) and (type(steps) is not int or steps < 1):
            raise GrowthError(f"by_trial(steps={steps!r}): pass a whole number of steps from 1, or steps(grower).")
        self.score, self.steps, self.margin = score, steps, margin
        self.results: list[tuple[Any, float | str]] = []

    def __call__(self, edits: Sequence[E], grower: Run) -> E | None:
        if grower.evidence is None and (self.score is None or not callable(self.steps)):
            raise GrowthError(
                "by_trial(...) needs a loss and batches to branch on: give the Grower "
                "evidence=auxin.Evidence(loss, batches), or by_trial a score(model) and steps(grower)."
            )
        unchanged = self._branch(None, grower)
        scores = [self._try(edit, grower) for edit in edits]
        self.results = [(None, unchanged), *zip(edits, scores, strict=True)]
        tried = [(_worst_if_nan(score), number) for number, score in enumerate(scores) if not isinstance(score, str)]
        if not tried:
            return edits[0] if edits else None
        best, number = min(tried)
        return edits[number] if best < _worst_if_nan(unchanged) - self.margin else None

    def _try(self, edit: Any, grower: Run) -> float | str:
        try:
            return self._branch(edit, grower)
        except BadMoment:
            raise
        except GrowthError as error:
            return str(error)

    def _branch(self, edit: Any, grower: Run) -> float:
        with grower.trial(edit):
            too_large = None if edit is None else grower.limit.exceeded(grower.model, grower.probe)
            if too_large is not None:
                raise GrowthError(f"the network would have {too_large}.")
            evidence = cast(Evidence, grower.evidence)  # checked above, where it is needed
            if callable(self.steps):
                self.steps(grower)
            else:
                evidence.train(grower.model, grower.optimizers, self.steps)
            return float(self.score(grower.model) if self.score is not None else evidence.mean(grower.model))

    def __repr__(self) -> str:
        return f"by_trial(steps={self.steps!r}, margin={self.margin!r})"


def _worst_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
