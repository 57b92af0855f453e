"""One decision for all ranks: over readings that are averaged, made by rank 0, carried to the others as data.

Every rank asks its trigger and its chooser, so that these go on alike; what those of rank 0 say counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from auxin import agreed
from auxin.anatomy.wrappers import at_rest, uncovered
from auxin.arguments import number
from auxin.change import Change, Edit
from auxin.engine import check_moment
from auxin.errors import GrowthError
from auxin.follow.ddp import guard_steps
from auxin.journal import edit_from_json, edit_to_json
from auxin.ranks import Ranks
from auxin.refs import Allowed
from auxin.run_state import Run
from auxin.safe_point import StepWatch
from auxin.when import Reading


class RankConsensus:
    """What the ranks of one run decide together; a single process decides alone.

    Args:
        model: the network inside the wrapper.
        companions: everything that keeps step; a DistributedDataParallel among them says who the ranks are.
    """

    def __init__(self, model: nn.Module, companions: Sequence[Any]):
        self.ranks = Ranks.of(companions)
        self._model, self._companions = model, companions
        self._wrappers = [c for c in companions if isinstance(c, DistributedDataParallel)]
        self._optimizers = [c for c in companions if isinstance(getattr(c, "param_groups", None), list)]
        self._asking = False
        guard_steps(self._wrappers, self._optimizers)

    def agree(self, what: str) -> Any:
        """See ``Ranks.agree``."""
        return self.ranks.agree(what)

    def check_moment(self, what: str, watch: StepWatch, then: Callable[[], Any] | None = None) -> None:
        """Raise BadMoment on every rank where one of them must not be changed now; or what ``then`` raises."""
        with self.ranks.agree(what):
            check_moment(self._model, self._companions, watch)
            if then is not None:
                then()

    def rest(self) -> None:
        """Let a network under FSDP2 hold nothing but shards, also after a forward without a backward."""
        at_rest(self._model, self._companions)

    def undone(self, on_undo: Callable[[], Any] | None) -> None:
        """Call ``on_undo`` behind a growth that is taken back; where it raises on one rank, all raise.

        Raises:
            RuntimeError: it has raised on another rank. Not a GrowthError, which says that nothing was taken back.
        """
        raised: list[Exception] = []

        def told() -> str | None:
            try:
                if on_undo is not None:
                    on_undo()
            except Exception as error:
                raised.append(error)
                return f"{type(error).__name__}: {error}"
            return None

        said = self.ranks.share("undo: on_undo", told)
        if raised:
            raise raised[0]
        words = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None)
        if words:
            raise RuntimeError(f"on_undo has raised on {words}. The growth is taken back on all ranks.")

    def on_one(self, log: Any) -> Any:
        """A directory or a logger that only rank 0 writes to."""
        return log if self.ranks.rank == 0 else None

    def read(self, metric: Any, metrics: Mapping[str, Any]) -> tuple[float | None, dict[str, float]]:
        """The readings, as the mean over the ranks. What was grown on one rank alone is found here.

        Raises:
            GrowthError: a reading is no number, ranks have different readings, or different networks.
        """

        def told() -> dict[str, Any]:
            value = None if metric is None else number(metric, "the metric")
            return {"": value, **{name: number(item, name) for name, item in metrics.items()}}

        self.rest()
        if self.ranks.alone:
            read = told()
            return read.pop(""), read
        with self.ranks.agree("grower.step") as said:
            self._check_covered()
            said += agreed.structure(self._model, self._optimizers)
        all_of_them = self.ranks.share("grower.step: the readings", told)
        given = [sorted(name or "metric" for name, value in one.items() if value is not None) for one in all_of_them]
        if any(names != given[0] for names in given):
            words = "; ".join(f"rank {rank}: {', '.join(names) or 'nothing'}" for rank, names in enumerate(given))
            raise GrowthError(f"grower.step: the ranks give different readings ({words}). Give the same on every rank.")
        mean = {name: _mean([one[name] for one in all_of_them]) for name in all_of_them[0]}
        return mean.pop(""), {name: value for name, value in mean.items() if value is not None}

    def done(self, grower: Run) -> bool:
        """Whether rank 0 is done; a trigger may be it by the clock, and then the others follow.

        Raises:
            GrowthError: ranks have different limits.
        """
        told = self.ranks.share("grower.step: whether it is done", lambda: [str(grower.limit), bool(grower.done)])
        if any(limit != told[0][0] for limit, _ in told):
            words = "; ".join(f"rank {rank}: {limit}" for rank, (limit, _) in enumerate(told))
            raise GrowthError(f"grower.step: the ranks have different limits ({words}). Give the same on every rank.")
        return bool(told[0][1])

    def fired(self, when: Callable[[Reading], bool], reading: Reading) -> bool:
        """Whether the trigger of rank 0 has fired."""
        return self.ranks.share("grower.step: the trigger", lambda: bool(when(reading)))[0]

    def chosen(self, grower: Run) -> Edit | Change | None:
        """What the chooser of rank 0 has chosen; or the change, where one that races has grown on every rank.

        Raises:
            GrowthError: it is an edit that this rank cannot build, or the chooser asks itself.
        """
        if self.ranks.alone:
            return self._ask(grower, grower.edits())
        edits: list[Edit] = []
        chosen: list[Any] = []

        def told() -> Any:
            edits.extend(grower.edits())
            chosen.append(self._ask(grower, edits))
            if isinstance(chosen[0], Change):
                return edit_to_json(chosen[0].edit)
            return None if chosen[0] is None else edit_to_json(chosen[0])

        said = self.ranks.share("grower.step: the edit", told)
        if isinstance(chosen[0], Change):
            return chosen[0]
        if said[0] is None:
            return None
        with self.ranks.agree("grower.step: the edit of rank 0"):
            same = (e for e in (*chosen, *edits) if e is not None and _json(e) == said[0])
            allowed = Allowed.of(self._model, grower.references())
            return next(same, None) or edit_from_json(said[0], "the decision of rank 0", allowed)

    def _ask(self, grower: Run, edits: list[Edit]) -> Edit | None:
        if self._asking:
            raise GrowthError(
                "choose: the chooser has called grower.step or grower.decide, which ask the chooser: that would never "
                "end. Return one of the edits, or None; to try an edit out write `with grower.trial(edit):`."
            )
        self._asking = True
        try:
            return grower.choose(edits, grower)
        finally:
            self._asking = False

    def _check_covered(self) -> None:
        for wrapper in self._wrappers:
            lost = uncovered(wrapper)
            if lost:
                raise GrowthError(
                    f"{', '.join(lost[:4])}: grown without auxin, so that DistributedDataParallel does not synchronise "
                    "it and the ranks drift apart. Use grower.grow(edit), or `with grower.surgery():`."
                )


def _json(edit: Edit) -> Any:
    """As it arrives on another rank."""
    return json.loads(json.dumps(edit_to_json(edit)))


def _mean(values: Sequence[float | None]) -> float | None:
    """Of equal ones that very number; None where there are none."""
    known = [value for value in values if value is not None]
    if not known or all(value == known[0] for value in known):
        return known[0] if known else None
    return math.fsum(known) / len(known) if all(map(math.isfinite, known)) else sum(known) / len(known)
