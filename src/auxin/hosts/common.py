"""What all hosts need: checks at the door, and unwrapping of what they put around a network."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from auxin.change import Change
from auxin.engine import BadMoment
from auxin.errors import GrowthError
from auxin.grower import Grower
from auxin.limit import LimitReached

FORWARD = ("forward", "_original_forward")
WRAPPED = {"AcceleratedOptimizer": "optimizer", "AcceleratedScheduler": "scheduler"}


def warn_untested(name: str, version: str, tested: str) -> None:
    """Warn where the installed version of a host is not the one that was tested ("5.23" stands for 5.23.x)."""
    if version.split(".")[:2] != tested.split("."):
        text = (
            f"auxin.hosts was tested with {name} {tested}, and {version} is installed: check that what grows, trains."
        )
        warnings.warn(text, stacklevel=3)


def check_options(options: Mapping[str, Any], door: str) -> None:
    """Check that options are arguments of a Grower, and that those which must be there are.

    Raises:
        GrowthError: names what is wrong, and all that there are.
    """
    known = [p.name for p in inspect.signature(Grower).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    missing = sorted({"edits", "when"} - set(options))
    if unknown or missing:
        what = f"takes no {', '.join(unknown)}" if unknown else f"needs {' and '.join(missing)}"
        raise GrowthError(f"{door} {what}. It takes the arguments of auxin.Grower: {', '.join(known)}.")


def check_direction(when: Any, metric: str, better: str | None, said: str) -> None:
    """Check that a trigger takes the same for better as the host does.

    Args:
        when: the trigger.
        metric: what it looks at.
        better: "max", "min", or None where the host does not say.
        said: where the host says so, in words.

    Raises:
        GrowthError: it does not.
    """
    mode = getattr(when, "mode", None)
    own = getattr(when, "metric", None) is not None or hasattr(when, "value")  # another metric, or a goal
    if better is None or mode not in ("min", "max") or mode == better or own:
        return
    word = "greater" if better == "max" else "smaller"
    raise GrowthError(
        f"GrowthCallback: {metric} is better when it is {word}, says {said}, and {when!r} takes it the other way "
        f"round. Pass mode={better!r} to the trigger."
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


def carry_out(grower: Grower) -> Change | None:
    """Grow what was decided (``grower.progress.pending``), unless the moment is bad: then it waits on."""
    decision, grower.progress.pending = grower.progress.pending, None
    if decision is None:
        return None
    try:
        return grower.grow(*decision)
    except BadMoment as error:
        grower.progress.pending = decision
        grower._wait(str(error))
    except LimitReached:
        grower.progress.done = True
    return None
