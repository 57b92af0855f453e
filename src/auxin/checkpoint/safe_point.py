"""Is this moment one that a checkpoint can hold? Not in the middle of a forward, a step or a growth."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

import torch

from auxin import sharded
from auxin.errors import GrowthError
from auxin.run_state import Run
from auxin.safe_point import FORWARD

# What every optimizer's step runs in.
STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__
GROWING = ("step", "decide", "carry_out", "grow", "undo", "trial", "load_state_dict")
# Where a network is changed, and where it is loaded.
CHANGING = {"auxin.engine": "auxin.grow", "auxin.surgery": "auxin.surgery"}
LOADING = ("auxin.checkpoint.run", "_loaded")

Frames = Sequence[tuple[CodeType, Any, str | None]]


def check_moment(grower: Run) -> None:
    """Check that nothing is half-done on this thread: what a signal handler, or a hook, may find itself in.

    Raises:
        GrowthError: names what is going on.
    """
    if grower.rollback.in_branch:
        raise GrowthError(
            "save: inside a trial, and what is tried is gone afterwards. Save outside of `with grower.trial(...)`."
        )
    if (held := sharded.unreduced(grower.model)) is not None:
        raise GrowthError(f"save: {held}.")
    inside = "a backward pass" if torch._C._current_graph_task_id() != -1 else _inside(grower)
    if inside is not None:
        raise GrowthError(
            f"save: inside {inside}, where a run is half one step further; a checkpoint of that could not go on. Save "
            "between two steps. In a signal handler only set a flag, and save after the step: `if stop: ax.save(...)`."
        )


def _inside(grower: Run) -> str | None:
    """What of this run is on the stack of this thread."""
    frames = list(_stack(sys._getframe(2)))
    # First without reading the network: in the middle of a growth its modules may be without their attributes.
    return _growth(frames, grower) or _training(frames, grower)


def _stack(frame: FrameType | None) -> Iterator[tuple[CodeType, Any, str | None]]:
    """Code, ``self`` and module of each frame, innermost first."""
    while frame is not None:
        yield frame.f_code, frame.f_locals.get("self"), frame.f_globals.get("__name__")
        frame = frame.f_back


def _growth(frames: Frames, grower: Run) -> str | None:
    busy = {inspect.unwrap(getattr(type(grower), name)).__code__: name for name in GROWING}
    for code, owner, module in frames:
        if owner is grower and code in busy and busy[code] == "grow" and grower.telling:
            return None  # in `on_growth`: all of the growth is there
        if owner is grower and code in busy:
            return f"Grower.{busy[code]}"
        if module in CHANGING:
            return CHANGING[module]
        if (module, code.co_name) == LOADING:
            return "auxin.load"
    return None


def _training(frames: Frames, grower: Run) -> str | None:
    modules = {id(module) for module in grower.model.modules()}
    companions = {id(companion) for companion in grower.companions}
    for code, owner, _ in frames:
        if code in FORWARD and id(owner) in modules:
            return f"the forward of {type(owner).__name__}"
        if code is STEP and id(owner) in companions:
            return f"the step of {type(owner).__name__}"
    return None
