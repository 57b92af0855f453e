"""Raising at the k-th line that the library executes: every point found by the interpreter, none listed by hand."""

from __future__ import annotations

import ast
import functools
import gc
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import auxin

SOURCE = Path(auxin.__file__).parent

Action = Callable[[], Any]


class Fault(Exception):
    """What is raised where no error was expected."""


def lines_of(action: Action, files: Collection[str]) -> list[tuple[str, int]]:
    """File and line of every line event of ``action`` in ``files`` (prefixes, relative to the package), in order."""
    seen: list[tuple[str, int]] = []
    _trace(action, files, lambda name, line: seen.append((name, line)))
    return seen


def fault_at(action: Action, files: Collection[str], point: int, kind: type[BaseException] = Fault) -> bool | None:
    """Run ``action`` and raise ``kind`` at its ``point``-th line event; whether that came out, None if it has fewer."""
    count = 0

    def raising(name: str, line: int) -> None:
        nonlocal count
        count += 1
        if count == point:
            raise kind(f"{name}:{line}")

    try:
        _trace(action, files, raising)
    except kind:
        return count >= point
    return False if count >= point else None


def _trace(action: Action, files: Collection[str], at_line: Callable[[str, int], None]) -> None:
    """Run ``action`` and report every line that it executes in ``files`` and at which something could be raised."""
    prefixes, watched = tuple(files), {}

    def tracer(code: CodeType) -> Any:
        name = _relative(code.co_filename)
        if name is None or not name.startswith(prefixes):
            return None
        silent = _silent(code)

        def local(frame: FrameType, event: str, _: Any) -> Any:
            if event == "line" and frame.f_lasti not in silent:
                at_line(name, frame.f_lineno)
            return local

        return local

    def entered(frame: FrameType, _event: str, _: Any) -> Any:
        code = frame.f_code
        if code not in watched:
            watched[code] = tracer(code)
        return watched[code]

    before, collecting = sys.gettrace(), gc.isenabled()
    gc.disable()  # what earlier tests have left behind would add its lines, at any of them
    sys.settrace(entered)
    try:
        action()
    finally:
        sys.settrace(before)
        if collecting:
            gc.enable()


@functools.cache
def _relative(filename: str) -> str | None:
    path = Path(filename)
    return path.relative_to(SOURCE).as_posix() if path.is_relative_to(SOURCE) else None


@functools.cache
def _silent(code: CodeType) -> frozenset[int]:
    """Offsets of lines at which no exception can arise in an untraced interpreter, not even an interrupt.

    These are a ``try`` (an empty instruction, which not even an outer ``try`` covers) and the second event of a
    ``with`` line, on the way out (an exception put there would keep ``__exit__`` from being called).
    """
    withs, tries = _heads(code.co_filename)
    first: dict[int, int] = {}
    for start, _, line in code.co_lines():
        if line in withs:
            first[line] = min(start, first.get(line, start))
    return frozenset(start for start, _, line in code.co_lines() if line in tries or first.get(line, start) != start)


@functools.cache
def _heads(filename: str) -> tuple[frozenset[int], frozenset[int]]:
    """The lines of a file that head a ``with``, and those of a ``try``."""
    nodes = list(ast.walk(ast.parse(Path(filename).read_text())))
    withs = (node for node in nodes if isinstance(node, ast.With))
    headers = frozenset(line for node in withs for line in range(node.lineno, node.body[0].lineno))
    return headers, frozenset(node.lineno for node in nodes if isinstance(node, ast.Try))
