"""What every rank must hold and plan alike before anything is touched: as lines of text, to be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from auxin import typed
from auxin.anatomy.probe import tensors_in
from auxin.change import MISSING, Change, New


def structure(model: nn.Module, optimizers: Sequence[Any] = ()) -> list[str]:
    """The network's tensors and what each optimizer holds of them, one line each."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    lines = [f"{name} {_kind(p)}" for name, p in parameters]
    lines += [f"buffer {name} {_kind(b)}" for name, b in model.named_buffers(remove_duplicate=False)]
    names = {id(p): name for name, p in reversed(parameters)}
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            held = " ".join(names.get(id(p), "?") for p in group["params"])
            lines.append(f"optimizer {number} ({type(optimizer).__name__}) group {index}: {held}")
    return lines


def question(edit: Any, seed: int, options: Any) -> list[str]:
    """What is asked for: the edit, the seed of its weights, and the options that change the outcome."""
    told = {f.name: typed.encode(getattr(edit, f.name), f.name) for f in dataclasses.fields(edit)}
    given = [f"{name} {getattr(options, name)}" for name in ("group", "rewarm", "stock", "dry_run")]
    return [f"{type(edit).__name__} {told}", f"seed {seed}", *given]


def plan(change: Change) -> list[str]:
    """A plan: every place, name, shape and setting, and how it starts; no value of a tensor."""
    lines = [f"{change.how}, preserves {change.preserves}, fade {change.fade} of {sorted(change.gates)}"]
    for rewire in change.rewires:
        children = [(name, child if not isinstance(child, New) else "new") for name, child in rewire.children]
        lines.append(f"children of {rewire.path!r}: {children}, hook {rewire.hook}")
    for path, new in change.added:
        lines.append(f"{path} <- {type(new.module).__name__} from {new.source}, constants {dict(new.zeroed)}")
        lines += [f"{path}.{name} {_kind(p)}" for name, p in new.module.named_parameters()]
        lines += [f"{path}.{name} {_kind(b)}" for name, b in new.module.named_buffers()]
    for a in change.assigns:
        lines.append(f"{a.path}.{a.name} = {'nothing' if a.value is MISSING else repr(a.value)}")
    for s in change.swaps:
        lines.append(f"{s.path}.{s.name} becomes {None if s.value is None else _kind(s.value)} by {s.axes}")
    lines += [f"{name} {'trains' if trains else 'is frozen'}" for name, trains in change.trains.items()]
    for move in change.moves:
        lines.append(f"{move.old_name} -> {move.name}")
    return lines


def batch(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> list[str]:
    """The shapes of a probe: where they differ, so do the calls in which ranks send each other tensors."""
    return [f"probe {number} {_kind(t)}" for number, t in enumerate(tensors_in(arguments))]


def new_tensors(change: Change, buffers: bool = True) -> list[Tensor]:
    """The tensors that a planned change brings: parameters, and ``buffers``. Not those that were there before.

    Nor buffers that get another size: running statistics are a rank's own until the next forward of the wrapper.
    """
    old = {id(t) for held in (change.before.parameters, change.before.buffers) for t in held.values()}
    found: dict[int, Tensor] = {}
    for tensor, is_buffer in _brought(change):
        if (buffers or not is_buffer) and tensor.device.type != "meta":
            found[id(tensor)] = tensor
    resized = {id(s.value): s.buffer for s in change.swaps if s.resized}
    return [t for i, t in found.items() if not resized.get(i, i in old)]


def _brought(change: Change) -> Iterator[tuple[Tensor, bool]]:
    for _, new in change.added:
        yield from ((p, False) for p in new.module.parameters())
        yield from ((b, True) for b in new.module.buffers())
    for swap in change.swaps:
        if swap.value is not None:
            yield swap.value, swap.buffer
    for move in change.moves:
        if move.added and move.new is not None:
            yield move.new, False


def _kind(tensor: Tensor) -> str:
    """Shape, dtype, kind of device and whether it trains."""
    trains = " trains" if tensor.requires_grad else ""
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}{trains}"
