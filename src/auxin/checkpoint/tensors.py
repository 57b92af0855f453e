"""Named tensors in one safetensors file, and what that format cannot say: which share memory, and in which order."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auxin.errors import GrowthError

# What safetensors reads and writes as it is, and how it writes that; any other dtype is stored as its bytes.
_NATIVE = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.complex64: "C64", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
}
Place = tuple[torch.dtype, tuple[int, ...], int]  # dtype, shape, and the byte of the file at which the values begin
Read = Callable[[Path, Mapping[str, Place]], Mapping[str, Tensor]]
Blocks = Callable[[Tensor], Iterable[memoryview]]  # the values of a tensor, one after the other, in pieces
CHUNK = 1 << 20  # bytes; what was summed up is still in the cache of the processor when it is written
_RAW = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.complex128, torch.complex32, torch.float8_e4m3fn, torch.float8_e4m3fnuz),
        *(torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    )
}


@dataclass(frozen=True)
class Layout:
    """What the file does not say itself.

    Attributes:
        aliases: name -> the name under which the same tensor is stored.
        raw: name -> [dtype, shape] of what is stored as bytes.
        strides: name -> strides of what lies in memory without gaps, in another order than its axes have.
    """

    aliases: dict[str, str] = field(default_factory=dict)
    raw: dict[str, list[Any]] = field(default_factory=dict)
    strides: dict[str, list[int]] = field(default_factory=dict)


def save(write: Callable[[Any], None], tensors: Mapping[str, Tensor], blocks: Blocks | None = None) -> Layout:
    """Write named tensors in the format of safetensors.

    Args:
        write: takes the bytes of the file, one after the other.
        tensors: on any device, in any memory order; what is the same memory is stored once.
        blocks: reads their values in another way than through memory; each block is written before it is asked for the
            next one.

    Returns:
        What ``load`` needs besides the file.

    Raises:
        GrowthError: a tensor has no plain values to store; names it.
    """
    layout, stored, seen = Layout(), {}, {}
    for name, tensor in tensors.items():
        _check(name, tensor)
        place = _place(tensor)
        if place in seen:
            layout.aliases[name] = seen[place]
        else:
            # Two views of one storage are two tensors: the network that they are loaded into ties them again.
            seen[place] = name
            stored[name] = tensor.detach()
            if tensor.dtype not in _NATIVE:
                layout.raw[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            if _in_another_order(tensor):
                layout.strides[name] = list(tensor.stride())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(stored.items(), key=lambda pair: -pair[1].element_size())  # so that each is aligned
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        native = _NATIVE.get(tensor.dtype)
        shape = [end - start] if native is None else list(tensor.shape)
        header[name] = {"dtype": native or "U8", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write(struct.pack("<Q", len(text)) + text)
    for _, tensor in ordered:
        for block in blocks_of(tensor) if blocks is None else blocks(tensor):
            write(block)
    return layout


def load(path: Path, layout: Layout, read: Read | None = None) -> dict[str, Tensor]:
    """The tensors that ``save`` wrote, on the CPU, in memory of their own.

    Args:
        path: of the file.
        layout: what ``save`` returned.
        read: makes them from the path and the ``places`` in it, in another way.

    Returns:
        Name -> tensor; the same object for names that shared memory.

    Raises:
        GrowthError: the file is not what ``save`` wrote.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # A copy: the file is mapped, and whoever shortens it later must not reach into a network.
        if read is None:
            found = {name: tensor.clone() for name, tensor in load_file(path).items()}
        else:
            found = dict(read(path, places(path)))
        for name, (dtype, shape) in layout.raw.items():
            found[name] = found[name].view(_RAW[dtype]).reshape(shape)
        for name, strides in layout.strides.items():
            one = found[name]
            found[name] = torch.empty_strided(one.shape, strides, dtype=one.dtype, device=one.device).copy_(one)
        return found | {name: found[kept] for name, kept in layout.aliases.items()}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise GrowthError(f"'{path}' is not what was written: {error}. Load an older checkpoint.") from error


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of now, in the memory of the CPU; what is the same memory is copied once.

    Raises:
        GrowthError: as for ``save``.
    """
    made: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in tensors.items():
        _check(name, tensor)
        if (place := _place(tensor)) not in made:
            # What has gaps is written by rows, so it is copied by rows.
            order = torch.preserve_format if _in_another_order(tensor) else torch.contiguous_format
            made[place] = tensor.detach().to("cpu", copy=True, memory_format=order)
    return {name: made[_place(tensor)] for name, tensor in tensors.items()}


def places(path: Path) -> dict[str, Place]:
    """Where the values of each tensor of a file lie that ``save`` wrote."""
    known = {name: dtype for dtype, name in _NATIVE.items()}
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: (known[one["dtype"]], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
        for name, one in header.items()
    }


def _check(name: str, tensor: Tensor) -> None:
    problem = (
        f"a {type(tensor).__name__}"
        if not isinstance(tensor, Tensor)
        else "it is a nested tensor, store `torch.nested.to_padded_tensor(tensor, 0)` and the lengths of its parts"
        if tensor.is_nested
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


def _in_another_order(tensor: Tensor) -> bool:
    """Whether its values fill their memory, but not in the order of its axes."""
    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return False
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory, seen the same way; the storage comes first."""
    storage = tensor.untyped_storage().data_ptr()
    if storage == 0 or tensor.numel() == 0:
        return (id(tensor),)
    bits = (tensor.is_conj(), tensor.is_neg())
    view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, bits)
    return ((tensor.device, storage), *view)


def blocks_of(tensor: Tensor) -> Iterator[memoryview]:
    """The values one after the other, from the CPU."""
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    values: Any = memoryview(plain.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]
