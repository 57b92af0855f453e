"""AutoGrow: grow one site after the other, and leave alone for good the one that did not pay."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from auxin.errors import GrowthError
from auxin.when.checks import as_built, check_choice, check_count, check_metric, check_number, check_state
from auxin.when.reading import Mode, Reading, watched

E = TypeVar("E")
Policy = Literal["convergent", "periodic"]


def autogrow(
    interval: int,
    threshold: float,
    mode: Mode = "min",
    policy: Policy = "convergent",
    metric: str | None = None,
) -> "_AutoGrow":
    """The rule of AutoGrow, trigger and chooser in one: `Grower(..., when=rule, choose=rule.choose)`.

    Readings are taken in intervals; the gain of one is by how much its best reading is better than the best of the
    interval before. At the end of an interval it fires if the gain is below `threshold` ("convergent"), or always
    ("periodic"). The edits take turns. An edit whose first interval after its growth gained less than `threshold` is
    frozen: it has no turn any more. When all are frozen the rule is `done`, and with it the Grower.

    A growth starts a new interval, and until that is over nothing more is chosen. A growth made by hand freezes
    nothing. NaN is no gain. The state of both is saved with the trigger.

    Args:
        interval: Readings in an interval, at least 1. The article grows fast, with 3 epochs or fewer.
        threshold: Gain that pays, in the units of the metric, at least 0; 0.05 in the article, in percent of accuracy.
        mode: "min" for a metric that should fall (a loss), "max" for one that should rise (an accuracy).
        policy: "convergent" waits until the gain has become small, "periodic" grows at the end of each interval.
        metric: Name of the keyword to watch, as in `grower.step(accuracy=...)`; None watches the number that is
            passed by position, `grower.step(loss)`.

    Returns:
        A trigger with `choose`, `frozen` (names of edits) and `done`.

    Raises:
        GrowthError: If an argument is out of range.

    Source:
        Wen et al. 2020, AutoGrow: Automatic Layer Growing in Deep Convolutional Networks, arXiv:1909.13111.

    Examples:
        >>> rule = autogrow(interval=2, threshold=0.5)
        >>> losses = [5.0, 4.0, 3.0, 2.0, 1.9, 1.8]
        >>> [rule(Reading(loss, {}, 1, 0, 0, 1)) for loss in losses]
        [False, False, False, False, False, True]
        >>> rule.choose(["deeper", "wider"], grower=None)
        'deeper'
    """
    check_count("autogrow", "interval", interval, at_least=1)
    check_number("autogrow", "threshold", threshold)
    if threshold < 0:
        raise GrowthError(f"autogrow(threshold={threshold!r}): a gain that pays is not negative, pass 0 or more.")
    check_choice("autogrow", "mode", mode, ("min", "max"))
    check_choice("autogrow", "policy", policy, ("convergent", "periodic"))
    check_metric("autogrow", metric)
    return _AutoGrow(interval, float(threshold), mode, policy, metric)


@dataclass(eq=False, repr=False)
class _AutoGrow:
    """Inside, a higher metric is better.

    Attributes:
        level: Best reading of the interval before; None in the first.
        best: Best reading of this interval.
        count: Readings of this interval.
        growths: Of the network, at the last reading.
        chosen: The edit that has been chosen and has not grown yet.
        newborn: The edit whose first interval this is.
        last: The edit that had the last turn.
        frozen: The edits that have no turn any more.
        done: All are frozen.
    """

    interval: int
    threshold: float
    mode: Mode = "min"
    policy: Policy = "convergent"
    metric: str | None = None
    level: float | None = field(init=False, default=None)
    best: float = field(init=False, default=-math.inf)
    count: int = field(init=False, default=0)
    growths: int | None = field(init=False, default=None)
    chosen: str | None = field(init=False, default=None)
    newborn: str | None = field(init=False, default=None)
    last: str | None = field(init=False, default=None)
    frozen: list[str] = field(init=False, default_factory=list)
    done: bool = field(init=False, default=False)

    def __call__(self, reading: Reading) -> bool:
        value = watched(reading, self.metric, self)
        if self.growths is not None and reading.growths != self.growths:
            self.newborn, self.chosen = self.chosen, None
            self.best, self.count = -math.inf, 0
        self.growths = reading.growths
        value = value if self.mode == "max" else -value
        self.best = value if value > self.best else self.best
        self.count += 1
        return self.count == self.interval and self._ends()

    def _ends(self) -> bool:
        """End the interval; whether to grow."""
        pays = self.level is None or self.best - self.level >= self.threshold
        if self.newborn is not None and not pays:
            self.frozen = [*self.frozen, self.newborn]
        self.newborn = self.chosen = None
        self.level, self.best, self.count = self.best, -math.inf, 0
        return self.policy == "periodic" or not pays

    def choose(self, edits: Sequence[E], grower: object) -> E | None:
        """The chooser: the next edit that is not frozen, in turn; None while a growth is in its first interval."""
        if self.newborn is not None or not edits:
            return None
        names = _names(edits)
        start = names.index(self.last) + 1 if self.last in names else 0
        turn = next((name for name in names[start:] + names[:start] if name not in self.frozen), None)
        self.done = turn is None
        if turn is None:
            return None
        self.chosen = self.last = turn
        return edits[names.index(turn)]

    def state_dict(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in _STATE}, "frozen": list(self.frozen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(self, state, (*_STATE, "frozen"))
        self.level, self.best, self.count = state["level"], float(state["best"]), int(state["count"])
        self.growths, self.done, self.frozen = state["growths"], bool(state["done"]), list(state["frozen"])
        self.chosen, self.newborn, self.last = state["chosen"], state["newborn"], state["last"]

    def __repr__(self) -> str:
        return as_built("autogrow", self)


_STATE = ("level", "best", "count", "growths", "chosen", "newborn", "last", "done")


def _names(edits: Sequence[object]) -> list[str]:
    """A name for each edit that is the same in another process: its class and place, numbered where that is not one."""
    names: list[str] = []
    for edit in edits:
        name = f"{type(edit).__name__}({edit.at!r})" if hasattr(edit, "at") else repr(edit)  # pyright: ignore
        alike = sum(other.split(" #")[0] == name for other in names)
        names.append(f"{name} #{alike + 1}" if alike else name)
    return names
