"""A Hugging Face checkpoint directory, read with every doubt raised."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as save_pretrained does, and bring it down to the disk."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
