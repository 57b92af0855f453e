"""``module:factory`` on a command line: a function of the user's that builds a network, and what hangs on it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auxin.errors import GrowthError


@contextmanager
def from_here() -> Iterator[None]:
    """Let modules be imported from the working directory inside."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:  # the user's code may have taken it out
            sys.path.remove(here)


def made_by(place: str, command: str) -> tuple[Any, ...]:
    """What the factory returns, as a tuple.

    Args:
        place: ``module:factory``; the module is looked for from the working directory on.
        command: for messages.

    Raises:
        GrowthError: it cannot be imported, or raises.
    """
    module, _, name = place.partition(":")
    if not module or not name.isidentifier():
        raise GrowthError(f"{command} {place!r}: write it as module:factory, for example train:build.")
    if module.endswith(".py"):
        raise GrowthError(f"{command} {place!r}: a module is written without .py: {module.removesuffix('.py')}:{name}.")
    try:
        with from_here():
            made = getattr(importlib.import_module(module), name)()
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        raise GrowthError(
            f"{command} {place}: it does not build: {type(error).__name__}: {error}. The factory is called without "
            "arguments."
        ) from error
    return made if isinstance(made, tuple) else (made,)
