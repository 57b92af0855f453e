"""The fields of a configuration that say a width: those from which its class builds the shapes that are wanted."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from auxin.anatomy.hugging_face.blueprint import configuration, configured, from_file, on_meta
from auxin.anatomy.widths.groups import Width

ABOUT_WIDTH = re.compile(r"inner|intermediate|ffn|hidden|width|dim|size")
LIMIT = 48  # models built from a configuration per search


def fields_for(model: nn.Module, shapes: Mapping[str, torch.Size], width: Width) -> list[tuple[str, str, Any, Any]]:
    """(path, field, old, new) of the configuration that builds the grown network; nothing where none does."""
    if not configured(model):
        return []
    try:
        twin = on_meta(model, configuration(model))
    except Exception:  # a class of the user's with arguments of its own
        return []
    before = {name: t.shape for name, t in model.state_dict(keep_vars=True).items()}
    if {name: t.shape for name, t in twin.state_dict().items()} != before:
        return []
    wanted = {name: shapes.get(name, shape) for name, shape in before.items()}
    for fields in itertools.islice(_candidates(model, width), LIMIT):
        if _builds(model, fields) == wanted:
            return [("", f"config.{name}", old, new) for name, (old, new) in fields.items()]
    return []


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


def _builds(model: nn.Module, fields: Mapping[str, tuple[Any, Any]]) -> dict[str, torch.Size] | None:
    config = copy.deepcopy(model.config)
    for dotted, (_, value) in fields.items():
        *through, name = dotted.split(".")
        target = config
        for part in through:
            target = vars(target)[part]
        vars(target)[name] = value
    try:
        return {name: t.shape for name, t in on_meta(model, from_file(config)).state_dict().items()}
    except Exception:  # a configuration that cannot be
        return None
