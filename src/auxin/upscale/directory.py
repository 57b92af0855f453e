"""A Hugging Face checkpoint directory: read with every doubt raised, and written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auxin.errors import GrowthError
from auxin.upscale.files import Stored, read_header

CONFIG, INDEX, SINGLE, RECORD = "config.json", "model.safetensors.index.json", "model.safetensors", "auxin.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FOREIGN = (".h5", ".msgpack", ".onnx", ".gguf", ".tflite", ".ot", ".npz")  # the same weights for other programs


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory holds.

    Attributes:
        path: of the directory, without links.
        config: of the model.
        shards: file name -> its metadata, in the order of their names.
        tensors: all of them by name, in the order of shards and bytes.
        index: what the index says beside the names of files; None where there is one file without an index.
        others: further files, relative to the directory, which a copy takes along.
        left_out: weights for other programs, which would be out of date in a copy.
    """

    path: Path
    config: dict[str, Any]
    shards: dict[str, dict[str, str]]
    tensors: dict[str, Stored]
    index: dict[str, Any] | None
    others: tuple[str, ...]
    left_out: tuple[str, ...]


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers and the configuration, no values.

    Raises:
        GrowthError: there is no such checkpoint, or a file is missing, cut off, a pickle, a link that leads elsewhere,
            or not named by the index.
    """
    place = Path(path)
    if not place.is_dir():
        raise GrowthError(f"'{place}' is no directory. Give the one that save_pretrained was given.")
    root = place.resolve()
    files = _files(root)
    if CONFIG not in files:
        raise GrowthError(f"'{place}' has no {CONFIG}. Give the directory that save_pretrained was given.")
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        raise GrowthError(
            f"'{place}' holds {_some(pickles)}: a pickle runs code when it is opened, and is not read. Load the model "
            "once and call model.save_pretrained('another/directory'); leave optimizer states behind."
        )
    config = _mapping(root / CONFIG)
    weights = [name for name in files if name.endswith(".safetensors")]
    index = _mapping(root / INDEX) if INDEX in files else None
    named = _named(root, index, weights)
    shards, tensors = {}, {}
    for name, expected in sorted(named.items()):
        found, shards[name] = read_header(root / name)
        if expected is not None and set(found) != expected:
            missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
            words = f"lacks {_some(missing)}, which the index places there" if missing else ""
            words = words or f"holds {_some(unknown)}, which the index does not name there"
            raise GrowthError(f"'{root / name}' {words}: shards of two checkpoints are mixed. Fetch all of them again.")
        tensors |= found
    known = {CONFIG, INDEX, RECORD, *named}
    left_out = tuple(name for name in files if name.endswith(FOREIGN))
    others = tuple(name for name in files if name not in known and name not in left_out)
    return Checkpoint(root, config, shards, tensors, index, others, left_out)


@contextmanager
def whole(target: Path, size: int) -> Iterator[Path]:
    """A temporary directory beside ``target`` that takes its name at the end, or goes without a trace.

    What a killed process has left behind is removed the next time: a living one holds a lock on its directory.

    Args:
        target: does not exist, or is an empty directory.
        size: bytes that will be written.

    Raises:
        GrowthError: there is no room, or the disk says no.
    """
    place = Path(os.path.abspath(target))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        free = shutil.disk_usage(place.parent).free
        if free < size:
            raise GrowthError(
                f"'{target}' needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free there. Nothing was written."
            )
        temporary = place.parent / f".{place.name}.upscale-{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
            _flush_tree(temporary)
            os.rename(temporary, place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(lock)
        _flush(place.parent)
    except OSError as error:
        raise GrowthError(f"'{target}' cannot be written: {error}. Nothing was left behind.") from error


def check_target(source: Path, target: Path) -> None:
    """Check that a checkpoint may be written there.

    Raises:
        GrowthError: something stands there already, or it is inside the source.
    """
    if target.is_symlink():
        raise GrowthError(f"'{target}' is a link. Name a directory that does not exist yet.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise GrowthError(f"'{target}' exists and is not empty. Name a directory that does not exist yet.")
    place = target.resolve()
    if place == source or source in place.parents:
        raise GrowthError(f"'{target}' is inside '{source}', which is never written to. Name a directory beside it.")


def _files(root: Path) -> list[str]:
    """Every file, relative to the directory; hidden directories (.git, .cache) are passed over."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*folders, *names]:
            path = Path(folder, name)
            if not path.is_symlink():
                continue
            inside = path.resolve().is_relative_to(root) and path.is_file()
            if not inside:
                raise GrowthError(
                    f"'{path}' is a link to '{os.readlink(path)}', which is not followed out of the checkpoint. "
                    f"Copy it with what the links lead to: cp -rL '{root}' another/directory"
                )
        odd = [name for name in names if not Path(folder, name).is_file()]
        if odd:
            raise GrowthError(f"'{Path(folder, odd[0])}' is not an ordinary file.")
        found += [Path(folder, name).relative_to(root).as_posix() for name in sorted(names)]
    return found


def _named(root: Path, index: dict[str, Any] | None, weights: list[str]) -> dict[str, set[str] | None]:
    """Shard -> names of the tensors that the index places in it; None without an index."""
    if index is None and SINGLE not in weights:
        shards = f"only {_some(weights)} and no {INDEX}" if weights else "no safetensors file"
        raise GrowthError(
            f"'{root}' holds {shards}. It takes {SINGLE}, or shards with their {INDEX}, as save_pretrained writes them."
        )
    named: dict[str, set[str] | None] = {SINGLE: None} if index is None else _placed(root, index)
    missing = [name for name in named if name not in weights]
    if missing:
        raise GrowthError(f"'{root}' lacks {_some(missing)}, which its {INDEX} names. Fetch the shards again.")
    extra = [name for name in weights if name not in named]
    if extra:
        raise GrowthError(
            f"'{root}' holds {_some(extra)} beside what its "
            f"{INDEX if index is not None else SINGLE} tells of: tensors that nobody loads. Move it away."
        )
    return named


def _placed(root: Path, index: dict[str, Any]) -> dict[str, set[str] | None]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise GrowthError(f"'{root / INDEX}' has no weight_map: it is no index of safetensors shards.")
    found: dict[str, Any] = {}
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise GrowthError(f"'{root / INDEX}' places {tensor} in {name!r}, which is no file of this directory.")
        found.setdefault(name, set()).add(tensor)
    return found


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise GrowthError(f"'{path}' is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise GrowthError(f"'{path}' holds a {type(value).__name__}, not a JSON object.")
    return value


def _sweep(place: Path) -> None:
    """Remove what killed processes have left of this target."""
    for path in place.parent.glob(f".{_escaped(place.name)}.upscale-*-*"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _flush_tree(root: Path) -> None:
    """Bring directories down to the disk; their files are there already."""
    for folder, _, _ in os.walk(root):
        _flush(Path(folder))


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as save_pretrained does, and bring it down to the disk."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
