"""Snapshots: a whole run in values, taken again and again into the same buffers, and put back bit for bit."""

from __future__ import annotations

import collections
import contextlib
import tempfile
import types
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from auxin.engine import take_back
from auxin.errors import GrowthError
from auxin.randomness import random_data, restore_random
from auxin.record import HOOKS, hook_again, hooks_of, refill, storage_of

Store = Literal["memory", "pinned", "disk"]
LEAVES = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    weakref.ReferenceType,
    torch.Generator,
    torch.dtype,
    torch.device,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
)
CONTAINERS = (dict, list, set, collections.deque)


class Snapshot:
    """Everything that a network and its companions hold, by attribute, so that it can be put back in place.

    Modules, optimizers, schedulers, averages and scalers are walked through their attributes; objects that a network
    only refers to (a configuration) are taken one level deep. The random generators belong to it.

    Args:
        roots: the network and its companions.
        store: where the values are kept: "memory", "pinned" (page-locked, for networks on a GPU) or "disk" (a
            memory-mapped temporary file).

    Example:
        >>> net = nn.Linear(2, 2)
        >>> snapshot = Snapshot([net])
        >>> snapshot.take()
        >>> before = net.weight.clone()
        >>> _ = nn.init.zeros_(net.weight)
        >>> snapshot.restore()
        >>> bool((net.weight == before).all())
        True
    """

    def __init__(self, roots: Iterable[Any], store: Store = "memory"):
        if store not in ("memory", "pinned", "disk"):
            raise GrowthError(f"Snapshot(store={store!r}): store is one of 'memory', 'pinned', 'disk'.")
        self.roots, self.store = list(roots), store
        self._buffers: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="auxin-") if store == "disk" else None
        self._files = 0
        self._forget()

    def _forget(self) -> None:
        self._tensors: list[_Held] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        self._seen: dict[int, Any] = {}
        self._random: dict[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values that are kept."""
        return sum(held.value.numel() * held.value.element_size() for held in self._tensors)

    def take(self) -> None:
        """Take the state as it is now; values of an earlier taking are overwritten where they fit."""
        free = self._buffers
        for held in self._tensors:
            free.setdefault((held.value.shape, held.value.dtype, held.value.device), []).append(held.value)
        self._forget()
        for root in self.roots:
            self._visit(root, whole=True)
        with torch.no_grad():
            for held in self._tensors:
                held.fill(self._buffer(held.tensor))
        self._buffers = {}
        self._random = random_data()

    def restore(self) -> None:
        """Put everything back: the same objects with the values that were taken."""
        if self._random is None:
            raise GrowthError("Snapshot.restore(): nothing has been taken yet; call take() first.")
        for container, content in self._containers:
            refill(container, content)
        with torch.no_grad():
            for held in self._tensors:
                held.give_back()
        restore_random(self._random)

    def _visit(self, value: Any, whole: bool) -> None:
        """Walk on from ``value``; ``whole`` says that objects of any class are walked, not only known ones."""
        if isinstance(value, Tensor):
            self._tensor(value)
            return
        if isinstance(value, LEAVES) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, CONTAINERS):
            content = list(value.items()) if isinstance(value, dict) else list(value)
            self._containers.append((value, content))
            for item in content:
                self._visit(item, whole)
        elif isinstance(value, tuple):
            for item in value:
                self._visit(item, whole)
        elif isinstance(getattr(value, "__dict__", None), dict):
            own = value.__dict__
            self._containers.append((own, list(own.items())))
            inner = not isinstance(value, nn.Module)
            if whole or isinstance(value, (nn.Module, torch.optim.Optimizer)):
                for item in list(own.values()):
                    self._visit(item, whole and inner)

    def _tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self._seen or tensor.device.type == "meta":
            return
        self._seen[id(tensor)] = tensor
        self._tensors.append(_Held(tensor))
        if tensor.is_leaf and tensor.grad is not None:
            self._tensor(tensor.grad)

    def _buffer(self, tensor: Tensor) -> Tensor:
        """A place for the values: one of an earlier taking, or a new one."""
        if tensor.layout != torch.strided:
            return tensor.detach().clone()
        device = tensor.device if self.store == "memory" else torch.device("cpu")
        free = self._buffers.get((tensor.shape, tensor.dtype, device))
        if free:
            return free.pop()
        if self._folder is not None and tensor.numel():
            self._files += 1
            file = str(Path(self._folder.name) / f"{self._files}.bin")
            return torch.from_file(file, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        pinned = self.store == "pinned" and torch.cuda.is_available()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=pinned)


class Past:
    """What a run can go back to: the last growth while that is free, a snapshot from before it, a branch.

    Args:
        roots: the network and its companions.
        keep: take a snapshot before each growth, and where to keep it.
    """

    def __init__(self, roots: Iterable[Any], keep: bool | Store):
        self._roots = list(roots)
        self._store: Store = keep if isinstance(keep, str) else "memory"
        self._snapshot = Snapshot(self._roots, self._store) if keep else None
        self._branches: list[Snapshot] = []
        self._depth = 0
        self.held: contextlib.ExitStack | None = None
        self._mark: Any = None

    def before_growth(self) -> tuple[str, ...]:
        """Take the snapshot, if one is kept; a word about its size."""
        if self._snapshot is None or self.in_branch:
            return ()
        self.settle()
        self._snapshot.take()
        return (f"snapshot {self._snapshot.nbytes / 1e6:,.1f} MB",)

    def hold(self, held: contextlib.ExitStack, mark: Any) -> None:
        """Remember an open growth, and whatever its owner wants to have back with it."""
        self.settle()
        self.held, self._mark = held, mark

    def settle(self) -> None:
        """Keep the last growth; from now on only a snapshot leads back."""
        held, self.held = self.held, None
        if held is not None:
            held.close()

    def take_back(self) -> Any:
        """Undo the last growth; returns its mark.

        Raises:
            GrowthError: there is none, or training has gone on and no snapshot was kept.
        """
        if self._mark is None:
            raise GrowthError("undo(): this Grower has not grown anything that could be taken back.")
        if self.held is not None:
            take_back(self.held)
        elif self._snapshot is not None and not self.in_branch:
            self._snapshot.restore()
        else:
            raise GrowthError(
                "undo(): the optimizer has stepped since the growth, so every weight has moved. Build the Grower with "
                "keep=True to be able to go back, or take the new layer out with Remove and keep what was learned."
            )
        mark, self.held, self._mark = self._mark, None, None
        return mark

    def forget(self) -> None:
        """Keep what is, for good: nothing before this leads back to an earlier growth."""
        self.settle()
        self._mark = None

    @property
    def in_branch(self) -> bool:
        """Whether the run is inside a branch."""
        return self._depth > 0

    @contextlib.contextmanager
    def branch(self) -> Iterator[None]:
        """Whatever happens to the run inside is gone afterwards. Branches may hold branches."""
        if len(self._branches) == self._depth:
            self._branches.append(Snapshot(self._roots, self._store))
        snapshot, outer = self._branches[self._depth], (self.held, self._mark)
        self.held, self._mark = None, None
        snapshot.take()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self.held is not None:
                take_back(self.held)
            snapshot.restore()
            self.held, self._mark = outer


class _Held:
    """One tensor: the object, where its values lived, and what they were."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.storage = tensor, tensor.detach()
        self.grad = tensor.grad if tensor.is_leaf else None
        self.requires_grad = tensor.requires_grad
        self.hooks = [(kind, hooks_of(tensor, kind)) for kind in HOOKS]
        self.value = tensor

    def fill(self, buffer: Tensor) -> None:
        if buffer.layout == torch.strided:
            buffer.copy_(self.storage)
        self.value = buffer

    def give_back(self) -> None:
        if storage_of(self.tensor) != storage_of(self.storage):
            self.tensor.data = self.storage
        if self.value.layout == torch.strided:
            self.tensor.detach().copy_(self.value)
        for kind, hooks in self.hooks:
            hook_again(self.tensor, kind, hooks)
        if self.tensor.is_leaf:
            if self.tensor.requires_grad != self.requires_grad:
                self.tensor.requires_grad_(self.requires_grad)
            if self.tensor.grad is not self.grad:
                self.tensor.grad = self.grad
