"""The tree of modules: paths, and names as they will be after a change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from auxin.axes import Axis, carried, check, shape_after
from auxin.change import Before, Change, Continued, Move, New, Rewire, Swap
from auxin.companion import original_of
from auxin.errors import GrowthError
from auxin.listing import Listing, join, module_at
from auxin.sharded import whole
from auxin.structure import gains_of

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
AT_A_CHECKPOINT = (
    "This version does not grow there. Grow at a checkpoint: save, build the plain network in one process, load, grow "
    "and save it there, and wrap the grown one."
)
PARTS = "where each rank holds a part of every parameter"
REFUSED = {  # wrappers under which nothing can grow, and why
    "FullyShardedDataParallel": f"FSDP1 (FullyShardedDataParallel), {PARTS}",
    "DeepSpeedEngine": "a DeepSpeedEngine, which keeps its own copies and parts of the parameters",
    "DataParallel": "DataParallel, which copies the network in every forward; DistributedDataParallel is followed",
}


def parts(module: nn.Module, times: Mapping[int, int]) -> Iterator[nn.Module]:
    """A module, and all below it that nothing else holds too; ``times`` is what ``registrations`` says of the network.

    Whatever of these is called, the module is run.
    """
    yield module
    for child in module._modules.values() if not is_scripted(module) else ():
        if child is not None and times[id(child)] < 2 and not is_scripted(child):
            yield from parts(child, times)


def runs_by_parts(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether nothing but its parts can be called: it has no forward, as a ModuleList."""
    return module is not None and type(module).forward is nn.Module.forward


def registrations(modules: Iterable[nn.Module]) -> Counter[int]:
    """How many of the modules of a network hold each as a child, by ``id``."""
    return Counter(id(child) for module in modules for child in module._modules.values() if child is not None)


def is_scripted(module: nn.Module) -> bool:
    """Whether its parts run as compiled code, and call no hook."""
    return isinstance(module, torch.jit.ScriptModule)


def parameters_after(
    model: nn.Module, rewires: Iterable[Rewire], swaps: Iterable[Swap] = ()
) -> dict[str, nn.Parameter]:
    """Parameters by name, in ``named_parameters()`` order, as they will be once all of these are applied."""
    by_path = {rewire.path: rewire for rewire in rewires}
    swapped = {(id(module_at(model, s.path)), s.name): s for s in swaps if not s.buffer}
    names: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    waiting: list[tuple[nn.Module, str | None, str]] = [(model, "", "")]  # module, its path before and after
    while waiting:
        module, before, after = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own: dict[str, Any] = module._parameters
        changed = {name: s for (i, name), s in swapped.items() if i == id(module)} if swapped else {}
        if changed:
            kept = {name: s.value for name, s in changed.items() if not s.resized}
            own = {name: kept.get(name, own.get(name)) for name in dict.fromkeys((*own, *changed))}
        for name, parameter in own.items():
            if isinstance(parameter, nn.Parameter) and id(parameter) not in seen:
                seen.add(id(parameter))
                names[join(after, name)] = parameter
        rewire = by_path.get(before) if before is not None else None
        held: Any = module._modules
        if rewire is None:
            children = [
                (child, None if before is None else join(before, name), join(after, name))
                for name, child in held.items()
                if child is not None
            ]
        else:
            children = [
                (child.module, None, join(after, name))
                if isinstance(child, New)
                else (held[child], join(before or "", child), join(after, name))
                for name, child in rewire.children
                if child is not None and (isinstance(child, New) or held[child] is not None)
            ]
        waiting += reversed(children)
    return names


def moves_between(
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    shapes: Mapping[int, torch.Size] | None = None,
    sources: Mapping[int, nn.Parameter] | None = None,
    touched: Collection[int] = (),
    swaps: Iterable[Swap] = (),
) -> tuple[Move, ...]:
    """Compare two listings by identity: what is born, what leaves, what was resized.

    Args:
        before: parameters by name before.
        after: parameters by name after.
        shapes: shape before, by ``id``, of tensors that may have been resized in place.
        sources: parameter whose state a new one copies, by ``id`` of the new one.
        touched: ids of parameters that are listed though they kept their shape (unfrozen ones).
        swaps: say of resized parameters how their entries continue the old ones.
    """
    shapes, sources = shapes or {}, sources or {}
    resized = {id(before.get(join(s.path, s.name))): s for s in swaps if s.resized and s.value is not None}
    old_names = {id(p): name for name, p in before.items()}
    new_ids = {id(p) for p in after.values()}
    moves = []
    listed = {*shapes, *touched, *resized}
    for name, p in after.items():
        old_name = old_names.get(id(p))
        if old_name is None:
            moves.append(Move(name, None, p, None, source=sources.get(id(p))))
        elif id(p) not in listed:
            continue
        elif shapes.get(id(p), p.shape) != p.shape or id(p) in touched or id(p) in resized:
            swap, old_shape = resized.get(id(p)), shapes.get(id(p), p.shape)
            new_shape = p.shape if swap is None or swap.value is None else swap.value.shape
            axes = None if swap is None else swap.axes
            moves.append(Move(name, old_name, p, p, old_shape, axes=axes, new_shape=new_shape))
    for name, p in before.items():
        if id(p) not in new_ids:
            moves.append(Move(None, name, None, p, old_shape=shapes.get(id(p), p.shape)))
    return tuple(moves)


