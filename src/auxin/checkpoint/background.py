"""Checkpoints that are written while the run goes on: of copies, on one thread, one after the other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

Written = futures.Future[Path | None]
_last: tuple[int, Written] | None = None  # and the process: a child that was forked has no such thread


def begin(write: Callable[[], Path | None]) -> Written:
    """Write on another thread, for which the interpreter waits at its end; a warning says at once if that fails.

    Call ``wait`` before, so that there is one at most.
    """

    def told() -> Path | None:
        try:
            return write()
        except BaseException as error:
            warnings.warn(f"ax.async_save has written nothing. {error}", stacklevel=1)
            raise

    global _last
    with_one = futures.ThreadPoolExecutor(1, "auxin-save")
    written = with_one.submit(told)
    with_one.shutdown(wait=False)
    _last = os.getpid(), written
    return written


def wait() -> None:
    """Wait until nothing is written any more, whether or not it could be."""
    if _last is not None and _last[0] == os.getpid():
        futures.wait([_last[1]])
