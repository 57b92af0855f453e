"""Carrying a change out on a tree of modules: the network itself, or any copy of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.axes import Axis, carried, check
from auxin.change import MISSING, Assign, Before, Change, New, Rewire, Swap, entries_of
from auxin.errors import GrowthError
from auxin.fsdp2 import holders, resize
from auxin.gate import NAME as GATE
from auxin.gate import close_gate, open_gate
from auxin.listing import join, module_at, named_parameters
from auxin.output_hook import NAME as GROWN
from auxin.output_hook import set_hook
from auxin.record import content_of, contents_of, put_back, same_content
from auxin.sharded import is_spread, whole

Undo = Callable[[], Any]


def apply(
    model: nn.Module,
    change: Change,
    build: Callable[[New, str], nn.Module] | None = None,
    undos: list[Undo] | None = None,
) -> Undo:
    """Splice, assign and swap in place.

    Args:
        model: the network that ``change`` was planned for, or a copy of the same structure.
        change: the plan.
        build: the module that stands for a new one in this copy, given the path of what stands beside it; None: the
            new module itself.
        undos: is given what takes each write back, before that write: for ``undo`` after an exception in here.

    Returns:
        What takes all of it back.
    """
    undos = [] if undos is None else undos
    parts = (*change.rewires, *change.aliases, *(a.rewire for a in change.aliases), *change.assigns, *change.swaps)
    modules = {part.path: module_at(model, part.path) for part in parts}  # by path before the first write
    parameters = named_parameters(model) if change.trains else {}
    made: dict[int, nn.Module] = {}
    twins: dict[int, Tensor] | None = None if build is None else {}
    own = {} if build is None or not change.swaps else _stand_ins(model, change)
    sharded = holders(model) if change.swaps else {}
    gains = {} if build is None else gains_of(model, (axis for swap in change.swaps for axis in swap.axes or ()))

    def of(new: New, neighbour: str) -> nn.Module:
        if id(new.module) not in made:
            made[id(new.module)] = new.module if build is None else build(new, neighbour)
        return made[id(new.module)]

    rewired = [(modules[r.path], _children(modules[r.path], r, of)) for r in change.rewires]
    lists = [(modules[a.path], a.name, _children(modules[a.rewire.path], a.rewire, of)) for a in change.aliases]
    flags = [(parameters[name], trains) for name, trains in change.trains.items()]
    for module, children in rewired:
        splice(module, children, undos)
    for rewire in change.rewires:
        if rewire.hook is not None:
            undos.append(set_hook(modules[rewire.path], rewire.hook))
    for module, name, items in lists:
        _relist(module, name, list(items.values()), undos)
    for assign in change.assigns:
        assign_to(modules[assign.path], assign, undos)
    for swap in change.swaps:
        _swap(modules[swap.path], swap, (twins, own, sharded, gains), undos)
    for p, trains in flags:
        _train(p, trains, undos)
    for path in change.gates:
        _gate(module_at(model, path), undos)
    return functools.partial(undo, undos)


def check_swaps(model: nn.Module, change: Change) -> None:
    """Check, before anything is written, that the maps of resized tensors fit what stands there.

    Raises:
        GrowthError: names the tensor and the axis.
    """
    for swap in change.swaps:
        owner, name = module_at(model, swap.path), join(swap.path, swap.name)
        held = owner._buffers if swap.buffer else owner._parameters
        old = held.get(swap.name)
        if swap.value is None or (swap.axes is None and not swap.resized):
            continue
        if old is None:
            raise GrowthError(f"{name} is to go on in another shape, and {type(owner).__name__} has no such tensor.")
        if swap.axes is not None:
            check(name, swap.axes, old.shape, swap.value.shape)
        if old.dtype != swap.value.dtype:
            raise GrowthError(f"{name} is {old.dtype}, and would become {swap.value.dtype}.")


def undo(undos: list[Undo]) -> None:
    """Take back what ``apply`` has done so far, the last write first."""
    while undos:
        undos.pop()()


def reversible(write: Callable[[], object], back: Callable[[], object]) -> Iterator[None]:
    """The second half of a follower: write, wait for the proof, and go back if anything is raised before its end.

    Args:
        write: changes the companion.
        back: puts it back as it was, whether ``write`` has come to its end or not.
    """
    try:
        write()
        yield
    except GeneratorExit:  # dropped while the growth was held open: kept
        raise
    except BaseException:
        back()
        raise


def noted(model: nn.Module) -> Callable[[], list[Undo]]:
    """Note what a network holds, by reference, before code of the user's own changes it.

    Returns:
        A call that tells what takes back all that differs by then: structure, attributes, shapes, ``requires_grad``.
        Values stay as they are.
    """
    contents = contents_of([model])
    tensors = [(t, t.detach(), t.requires_grad) for t in (*model.parameters(), *model.buffers())]

    def differences() -> Iterator[Undo]:
        for held, before in contents:
            if not same_content(held, before):
                yield functools.partial(put_back, held, before, content_of(held))
        for tensor, value, trained in tensors:
            if tensor.shape != value.shape:
                yield functools.partial(_give_back, tensor, value)
            if tensor.requires_grad != trained:
                yield functools.partial(tensor.requires_grad_, trained)

    return lambda: list(differences())


def _children(module: nn.Module, rewire: Rewire, of: Callable[[New, str], nn.Module]) -> dict[str, nn.Module | None]:
    held: dict[str | None, nn.Module | None] = {None: None, **module._modules}
    return {n: of(c, beside(module, rewire, n)) if isinstance(c, New) else held[c] for n, c in rewire.children}


def beside(module: nn.Module, rewire: Rewire, name: str) -> str:
    """Path (before) of the old child that a new one replaces, or that stands nearest to it; or of the module around.

    Args:
        module: the one that gets the children, before it does.
        rewire: its children.
        name: of the new one.
    """
    if name == GROWN:  # runs behind the module, whose unit may not gather any more by then
        return rewire.path
    if module._modules.get(name) is not None and name not in {child for _, child in rewire.children}:
        return join(rewire.path, name)
    names = [n for n, _ in rewire.children]
    at = names.index(name)
    old = [(abs(place - at), child) for place, (_, child) in enumerate(rewire.children) if isinstance(child, str)]
    return join(rewire.path, min(old)[1]) if old else rewire.path


def splice(module: nn.Module, children: dict[str, nn.Module | None], undos: list[Undo]) -> None:
    """Give a module these children."""
    held = module._modules
    undos.append(functools.partial(put_back, held, list(held.items()), list(children.items())))
    held.clear()
    held.update(children)


def _relist(module: nn.Module, name: str, items: list[Any], undos: list[Undo]) -> None:
    value = module.__dict__[name]
    before = list(value)

    def undo() -> None:
        module.__dict__[name] = value
        if isinstance(value, list):
            value[:] = before

    undos.append(undo)
    if isinstance(value, tuple):
        module.__dict__[name] = tuple(items)
    else:
        value[:] = items


def assign_to(module: nn.Module, assign: Assign, undos: list[Undo]) -> None:
    """Set a plain attribute, or one of an object that the module refers to."""
    *through, name = assign.name.split(".")
    own = module.__dict__
    for part in through:
        own = entries_of(own[part])
    before = own.get(name, MISSING)

    def undo() -> None:
        if before is MISSING:
            own.pop(name, None)
        else:
            own[name] = before

    undos.append(undo)
    if assign.value is MISSING:
        own.pop(name, None)
    else:
        own[name] = assign.value


def _stand_ins(twin: nn.Module, change: Change) -> dict[int, Tensor]:
    """What stands in a copy of the network for each old tensor of the network, by the ``id`` of the latter."""
    if change.before is None:
        return {}
    live, own = change.before, Before.of(twin)
    old = {**live.buffers, **live.parameters}
    return {id(old[n]): t for n, t in {**own.buffers, **own.parameters}.items() if n in old}


def gains_of(model: nn.Module, axes: Iterable[Axis]) -> dict[str, Tensor]:
    """The vectors by which means are weighted along axes, by name, as they are now; see ``Axis.gains``."""
    names = dict.fromkeys(name for axis in axes for name, _ in axis.gains)
    pairs = ((name, *name.rpartition(".")[::2]) for name in names)
    return {name: whole(module_at(model, path)._parameters[leaf]).detach() for name, path, leaf in pairs}


def _swap(
    module: nn.Module, swap: Swap, known: tuple[Any, dict[int, Tensor], Any, dict[str, Tensor]], undos: list[Undo]
) -> None:
    """Put a replaced or resized tensor in place; a copy of the network keeps its own values where they fit.

    ``known``: what stands, in a copy, for each new tensor already (ties), None in the network itself; what stands there
    for each old one, which may change its place; what FSDP2 knows of each parameter; gains that weight means.
    """
    twins, own, sharded, gains = known
    held: dict[str, Any] = module._buffers if swap.buffer else module._parameters
    names, before = list(held), held.get(swap.name, MISSING)
    value: Tensor | None = swap.value
    if not swap.resized and id(value) in own:
        value = own[id(value)]
    elif twins is not None and value is not None:
        if id(value) not in twins:
            twins[id(value)] = _own(swap, value, before, gains)
        value = twins[id(value)]
    if swap.resized and isinstance(before, Tensor) and value is not None:
        if is_spread(before):
            _drop_gradient(before, undos)
            undos.append(resize(before, value, sharded[id(before)]))
        else:
            _resize(before, value, undos)
        return

    def undo() -> None:
        if before is MISSING:
            held.pop(swap.name, None)
        else:
            held[swap.name] = before
            _reorder(held, names)

    undos.append(undo)
    held[swap.name] = value


def _train(p: nn.Parameter, trains: bool, undos: list[Undo]) -> None:
    """Freeze or thaw a parameter."""
    before = p.requires_grad

    def undo() -> None:
        p.requires_grad_(before)

    undos.append(undo)
    p.requires_grad_(trains)


def _gate(block: nn.Module, undos: list[Undo]) -> None:
    """A gate for a block that was there before; a new one comes with its own."""
    if GATE not in block._buffers:
        undos.append(functools.partial(close_gate, block))
        open_gate(block)


def _own(swap: Swap, value: Tensor, before: Any, gains: Mapping[str, Tensor]) -> Tensor:
    """What a copy of the network holds for ``value``: its own old entries where they continue."""
    fresh = value.detach().clone()
    if isinstance(before, Tensor):
        fresh = fresh.to(device=before.device, dtype=before.dtype)
        if swap.axes is not None:
            fresh = carried(whole(before), swap.axes, fresh, gains=gains)
    trains = before.requires_grad if isinstance(before, nn.Parameter) else value.requires_grad
    return fresh if swap.buffer else nn.Parameter(fresh, requires_grad=trains)


def _drop_gradient(p: Tensor, undos: list[Undo]) -> None:
    """Drop a gradient of the old shape; a step has used it."""
    undos.append(functools.partial(setattr, p, "grad", p.grad))
    p.grad = None


def _resize(tensor: Tensor, value: Tensor, undos: list[Undo]) -> None:
    """Give a tensor another shape; it stays the same object, so ties and whoever holds it stay true.

    Its gradient has the old shape and is dropped: a growth happens when a step has used it.
    """
    grad = tensor.grad if tensor.is_leaf else None
    undos.append(functools.partial(_give_back, tensor, tensor.detach(), grad))
    if grad is not None:
        tensor.grad = None
    tensor.data = value.detach()
    forget_shape(tensor)


def _give_back(tensor: Tensor, value: Tensor, grad: Tensor | None = None) -> None:
    """Give a tensor the shape back that it had, with the storage and the gradient of then."""
    tensor.data = value
    forget_shape(tensor)
    if tensor.is_leaf:
        tensor.grad = grad


def forget_shape(tensor: Tensor) -> None:
    """Make autograd forget the shape that a leaf had: a graph that is still alive holds a node that remembers it.

    With that node the next gradient would have the old shape (an error, or a silent sum over the new rows). Another
    dtype for a moment resets it.
    """
    if tensor.is_leaf and tensor.requires_grad and tensor.layout == torch.strided:
        value = tensor.detach()
        other = torch.float16 if value.dtype != torch.float16 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=value.device)
        tensor.data = value


def _reorder(held: dict[str, Any], names: list[str]) -> None:
    items = {name: held[name] for name in names}
    held.clear()
    held.update(items)
