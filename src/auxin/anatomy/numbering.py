"""Blocks that know their position: whether two of a list say the same one."""

from __future__ import annotations

from torch import nn

from auxin.anatomy.depth import NUMBER
from auxin.anatomy.tree import join


def repeated(container: nn.Module, new: set[str]) -> str:
    """The first number that a new child of a list has in common with an old one, in words; "" if there is none.

    A number is a whole one under a name such as ``layer_idx`` that differs in all old children, of which there are at
    least two. Caches for generating are kept by it: two blocks of one number write into one place.

    Args:
        container: the list as it is now.
        new: names of the children that were added.
    """
    olds: dict[tuple[str, str], dict[int, str]] = {}
    shared: set[tuple[str, str]] = set()
    for child, key, value in _numbers(container):
        if child not in new and olds.setdefault(key, {}).setdefault(value, child) != child:
            shared.add(key)
    for child, key, value in _numbers(container):
        if child in new and key not in shared and len(olds.get(key, {})) > 1 and value in olds[key]:
            return f"{join(child, join(*key))} is {value}, as in {olds[key][value]}"
    return ""


def _numbers(container: nn.Module) -> list[tuple[str, tuple[str, str], int]]:
    """(child, (path inside, name), value) of everything that may be a number."""
    return [
        (name, (path, leaf), value)
        for name, child in container._modules.items()
        if child is not None
        for path, module in child.named_modules()
        for leaf, value in module.__dict__.items()
        if type(value) is int and NUMBER.search(leaf) and not leaf.startswith("_")
    ]
