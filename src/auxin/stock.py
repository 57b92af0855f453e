"""Is a grown model still one that plain transformers loads? Rebuilt from its own configuration and compared.

Nothing here imports transformers: a model is one of theirs if it has a configuration and can be saved with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from auxin.anatomy.probe import Look, tensors_in, untouched
from auxin.anatomy.tree import module_at
from auxin.change import Change
from auxin.errors import GrowthError
from auxin.randomness import random_state

PLAIN = (int, float, str, bool)
OWN = ("training", "gradient_checkpointing")  # how a module is run, not what it is
ACCEPT = "Pass stock=False to grow it all the same; then keep it with auxin.save, or rebuild it and replay its journal."


def is_stock(model: nn.Module) -> bool:
    """Whether a model is what its configuration builds: the same names and shapes.

    A model with adapters or a head of one's own is none, and needs not stay one.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(getattr(model, "config", None), "to_dict"):
        return False
    try:
        with torch.device("meta"), random_state():
            twin = type(model)(_config(model))
    except Exception:  # a class of the user's with arguments of its own
        return False
    shapes = [{name: t.shape for name, t in net.state_dict().items()} for net in (twin, model)]
    return shapes[0] == shapes[1]


def check_stock(model: nn.Module, change: Change, look: Look) -> None:
    """Check that the grown model is what its edited configuration builds.

    Args:
        model: the grown model; it was stock before.
        change: what was done.
        look: holds the probe, on which both are compared.

    Raises:
        GrowthError: it is not; names the attribute that differs, or by how much the outputs do.
    """
    if change.gates:
        raise GrowthError(
            f"{change.gates[0]}: the block fades in, and until its gate is folded plain transformers would refuse the "
            f"file (it holds {change.gates[0]}.auxin_gate). Pass stock=False; after {change.fade} optimizer steps the "
            "model is stock again."
        )
    try:
        twin = _rebuilt(model)
    except Exception as error:  # whatever a configuration that cannot say the new depth brings about
        raise GrowthError(
            f"{type(model).__name__}: its configuration cannot express the grown model "
            f"({' '.join(str(error).split())[:300]}). {ACCEPT}"
        ) from error
    differ = list(_differing(model, twin, change))
    counts = [words for words, counted in differ if counted]
    if not counts and (not look.has_probe or _same_outputs(model, twin, look)):
        return
    found = counts or [words for words, _ in differ] or ["the outputs differ, by something that the depth decides"]
    raise GrowthError(
        f"{type(model).__name__}: plain transformers would build another model from the grown configuration: "
        f"{'; '.join(found[:4])}. {ACCEPT}"
    )


def _rebuilt(model: nn.Module) -> nn.Module:
    """What the model's own class builds from its configuration, holding the model's tensors, on its device.

    While it is built its parameters have no memory, where the class allows that: only buffers that are in no
    state_dict are computed anew.
    """
    try:
        return _filled(_empty(model), model)
    except Exception:  # a constructor that looks at values
        with random_state(seed=0):
            return _filled(type(model)(_config(model)), model)


def _empty(model: nn.Module) -> nn.Module:
    def without_memory(module: nn.Module, name: str, parameter: Any) -> Any:
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without_memory)
    try:
        with random_state(seed=0):
            return type(model)(_config(model))
    finally:
        handle.remove()


def _filled(twin: nn.Module, model: nn.Module) -> nn.Module:
    """With the model's own tensors in it, in eval mode."""
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    first = next(model.parameters(), None)
    return (twin if first is None else twin.to(first.device)).eval()


def _config(model: nn.Module) -> Any:
    """The model's configuration, as it comes back from a file."""
    own: Any = model.config
    ways = {name: getattr(own, f"_{name}", None) for name in ("attn_implementation", "experts_implementation")}
    return type(own).from_dict(own.to_dict() | {name: way for name, way in ways.items() if way is not None})


def _same_outputs(model: nn.Module, twin: nn.Module, look: Look) -> bool:
    outputs: list[list[Tensor]] = []
    for network in (model, twin):
        with untouched(network), torch.no_grad():
            outputs.append([t.clone() for t in tensors_in(look.run_of(network))])
    if [t.shape for t in outputs[0]] != [t.shape for t in outputs[1]]:
        return False
    pairs = zip(*outputs, strict=True)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in pairs)


def _differing(model: nn.Module, twin: nn.Module, change: Change) -> Iterator[tuple[str, bool]]:
    """Plain attributes of the blocks of the changed lists that a rebuilt model has otherwise; whether each counts."""
    for rewire in change.rewires:
        ours, theirs = module_at(model, rewire.path), module_at(twin, rewire.path)
        rebuilt = dict(theirs.named_modules())
        for path, module in ours.named_modules():
            other = rebuilt.get(path)
            for name, value in module.__dict__.items() if other is not None else ():
                if name.startswith("_") or name in OWN or type(value) not in PLAIN:
                    continue
                there = other.__dict__.get(name)
                if type(there) is type(value) and there != value:
                    yield f"{rewire.path}.{path}.{name} is {value!r} here, {there!r} rebuilt", type(value) is int
