"""What counts or lists the blocks of a network, and has to follow when there are more: the numbers that blocks carry,
counters beside them, and the fields of configurations.

Found by structure: a number that every block carries and that runs with its position, an integer that equals the count
of blocks, a list that has one entry for each. Where that cannot be told apart, what it is about is taken from the words
of its name; a change is proved afterwards in any case.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from auxin.anatomy.blocks import CONTAINERS, Container
from auxin.anatomy.hugging_face.blueprint import Blueprint
from auxin.anatomy.hugging_face.fields import configurations, configures, fields_followed, list_at
from auxin.change import MISSING, Assign
from auxin.listing import join, module_at, named_modules, own_names

COUNTS = (int, str, list, tuple)
NUMBER = re.compile(r"(^|_)(idx|index|id|layer|block|depth|number)(_|$)")


@dataclass(frozen=True)
class Number:
    """An attribute of blocks, or of modules inside them, that is their position plus ``offset``."""

    name: str
    offset: int


def numbers(container: Container) -> tuple[Number, ...]:
    """The attributes by which the blocks of a list know their position.

    Every integer under one name, in all blocks, must run with the position; in fewer than three blocks its name must
    say what it is, since two dilations 1, 2 run as well.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for position in range(len(container.names)):  # all: the first that has a number may stand behind others
        for _, name, value in _integers(container.child(position)):
            found.setdefault(name, []).append((position, value))
    kept = []
    for name, pairs in found.items():
        offsets, positions = {value - position for position, value in pairs}, {position for position, _ in pairs}
        named = NUMBER.search(name) is not None and min(offsets) >= 0
        if len(offsets) == 1 and (len(positions) >= 3 or named):
            kept.append(Number(name, offsets.pop()))
    return tuple(kept)


def numbered(block: nn.Module, known: Sequence[Number], position: int) -> dict[tuple[str, str], int]:
    """(path inside the block, attribute) -> value, for a block that is to stand at ``position``."""
    offsets = {number.name: number.offset for number in known}
    return {(path, name): position + offsets[name] for path, name, _ in _integers(block) if name in offsets}


def followed(
    model: nn.Module,
    container: Container,
    sources: Sequence[int],
    homes: Mapping[int, int],
    known: Sequence[Number] | None = None,
) -> tuple[Assign, ...]:
    """What has to change around a list of blocks, and in the old blocks, when its depth changes.

    Args:
        model: the network, as it is.
        container: the list.
        sources: for each position of the new depth, the index of the old block whose settings hold there.
        homes: index of an old block -> its position in the new depth.
        known: what ``numbers(container)`` has found, where that was asked before.
    """
    known, found = numbers(container) if known is None else known, []
    for source, position in homes.items() if known else ():
        block, prefix = container.child(source), join(container.path, container.names[source])
        for (path, name), value in numbered(block, known, position).items():
            at = join(prefix, path) if path else prefix
            old = module_at(model, at).__dict__[name]
            found += [Assign(at, name, old, value)] if old != value else []
    return (*found, *_around(model, container, sources))


def _integers(block: nn.Module) -> Iterator[tuple[str, str, int]]:
    for path, module in named_modules(block).items():
        for name in own_names(module.__dict__):
            value = module.__dict__[name]
            if type(value) is int and name[0] != "_":
                yield path, name, value


def _around(model: nn.Module, container: Container, sources: Sequence[int]) -> Iterator[Assign]:
    """Counters and lists of the modules above the container, and of the configurations that they refer to.

    Where a configuration builds the list, what a model built from the changed one has says what follows. Elsewhere the
    names have to do.
    """
    seen: set[int] = set()
    blueprint = Blueprint.above(model, container.path)
    above = _above(container.path)
    if blueprint is not None:
        names = _in_configuration(model, blueprint, container, sources, seen)
        fields, twin = blueprint.with_blocks(sources, names)
        for name, value in fields.items():
            yield Assign(blueprint.path, f"config.{name}", _value(blueprint.owner.config, name), value)
        if fields and twin is not None:
            inner = [path for path in above if len(path) >= len(blueprint.path)]
            above = [path for path in above if path not in inner]
            yield from (one for path in inner for one in _as_built(model, blueprint, twin, path, seen))
    for path in above:
        if not _about_another(model, container, path):
            yield from _by_name(model, container, sources, path, seen)


