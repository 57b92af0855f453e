"""What is another one on each rank of a run: its random generators, and what its loop wants to have back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from auxin import typed
from auxin.checkpoint.directory import Files
from auxin.errors import GrowthError
from auxin.journal import FORMAT
from auxin.ranks import Ranks

FILE = "ranks.json"


def told(ranks: Ranks, make: Callable[[], Mapping[str, Any]]) -> list[Any]:
    """On rank 0 what ``make()`` gives on every rank, as plain JSON data; what it raises on one is raised on all."""
    return ranks.collect("ax.save", lambda: typed.encode(dict(make()), "run"))


def dumped(parts: list[Any]) -> dict[str, bytes]:
    """The file for the ranks behind the first one, if there are any: rank 0 is in the file of the run."""
    if len(parts) < 2:
        return {}
    return {FILE: json.dumps({"format": FORMAT, "ranks": parts}, allow_nan=False).encode()}


def of_this_rank(files: Files, run: Mapping[str, Any], rank: int, resolve: typed.Resolve) -> Mapping[str, Any]:
    """The part of this rank; of the first one where a single process goes on.

    A rank that the saved run did not have gets what the loop wants back from rank 0, and keeps its random generators.

    Raises:
        GrowthError: the file is none of ours.
    """
    if rank == 0:
        return run
    data = typed.loads(files.bytes(FILE), resolve, FILE) if FILE in files.manifest else {"ranks": []}
    parts = data.get("ranks") if isinstance(data, Mapping) else None
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise GrowthError(f"{FILE} is not what auxin writes: not a checkpoint of this version of auxin.")
    return {"extra": run["extra"], "random": None} | (parts[rank] if rank < len(parts) else {})
