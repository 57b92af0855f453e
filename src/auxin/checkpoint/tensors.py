"""Named tensors in one safetensors file, and what that format cannot say: which of them share memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auxin.errors import GrowthError

# What safetensors reads and writes as it is; any other dtype is stored as its bytes.
_NATIVE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}
_RAW = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.complex128, torch.complex32, torch.float8_e4m3fn, torch.float8_e4m3fnuz),
        *(torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    )
}


class WriteError(Exception):
    """The file could not be written."""


@dataclass(frozen=True)
class Layout:
    """What the file does not say itself.

    Attributes:
        aliases: name -> the name under which the same tensor is stored.
        raw: name -> [dtype, shape] of what is stored as bytes.
    """

    aliases: dict[str, str] = field(default_factory=dict)
    raw: dict[str, list[Any]] = field(default_factory=dict)


def save(path: Path, tensors: Mapping[str, Tensor]) -> Layout:
    """Write named tensors to a new file.

    Args:
        path: of the file.
        tensors: on any device, in any memory order; what is the same memory is stored once.

    Returns:
        What ``load`` needs besides the file.

    Raises:
        GrowthError: a tensor has no plain values to store; names it.
        WriteError: the file could not be written.
    """
    from safetensors import SafetensorError  # on first use: importing auxin stays light
    from safetensors.torch import save_file

    layout, stored, seen, storages = Layout(), {}, {}, set()
    for name, tensor in tensors.items():
        _check(name, tensor)
        place = _place(tensor)
        if place in seen:
            layout.aliases[name] = seen[place]
            continue
        seen[place] = name
        # Two views of one storage are two tensors: the network that they are loaded into ties them again.
        stored[name] = _plain(tensor.detach(), name, layout)
        if place[0] in storages:
            stored[name] = stored[name].clone()
        storages.add(place[0])
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(stored, path, metadata={"format": "pt"})
        # safetensors leaves a file that only its owner can read.
        path.chmod(mode)
    except SafetensorError as error:
        raise WriteError(str(error)) from error
    except ImportError as error:
        raise GrowthError(f"Saving tensors needs numpy beside safetensors ({error}): pip install numpy.") from error
    return layout


def load(path: Path, layout: Layout) -> dict[str, Tensor]:
    """The tensors that ``save`` wrote, on the CPU, in memory of their own.

    Args:
        path: of the file.
        layout: what ``save`` returned.

    Returns:
        Name -> tensor; the same object for names that shared memory.

    Raises:
        GrowthError: the file is not what ``save`` wrote.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # A copy: the file is mapped, and whoever shortens it later must not reach into a network.
        found = {name: tensor.clone() for name, tensor in load_file(path).items()}
        for name, (dtype, shape) in layout.raw.items():
            found[name] = found[name].view(_RAW[dtype]).reshape(shape)
        return found | {name: found[kept] for name, kept in layout.aliases.items()}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise GrowthError(f"'{path}' is not what was written: {error}. Load an older checkpoint.") from error


def _check(name: str, tensor: Tensor) -> None:
    problem = (
        f"a {type(tensor).__name__}"
        if not isinstance(tensor, Tensor)
        else f"its layout is {tensor.layout}, store it `.to_dense()`"
        if tensor.layout is not torch.strided
        else "it is on the meta device and has no values, give the network some first"
        if tensor.device.type == "meta"
        else f"its dtype {tensor.dtype} cannot be stored, convert it first"
        if tensor.dtype not in _NATIVE and tensor.dtype not in _RAW.values()
        else f"it is a {type(tensor).__name__}, which is more than its values; save its full plain tensor"
        if hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "full_tensor")
        else ""
    )
    if problem or name == "__metadata__":
        raise GrowthError(f"Cannot save the tensor {name!r}: {problem or 'its name is reserved by safetensors'}.")


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory, seen the same way; the storage comes first."""
    storage = tensor.untyped_storage().data_ptr()
    if storage == 0 or tensor.numel() == 0:
        return (id(tensor),)
    bits = (tensor.is_conj(), tensor.is_neg())
    view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, bits)
    return ((tensor.device, storage), *view)


def _plain(tensor: Tensor, name: str, layout: Layout) -> Tensor:
    """Contiguous values on the CPU, as bytes where safetensors does not know the dtype."""
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype in _NATIVE:
        return tensor
    layout.raw[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
    return tensor.reshape(-1).view(torch.uint8)
