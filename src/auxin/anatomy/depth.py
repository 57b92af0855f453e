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

from torch import Tensor, nn

from auxin.anatomy.blocks import CONTAINERS, Container
from auxin.anatomy.rebuilt import ABOUT_DEPTH, Blueprint
from auxin.change import MISSING, Assign
from auxin.listing import join, module_at

PER_LAYER = re.compile(r"layer|block|depth|attn|attention|type|pattern")
INDICES = re.compile(r"ind(ex|ices|exes)|ids?$|only|skip")
# Caches for generating are made for as many layers as the second name says, which some configurations lack. Without it
# they go by the encoder's layers, and a deeper decoder finds no place in them.
CACHED = {"num_decoder_layers": ("decoder_layers", "num_layers")}
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
    for path, module in block.named_modules():
        for name, value in module.__dict__.items():
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


def _in_configuration(
    model: nn.Module, blueprint: Blueprint, container: Container, sources: Sequence[int], seen: set[int]
) -> dict[str, Any]:
    """Fields of the configuration, and of those inside it, that look like it."""
    blocks = dataclasses.replace(list_at(model, container), apart="decoder" in blueprint.path)
    configs = _configurations("", blueprint.owner.config, seen)
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
        if _configures(name, value):
            yield from _configurations(f"{name}.", value, seen)


def _configurations(prefix: str, config: Any, seen: set[int]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(prefix, fields) of a configuration and of those inside it, each once."""
    if id(config) not in seen:
        seen.add(id(config))
        yield prefix, vars(config)
        for name, value in reversed(vars(config).items()):
            if _configures(name, value):
                yield from _configurations(f"{prefix}{name}.", value, seen)


def _configures(name: str, value: Any) -> bool:
    """Whether an attribute is a configuration: a plain object that is called so."""
    plain = not isinstance(value, (nn.Module, Tensor, type)) and isinstance(getattr(value, "__dict__", None), dict)
    return plain and ("config" in name.lower() or type(value).__name__.lower().endswith("config"))


@dataclass(frozen=True)
class BlockList:
    """What fields about a list of blocks are compared with.

    Attributes:
        path: of the list.
        length: how many blocks there are.
        stages: number of lists like it, where it is one stage of several; 0 where it is not.
        apart: whether the fields belong to the decoder alone, as those of a configuration of its own do.
    """

    path: str
    length: int
    stages: int = 0
    apart: bool = False

    @property
    def stage(self) -> int:
        """Which of the stages it is: the last number in its path."""
        return int(next(part for part in reversed(self.path.split(".")) if part.isdecimal()))


def list_at(model: nn.Module, container: Container) -> BlockList:
    """The list of a container, with the number of stages around it."""
    parts = container.path.split(".")
    numeric = [i for i, part in enumerate(parts) if part.isdecimal() and i]
    stages = len(module_at(model, ".".join(parts[: numeric[-1]]))._modules) if numeric else 0
    return BlockList(container.path, len(container.names), stages)


def fields_followed(fields: Mapping[str, Any], blocks: BlockList, sources: Sequence[int]) -> dict[str, Any]:
    """New values of the fields that count or list the blocks.

    Args:
        fields: attributes of a module or of a configuration, or a configuration as it stands in a file.
        blocks: the list, as it is.
        sources: for each position of the new depth, the index of the old block whose settings hold there.

    Returns:
        Only the fields that change.

    Example:
        >>> config = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"], "hidden_size": 8}
        >>> fields_followed(config, BlockList("model.layers", 2), [0, 0, 1])
        {'num_hidden_layers': 3, 'layer_types': ['full', 'full', 'sliding']}
    """
    length, new = blocks.length, len(sources)
    counters = {n: new for n, v in fields.items() if type(v) is int and v == length and ABOUT_DEPTH.search(n.lower())}
    found = _of_this_side(counters, blocks) if new != length else {}
    for counter, (missing, encoder) in CACHED.items():
        if missing not in fields and found.get(counter, 0) > fields.get(encoder, new):
            found[missing] = new
    lists: dict[str, Any] = {}
    for name, value in fields.items():
        if not isinstance(value, (list, tuple, str)) or not value or any(isinstance(v, nn.Module) for v in value):
            continue
        if blocks.stages and len(value) == blocks.stages and not isinstance(value, str):
            remade = _staged(name.lower(), value, blocks, new)  # it is about the stages, not about the blocks of one
        else:
            remade = _listed(name.lower(), value, length, sources)
        if remade is not None and remade != value:
            lists[name] = remade
    return found | _of_this_side(lists, blocks)


def _of_this_side(found: dict[str, Any], blocks: BlockList) -> dict[str, Any]:
    """Where there are an encoder and a decoder, the fields of the one that the path leads to."""
    own = {name: v for name, v in found.items() if "decoder" in name}
    if "decoder" in blocks.path:
        neither = {name: v for name, v in found.items() if "encoder" not in name}
        return neither | own if blocks.apart else own or neither
    return {name: v for name, v in found.items() if name not in own}


def _listed(name: str, value: Any, length: int, sources: Sequence[int]) -> Any:
    """A field with one entry for each block, or with the indices of some; None if it is neither."""
    if isinstance(value, str):
        if len(value) != length or length < 2 or "pattern" not in name:
            return None
        return "".join(value[source] for source in sources)
    if not PER_LAYER.search(name):
        return None
    increasing = all(type(v) is int and 0 <= v < length for v in value) and list(value) == sorted(set(value))
    if increasing and (INDICES.search(name) or (ABOUT_DEPTH.search(name) and list(value) == list(range(length)))):
        return type(value)(p for p, source in enumerate(sources) if source in value)
    if len(value) == length:
        return type(value)(value[source] for source in sources)
    return None


def _staged(name: str, value: Any, blocks: BlockList, new: int) -> Any:
    """A field with the depth of every stage, where the list of blocks is one stage of several."""
    if new == blocks.length or not ABOUT_DEPTH.search(name) or value[blocks.stage] != blocks.length:
        return None
    return type(value)(new if i == blocks.stage else v for i, v in enumerate(value))
