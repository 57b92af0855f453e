"""Optimizer state under the names of parameters, whatever their order; restored in place, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from auxin.errors import GrowthError
from auxin.typed import Stored

# How a step is carried out, not what it computes: the choice of whoever built the optimizer on this machine.
EXECUTION = frozenset({"foreach", "fused", "capturable", "differentiable"})
# Their state is not one entry per element: flat vectors over all parameters, and factors.
_OTHER_SHAPES = (torch.optim.LBFGS, torch.optim.Adafactor)


def optimizer_state(optimizer: Any, names: Mapping[int, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that an optimizer's next steps depend on.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        names: ``id(parameter)`` -> name. Others in its groups are called ``foreign.<group>.<number>``.

    Returns:
        Tensors by flat name (the optimizer's own: write them before it steps again), and the rest as data for
        ``auxin.typed``, where each tensor is ``Stored(flat name)``.

    Raises:
        GrowthError: two parameters have one name.
    """
    called = names_in(optimizer, names)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    tensors: dict[str, Tensor] = {}
    state, other = {}, []
    for key, value in optimizer.state.items():
        if not isinstance(key, Tensor):
            other.append([key, taken(value, f"other.{len(other)}", tensors)])
        elif id(key) in held:  # what has left its group takes no step any more
            state[called[id(key)]] = taken(value, called[id(key)], tensors)
    groups = [
        {
            "params": [called[id(p)] for p in group["params"]],
            "shapes": [tuple(p.shape) for p in group["params"]],
            "options": {k: _snapshot(v) for k, v in group.items() if k != "params" and not callable(v)},
        }
        for group in optimizer.param_groups
    ]
    data = {"type": type(optimizer).__name__, "groups": groups, "state": state, "other": other}
    return tensors, data


def check_optimizer(
    optimizer: Any, tensors: Mapping[str, Tensor], data: Mapping[str, Any], names: Mapping[int, str]
) -> None:
    """Whether ``restore_optimizer`` with these arguments would succeed; touches nothing.

    Raises:
        GrowthError: lists every difference.
    """
    kind = type(optimizer).__name__
    try:
        problems = list(_differences(optimizer, tensors, data, names))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise GrowthError(
            f"The checkpoint's state for {kind} is not what auxin writes ({type(error).__name__}: {error})."
        ) from error
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise GrowthError(
            f"The checkpoint's optimizer state does not fit this {kind}:\n  {shown}\n"
            f"Build the model and the optimizer as at the start of the run that was saved (the growths are "
            f"replayed on them), then ax.load(path, grower)."
        )


def restore_optimizer(
    optimizer: Any,
    tensors: Mapping[str, Tensor],
    data: Mapping[str, Any],
    names: Mapping[int, str],
    keep: bool = False,
) -> None:
    """Put a saved state into an optimizer; groups, parameters and tensor hyperparameters stay the same objects.

    Each group takes over the recorded order of its parameters, its hyperparameters and their state. How steps are
    carried out (``foreach``, ``fused``, ``capturable``, ``differentiable``) and callables stay as they are here.

    Args:
        optimizer: of the same type, with the same parameters in the same groups.
        tensors: what ``optimizer_state`` returned; copied.
        data: what ``optimizer_state`` returned.
        names: ``id(parameter)`` -> name, now.
        keep: the tensors are nobody else's (just read from a file), so those that fit as they are need no copy.

    Raises:
        GrowthError: the state does not fit; nothing was changed.
    """
    check_optimizer(optimizer, tensors, data, names)
    owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    params = _parameters(optimizer, names)
    state: dict[Any, Any] = {}
    free = {id(t) for t in tensors.values()} if keep else set()
    for name, value in data["state"].items():
        param = params[name]
        state[param] = given(value, _placer(param, owner.get(id(param), {}), free), tensors)
    for key, value in data["other"]:
        state[key] = given(value, lambda _key, tensor: tensor.clone(), tensors)
    # From here on nothing is expected to raise.
    optimizer.state.clear()
    optimizer.state.update(state)
    called = names_in(optimizer, names)
    for group, saved in zip(optimizer.param_groups, data["groups"], strict=True):
        _restore_group(group, saved, called)
    if hasattr(optimizer, "_numel_cache"):
        optimizer._numel_cache = None


# ---- names


def names_in(optimizer: Any, names: Mapping[int, str]) -> dict[int, str]:
    """``id`` -> name of every parameter that is named, or in a group (``foreign.<group>.<number>``)."""
    called = dict(names)
    foreign = "foreign"
    while any(name.startswith(f"{foreign}.") for name in names.values()):
        foreign = f"_{foreign}"
    for index, group in enumerate(optimizer.param_groups):
        unknown = [p for p in group["params"] if id(p) not in names]
        called |= {id(p): f"{foreign}.{index}.{number}" for number, p in enumerate(unknown)}
    if len(set(called.values())) != len(called):
        twice = sorted({name for name in called.values() if list(called.values()).count(name) > 1})
        raise GrowthError(f"Two parameters have one name: {', '.join(twice)}.")
    return called


def _parameters(optimizer: Any, names: Mapping[int, str]) -> dict[str, Any]:
    """Name -> parameter, of every one that the optimizer holds."""
    called = names_in(optimizer, names)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return {called[id(p)]: p for p in held}


# ---- taking


