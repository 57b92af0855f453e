"""What stands behind a module outside of a container: a child ``_grown`` that its output goes through.

A forward hook and a child, not a wrapper: the names of the old parameters stay, code that reads attributes of the
module still finds them, and copying, pickling, exporting and compiling work as before. The hook is a function of this
file and no closure, for that reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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

    def undo() -> None:
        hooks.clear()
        hooks.update(before)
        forget_compiled()

    for key in [key for key, hook in before.items() if hook is grown_hook]:
        del hooks[key]
    if wanted:
        module.register_forward_hook(grown_hook)
    forget_compiled()
    return undo


def forget_compiled() -> None:
    """Let everything be compiled again: compiled code does not look whether a module that it knows has new hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
