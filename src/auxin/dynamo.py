"""What this package knows of ``torch.compile``: where it keeps its graphs, how they are dropped, how a module is
compiled as another one is.

Nothing here loads ``torch._dynamo``: where it is not loaded, nothing is compiled. The private names of torch (2.13)
that are used stand in this file. Where another torch keeps its graphs elsewhere, hooks cost a reset of all of them, and
the limit rises by more than is used.
"""

from __future__ import annotations

import contextlib
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

CALL = "_compiled_call_impl"  # where ``module.compile()`` keeps what it has made
RESUMED = "torch_dynamo_resume_in_"  # a function that goes on behind a graph break
SHARED = "torch/_dynamo/external_utils.py"  # one function there calls all compiled modules of torch's own classes
ROOM = 8  # graphs that one function may get between two growths: torch's own limit for all of a run

# A hook that is called inside a compiled optimizer step is not to be compiled with it: it would make graphs of its own.
outside_graphs: Callable[[Any], Any] = getattr(torch, "_disable_dynamo", lambda function: function)


def loaded() -> bool:
    """Whether anything can be compiled at all in this process."""
    return "torch._dynamo" in sys.modules


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run everything as written inside: compiled code would not see new hooks, and would be compiled for a probe."""
    with torch.compiler.set_stance("force_eager") if loaded() else contextlib.nullcontext():
        yield


def guards_are_off() -> bool:
    """Whether compiled code has been told not to look at what it depends on."""
    if not loaded():
        return False
    stance = getattr(sys.modules["torch._dynamo.eval_frame"], "_stance", None)
    return bool(getattr(stance, "skip_guard_eval_unsafe", False))


def compiler_of(module: nn.Module) -> Any:
    """What ``module.compile()`` compiles with, or the wrapper of ``torch.compile``; None: it is not compiled."""
    if is_wrapper(module):
        return module.__dict__.get("dynamo_ctx")
    call: Any = module.__dict__.get(CALL)
    held = getattr(call, "__closure__", None) or ()
    cells = dict(zip(call.__code__.co_freevars, held, strict=True)) if held else {}
    return cells["self"].cell_contents if "self" in cells else None


def is_wrapper(module: Any) -> bool:
    """Whether a module is what ``torch.compile(module)`` returns."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def compile_as(module: nn.Module, model: nn.Module) -> bool:
    """Compile a module in place as ``model`` is, in the same way: equal code then shares its graphs.

    Returns:
        Whether there was anything to do.
    """
    if is_wrapper(model) or module.__dict__.get(CALL) is not None:
        return False
    compiler = compiler_of(model)
    if compiler is None:
        return False
    module._compiled_call_impl = compiler(module._call_impl)
    return True


def compile_copy(copy: nn.Module, original: nn.Module) -> None:
    """Compile what is compiled in ``original`` in a deep copy of it as well: copying drops ``module.compile()``."""
    originals = dict(original.named_modules(remove_duplicate=False))
    for path, module in copy.named_modules(remove_duplicate=False):
        like = originals.get(path)
        if like is None:
            continue
        compile_as(module, like)
        if is_wrapper(module) and is_wrapper(like):
            # What torch gives a wrapper that it makes itself, and a copied one lacks.
            inner: Any = module._modules["_orig_mod"]
            own = {"_torchdynamo_orig_callable": inner.forward, "_torchdynamo_wrapper_id": id(module)}
            own["get_compiler_config"] = like.__dict__.get("get_compiler_config")
            module.__dict__.update(own)


def kept_in_copies(module: nn.Module) -> dict[int, Any]:
    """Deepcopy memo: a copy is compiled by the same compiler, so that its graphs are found again."""
    compilers = (m.__dict__.get("dynamo_ctx") for m in module.modules() if is_wrapper(m))
    return {id(compiler): compiler for compiler in compilers if compiler is not None}


def runs_through(kinds: Iterable[type]) -> bool:
    """Whether there is compiled code that runs through modules of all of these classes, as last used."""
    known = {id(kind) for kind in kinds}
    return any(known <= _guards(entries[0]).kinds for _, entries in _compiled())


def see_hooks(kinds: Iterable[type], but: Iterable[types.CodeType] = ()) -> None:
    """Let compiled code look at hooks from now on, since a module of one of these classes is given one.

    As torch is set, compiled code does not look whether a module has hooks. It runs on without a new one; and where
    only one of several blocks has one, all of them run what was compiled last. What was compiled without looking, and
    runs through such a module, is dropped; other functions keep their graphs.

    Args:
        kinds: those classes.
        but: functions that are given such modules and do not call them.
    """
    known, others = {id(kind) for kind in kinds}, set(but)
    if not loaded() or not known:
        return
    sys.modules["torch._dynamo"].config.skip_nnmodule_hook_guards = False
    if not _readable():
        torch.compiler.reset()
    for code, entries in [(code, entries) for code, entries in _compiled() if code not in others]:
        if any(known & guards.kinds and not guards.hooks for guards in map(_guards, entries)):
            _drop([code])


def forget_blind(forwards: Iterable[tuple[type, types.CodeType]]) -> None:
    """Drop the graphs of ``forwards`` that do not look at modules, because their guards were filtered out.

    Args:
        forwards: classes of modules around a change, each with the code of its ``forward``.
    """
    known = list(forwards)
    found = []
    for code, entries in _compiled():
        if code.co_filename.endswith(SHARED):
            blind = any(not _looks(entry, ()) for entry in entries)
        else:
            kinds = [kind for kind, forward in known if code is forward or _resumes(code, forward)]
            blind = bool(kinds) and not _looks(entries[0], kinds)  # the one used last
        if blind:
            found.append(code)
    _drop(found)


