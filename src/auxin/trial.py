"""Snapshots: a whole run in values, taken again and again into the same buffers, and put back bit for bit."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from auxin.anatomy.wrappers import networks_of
from auxin.engine import take_back
from auxin.errors import GrowthError
from auxin.follow.ddp import take_hold_again
from auxin.listing import modules_in, parameters_of
from auxin.record import Sight, coming_back
from auxin.sharded import settle

Store = Literal["memory", "pinned", "disk"]


class Snapshot:
    """Everything that a network and its companions hold, by attribute, so that it can be put back in place.

    Modules, optimizers, schedulers, averages and scalers are walked through their attributes; of objects that a network
    only refers to (a configuration, running statistics) their own attributes, tensors and containers are taken, not the
    objects that they refer to. The random generators belong to it, those that a network holds too.

    Args:
        roots: the network and its companions.
        store: where the values are kept: "memory", "pinned" (page-locked, for networks on a GPU) or "disk" (a
            memory-mapped temporary file).

    Examples:
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
        self._taken: Sight | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values that are kept."""
        return 0 if self._taken is None else sum(held.nbytes for held in self._taken.tensors)

    def take(self, values: bool = True) -> None:
        """Take the state as it is now; values of an earlier taking are overwritten where they fit.

        Without ``values``, what is written into a tensor stays, wherever that tensor goes: nothing is copied.
        """
        if values:
            self.keep(self.look())
        else:
            self._taken = self.look()

    def look(self) -> Sight:
        """What there is now, without its values."""
        self._settle()
        return Sight(self.roots)

    def keep(self, sight: Sight) -> None:
        """Take the values of what was seen; nothing may have written to it since."""
        before, self._taken = self._taken, None
        for held in before.tensors if before is not None else ():
            self._buffers.setdefault((held.value.shape, held.value.dtype, held.value.device), []).append(held.value)
        sight.keep(self._buffer)
        self._buffers = {}
        self._taken = sight

    def restore(self) -> None:
        """Put everything back: the same objects with the values that were taken."""
        sight = self._taken
        if sight is None:
            raise GrowthError("Snapshot.restore(): nothing has been taken yet; call take() first.")
        self._settle()
        with coming_back(sight.restore):
            pass
        self._settle()
        if sight.reshaped:
            take_hold_again(self.roots)  # of tensors that had another shape meanwhile, DDP must take hold again

    def _settle(self) -> None:
        """Let networks under FSDP2 hold shards only, which is what is taken and put back."""
        for network in _networks(self.roots):
            settle(network)

    def _buffer(self, tensor: Tensor) -> Tensor:
        """A place for the values: one of an earlier taking, or a new one."""
        if tensor.layout != torch.strided:
            return tensor.clone()
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


class Rollback:
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
        self.mark: Any = None
        self._structure: list[int] = []

    def look(self) -> Sight | None:
        """What a snapshot would hold, if one is kept; for ``keep`` once the growth is proved."""
        return None if self._snapshot is None or self.in_branch else self._snapshot.look()

    def keep(self, sight: Sight | None) -> tuple[str, ...]:
        """Take the snapshot, if one is kept: a growth moves no old value. A word about its size."""
        if self._snapshot is None or sight is None:
            return ()
        self._snapshot.keep(sight)
        return (f"snapshot {self._snapshot.nbytes / 1e6:,.1f} MB",)

    @contextlib.contextmanager
    def growing(self, mark: Any) -> Iterator[contextlib.ExitStack]:
        """Give a place for an open growth, and hold it unless something is raised.

        Args:
            mark: whatever its owner wants to have back with it.
        """
        with contextlib.ExitStack() as held:
            yield held
            self.settle()
            self._structure = structure_of(self._roots)
            self.held, self.mark = held.pop_all(), mark

    def stepped(self, then: Callable[[Any], None], optimizer: Any) -> None:
        """An optimizer has stepped: settle, and outside of branches tell ``then``."""
        self.settle()
        if not self.in_branch:
            then(optimizer)

    def settle(self) -> None:
        """Keep the last growth; from now on only a snapshot leads back."""
        held, self.held = self.held, None
        if held is not None:
            held.close()

    def take_back(self, then: Callable[[Any], None]) -> None:
        """Undo the last growth, and give its mark to ``then``; that may be called twice where an interrupt comes.

        Raises:
            GrowthError: there is none, or the run has gone on and no snapshot was kept.
        """
        held, snapshot = self.check()
        mark, now, back = self.mark, Snapshot(self._roots), False
        if held is not None and snapshot is None:
            now.take(values=False)

        def finish() -> None:
            """Come to an end: everything is as before the growth, or, where that has failed, all of it as after it."""
            if not back:
                (snapshot or now).restore()
            if back or snapshot is not None:
                then(mark)
            self.held, self.mark = None, None  # an open growth is taken back once: one that could not be is kept

        with coming_back(finish):
            if held is not None:
                take_back(held)
                back = True

    def check(self) -> tuple[contextlib.ExitStack | None, Snapshot | None]:
        """What leads back: the open growth, or a snapshot.

        Raises:
            GrowthError: as for ``take_back``.
        """
        if self.mark is None:
            raise GrowthError(
                "undo(): there is no growth that could be taken back. It takes back the last one, once, and does not "
                "reach past a surgery or a loaded checkpoint."
            )
        changed = self.held is not None and structure_of(self._roots) != self._structure
        held, snapshot = None if changed else self.held, None if self.in_branch else self._snapshot
        if held is None and snapshot is None:
            why = (
                "the network or an optimizer's groups have been changed since the growth, by other code"
                if changed
                else "the optimizer has stepped since the growth, so every weight has moved"
            )
            raise GrowthError(
                f"undo(): {why}. Build the Grower with keep=True to be able to go back, or take the new layer out "
                "with Remove and keep what was learned."
            )
        return held, snapshot

    def forget(self) -> None:
        """Keep what is, for good: nothing before this leads back to an earlier growth."""
        self.settle()
        self.mark = None

    def free(self) -> None:
        """Let go of the memory that branches have kept for later ones."""
        del self._branches[self._depth :]

    @property
    def in_branch(self) -> bool:
        """Whether the run is inside a branch."""
        return self._depth > 0

    @contextlib.contextmanager
    def branch(self) -> Iterator[None]:
        """Whatever happens to the run inside is gone afterwards. Branches may hold branches."""
        depth, outer = self._depth, (self.held, self.mark, self._structure)
        if len(self._branches) == depth:
            self._branches.append(Snapshot(self._roots, self._store))
        snapshot = self._branches[depth]
        snapshot.take()

        def restore() -> None:
            if self._depth > depth and self.held is not None:
                take_back(self.held)
            snapshot.restore()
            self.held, self.mark, self._structure, self._depth = *outer, depth

        with coming_back(restore):
            self.held, self.mark, self._depth = None, None, depth + 1
            yield


def _networks(roots: Iterable[Any]) -> Iterator[nn.Module]:
    """The network and the copies of it that averages hold."""
    for root in roots:
        if not isinstance(root, DistributedDataParallel):  # the network in it is a root of its own
            yield from [root] if isinstance(root, nn.Module) and not networks_of(root) else networks_of(root)


def structure_of(roots: Iterable[Any]) -> list[int]:
    """Identities of the modules and parameters of networks, in order, and of the groups of optimizers."""
    found = []
    for network in _networks(roots):
        modules = modules_in(network)
        found += map(id, (*modules, *parameters_of(modules)))
    for root in roots:
        groups = getattr(root, "param_groups", None)
        found += [id(p) for group in groups for p in group["params"]] if isinstance(groups, list) else []
    return found
