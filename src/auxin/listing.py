"""The modules, parameters and buffers of a network by name, as ``named_modules`` and the like of torch give them.

Some times faster, since nothing recurses: a growth asks for them again and again, whatever the depth of the network.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError

INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # a number between dots
BARE = nn.Module().__dict__  # what every module has
COMPOSED = "__composable_api"  # begins the names under which torch keeps what fully_shard and the like hang on a module


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
    found: dict[str, nn.Module] = {"": model}
    seen = {id(model)}
    waiting = [("", iter(model._modules.items()))]
    while waiting:
        prefix, children = waiting[-1]
        for name, child in children:
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                path = prefix + name
                found[path] = child
                if child._modules:  # most have none, and are not walked into
                    waiting.append((f"{path}.", iter(child._modules.items())))
                    break
        else:
            waiting.pop()
    return found


def modules_in(module: nn.Module) -> list[nn.Module]:
    """The modules that ``module.modules()`` gives, in no order worth mentioning."""
    found = {id(module): module}
    waiting = [module]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                if child._modules:
                    waiting.append(child)
    return list(found.values())


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that these modules hold themselves; a shared one as often as it is held."""
    return [p for module in modules if module._parameters for p in module._parameters.values() if p is not None]


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """``dict(model.named_parameters())``."""
    return _first(_held(named_modules(model).items(), "_parameters"))


def every_tensor(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and then every buffer, a shared one under each of its names."""
    modules: list[tuple[str, nn.Module]] = []
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        modules.append((path, module))
        prefix = f"{path}." if path else ""
        waiting += [(prefix + name, child) for name, child in reversed(module._modules.items()) if child is not None]
    yield from _held(modules, "_parameters").items()
    yield from _held(modules, "_buffers").items()


def own_names(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a module's attributes that not every module has; few layouts differ, and each is looked at once."""
    return _own_names(tuple(attributes))


@functools.lru_cache(maxsize=1024)
def _own_names(layout: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in layout if name not in BARE and not name.startswith(COMPOSED))


def lines_of(named: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """``name (shape)`` of each tensor.

    Raises:
        GrowthError: one of them is a nested tensor that has no shape.
    """
    words: dict[torch.Size, str] = {}  # few shapes differ, and writing one takes longer than the walk
    for name, tensor in named:
        if tensor.is_nested and tensor.layout is torch.strided:
            raise GrowthError(
                f"{name} is a nested tensor of layout torch.strided, which has no shape. Hold "
                "`torch.nested.to_padded_tensor(tensor, 0)` and the lengths of its parts instead."
            )
        shape = tensor.shape
        if shape not in words:
            words[shape] = str(tuple(shape))
        yield f"{name} {words[shape]}"


def _first(found: dict[str, Any]) -> dict[str, Any]:
    """Each tensor under the first of its names."""
    if len(set(map(id, found.values()))) == len(found):
        return found
    first: dict[int, str] = {}
    return {name: tensor for name, tensor in found.items() if first.setdefault(id(tensor), name) == name}


def _held(modules: Iterable[tuple[str, nn.Module]], kind: str) -> dict[str, Any]:
    """The tensors of one kind, each under every name that it has."""
    found: dict[str, Any] = {}
    for path, module in modules:
        own = getattr(module, kind)
        if own:
            prefix = f"{path}." if path else ""
            for name, tensor in own.items():
                if tensor is not None:
                    found[prefix + name] = tensor
    return found


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


def unnumbered(name: str) -> str:
    """A name with ``*`` in place of its numbers."""
    return INDEX.sub("*", name)


def folded(
    names: Sequence[str], star: bool = False, fits: Callable[[str, int], bool] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Names that differ in their numbers alone, as few patterns: ``layers.0-11.fc``, or ``layers.*.fc``.

    Args:
        names: alike but for their numbers, each once.
        star: write ``*`` for numbers that differ.
        fits: whether a pattern may stand for that many names.

    Yields:
        Each pattern with the names that it stands for; every name once.
    """
    rows = [name.split(".") for name in names]
    values = [list(dict.fromkeys(row[n] for row in rows)) for n in range(len(rows[0]))]
    varying = [n for n, found in enumerate(values) if len(found) > 1]
    text = ".".join(found[0] if len(found) == 1 else "*" if star else _ranges(found) for found in values)
    whole = math.prod(len(found) for found in values) == len(names)
    if not varying or (whole and (fits is None or fits(text, len(names)))):
        yield text, list(names)
        return
    at = min(varying, key=lambda n: len(values[n]))
    for value in values[at]:
        yield from folded([name for name, row in zip(names, rows, strict=True) if row[at] == value], star, fits)


def in_words(names: Iterable[str], most: int = 6) -> str:
    """Names of tensors, those of repeated blocks and of modules side by side in one: ``layers.0-3.{q,k,v}.weight``."""
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        alike.setdefault(unnumbered(name), []).append(name)
    beside: dict[tuple[str, str], list[str]] = {}
    for pattern in (pattern for group in alike.values() for pattern, _ in folded(group)):
        path, _, leaf = pattern.rpartition(".")
        above, _, module = path.rpartition(".")
        beside.setdefault((above, leaf), []).append(module)
    found = []
    for (above, leaf), modules in beside.items():
        middle = modules[0] if len(modules) == 1 else "{" + ",".join(modules) + "}"
        found.append(".".join(filter(None, (above, middle, leaf))))
    more = [f"{len(found) - most} more"] if len(found) > most else []
    return ", ".join(found[:most] + more)


def _ranges(numbers: Iterable[str]) -> str:
    """``0-3,5`` of 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
