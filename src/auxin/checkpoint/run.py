"""``save`` and ``load``: a whole run as an atomic directory of safetensors and typed JSON."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from auxin import typed
from auxin.anatomy.tree import unwrap
from auxin.checkpoint import gradients
from auxin.checkpoint.companions import kind_of, prepared, state_of
from auxin.checkpoint.directory import Files, Gone, read, write
from auxin.checkpoint.moment import check_moment
from auxin.checkpoint.network import check_network, network_data, network_tensors, write_network
from auxin.errors import GrowthError
from auxin.journal import FORMAT, replayed
from auxin.ramp import resumed
from auxin.randomness import random_data, restore_random
from auxin.refs import Allowed
from auxin.trial import Snapshot
from auxin.version import __version__

ATTEMPTS = 10  # at a directory into which another process saves: the newest checkpoint of now may be gone in a moment
KEYS = {"format", "auxin", "model", "network", "grower", "companions", "random", "extra"}


def save(grower: Any, path: str | os.PathLike[str], extra: Any = None, keep_last: int = 2) -> None:
    """Write a run: network, companions, journal, counts, global random generators, gradients that no step has used yet.

    Whole or not at all.

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
    if not hasattr(grower, "companions") or not isinstance(path, (str, os.PathLike)):
        kinds = f"{type(grower).__name__}, {type(path).__name__}"
        raise GrowthError(f"save(grower, path): got ({kinds}); pass the Grower first, then the directory.")
    check_moment(grower)
    model = grower.model
    state, rest = network_tensors(model)
    waiting = gradients.waiting_gradients(model, grower.companions, grower._watch)
    parts = {"model.safetensors": state, "buffers.safetensors": rest, gradients.FILE: waiting}
    files: dict[str, Any] = {name: tensors for name, tensors in parts.items() if tensors or tensors is state}
    companions = []
    for number, companion in enumerate(grower.companions):
        tensors, data = state_of(companion, model)
        name = f"{number}-{type(companion).__name__}.safetensors"
        if tensors:
            files[name] = tensors
        companions.append({"kind": kind_of(companion), "file": name if tensors else None, "data": data})
    kinds = {"model": f"{type(model).__module__}:{type(model).__qualname__}", "auxin": __version__, "format": FORMAT}
    own = grower.state_dict()
    whole = {
        **kinds,
        "network": network_data(model),
        "grower": {key: value for key, value in own.items() if key != "journal"},
        "companions": companions,
        "random": random_data(),
        "extra": extra,
    }
    files["run.json"] = typed.dumps(whole, "run").encode()
    files["journal.json"] = json.dumps(
        {"format": FORMAT, "entries": own["journal"]}, allow_nan=False, indent=1
    ).encode()
    write(path, files, keep_last)


def load(path: str | os.PathLike[str], target: Any, allow: Iterable[Any] = ()) -> Any:
    """Continue a run, or read a grown network for inference.

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
    allowed = list(allow)
    go_back = not isinstance(target, nn.Module)  # a run makes the lost steps again; a bare network would be another one
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(Gone):
            return _loaded(read(path, go_back), target, allowed)
    return _loaded(read(path, go_back), target, allowed)


def _loaded(files: Files, target: Any, allow: Iterable[Any]) -> Any:
    grower = None if isinstance(target, nn.Module) else target
    if grower is not None and not hasattr(grower, "companions"):
        raise GrowthError(f"load(path, target): target is a {type(target).__name__}; pass a Grower or an nn.Module.")
    model = unwrap(target) if grower is None else grower.model
    allowed = [*allow] if grower is None else [*grower.references(), *allow]
    rule = Allowed.of(model, allowed)
    resolve = rule.resolve
    run = _mapping(typed.loads(files.bytes("run.json"), resolve, "run.json"), "run.json", KEYS)
    entries = _mapping(_raw(files.bytes("journal.json")), "journal.json", {"format", "entries"})["entries"]
    tensors = files.tensors("model.safetensors")
    if "buffers.safetensors" in files.manifest:
        tensors = {**tensors, **files.tensors("buffers.safetensors")}
    waiting = files.tensors(gradients.FILE) if gradients.FILE in files.manifest else {}
    companions, grown = ((), None) if grower is None else (grower.companions, grower.journal)
    if grower is not None:
        _same_kinds(companions, run["companions"])
    try:
        with (
            grower.or_as_before() if grower is not None else contextlib.nullcontext(),
            _as_before([model, *companions]),
            replayed(model, entries, *companions, allow=allowed, grown=grown) as journal,
        ):
            if grower is None:
                resumed(run["grower"]["ramps"], model, (), (model,))
            else:
                grower.restore({**run["grower"], "journal": entries}, journal, rule)
            check_network(model, tensors)
            saved = zip(companions, _cut(run, companions), strict=True)
            writes = [_prepared(files, companion, model, one) for companion, one in saved]
            gradients.check_gradients(model, waiting)
            write_network(model, tensors, run["network"], run=grower is not None)
            for write_one in writes:
                write_one()
            if grower is not None:
                gradients.write_gradients(model, waiting, grower._watch)
                restore_random(run["random"])
            return run["extra"]
    except GrowthError:
        raise
    except Exception as error:  # whatever a companion, or a checkpoint of somebody else's making, brings about
        raise GrowthError(
            f"the checkpoint '{files.path}' cannot be loaded into this run ({type(error).__name__}: {error}). "
            "Nothing was changed."
        ) from error


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


def _cut(run: Mapping[str, Any], companions: tuple[Any, ...]) -> list[Any]:
    return run["companions"] if companions else []


def _prepared(files: Files, companion: Any, model: nn.Module, saved: Mapping[str, Any]) -> Any:
    tensors = files.tensors(saved["file"]) if saved["file"] is not None else {}
    return prepared(companion, model, tensors, saved["data"])


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
