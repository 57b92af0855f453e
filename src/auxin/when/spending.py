"""A trigger for races: at growing intervals of what was spent, in the first part of a budget."""

import math
from collections.abc import Mapping
from typing import Any

from auxin.errors import GrowthError
from auxin.when.checks import check_state
from auxin.when.reading import Reading

LEAST = 60  # optimizer steps before the first decision
LAST = 0.33  # part of the budget after which nothing grows
END = 0.65  # part of the budget that a race must not go beyond


def growth_pays(
    budget: float, least: int = LEAST, ratio: float = 1.5, last: float = LAST, end: float = END
) -> "_GrowthPays":
    """Fires when enough was spent since the last decision for another one to pay.

    The first time after ``least`` steps, then whenever ``ratio`` times as much was spent as after the last decision. It
    ends when ``last`` of the budget is spent, or when a race that costs as much again would end beyond
    ``end``: what grows late has no time to learn, and the learning rate is to decay. That one decision, or two, went
    against growing does not end it.

    Args:
        budget: FLOPs of the whole run: training, races and evaluations.
        least: optimizer steps before the first decision.
        ratio: of what was spent between one decision and the next.
        last: part of the budget after which nothing grows.
        end: part of the budget that a race must not go beyond.

    Returns:
        A trigger that is `done` once it will not fire any more. The Grower that asks it counts FLOPs, for which it
        needs `evidence`.

    Examples:
        >>> trigger = growth_pays(1e6)
        >>> [trigger(Reading(None, {}, 1, 100, 0, 1, flops)) for flops in (5e3, 1e4, 4e4, 5e4, 7e4)]
        [True, False, True, False, False]
    """
    return _GrowthPays(budget, least, ratio, last, end)


class _GrowthPays:
    counts_flops = True

    def __init__(self, budget: float, least: int, ratio: float, last: float, end: float) -> None:
        numbers = {"budget": budget, "least": least, "ratio": ratio, "last": last, "end": end}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise GrowthError(f"growth_pays({name}={value!r}): pass a finite number from 0.")
        if budget == 0 or ratio <= 1 or not 0 < last <= 1 or end > 1:
            raise GrowthError(
                f"growth_pays({numbers}): budget is above 0, ratio above 1, last above 0, last and end at most 1."
            )
        self.budget, self.least, self.ratio, self.last, self.end = (float(v) for v in numbers.values())
        self.spent, self.next, self.fired = 0.0, 0.0, False

    @property
    def done(self) -> bool:
        """Whether it will not fire any more."""
        return self.spent >= self.last * self.budget or 2 * self.spent > self.end * self.budget

    def __call__(self, reading: Reading) -> bool:
        self.spent = reading.flops
        if self.fired:  # the decision is over, and what it has cost is spent
            self.next, self.fired = self.ratio * reading.flops, False
        self.fired = not (self.done or reading.optimizer_steps < self.least or reading.flops < self.next)
        return self.fired

    def state_dict(self) -> dict[str, Any]:
        return {"spent": self.spent, "next": self.next, "fired": self.fired}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(self, state, ("spent", "next", "fired"))
        self.spent, self.next, self.fired = float(state["spent"]), float(state["next"]), bool(state["fired"])

    def __repr__(self) -> str:
        return f"growth_pays(budget={self.budget:g})"
