"""The processes that train one network together: whatever one of them refuses, none of them does.

What they tell each other goes through the key-value store of the process group and not through its collectives. So it
works alike over gloo and NCCL, costs a fraction of a millisecond, ends by itself, and knows who is missing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from auxin.errors import BadMoment, GrowthError
from auxin.fsdp2 import before_sending, is_unit, units
from auxin.sharded import group_of

T = TypeVar("T")

c10d: Any = dist  # with the names that its stubs do not list
BUCKET = 250 * 1024 * 1024  # bytes of tensors that are sent at once
MISSED = "missed "  # how the answer of a meeting begins to which not all came
SHOWN = 3  # lines of a disagreement
_STARTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # process group -> the prefix of its keys
_APART: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # process group -> one of the same ranks, see ``Ranks.apart``
_STORES: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # process group -> its store, over a connection of its own
_COUNTS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # process group -> the number of its last meeting


class _Call(threading.local):
    """What this thread is inside of: how many calls that ranks agree on, and the refusal with which one has left them.

    Whoever tries another way after such a refusal would wait for it at the next meeting.
    """

    depth = 0
    left: GrowthError | None = None

    @contextmanager
    def begun(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            self.left = self.left if self.depth else None


_call = _Call()


class Ranks:
    """The ranks of one process group; without one, a single process that agrees with itself.

    Args:
        group: whose ranks hold the same network. Its timeout (``init_process_group(timeout=...)``) is how long each
            meeting waits for the last of them.

    Attributes:
        group: the process group, or None.
        rank: of this process in the group.
        size: number of ranks.
    """

    def __init__(self, group: Any = None):
        self.group: Any = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    @classmethod
    def of(cls, companions: Iterable[Any]) -> Ranks:
        """Those of the DistributedDataParallel, or FSDP2 root, among a network's companions, or this process alone."""
        for one in companions:
            if isinstance(one, DistributedDataParallel):
                return cls(one.process_group)
            if is_unit(one):
                return cls(group_of(one))
        return cls(None)

    def __repr__(self) -> str:
        return f"Ranks(rank {self.rank} of {self.size})"

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self

    @property
    def alone(self) -> bool:
        """Whether there is no other rank to agree with."""
        return self.size == 1

    def apart(self) -> Ranks:
        """The same ranks over a group of their own, so that another thread can talk to them; every rank calls it."""
        if self.alone:
            return self
        if self.group not in _APART:
            held, timeout = c10d.get_process_group_ranks(self.group), _timeout(self.group)
            group = c10d.new_group(held, timeout=timeout, backend="gloo", use_local_synchronization=True)
            # While one thread waits for a key, the connection of a store answers no other one.
            _STORES[group] = group.get_group_store().clone()
            _APART[self.group] = group
        return Ranks(_APART[self.group])

    @contextmanager
    def agree(self, what: str) -> Iterator[list[str]]:
        """Do the same on every rank, or on none: what is raised inside on one rank is raised on all.

        Args:
            what: the call, in words; ranks that are in different calls are told so.

        Yields:
            A list for lines of text that must be the same on every rank.

        Raises:
            GrowthError: another rank has refused, is somewhere else, says something else, or does not come.
        """
        lines: list[str] = []
        if self.alone:
            yield lines
            return
        with _call.begun():
            try:
                yield lines
            except GeneratorExit:  # dropped while it was open
                raise
            except BaseException as error:
                if not hasattr(error, "heard_of"):  # what another rank has raised is known to all
                    self._meet(what, None, error)
                raise
            digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
            if len(set(self._meet(what, digest))) > 1:
                raise GrowthError(_differ(what, self._meet(what, lines)))

    def share(self, what: str, make: Callable[[], T]) -> list[T]:
        """What ``make()`` gives on every rank, by rank; plain JSON values. What it raises on one is raised on all.

        Raises:
            GrowthError: as for ``agree``.
        """
        return self._tell(what, make, to_all=True)

    def collect(self, what: str, make: Callable[[], T]) -> list[T]:
        """On rank 0 what ``make()`` gives on every rank, by rank, as ``share`` does; [] on the others.

        Raises:
            GrowthError: as for ``agree``.
        """
        return self._tell(what, make, to_all=False)

    def _tell(self, what: str, make: Callable[[], T], to_all: bool) -> list[T]:
        if self.alone:
            return [make()]
        try:
            value = make()
        except BaseException as error:
            self._meet(what, None, error)
            raise
        return self._meet(what, value, to_all=to_all)

    def mean(self, what: str, make: Callable[[], float]) -> float:
        """The mean over the ranks of what ``make()`` gives; see ``share``."""
        return statistics.fmean(self.share(what, make))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Let the tensors of every rank hold the values of rank 0; they are sent where they differ.

        Raises:
            GrowthError: the process group has failed.
        """
        if self.alone or not tensors:
            return
        sums = self.share("grow: the new values", lambda: [checksum(t) for t in tensors])
        if all(one == sums[0] for one in sums):
            return
        try:
            c10d._broadcast_coalesced(self.group, [t.detach() for t in tensors], BUCKET, 0)
        except RuntimeError as error:
            raise GrowthError(
                f"rank {self.rank}: the new values of rank 0 did not arrive ({error}). Every rank takes the growth "
                "back; the process group itself may be broken."
            ) from error

    def _meet(self, what: str, value: Any, error: BaseException | None = None, to_all: bool = True) -> list[Any]:
        """Tell all ranks a value, or what was raised here, and hear theirs."""
        try:
            words = self._gather(what, json.dumps([what, value, _told(error)]), to_all)
        except Exception as missing:
            if error is None:
                raise
            error.add_note(f"beside that: {missing}")
            return []
        heard = [json.loads(word) for word in words]
        calls = [call for call, _, _ in heard]
        refused = [(rank, *told) for rank, (_, _, told) in enumerate(heard) if told is not None]
        apart = len({call.partition(":")[0] for call in calls}) > 1  # not only at different points of one call
        if refused and not apart:
            refusal = self._refused(refused, calls)
            if error is None or isinstance(error, GrowthError):
                raise refusal from error
        if apart or (len(set(calls)) > 1 and error is None):
            raise GrowthError(
                f"the ranks are in different calls: {_grouped(calls)}. Every rank makes the same calls of auxin in the "
                "same order, also those that only one of them seems to need (grower.step, ax.save)."
            ) from error
        return [said for _, said, _ in heard]

    def _raise_alike(self, what: str, error: BaseException) -> None:
        """Raise what was raised here where all ranks have raised, else on every rank that some have."""
        if hasattr(error, "heard_of"):
            raise error
        try:
            words = self._gather(what, json.dumps([what, None, _told(error)]))
        except Exception as missing:
            error.add_note(f"beside that: {missing}")
            raise error from missing
        heard = [json.loads(word) for word in words]
        refused = [(rank, *told) for rank, (_, _, told) in enumerate(heard) if told is not None]
        if len(refused) == self.size or not isinstance(error, Exception):
            raise error
        raise self._refused(refused, [call for call, _, _ in heard]) from error

    def _refused(self, refused: list[tuple[int, str, str]], calls: list[str]) -> GrowthError:
        """What is raised for it on every rank; where they were at different points, they have left their call with it,
        and those that have raised it have done so too.
        """
        refusal = _refusal(refused, self.size)
        refusal.heard_of = True  # pyright: ignore[reportAttributeAccessIssue]
        if _call.depth and len(set(calls)) > 1:
            _call.left = refusal
        return refusal

    def _gather(self, what: str, word: str, to_all: bool = True) -> list[str]:
        """The words of all ranks; with ``to_all=False``, and where none has raised, on rank 0 only, [] on the others.

        Rank 0 reads them and writes one answer for all: a thousand ranks that read the words of each would read a
        million. Whether everybody came is decided once, for all of them, in the store.
        """
        if _call.left is not None:
            raise _call.left
        store, timeout = _STORES.get(self.group) or self.group.get_group_store(), _timeout(self.group)
        try:
            start = self._start(what, store, timeout)
            _COUNTS[self.group] = number = _COUNTS.get(self.group, 0) + 1
            here, before = f"{start}/meeting/{number}", f"{start}/meeting/{number - 1}"
            keys, answer = [f"{here}/{rank}" for rank in range(self.size)], f"{here}/answer"
            store.set(keys[self.rank], word)
            came = True
            try:
                store.wait(keys if self.rank == 0 else [answer], timeout)
            except RuntimeError:
                came = False
            except BaseException:
                store.compare_set(answer, "", f"{MISSED}{self.rank} (interrupted)")
                raise
            words: list[str] = []
            if came and self.rank != 0:
                said = store.get(answer).decode()
            else:
                late = [] if came else [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
                words = [] if late else [word.decode() for word in store.multi_get(keys)]
                said = MISSED + ", ".join(late) if late else _answer(words, to_all)
                said = store.compare_set(answer, "", said).decode()
            if not said.startswith(MISSED):  # so all are through with the one before
                store.delete_key(f"{before}/{self.rank}")
                if self.rank == 0:
                    store.delete_key(f"{before}/answer")
        except RuntimeError as error:
            raise GrowthError(
                f"{what}: rank {self.rank} cannot reach the store of the process group any more ({error}). The process "
                "that holds it, mostly rank 0, has ended. Nothing was changed here."
            ) from error
        if said.startswith(MISSED):
            raise self._missed(what, said.removeprefix(MISSED), timeout)
        return words or _words(said, self.size)

    def _start(self, what: str, store: Any, timeout: timedelta) -> str:
        """A name that only this start of the processes has: under torchrun the store, with its words, outlives them.

        Every rank draws a token and waits until all have seen the same tokens, its own new one among them.
        """
        if self.group in _STARTS:
            return _STARTS[self.group]
        keys = [f"auxin/hello/{rank}" for rank in range(self.size)]
        token, deadline, pause = secrets.token_hex(8), time.monotonic() + timeout.total_seconds(), 0.001
        store.set(keys[self.rank], token)
        while True:
            said = [word.decode() for word in store.multi_get(keys)] if store.check(keys) else []
            seen = hashlib.sha256(" ".join(word.partition(" ")[0] for word in said).encode()).hexdigest()
            late = [rank for rank, word in enumerate(said) if not word.endswith(seen)]
            if said and not late:
                return _STARTS.setdefault(self.group, f"auxin/{seen[:16]}")
            if time.monotonic() > deadline:
                late = late or [rank for rank, key in enumerate(keys) if not store.check([key])]
                raise self._missed(what, ", ".join(map(str, late)), timeout)
            store.set(keys[self.rank], f"{token} {seen}")
            time.sleep(pause := min(0.05, 2 * pause))

    def _missed(self, what: str, ranks: str, timeout: timedelta) -> GrowthError:
        return GrowthError(
            f"{what}: rank {ranks} of {self.size} did not come within {timeout.total_seconds():g} s. Every rank makes "
            "the same calls of auxin in the same order; one that has died, or hangs, never comes. Nothing was changed."
        )


def together(what: str, network: Any) -> None:
    """Wait, before all ranks of a sharded network send each other tensors, for those that may have refused instead.

    Raises:
        GrowthError: what another rank has raised.
    """
    if units(network):
        with Ranks(group_of(network)).agree(f"grow: {what}"):
            pass


@contextmanager
def in_step(what: str, network: Any) -> Iterator[None]:
    """Let the ranks of a sharded network do the same inside, to its end, or raise on all of them.

    They send each other tensors there, and a rank that has raised does not come to the next time, for which the others
    would wait until the process group gives up. So they meet before each time, and at the end.

    Raises:
        GrowthError: what another rank has raised. What all of them have raised each raises itself.
    """
    if not units(network):
        yield
        return
    ranks, raised = Ranks(group_of(network)), None
    with before_sending(network, functools.partial(together, f"{what}: tensors are sent", network)):
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException as error:
            raised = error
    if raised is None:
        ranks._meet(f"grow: {what}", None)
    else:
        ranks._raise_alike(f"grow: {what}", raised)


def _timeout(group: Any) -> timedelta:
    """That of the process group."""
    for device in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return dist.default_pg_timeout


def _answer(words: Sequence[str], to_all: bool) -> str:
    """What is written for all ranks: the words of all, one where they are equal, none where only rank 0 needs them."""
    if len(set(words)) == 1:
        return json.dumps(words[:1])
    heard = [json.loads(word) for word in words]
    fine = all(error is None and call == heard[0][0] for call, _, error in heard)
    return json.dumps([] if fine and not to_all else words)


def _words(answer: str, size: int) -> list[str]:
    """The words of all ranks, from what was written."""
    words = json.loads(answer)
    return words * size if len(words) == 1 else words


def _told(error: BaseException | None) -> tuple[str, str] | None:
    """An exception as data: the name of its class if it is one of ours, and its text."""
    if error is None:
        return None
    ours = isinstance(error, GrowthError)
    return (type(error).__name__, str(error)) if ours else ("GrowthError", f"{type(error).__name__}: {error}")


def _refusal(refused: list[tuple[int, str, str]], size: int) -> GrowthError:
    """One exception for what one or several ranks have refused, of the same class and text on every rank."""
    lasting = [kind for _, kind, _ in refused if kind != BadMoment.__name__]
    kinds = {kind.__name__: kind for kind in _kinds(GrowthError)}
    kind = kinds.get(lasting[0] if lasting else BadMoment.__name__, GrowthError)
    texts = [text for _, _, text in refused]
    if len(refused) == size and len(set(texts)) == 1:
        return kind(texts[0])
    told = "; ".join(f"rank {rank}: {text}" for rank, _, text in refused)
    return kind(f"{told} So no rank does it; all are as they were.")


def _kinds(kind: type[GrowthError]) -> Iterator[type[GrowthError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def _grouped(said: Sequence[str]) -> str:
    """'ranks 0, 2: ...; rank 1: ...'."""
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(said):
        ranks.setdefault(text, []).append(str(rank))
    return "; ".join(f"rank{'s' * (len(who) > 1)} {', '.join(who)}: {text}" for text, who in ranks.items())


def _differ(what: str, said: Sequence[Sequence[str]]) -> str:
    """Name the ranks that say something else, and what."""
    common = set(said[0]).intersection(*said)
    own = [[line for line in lines if line not in common] for lines in said]
    shown = [
        "; ".join(lines[:SHOWN]) + (f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")
        if lines
        else "nothing of its own"
        for lines in own
    ]
    return (
        f"{what}: the ranks differ. {_grouped(shown)}. Nothing was changed. Every rank needs the same network, the "
        "same optimizers and the same call with the same arguments; what was changed on one rank alone must be taken "
        "back."
    )


def digest(tensor: Tensor) -> str:
    """A short hash of a tensor's bits; reads all of it."""
    values = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    size = values.numel()
    held = (ctypes.c_char * size).from_address(values.data_ptr()) if size else b""
    return hashlib.sha256(held).hexdigest()[:16]


@torch.no_grad()
def checksum(tensor: Tensor) -> list[int]:
    """Two sums over a tensor's bits, one of them by position: fast, and equal where the tensors are.

    Values that were computed alike and differ in the last bit have equal sums by chance once in 10^19 times.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = bits.view(torch.int64) if bits.numel() % 8 == 0 else bits.to(torch.int64)
    row = 1024
    whole = words[: words.numel() // row * row].view(-1, row)
    columns, rest = whole.sum(0), words[whole.numel() :]  # sums wrap around, alike on every rank
    places = torch.arange(1, row + 1, device=words.device)
    by_place = (columns * places).sum() + (rest * places[: rest.numel()]).sum()
    return [int(columns.sum() + rest.sum()), int(by_place)]
