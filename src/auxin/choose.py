"""Choosers: which of the edits comes next. Any callable `choose(edits, grower) -> edit or None` is one.

A chooser is called when the trigger has fired. None means that nothing is grown this time. One that remembers
something has `state_dict()` and `load_state_dict()`.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from auxin.errors import GrowthError

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
