"""``torch.compile``: new blocks are compiled as those beside them, and compiled code goes on being used.

Compiled code looks at the modules that it depends on, and is compiled again where they have changed. What does not
come by itself: a copy of a compiled block is not compiled; after eight times torch gives up; hooks that come later
never fire (``auxin.dynamo.see_hooks``); and with its guards filtered out it sees nothing at all.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping

from torch import nn

from auxin import dynamo
from auxin.change import Change, New
from auxin.errors import GrowthError
from auxin.follow import follow
from auxin.gate import faded
from auxin.listing import module_at, modules_in
from auxin.structure import Undo, reversible, undo

_counting: weakref.WeakKeyDictionary[nn.Module, dynamo.CompileTime] = weakref.WeakKeyDictionary()


def counting(change: Change) -> dynamo.CompileTime | None:
    """A count of the seconds that compiling will take, if compiled code runs through the place of a change."""
    through = any(kinds and dynamo.runs_through(kinds) for kinds in _places(change))
    return dynamo.CompileTime() if through else None


def follow_compiled(model: nn.Module, change: Change) -> Iterator[None]:
    """Compile new modules as those that they stand beside, and keep torch from giving up."""
    yield
    undos: list[Undo] = []

    def write() -> None:
        _count(model, change, undos)
        if dynamo.loaded():
            _compile_new(change, undos)
            _look_again(change, undos)
            gated = [type(module_at(model, path)) for path in change.gates]
            dynamo.see_hooks(gated, but=[faded.__code__])
            compilers = (dynamo.compiler_of(module) for module in modules_in(model))
            dynamo.make_room(compiler for compiler in compilers if compiler is not None)

    yield from reversible(write, functools.partial(undo, undos))


def _count(model: nn.Module, change: Change, undos: list[Undo]) -> None:
    """Let the change count, and no longer the one before it."""
    before = _counting.pop(model, None)

    def undo() -> None:
        _counting.pop(model, None)
        if before is not None:
            before.go_on()
            _counting[model] = before

    undos.append(undo)
    if before is not None:
        before.stop()
    if change.compiling is not None:
        _counting[model] = change.compiling


@follow("torch._dynamo.eval_frame:OptimizedModule")
def follow_wrapper(wrapper: nn.Module, change: Change) -> Iterator[None]:
    """A compiled network is no companion: it sees what changes inside it.

    Raises:
        GrowthError: always; shows the call.
    """
    raise GrowthError(
        "the companions hold what torch.compile(model) returned, which needs no following: it runs the network that it "
        "holds, and compiles it again. Leave it out, or pass it as the model: auxin.grow(compiled, edit, optimizer)."
    )
    yield


def _places(change: Change) -> Iterator[tuple[type, ...]]:
    """Classes of the modules that change, each with that of the module above it."""
    before = change.before.modules
    for path in dict.fromkeys([r.path for r in change.rewires] + [s.path for s in change.swaps]):
        around = [before.get(path), before.get(path.rpartition(".")[0])]
        yield tuple({type(module) for module in around if module is not None})


def _compile_new(change: Change, undos: list[Undo]) -> None:
    """Compile what has taken the place of a compiled module, or stands beside compiled ones of its class.

    A copy of a block comes compiled as that block is.
    """
    before = change.before.modules
    for rewire in change.rewires:
        held = dict(_old_children(before, rewire.path))
        kept = [held[old] for _, old in rewire.children if isinstance(old, str) and old in held]
        for name, new in rewire.children:
            if not isinstance(new, New) or new.source is not None:
                continue
            gone = held.get(name)
            like = [] if gone is None or any(gone is module for module in kept) else [gone]
            like += [module for module in kept if type(module) is type(new.module)]
            if any(dynamo.compile_as(new.module, module) for module in like):
                undos.append(functools.partial(new.module.__dict__.pop, dynamo.CALL, None))


def _old_children(before: Mapping[str, nn.Module], path: str) -> Iterator[tuple[str, nn.Module]]:
    prefix = f"{path}." if path else ""
    for known, module in before.items():
        name = known.removeprefix(prefix)
        if known.startswith(prefix) and name and "." not in name:
            yield name, module


def _look_again(change: Change, undos: list[Undo]) -> None:
    """Drop compiled code of the modules around a change that was told not to look at modules."""
    before = change.before.modules
    parts = [rewire.path.split(".") for rewire in change.rewires]
    paths = {".".join(names[:depth]) for names in parts for depth in range(len(names) + 1)}
    kinds = {type(before[path]) for path in paths if path in before}
    forwards = [(kind, kind.forward.__code__) for kind in kinds if hasattr(kind.forward, "__code__")]
    undos.append(functools.partial(dynamo.forget_blind, forwards))
    dynamo.forget_blind(forwards)
