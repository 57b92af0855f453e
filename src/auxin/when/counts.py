"""Triggers that count: every n-th call or optimizer step, or given ones."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from auxin.errors import GrowthError
from auxin.when.checks import as_built, check_choice, check_count, check_state
from auxin.when.reading import Reading, Unit, counted


def every(n: int, unit: Unit = "calls") -> "_Every":
    """Fires at every `n`-th count: at n, 2n, 3n and so on.

    Args:
        n: The distance between two firings; at least 1.
        unit: "calls" counts calls of `grower.step`, "optimizer" counts optimizer steps. Optimizer steps are
            looked at only when `grower.step` is called: it fires at the first call at or behind a multiple of
            n, and multiples that were passed together are one firing.

    Returns:
        A trigger.

    Raises:
        GrowthError: If an argument is out of range.

    Examples:
        >>> trigger = every(2)
        >>> [trigger(Reading(None, {}, call, 0, 0, call)) for call in (1, 2, 3, 4)]
        [False, True, False, True]
    """
    check_count("every", "n", n, at_least=1)
    check_choice("every", "unit", unit, ("calls", "optimizer"))
    return _Every(n, unit)


def at(counts: Iterable[int], unit: Unit = "calls") -> "_At":
    """Fires once at each of the given counts.

    Args:
        counts: When to fire: whole numbers from 1, in any order, none twice.
        unit: "calls" counts calls of `grower.step`, "optimizer" counts optimizer steps. Optimizer steps are
            looked at only when `grower.step` is called: it fires at the first call at or behind a count;
            counts that were passed together fire at that call and the next ones, so that no growth is lost.

    Returns:
        A trigger.

    Raises:
        GrowthError: If a count is not a whole number from 1, or is given twice.

    Examples:
        >>> trigger = at([1, 4])
        >>> [trigger(Reading(None, {}, call, 0, 0, call)) for call in (1, 2, 3, 4)]
        [True, False, False, True]
    """
    if isinstance(counts, str | bytes) or not isinstance(counts, Iterable):
        raise GrowthError(f"at({counts!r}): pass the counts as a list, at([{counts}]).")
    wanted = tuple(counts)
    for count in wanted:
        check_count("at", "counts", count, at_least=1)
    if len(set(wanted)) < len(wanted):
        raise GrowthError(f"at({list(wanted)!r}): a count is given twice. One call grows at most once.")
    check_choice("at", "unit", unit, ("calls", "optimizer"))
    return _At(tuple(sorted(wanted)), unit)


@dataclass(eq=False, repr=False)
class _Every:
    n: int
    unit: Unit = "calls"
    seen: int = field(init=False, default=0)

    def __call__(self, reading: Reading) -> bool:
        now = counted(reading, self.unit)
        passed = now // self.n > self.seen // self.n
        self.seen = now
        return passed

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        check_state(self, state, ("seen",))
        self.seen = int(state["seen"])

    def __repr__(self) -> str:
        return as_built("every", self)


@dataclass(eq=False, repr=False)
class _At:
    counts: tuple[int, ...]
    unit: Unit = "calls"
    last: int = field(init=False, default=0)

    def __call__(self, reading: Reading) -> bool:
        now = counted(reading, self.unit)
        due = [count for count in self.counts if self.last < count <= now]
        if due:
            self.last = due[0]
        return bool(due)

    def state_dict(self) -> dict[str, int]:
        return {"last": self.last}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        check_state(self, state, ("last",))
        self.last = int(state["last"])

    def __repr__(self) -> str:
        return as_built("at", self)
