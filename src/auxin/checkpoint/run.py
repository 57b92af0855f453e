"""``save`` and ``load``: a whole run as an atomic directory of safetensors and typed JSON."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from auxin import agreed, typed
from auxin.anatomy.tree import unwrap
from auxin.anatomy.wrappers import networks_of, with_wrappers
from auxin.checkpoint import background, each_rank, gradients, shards
from auxin.checkpoint.companions import kind_of, prepared, state_of
from auxin.checkpoint.directory import Files, Gone, check_count, read, write
from auxin.checkpoint.manifest import Manifest
from auxin.checkpoint.network import check_network, network_data, network_tensors, write_network
from auxin.checkpoint.safe_point import check_moment
from auxin.checkpoint.tensors import Blocks, Read, copies
from auxin.errors import GrowthError
from auxin.follow.own_groups import optimizers_in
from auxin.journal import FORMAT, replayed
from auxin.ramp import resumed
from auxin.randomness import random_data, restore_random
from auxin.ranks import Ranks
from auxin.refs import Allowed
from auxin.run_state import Run
from auxin.sharded import settle
from auxin.trial import Snapshot
from auxin.version import __version__

ATTEMPTS = 10  # at a directory into which another process saves: the newest checkpoint of now may be gone in a moment
KEYS = {"format", "auxin", "model", "network", "grower", "companions", "random", "extra"}


def save(grower: Run, path: str | os.PathLike[str], extra: Any = None, keep_last: int = 2) -> None:
    """Write a run: network, companions, journal, counts, global random generators, gradients that no step has used yet.

    Whole or not at all. Under DistributedDataParallel and FSDP2 every rank calls it: rank 0 writes, the others tell it
    their random generators and ``extra``, and get them back from ``load``. Of sharded tensors every rank writes its own
    shards, by torch.distributed.checkpoint, into one directory that all ranks see.

    Args:
        grower: the Grower of the run.
        path: a directory; every call adds ``checkpoint-000001``, ``checkpoint-000002``, ... inside it.
        extra: whatever else the loop needs (epoch, position in the data, the state of a generator of one's own):
            numbers, texts, lists, dicts, small tensors.
        keep_last: how many checkpoints stay.

    Raises:
        GrowthError: the disk is full or not writable, something has no plain form, or a step or a growth is half-done;
            earlier checkpoints are untouched.
    """
    ranks = _of_call(grower, path)
    parts = _parts_of_ranks(ranks, grower, extra, keep_last)
    with ranks.agree("ax.save"):
        _write(path, *_gathered(grower, extra, parts), keep_last, ranks)


def async_save(grower: Run, path: str | os.PathLike[str], extra: Any = None, keep_last: int = 2) -> background.Written:
    """Copy a run into the memory of the CPU and return; a thread writes the copy while training and growing go on.

    What is written is the run at the moment of the call, to the bit what ``save`` would write. The next ``save``,
    ``async_save`` or ``load`` of this process waits until it is written, so there is one copy at most, and the process
    does not end before. Under DistributedDataParallel and FSDP2 every rank calls it, and copies its own shards.

    Args:
        grower: the Grower of the run.
        path: as for ``save``.
        extra: as for ``save``.
        keep_last: as for ``save``.

    Returns:
        A future. Its ``result()`` waits, and gives the directory of the checkpoint, on ranks other than the first None;
        it raises GrowthError, on every rank, where the checkpoint could not be written. A warning says so in any case.

    Raises:
        GrowthError: something has no plain form, or a step or a growth is half-done; earlier checkpoints are untouched.

    Examples:
        >>> import tempfile, torch, auxin
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> edit = auxin.Duplicate("", by=1, output="keep")
        >>> grower = auxin.Grower(net, edits=edit, when=auxin.when.every(100))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = auxin.async_save(grower, folder)
        ...     written.result().name
        'checkpoint-000001'
    """
    ranks = _of_call(grower, path)
    parts = _parts_of_ranks(ranks, grower, extra, keep_last)
    with ranks.agree("ax.async_save"):
        files, spread = _gathered(grower, extra, parts)
        held = {name: copies(one) if isinstance(one, Mapping) else one for name, one in files.items()}
        shares = {name: tensor.detach().to("cpu", copy=True) for name, tensor in spread.items()}
    apart = ranks.apart()  # when all of them have their copy: each waits there for the others
    place = os.path.abspath(path)  # of now: the loop may change the working directory

    def write() -> Path | None:
        with apart.agree("ax.save"):
            return _write(place, held, shares, keep_last, apart)

    return background.begin(write)


def _of_call(grower: Run, path: str | os.PathLike[str]) -> Ranks:
    """The ranks of a save, when the one before is written."""
    if not hasattr(grower, "companions") or not isinstance(path, (str, os.PathLike)):
        kinds = f"{type(grower).__name__}, {type(path).__name__}"
        raise GrowthError(f"save(grower, path): got ({kinds}); pass the Grower first, then the directory.")
    background.wait()
    return Ranks.of(grower.companions)


def _parts_of_ranks(ranks: Ranks, grower: Run, extra: Any, keep_last: int) -> list[Any]:
    """On rank 0 what is another one on each rank; [] on the others."""

    def own() -> dict[str, Any]:
        check_count(keep_last)
        check_moment(grower)
        for network in (grower.model, *(copy for c in grower.companions for copy in networks_of(c))):
            settle(network)
        return {"random": random_data(), "extra": extra}

    return each_rank.told(ranks, own)


def _gathered(grower: Run, extra: Any, parts: list[Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The files of a checkpoint, and the sharded tensors, which do not lie in them."""
    files = {**_files(grower, extra, random_data()), **each_rank.dumped(parts)}
    return files, shards.taken_out(files, shards.Places(grower.model, _saved(grower.companions, grower.model)))


def _write(
    path: str | os.PathLike[str], files: dict[str, Any], spread: dict[str, Tensor], keep_last: int, ranks: Ranks
) -> Path | None:
    """Write a checkpoint: rank 0 its files, every rank its shards."""

    def ours(temporary: Path | None) -> Manifest:
        return shards.write(path, temporary, spread, ranks)

    if ranks.rank == 0:
        return write(path, files, keep_last, ours if spread else None)
    if spread:
        ours(None)
    return None


def load(path: str | os.PathLike[str], target: Any, allow: Iterable[Any] = ()) -> Any:
    """Continue a run, or read a grown network for inference.

    Under DistributedDataParallel and FSDP2 every rank calls it; they load the same checkpoint, or none. One of sharded
    tensors loads into any number of ranks and into one process; torch unpickles its ``.metadata``, so trust its writer.

    Args:
        path: the directory that was given to ``save``: its newest checkpoint, and where that was cut off, for a Grower,
            the newest that is whole, with a warning. Or one ``checkpoint-...`` inside.
        target: a Grower around the *original* network and companions, freshly built: it grows to where the run was and
            everything goes on exactly, the random generators too. Or the original network alone: structure and weights.
        allow: further classes, functions or modules that the journal may name.

    Returns:
        ``extra``, as it was saved.

    Raises:
        GrowthError: damaged, or of another model, or with other companions; nothing is changed then.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise GrowthError(f"load(path, target): path is a {type(path).__name__}; pass the directory first.")
    if not isinstance(target, nn.Module) and not hasattr(target, "companions"):
        raise GrowthError(f"load(path, target): target is a {type(target).__name__}; pass a Grower or an nn.Module.")
    background.wait()
    into = _Target.of(target, list(allow))
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(Gone):
            return _loaded(path, into)
    return _loaded(path, into)


@dataclass(frozen=True)
class TakenOver:
    """A checkpoint whose tensors have become those of a run.

    Attributes:
        files: of the checkpoint.
        parts: what it says.
    """

    files: Files
    parts: _Parts

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(entry.size for entry in self.files.manifest.values())


def take_over(path: str | os.PathLike[str], grower: Run, read_tensors: Read) -> TakenOver:
    """``load`` into a run that was built for nothing else: the tensors that are read become its own, without a copy.

    Args:
        path: as for ``load``; a checkpoint that was cut off is refused.
        grower: freshly built; where anything is raised, it is of no use any more.
        read_tensors: reads the tensors of a file, see ``tensors.load``.

    Raises:
        GrowthError: as for ``load``.
    """
    into = _Target.of(grower, [])
    files = replace(read(path), read=read_tensors)
    taken = TakenOver(files, _read_parts(files, into))
    try:
        _carried_out(files, taken.parts, into, keep=True)
    except GrowthError:
        raise
    except Exception as error:  # whatever a companion, or a checkpoint of somebody else's making, brings about
        raise GrowthError(
            f"the checkpoint '{files.path}' cannot be loaded into this run ({type(error).__name__}: {error})."
        ) from error
    return taken


def contents(taken: TakenOver, grower: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``hand_on`` writes: files, and the tensors that lie in shards, if those of the checkpoint do.

    The random generators, ``extra`` and loss scalers are the checkpoint's: this machine may not have had them.
    """
    run, companions = taken.parts.run, _saved(grower.companions, grower.model)
    scalers = {n: run["companions"][n] for n, c in enumerate(companions) if isinstance(c, GradScaler)}
    files = _files(grower, run["extra"], run["random"], scalers)
    if each_rank.FILE in taken.files.manifest:
        files[each_rank.FILE] = taken.files.bytes(each_rank.FILE)
    if shards.METADATA not in taken.files.manifest:
        return files, {}
    return files, shards.one_piece(files, shards.Places(grower.model, companions))


def hand_on(files: dict[str, Any], spread: dict[str, Tensor], path: Path, blocks: Blocks) -> None:
    """Write what ``contents`` has gathered as the first checkpoint in a directory; ``blocks`` reads the tensors."""
    write(path, files, 1, (lambda directory: shards.write_alone(directory, spread)) if spread else None, blocks)


def _files(grower: Run, extra: Any, random: Any, known: Mapping[int, Any] | None = None) -> dict[str, Any]:
    """The files of a checkpoint: tensors by name, and bytes. ``known``: what is to be written of some companions."""
    model, companions = grower.model, _saved(grower.companions, grower.model)
    state, rest = network_tensors(model)
    waiting = gradients.waiting_gradients(model, companions, grower.watch)
    parts = {"model.safetensors": state, "buffers.safetensors": rest, gradients.FILE: waiting}
    files: dict[str, Any] = {name: tensors for name, tensors in parts.items() if tensors or tensors is state}
    listed = []
    for number, companion in enumerate(companions):
        if known is not None and number in known:
            listed.append(known[number])
            continue
        tensors, data = state_of(companion, model)
        name = f"{number}-{type(companion).__name__}.safetensors"
        if tensors:
            files[name] = tensors
        listed.append({"kind": kind_of(companion), "file": name if tensors else None, "data": data})
    kinds = {"model": f"{type(model).__module__}:{type(model).__qualname__}", "auxin": __version__, "format": FORMAT}
    own = grower.state_dict()
    whole = {
        **kinds,
        "network": network_data(model),
        "grower": {key: value for key, value in own.items() if key != "journal"},
        "companions": listed,
        "random": random,
        "extra": extra,
    }
    files["run.json"] = typed.dumps(whole, "run").encode()
    entries = {"format": FORMAT, "entries": own["journal"]}
    files["journal.json"] = json.dumps(entries, allow_nan=False, indent=1).encode()
    return files


def _saved(companions: Iterable[Any], model: nn.Module) -> tuple[Any, ...]:
    """Those with a state of their own: not a wrapper around the network."""
    return tuple(c for c in companions if not (isinstance(c, nn.Module) and unwrap(c) is model))


@dataclass(frozen=True)
class _Target:
    """Into what a checkpoint is loaded: a Grower's network with its companions, or a bare network with its wrappers."""

    grower: Run | None
    model: nn.Module
    companions: tuple[Any, ...]
    allowed: list[Any]
    ranks: Ranks

    @classmethod
    def of(cls, target: Any, allow: list[Any]) -> _Target:
        if isinstance(target, nn.Module):
            wrappers = with_wrappers(target, ())
            return cls(None, unwrap(target), wrappers, allow, Ranks.of(wrappers))
        allowed = [*target.references(), *allow]
        return cls(target, target.model, target.companions, allowed, Ranks.of(target.companions))


@dataclass(frozen=True)
class _Parts:
    """What a checkpoint says, read and resolved."""

    run: Mapping[str, Any]
    own: Mapping[str, Any]
    entries: Any
    tensors: Mapping[str, Any]
    waiting: Mapping[str, Any]


def _loaded(path: str | os.PathLike[str], into: _Target) -> Any:
    """Every rank reads the same, then every rank loads it; what is refused on one is refused on all."""
    # A run makes the steps again that were lost with a newer checkpoint; a bare network would be another one.
    with into.ranks.agree("ax.load: reading") as lines:
        files = read(path, go_back=into.grower is not None, ranks=into.ranks)
        parts = _read_parts(files, into)
        lines += [files.path.name, *(f"{name} {entry.digest}" for name, entry in sorted(files.manifest.items()))]
        lines += [] if into.ranks.alone else agreed.structure(into.model, optimizers_in(into.companions))
    grower = into.grower
    try:
        with (
            grower.or_as_before() if grower is not None else contextlib.nullcontext(),
            _as_before([into.model, *into.companions]),
            into.ranks.agree("ax.load"),
        ):
            return _carried_out(files, parts, into)
    except GrowthError:
        raise
    except Exception as error:  # whatever a companion, or a checkpoint of somebody else's making, brings about
        raise GrowthError(
            f"the checkpoint '{files.path}' cannot be loaded into this run ({type(error).__name__}: {error}). "
            "Nothing was changed."
        ) from error


def _read_parts(files: Files, into: _Target) -> _Parts:
    resolve = Allowed.of(into.model, into.allowed).resolve
    run = _mapping(typed.loads(files.bytes("run.json"), resolve, "run.json"), "run.json", KEYS)
    entries = _mapping(_raw(files.bytes("journal.json")), "journal.json", {"format", "entries"})["entries"]
    held = [
        files.tensors(name) if name in files.manifest else {}
        for name in ("model.safetensors", "buffers.safetensors", gradients.FILE)
    ]
    if into.grower is not None:
        _same_kinds(_saved(into.companions, into.model), run["companions"])
    own = each_rank.of_this_rank(files, run, into.ranks.rank, resolve)
    return _Parts(run, own, entries, {**held[0], **held[1]}, held[2])


def _carried_out(files: Files, parts: _Parts, into: _Target, keep: bool = False) -> Any:
    grower, model, run = into.grower, into.model, parts.run
    rule = Allowed.of(model, into.allowed)
    grown = None if grower is None else grower.journal
    with replayed(model, parts.entries, *into.companions, allow=into.allowed, grown=grown) as journal:
        if grower is None:
            resumed(run["grower"]["ramps"], model, (), (model,))
        else:
            grower.restore({**run["grower"], "journal": parts.entries}, journal, rule)
        ours = _saved(into.companions, model) if grower is not None else ()
        places = shards.Places(model, ours)
        held = shards.read(files, places)
        tensors, waiting = (
            places.sharded({**plain, **held.get(stem, {})}, stem)
            for stem, plain in (("model", parts.tensors), ("gradients", parts.waiting))
        )
        check_network(model, tensors)
        writes = []
        for companion, saved in zip(ours, run["companions"], strict=True) if grower is not None else ():
            stem = (saved["file"] or "").removesuffix(shards.TENSORS)
            plain = files.tensors(saved["file"]) if saved["file"] is not None else {}
            own = places.sharded({**plain, **held.get(stem, {})}, stem)
            writes.append(prepared(companion, model, own, saved["data"], keep))
        gradients.check_gradients(model, waiting)
        write_network(model, tensors, run["network"], run=grower is not None, keep=keep)
        for write_one in writes:
            write_one()
        if grower is not None:
            gradients.write_gradients(model, waiting, grower.watch)
            if parts.own["random"] is not None:
                restore_random(parts.own["random"])
        return parts.own["extra"]


@contextlib.contextmanager
def _as_before(roots: list[Any]) -> Iterator[None]:
    """What is raised inside puts everything back that can be reached from ``roots``."""
    snapshot = Snapshot(roots)
    snapshot.take()
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise


def _raw(text: bytes) -> Any:
    """JSON whose tags and references are resolved later, one growth at a time."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrowthError(f"journal.json is not valid JSON: {error}") from error


def _mapping(value: Any, name: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != keys:
        found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise GrowthError(f"{name} holds {found}, expected {sorted(keys)}: not a checkpoint of this version of auxin.")
    if value["format"] != FORMAT:
        raise GrowthError(f"{name} has format {value['format']!r}, this version of auxin reads {FORMAT}.")
    return value


def _same_kinds(companions: tuple[Any, ...], saved: list[Any]) -> None:
    ours, theirs = [kind_of(c) for c in companions], [s["kind"] for s in saved]
    if ours != theirs:
        words = [", ".join(k.partition(":")[2] for k in kinds) or "none" for kinds in (ours, theirs)]
        raise GrowthError(
            f"this run was saved with the companions ({words[1]}), the Grower has ({words[0]}). "
            "Build the same ones, in the same order."
        )
