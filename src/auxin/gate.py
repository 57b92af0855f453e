"""The gate of a block that fades in: ``x + a (f(x) - x)``, with ``a`` a buffer of the block from 0 to 1.

It is a forward hook and a buffer on the block itself, not a wrapper around it: the names of the block's parameters are
the final ones from the start, and folding the gate away leaves nothing behind. Source: the fade-in of progressive
growing (Karras et al. 2018, arXiv:1710.10196) and masked structural growth (Yao et al. 2024, arXiv:2305.02869).
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.listing import named_modules

NAME = "auxin_gate"  # of the buffer, as a state_dict shows it


def open_gate(block: nn.Module, share: float = 0.0) -> None:
    """Let ``block`` return its first floating input plus ``share`` of what it changes about it.

    Args:
        block: any module whose first output has the shape of its first floating input.
        share: between 0 (the block does nothing) and 1 (the block as it is).
    """
    beside = next((t for t in (*block.parameters(), *block.buffers()) if t.is_floating_point()), torch.empty(0))
    block.register_buffer(NAME, torch.full((), share, dtype=beside.dtype, device=beside.device))
    block.register_forward_hook(faded, with_kwargs=True)
    block.register_state_dict_pre_hook(warn_of_saving)


def close_gate(block: nn.Module) -> None:
    """Take the gate away: the block is what it was built as. Without one nothing happens."""
    if block._buffers.pop(NAME, None) is None:
        return
    block._non_persistent_buffers_set.discard(NAME)
    for key in [key for key, hook in block._forward_hooks.items() if hook is faded]:
        del block._forward_hooks[key]
        block._forward_hooks_with_kwargs.pop(key, None)
    for key in [key for key, hook in block._state_dict_pre_hooks.items() if hook is warn_of_saving]:
        del block._state_dict_pre_hooks[key]


def close_gates(block: nn.Module) -> None:
    """Take away the gates of a block and of all blocks inside it, as a copy needs that no optimizer opens."""
    for _, inner in list(gated(block)):
        close_gate(inner)


def set_gate(block: nn.Module, share: float) -> None:
    """Set how much of the block there is."""
    gate = block._buffers.get(NAME)
    if gate is not None:
        with torch.no_grad():
            gate.fill_(share)


def gated(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every block of a network that has a gate."""
    return ((path, module) for path, module in named_modules(model).items() if NAME in module._buffers)


def faded(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    """Forward hook: mix the input with the first tensor of the output."""
    given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None)
    made = first_floating(output)
    gate = block._buffers[NAME]
    if given is None or made is None or gate is None:
        return output
    return _with_first(output, made, given + gate * (made - given))


def warn_of_saving(block: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Hook before a state_dict: a file that Hugging Face's ``save_pretrained`` writes now is of another function."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "save_pretrained":
        frame = frame.f_back
    gate = block._buffers.get(NAME)
    if frame is not None and gate is not None:
        warnings.warn(
            f"save_pretrained: {prefix.removesuffix('.') or 'the block'} fades in, and is open to {float(gate):.3g}. "
            "from_pretrained makes it whole at once, which is another function. Save when the fade is over; or use "
            "auxin.save(grower, path), which keeps the gate.",
            stacklevel=2,
        )


def first_floating(value: Any) -> Tensor | None:
    """The first floating tensor in a nest of tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (tuple, list)):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = (getattr(value, field.name) for field in dataclasses.fields(value))
    return next((found for item in items if (found := first_floating(item)) is not None), None)


def _with_first(output: Any, made: Tensor, mixed: Tensor) -> Any:
    """The same output with ``mixed`` in the place of ``made``."""
    if output is made:
        return mixed
    if isinstance(output, (tuple, list)):
        items = [_with_first(item, made, mixed) for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if isinstance(output, Mapping):  # also the outputs of Hugging Face models, which are dataclasses and mappings
        for key, item in output.items():
            if item is not (other := _with_first(item, made, mixed)):
                output[key] = other  # type: ignore[index]
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = copy.copy(output)
        for field in dataclasses.fields(output):  # also of a frozen one, and of fields that its constructor sets
            object.__setattr__(output, field.name, _with_first(getattr(output, field.name), made, mixed))
    return output