def planned(
    model: nn.Module,
    edit: Any,
    seed: int,
    rewires: Iterable[Rewire] = (),
    swaps: Iterable[Swap] = (),
    sources: Mapping[int, nn.Parameter] | None = None,
    touched: Collection[int] = (),
    network: Listing | None = None,
    **fields: Any,
) -> Change:
    """The change of an edit: what happens to each parameter is worked out from what happens to modules and tensors.

    Args:
        model: the network, as it is.
        edit: whose plan this is.
        seed: of the new weights.
        rewires: new children of modules.
        swaps: tensors that are resized, replaced, added or removed; see ``resized``.
        sources: parameter whose optimizer state a new one copies, by ``id`` of the new one.
        touched: ids of parameters that begin to train or stop.
        network: what the network holds, where that is known.
        fields: of the Change: ``assigns``, ``preserves``, ``how``, ...
    """
    rewires, swaps, before = tuple(rewires), tuple(swaps), Before.of(model, network)
    after = parameters_after(model, rewires, swaps)
    moves = moves_between(before.parameters, after, sources=sources, touched=touched, swaps=swaps)
    return Change(edit, seed, rewires, swaps=swaps, moves=moves, before=before, after=after, **fields)


def resized(
    model: nn.Module, name: str, axes: Mapping[int, Axis], fresh: Tensor | float = 0.0, old: Tensor | None = None
) -> Swap:
    """A tensor of the network in another shape, the same object as before.

    Args:
        model: the network.
        name: of the parameter or buffer.
        axes: by number of the dimension; the others stay as they are.
        fresh: values of new entries, of the new shape, or one number.
        old: the tensor in one piece, where it is sharded and has been gathered already.
    """
    path, _, leaf = name.rpartition(".")
    owner = module_at(model, path)
    held = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if held is None:
        raise GrowthError(f"{name}: {path or 'the model'} ({type(owner).__name__}) has no tensor {leaf!r}.")
    before: Tensor = whole(held) if old is None else old
    before = before.detach()
    maps = tuple(axes.get(number, Axis.same(size)) for number, size in enumerate(before.shape))
    if isinstance(fresh, Tensor):
        fresh = fresh.to(before.device, before.dtype)
    else:
        fresh = torch.full_like(before.new_empty(shape_after(maps)), fresh)
    check(name, maps, before.shape, fresh.shape)
    fresh = _ordered_like(before, fresh)
    value = carried(before, maps, fresh, gains=gains_of(model, maps))
    return Swap(path, leaf, value, maps, buffer=leaf in owner._buffers, resized=True)


def _ordered_like(old: Tensor, fresh: Tensor) -> Tensor:
    """``fresh`` in the memory order of ``old``: a layer in ``channels_last`` stays in it, and as fast as it was."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for order in (torch.contiguous_format, formats.get(old.dim(), torch.contiguous_format)):
        if old.stride() == torch.empty(old.shape, device="meta", memory_format=order).stride():
            like = torch.empty_like(fresh, memory_format=order)
            return fresh if fresh.stride() == like.stride() else like.copy_(fresh)
    slowest_first = sorted(range(old.dim()), key=lambda axis: -old.stride(axis))
    return torch.empty_permuted(fresh.shape, slowest_first, dtype=fresh.dtype, device=fresh.device).copy_(fresh)


def taken_over(moves: Iterable[Move], continued: Mapping[int, Continued]) -> tuple[Move, ...]:
    """Let new parameters that continue ones that leave take over their places and states.

    Args:
        moves: of ``moves_between``.
        continued: by ``id`` of a new parameter, the old one that it continues and how. Where several continue one, as
            the three of a fused projection, the first has its place, and the others start from its state.
    """
    moves = list(moves)
    gone, taken, result = {m.old_name: m for m in moves if m.removed}, set(), []
    for move in moves:
        here = continued.get(id(move.new)) if move.added else None
        old = None if here is None else gone.get(here.old)
        if here is None or old is None:
            result.append(move)
        elif here.old in taken:
            result.append(replace(move, source=old.old, axes=here.axes))
        else:
            taken.add(here.old)
            result.append(replace(move, old_name=here.old, old=old.old, old_shape=old.old_shape, axes=here.axes))
    return tuple(m for m in result if not (m.removed and m.old_name in taken))


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside the wrappers of compiling, whole or by regions, and ``DistributedDataParallel``.

    Raises:
        GrowthError: a wrapper under which this version cannot grow; names it and the way round.
    """
    if not isinstance(model, nn.Module):
        raise GrowthError(f"model is a {type(model).__name__}; pass the nn.Module itself.")
    kind = type(model)
    inner = model._modules.get("_orig_mod") if kind.__name__ == "OptimizedModule" else original_of(model)
    if inner is not None:
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
