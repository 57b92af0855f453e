"""Tensors in files instead of in memory, so that a network may be read, grown and written that is larger than memory.

The system brings parts of a file into memory where they are used, and can take them out again at any time. Here they go
out after every operation, so that a process holds little more than what its last operation has used.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from auxin.errors import GrowthError

LARGE = 1 << 20  # bytes from which on a tensor is looked after
MEMORY = 64 << 20  # bytes of new tensors that stay in memory; older ones go to files
CHUNK = 8 << 20
BLOCK = 1 << 18  # bytes; what was read is still in the cache of the processor when it is written
aten = torch.ops.aten
EMPTY = (aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default)
EACH = (aten._foreach_norm.Scalar,)  # of a list of tensors, by themselves
FIXED = 0x10  # MAP_FIXED, on Linux and macOS; Python's mmap does not name it
READ, WRITE = mmap.PROT_READ, mmap.PROT_WRITE


class OnDisk(TorchDispatchMode):
    """Let large tensors that are made inside lie in files without a name, which go when the tensors go.

    Values, shapes and strides are what they would be in memory. Tensors of a file of the user's (``mapped``) are read
    where they lie, and so are their copies; the first operation that writes into one gives it memory of its own, and
    the file is never written to.

    Args:
        directory: on a disk with room for what is made inside.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> with OnDisk(Path(folder.name)):
        ...     tables = [torch.ones(4096, 4096).add(i) for i in range(4)]
        >>> float(tables[3].max()), os.listdir(folder.name)
        (4.0, [])
    """

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory
        self._regions: dict[int, _Region] = {}  # by address
        self._resident: dict[int, _Region] = {}  # those in memory, the oldest first
        self._building = False
        self._looked_at: list[_Region] = []  # by an operation that has only made views of them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation, look after its large results, and give back the memory of what it has read."""
        kwargs = kwargs or {}
        if self._looked_at:
            for region in self._looked_at:
                region.release()
            self._looked_at = []
        if func in EACH:
            return [part for t in args[0] for part in self._carried_out(func, ([t], *args[1:]), kwargs)]
        return self._carried_out(func, args, kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Of torch: it would import its compiler, seconds of work, to keep that from tracing this. Growth is eager."""
        return False

    def _carried_out(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        known = {t.untyped_storage().data_ptr() for t in _tensors((*args, *kwargs.values()))}
        regions = [region for place in known if (region := self._regions.get(place)) is not None]
        if regions:
            if (found := self._without_values(func, args)) is not None:
                return found
            for region in _written(func, args, kwargs, self._region):
                if region.own():
                    self._stays(region)
        found = func(*args, **kwargs)
        if isinstance(found, Tensor):
            found = self._kept(found, known, func)
        elif isinstance(found, (tuple, list)):
            found = type(found)(self._kept(one, known, func) for one in found)
        if func.is_view:
            self._looked_at = regions  # they may be read through the view, by no operation
        else:
            for region in regions:
                region.release()
        return found

    def _without_values(self, func: Any, args: Any) -> Tensor | None:
        """The result of an operation on a whole region, where that need not be read or written for it."""
        first = self._region(args[0]) if args else None
        if first is None or not _fills(args[0], first):
            return None
        if self._building and func._schema.is_mutable and torch.Tag.nondeterministic_seeded in func.tags:
            return args[0]  # drawn weights: those of a checkpoint will take their place
        if func is aten.zero_.default or (func is aten.fill_.Scalar and args[1] == 0):
            first.forget()
            self._resident.pop(first.address, None)
            return args[0]
        if func is aten.clone.default and first.kind in ("file", "zeros") and args[0].is_contiguous():
            return self._tensor(first.again()).view(args[0].dtype).reshape(args[0].shape)
        return None

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Draw no random numbers for large tensors inside: those of a checkpoint will take their place."""
        self._building = True
        try:
            yield
        finally:
            self._building = False

    def blocks(self, tensor: Tensor) -> Iterator[memoryview] | None:
        """The values, one after the other, of a tensor that still lies in a file of the user's, or holds zeros.

        They do not come into its memory; each block stands where the one before stood. None: they lie elsewhere.
        """
        region = self._region(tensor)
        if region is None or region.kind not in ("file", "zeros") or not _fills(tensor, region):
            return None
        return region.blocks() if _is_as_stored(tensor) else None

    def release(self, tensor: Tensor) -> None:
        """Give back the memory that holds values of a tensor; they stay in their file."""
        if (region := self._region(tensor)) is not None:
            region.release()

    def mapped(self, path: Path, places: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]) -> dict[str, Tensor]:
        """Tensors of a file, read where they lie; small ones are copied into memory.

        Args:
            path: of the file, which has to stay as it is.
            places: by name: dtype, shape, and the byte of the file at which the values begin.
        """
        file, found = _File(path), {}
        for name, (dtype, shape, start) in places.items():
            size = dtype.itemsize * torch.Size(shape).numel()
            if size >= LARGE:
                tensor = self._tensor(_Region(size, file, start)).view(dtype)
            else:
                values = bytearray(os.pread(file.descriptor, size, start))
                tensor = torch.frombuffer(values, dtype=dtype) if size else torch.empty(0, dtype=dtype)
            found[name] = tensor.reshape(shape)
        return found

    def _region(self, tensor: Any) -> _Region | None:
        return self._regions.get(tensor.untyped_storage().data_ptr()) if _is_plain(tensor) else None

    def _tensor(self, region: _Region) -> Tensor:
        """All bytes of a region as a tensor; the region lives as long as their storage."""
        held = (ctypes.c_ubyte * region.size).from_address(region.address)
        self._regions[region.address] = region
        weakref.finalize(held, self._gone, region.address)  # before the memory is somebody else's
        return torch.frombuffer(held, dtype=torch.uint8)

    def _gone(self, address: int) -> None:
        self._resident.pop(address, None)
        self._regions.pop(address).unmap()

    def _kept(self, tensor: Any, known: set[int], func: Any) -> Tensor:
        """What an operation gives back; looked after where it is large and new."""
        if not _is_plain(tensor) or (storage := tensor.untyped_storage()).nbytes() < LARGE:
            return tensor
        if storage.data_ptr() in known or storage.data_ptr() in self._regions:
            return tensor
        region = _Region(storage.nbytes())
        held = self._tensor(region).untyped_storage()
        if func not in EMPTY:
            region.take(storage.data_ptr(), self.directory if region.size > MEMORY else None)
            self._stays(region)
        return torch.empty(0, dtype=tensor.dtype).set_(held, tensor.storage_offset(), tensor.shape, tensor.stride())

    def _stays(self, region: _Region) -> None:
        """A region has got memory: the oldest ones go to files where that is too much."""
        self._resident[region.address] = region
        while sum(one.size for one in self._resident.values()) > MEMORY:
            self._resident.pop(next(iter(self._resident))).spill(self.directory)


