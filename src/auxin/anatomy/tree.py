"""The tree of modules: paths, names as they will be after a change, and an exact record to return to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.change import Move, New, Rewire
from auxin.errors import GrowthError


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


def parameters_after(model: nn.Module, rewires: Iterable[Rewire]) -> dict[str, nn.Parameter]:
    """Parameters by name, in ``named_parameters()`` order, as they will be once ``rewires`` are applied."""
    by_path = {rewire.path: rewire for rewire in rewires}
    names: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    visited: set[int] = set()

    def walk(module: nn.Module, before: str | None, after: str) -> Iterator[tuple[str, nn.Parameter]]:
        if id(module) in visited:
            return
        visited.add(id(module))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield join(after, name), parameter
        rewire = by_path.get(before) if before is not None else None
        if rewire is not None:
            for name, child in rewire.children:
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


class Tree:
    """An exact, shallow record of a network's modules: structure, attributes, hooks, modes; ``restore`` returns to it.

    Tensors are kept by reference. With ``values=True`` their contents are kept as well (one copy of the network in
    memory), for code that may write into them.
    """

    def __init__(self, model: nn.Module, values: bool = False):
        self.modules = dict(model.named_modules(remove_duplicate=True))
        self.parameters = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())
        self.attributes = {path: dict(m.__dict__) for path, m in self.modules.items()}
        self._inner = {
            path: {
                name: _shallow(value) for name, value in own.items() if isinstance(value, (dict, list, set))
            }
            for path, own in self.attributes.items()
        }
        tensors = [*self.parameters.values(), *self.buffers.values()]
        self.shapes = {id(t): t.shape for t in tensors}
        self.requires_grad = {id(t): t.requires_grad for t in tensors}
        self._tensors = tensors
        self._grads = [t.grad if t.is_leaf else None for t in tensors]
        self._storages = [t.detach() for t in tensors]
        self._values = [t.detach().clone() for t in tensors] if values else None

    def inner(self, path: str, name: str) -> Any:
        """The recorded content of a dict, list or set attribute."""
        return self._inner[path][name]

    def continues(self, old: Tensor, new: Tensor) -> bool:
        """Whether ``new`` begins with the recorded values of ``old``, so that its optimizer state carries on."""
        if (
            self._values is None
            or old.dim() != new.dim()
            or old.dtype != new.dtype
            or old.device != new.device
        ):
            return False
        index = next((i for i, t in enumerate(self._tensors) if t is old), None)
        if index is None:
            return False
        value = self._values[index]
        region = tuple(slice(0, min(a, b)) for a, b in zip(value.shape, new.shape, strict=True))
        return _same(new.detach()[region], value[region])

    def restore(self) -> None:
        """Put every module, attribute, mode and (if recorded) value back, in place."""
        for path, module in self.modules.items():
            own = self.attributes[path]
            for name, content in self._inner[path].items():
                _refill(own[name], content)
            _refill(module.__dict__, list(own.items()))
        for i, tensor in enumerate(self._tensors):
            if tensor.data_ptr() != self._storages[i].data_ptr() or tensor.shape != self._storages[i].shape:
                tensor.data = self._storages[i]
            if self._values is not None and not _same(tensor, self._values[i]):
                tensor.detach().copy_(self._values[i])
            if tensor.is_leaf:
                if tensor.requires_grad != self.requires_grad[id(tensor)]:
                    tensor.requires_grad_(self.requires_grad[id(tensor)])
                if tensor.grad is not self._grads[i]:
                    tensor.grad = self._grads[i]


def _shallow(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else list(value)


def _refill(container: Any, content: list[Any]) -> None:
    """Give a dict, list or set its recorded content back, keeping the object."""
    if isinstance(container, list):
        if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
            container[:] = content
    elif isinstance(container, dict):
        now = list(container.items())
        if len(now) != len(content) or any(
            a[0] != b[0] or a[1] is not b[1] for a, b in zip(now, content, strict=True)
        ):
            container.clear()
            container.update(content)
    elif len(container) != len(content) or any(item not in container for item in content):
        container.clear()
        container.update(content)


def _same(tensor: Tensor, value: Tensor) -> bool:
    """Whether two tensors hold the same bits (NaN equals itself)."""
    return torch.equal(tensor, value) or bool(
        ((tensor == value) | ((tensor != tensor) & (value != value))).all()
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile``'s wrapper.

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
    wrappers = (
        "DistributedDataParallel",
        "FullyShardedDataParallel",
        "DeepSpeedEngine",
        "DataParallel",
        "FSDPModule",
    )
    for base in kind.__mro__:
        if base.__name__ in wrappers and base.__module__.startswith(("torch.", "deepspeed")):
            raise GrowthError(
                f"model is wrapped in {base.__name__}, under which this version does not grow: ranks or replicas would drift "
                "apart. Grow the plain module at a checkpoint (save, grow, wrap again)."
            )
    return model
