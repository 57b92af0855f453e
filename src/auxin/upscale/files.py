"""Tensors where they lie in safetensors files: read from the header, copied as bytes, whatever their dtype.

Nothing here holds more than one tensor: a file is written from ranges of others, a few megabytes at a time.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auxin.errors import GrowthError

CHUNK = 8 << 20
LARGEST_HEADER = 100_000_000  # bytes; what safetensors itself accepts
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64} | {
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64
}  # fmt: skip
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64} | {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        name: of the tensor.
        dtype: in the words of safetensors, "BF16".
        shape: of the tensor.
        file: that holds it.
        start: byte of the file at which its values begin.
        size: bytes of its values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def load(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            GrowthError: torch has no such dtype to compute with.
        """
        if self.dtype not in DTYPES:
            raise GrowthError(f"{self.file.name}: {self.name} is {self.dtype}, which torch does not compute with.")
        if self.size == 0:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        values = bytearray(self.size)
        with open(self.file, "rb") as file:
            file.seek(self.start)
            if file.readinto(values) != self.size:
                raise GrowthError(f"'{self.file}' has become shorter while it was read.")
        return torch.frombuffer(values, dtype=DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class Widened:
    """A tensor that gets more entries along an axis.

    Attributes:
        axis: number of the dimension.
        index: the old entry of each new one, -1 for one that is born.
        shape: of the tensor afterwards.
        zero: whether new entries are zero; else they are drawn as widely spread as the old ones.
    """

    axis: int
    index: tuple[int, ...]
    shape: tuple[int, ...]
    zero: bool

    def values(self, old: Tensor, name: str) -> Tensor:
        """The larger tensor, the same each time for the same name."""
        index = torch.tensor(self.index)
        born = index < 0
        new = old.new_zeros(self.shape)
        new.index_copy_(self.axis, (~born).nonzero().flatten(), old.index_select(self.axis, index[~born]))
        if not self.zero:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            block = [int(born.sum()) if axis == self.axis else size for axis, size in enumerate(self.shape)]
            drawn = float(old.float().std()) * torch.randn(block, generator=generator)
            new.index_copy_(self.axis, born.nonzero().flatten(), drawn.to(new.dtype))
        return new


@dataclass(frozen=True)
class Piece:
    """One tensor of a file that is to be written.

    Attributes:
        name: there.
        stored: where its values lie now.
        constant: a number that all its values become instead.
        widened: how it becomes larger, where it does.
    """

    name: str
    stored: Stored
    constant: float | None = None
    widened: Widened | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor there."""
        return self.stored.shape if self.widened is None else self.widened.shape

    @property
    def size(self) -> int:
        """Bytes of its values there."""
        old, new = math.prod(self.stored.shape), math.prod(self.shape)
        return self.stored.size if self.widened is None else self.stored.size // old * new


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file by name, in the order of their bytes; and its metadata.

    Raises:
        GrowthError: the file is cut off, or is no safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else LARGEST_HEADER + 1
        if not 2 <= length <= LARGEST_HEADER or 8 + length > size:
            raise GrowthError(f"'{path}' is cut off or no safetensors file: {size:,} bytes without a whole header.")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        found = [_stored(name, entry, path, 8 + length) for name, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise GrowthError(f"'{path}' is no safetensors file: its header cannot be read ({error}).") from error
    found.sort(key=lambda tensor: (tensor.start, tensor.size))
    end = 8 + length
    for tensor in found:
        if tensor.start != end:
            raise GrowthError(f"'{path}' is damaged: the bytes of {tensor.name} overlap others or leave a hole.")
        end += tensor.size
    if end != size:
        what = "is cut off" if size < end else "is damaged"
        raise GrowthError(f"'{path}' {what}: it has {size:,} bytes, its header tells of {end:,}. Fetch it again.")
    return {tensor.name: tensor for tensor in found}, metadata


def write(path: Path, pieces: Sequence[Piece], metadata: Mapping[str, str], done: Callable[[int], None]) -> None:
    """Write one safetensors file and bring it down to the disk.

    Args:
        path: of the new file.
        pieces: its tensors; they are laid out by the size of their numbers, so that each is aligned.
        metadata: of the file.
        done: told the number of bytes after every chunk.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    ordered = sorted(pieces, key=lambda piece: -BITS.get(piece.stored.dtype, 0))
    end = 0
    for piece in ordered:
        offsets = [end, end + piece.size]
        header[piece.name] = {"dtype": piece.stored.dtype, "shape": list(piece.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in ordered:
            _write_values(file, piece, done)
        file.flush()
        os.fsync(file.fileno())


def copy(source: Path, target: Path) -> None:
    """Copy the bytes of a file and bring them down to the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as old, open(target, "xb") as new:
        while chunk := old.read(CHUNK):
            new.write(chunk)
        new.flush()
        os.fsync(new.fileno())


def number(value: float, dtype: str) -> bytes:
    """The bytes of a number as a safetensors file holds it.

    Raises:
        GrowthError: that dtype cannot hold it, or it is not known how.
    """
    if dtype not in ("F16", "BF16", "F32", "F64"):
        if value == 0 and dtype in BITS and BITS[dtype] >= 8 and dtype != "F8_E8M0":
            return bytes(BITS[dtype] // 8)
        raise GrowthError(f"a tensor of dtype {dtype} cannot be filled with {value}; store it as BF16 first.")
    return torch.tensor(value, dtype=DTYPES[dtype]).reshape(1).view(torch.uint8).numpy().tobytes()


def _stored(name: str, entry: Mapping[str, Any], path: Path, base: int) -> Stored:
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or stop < start:
        raise ValueError(f"{name} has shape {shape} and bytes {start} to {stop}")
    if dtype in BITS and 8 * (stop - start) != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{name}, {dtype} of shape {shape}, cannot be {stop - start} bytes")
    return Stored(name, dtype, shape, path, base + start, stop - start)


def _write_values(file: Any, piece: Piece, done: Callable[[int], None]) -> None:
    stored, left = piece.stored, piece.size
    if piece.widened is not None:
        values = piece.widened.values(stored.load(), piece.name).contiguous().view(-1).view(torch.uint8).numpy()
        for start in range(0, left, CHUNK):
            done(file.write(values[start : start + CHUNK].data))
        return
    if piece.constant is not None:
        one = number(piece.constant, stored.dtype)
        chunk = one * (min(left, CHUNK) // len(one))
        while left:
            left -= file.write(chunk[:left])
            done(min(len(chunk), stored.size))
        return
    with open(stored.file, "rb") as source:
        source.seek(stored.start)
        while left:
            chunk = source.read(min(left, CHUNK))
            if not chunk:
                raise GrowthError(f"'{stored.file}' has become shorter while it was read.")
            left -= file.write(chunk)
            done(len(chunk))