class _File:
    """A file of the user's, open for as long as a region needs it."""

    def __init__(self, path: Path):
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, into: memoryview, start: int) -> None:
        """Bring bytes of it into memory, from ``start`` on."""
        while len(into):
            length = os.preadv(self.descriptor, [into], start)
            if not length:
                raise GrowthError(f"'{self.path}' has become shorter while it was read. Nothing was left behind.")
            into, start = into[length:], start + length


class _Region:
    """The values of one tensor: whole pages of addresses, and what lies behind them.

    Behind them is a part of a ``file`` of the user's, ``zeros`` that need no memory, ``memory``, or a ``scratch`` file
    without a name. What it is may change at any time, the addresses and the values stay. Of a file of the user's and of
    zeros the pages cannot be written to, so that a write which nobody has announced does not go unnoticed.
    """

    def __init__(self, size: int, file: _File | None = None, start: int = 0):
        self.size, self._file, self._start = size, file, start
        skipped = start % mmap.PAGESIZE
        self._length = -(-(skipped + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.kind: Literal["file", "zeros", "memory", "scratch"] = "zeros" if file is None else "file"
        if file is None:
            self._base = _map(self._length, READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._base = _map(self._length, READ, mmap.MAP_PRIVATE, file.descriptor, start - skipped)
        self.address = self._base + skipped

    def again(self) -> _Region:
        """Another region with the same values."""
        return _Region(self.size, self._file if self.kind == "file" else None, self._start)

    def blocks(self) -> Iterator[memoryview]:
        """The values of a file of the user's, or zeros; each block stands where the one before stood."""
        held = memoryview(bytearray(min(BLOCK, self.size)))
        for start in range(0, self.size, BLOCK):
            block = held[: self.size - start]
            if self._file is not None and self.kind == "file":
                self._file.read(block, self._start + start)
            yield block

    def own(self) -> bool:
        """Let it be written into; whether it has got memory for that."""
        if self.kind in ("memory", "scratch"):
            return False
        self._behind(READ | WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if self._file is not None and self.kind == "file":
            self._file.read(_bytes_at(self.address, self.size), self._start)
        self.kind = "memory"
        return True

    def take(self, address: int, directory: Path | None) -> None:
        """Take values from elsewhere, into memory, or into a file in a directory."""
        if directory is not None:
            self._to_file(directory, address)
        else:
            self.own()
            ctypes.memmove(self.address, address, self.size)

    def spill(self, directory: Path) -> None:
        """Let a file without a name hold what is in memory."""
        if self.kind == "memory":
            self._to_file(directory, self.address)

    def forget(self) -> None:
        """Let all values be zero."""
        self._behind(READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.kind = "zeros"

    def release(self) -> None:
        """Give back the memory of what lies in a file."""
        if self.kind in ("file", "scratch"):
            _call("madvise", self._base, self._length, mmap.MADV_DONTNEED)

    def unmap(self) -> None:
        """Nobody needs it any more."""
        _call("munmap", self._base, self._length)

    def _to_file(self, directory: Path, address: int) -> None:
        values = _bytes_at(address, self.size)
        try:
            with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
                file.seek(self.address - self._base)
                for start in range(0, self.size, CHUNK):
                    part = values[start : start + CHUNK]
                    while part:
                        part = part[file.write(part) :]
                file.truncate(self._length)
                self._behind(READ | WRITE, mmap.MAP_SHARED, file.fileno())
        except OSError as error:
            raise GrowthError(
                f"'{directory}', where new tensors lie meanwhile, cannot be written: {error.strerror}. Nothing was "
                "left behind. Make room there."
            ) from error
        self.kind = "scratch"

    def _behind(self, protection: int, flags: int, descriptor: int = -1) -> None:
        _map(self._length, protection, flags | FIXED, descriptor, at=self._base)


def _is_plain(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.is_cpu and value.layout is torch.strided


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The plain tensors among arguments of an operation, which are tensors, lists of them, or something else."""
    for value in values:
        if _is_plain(value):
            yield value
        elif type(value) in (list, tuple):
            yield from (one for one in value if _is_plain(one))


def _bytes_at(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def _fills(tensor: Tensor, region: _Region) -> bool:
    """Whether a tensor is all of what its storage holds."""
    return tensor.nbytes == region.size


def _is_as_stored(tensor: Tensor) -> bool:
    """Whether the values lie in memory one after the other as they are."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _written(func: Any, args: Any, kwargs: Mapping[str, Any], region_of: Any) -> Iterable[_Region]:
    """The regions into which an operation writes."""
    for number, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (region for t in _tensors((given,)) if (region := region_of(t)) is not None)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
if hasattr(_libc, "mallopt"):  # glibc keeps freed memory for its next calls; from this size on it gives it back at once
    _libc.mallopt(-3, LARGE)  # M_MMAP_THRESHOLD


def _map(size: int, protection: int, flags: int, descriptor: int = -1, start: int = 0, at: int | None = None) -> int:
    address = _libc.mmap(at, size, protection, flags, descriptor, start)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return address


def _call(name: str, *words: int) -> None:
    if getattr(_libc, name)(*words):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
