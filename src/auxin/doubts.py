"""What a Grower warns of, once each: growth that may not pay, and growth in the decay of the learning rate."""

import warnings

from auxin.change import Change
from auxin.limit import doubtful, tokens_in
from auxin.race import shown
from auxin.run_state import Run
from auxin.schedule import Decays

_JUDGE = "or let a race judge it: Grower(choose=auxin.choose.by_race(), evidence=...) (arXiv:2605.13405)"
_IN_TIME = (
    "what is new has little learning rate left to learn. Grow in the stable phase: "
    "Grower(when=auxin.when.not_while_decaying(trigger, schedule)), or with a schedule that decays once growing is "
    "over: auxin.schedule.wsd(optimizer, warmup, decay), then schedule.grower = grower (arXiv:2511.04981)"
)


class Doubts:
    """Says once what speaks against a growth, unless a branch has been tried with it.

    Args:
        decays: tells which of the run's schedules decay.
    """

    def __init__(self, decays: Decays):
        self.decays = decays
        self.said: set[str] = set()

    def warn(self, change: Change, run: Run, tried: bool) -> None:
        """Say what speaks against a growth that ``carry_out`` has just made.

        Args:
            change: the growth.
            run: that has grown.
            tried: whether branches were trained for the decision that led to it.
        """
        if tried:
            return
        before, steps = change.parameters_before, run.optimizer_steps * run.ranks.size
        tokens = 0 if run.evidence is None else steps * tokens_in(run.evidence.batches[0])  # 0: they are not known
        why = doubtful(before, before + change.added_parameters, tokens)
        self._once("may not pay", change, why and f"{why}, {_JUDGE}")
        late = self.decays.found()
        self._once("comes late", change, late and f"{late}, and {_IN_TIME}")

    def _once(self, what: str, change: Change, why: str | None) -> None:
        if why is not None and what not in self.said:
            self.said.add(what)
            warnings.warn(f"{shown(change.edit)}: this growth {what}: {why}.", stacklevel=5)
