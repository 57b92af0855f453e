"""A directory that appears whole, or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from auxin.errors import GrowthError


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
        temporary = place.parent / f".{place.name}.auxin-{os.getpid()}-{secrets.token_hex(4)}"
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


def _sweep(place: Path) -> None:
    """Remove what killed processes have left of this target."""
    for path in place.parent.glob(f".{_escaped(place.name)}.auxin-*-*"):
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
