"""Where a network refers to one of its modules: as a child, and in plain attributes beside that."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from auxin.change import Alias, Rewire
from auxin.listing import join, module_at, named_modules, own_names


def places(model: nn.Module, module: nn.Module) -> list[str]:
    """Every path at which ``module`` is a child of another module; one that is there under two paths counts once."""
    return [join(path, name) for path, m in model.named_modules() for name, c in m._modules.items() if c is module]


def aliases(model: nn.Module, rewire: Rewire) -> tuple[Alias, ...]:
    """Plain lists and tuples in the model that hold the very children of a module in their order, so that they follow.

    Args:
        model: the network before the change.
        rewire: what becomes of the children.
    """
    children = [id(child) for child in module_at(model, rewire.path)._modules.values() if child is not None]
    found = []
    for path, module in named_modules(model).items() if children else ():
        for name in own_names(module.__dict__):
            value = module.__dict__[name]
            if type(value) in (list, tuple) and len(value) == len(children) and list(map(id, value)) == children:
                found.append(Alias(path, name, rewire))
    return tuple(found)


def strays(model: nn.Module, module: nn.Module, follow: Iterable[Alias] = ()) -> list[str]:
    """Plain attributes, or lists, tuples, sets and dicts in them, that hold ``module`` and are not in ``follow``."""
    known = {(alias.path, alias.name) for alias in follow}
    found = []
    for path, holder in model.named_modules():
        for name, value in holder.__dict__.items():
            if name == "_modules" or (path, name) in known:
                continue
            held = value.values() if isinstance(value, dict) else value
            inside = isinstance(held, (list, tuple, set, frozenset, type({}.values())))
            if value is module or (inside and any(item is module for item in held)):
                found.append(join(path, name))
    return found
