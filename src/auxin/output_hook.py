"""What stands behind a module outside of a container: a child ``_grown`` that its output goes through.

A forward hook and a child, not a wrapper: the names of the old parameters stay, code that reads attributes of the
module still finds them, and copying, pickling, exporting and compiling work as before. The hook is a function of this
file and no closure, for that reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from auxin import dynamo

NAME = "_grown"  # of the child


def grown_hook(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: pass the output on through the child ``_grown``."""
    return module._modules[NAME](output)  # type: ignore[misc]


def has_grown(module: nn.Module) -> bool:
    """Whether something has been grown behind this module."""
    return NAME in module._modules and any(hook is grown_hook for hook in module._forward_hooks.values())


def set_hook(module: nn.Module, wanted: bool) -> Callable[[], None]:
    """Let the output of ``module`` go through its child, or no longer; returns what takes that back."""
    hooks: dict[int, Any] = module._forward_hooks
    before = dict(hooks)

    def undo() -> None:  # hooks that others have registered since stay
        with rehooking([module]):
            others = {key: hook for key, hook in hooks.items() if hook is not grown_hook}
            kept = {key: hook for key, hook in before.items() if hook is grown_hook or key in others}
            hooks.clear()
            hooks.update(kept | others)

    with rehooking([module]):
        for key in [key for key, hook in before.items() if hook is grown_hook]:
            del hooks[key]
        if wanted:
            module.register_forward_hook(grown_hook)
    return undo


@contextlib.contextmanager
def rehooking(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let compiled code see the forward hooks that modules are given inside.

    It does not look whether a module has hooks that another one, or this one before, had not.
    """
    known = [(module, _hooks_of(module)) for module in modules] if dynamo.loaded() else []
    try:
        yield
    finally:
        given = {type(module) for module, before in known if _hooks_of(module) - before}
        if given:
            dynamo.see_hooks(given)


def _hooks_of(module: nn.Module) -> set[int]:
    return {id(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())}
