"""An atomic, versioned directory: ``path/checkpoint-000001/``, ``path/checkpoint-000002/``, ... each whole or absent.

A checkpoint is written beside the others under a temporary name, flushed to the disk file by file, its manifest
last, and then renamed. Nothing that was there before is touched until then.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from auxin.checkpoint import manifest, tensors
from auxin.errors import GrowthError
from auxin.ranks import Ranks

Content = bytes | Mapping[str, Tensor]

_COMPLETE = re.compile(r"checkpoint-(\d{6,18})")
_TEMPORARY = re.compile(r"\.tmp-(\d+)-([0-9a-f]{8})-[0-9a-f]+")
_FILE = re.compile(r"\.metadata|[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
SHARDS = ".distcp"  # the ending of files that torch.distributed.checkpoint has written, and reads again
BUFFER = 1 << 16  # bytes; larger blocks are written from where they lie
_AT_WORK: set[str] = set()  # names of the temporaries into which this process writes now
_ABANDONED = 24 * 3600  # seconds without a change after which a temporary of another machine is taken for dead


class Gone(GrowthError):
    """The checkpoint was removed while it was read, by a process that saves to the same path."""


@dataclass(frozen=True)
class Files:
    """A checkpoint whose every file was found whole.

    Attributes:
        path: of this one checkpoint.
        manifest: what its manifest says.
        contents: the files that hold no tensors.
        read: how tensors are read, see ``tensors.load``.
    """

    path: Path
    manifest: manifest.Manifest
    contents: dict[str, bytes]
    read: tensors.Read | None = None

    def bytes(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            GrowthError: the checkpoint has no such file.
        """
        if name not in self.contents:
            raise GrowthError(f"The checkpoint '{self.path}' has no file {name}, only {sorted(self.manifest)}.")
        return self.contents[name]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file, on the CPU; the same object under every name that shared memory when written.

        Raises:
            GrowthError: the checkpoint has no such file, or it cannot be read any more.
            Gone: it has been removed since.
        """
        found = self.manifest.get(name)
        if found is None or found.layout is None:
            raise GrowthError(f"The checkpoint '{self.path}' has no tensors {name}, only {sorted(self.manifest)}.")
        try:
            return tensors.load(self.path / name, found.layout, self.read)
        except GrowthError:
            check_there(self.path)
            raise


def write(
    path: str | os.PathLike[str],
    files: Mapping[str, Content],
    keep_last: int = 2,
    more: Callable[[Path], manifest.Manifest] | None = None,
    blocks: tensors.Blocks | None = None,
) -> Path:
    """Write one complete checkpoint, or nothing.

    Args:
        path: the directory of the run; made if missing.
        files: file name -> its bytes, or named tensors (any device, tied ones are stored once).
        keep_last: how many checkpoints stay, this one included. The disk must hold one more while it is written.
        more: writes further files into the unfinished directory, and says what the manifest has to say of them.
        blocks: reads the values of tensors, see ``tensors.save``.

    Returns:
        The directory of the new checkpoint.

    Raises:
        GrowthError: it could not be written; earlier checkpoints are as they were.
    """
    place = Path(path)
    check_count(keep_last)
    for name in files:
        if not _FILE.fullmatch(name) or name == manifest.NAME:
            raise GrowthError(f"{name!r} is no name for a file of a checkpoint.")
    with _explained(place, files):
        made = _make(place)
        temporary = place / f".tmp-{os.getpid()}-{_host()}-{secrets.token_hex(4)}"
        _AT_WORK.add(temporary.name)
        try:
            temporary.mkdir()
            _fill(temporary, files, more(temporary) if more is not None else {}, blocks)
            complete = _publish(temporary, place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for directory in made:
                with suppress(OSError):
                    directory.rmdir()
            raise
        finally:
            _AT_WORK.discard(temporary.name)
    with suppress(OSError, GrowthError):
        _flush(place)
        _prune(place, complete, keep_last)
    return complete


def check_count(keep_last: int) -> None:
    """Check a number of checkpoints to keep.

    Raises:
        GrowthError: it is none.
    """
    if type(keep_last) is not int or keep_last < 1:
        raise GrowthError(f"keep_last={keep_last!r}: how many checkpoints stay is a whole number from 1.")


def read(path: str | os.PathLike[str], go_back: bool = False, ranks: Ranks | None = None) -> Files:
    """The newest checkpoint in a directory, or the one at ``path`` itself, every file of it verified first.

    Args:
        path: what was given to ``write``, or one ``checkpoint-...`` inside.
        go_back: where the newest in a directory was cut off, read the newest that is whole, with a warning.
        ranks: all of which call this; they share the work of verifying shards, of which there may be terabytes.

    Returns:
        Its files.

    Raises:
        GrowthError: there is none, or it is damaged; names the file, and an older checkpoint that is whole.
        Gone: another process has saved on and removed it meanwhile.
    """
    place = Path(path)
    try:
        one = place.is_dir() and (_COMPLETE.fullmatch(place.name) or (place / manifest.NAME).exists())
    except OSError as error:
        raise GrowthError(_nothing(place, error)) from None
    if one:
        checkpoint, older = place, _older(place.parent, place)
    else:
        found = _checkpoints(place)
        if not found:
            raise GrowthError(_nothing(place))
        checkpoint = found[-1]
        if checkpoint.is_symlink():
            raise GrowthError(f"'{checkpoint}' is a link. Name the checkpoint that it leads to.")
        older = found[-2::-1]
    try:
        return _verified(checkpoint, ranks)
    except manifest.Damage as damage:
        check_there(checkpoint)
        found = _first_whole(older, ranks)
        text = f"The checkpoint '{checkpoint}' is damaged or was cut off: {damage}."
        if go_back and not one and isinstance(damage, manifest.Cut) and found is not None:
            warnings.warn(f"{text} Loaded the newest that is whole: '{found.path}'.", stacklevel=4)
            return found
        hint = "There is no older one that is whole beside it."
        if found is not None:
            hint = f'An older one is whole: ax.load("{found.path}", grower).'
        raise GrowthError(f"{text} Nothing was loaded. {hint}") from None


# ---- writing


def _fill(
    directory: Path,
    files: Mapping[str, Content],
    there: manifest.Manifest,
    blocks: tensors.Blocks | None = None,
) -> None:
    """Write every file, then the manifest, each down to the disk, beside those that are there."""
    entries = dict(there)
    for name, content in files.items():
        target = directory / name
        layout, written = None, manifest.Checksum()
        with open(target, "xb", buffering=BUFFER) as file:

            def put(data: Any, file: BinaryIO = file, written: manifest.Checksum = written) -> None:
                written.update(data)
                file.write(data)

            if isinstance(content, Mapping):
                layout = tensors.save(put, content, blocks)
            else:
                put(content)
            file.flush()
            os.fsync(file.fileno())
        entries[name] = manifest.Entry(written.size, written.digest, layout)
    (directory / manifest.NAME).write_bytes(manifest.dump(entries))
    _flush(directory / manifest.NAME)
    _flush(directory)


def _flush(path: Path) -> None:
    """Bring a file or directory down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, place: Path) -> Path:
    """Give a finished directory the next number; a concurrent writer may take that first."""
    while True:
        numbers = [int(match[1]) for name in os.listdir(place) if (match := _COMPLETE.fullmatch(name))]
        complete = place / f"checkpoint-{max(numbers, default=0) + 1:06d}"
        try:
            os.rename(temporary, complete)
            return complete
        except OSError:
            if not os.path.lexists(complete):
                raise


