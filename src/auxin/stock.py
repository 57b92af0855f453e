"""Is a grown model still one that plain transformers loads? Rebuilt from its own configuration and compared.

Nothing here imports transformers: a model is one of theirs if it has a configuration and can be saved with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

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
        with random_state(seed=0):
            twin = type(model)(_config(model))
        twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    except Exception as error:  # whatever a configuration that cannot say the new depth brings about
        raise GrowthError(
            f"{type(model).__name__}: its configuration cannot express the grown model "
            f"({' '.join(str(error).split())[:300]}). {ACCEPT}"
        ) from error
    twin = _placed(twin, model).eval()
    differ = list(_differing(model, twin, change))
    if look.has_probe and not _same_outputs(model, twin, look):
        differ = differ or ["the outputs differ, from something that is computed from the depth"]
    elif not any(name.startswith("number ") for name in differ):
        return
    raise GrowthError(
        f"{type(model).__name__}: plain transformers would build another model from the grown configuration: "
        f"{'; '.join(differ[:4])}. {ACCEPT}"
    )


def _config(model: nn.Module) -> Any:
    """The model's configuration, as it comes back from a file."""
    own: Any = model.config
    ways = {name: getattr(own, f"_{name}", None) for name in ("attn_implementation", "experts_implementation")}
    return type(own).from_dict(own.to_dict() | {name: way for name, way in ways.items() if way is not None})


def _placed(twin: nn.Module, model: nn.Module) -> nn.Module:
    """On the model's device: buffers that are in no state_dict were made anew."""
    first = next(model.parameters(), None)
    return twin if first is None else twin.to(first.device)


def _same_outputs(model: nn.Module, twin: nn.Module, look: Look) -> bool:
    outputs: list[list[Tensor]] = []
    for network in (model, twin):
        with untouched(network), torch.no_grad():
            outputs.append([t.clone() for t in tensors_in(look.run_of(network))])
    if [t.shape for t in outputs[0]] != [t.shape for t in outputs[1]]:
        return False
    pairs = zip(*outputs, strict=True)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in pairs)


def _differing(model: nn.Module, twin: nn.Module, change: Change) -> Iterator[str]:
    """Plain attributes of the blocks of the changed lists that a rebuilt model has otherwise."""
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
                    kind = "number " if type(value) is int else ""
                    yield f"{kind}{rewire.path}.{path}.{name} is {value!r} here, {there!r} rebuilt"
