"""An exact, shallow record of a network, and the way back to it: for probes, surgery and rollbacks."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from auxin.randomness import generator_state, is_generator, set_generator_state

CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
SLOTS = ("_parameters", "_buffers", "_modules")
HOLDERS = (Tensor, dict, list, tuple, set, collections.deque)
LONG = 10_000  # items of a container from which on it is taken for data
HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Record:
    """An exact, shallow record of a network's modules: structure, attributes, hooks, modes; ``restore`` returns to it.

    Objects that modules refer to (a configuration) are recorded as well. Tensors are kept by reference. With
    ``values=True`` their contents are kept as well (one copy of the network in memory), for code that may write into
    them.
    """

    def __init__(self, model: nn.Module, values: bool = False):
        self.modules = dict(model.named_modules(remove_duplicate=True))
        self.parameters = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())
        self.attributes = {path: dict(m.__dict__) for path, m in self.modules.items()}
        self._inner = {
            path: {name: content_of(value) for name, value in own.items() if isinstance(value, (dict, list, set))}
            for path, own in self.attributes.items()
        }
        self.classes = {path: type(m) for path, m in self.modules.items()}
        self._contents: list[tuple[Any, list[Any]]] = []
        self.objects = list(self._walk_objects())
        tensors = [*self.parameters.values(), *self.buffers.values()]
        self.shapes = {id(t): t.shape for t in tensors}
        self.requires_grad = {id(t): t.requires_grad for t in tensors}
        self._tensors = tensors
        self._places = {id(t): place for place, t in enumerate(tensors)}
        self._grads = [t.grad if t.is_leaf else None for t in tensors]
        self._storages = [t.detach() for t in tensors]
        self._hooks = [[(kind, hooks_of(t, kind)) for kind in HOOKS] for t in tensors]
        self._values = [t.detach().clone() for t in tensors] if values else None
        self._grad_values = [None if g is None or not values else g.detach().clone() for g in self._grads]
        held = {f"{path} {name}": own for (path, name), own, _ in self.objects if "." not in name}
        self._loose = _Loose({**self.attributes, **held}, {id(t) for t in tensors})

    def _walk_objects(self) -> Iterator[tuple[tuple[str, str], dict[str, Any], list[Any]]]:
        """Plain objects that modules refer to, up to four levels deep: (path, attribute), attributes, their content."""
        seen: set[int] = set()
        level = [((path, name), value) for path, own in self.attributes.items() for name, value in own.items()]
        for _ in range(4):
            deeper = []
            for (path, name), value in level:
                own = getattr(value, "__dict__", None)
                if isinstance(value, (nn.Module, Tensor)) or callable(value) or type(own) is not dict:
                    continue
                if id(value) in seen:
                    continue
                seen.add(id(value))
                yield (path, name), own, content_of(own)
                self._contents += [(v, content_of(v)) for v in own.values() if type(v) in (dict, list, set)]
                deeper += [((path, f"{name}.{key}"), inner) for key, inner in own.items() if isinstance(key, str)]
            level = deeper

    def inner(self, path: str, name: str) -> Any:
        """The recorded content of a dict, list or set attribute."""
        return self._inner[path][name]

    def value_of(self, tensor: Tensor) -> Tensor | None:
        """The recorded values of a tensor, of the recorded shape; None without values, or for one of others."""
        place = self._places.get(id(tensor))
        return None if place is None or self._values is None else self._values[place]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a recorded tensor still holds its recorded values, to the bit."""
        value = self.value_of(tensor)
        return value is not None and value.shape == tensor.shape and _same(tensor, value)

    def restore(self) -> None:
        """Put every module, attribute, mode and (if recorded) value back, in place."""
        for path, module in self.modules.items():
            own = self.attributes[path]
            for name, content in self._inner[path].items():
                refill(own[name], content)
            refill(module.__dict__, list(own.items()))
            if type(module) is not self.classes[path]:
                module.__class__ = self.classes[path]
        for container, content in (*self._contents, *((own, content) for _, own, content in self.objects)):
            refill(container, content)
        for i, tensor in enumerate(self._tensors):
            if storage_of(tensor) != storage_of(self._storages[i]):
                tensor.data = self._storages[i]
            if self._values is not None and tensor.device.type != "meta" and not _same(tensor, self._values[i]):
                write(tensor, self._values[i])
            if tensor.is_leaf:
                if tensor.requires_grad != self.requires_grad[id(tensor)]:
                    tensor.requires_grad_(self.requires_grad[id(tensor)])
                grad, grad_value = self._grads[i], self._grad_values[i]
                if tensor.grad is not grad:
                    tensor.grad = grad
                if grad is not None and grad_value is not None and not _same(grad, grad_value):
                    write(grad, grad_value)
            for kind, hooks in self._hooks[i]:
                hook_again(tensor, kind, hooks)
        self._loose.restore()