def _prune(place: Path, newest: Path, keep_last: int) -> None:
    """Remove what is old, and what dead writers left; a checkpoint loses its name first, so it is never half there."""
    kept = _checkpoints(place)
    for old in [found for found in kept[:-keep_last] if found != newest and not found.is_symlink()]:
        doomed = place / f".tmp-{os.getpid()}-{_host()}-{secrets.token_hex(4)}"
        with suppress(OSError):
            os.rename(old, doomed)
            shutil.rmtree(doomed)
    for entry in os.scandir(place):
        match = _TEMPORARY.fullmatch(entry.name)
        if match and entry.is_dir(follow_symlinks=False) and _dead(entry, int(match[1]), match[2]):
            shutil.rmtree(entry.path, ignore_errors=True)


def _dead(entry: os.DirEntry[str], pid: int, host: str) -> bool:
    if host == _host():
        if pid == os.getpid():  # in a container the process that was killed had the same number
            return entry.name not in _AT_WORK
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
    with suppress(OSError):
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED
    return False


def _host() -> str:
    """Eight digits for this machine: a process number says nothing about another one on the same file system."""
    return sha256(socket.gethostname().encode()).hexdigest()[:8]


def _make(place: Path) -> list[Path]:
    """Make the directory and its parents; those that are new, innermost first."""
    missing = [directory for directory in (place, *place.parents) if not directory.exists()]
    place.mkdir(parents=True, exist_ok=True)
    for directory in missing:
        _flush(directory.parent)
    return missing


@contextmanager
def _explained(place: Path, files: Mapping[str, Content]) -> Iterator[None]:
    """Turn what the system says into what to do about it."""
    try:
        yield
    except OSError as error:
        size = sum(
            sum(tensor.numel() * tensor.element_size() for tensor in content.values())
            if isinstance(content, Mapping)
            else len(content)
            for content in files.values()
        )
        free = ""
        with suppress(OSError):  # even to ask whether a name that is too long is a directory
            existing = next((parent for parent in (place, *place.parents) if parent.is_dir()), place)
            free = f", {shutil.disk_usage(existing).free / 1e6:,.1f} MB are free there"
        reason = error.strerror or str(error)
        raise GrowthError(
            f"Cannot save to '{place}': {reason} ({size / 1e6:,.1f} MB to write{free}). Nothing was left behind, and "
            f"earlier checkpoints are as they were. Make room or the directory writable, or save somewhere else: "
            f"ax.save(grower, 'another/directory')."
        ) from error


# ---- reading


