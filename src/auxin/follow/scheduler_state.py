"""Where a learning-rate schedule stands, as data; every scheduler of torch goes on exactly."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler

from auxin.errors import GrowthError

# Attributes that hold the user's own callables: their code stays the fresh object's, their state is saved.
_CALLABLES = ("lr_lambdas", "_scale_fn_custom")
_CODE = (FunctionType, BuiltinFunctionType, MethodType, type)
_INNER = "_schedulers"
KINDS = (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)
_KEPT = ("optimizer", _INNER, *_CALLABLES)


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """Where a scheduler stands.

    Args:
        scheduler: any of ``torch.optim.lr_scheduler`` or ``SWALR``, nested ones too, or any object with
            ``state_dict`` and ``load_state_dict``.

    Returns:
        Data for ``auxin.typed``. Functions are left out: the fresh scheduler has them; callable objects give their
        attributes.

    Raises:
        GrowthError: it holds something that cannot be copied.
    """
    own, kind, inside = _own(scheduler), type(scheduler).__name__, inner(scheduler)
    held = {id(one) for one in inside}
    kept = {k: v for k, v in _attributes(scheduler).items() if k not in _KEPT and id(v) not in held}
    data: dict[str, Any] = {"type": kind, "state": _copied(kept, kind)}
    if "lr_lambdas" in own:
        data["callables"] = [_callable_state(function) for function in own["lr_lambdas"]]
    if "_scale_fn_custom" in own:
        data["callables"] = [_callable_state(own["_scale_fn_custom"])]
    if inside or _INNER in own:
        data["schedulers"] = [scheduler_state(one) for one in inside]
    return data


def inner(scheduler: Any) -> list[Any]:
    """The schedulers that one drives: those in torch's list, and in an attribute of a class of another making."""
    own = _own(scheduler)
    if _INNER in own:
        return list(own[_INNER])
    return [value for value in own.values() if isinstance(value, KINDS)]


def check_scheduler(scheduler: Any, data: Mapping[str, Any]) -> None:
    """Whether ``restore_scheduler`` with these arguments would succeed; touches nothing.

    Raises:
        GrowthError: lists every difference.
    """
    kind = type(scheduler).__name__
    try:
        problems = list(_differences(scheduler, data, kind))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise GrowthError(
            f"The checkpoint's state for {kind} is not what auxin writes ({type(error).__name__}: {error})."
        ) from error
    if problems:
        listed = "\n  ".join(problems)
        raise GrowthError(
            f"The checkpoint's schedule does not fit this one:\n  {listed}\n"
            f"Build the same scheduler on the same optimizer as in the run that was saved, then ax.load(path, grower)."
        )


def restore_scheduler(scheduler: Any, data: Mapping[str, Any]) -> None:
    """Put a scheduler where the saved one stood; the learning rates themselves come with the optimizer's state.

    Args:
        scheduler: of the same type, around schedulers of the same types.
        data: what ``scheduler_state`` returned; copied.

    Raises:
        GrowthError: it does not fit; nothing was changed.
    """
    check_scheduler(scheduler, data)
    _restore(scheduler, data)


def _restore(scheduler: Any, data: Mapping[str, Any]) -> None:
    own = _own(scheduler)
    state = {key: _like(own.get(key), copy.deepcopy(value)) for key, value in data["state"].items()}
    if _loads_itself(scheduler):
        scheduler.load_state_dict(state)
    else:
        own.update(state)
    for function, saved in zip(_callables(scheduler), data.get("callables", ()), strict=True):
        if saved is not None:
            vars(_inside(function)).update(copy.deepcopy(saved))
    if isinstance(scheduler, lr_scheduler.CyclicLR):
        scheduler._init_scale_fn()  # the mode's own curve, which is a function
    for one, saved in zip(inner(scheduler), data.get("schedulers", ()), strict=True):
        _restore(one, saved)  # after its own way of loading: that may leave out some of what these have counted


def _loads_itself(scheduler: Any) -> bool:
    """Whether its own ``state_dict`` is used: not where that mixes in callables or other schedulers."""
    return not any(name in _own(scheduler) for name in (_INNER, *_CALLABLES))


def _attributes(scheduler: Any) -> Mapping[str, Any]:
    return scheduler.state_dict() if _loads_itself(scheduler) else _own(scheduler)


def _own(scheduler: Any) -> dict[str, Any]:
    return getattr(scheduler, "__dict__", {})


def _callables(scheduler: Any) -> list[Any]:
    own = _own(scheduler)
    return list(own["lr_lambdas"]) if "lr_lambdas" in own else [own[name] for name in _CALLABLES[1:] if name in own]


def _callable_state(function: Any) -> dict[str, Any] | None:
    """The attributes of a callable object; None for code without any."""
    function = _inside(function)
    if function is None or isinstance(function, _CODE) or not hasattr(function, "__dict__"):
        return None
    return _copied(vars(function), f"the function {function!r}")


def _copied(values: Mapping[str, Any], at: str) -> dict[str, Any]:
    """A copy of attributes, without those that are functions: code is the same in a fresh object."""
    found = {}
    for key, value in values.items():
        try:
            if not isinstance(_inside(value), _CODE):
                found[key] = copy.deepcopy(value)
        except Exception as error:
            raise GrowthError(
                f"{at}: its attribute {key!r}, a {type(value).__name__}, cannot be saved ({error}). Keep it elsewhere, "
                f"and numbers, text and lists in the scheduler."
            ) from error
    return found


def _inside(function: Any) -> Any:
    """What a ``functools.partial`` calls in the end."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _like(old: Any, value: Any) -> Any:
    """Tensors on the device where the fresh scheduler keeps its own."""
    if isinstance(value, Tensor):
        return value.to(old.device) if isinstance(old, Tensor) else value
    if type(value) in (list, tuple) and type(old) is type(value) and len(old) == len(value):
        return type(value)(_like(mine, item) for mine, item in zip(old, value, strict=True))
    return value


def _differences(scheduler: Any, data: Mapping[str, Any], at: str) -> Iterator[str]:
    if data["type"] != type(scheduler).__name__:
        yield f"{at}: it was saved from {data['type']}"
        return
    own, state = _own(scheduler), data["state"]
    if not isinstance(state, dict) or any(type(key) is not str or key in _KEPT for key in state):
        yield f"{at}: its state is not a set of attributes"
        return
    for name in ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums"):
        here, there = own.get(name), state.get(name)
        if isinstance(here, list) and isinstance(there, list) and len(here) != len(there):
            yield f"{at}: {name} has {len(there)} entries in the checkpoint, one per parameter group, here {len(here)}"
    functions, saved = _callables(scheduler), data.get("callables", [])
    if len(functions) != len(saved):
        yield f"{at}: it was saved with {len(saved)} functions, here are {len(functions)}"
    for index, (function, attributes) in enumerate(zip(functions, saved[: len(functions)], strict=True)):
        if attributes is not None and (_callable_state(function) is None or not isinstance(attributes, dict)):
            yield f"{at}: function {index} was an object with attributes, here it is {function!r}"
    inside, schedulers = inner(scheduler), data.get("schedulers", [])
    if len(inside) != len(schedulers):
        yield f"{at}: it was saved with {len(schedulers)} schedulers inside, here are {len(inside)}"
        return
    for index, (one, part) in enumerate(zip(inside, schedulers, strict=True)):
        yield from _differences(one, part, f"{at}[{index}] {type(one).__name__}")
