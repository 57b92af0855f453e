"""What all hosts need: checks at the door, and unwrapping of what they put around a network."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from auxin.arguments import checked_choice, checked_chooser
from auxin.choose import first
from auxin.errors import GrowthError
from auxin.journal import references
from auxin.when.inner import inside

FORWARD = ("forward", "_original_forward")
WRAPPED = {"AcceleratedOptimizer": "optimizer", "AcceleratedScheduler": "scheduler"}


def warn_untested(name: str, version: str, oldest: str, newest: str) -> None:
    """Warn where the installed version of a host is outside of those that were tested ("5.24" stands for 5.24.x)."""
    if not _numbers(oldest) <= _numbers(version) <= _numbers(newest):
        text = (
            f"auxin.hosts was tested with {name} {oldest} to {newest}, and {version} is installed: check that what "
            "grows, trains."
        )
        warnings.warn(text, stacklevel=3)


def _numbers(version: str) -> list[int]:
    """The first two of a version."""
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


def checked_parts(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a Grower whose edits, trigger and chooser are checked, before there is a network.

    Raises:
        GrowthError: one of them is none.
    """
    options["edits"], options["when"] = checked_choice(options["edits"], options["when"])
    checked_chooser(options.get("choose", first), options.get("evidence"))
    return options


def named_by(edits: Any) -> list[Any]:
    """What the edits of a list name, so that a journal may too."""
    return [] if callable(edits) else [found for edit in edits for found in references(edit)]


def check_direction(options: Mapping[str, Any], metric: str, better: str | None, said: str) -> None:
    """Check that trigger and probation take the same for better as the host does.

    Args:
        options: of the Grower.
        metric: what they look at.
        better: "max", "min", or None where the host does not say.
        said: where the host says so, in words.

    Raises:
        GrowthError: they do not.
    """
    probation = options.get("probation")
    for judge in (*inside(options["when"]), *([] if probation is None else [probation])):
        mode = getattr(judge, "mode", None)
        other = getattr(judge, "metric", None) is not None or hasattr(judge, "value")  # another metric, or a goal
        if better is None or mode not in ("min", "max") or mode == better or other:
            continue
        word = "greater" if better == "max" else "smaller"
        raise GrowthError(
            f"GrowthCallback: {metric} is better when it is {word}, says {said}, and {judge!r} takes it the other way "
            f"round. Pass mode={better!r} to {'the trigger' if judge is not probation else 'Probation'}."
        )


def unwrapped(companion: Any) -> Any:
    """The optimizer or scheduler inside the wrapper that ``accelerator.prepare`` has put around it."""
    while type(companion).__name__ in WRAPPED:
        companion = getattr(companion, WRAPPED[type(companion).__name__])
    return companion


@contextlib.contextmanager
def as_built(model: nn.Module) -> Iterator[None]:
    """Without the autocast that ``accelerator.prepare`` hangs on ``forward``, which rounds: proofs are exact inside."""
    own = {name: model.__dict__.pop(name) for name in FORWARD if name in model.__dict__}
    try:
        yield
    finally:
        model.__dict__.update(own)
