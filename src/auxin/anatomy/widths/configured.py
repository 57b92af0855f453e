"""The fields of a configuration that say a width: those from which its class builds the shapes that are wanted."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from auxin.anatomy.hugging_face.blueprint import configuration, configured, from_file, on_meta
from auxin.anatomy.widths.groups import Width

ABOUT_WIDTH = re.compile(r"inner|intermediate|ffn|hidden|width|dim|size")
ABOUT_EXPERTS = re.compile(r"expert|moe|router")
LIMIT = 48  # models built from a configuration per search


def fields_for(model: nn.Module, shapes: Mapping[str, torch.Size], width: Width) -> list[tuple[str, str, Any, Any]]:
    """(path, field, old, new) of the configuration that builds the grown network; nothing where none does."""
    if _as_configured(model) is None:
        return []
    wanted = _wanted(model, shapes)
    for fields in itertools.islice(_candidates(model, width), LIMIT):
        grown = _built(model, fields)
        if grown is not None and _shapes(grown) == wanted:
            return [("", f"config.{name}", old, new) for name, (old, new) in fields.items()]
    return []


def fields_that_count(
    model: nn.Module,
    shapes: Mapping[str, torch.Size],
    counts: Collection[tuple[int, int]],
    said: Sequence[tuple[str, str, int]],
) -> list[tuple[str, str, Any, Any]]:
    """(path, name, old, new) of the fields of a configuration that build so many experts, and of all that follows.

    Args:
        model: the network.
        shapes: of the tensors that are resized, by name.
        counts: numbers before and after: of experts, and of those that are chosen.
        said: (path, name, new) of attributes of modules, which what is built has to hold too.

    Returns:
        The fields, and those attributes of modules anywhere that what is built from them holds otherwise; nothing where
        no fields do.
    """
    twin = _as_configured(model)
    if twin is None:
        return []
    wanted = _wanted(model, shapes)
    pairs = sorted((p for p in _numbers(model.config)), key=lambda pair: ABOUT_EXPERTS.search(pair[0]) is None)
    singles = [(name, old, new) for name, value in pairs for old, new in counts if value == old]
    chosen = (group for count in (1, 2, 3) for group in itertools.combinations(singles, count))
    for group in itertools.islice(chosen, LIMIT):
        fields = {name: (old, new) for name, old, new in group}
        grown = _built(model, fields) if len(fields) == len(group) else None
        if grown is None or _shapes(grown) != wanted:
            continue
        held = dict(grown.named_modules())
        if all(vars(held[path]).get(name) == new for path, name, new in said if path in held):
            found = [("", f"config.{name}", old, new) for name, (old, new) in fields.items()]
            return found + [*_otherwise(model, twin, grown)]
    return []


def _as_configured(model: nn.Module) -> nn.Module | None:
    """What its configuration builds, on the meta device; None where that has other tensors than the model."""
    if not configured(model):
        return None
    try:
        twin = on_meta(model, configuration(model))
    except Exception:  # a class of the user's with arguments of its own
        return None
    return twin if _shapes(twin) == _shapes(model) else None


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in model.state_dict(keep_vars=True).items()}


def _wanted(model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """The shapes of all tensors of the grown network."""
    return {name: shapes.get(name, shape) for name, shape in _shapes(model).items()}


def _otherwise(model: nn.Module, twin: nn.Module, grown: nn.Module) -> Iterator[tuple[str, str, int, int]]:
    """Whole numbers of modules that another configuration makes other ones."""
    built, held = dict(grown.named_modules()), dict(model.named_modules())
    for path, module in twin.named_modules():
        if path not in built or path not in held or type(module).__module__.startswith("torch.nn.modules"):
            continue
        for name, old in vars(module).items():
            new = vars(built[path]).get(name)
            if type(old) is int and type(new) is int and old != new and vars(held[path]).get(name) == old:
                yield path, name, old, new


def _candidates(model: nn.Module, width: Width) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Fields that equal a length that grows, alone and together."""
    singles: list[tuple[str, Any, Any]] = []
    changes = sorted(width.changes)
    for name, value in _numbers(model.config):
        singles += [(name, value, new) for old, new in changes if old == value]
    for count in (1, 2, 3):
        for chosen in itertools.combinations(singles, count):
            if len({name for name, _, _ in chosen}) == count:
                yield {name: (old, new) for name, old, new in chosen}
    for name, value in vars(model.config).items():  # left to the class, as the hidden units of GPT-2 are
        if value is None and ABOUT_WIDTH.search(name):
            yield from ({name: (None, new)} for _, new in changes)


def _numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int and value > 1:
            yield prefix + name, value
        elif hasattr(value, "to_dict"):
            yield from _numbers(value, f"{prefix}{name}.")


def _built(model: nn.Module, fields: Mapping[str, tuple[Any, Any]]) -> nn.Module | None:
    config = copy.deepcopy(model.config)
    for dotted, (_, value) in fields.items():
        *through, name = dotted.split(".")
        target = config
        for part in through:
            target = vars(target)[part]
        vars(target)[name] = value
    try:
        return on_meta(model, from_file(config))
    except Exception:  # a configuration that cannot be
        return None
