import sys

import pytest


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The engine without its own proof, so that only the checks are left."""
    for module in ("auxin.engine", "auxin.surgery"):
        monkeypatch.setattr(sys.modules[module], "verify_here", lambda *_: None)
        monkeypatch.setattr(sys.modules[module], "prove", lambda model, change, context, before: change)
    monkeypatch.setattr(sys.modules["auxin.grower"], "verify", lambda *_: None)
    return monkeypatch
