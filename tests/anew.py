"""Programs in new processes, which share nothing with the tests but the time that importing torch takes.

A server, started afresh beside the tests, imports torch and auxin once, and forks for each program: half a second
instead of seven. Nothing of a test is in it: no object, no seed, not the seed of the hashes of strings. Where it
matters what a program imports, it is run by `subprocess`.
"""

from __future__ import annotations

import functools
import os
import runpy
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


@functools.cache
def _server() -> Any:
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "auxin"])
    return context


def run(*command: Any, seconds: float = 100, cwd: Any = None, strict: type[Warning] | None = None) -> Any:
    """As ``subprocess.run([sys.executable, *command], capture_output=True, text=True)``; ``strict`` warnings raise."""
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("out", "err")]
        process = start(*command, files=files, cwd=cwd, strict=strict)
        process.join(seconds)
        if alive := process.is_alive():
            process.kill()
            process.join()
        out, err = (Path(file).read_text() if os.path.exists(file) else "" for file in files)
        if alive:
            raise subprocess.TimeoutExpired(command, seconds, out, err)
        return subprocess.CompletedProcess(command, process.exitcode, out, err)


def start(
    *command: Any,
    files: list[str],
    cwd: Any = None,
    strict: type[Warning] | None = None,
    env: dict[str, str] | None = None,
) -> Any:
    """The process, which writes to two ``files`` (pipes, perhaps); ``env`` comes on top of the environment."""
    words = [str(word) for word in command]
    process = _server().Process(target=_program, args=(words, files, str(cwd or os.getcwd()), strict, env or {}))
    process.start()
    return process


def talking(function: Callable[[Any], None]) -> tuple[Any, Any]:
    """A process that runs ``function`` of one end of a connection, and the other end."""
    ours, theirs = _server().Pipe()
    process = _server().Process(target=function, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _program(command: list[str], files: list[str], cwd: str, strict: Any, env: dict[str, str]) -> None:
    """In the new process: be what ``python COMMAND`` is."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    for name in ("stdout", "stderr"):
        setattr(sys, name, open(getattr(sys, f"__{name}__").fileno(), "w", buffering=1, closefd=False))
    os.chdir(cwd)
    os.environ.update({"OMP_NUM_THREADS": "1", **env})
    if strict is not None:
        warnings.simplefilter("error", strict)
    inline = command[0] == "-c"
    sys.argv = ["-c", *command[2:]] if inline else list(command)
    sys.path[:] = ["" if inline else str(Path(command[0]).parent), *(p for p in sys.path if not _of_tests(p))]
    if inline:
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), module.__dict__)
    else:
        runpy.run_path(command[0], run_name="__main__")


def _of_tests(entry: str) -> bool:
    return Path(entry).resolve().is_relative_to(TESTS)
