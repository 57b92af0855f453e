"""Triggers inside of triggers: all of them see every reading, and their states nest."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from auxin.errors import GrowthError
from auxin.when.reading import Reading, Trigger


def inside(trigger: Any) -> Iterator[Any]:
    """A trigger, and all that it is made of."""
    yield trigger
    inner = getattr(trigger, "trigger", None)
    for one in (*getattr(trigger, "triggers", ()), *([] if inner is None else [inner])):
        yield from inside(one)


def asked(triggers: Sequence[Trigger], reading: Reading) -> list[bool]:
    """What each trigger says to a reading; if one raises, those before it are put back."""
    before = copy.deepcopy(states_of(triggers))
    try:
        return [bool(trigger(reading)) for trigger in triggers]
    except BaseException:
        put_back(triggers, before)
        raise


def states_of(triggers: Sequence[Trigger]) -> list[Any]:
    """`state_dict()` of each; None where there is none."""
    return [trigger.state_dict() if hasattr(trigger, "state_dict") else None for trigger in triggers]  # pyright: ignore


def load_states(outer: object, triggers: Sequence[Trigger], states: Any) -> None:
    """Load the state of each trigger, or of none.

    Raises:
        GrowthError: These are the states of other triggers.
    """
    if not isinstance(states, Sequence) or len(states) != len(triggers):
        raise _of_others(outer, f"it is not one of {len(triggers)} triggers")
    for trigger, state in zip(triggers, states, strict=True):
        if (state is not None) != hasattr(trigger, "state_dict"):
            takes = "has a state" if state is None else "has none"
            raise _of_others(outer, f"{name_of(trigger)} {takes}")
    before = copy.deepcopy(states_of(triggers))
    try:
        put_back(triggers, states)
    except BaseException:
        put_back(triggers, before)
        raise


def put_back(triggers: Sequence[Trigger], states: Sequence[Any]) -> None:
    """Give each trigger its state."""
    for trigger, state in zip(triggers, states, strict=True):
        if state is not None:
            trigger.load_state_dict(state)  # pyright: ignore[reportFunctionMemberAccess]


def is_done(trigger: Trigger) -> bool:
    """Whether a trigger says that it will not fire any more."""
    return getattr(trigger, "done", False) is True


def name_of(trigger: object) -> str:
    """How a trigger prints inside of another one: a function by its name."""
    return trigger.__name__ if inspect.isfunction(trigger) else repr(trigger)


def _of_others(outer: object, why: str) -> GrowthError:
    return GrowthError(
        f"{outer!r}: {why}, so this state is another trigger's. "
        "Build the Grower with the trigger that it was saved with."
    )