def make_room(compilers: Iterable[Any] = ()) -> None:
    """Let every function be compiled ``ROOM`` times more before torch gives up and runs it as written.

    A growth makes torch compile again, which is what it was called for; after eight times torch would stop to, with no
    more than a line in the log.

    Args:
        compilers: those that may have a limit of their own.
    """
    if not loaded():
        return
    config = sys.modules["torch._dynamo"].config
    used = max((len(entries) for _, entries in _compiled()), default=0) if _readable() else config.recompile_limit
    tries = getattr(sys.modules.get("torch._dynamo.convert_frame"), "FRAME_COMPILE_COUNTER", {})
    room = min(config.recompile_limit, ROOM)
    config.recompile_limit = max(config.recompile_limit, used + room)
    most = max([used, *tries.values()])
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most + room)
    for compiler in compilers:
        frame = getattr(getattr(compiler, "callback", None), "_torchdynamo_orig_backend", None)
        for part in (frame, getattr(frame, "_inner_convert", None)):
            limit = getattr(part, "_recompile_limit", None)
            if part is not None and limit is not None:
                part._recompile_limit = max(limit, used + min(limit, ROOM))


def graphs() -> int:
    """How many graphs this process has compiled so far; a difference counts, since anybody may reset it."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else int(utils.counters["stats"]["unique_graphs"])


def graphs_of() -> dict[types.CodeType, int]:
    """How many compiled forms each function has; nothing where this torch does not tell."""
    return {code: len(entries) for code, entries in _compiled()}


class CompileTime:
    """Seconds that this process spends compiling, from when this was made until ``stop``.

    ``torch.compile`` compiles at the next call, after the growth; so this goes on counting, and a change that is
    printed later shows more.
    """

    def __init__(self) -> None:
        self._began, self._seconds = _spent(), None

    @property
    def seconds(self) -> float:
        """So far, or until ``stop``."""
        return max(0.0, _spent() - self._began) if self._seconds is None else self._seconds

    def stop(self) -> None:
        """Count no further."""
        self._seconds = self.seconds

    def go_on(self) -> None:
        """Count further from where it stopped."""
        self._began, self._seconds = _spent() - self.seconds, None

    def __str__(self) -> str:
        seconds = self.seconds
        return f"compiled again in {seconds:.1f} s" if seconds else "compiles at its next call what is new to it"


def _spent() -> float:
    utils = sys.modules.get("torch._dynamo.utils")
    return 0.0 if utils is None else float(utils.calculate_time_spent()["total_wall_time"])


def _readable() -> bool:
    """Whether this torch keeps its graphs where ``_compiled`` looks for them."""
    frames, evaluated = sys.modules.get("torch._dynamo.convert_frame"), sys.modules.get("torch._dynamo.eval_frame")
    named = all(hasattr(evaluated, name) for name in ("_debug_get_cache_entry_list", "reset_code"))
    return named and hasattr(getattr(frames, "input_codes", None), "seen")


def _compiled() -> Iterator[tuple[types.CodeType, list[Any]]]:
    """Every function that has graphs in this process, with them; nothing where this torch does not tell."""
    if not _readable():
        return
    entries_of = sys.modules["torch._dynamo.eval_frame"]._debug_get_cache_entry_list
    for reference in list(sys.modules["torch._dynamo.convert_frame"].input_codes.seen):
        code = reference()
        if code is not None and (entries := entries_of(code)):
            yield code, entries


def _drop(codes: Iterable[types.CodeType]) -> None:
    for code in codes:
        sys.modules["torch._dynamo.eval_frame"].reset_code(code)


@dataclass(frozen=True)
class Guards:
    """What compiled code looks at before it runs.

    Attributes:
        kinds: addresses of the classes that modules must be of.
        hooks: whether it looks at hooks.
        torch: whether it looks at modules of torch's own classes.
    """

    kinds: frozenset[int]
    hooks: bool
    torch: bool


# Of guards that have been read. They are written out as text in milliseconds, and do not change.
_read: weakref.WeakKeyDictionary[Any, Guards] = weakref.WeakKeyDictionary()


def _guards(entry: Any) -> Guards:
    manager = entry.guard_manager
    found = _read.get(manager)
    if found is None:
        text = str(manager)  # with ``___check_type_id(L['self'], 94279755171920)``
        kinds = frozenset(map(int, re.findall(r", (\d+)\)", text)))
        found = _read[manager] = Guards(kinds, "._forward_hooks" in text, "<class 'torch.nn.modules." in text)
    return found


def _looks(entry: Any, kinds: Iterable[type]) -> bool:
    """Whether compiled code checks the classes of its own modules, and something of torch's own modules inside."""
    guards = _guards(entry)
    return guards.torch and all(id(kind) in guards.kinds for kind in kinds)


def _resumes(code: types.CodeType, function: types.CodeType) -> bool:
    """Whether ``code`` goes on behind a graph break in ``function``."""
    _, found, line = code.co_name.removeprefix(RESUMED).rpartition("_at_")
    if not found or code.co_filename != function.co_filename or not line.isdigit():
        return False
    return function.co_firstlineno <= int(line) <= max(at or 0 for *_, at in function.co_lines())
