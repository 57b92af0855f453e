"""Results of runs in a file of JSON lines, one line a run, so that a killed benchmark goes on where it stopped."""

import json
import os
from pathlib import Path
from typing import Any

from settings import Run, key_of


class Store:
    """What is known already. A last line that was cut off is not read, and written over.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self.results: dict[str, dict[str, Any]] = {}
        text = path.read_bytes() if path.exists() else b""
        self._whole = text.rfind(b"\n") + 1
        for line in text[: self._whole].splitlines():
            held = json.loads(line)
            self.results[held["key"]] = held["result"]

    def get(self, run: Run) -> dict[str, Any] | None:
        """The result of a run, or None."""
        return self.results.get(key_of(run))

    def add(self, run: Run, result: dict[str, Any], where: dict[str, str]) -> None:
        """Append one line, in one write."""
        line = json.dumps({"key": key_of(run), "run": run, "result": result, "where": where}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.ftruncate(file, self._whole)
            os.lseek(file, 0, os.SEEK_END)
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)
        self._whole += len(line.encode())
        self.results[key_of(run)] = result
