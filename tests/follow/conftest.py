"""The networks of these tests live beside the scenarios; what a test registers is forgotten after it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from auxin.companion import _registered
from auxin.follow import self_check

sys.path.insert(0, str(Path(__file__).parent.parent / "scenarios"))


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Leave what is registered, and what was tried, as it was."""
    before = dict(_registered), dict(self_check._found)
    yield
    for held, content in zip((_registered, self_check._found), before, strict=True):
        held.clear()
        held.update(content)