def _above(path: str) -> list[str]:
    """Paths of the modules above a container, the model first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(len(parts) or 1)]


def _by_name(
    model: nn.Module, container: Container, sources: Sequence[int], path: str, seen: set[int]
) -> Iterator[Assign]:
    """Attributes of the module at ``path`` that look like it."""
    blocks = dataclasses.replace(list_at(model, container), apart="decoder" in path)
    for prefix, fields in _holders(module_at(model, path), seen):
        for name, value in fields_followed(fields, blocks, sources).items():
            yield Assign(path, f"{prefix}{name}", fields.get(name, MISSING), value)
    for name, fields in _dicts(module_at(model, path), seen):
        changed = fields_followed(fields, blocks, sources)
        if type(fields) is dict:
            yield from (Assign(path, f"{name}.{key}", fields[key], value) for key, value in changed.items())
        elif changed:  # a new one: those of diffusers are not meant to be written to, and keep their entries twice
            yield Assign(path, name, fields, type(fields)({**fields, **changed}))


def _in_configuration(
    model: nn.Module, blueprint: Blueprint, container: Container, sources: Sequence[int], seen: set[int]
) -> dict[str, Any]:
    """Fields of the configuration, and of those inside it, that look like it."""
    blocks = dataclasses.replace(list_at(model, container), apart="decoder" in blueprint.path)
    configs = configurations("", blueprint.owner.config, seen)
    return {f"{p}{n}": v for p, own in configs for n, v in fields_followed(own, blocks, sources).items()}


def _as_built(model: nn.Module, blueprint: Blueprint, twin: nn.Module, path: str, seen: set[int]) -> Iterator[Assign]:
    """Attributes of the module at ``path`` that are others in the model built from the changed configuration."""
    inside = path[len(blueprint.path) :].removeprefix(".")
    before, after = (dict(_holders(module_at(built, inside), set())) for built in (blueprint.twin, twin))
    for prefix, fields in _holders(module_at(model, path), seen):
        for name, value in fields.items():
            old, new = before.get(prefix, {}).get(name), after.get(prefix, {}).get(name)
            plain = type(value) in COUNTS and type(old) is type(value) is type(new) and not name.startswith("_")
            if plain and old == value and old != new:
                yield Assign(path, f"{prefix}{name}", value, new)


def _about_another(model: nn.Module, container: Container, path: str) -> bool:
    """Whether what the module at ``path`` counts is another list: as long as this one, and of like blocks, as this one
    is not.
    """
    owner, inside = module_at(model, path), container.path[len(path) :].removeprefix(".")
    if _alike(container.module):
        return False
    for other, module in owner.named_modules():
        nested = f"{other}.".startswith(f"{inside}.") or f"{inside}.".startswith(f"{other}.")
        lists = isinstance(module, CONTAINERS) and len(module._modules) == len(container.names)
        if lists and not nested and _alike(module):
            return True
    return False


def _alike(container: nn.Module) -> bool:
    """Whether the children are of one class, with parameters."""
    children = list(container.children())
    return len({type(child) for child in children}) == 1 and any(True for _ in container.parameters())


def _value(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = vars(config).get(part, MISSING)
    return config


def _holders(owner: nn.Module, seen: set[int]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(prefix, attributes) of a module and of the configuration objects below it, each once."""
    yield "", owner.__dict__
    for name, value in reversed(owner.__dict__.items()):
        if configures(name, value):
            yield from configurations(f"{name}.", value, seen)


def _dicts(owner: nn.Module, seen: set[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, fields) of the configurations of a module that are dicts, as those of diffusers are, each once."""
    config = getattr(owner, "config", None)
    for name, value in list(owner.__dict__.items()):
        told = isinstance(value, dict) and (value is config or "config" in name.lower())
        if told and id(value) not in seen and all(type(key) is str for key in value):
            seen.add(id(value))
            yield name, value
