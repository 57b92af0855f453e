"""``auxin grow``: a checkpoint of a run in, that of the grown run out, as if the run had grown where it was saved.

It is the growth of a living run, carried out on the run that the checkpoint holds. Only its tensors lie in files
(``on_disk``), so that the whole of it need not be in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from auxin.anatomy.wrappers import networks_of
from auxin.change import Change
from auxin.checkpoint.run import TakenOver, contents, hand_on, take_over
from auxin.checkpoint.shards import METADATA
from auxin.checkpoint.tensors import Blocks, blocks_of
from auxin.edits.after import After
from auxin.edits.duplicate import Duplicate
from auxin.edits.insert import Insert
from auxin.edits.remove import Remove
from auxin.edits.repeat import Repeat, Untie
from auxin.edits.replace import Replace
from auxin.edits.wake import Wake
from auxin.edits.widen import Widen
from auxin.errors import GrowthError
from auxin.grower import Grower
from auxin.journal import edit_from_json
from auxin.logbook import Logbook
from auxin.on_disk import OnDisk
from auxin.refs import Allowed, name_of
from auxin.sharded import is_spread
from auxin.whole_directory import check_target, whole

EDITS = {e.__name__: e for e in (Duplicate, Insert, After, Widen, Replace, Remove, Wake, Repeat, Untie)}
MARGIN = 1 << 20  # bytes of a checkpoint beside its tensors
Show = Callable[[float, str], None]


@dataclass(frozen=True)
class Grown:
    """What ``grow_checkpoint`` has done, or would do. Prints itself.

    Attributes:
        source: the checkpoint that was read.
        changes: the growths, in order.
        sizes: by file: bytes before and after; the shards of all ranks count as one file.
    """

    source: Path
    changes: tuple[Change, ...]
    sizes: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        before, after = (sum(pair[i] for pair in self.sizes.values()) for i in (0, 1))
        width = max(map(len, self.sizes))
        lines = [f"{self.source}: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB"]
        for name, (old, new) in self.sizes.items():
            lines.append(f"  {name:<{width}}  {old / 1e6:10,.1f} MB -> {new / 1e6:10,.1f} MB")
        return "\n".join([*map(str, self.changes), *lines])


def grow_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    build: Callable[[], Any],
    edits: str | os.PathLike[str] | Sequence[Any],
    dry_run: bool = False,
    show: Show | None = None,
) -> Grown:
    """Grow the run that a checkpoint holds, between two jobs: network, optimizers, schedules, averages, journal.

    ``ax.load(target, grower)`` goes on from it exactly as after the same growths in a run that goes on: each is carried
    out and proved by ``grower.grow``, on the CPU. Tensors are in memory one at a time.

    Args:
        source: the directory of ``ax.save``, or one checkpoint in it; also one of many ranks under FSDP2. Never written
            to.
        target: a directory that does not exist yet, or is empty. It appears when it is whole.
        build: returns the Grower of the run, as its program builds it before ``ax.load``: on the CPU, without
            ``fully_shard`` and DistributedDataParallel. Large tensors get no memory and no first values while it runs.
        edits: a JSON file, or edits; one after the other. What ``build`` gives to ``Grower`` does not matter for this.
        dry_run: grow, and write nothing.
        show: told how far the writing is, 0 to 1, and in words.

    Returns:
        What has grown.

    Raises:
        GrowthError: something does not fit, is damaged, or cannot be written. Nothing is left behind then.

    Example:
        ``grow_checkpoint("run/last", "run/deeper", build, [Duplicate("blocks", by=1)])``; on the command line
        ``auxin grow run/last run/deeper --model train:build --edits edits.json``.
    """
    place = Path(target)
    check_target(Path(source).resolve(), place)
    wanted = _parsed(Path(edits)) if isinstance(edits, (str, os.PathLike)) else list(edits)
    disk = OnDisk(next(parent for parent in (*place.absolute().parents,) if parent.is_dir()))
    try:
        with disk:
            grower = _built(build, disk)
            taken = take_over(source, grower, disk.mapped)
            wanted = [_read(edit, number, grower) for number, edit in enumerate(wanted)]
            changes = tuple(grower.grow(edit) for edit in wanted)
            files, spread = contents(taken, grower)
        grown = Grown(taken.files.path, changes, _sizes(taken, files, spread))
        if not dry_run:
            total = sum(after for _, after in grown.sizes.values())
            # Shards are written by torch, which may copy them first.
            with disk if spread else contextlib.nullcontext(), whole(place, total + MARGIN) as folder:
                hand_on(files, spread, folder, _read_from(disk, total, show))
    except OSError as error:
        raise GrowthError(f"'{source}' cannot be read: {error.strerror}. Nothing was left behind.") from error
    return grown


def _built(build: Callable[[], Any], disk: OnDisk) -> Grower:
    with disk.building():
        made = build()
    grower = made[-1] if isinstance(made, tuple) and made else made
    if not isinstance(grower, Grower):
        kind = ", ".join(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
        raise GrowthError(
            f"the factory returns ({kind}). Return the Grower that the program hands to ax.load: it knows the network "
            "and what hangs on it."
        )
    networks = (grower.model, *(copy for c in grower.companions for copy in networks_of(c)))
    for network in networks:
        for name, tensor in network.named_parameters():
            if is_spread(tensor) or tensor.device.type != "cpu":
                where = "sharded" if is_spread(tensor) else f"on {tensor.device}"
                raise GrowthError(
                    f"{name} is {where}: between two jobs a run grows in one process, on the CPU. Let the factory "
                    "build the plain network there; a checkpoint holds neither devices nor wrappers, and the next job "
                    "builds as it likes."
                )
    grower.log = Logbook(None)  # that of the run belongs to whoever trains it
    return grower


def _parsed(path: Path) -> list[Any]:
    """The edits in a file, as plain data."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GrowthError(f"'{path}' cannot be read: {error.strerror}. {_FORM}") from error
    except (ValueError, RecursionError) as error:
        raise GrowthError(f"'{path}' is not valid JSON: {error}. {_FORM}") from error
    found = data if isinstance(data, list) else [data]
    for one in found:
        if not found or not all(isinstance(edit, dict) for edit in (one if isinstance(one, list) and one else [one])):
            raise GrowthError(f"'{path}' holds {json.dumps(one)[:80]} in place of an edit. {_FORM}")
    if not found:
        raise GrowthError(f"'{path}' holds no edit. {_FORM}")
    return found


