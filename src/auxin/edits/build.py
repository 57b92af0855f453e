"""Building the module that an edit names, and what will arrive at it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from auxin.anatomy.placed import guarded
from auxin.anatomy.probe import PlanContext
from auxin.anatomy.residual_role import ResidualRole
from auxin.edits.start import Start, remembered, start, takes
from auxin.edits.zeroing import kind_of
from auxin.errors import GrowthError, reason
from auxin.init import InitSite, named
from auxin.randomness import random_state
from auxin.refs import name_of


def build(
    layer: Any, model: nn.Module, context: PlanContext, who: str, position: Mapping[str, int] | None = None
) -> nn.Module:
    """Call ``layer`` under the context's seed, on the CPU (on the meta device in a replay there).

    ``position`` holds the ``index`` of the new module in its container and the container's new ``depth``: a factory
    with a parameter of such a name that has no default gets it. None: it stands in no container.

    Raises:
        GrowthError: it cannot be written down, fails, or returns something that is not a new module.
    """
    target = layer.func if isinstance(layer, functools.partial) else layer
    name_of(target)
    name = getattr(target, "__name__", "Layer")
    where = f"{who}, layer={name})"
    first = next(model.parameters(), None)
    placed = _asked_for(layer, position, where)
    device = "meta" if context.structural and first is not None and first.device.type == "meta" else "cpu"
    try:
        with random_state(context.seed), torch.device(device):
            built = layer(**placed)
    except Exception as error:  # whatever a user's constructor raises
        raise GrowthError(
            f"{where}: building it failed: {reason(error)}. Write its arguments into a partial: "
            f"layer=functools.partial({name}, ...)."
        ) from error
    if not isinstance(built, nn.Module):
        raise GrowthError(f"{where}: it returned a {type(built).__name__}, not an nn.Module.")
    if any(is_lazy(t) for t in (*built.parameters(), *built.buffers())):
        raise GrowthError(
            f"{where}: it has lazy layers, which get their shapes in their first forward. Write the sizes out, as in "
            "functools.partial(torch.nn.Linear, 64, 64)."
        )
    known = {id(m) for m in model.modules()}
    held = {id(p) for p in model.parameters()}
    if any(id(m) in known for m in built.modules()) or any(id(p) in held for p in built.parameters()):
        raise GrowthError(
            f"{where}: it returned a module that the model already holds; a factory must build a new one."
        )
    return built


def _asked_for(layer: Any, position: Mapping[str, int] | None, where: str) -> dict[str, int]:
    """What a factory cannot do without, of ``index`` and ``depth``."""
    try:
        parameters = inspect.signature(layer).parameters
    except (TypeError, ValueError):  # one in C, without a signature
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind in named]
    wanted = [name for name in ("index", "depth") if name in required]
    if wanted and position is None:
        raise GrowthError(
            f"{where}: it takes {wanted[0]}, the place in a container, and stands in none. Write it into the partial: "
            f"functools.partial(..., {wanted[0]}=0)."
        )
    return {name: position[name] for name in wanted} if position is not None else {}


def check_start(init: Any, fade: int, where: str, others: Sequence[str] = ()) -> None:
    """Check the words that say how a new module starts.

    Args:
        init: a name, or a function.
        fade: optimizer steps.
        where: for messages.
        others: names that this edit knows besides.

    Raises:
        GrowthError: one of them means nothing.
    """
    if type(fade) is not int or fade < 0:
        raise GrowthError(f"{where}: fade={fade!r} is a number of optimizer steps, 0 for none.")
    if not isinstance(init, str) or init not in ("preserve", *others):
        named(init, where)


def needs_batch(init: Any, where: str) -> str:
    """Why a start cannot be found without a batch; empty where it can."""
    said = (
        f"{where}: init='preserve' needs one batch to find which weights must be zero: pass probe=batch. Without one "
        "init='default', 'kaiming', 'xavier', 'identity' or 'zero' would run."
    )
    return said if isinstance(init, str) and init == "preserve" else ""


def begin(
    built: nn.Module,
    init: Any,
    site: InitSite,
    where: str,
    fade: int = 0,
    role: ResidualRole | None = None,
) -> Start:
    """Write the first weights of a new module; its train flags are put back.

    Args:
        built: the module.
        init: as in the edits.
        site: where it will stand, and what arrives there.
        where: for messages.
        fade: optimizer steps over which it may fade in, if nothing else keeps the function.
        role: what the network does with the outputs of the modules beside it; None: it hands them on.
    """
    call, context = site.call, site.context
    if context.structural:
        return Start("from a checkpoint")
    kind = kind_of(built)
    if call is None and init == "preserve" and kind in context.memory:
        return remembered(built, context.memory[kind], where, fade)
    if call is None and init == "preserve":
        raise GrowthError(needs_batch(init, where))
    modes = {module: module.training for module in built.modules()}
    try:
        with guarded(call):
            if call is not None:
                takes(built.eval(), call, where)
            with random_state(context.seed + 1):
                begun = start(built, init, site, where, fade, role)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if init == "preserve" and (begun.constants or begun.gated):
        context.memory[kind] = begun.constants or None
    return begun
