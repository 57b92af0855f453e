"""Low-rank adapters as PEFT builds them: what their layers and their configuration say of a rank that grows.

PEFT multiplies what an adapter gives by alpha / r, or by alpha / sqrt(r) (rank-stabilised, arXiv:2312.03732). That
number stays, so that the function stays to the bit and so does the step of every old entry; alpha follows, so that a
file says the same number. Nothing here imports peft: a layer is of its kind if it holds ``r``, ``lora_alpha``, and
``scaling``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PLACES = (("lora_A", "lora_B", ".weight"), ("lora_embedding_A", "lora_embedding_B", ""))
KEPT_STARTS = ("gaussian", "eva", "orthogonal")  # starts that leave the base weights as they are
Field = tuple[str, str, Any, Any]


@dataclass(frozen=True)
class Adapter:
    """One adapter in one layer.

    Attributes:
        path: of the layer.
        layer: the layer.
        name: of the adapter.
        first, second: names of the two factors.
    """

    path: str
    layer: Any
    name: str
    first: str
    second: str


def adapter_fields(model: nn.Module, shapes: Mapping[str, torch.Size]) -> Iterator[Field]:
    """(path, name, old, new) of what layers and configurations say of ranks, for tensors of new shapes."""
    every = list(_adapters(model))
    grown = {a: shapes[a.first][0] for a in every if a.first in shapes and shapes[a.first][0] != _rank(model, a)}
    known: dict[tuple[str, str], list[tuple[Adapter, int, float]]] = {}
    for adapter, size in grown.items():
        old, alpha = adapter.layer.r[adapter.name], adapter.layer.lora_alpha[adapter.name]
        new = old * size // _rank(model, adapter)
        other = _alpha(alpha, old, new, adapter.layer.use_rslora.get(adapter.name, False))
        yield adapter.path, f"r.{adapter.name}", old, new
        yield adapter.path, f"lora_alpha.{adapter.name}", alpha, other
        holder = _holder(model, adapter)
        if holder is not None:
            known.setdefault((holder, adapter.name), []).append((adapter, new, other))
    for (holder, name), found in known.items():
        yield from _configured(model, holder, name, found, every)


def half_grown(model: nn.Module, members: Collection[tuple[str, int]]) -> list[str]:
    """Why ranks cannot grow: an adapter that does not run has nothing that reads its first factor."""
    found = []
    for adapter in _adapters(model) if any("lora_" in name for name, _ in members) else ():
        if ((adapter.first, 0) in members) != ((adapter.second, 1) in members):
            found.append(
                f"the adapter {adapter.name!r} of {adapter.path} takes no part in this forward: it is merged, disabled "
                f"or not the active one; call unmerge_adapter(), or set_adapter({adapter.name!r}), and grow then"
            )
        start = getattr(_config(model, adapter), "init_lora_weights", True)
        if (adapter.first, 0) in members and isinstance(start, str) and start.lower() not in KEPT_STARTS:
            found.append(
                f"init_lora_weights={start!r}: PEFT makes the base weights of {adapter.path} anew from the rank when "
                "it loads, and another rank gives others; save with path_initial_model_for_weight_conversion=, load "
                "that, and grow then"
            )
    return list(dict.fromkeys(found))


def _adapters(model: nn.Module) -> Iterator[Adapter]:
    for path, module in model.named_modules():
        own = vars(module)
        if not all(isinstance(own.get(name), dict) for name in ("r", "lora_alpha", "scaling", "use_rslora")):
            continue
        prefix = f"{path}." if path else ""
        for name in own["r"]:
            for first, second, end in PLACES:
                if name in getattr(module, first, ()):
                    yield Adapter(path, module, name, f"{prefix}{first}.{name}{end}", f"{prefix}{second}.{name}{end}")


def _rank(model: nn.Module, adapter: Adapter) -> int:
    path, _, leaf = adapter.first.rpartition(".")
    return getattr(model.get_submodule(path), leaf).shape[0]


def _alpha(alpha: float, old: int, new: int, stabilised: bool) -> float:
    """The alpha with which a new rank gives the number that the old one gave."""
    if stabilised:
        return alpha * math.sqrt(new / old)
    return alpha * new // old if type(alpha) is int and alpha * new % old == 0 else alpha * new / old


def _holder(model: nn.Module, adapter: Adapter) -> str | None:
    """Path of the module around a layer that holds the configuration of its adapter."""
    parts = adapter.path.split(".") if adapter.path else []
    for count in range(len(parts), -1, -1):
        path = ".".join(parts[:count])
        held = vars(model.get_submodule(path)).get("peft_config")
        if isinstance(held, dict) and adapter.name in held:
            return path
    return None


def _config(model: nn.Module, adapter: Adapter) -> Any:
    holder = _holder(model, adapter)
    return None if holder is None else vars(model.get_submodule(holder))["peft_config"][adapter.name]


def _configured(
    model: nn.Module, holder: str, name: str, found: list[tuple[Adapter, int, float]], every: list[Adapter]
) -> Iterator[Field]:
    """One rank for all layers of an adapter, or those of single layers as patterns in front of others."""
    module = model.get_submodule(holder)
    config, at = vars(module)["peft_config"][name], f"peft_config.{name}"
    prefix = f"{holder}." if holder else ""
    all_of_it = [a for a in every if a.name == name and _holder(model, a) == holder]
    values = {(new, alpha) for _, new, alpha in found}
    patterns = {field: getattr(config, field, None) or {} for field in ("rank_pattern", "alpha_pattern")}
    if len(found) == len(all_of_it) and len(values) == 1 and not any(patterns.values()):
        ((new, alpha),) = values
        yield holder, f"{at}.r", config.r, new
        yield holder, f"{at}.lora_alpha", config.lora_alpha, alpha
        return
    if hasattr(module, "targeted_module_names"):  # the tuner around the network; names count from the network
        prefix += "model."
    for number, (field, old) in enumerate(patterns.items(), 1):
        said = {one[0].path.removeprefix(prefix): one[number] for one in found}
        rest = {key: value for key, value in old.items() if key not in said}
        yield holder, f"{at}.{field}", getattr(config, field, None), {**said, **rest}