def taken(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A copy of a state in which every tensor is ``Stored``; the tensors themselves go to ``tensors``."""
    if isinstance(value, Tensor):
        key = name
        while key in tensors:
            key += "'"
        tensors[key] = value.detach()
        return Stored(key)
    if type(value) is dict:
        joint = "::" if "::" not in name else "."
        return {key: taken(item, f"{name}{joint}{key}", tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(taken(item, f"{name}.{index}", tensors) for index, item in enumerate(value))
    return _snapshot(value)


def _snapshot(value: Any) -> Any:
    """A copy that later steps do not reach."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_snapshot(item) for item in value)
    if type(value) is dict:
        return {key: _snapshot(item) for key, item in value.items()}
    return copy.copy(value)


# ---- checking


def _differences(
    optimizer: Any, tensors: Mapping[str, Tensor], data: Mapping[str, Any], names: Mapping[int, str]
) -> Iterator[str]:
    if data["type"] != type(optimizer).__name__:
        yield f"it was saved from {data['type']}"
        return
    if len(data["groups"]) != len(optimizer.param_groups):
        yield f"it has {len(data['groups'])} parameter groups, here are {len(optimizer.param_groups)}"
        return
    called = names_in(optimizer, names)
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, data["groups"], strict=True)):
        here = {called[id(p)]: tuple(p.shape) for p in group["params"]}
        there = dict(zip(saved["params"], map(tuple, saved["shapes"]), strict=True))
        if len(there) != len(saved["params"]) or len(here) != len(group["params"]):
            yield f"group {index} holds a parameter twice"
        yield from (f"group {index} has no {name} here" for name in there if name not in here)
        yield from (f"group {index} has {name}, the checkpoint's has not" for name in here if name not in there)
        for name in (name for name in there if name in here and here[name] != there[name]):
            yield f"{name} is {here[name]}, in the checkpoint {there[name]}"
        if not isinstance(saved["options"], dict) or "params" in saved["options"]:
            yield f"group {index} has no options"
        if len(group.get("param_names") or here) != len(here):
            yield f"group {index} has {len(here)} parameters and {len(group['param_names'])} param_names here"
    params = _parameters(optimizer, names)
    for name, value in data["state"].items():
        if name not in params:
            yield f"there is state for {name}, which this optimizer does not hold"
        for key, stored in _stored(value):
            if not isinstance(tensors.get(stored), Tensor):
                yield f"the tensor {stored} is missing"
            elif name in params and not _fits(optimizer, key, tensors[stored], params[name]):
                shapes = f"{tuple(tensors[stored].shape)} for {tuple(params[name].shape)}"
                yield f"the state {key} of {name} has another shape: {shapes}"
    for key, value in data["other"]:
        hash(key)
        yield from (f"the tensor {s} is missing" for _, s in _stored(value) if s not in tensors)


def _stored(value: Any, key: Any = None) -> Iterator[tuple[Any, str]]:
    """State key and flat name of every tensor in a saved state."""
    if isinstance(value, Stored):
        yield key, value.key
    elif isinstance(value, dict):
        for own, item in value.items():
            yield from _stored(item, own)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _stored(item, key)


def _fits(optimizer: Any, key: Any, tensor: Tensor, param: Tensor) -> bool:
    # A fused kernel that meets a state of another shape writes past its end.
    if not type(optimizer).__module__.startswith("torch.optim.") or isinstance(optimizer, _OTHER_SHAPES):
        return True
    return tensor.numel() == 1 or (key != "step" and tensor.shape == param.shape)


# ---- restoring


def given(value: Any, place: Callable[[Any, Tensor], Tensor], tensors: Mapping[str, Tensor], key: Any = None) -> Any:
    """A saved state with its tensors back in their places."""
    if isinstance(value, Stored):
        return place(key, tensors[value.key])
    if isinstance(value, dict):
        return {own: given(item, place, tensors, own) for own, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(given(item, place, tensors, key) for item in value)
    return _snapshot(value)


def _placer(param: Tensor, group: Mapping[str, Any], free: set[int]) -> Callable[[Any, Tensor], Tensor]:
    """The rule of torch for the device of a state; its dtype stays what was saved."""
    on_device = bool(group.get("capturable") or group.get("fused"))

    def place(key: Any, tensor: Tensor) -> Tensor:
        if key == "step":
            return tensor.to(param.device, torch.float32, copy=True) if on_device else tensor.clone()
        if tensor.shape == param.shape:
            if id(tensor) in free and tensor.device == param.device and tensor.stride() == param.stride():
                free.discard(id(tensor))  # two entries never share memory
                return tensor
            # In the parameter's own memory order: fused kernels walk both side by side.
            own = torch.empty_like(param, dtype=tensor.dtype, requires_grad=False)
            return own.copy_(tensor)
        return tensor.to(param.device, copy=True)

    return place


def _restore_group(group: dict[str, Any], saved: Mapping[str, Any], called: Mapping[int, str]) -> None:
    listed = group.get("param_names")
    own = {called[id(p)]: place for place, p in enumerate(group["params"])}
    order = [own[name] for name in saved["params"]]
    for entries in (group["params"], *([listed] if listed is not None else [])):
        entries[:] = [entries[place] for place in order]
    for key, value in saved["options"].items():
        if key in EXECUTION and key in group or (key == "param_names" and listed is not None):
            continue
        group[key] = _into(group.get(key), value)


def _into(old: Any, value: Any) -> Any:
    """The saved value; a tensor of this group keeps its identity, for a captured graph or a compiled step holds it."""
    if isinstance(old, Tensor) and isinstance(value, Tensor | float | int):
        new = torch.as_tensor(value)
        if new.numel() in (1, old.numel()):
            with torch.no_grad():
                return old.copy_(new.reshape(old.shape if new.numel() == old.numel() else ()))
    if type(old) is tuple and type(value) is tuple and len(old) == len(value):
        return tuple(_into(mine, item) for mine, item in zip(old, value, strict=True))
    return _snapshot(value)
