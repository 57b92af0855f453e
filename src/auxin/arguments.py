"""Checks of what users hand to a Grower, at the door, each with the call that works."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from auxin import choose as choosers
from auxin import when as triggers
from auxin.change import Edit
from auxin.companion import registration_of
from auxin.errors import GrowthError


def checked_companions(companions: tuple[Any, ...]) -> tuple[Any, ...]:
    """Optimizers, schedulers, averages, scalers, each passed by itself."""
    for companion in companions:
        if isinstance(companion, (list, tuple, dict)):
            kind = type(companion).__name__
            raise GrowthError(
                f"companions: there is a {kind} among them; pass each one by itself: Grower(model, *{kind}_of_them)."
            )
        registration_of(companion)
    return companions


def checked_trigger(when: Any) -> Any:
    """A trigger that was built."""
    if inspect.isfunction(when) and getattr(triggers, when.__name__, None) is when:
        raise GrowthError(f"when={when.__name__} is not a trigger yet; call it: when=auxin.when.{when.__name__}(...).")
    if isinstance(when, type) or not callable(when):
        raise GrowthError(
            f"when is {_words(when)}; pass a trigger such as auxin.when.plateau(patience=3), or any f(reading)."
        )
    if not _takes_one(when):
        raise GrowthError("when takes no reading; write it as when=lambda reading: ...")
    return when


def checked_chooser(choose: Any) -> Any:
    """A chooser that was built."""
    if choose in (choosers.cycle, choosers.by_trial, choosers.least_change):
        name = choose.__name__
        raise GrowthError(f"choose={name} is not a chooser yet; call it: choose=auxin.choose.{name}().")
    if isinstance(choose, type) or not callable(choose):
        raise GrowthError(
            f"choose is {_words(choose)}; pass auxin.choose.first, another of auxin.choose, or f(edits, grower)."
        )
    return choose


def checked_edits(given: Any, model: nn.Module) -> list[Edit]:
    """The edits that a Grower may choose from: one, several, or a function that returns them."""
    made = callable(given) and not is_edit(given) and not isinstance(given, type)
    if made and not _takes_one(given):
        raise GrowthError("edits takes no model; write it as edits=lambda model: [...]")
    found = given(model) if made else given
    listed: list[Any] = [found] if is_edit(found) or not isinstance(found, Iterable) else list(found)
    for edit in listed:
        if not is_edit(edit):
            raise GrowthError(f"edits holds {_words(edit)}; pass edits such as Duplicate('blocks', by=1).")
    return listed


def is_edit(value: Any) -> bool:
    """Whether a value is an edit (and not the class of one)."""
    return isinstance(value, Edit) and not isinstance(value, type)


def number(value: Any, name: str) -> float:
    """A metric as a float.

    Raises:
        GrowthError: it is none.
    """
    if isinstance(value, (str, bytes, bool)):
        raise GrowthError(
            f"step: {name} is {value!r}, not a number; pass grower.step(loss) or grower.step(accuracy=0.9)."
        )
    if isinstance(value, Tensor):
        value = value.detach()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise GrowthError(
            f"step: {name} is {_words(value)}, not a number; pass grower.step(loss) or grower.step(accuracy=0.9)."
        ) from error


def _takes_one(function: Any) -> bool:
    """Whether a callable can be called with one argument, as far as its signature tells."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # one in C, without a signature
        return True
    return True


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
