"""What a configuration says about a list of blocks, found by building models from it: on the meta device, so that it
costs no memory and hardly any time.

That a field is as large as a list is long says little: a head of three layers stands in models of three blocks too.
A field counts a list if, and only if, the model built from the changed field has a longer one there and nowhere else.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from auxin.listing import module_at
from auxin.randomness import random_state

ABOUT_DEPTH = re.compile(r"layer|block|depth")
LIMIT, LIMIT_OF_LAST = 32, 8  # builds per search


def configured(module: nn.Module) -> bool:
    """Whether a module is built from a configuration that it holds, as those of Hugging Face are."""
    return hasattr(module, "save_pretrained") and hasattr(getattr(module, "config", None), "to_dict")


def configuration(module: nn.Module) -> Any:
    """A configured module's configuration, as it comes back from a file."""
    return from_file(module.config)


def on_meta(module: nn.Module, config: Any) -> nn.Module:
    """What the module's own class builds from a configuration, without memory for it."""
    with torch.device("meta"), random_state():
        return type(module)(config)


def from_file(config: Any) -> Any:
    """A configuration as it comes back from a file, with the ways of computing that a file does not hold."""
    ways = {name: getattr(config, f"_{name}", None) for name in ("attn_implementation", "experts_implementation")}
    return type(config).from_dict(config.to_dict() | {name: way for name, way in ways.items() if way is not None})


@dataclass(frozen=True)
class Blueprint:
    """The configuration above a list of blocks, by which its class builds it.

    Attributes:
        path: of the module that the configuration builds, the outermost one around the list.
        owner: that module.
        inside: path of the list in it.
        twin: what its class builds from the configuration as it stands.
    """

    path: str
    owner: nn.Module
    inside: str
    twin: nn.Module

    @classmethod
    def above(cls, model: nn.Module, path: str) -> Blueprint | None:
        """The one that builds the list at ``path`` as long as it is; None where there is none."""
        parts = path.split(".") if path else []
        for i in range(len(parts)):
            above, inside = ".".join(parts[:i]), ".".join(parts[i:])
            owner = module_at(model, above)
            if not configured(owner):
                continue
            try:
                twin = on_meta(owner, configuration(owner))
            except Exception:  # a class of the user's with arguments of its own
                continue
            if _lengths(twin).get(inside) == _lengths(owner)[inside]:
                return cls(above, owner, inside, twin)
        return None

    def with_blocks(
        self, sources: Sequence[int], proposed: Mapping[str, Any]
    ) -> tuple[dict[str, Any], nn.Module | None]:
        """The fields that make the list as long as ``sources``, and what is built with them.

        Args:
            sources: the old block that stands at each position of the new depth, or that it is a copy of.
            proposed: new values of fields that seem to count or list the blocks, by dotted name.

        Returns:
            Fields that change no other list, if there are any, and build blocks of the tensors of their sources, with
            one number more if need be. None of them where no field makes the list so long. All that is proposed, and
            None, where nothing at all could be built.
        """
        found = self._first(self._candidates(len(sources), proposed), len(sources))
        if isinstance(found, bool):
            return ({}, self.twin) if found or not proposed else (dict(proposed), None)
        if self._fits(found[1], sources):
            return found
        for name, value in itertools.islice(self._last_ones(sources, found[0]), LIMIT_OF_LAST):
            fields = {**found[0], name: value}
            twin = self._built(fields)
            if twin is not None and self._fits(twin, sources):
                return fields, twin
        return found

    def _first(self, candidates: Iterable[dict[str, Any]], length: int) -> tuple[dict[str, Any], nn.Module] | bool:
        """The first fields that change this list alone, or else too; if none do, whether anything could be built."""
        most, built = None, False
        before = _lengths(self.twin)
        for fields in itertools.islice(candidates, LIMIT):
            twin = self._built(fields)
            if twin is None:
                continue
            built, lengths = True, _lengths(twin)
            if lengths.get(self.inside) != length:
                continue
            if all(lengths.get(p) == n for p, n in before.items() if not f"{p}.".startswith(f"{self.inside}.")):
                return fields, twin
            most = most or (fields, twin)
        return most or built

    def _fits(self, twin: nn.Module, sources: Sequence[int]) -> bool:
        """Whether each block has the tensors of its source."""
        ours, theirs = self.twin.get_submodule(self.inside), twin.get_submodule(self.inside)
        old, new = (list(blocks._modules.values()) for blocks in (ours, theirs))
        return len(new) == len(sources) and all(
            _shapes(old[source]) == _shapes(block) for source, block in zip(sources, new, strict=True)
        )

    def _last_ones(self, sources: Sequence[int], fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Other numbers that may be the index of a last block, moved too."""
        length = _lengths(self.owner)[self.inside]
        for name, value, number in _numbers(self.owner.config, len(sources) - length):
            if name not in fields and number == len(sources) - 1:
                yield name, value

    def _candidates(self, new: int, proposed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What is proposed, all of it and each counter alone; then each number as large as the list is long; then each
        that is about depth.
        """
        counts = [(name, value) for name, value in proposed.items() if type(value) is int]
        lists = {name: value for name, value in proposed.items() if type(value) is not int}
        if proposed:
            yield dict(proposed)
        by = new - _lengths(self.owner)[self.inside]
        numbers = list(_numbers(self.owner.config, by)) if by else []
        equal = [(name, value) for name, value, number in numbers if number == new]
        about = [(name, value) for name, value, number in numbers if number != new and ABOUT_DEPTH.search(name)]
        for name, value in (*counts, *equal, *about):
            yield {**lists, name: value}
            if lists:
                yield {name: value}

    def _built(self, fields: Mapping[str, Any]) -> nn.Module | None:
        config = copy.deepcopy(self.owner.config)
        for dotted, value in fields.items():
            *through, name = dotted.split(".")
            target = config
            for part in through:
                target = vars(target)[part]
            vars(target)[name] = value
        try:
            return on_meta(self.owner, from_file(config))
        except Exception:  # whatever a configuration that cannot be brings about
            return None


def _shapes(module: nn.Module | None) -> dict[str, torch.Size]:
    return {} if module is None else {name: t.shape for name, t in module.state_dict().items()}


def _lengths(module: nn.Module) -> dict[str, int]:
    """Number of entries of every container, by path."""
    kinds = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return {path: len(m._modules) for path, m in module.named_modules(remove_duplicate=False) if isinstance(m, kinds)}


def _numbers(config: Any, by: int) -> Iterator[tuple[str, Any, int]]:
    """Every whole number of a configuration, or of a list in it, plus ``by``: (field, its value then, the number)."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int:
            yield name, value + by, value + by
        elif type(value) in (list, tuple) and all(type(v) is int for v in value):
            for i, v in enumerate(value):
                yield name, type(value)([*value[:i], v + by, *value[i + 1 :]]), v + by
        elif hasattr(value, "to_dict"):
            yield from ((f"{name}.{inner}", then, number) for inner, then, number in _numbers(value, by))
