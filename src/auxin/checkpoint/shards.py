"""Sharded tensors (FSDP2) in a checkpoint: every rank writes its shards, and any number of ranks may read them.

torch.distributed.checkpoint writes and reads them, in the directory of the checkpoint itself. Its ``.metadata``, which
says what lies where, is a pickle of torch's: load such a checkpoint only if you trust whoever wrote it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.wrappers import networks_of
from auxin.checkpoint.directory import SHARDS, Files, check_there
from auxin.checkpoint.manifest import Checksum, Entry, Manifest
from auxin.checkpoint.tensors import CHUNK
from auxin.errors import GrowthError
from auxin.ranks import Ranks
from auxin.sharded import is_spread, spread_like

METADATA = ".metadata"
TENSORS = ".safetensors"
Held = dict[str, dict[str, Tensor]]  # by file, without its suffix, and by name


class Places:
    """By which tensor of a run each tensor of its checkpoint is sharded: by the parameter that it is, or belongs to."""

    def __init__(self, model: nn.Module, companions: Iterable[Any]):
        self._found = {**_named("model", model), **_named("gradients", model)}
        for number, companion in enumerate(companions):
            stem = f"{number}-{type(companion).__name__}"
            self._found |= _named(stem, model)
            for copy, network in enumerate(networks_of(companion)):
                self._found |= _named(f"{stem}.copy{copy}", network)
        empty = [name for name, p in model.named_parameters() if is_spread(p) and p.device.type == "meta"]
        if empty:
            raise GrowthError(
                f"{empty[0]} is sharded and on the meta device. Call model.to_empty(device=...) before ax.load."
            )

    def of(self, key: str, shape: Iterable[int]) -> Any:
        """The parameter for a tensor of this name and shape, or None."""
        found = self._found.get(key.partition("::")[0])
        return found if found is not None and tuple(found.shape) == tuple(shape) else None

    def sharded(self, tensors: Mapping[str, Tensor], stem: str) -> dict[str, Tensor]:
        """The tensors of a file, sharded as the run is: those of a checkpoint of one process are still in one piece."""
        found = dict(tensors)
        for name, tensor in tensors.items():
            like = self.of(f"{stem}.{name}", tensor.shape)
            if is_spread(like) and not is_spread(tensor):
                found[name] = spread_like(tensor.to(like.device), like)
        return found


def taken_out(files: dict[str, Any], places: Places) -> dict[str, Tensor]:
    """Take the sharded tensors out of what one rank writes for all.

    Raises:
        GrowthError: one is not sharded as a parameter is, so that nobody would know how to shard it again.
    """
    found: dict[str, Tensor] = {}
    for file, content in files.items():
        for name in [name for name, value in content.items() if is_spread(value)] if isinstance(content, dict) else ():
            key = f"{file.removesuffix(TENSORS)}.{name}"
            if not is_spread(places.of(key, content[name].shape)):
                raise GrowthError(
                    f"ax.save: {name} of {file.removesuffix(TENSORS)} is sharded (a DTensor of shape "
                    f"{tuple(content[name].shape)}), and no parameter of that name and shape is. Under FSDP2 use an "
                    "optimizer whose state has the shapes of its parameters, as AdamW and SGD have."
                )
            found[key] = content.pop(name)
    return found


def one_piece(files: dict[str, Any], places: Places) -> dict[str, Tensor]:
    """Take out of what one process writes the tensors that every rank of a sharded run would hold a part of."""
    found: dict[str, Tensor] = {}
    for file, content in files.items():
        stem = file.removesuffix(TENSORS)
        for name, value in [*content.items()] if isinstance(content, dict) else ():
            if value.dim() and places.of(f"{stem}.{name}", value.shape) is not None:
                found[f"{stem}.{name}"] = content.pop(name)
    return found


def write_alone(directory: Path, whole: dict[str, Tensor]) -> Manifest:
    """Write tensors of one process as ``write`` does those of many; any number of ranks reads them.

    Raises:
        GrowthError: they cannot be written.
    """
    dcp = _dcp()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is ")
            dcp.save(whole, checkpoint_id=directory, no_dist=True)
    except (dcp.CheckpointException, Exception) as error:  # the former is no Exception
        raise GrowthError(f"the shards cannot be written: {_words(error, of_ranks=False)}.") from error
    files = (directory / METADATA, *directory.glob(f"*{SHARDS}"))
    return {file.name: Entry(*_sum(file), None) for file in files}


def write(path: str | os.PathLike[str], temporary: Path | None, spread: dict[str, Tensor], ranks: Ranks) -> Manifest:
    """Write the shards of every rank into the unfinished checkpoint of rank 0. Every rank calls it.

    Args:
        path: the directory of the run.
        temporary: of the unfinished checkpoint, on rank 0.
        spread: of ``taken_out``.
        ranks: all that hold a part.

    Returns:
        On rank 0 the files of all ranks, for the manifest.

    Raises:
        GrowthError: a rank cannot write, or does not see that directory.
    """
    dcp = _dcp()
    directory = Path(path) / ranks.share("ax.save: where", lambda: temporary.name if temporary is not None else "")[0]
    with ranks.agree("ax.save: the directory"):
        if not directory.is_dir():
            raise GrowthError(
                f"rank {ranks.rank} does not see '{directory}', which rank 0 has made. Under FSDP2 each rank writes "
                "its shards: ax.save(grower, path) needs one directory on a disk that all ranks share."
            )
    try:
        dcp.save(spread, checkpoint_id=directory, process_group=ranks.group)
    except (dcp.CheckpointException, Exception) as error:  # the former is no Exception
        raise GrowthError(
            f"Cannot save to '{path}': {_words(error)}. Nothing was left behind, and earlier checkpoints are as they "
            "were. Make room, or save somewhere else: ax.save(grower, 'another/directory')."
        ) from error
    own = [*directory.glob(f"__{ranks.rank}_*{SHARDS}"), *([directory / METADATA] if ranks.rank == 0 else [])]
    told = ranks.collect("ax.save: the shards", lambda: [[file.name, *_sum(file)] for file in own])
    return {name: Entry(size, digest, None) for entries in told for name, size, digest in entries}


def read(files: Files, places: Places) -> Held:
    """The sharded tensors of a checkpoint: of each what this rank holds; in a run that is not sharded, all of it.

    What this run has no place for is on the meta device: checks name it, and nobody reads it.

    Raises:
        GrowthError: they cannot be read.
        Gone: the checkpoint has been removed meanwhile.
    """
    held: Held = {}
    if METADATA not in files.manifest:
        return held
    dcp = _dcp()
    known: dict[tuple[Any, ...], Tensor] = {}
    wanted: dict[str, Tensor] = {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            for key, stored in dcp.FileSystemReader(files.path).read_metadata().state_dict_metadata.items():
                like, (stem, _, name) = places.of(key, stored.size), key.partition(".")
                empty = _empty(stored, like)
                if like is not None:  # one tensor under two names stays one
                    wanted[key] = empty = known.setdefault((stem, id(like), key.partition("::")[2]), empty)
                held.setdefault(stem, {})[name] = empty
            # Without collectives: each rank reads what it needs, so none waits for one that has failed.
            dcp.load(wanted, checkpoint_id=files.path, no_dist=True)
    except (dcp.CheckpointException, Exception) as error:
        check_there(files.path)
        raise GrowthError(
            f"the shards in '{files.path}' cannot be read: {_words(error, of_ranks=False)}. Nothing was changed. Load "
            "an older checkpoint."
        ) from error
    return held


def _dcp() -> Any:
    from torch.distributed import checkpoint

    return checkpoint


def _empty(stored: Any, like: Any) -> Tensor:
    if is_spread(like):
        return torch.empty_like(like.detach(), dtype=stored.properties.dtype)
    device = "meta" if like is None else "cpu"
    return torch.empty(stored.size, dtype=stored.properties.dtype, device=device)


def _sum(file: Path) -> tuple[int, str]:
    found = Checksum()
    with open(file, "rb") as opened:
        while block := opened.read(CHUNK):
            found.update(block)
    return found.size, found.digest


def _named(stem: str, network: nn.Module) -> dict[str, Tensor]:
    return {f"{stem}.{name}": p for name, p in network.named_parameters(remove_duplicate=False)}


def _words(error: BaseException, of_ranks: bool = True) -> str:
    """What went wrong, and on which rank, without the tracebacks that a CheckpointException spells out."""
    failures: Mapping[int, Any] = getattr(error, "failures", {})
    told = [(f"rank {n}: " if of_ranks else "") + f"{type(one).__name__}: {one}" for n, (one, _) in failures.items()]
    return "; ".join(told) or f"{type(error).__name__}: {error}"
