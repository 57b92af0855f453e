"""Blocks that know their position, or differ by it: whether two of a list say the same one, and by which numbers the
blocks of a list differ.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from auxin.anatomy.depth import NUMBER
from auxin.listing import join, named_modules, own_names

NUMBERS = frozenset((int, float))


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


def differing(blocks: Mapping[int, nn.Module], known: Collection[str]) -> dict[str, dict[int, str]]:
    """The plain numbers in which blocks of one class differ: name inside the block -> index of the block -> its value.

    Args:
        blocks: by index.
        known: attributes that follow the position, so that they are no matter.
    """
    tables = {index: dict(_plain(block, known)) for index, block in blocks.items()}
    if all(table == tables[next(iter(tables))] for table in tables.values()):
        return {}
    names = [name for name in next(iter(tables.values())) if all(name in table for table in tables.values())]
    values = {name: {index: _text(table[name]) for index, table in tables.items()} for name in names}
    return {name: each for name, each in values.items() if len(set(each.values())) > 1}


def _text(numbers: tuple[float, ...]) -> str:
    text = ", ".join(f"{number:g}" for number in numbers)
    return text if len(numbers) == 1 else f"({text})"


def _plain(block: nn.Module, known: Collection[str]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """(path of an attribute, its numbers) of all numbers and tuples of numbers."""
    for path, module in named_modules(block).items():
        for name in own_names(module.__dict__):
            value = module.__dict__[name]
            numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            if numbers and NUMBERS.issuperset(map(type, numbers)) and name not in known and not name.startswith("_"):
                yield join(path, name), numbers


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
