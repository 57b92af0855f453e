"""Checkpoints that are written while the run goes on: of copies, on one thread, one after the other."""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

from auxin.errors import GrowthError

Written = futures.Future[Path | None]
_last: tuple[int, Written] | None = None  # and the process: a child that was forked has no such thread


def begin(write: Callable[[], Path | None]) -> Written:
    """Write on another thread, for which the interpreter waits at its end; a warning says at once if that fails.

    Where no thread can be started, since there are too many or the interpreter is at its end, it is written before this
    returns. Call ``wait`` before, so that there is one at most.
    """
    global _last
    with_one = futures.ThreadPoolExecutor(1, "auxin-save")
    try:
        written = with_one.submit(_told, write)
    except RuntimeError:
        written = _at_once(write)
    with_one.shutdown(wait=False)
    _last = os.getpid(), written
    return written


def wait() -> None:
    """Wait until nothing is written any more, whether or not it could be."""
    if _last is not None and _last[0] == os.getpid():
        futures.wait([_last[1]])


def _told(write: Callable[[], Path | None]) -> Path | None:
    try:
        return write()
    except BaseException as error:
        # With a registry of its own it is said again where the same words were said before. Where warnings are errors
        # the future says it.
        with contextlib.suppress(Warning):
            text = f"ax.async_save has written nothing. {error}"
            warnings.warn_explicit(text, UserWarning, __file__, 0, __name__, registry={})
        # The frames of an error hold the copy of the run, and somebody may hold the error for long.
        del write
        _let_go(error)
        raise


def _at_once(write: Callable[[], Path | None]) -> Written:
    written: Written = futures.Future()
    try:
        written.set_result(_told(write))
    except Exception as error:
        written.set_exception(error.with_traceback(None))
    return written


def _let_go(error: BaseException) -> None:
    """Take from an error, and from those that led to it, the frames in which they were raised."""
    if not isinstance(error, GrowthError):
        error.add_note("".join(traceback.format_exception(error)))
    one: BaseException | None = error
    while one is not None:
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