class _Loose:
    """What modules hold beside parameters, buffers and children and may write into as they run.

    Tensors and random generators of their own, and containers in containers, a few levels deep.
    """

    def __init__(self, attributes: dict[str, dict[str, Any]], known: set[int]):
        self._tensors: list[tuple[Tensor, int | None, Tensor]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._contents: list[tuple[Any, list[Any]]] = []
        seen = set(known)
        level = [value for own in attributes.values() for name, value in own.items() if name not in SLOTS]
        for _ in range(4):
            deeper: list[Any] = []
            for value in level:
                drawn = is_generator(value)
                if not (drawn or isinstance(value, HOLDERS)) or id(value) in seen:
                    continue
                seen.add(id(value))
                if isinstance(value, Tensor):
                    self._tensors.append((value, version_of(value), value.detach().clone()))
                elif drawn:
                    self._generators.append((value, generator_state(value)))
                elif len(value) <= LONG:
                    self._contents += [] if isinstance(value, tuple) else [(value, content_of(value))]
                    deeper += value.values() if isinstance(value, dict) else value
            level = deeper

    def restore(self) -> None:
        for container, content in self._contents:
            refill(container, content)
        with torch.no_grad():
            for tensor, version, value in self._tensors:
                if version_of(tensor) != version and tensor.shape == value.shape:
                    write(tensor, value)
        for generator, state in self._generators:
            set_generator_state(generator, state)


@contextmanager
def coming_back(restore: Callable[[], None]) -> Iterator[None]:
    """Call ``restore`` on the way out, and once more where an interrupt has cut it short."""
    try:
        try:
            yield
        finally:
            restore()
    except BaseException:
        restore()
        raise


def contents_of(roots: Iterable[Any]) -> list[tuple[Any, list[Any]]]:
    """Every dict, list and set below ``roots`` with its content, for ``refill``; tensors by reference."""
    found, seen, stack = [], {}, list(roots)
    while stack:
        value = stack.pop()
        if isinstance(value, (Tensor, type, *CODE)) or id(value) in seen:
            continue
        seen[id(value)] = value
        own = value if isinstance(value, (dict, list, set, collections.deque)) else getattr(value, "__dict__", None)
        if isinstance(value, tuple):
            stack += value
        elif isinstance(own, (dict, list, set, collections.deque)):
            found.append((own, content_of(own)))
            stack += own.values() if isinstance(own, dict) else own
    return found


def hooks_of(tensor: Tensor, kind: str) -> list[Any] | None:
    """The hooks of one kind on a tensor, for ``hook_again``."""
    held = getattr(tensor, kind, None)
    return None if held is None else content_of(held)


def hook_again(tensor: Tensor, kind: str, hooks: list[Any] | None) -> None:
    """Give a tensor its recorded hooks back."""
    held = getattr(tensor, kind, None)
    if held is not None:
        refill(held, hooks or [])


def refill(container: Any, content: list[Any]) -> None:
    """Give a dict, list or set its recorded content back, keeping the object."""
    if isinstance(container, list):
        if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
            container[:] = content
    elif isinstance(container, dict):
        if not _same_items(list(container.items()), content):
            container.clear()
            for key, value in content:  # a Counter would count what update is given
                container[key] = value
    elif isinstance(container, set):
        if len(container) != len(content) or any(item not in container for item in content):
            container.clear()
            container.update(content)
    else:
        container.clear()
        container.extend(content)


def put_back(container: Any, before: list[Any], after: list[Any]) -> None:
    """Give a container the content ``before`` back in the place of ``after``; what others put into a dict since stays.

    Args:
        container: a dict, list, set or deque.
        before: its content as ``contents_of`` tells it.
        after: the same after what is taken back.
    """
    if isinstance(container, dict):
        own = dict(after)
        others = {key: value for key, value in container.items() if key not in own or own[key] is not value}
        before = list({**dict(before), **others}.items())
    refill(container, before)


def content_of(container: Any) -> list[Any]:
    """The content of a dict (as pairs), list, set or deque; items by reference."""
    return list(container.items()) if isinstance(container, dict) else list(container)


def same_content(container: Any, content: list[Any]) -> bool:
    """Whether a container holds the very objects of ``content``, in that order."""
    now = content_of(container)
    if isinstance(container, dict):
        return _same_items(now, content)
    return len(now) == len(content) and all(a is b for a, b in zip(now, content, strict=True))


def _same_items(now: list[Any], content: list[Any]) -> bool:
    """Whether two lists of (key, value) hold the same objects under the same keys (a key may be a tensor)."""
    if len(now) != len(content):
        return False
    for (key, value), (old_key, old) in zip(now, content, strict=True):
        same_key = key is old_key or (
            not isinstance(key, Tensor) and not isinstance(old_key, Tensor) and key == old_key
        )
        if not same_key or value is not old:
            return False
    return True


def version_of(tensor: Tensor) -> int | None:
    """How often it was written to; None for one made in inference mode, to which nothing is written outside."""
    return None if tensor.is_inference() else tensor._version


def storage_of(tensor: Tensor) -> Any:
    """Where a tensor's values live, and how they are laid out."""
    if tensor.layout != torch.strided:
        return tensor.layout
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Write values in place, also where elements share their memory (an expanded mask)."""
    for axis, stride in enumerate(tensor.stride() if tensor.layout == torch.strided else ()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor, value = tensor.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    tensor.copy_(value)


def _same(tensor: Tensor, value: Tensor) -> bool:
    """Whether two tensors hold the same bits (a negative zero is not a zero, a NaN equals itself)."""
    if tensor.layout != torch.strided or tensor.dtype != value.dtype or tensor.shape != value.shape:
        return torch.equal(tensor, value)
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (tensor, value)))