def _checkpoints(place: Path) -> list[Path]:
    """Everything in a directory that is named like a checkpoint, oldest first."""
    try:
        found = [(int(match[1]), name) for name in os.listdir(place) if (match := _COMPLETE.fullmatch(name))]
    except OSError as error:
        raise GrowthError(_nothing(place, error)) from None
    return [place / name for _, name in sorted(found)]


def _older(place: Path, checkpoint: Path) -> list[Path]:
    """Those before one checkpoint, newest first."""
    everything = _checkpoints(place)
    return everything[: everything.index(checkpoint)][::-1] if checkpoint in everything else []


def _nothing(place: Path, error: OSError | None = None) -> str:
    if error is not None and not isinstance(error, FileNotFoundError):
        return f"Cannot read '{place}': {error.strerror}. Give the directory that ax.save was given."
    what = "nothing" if error is not None else "no checkpoint"
    return f"There is {what} at '{place}'. Give the directory that ax.save was given, as ax.load('run/last', grower)."


def check_there(checkpoint: Path) -> None:
    """Raise ``Gone`` for a checkpoint that has been removed."""
    if not os.path.lexists(checkpoint):
        raise Gone(
            f"'{checkpoint}' was removed while it was read: another process saves there, and keeps too few for that. "
            "Let it keep more, ax.save(grower, path, keep_last=5), or load once it has ended."
        ) from None


def _verified(checkpoint: Path, ranks: Ranks | None = None) -> Files:
    listed = manifest.parse(_read(checkpoint, manifest.NAME, manifest.LARGEST))
    shards = sorted(name for name in listed if name.endswith(SHARDS))
    contents = {}
    for name, entry in listed.items():
        if not _FILE.fullmatch(name):
            raise manifest.Damage(f"{manifest.NAME} names a file {name!r}")
        if name not in shards:
            _verify(checkpoint, name, entry, contents)
    if shards and ranks is not None and _one_for_all(checkpoint, ranks):
        _share(checkpoint, {name: listed[name] for name in shards}, ranks)
    else:
        for name in shards:
            _verify(checkpoint, name, listed[name])
    return Files(checkpoint, listed, contents)


def _verify(checkpoint: Path, name: str, entry: manifest.Entry, contents: dict[str, bytes] | None = None) -> None:
    """Read a file for its checksum, and keep it where it holds no tensors."""
    with _opened(checkpoint, name) as descriptor:
        if (size := os.fstat(descriptor).st_size) != entry.size:
            raise manifest.Cut(f"{name} has {size:,} bytes, it was written with {entry.size:,}")
        if contents is not None and entry.layout is None:
            contents[name] = _all(descriptor)
        blocks = [contents[name]] if contents is not None and name in contents else _blocks(descriptor)
        if not entry.holds(blocks):
            raise manifest.Cut(f"{name} is not what was written (its checksum differs)")


def _one_for_all(checkpoint: Path, ranks: Ranks) -> bool:
    """Whether the ranks see one file system, and not each a copy of its own."""

    def seen() -> list[Any]:
        found = os.stat(checkpoint / manifest.NAME)
        return [checkpoint.name, found.st_ino, found.st_mtime_ns]

    told = ranks.share("ax.load: the checkpoint", seen)
    return len(told) > 1 and all(one == told[0] for one in told)


def _share(checkpoint: Path, shards: dict[str, manifest.Entry], ranks: Ranks) -> None:
    """Each rank verifies its part of the shards; what one has found is raised on all."""

    def found() -> tuple[bool, str]:
        try:
            for name in [*shards][ranks.rank :: ranks.size]:
                _verify(checkpoint, name, shards[name])
        except manifest.Damage as damage:
            return isinstance(damage, manifest.Cut), str(damage)
        return False, ""

    for cut, text in ranks.share("ax.load: the shards", found):
        if text:
            raise (manifest.Cut if cut else manifest.Damage)(text)


@contextmanager
def _opened(checkpoint: Path, name: str) -> Iterator[int]:
    try:
        descriptor = os.open(checkpoint / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise manifest.Cut(f"{name} is missing") from None
    except OSError as error:
        link = (checkpoint / name).is_symlink()
        reason = "is a link, and links are not followed" if link else f"cannot be read: {error.strerror}"
        raise manifest.Damage(f"{name} {reason}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise manifest.Damage(f"{name} is not an ordinary file")
        yield descriptor
    except OSError as error:
        raise manifest.Damage(f"{name} cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _all(descriptor: int) -> bytes:
    return b"".join(map(bytes, _blocks(descriptor)))


def _blocks(descriptor: int) -> Iterator[memoryview]:
    """What a file holds, block by block; each stands where the one before stood."""
    held = memoryview(bytearray(tensors.CHUNK))
    while length := os.readv(descriptor, [held]):
        yield held[:length]


def _read(checkpoint: Path, name: str, largest: int) -> bytes:
    with _opened(checkpoint, name) as descriptor:
        if os.fstat(descriptor).st_size > largest:
            raise manifest.Damage(f"{name} is larger than any that was written")
        return _all(descriptor)


def _first_whole(checkpoints: list[Path], ranks: Ranks | None) -> Files | None:
    for candidate in checkpoints:
        with suppress(manifest.Damage):
            return _verified(candidate, ranks)
    return None
