"""What hangs on a network, in and out of a checkpoint: one pair of functions per kind, checks before any write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.wrappers import networks_of
from auxin.checkpoint.copies import check_copies, copies_state, write_copies
from auxin.companion import registration_of
from auxin.errors import GrowthError
from auxin.follow.optimizer_state import check_optimizer, given, names_in, optimizer_state, restore_optimizer, taken
from auxin.follow.scheduler import follow_scheduler
from auxin.follow.scheduler_state import KINDS, check_scheduler, inner, restore_scheduler, scheduler_state
from auxin.record import write

State = tuple[dict[str, Tensor], Any]  # tensors by name, and plain data
Write = Callable[[], None]
VALUE = "value of "  # in front of the name of a parameter that is not the network's


def state_of(companion: Any, model: nn.Module) -> State:
    """Everything that a fresh companion of the same making needs to go on exactly.

    Raises:
        GrowthError: it has no ``state_dict``.
    """
    save = registration_of(companion).save
    if save is not None:
        return _apart(save(companion, model))
    if isinstance(companion, torch.optim.Optimizer):
        tensors, data = optimizer_state(companion, names_of(model))
        return tensors | {VALUE + name: p.detach() for name, p in _foreign(companion, model).items()}, data
    if _is_schedule(companion):
        return {}, scheduler_state(companion)
    if networks_of(companion):
        return copies_state(companion, model)
    if not hasattr(companion, "state_dict"):
        raise GrowthError(
            f"{type(companion).__name__} has no state_dict() and load_state_dict(), so a checkpoint cannot hold it; "
            "give it both, with plain values, or register it with auxin.follow(..., save=..., load=...)."
        )
    return _apart(companion.state_dict())


def prepared(companion: Any, model: nn.Module, tensors: Mapping[str, Tensor], data: Any, keep: bool = False) -> Write:
    """Check a saved state against a companion; return what writes it. ``keep``: copies of the network take its memory.

    Raises:
        GrowthError: it does not fit; nothing has been written.
    """
    load = registration_of(companion).load
    if load is not None:
        return lambda: load(companion, model, _together(tensors, data))
    if isinstance(companion, torch.optim.Optimizer):
        check_optimizer(companion, tensors, data, names_of(model))
        values = {name: (p, tensors[VALUE + name]) for name, p in _foreign(companion, model).items()}
        _check_values(companion, values)

        def write_all() -> None:
            restore_optimizer(companion, tensors, data, names_of(model), keep=True)
            for p, value in values.values():
                write(p, value)

        return write_all
    if _is_schedule(companion):
        check_scheduler(companion, data)
        return lambda: restore_scheduler(companion, data)
    if networks_of(companion):
        check_copies(companion, model, tensors, data)
        return lambda: write_copies(companion, model, tensors, data, keep)
    return lambda: companion.load_state_dict(_together(tensors, data))


def _is_schedule(companion: Any) -> bool:
    """Whether it is a scheduler of torch, or is followed as one and drives some, which it may not save."""
    if isinstance(companion, KINDS):
        return True
    return registration_of(companion).follower is follow_scheduler and bool(
        hasattr(companion, "state_dict") and inner(companion)
    )


def _apart(state: Any) -> State:
    """A state with its tensors taken out."""
    tensors: dict[str, Tensor] = {}
    return tensors, taken(state, "state", tensors)


def _together(tensors: Mapping[str, Tensor], data: Any) -> Any:
    return given(data, lambda _, tensor: tensor, tensors)


def _foreign(optimizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """Parameters that an optimizer trains beside the network (a learned temperature of the loss), by name."""
    names, own = names_in(optimizer, names_of(model)), names_of(model)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return {names[id(p)]: p for p in held if id(p) not in own}


def _check_values(optimizer: Any, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    other = [name for name, (p, value) in values.items() if p.shape != value.shape or p.dtype != value.dtype]
    if other:
        raise GrowthError(
            f"{', '.join(other)}: parameters of this {type(optimizer).__name__} beside the network have another shape "
            "or dtype than in the checkpoint. Build them as at the start of the run that was saved."
        )


def kind_of(companion: Any) -> str:
    """The class of a companion, as text."""
    return f"{type(companion).__module__}:{type(companion).__qualname__}"


def names_of(model: nn.Module) -> dict[int, str]:
    """Parameter names by ``id``."""
    return {id(p): name for name, p in model.named_parameters()}
