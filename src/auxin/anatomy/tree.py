"""The tree of modules: paths, and names as they will be after a change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from auxin.change import Move, New, Rewire, Swap
from auxin.errors import GrowthError

AT_A_CHECKPOINT = (
    "This version does not grow there. Grow at a checkpoint: save, build the plain network in one process, load, grow "
    "and save it there, and wrap the grown one."
)
PARTS = "where each rank holds a part of every parameter"
REFUSED = {  # wrappers under which nothing can grow, and why
    "FSDPModule": f"FSDP2 (fully_shard), {PARTS}",
    "FullyShardedDataParallel": f"FSDP1 (FullyShardedDataParallel), {PARTS}",
    "DeepSpeedEngine": "a DeepSpeedEngine, which keeps its own copies and parts of the parameters",
    "DataParallel": "DataParallel, which copies the network in every forward; DistributedDataParallel is followed",
}


def module_at(model: nn.Module, path: str, what: str = "at") -> nn.Module:
    """Return the module at ``path`` ("" is the model itself).

    Raises:
        GrowthError: there is none; names the nearest path that exists and its children.
    """
    module = model
    walked: list[str] = []
    for name in path.split(".") if path else []:
        child = module._modules.get(name)
        if child is None:
            where = ".".join(walked) or "the model"
            names = ", ".join(repr(n) for n in list(module._modules)[:12]) or "none"
            raise GrowthError(
                f"{what}={path!r}: {where} ({type(module).__name__}) has no child {name!r}; its children: {names}."
            )
        module = child
        walked.append(name)
    return module


def join(path: str, name: str) -> str:
    """``path.name``, or ``name`` at the root."""
    return f"{path}.{name}" if path else name


def parameters_after(
    model: nn.Module, rewires: Iterable[Rewire], swaps: Iterable[Swap] = ()
) -> dict[str, nn.Parameter]:
    """Parameters by name, in ``named_parameters()`` order, as they will be once all of these are applied."""
    by_path = {rewire.path: rewire for rewire in rewires}
    swapped = {(id(module_at(model, s.path)), s.name): s for s in swaps if not s.buffer}
    names: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    visited: set[int] = set()

    def walk(module: nn.Module, before: str | None, after: str) -> Iterator[tuple[str, nn.Parameter]]:
        if id(module) in visited:
            return
        visited.add(id(module))
        for name in dict.fromkeys((*module._parameters, *(n for m, n in swapped if m == id(module)))):
            swap, parameter = swapped.get((id(module), name)), module._parameters.get(name)
            if swap is not None and not swap.resized:
                parameter = swap.value
            if isinstance(parameter, nn.Parameter):
                yield join(after, name), parameter
        rewire = by_path.get(before) if before is not None else None
        if rewire is not None:
            for name, child in rewire.children:
                if child is None:
                    continue
                inner = child.module if isinstance(child, New) else module._modules[child]
                old = None if isinstance(child, New) else join(before or "", child)
                if inner is not None:
                    yield from walk(inner, old, join(after, name))
            return
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, None if before is None else join(before, name), join(after, name))

    for name, parameter in walk(model, "", ""):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            names[name] = parameter
    return names


def moves_between(
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    shapes: Mapping[int, torch.Size] | None = None,
    sources: Mapping[int, nn.Parameter] | None = None,
    touched: Collection[int] = (),
) -> tuple[Move, ...]:
    """Compare two listings by identity: what is born, what leaves, what was resized.

    Args:
        before: parameters by name before.
        after: parameters by name after.
        shapes: shape before, by ``id``, of tensors that may have been resized in place.
        sources: parameter whose state a new one copies, by ``id`` of the new one.
        touched: ids of parameters that are listed though they kept their shape (unfrozen ones).
    """
    shapes, sources = shapes or {}, sources or {}
    old_names = {id(p): name for name, p in before.items()}
    new_ids = {id(p) for p in after.values()}
    moves = []
    for name, p in after.items():
        old_name = old_names.get(id(p))
        if old_name is None:
            moves.append(Move(name, None, p, None, source=sources.get(id(p))))
        elif shapes.get(id(p), p.shape) != p.shape or id(p) in touched:
            moves.append(Move(name, old_name, p, p, old_shape=shapes.get(id(p), p.shape)))
    for name, p in before.items():
        if id(p) not in new_ids:
            moves.append(Move(None, name, None, p, old_shape=shapes.get(id(p), p.shape)))
    return tuple(moves)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside the wrappers of ``torch.compile`` and ``DistributedDataParallel``.

    Raises:
        GrowthError: a wrapper under which this version cannot grow; names it and the way round.
    """
    if not isinstance(model, nn.Module):
        raise GrowthError(f"model is a {type(model).__name__}; pass the nn.Module itself.")
    kind = type(model)
    inner = model._modules.get("_orig_mod")
    if kind.__name__ == "OptimizedModule" and inner is not None:
        return unwrap(inner)
    if isinstance(model, torch.jit.ScriptModule):
        raise GrowthError(
            "model is a ScriptModule, whose modules cannot be changed; grow the nn.Module and script it again."
        )
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module)
    for base in kind.__mro__:
        if base.__name__ in REFUSED and base.__module__.startswith(("torch.", "deepspeed")):
            raise GrowthError(f"the model is under {REFUSED[base.__name__]}. {AT_A_CHECKPOINT}")
    return model
