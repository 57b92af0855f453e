"""Making a copy of a residual block return its input, by zeroing its last writers; what was found is remembered."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from auxin.anatomy.blocks import shared_tensors
from auxin.anatomy.placed import Placed, guarded
from auxin.anatomy.probe import Call, PlanContext, untouched
from auxin.anatomy.residual_role import PASSED, constants_of, cut_off, learns, rests
from auxin.anatomy.zero_init import set_constants
from auxin.edits.start import warn_of_norms
from auxin.listing import named_parameters
from auxin.randomness import random_state


def silence(
    model: nn.Module,
    original: nn.Module,
    twin: nn.Module,
    call: Call | None,
    context: PlanContext,
    where: str,
    form: str = PASSED,
) -> Mapping[str, float] | None:
    """Set the twin's last writers to zero, or close the gains behind them.

    Args:
        model: the network.
        original: the block that was copied.
        twin: its copy.
        call: what arrives at the original; None: take what is remembered of its kind.
        context: its memory holds the writers of every kind of block that was solved before.
        where: for messages.
        form: what the network does with the block's outputs, and so what the twin is to return.

    Returns:
        Constant by name of the tensor inside the block: 0, or -1 for a gain that is stored as 1 + w. None where no
        zeroing makes the copy return that and still learn.
    """
    kind = kind_of(original)
    if call is None:
        remembered = context.memory[kind]
        if remembered is not None:
            set_constants(twin, remembered)
        return remembered
    with untouched(twin), guarded(call):
        for constants in _candidates(original, call, context, kind, form):
            if _holds(model, original, twin, call, constants, form):
                if form == PASSED and context.memory.get(kind) != constants:
                    warn_of_norms(original, call, constants, where)
                context.memory[kind] = constants
                if not isinstance(call, Placed):
                    context.at_rest[id(twin)] = functools.partial(rests, call=call, form=form)
                return constants
    context.memory[kind] = None
    return None


def kind_of(block: nn.Module) -> str:
    """The same for blocks of the same classes and shapes."""
    text = [f"{name} {type(module).__module__}:{type(module).__qualname__}" for name, module in block.named_modules()]
    text += [f"{name} {tuple(p.shape)}" for name, p in named_parameters(block).items()]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _candidates(
    original: nn.Module, call: Call, context: PlanContext, kind: str, form: str
) -> Iterator[Mapping[str, float]]:
    """What is remembered first; the solver only where that does not hold."""
    remembered = context.memory.get(kind)
    if remembered is not None:
        yield remembered
    solved = constants_of(original, call, form)
    if solved:
        yield solved


def _holds(
    model: nn.Module, original: nn.Module, twin: nn.Module, call: Call, constants: Mapping[str, float], form: str
) -> bool:
    """Set the constants in the twin; if that does not do, give the values back."""
    parameters = named_parameters(twin)
    tied = shared_tensors(model, original)
    if any(name not in parameters or id(parameters[name]) in tied for name in constants):
        return False
    values: dict[str, Tensor] = {name: parameters[name].detach().clone() for name in constants}
    with random_state(seed=0):
        set_constants(twin, constants)
        frozen = not any(p.requires_grad for p in twin.parameters())
        if rests(twin, call, form) and (frozen or learns(twin, call, constants, form)):
            if frozen or not cut_off(original, twin, call, constants, form):
                return True
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    return False
