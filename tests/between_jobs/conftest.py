import sys
from pathlib import Path

import pytest

from auxin import on_disk

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def all_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors take the ways of large ones."""
    monkeypatch.setattr(on_disk, "LARGE", 64)
    monkeypatch.setattr(on_disk, "MEMORY", 16384)
    monkeypatch.setattr(on_disk, "CHUNK", 1000)
