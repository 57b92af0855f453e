"""The modules, parameters and buffers of a network by name, as ``named_modules`` and the like of torch give them.

Some times faster, since nothing recurses: a growth asks for them again and again, whatever the depth of the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError


@dataclass(frozen=True, eq=False)
class Listing:
    """What a network holds, each under its first name, in torch's order."""

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]


def listing(model: nn.Module) -> Listing:
    """All three in one walk."""
    modules = named_modules(model)
    return Listing(modules, _first(_held(modules.items(), "_parameters")), _first(_held(modules.items(), "_buffers")))


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """``dict(model.named_modules())``."""
    return dict(_walk(model, set()))


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """``dict(model.named_parameters())``."""
    return _first(_held(_walk(model, set()), "_parameters"))


def every_tensor(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and then every buffer, a shared one under each of its names."""
    modules = list(_walk(model, None))
    yield from _held(modules, "_parameters")
    yield from _held(modules, "_buffers")


def lines_of(named: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """``name (shape)`` of each tensor."""
    words: dict[torch.Size, str] = {}  # few shapes differ, and writing one takes longer than the walk
    for name, tensor in named:
        shape = tensor.shape
        if shape not in words:
            words[shape] = str(tuple(shape))
        yield f"{name} {words[shape]}"


def _walk(model: nn.Module, seen: set[int] | None) -> Iterator[tuple[str, nn.Module]]:
    """The modules in torch's order; each once, or with ``seen=None`` under every path."""
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if seen is not None:
            if id(module) in seen:
                continue
            seen.add(id(module))
        yield path, module
        children = module._modules
        if children:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, child) for name, child in reversed(children.items()) if child is not None]


def _first(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Each tensor under the first of its names."""
    found = dict(named)
    if len(set(map(id, found.values()))) == len(found):
        return found
    first: dict[int, str] = {}
    return {name: tensor for name, tensor in found.items() if first.setdefault(id(tensor), name) == name}


def _held(modules: Iterable[tuple[str, nn.Module]], kind: str) -> Iterator[tuple[str, Tensor]]:
    for path, module in modules:
        own = getattr(module, kind)
        if own:
            prefix = f"{path}." if path else ""
            for name, tensor in own.items():
                if tensor is not None:
                    yield prefix + name, tensor


def module_at(model: nn.Module, path: str, what: str = "at") -> nn.Module:
    """Return the module at ``path`` ("" is the model itself).

    Raises:
        GrowthError: there is none; names the nearest path that exists and its children.
    """
    module = model
    walked: list[str] = []
    for name in path.split(".") if path else []:
        child = module._modules.get(name)
        if child is None:
            where = ".".join(walked) or "the model"
            names = ", ".join(repr(n) for n in list(module._modules)[:12]) or "none"
            raise GrowthError(
                f"{what}={path!r}: {where} ({type(module).__name__}) has no child {name!r}; its children: {names}."
            )
        module = child
        walked.append(name)
    return module


def join(path: str, name: str) -> str:
    """``path.name``, or ``name`` at the root."""
    return f"{path}.{name}" if path else name
