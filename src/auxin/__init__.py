"""Grow PyTorch networks while they train, in place, with everything that hangs on them kept in step."""

import importlib
from typing import TYPE_CHECKING, Any

from auxin import choose, init, schedule, score, when
from auxin.auto import auto
from auxin.candidates import candidates
from auxin.change import Change, Edit
from auxin.checkpoint import async_save, load, save
from auxin.edits.after import After
from auxin.edits.duplicate import Duplicate
from auxin.edits.insert import Insert
from auxin.edits.remove import Remove
from auxin.edits.repeat import Repeat, Untie
from auxin.edits.replace import Replace
from auxin.edits.wake import Wake
from auxin.edits.widen import Widen
from auxin.engine import grow
from auxin.errors import GrowthError
from auxin.evidence import Evidence
from auxin.follow import follow
from auxin.grower import Grower
from auxin.journal import Journal, replay
from auxin.limit import Limit
from auxin.modules import Dormant
from auxin.probation import Probation
from auxin.sites import Site, sites
from auxin.surgery import surgery
from auxin.verdict import verdict
from auxin.verify import verify
from auxin.version import __version__ as __version__

if TYPE_CHECKING:
    from auxin import testing

__all__ = [
    "After",
    "Change",
    "Dormant",
    "Duplicate",
    "Edit",
    "Evidence",
    "Grower",
    "GrowthError",
    "Insert",
    "Journal",
    "Limit",
    "Probation",
    "Remove",
    "Repeat",
    "Replace",
    "Site",
    "Untie",
    "Wake",
    "Widen",
    "async_save",
    "auto",
    "candidates",
    "choose",
    "follow",
    "grow",
    "init",
    "load",
    "replay",
    "save",
    "schedule",
    "score",
    "sites",
    "surgery",
    "testing",
    "verdict",
    "verify",
    "when",
]


def __dir__() -> list[str]:
    """The public names only."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import ``auxin.testing`` where it is asked for: training does not need it."""
    if name == "testing":
        return importlib.import_module("auxin.testing")
    raise AttributeError(f"module 'auxin' has no attribute {name!r}")
