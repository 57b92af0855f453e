"""Triggers made of triggers: any of them, all of them, one with a pause after it has fired."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from auxin.errors import GrowthError
from auxin.when.checks import check_count, check_state, check_trigger
from auxin.when.inner import asked, is_done, load_states, name_of, states_of
from auxin.when.reading import Reading, Trigger


def any_of(*triggers: Trigger) -> "_AnyOf":
    """Fires when at least one of the triggers fires; several at one reading are one firing.

    All of them see every reading. If one raises, none has seen it.

    Args:
        triggers: Two or more triggers, or callables `f(reading) -> bool`.

    Returns:
        A trigger; its state holds theirs.

    Raises:
        GrowthError: If one of them is no trigger, or is given twice.

    Examples:
        >>> from auxin.when import every
        >>> trigger = any_of(every(2), every(3))
        >>> [trigger(Reading(None, {}, call, 0, 0, call)) for call in (1, 2, 3, 4, 5, 6)]
        [False, True, True, True, False, True]
    """
    return _AnyOf(_checked("any_of", triggers))


def all_of(*triggers: Trigger) -> "_AllOf":
    """Fires when all of the triggers fire at the same reading.

    All of them see every reading, also while others do not fire. So combine one that fires at a moment (`plateau`)
    with such as hold for a while (`threshold`, or a function of yours): two that fire at moments rarely meet, and a
    `signal` that meets nobody is used up. If one raises, none has seen the reading.

    Args:
        triggers: Two or more triggers, or callables `f(reading) -> bool`.

    Returns:
        A trigger; its state holds theirs.

    Raises:
        GrowthError: If one of them is no trigger, or is given twice.

    Examples:
        >>> from auxin.when import every, threshold
        >>> trigger = all_of(every(2), threshold(1.0))
        >>> [trigger(Reading(loss, {}, i, 0, 0, i)) for i, loss in enumerate((1.0, 2.0, 1.0, 1.0), start=1)]
        [False, False, False, True]
    """
    return _AllOf(_checked("all_of", triggers))


def cooldown(trigger: Trigger, calls: int) -> "_Cooldown":
    """Lets a trigger fire, and then not again at the next `calls` calls of `grower.step`.

    The trigger sees every reading; what it fires in the pause is dropped.

    Args:
        trigger: A trigger, or a callable `f(reading) -> bool`.
        calls: Length of the pause, at least 1.

    Returns:
        A trigger; its state holds the inner one's.

    Raises:
        GrowthError: If an argument does not fit.

    Examples:
        >>> from auxin.when import every
        >>> trigger = cooldown(every(2), calls=3)
        >>> [trigger(Reading(None, {}, call, 0, 0, call)) for call in (1, 2, 3, 4, 5, 6)]
        [False, True, False, False, False, True]
    """
    check_trigger("cooldown", trigger)
    check_count("cooldown", "calls", calls, at_least=1)
    return _Cooldown(trigger, calls)


def _checked(name: str, triggers: tuple[Trigger, ...]) -> tuple[Trigger, ...]:
    if len(triggers) < 2:
        given = ", ".join(name_of(trigger) for trigger in triggers)
        raise GrowthError(f"{name}({given}): pass two triggers or more, one by one: {name}(plateau(...), every(...)).")
    for trigger in triggers:
        check_trigger(name, trigger)
    if len({id(trigger) for trigger in triggers}) < len(triggers):
        raise GrowthError(
            f"{name}({', '.join(map(name_of, triggers))}): one trigger is given twice, and would see every "
            "reading twice."
        )
    return triggers


@dataclass(eq=False, repr=False)
class _Several:
    triggers: tuple[Trigger, ...]
    name: ClassVar[str]

    def state_dict(self) -> dict[str, Any]:
        return {"triggers": states_of(self.triggers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(self, state, ("triggers",))
        load_states(self, self.triggers, state["triggers"])

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(name_of, self.triggers))})"


class _AnyOf(_Several):
    name = "any_of"

    def __call__(self, reading: Reading) -> bool:
        return any(asked(self.triggers, reading))

    @property
    def done(self) -> bool:
        """Whether none of them will fire any more."""
        return all(is_done(trigger) for trigger in self.triggers)


class _AllOf(_Several):
    name = "all_of"

    def __call__(self, reading: Reading) -> bool:
        return all(asked(self.triggers, reading))

    @property
    def done(self) -> bool:
        """Whether one of them will not fire any more."""
        return any(is_done(trigger) for trigger in self.triggers)


@dataclass(eq=False, repr=False)
class _Cooldown:
    trigger: Trigger
    calls: int
    cooling: int = field(init=False, default=0)

    def __call__(self, reading: Reading) -> bool:
        fires = bool(self.trigger(reading))
        if self.cooling > 0:
            self.cooling -= 1
            return False
        self.cooling = self.calls if fires else 0
        return fires

    @property
    def done(self) -> bool:
        """Whether the trigger will not fire any more."""
        return is_done(self.trigger)

    def state_dict(self) -> dict[str, Any]:
        return {"triggers": states_of([self.trigger]), "cooling": self.cooling}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(self, state, ("triggers", "cooling"))
        cooling = int(state["cooling"])
        load_states(self, [self.trigger], state["triggers"])
        self.cooling = cooling

    def __repr__(self) -> str:
        return f"cooldown({name_of(self.trigger)}, calls={self.calls})"
