"""``manifest.json``: size and checksum of every file of a checkpoint, and the SHA-256 of itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any
from zlib import crc32

from auxin.checkpoint.tensors import Layout

NAME = "manifest.json"
LARGEST = 1 << 28  # bytes
FORMAT = "auxin checkpoint"
CRC = "crc32:"
VERSION = 3  # 2: without the memory order of tensors; 1: the SHA-256 of every file, instead of its CRC-32


class Damage(Exception):
    """What of a checkpoint is not as it was written."""


class Cut(Damage):
    """Bytes are missing, or others than were written: what a power cut or a bad disk leaves."""


@dataclass(frozen=True)
class Entry:
    """One file: its size in bytes, its checksum, and how its tensors lie in it (None: it holds none)."""

    size: int
    digest: str
    layout: Layout | None

    def holds(self, blocks: Iterable[bytes | memoryview]) -> bool:
        """Whether these bytes are what was written."""
        found = Checksum() if self.digest.startswith(CRC) else sha256()
        for block in blocks:
            found.update(block)
        return self.digest == (found.digest if isinstance(found, Checksum) else found.hexdigest())


class Checksum:
    """Size and CRC-32 of bytes: finds what a power cut or a bad disk leaves, as that of zip files does.

    ``torch.save`` takes the same sum of what it writes. No checksum would hold off who can write the manifest.
    """

    def __init__(self) -> None:
        self.size, self._sum = 0, 0

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
        self.size, self._sum = self.size + len(data), crc32(data, self._sum)

    @property
    def digest(self) -> str:
        """The sum in words."""
        return f"{CRC}{self._sum:08x}"


Manifest = dict[str, Entry]


def dump(entries: Manifest) -> bytes:
    """The manifest's text."""
    return _text({"format": FORMAT, "version": VERSION, "files": {k: asdict(v) for k, v in entries.items()}})


def parse(raw: bytes) -> Manifest:
    """The manifest that ``dump`` wrote.

    Raises:
        Damage: it is not as it was written.
    """
    try:
        data = json.loads(raw.decode("utf-8"))
        recorded = {key: data[key] for key in ("format", "version", "files")}
        if recorded["format"] != FORMAT:
            raise Damage(f"{NAME} is not a manifest of auxin")
        if type(recorded["version"]) is int and recorded["version"] > VERSION:
            raise Damage(f"{NAME} has version {recorded['version']}, a newer auxin wrote it")
        # Equal text is the test: whatever changed in it, by as little as a bit, changes its digest or its form.
        if _text(recorded) != raw:
            raise Cut(f"{NAME} is not what was written (its SHA-256 differs)")
        return {str(name): _entry(entry) for name, entry in recorded["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Cut(f"{NAME} is cut off, or not what was written") from None


def _entry(data: dict[str, Any]) -> Entry:
    size, digest, layout = data["size"], data["digest"], data["layout"]
    if type(size) is not int or type(digest) is not str:
        raise ValueError
    return Entry(size, digest, None if layout is None else Layout(**layout))


def _text(data: dict[str, Any]) -> bytes:
    plain = json.dumps(data, sort_keys=True).encode()
    return json.dumps({**data, "sha256": sha256(plain).hexdigest()}, indent=1).encode() + b"\n"
