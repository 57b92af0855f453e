"""Weights that are stored otherwise than as the numbers they stand for: as codes, packed, in a class of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from auxin.sharded import here

STATES = ("quant_state", "SCB", "CB")  # of bitsandbytes, beside codes of 8 and 4 bits
ADVICE = "widen the network before it is quantized"


def stored_otherwise(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Why these tensors, or those that these modules hold themselves, cannot be resized; nothing for plain ones."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        path, _, leaf = name.rpartition(".")
        if name in modules:
            module = modules[name]
            held = {**module._parameters, **module._buffers}
            if "_packed_params" in {*vars(module), *module._modules}:
                kind = f"{type(module).__module__}.{type(module).__qualname__}"
                yield f"the weights of {name} are quantized and packed ({kind}); {ADVICE}"
        else:
            held = {leaf: getattr(modules.get(path), leaf, None)}
        for own, tensor in held.items():
            why = _why_not(tensor) if isinstance(tensor, Tensor) else ""
            if why:
                yield f"{name if name not in modules else f'{name}.{own}'.lstrip('.')} {why}; {ADVICE}"


def _why_not(tensor: Tensor) -> str:
    tensor = here(tensor)
    state = next((name for name in STATES if getattr(tensor, name, None) is not None), None)
    if state is not None:
        return f"is quantized (a {type(tensor).__name__} with {state})"
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype})"
    if is_traceable_wrapper_subclass(tensor):
        inner = type(tensor.data if isinstance(tensor, nn.Parameter) else tensor).__name__
        return f"is a {inner}, which keeps its values in tensors of its own"
    if isinstance(tensor, nn.Parameter) and tensor.dtype in (torch.int8, torch.uint8, torch.int32):
        return f"is a parameter of {tensor.dtype}: codes, and not numbers"
    return ""
