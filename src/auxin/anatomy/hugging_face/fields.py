"""Fields of configurations that count or list blocks, told by the words of their names and by their lengths."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from auxin.anatomy.blocks import Container
from auxin.anatomy.hugging_face.blueprint import ABOUT_DEPTH
from auxin.listing import module_at

PER_LAYER = re.compile(r"layer|block|depth|attn|attention|type|pattern")
INDICES = re.compile(r"ind(ex|ices|exes)|ids?$|only|skip")
# Caches for generating are made for as many layers as the second name says, which some configurations lack. Without it
# they go by the encoder's layers, and a deeper decoder finds no place in them.
CACHED = {"num_decoder_layers": ("decoder_layers", "num_layers")}


def configurations(prefix: str, config: Any, seen: set[int]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(prefix, fields) of a configuration and of those inside it, each once."""
    if id(config) not in seen:
        seen.add(id(config))
        yield prefix, vars(config)
        for name, value in reversed(vars(config).items()):
            if configures(name, value):
                yield from configurations(f"{prefix}{name}.", value, seen)


def configures(name: str, value: Any) -> bool:
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

    Examples:
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
