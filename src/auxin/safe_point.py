"""Is this moment safe to grow? Between two optimizer steps, with nothing half-done."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from auxin.dynamo import outside_graphs
from auxin.listing import modules_in, named_parameters, parameters_of

FORWARD = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}


class StepWatch:
    """Remembers which gradients the last optimizer step has used, by weak reference and version.

    Not by ``id``: the gradient of the next backward often stands where the one before has stood.

    A loop that calls ``zero_grad`` at its start never has empty gradients; those that a step has used are as good.
    """

    def __init__(self, optimizers: Iterable[Any]):
        # By optimizer, and then by parameter: its gradient at the optimizer's last step, and the version of this.
        self._used: dict[int, dict[int, tuple[weakref.ref[torch.Tensor], int]]] = {}
        self.steps = 0
        self.on_step: Callable[[Any], None] | None = None  # called with the optimizer
        watch = weakref.ref(self)

        @outside_graphs
        def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            alive = watch()
            if alive is not None:
                alive._saw(optimizer)

        watched = list(optimizers)
        self._first = watched[0] if watched else None
        hooked = [o for o in watched if hasattr(o, "register_step_post_hook")]
        weakref.finalize(self, _remove, [o.register_step_post_hook(after_step) for o in hooked])

    def _saw(self, optimizer: Any) -> None:
        if self.on_step is not None:
            self.on_step(optimizer)
        if self._first is None or optimizer is self._first:
            self.steps += 1
        self._used[id(optimizer)] = _graded(chain.from_iterable(group["params"] for group in optimizer.param_groups))

    @property
    def blind(self) -> bool:
        """Whether there is no optimizer whose steps it could see."""
        return self._first is None

    def used(self, p: torch.Tensor) -> bool:
        """Whether the gradient that ``p`` has now went into a step already."""
        grad = p.grad
        if grad is None:
            return False
        rows = (row for held in self._used.values() if (row := held.get(id(p))) is not None)
        return any(then() is grad and version == grad._version for then, version in rows)

    def state(self, model: nn.Module) -> tuple[int, set[int]]:
        """Count of steps, and ids of the parameters whose gradient is used up: to return to."""
        return self.steps, {id(p) for p in parameters_of(modules_in(model)) if p.grad is not None and self.used(p)}

    def set_state(self, state: tuple[int, set[int]], model: nn.Module) -> None:
        """Return to what ``state`` gave, once the gradients are what they were (a copy raises their version)."""
        self.steps, used = state
        self._used = {0: _graded(p for p in model.parameters() if id(p) in used)}


def _graded(parameters: Iterable[torch.Tensor]) -> dict[int, tuple[weakref.ref[torch.Tensor], int]]:
    """The gradient of each parameter that has one, by ``id`` of the parameter, with its version."""
    return {id(p): (weakref.ref(grad), grad._version) for p in parameters if (grad := p.grad) is not None}


def unscaled(scaler: Any) -> bool:
    """Whether gradients were unscaled, or stepped with, and ``update()`` has not come yet."""
    states = getattr(scaler, "_per_optimizer_states", {})
    return any(getattr(state.get("stage"), "value", 0) != 0 for state in states.values())


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def why_not_now(model: nn.Module, scalers: Iterable[Any] = (), watch: StepWatch | None = None) -> str | None:
    """The reason why ``model`` must not be changed at this moment, or None."""
    if torch.is_autocast_enabled("cpu") or (torch.cuda.is_available() and torch.is_autocast_enabled("cuda")):
        return "inside autocast (it caches cast weights); grow outside the autocast block"
    if torch.is_inference_mode_enabled():
        return "inside inference_mode (new weights could never train); grow outside of it"
    if torch._C._current_graph_task_id() != -1:
        return "inside a backward pass; grow after optimizer.step()"
    running = _running(model)
    if running is not None:
        return f"inside the forward of {running}; grow between two steps of the training loop"
    if any(unscaled(scaler) for scaler in scalers):
        return "gradients are unscaled and scaler.update() has not run; grow after scaler.update()"
    waiting = any(p.grad is not None for p in parameters_of(modules_in(model)))
    for name, p in named_parameters(model).items() if waiting else ():
        if p.grad is None or (watch is not None and watch.used(p)):
            continue
        if bool(p.grad.count_nonzero() if not p.grad.is_sparse else p.grad._nnz()):
            if watch is None:
                return (
                    f"{name} has a gradient, and only a Grower knows whether an optimizer step has used it; "
                    "call optimizer.zero_grad() first"
                )
            why = f"{name} has a gradient that no optimizer step has used; "
            if watch.blind:
                return why + "this Grower was given no optimizer, so it sees no step: pass it, Grower(model, optimizer)"
            return why + (
                "grow right after optimizer.step(), or after zero_grad() (is the optimizer that your loop steps the "
                "one that this Grower was given?)"
            )
    return None


def _running(model: nn.Module) -> str | None:
    """Name of the class whose forward is on this thread's stack, if it is part of ``model``."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in FORWARD:
            running = frame.f_locals.get("self")
            if any(module is running for module in model.modules()):
                return type(running).__name__
        frame = frame.f_back
    return None
