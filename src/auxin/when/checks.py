"""What all triggers check at their door, and how they print."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from auxin.errors import GrowthError


def as_built(name: str, trigger: Any) -> str:
    """The call that made `trigger`, without what was left at its default."""
    given = []
    for argument in fields(trigger):
        value = getattr(trigger, argument.name)
        if argument.init and (argument.default is MISSING or value != argument.default):
            given.append(f"{argument.name}={list(value) if isinstance(value, tuple) else value!r}")
    return f"{name}({', '.join(given)})"


def check_count(trigger: str, name: str, value: object, at_least: int) -> None:
    """Refuse all but whole numbers from `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise GrowthError(f"{trigger}({name}={value!r}): {name} takes whole numbers from {at_least}.")


def check_number(trigger: str, name: str, value: object) -> None:
    """Refuse all but finite numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise GrowthError(f"{trigger}({name}={value!r}): {name} takes a finite number.")


def check_choice(trigger: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse all but a few words."""
    if value not in choices:
        one_of = " or ".join(repr(choice) for choice in choices)
        raise GrowthError(f"{trigger}({name}={value!r}): {name} is {one_of}.")


def check_metric(trigger: str, metric: object) -> None:
    """Refuse what is no name of a metric; "val/loss" is one, passed as `grower.step(**{"val/loss": loss})`."""
    if metric is not None and not (isinstance(metric, str) and metric.split() == [metric]):
        raise GrowthError(
            f"{trigger}(metric={metric!r}): metric is the name of a keyword of grower.step, "
            "as 'accuracy' in grower.step(accuracy=...)."
        )


def check_state(trigger: object, state: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Refuse a state with other names."""
    if set(state) != set(names):
        raise GrowthError(
            f"{trigger!r}: this state holds {sorted(state)}, expected {sorted(names)}: "
            "it is another trigger's. Build the Grower with the trigger that it was saved with."
        )


def check_trigger(name: str, trigger: Any) -> None:
    """Refuse what is no trigger, or not built yet; `name` is the function that it was given to."""
    if inspect.isfunction(trigger) and trigger.__module__.startswith("auxin.when."):
        called = trigger.__name__
        raise GrowthError(f"{name}({called}): {called} is not a trigger yet; call it: {name}({called}(...)).")
    if isinstance(trigger, type) or not callable(trigger):
        raise GrowthError(
            f"{name}({trigger!r}): {trigger!r} is not a trigger; pass one such as plateau(patience=3), or "
            "any f(reading)."
        )
