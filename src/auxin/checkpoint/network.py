"""The network's own tensors, flags and extra state, in and out of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError
from auxin.listing import module_at
from auxin.record import write

EXTRA = "_extra_state"


def network_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What ``state_dict()`` names, and the buffers that it leaves out; tied names point at the same tensor."""
    state = {k: v.detach() for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    rest = {n: b.detach() for n, b in model.named_buffers(remove_duplicate=False) if n not in state}
    return state, rest


def network_data(model: nn.Module) -> dict[str, Any]:
    """Which parameters are frozen, and what modules hold as extra state."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    own = nn.Module.get_extra_state
    extra = {path: m.get_extra_state() for path, m in model.named_modules() if type(m).get_extra_state is not own}
    return {"frozen": frozen, EXTRA: extra}


def check_network(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and dtypes.

    Raises:
        GrowthError: lists what is missing, what is unknown, and what has another shape.
    """
    state, rest = network_tensors(model)
    own = {**state, **rest}
    problems = [f"{name} {tuple(own[name].shape)} is not in the checkpoint" for name in own if name not in tensors]
    problems += [f"{name} {tuple(tensors[name].shape)} is not in this model" for name in tensors if name not in own]
    for name, value in tensors.items():
        mine = own.get(name)
        if mine is not None and (mine.shape != value.shape or mine.dtype != value.dtype):
            words = f"{tuple(value.shape)} {value.dtype} there, {tuple(mine.shape)} {mine.dtype} here"
            problems.append(f"{name}: {words.replace('torch.', '')}")
    if problems:
        shown = "\n  ".join(problems[:12]) + (f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else "")
        way = "Build the model with the same class and arguments as at the start of the run that saved it."
        if set(own) == set(tensors) and all(own[name].shape == value.shape for name, value in tensors.items()):
            dtype = next(value.dtype for name, value in tensors.items() if own[name].dtype != value.dtype)
            way = (
                f"Only dtypes differ. Load into `model.to({dtype})`, made before its optimizer; convert it after that."
            )
        raise GrowthError(f"this checkpoint is of another model; {len(problems)} tensors differ:\n  {shown}\n{way}")


def write_network(
    model: nn.Module, tensors: Mapping[str, Tensor], data: Mapping[str, Any], run: bool, keep: bool = False
) -> None:
    """Write values in place; every Parameter stays the same object (those on the meta device are made real).

    Args:
        model: a network that ``check_network`` has passed.
        tensors: by name.
        data: of ``network_data``.
        run: restore frozen flags too (a run goes on), or only values (inference).
        keep: the tensors are nobody else's, and those that fit as they are need no copy: parameters take their memory.
    """
    frozen, homes = set(data["frozen"]), dict[int, Tensor]()
    with torch.no_grad():
        for name, value in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = module_at(model, path, "the checkpoint")
            held: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            own = held[leaf]
            if own.device.type == "meta":
                made = value.clone()
                held[leaf] = nn.Parameter(made, own.requires_grad) if isinstance(own, nn.Parameter) else made
            elif keep and _alike(own, value) and homes.setdefault(id(value), own) is own:
                own.data = value
            else:
                write(own, value)
    _tie_again(model, tensors)
    if run:
        for name, p in model.named_parameters():
            if p.requires_grad == (name in frozen):
                p.requires_grad_(name not in frozen)
    for path, state in data[EXTRA].items():
        module_at(model, path, "the checkpoint").set_extra_state(state)


def _alike(own: Tensor, value: Tensor) -> bool:
    layouts = [(t.shape, t.stride(), t.dtype, t.device) for t in (own, value)]
    return layouts[0] == layouts[1]


def _tie_again(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Names that shared one tensor in the checkpoint share one Parameter where they were made real here."""
    first: dict[int, Any] = {}
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = module_at(model, path, "the checkpoint")
        if leaf in module._parameters and id(value) in first:
            module._parameters[leaf] = first[id(value)]
        elif leaf in module._parameters:
            first[id(value)] = module._parameters[leaf]
