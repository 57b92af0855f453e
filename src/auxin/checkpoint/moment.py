"""Is this moment one that a checkpoint can hold? Not in the middle of a forward, a step or a growth."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch

from auxin.boundary import FORWARD
from auxin.errors import GrowthError

# What every optimizer's step runs in.
STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__
GROWING = ("step", "decide", "grow", "undo", "load_state_dict")
# Where a network is changed, and where it is loaded.
CHANGING = {"auxin.engine": "auxin.grow", "auxin.surgery": "auxin.surgery"}
LOADING = ("auxin.checkpoint.run", "_loaded")


def check_moment(grower: Any) -> None:
    """Check that nothing is half-done on this thread: what a signal handler, or a hook, may find itself in.

    Raises:
        GrowthError: names what is going on.
    """
    if grower._past.in_branch:
        raise GrowthError(
            "save: inside a trial, and what is tried is gone afterwards. Save outside of `with grower.trial(...)`."
        )
    inside = "a backward pass" if torch._C._current_graph_task_id() != -1 else _inside(grower)
    if inside is not None:
        raise GrowthError(
            f"save: inside {inside}, where a run is half one step further; a checkpoint of that could not go on. Save "
            "between two steps. In a signal handler only set a flag, and save after the step: `if stop: ax.save(...)`."
        )


def _inside(grower: Any) -> str | None:
    """What of this run is on the stack of this thread, innermost first."""
    modules = {id(module) for module in grower.model.modules()}
    companions = {id(companion) for companion in grower.companions}
    busy = {getattr(type(grower), name).__code__: name for name in GROWING}
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code, owner = frame.f_code, frame.f_locals.get("self")
        if code in FORWARD and id(owner) in modules:
            return f"the forward of {type(owner).__name__}"
        if code is STEP and id(owner) in companions:
            return f"the step of {type(owner).__name__}"
        if owner is grower and code is type(grower)._write_down.__code__:
            return None  # in `on_growth`: all of the growth is there
        if owner is grower and code in busy:
            return f"Grower.{busy[code]}"
        module = frame.f_globals.get("__name__")
        if module in CHANGING:
            return CHANGING[module]
        if (module, code.co_name) == LOADING:
            return "auxin.load"
        frame = frame.f_back
    return None
