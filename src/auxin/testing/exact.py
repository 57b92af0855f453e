"""Everything that an object holds, as comparable facts: identities, values to the bit, order of dictionaries."""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

NUMBERS = {int, float, bool}
CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.CodeType)


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's bits; of one without values its layout."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return f"{tensor.layout} on {tensor.device}"
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=16).hexdigest()


def exact(value: Any, leave_out: Iterable[Any] = ()) -> Exact:
    """Record all that hangs on ``value``; objects in ``leave_out`` are recorded by identity only."""
    left = {id(v) for v in leave_out}
    facts: dict[str, Any] = {}
    held: list[Any] = []
    stack: list[tuple[str, Any]] = [("", value)]
    seen: set[int] = set()
    while stack:
        path, item = stack.pop()
        inner = () if id(item) in left else _inside(item)
        facts[path] = _fact(item)
        if inner:
            if id(item) in seen:
                continue
            seen.add(id(item))
            stack += [(f"{path}{name}", child) for name, child in inner]
        held.append(item)
    return Exact(facts, held)


@dataclasses.dataclass(frozen=True, eq=False)
class Exact:
    """What was recorded: a fact for each path. ``held`` keeps the objects, so that no identity is used twice."""

    facts: Mapping[str, Any]
    held: list[Any]

    def values(self) -> list[Any]:
        """The facts without identities."""
        return [(path, fact[1:] if isinstance(fact, tuple) else None) for path, fact in self.facts.items()]

    def differences(self, later: Exact) -> list[str]:
        """Paths under which the two differ, the root itself left out."""
        here, there = ({path: fact for path, fact in e.facts.items() if path} for e in (self, later))
        changed = [path for path in here if path in there and here[path] != there[path]]
        return [*changed, *(path for path in there if path not in here), *(path for path in here if path not in there)]


def _fact(item: Any) -> Any:
    if isinstance(item, Tensor):
        grad = item.grad if item.is_leaf else None
        kept = None if grad is None else (id(grad), digest(grad))
        return id(item), tuple(item.shape), item.dtype, str(item.device), item.requires_grad, digest(item), kept
    if isinstance(item, Mapping):
        return id(item), tuple(_key(k) for k in item)
    if isinstance(item, list):
        return id(item), repr(item) if _only_numbers(item) else len(item)
    if isinstance(item, (tuple, frozenset)):
        return type(item), repr(item) if _only_numbers(item) else len(item)
    if item is None or isinstance(item, (bool, int, float, complex, str, bytes)):
        return type(item), repr(item)
    if isinstance(item, types.MethodType):
        return id(item.__self__), id(item.__func__)
    return id(item)


def _inside(item: Any) -> list[tuple[str, Any]]:
    """What an object holds, under a name each."""
    if isinstance(item, (Tensor, *CODE)):
        return []
    if isinstance(item, Mapping):
        return [(f"[{_key(k)}]", v) for k, v in item.items()]
    if isinstance(item, (list, tuple)):
        return [] if _only_numbers(item) else [(f"[{i}]", v) for i, v in enumerate(item)]
    if isinstance(item, (set, frozenset)):
        return [("{}", tuple(sorted(_key(v) for v in item)))]
    own = getattr(item, "__dict__", None)
    return [(f".{k}", v) for k, v in own.items()] if isinstance(own, dict) else []


def _only_numbers(items: Iterable[Any]) -> bool:
    """Whether one fact tells them all: generators hold lists of some hundred."""
    return set(map(type, items)) <= NUMBERS


def _key(key: Any) -> str:
    return repr(key) if isinstance(key, (str, int, float, bool, type(None), tuple)) else f"#{id(key)}"