_FORM = (
    'Write a list of edits, each by its class and arguments: [{"type": "Duplicate", "at": "blocks", "by": 1}]; a list '
    "inside that list is one growth by several edits."
)


def _read(edit: Any, number: int, grower: Grower) -> Any:
    """An edit from plain data; one that is an edit already as it is."""
    if isinstance(edit, list) and edit and isinstance(edit[0], dict):
        return [_read(one, number, grower) for one in edit]
    if not isinstance(edit, dict):
        return edit
    kind = edit.get("type")
    if isinstance(kind, str) and ":" not in kind:
        if kind not in EDITS:
            raise GrowthError(f"edit {number}: there is no {kind!r}; the edits are {', '.join(EDITS)}. {_FORM}")
        edit = {**edit, "type": name_of(EDITS[kind])}
    return edit_from_json(edit, f"edit {number}", Allowed.of(grower.model, grower.references()))


def _sizes(taken: TakenOver, files: dict[str, Any], spread: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    before = {name: entry.size for name, entry in taken.files.manifest.items()}
    after = {name: _size(content) for name, content in files.items()}
    if METADATA in before:
        shards = [name for name in before if name not in after]
        before = {name: size for name, size in before.items() if name not in shards} | {
            "shards": sum(before[name] for name in shards)
        }
        after["shards"] = _size(spread)
    return {name: (before.get(name, 0), after.get(name, 0)) for name in {**before, **after}}


def _size(content: Any) -> int:
    if isinstance(content, bytes):
        return len(content)
    return sum({id(tensor): tensor.nbytes for tensor in content.values()}.values())


def _read_from(disk: OnDisk, total: int, show: Show | None) -> Blocks:
    """Reads the tensors that are written, and tells how far that is."""
    written = 0

    def blocks(tensor: Tensor) -> Iterator[memoryview]:
        nonlocal written
        yield from disk.blocks(tensor) or blocks_of(tensor)
        disk.release(tensor)
        written += tensor.nbytes
        if show is not None:
            show(min(written / total, 1.0), f"{written / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    return blocks
