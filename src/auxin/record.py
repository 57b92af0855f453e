"""What a network, or a whole run, holds, and the way back to it: for probes, surgery and rollbacks."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from auxin.fsdp2 import put, shapes_of
from auxin.listing import BARE, COMPOSED, named_modules, own_names
from auxin.output_hook import rehooking
from auxin.randomness import generator_state, is_generator, random_data, restore_random, set_generator_state
from auxin.sharded import here, is_leaf, is_spread, parts_of, shape_of

CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
SLOTS = ("_parameters", "_buffers", "_modules")
LEAVES = (type, *CODE, weakref.ReferenceType, torch.dtype, torch.device, str, bytes, int, float, complex, type(None))
CONTAINERS = (dict, list, set, collections.deque)
HOLDERS = (*CONTAINERS, tuple)
PLAIN = frozenset((bool, int, float, str, bytes, type(None), torch.Size, torch.dtype, torch.device, type))
LEVELS = 4  # how deep objects in objects, and containers in containers, are recorded
LONG = 10_000  # items of a container from which on it is taken for data
HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
HOOK_DICTS = tuple(n for n, v in BARE.items() if isinstance(v, (dict, set)) and n not in SLOTS)
_hook_dicts, _hooks_of = operator.itemgetter(*HOOK_DICTS), operator.attrgetter(*HOOKS)
_values = operator.methodcaller("values")
_requires_grad, _dtype = operator.attrgetter("requires_grad"), operator.attrgetter("dtype")


class Record:
    """An exact, shallow record of a network's modules: structure, attributes, hooks, modes; ``restore`` returns to it.

    Objects that modules refer to (a configuration) are recorded as well. Tensors are kept by reference. With
    ``values=True`` their contents are kept as well (one copy of the network in memory), for code that may write into
    them; those of buffers, and of tensors that a module holds beside them, always, since a forward may write into them.

    A network may have thousands of modules, most of them with nothing but empty dicts. So little is recorded of each,
    and ``restore`` writes only where something differs.
    """

    def __init__(self, model: nn.Module, values: bool = False):
        self.modules = named_modules(model)
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, Tensor] = {}
        self.attributes: dict[str, dict[str, Any]] = {}
        self.classes: dict[str, type] = {}
        self._filled: dict[str, dict[str, Any]] = {}  # content of the containers that hold something, by attribute
        self._empty: list[Any] = []  # the others
        own: list[tuple[tuple[str, str], Any]] = []  # attributes that only this class of modules has
        tensors: dict[int, Tensor] = {}
        slots = tuple(zip(SLOTS, (self.parameters, self.buffers, None), strict=True))
        for path, module in self.modules.items():
            held = self.attributes[path] = module.__dict__.copy()
            self.classes[path] = type(module)
            self._filled[path] = filled = {}
            try:
                hook_dicts = _hook_dicts(held)
            except KeyError:
                hook_dicts = tuple(map(held.get, HOOK_DICTS))
            if any(hook_dicts):
                filled.update((name, _kept(held[name])) for name in HOOK_DICTS if held.get(name))
                hook_dicts = tuple(one for one in hook_dicts if not one)
            self._empty += hook_dicts
            for name in own_names(held):
                value = held[name]
                if type(value) not in PLAIN:
                    own.append(((path, name), value))
                    if isinstance(value, (dict, list, set)):
                        filled[name] = _kept(value)
            for slot, known in slots:
                content = held.get(slot)
                if isinstance(content, dict):
                    if content:
                        filled[slot] = dict(content)
                    else:
                        self._empty.append(content)
                        continue
                else:  # a ScriptModule, whose parts are not to be changed
                    content = getattr(module, slot)
                for name, tensor in content.items() if slot != "_modules" else ():
                    if known is not None and tensor is not None and id(tensor) not in tensors:
                        tensors[id(tensor)] = tensor
                        known[f"{path}.{name}" if path else name] = tensor
        kinds = _Kinds()
        self._contents: list[tuple[Any, list[Any]]] = []
        self.objects = list(self._walk_objects(own, kinds))
        self._tensors = list(tensors.values())
        self.requires_grad = dict(zip(tensors, map(_requires_grad, self._tensors), strict=True))
        self._leaves = [t for t in self._tensors if t.is_leaf]
        self._grads = [t.grad for t in self._leaves]
        self._storages = [t.detach() for t in self._tensors]
        hooked = itertools.compress(self._tensors, map(any, map(_hooks_of, self._tensors)))
        self._hooks = {(id(t), kind): hooks_of(t, kind) for t in hooked for kind in HOOKS}
        copied = self._tensors if values else list(self.buffers.values())
        self._values = {id(t): (t.detach().clone(), None if values else version_of(t)) for t in copied}
        grads = [g for g in self._grads if g is not None] if values else []
        self._grad_values = {id(g): g.detach().clone() for g in grads}
        level = [value for _, value in own]
        level += [value for (_, name), held, _ in self.objects if "." not in name for value in held.values()]
        self._loose = _Loose(level, set(tensors), kinds)

    def _walk_objects(
        self, level: list[tuple[tuple[str, str], Any]], kinds: _Kinds
    ) -> Iterator[tuple[tuple[str, str], dict[str, Any], list[Any]]]:
        """Plain objects that modules refer to, a few levels deep: (path, attribute), attributes, their content."""
        seen: set[int] = set()
        for _ in range(LEVELS):
            deeper = []
            for (path, name), value in level:
                if not kinds.of(value).has_attributes or id(value) in seen:
                    continue
                own = value.__dict__
                if type(own) is not dict:
                    continue
                seen.add(id(value))
                yield (path, name), own, content_of(own)
                self._contents += [(v, content_of(v)) for v in own.values() if type(v) in (dict, list, set)]
                deeper += [((path, f"{name}.{key}"), inner) for key, inner in own.items() if isinstance(key, str)]
            level = deeper

    @functools.cached_property
    def shapes(self) -> dict[int, torch.Size]:
        """The recorded shape of each parameter and buffer, by ``id``."""
        return {id(t): stored.shape for t, stored in zip(self._tensors, self._storages, strict=True)}

    @property
    def tensors(self) -> list[Tensor]:
        """The recorded parameters and buffers."""
        return self._tensors

    def inner(self, path: str, name: str) -> Any:
        """The recorded content of a dict, list or set attribute."""
        content = self._filled[path].get(name, [])
        return list(content.items()) if isinstance(content, dict) else content

    def value_of(self, tensor: Tensor) -> Tensor | None:
        """The recorded values of a tensor, of the recorded shape; None without values, or for one of others."""
        kept = self._values.get(id(tensor))
        return None if kept is None else kept[0]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a recorded tensor still holds its recorded values, to the bit."""
        value = self.value_of(tensor)
        return value is not None and value.shape == tensor.shape and _same(tensor, value)

    def restore(self) -> None:
        """Put every module, attribute, mode and (where recorded) value back, in place."""
        self._restore_modules()
        for container, content in (*self._contents, *((own, content) for _, own, content in self.objects)):
            refill(container, content)
        if self._tensors_differ():
            self._restore_tensors()
        for tensor in (t for t in self._tensors if id(t) in self._values):
            self._write_back(tensor)
        for grad in self._grads if self._grad_values else ():
            if grad is not None and not _same(grad, self._grad_values[id(grad)]):
                write(grad, self._grad_values[id(grad)])
        self._loose.restore()

    def _restore_modules(self) -> None:
        """Structure, attributes and hooks; as a rule only modes, and a hook here and there, differ."""
        for held in self._empty if any(self._empty) else ():
            if held:
                held.clear()
        own = list(self.attributes.values())
        filled = [
            (held[name], kept)
            for held, one in zip(own, self._filled.values(), strict=True)
            for name, kept in one.items()
        ]
        lists, dicts = ([pair for pair in filled if isinstance(pair[1], dict) is kind] for kind in (False, True))
        same = _unchanged([held for held, _ in dicts], [kept for _, kept in dicts])
        for held, kept in (*lists, *(() if same else dicts)):
            _reset(held, kept)
        now = [module.__dict__ for module in self.modules.values()]
        for attributes, held in zip(now, own, strict=True):
            if "training" in held:
                attributes["training"] = held["training"]
        if not _unchanged(now, own):
            for attributes, held in zip(now, own, strict=True):
                _reset(attributes, held)
        for path, module in self.modules.items():
            if type(module) is not self.classes[path]:
                module.__class__ = self.classes[path]

    def _tensors_differ(self) -> bool:
        """Whether a tensor may lie elsewhere, or have another gradient, other hooks or another flag."""
        tensors = self._tensors
        return (
            list(map(_requires_grad, tensors)) != list(self.requires_grad.values())
            or any(t.is_leaf and t.grad is not grad for t, grad in zip(self._leaves, self._grads, strict=True))
            or any(hooks != (None, None) for hooks in map(_hooks_of, tensors))
            or not _are_where(tensors, self._storages)
        )

    def _restore_tensors(self) -> None:
        for tensor, storage in zip(self._tensors, self._storages, strict=True):
            if storage_of(tensor) != storage_of(storage):
                put(tensor, storage)
            if tensor.is_leaf and tensor.requires_grad != self.requires_grad[id(tensor)]:
                tensor.requires_grad_(self.requires_grad[id(tensor)])
            for kind in HOOKS:
                if getattr(tensor, kind, None) is not None:
                    hook_again(tensor, kind, self._hooks.get((id(tensor), kind)))
        for tensor, grad in zip(self._leaves, self._grads, strict=True):
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad

    def _write_back(self, tensor: Tensor) -> None:
        """Give a tensor its recorded values; where its version was noted only if it was written to since."""
        value, version = self._values[id(tensor)]
        if tensor.device.type == "meta" or (version is not None and version_of(tensor) == version):
            return
        if version is not None or not _same(tensor, value):
            write(tensor, value)


class _Kinds:
    """What there is to record of a value, by its class; asked once for each class."""

    @dataclasses.dataclass(frozen=True)
    class Kind:
        """``has_attributes``: it is a plain object; ``holds``: "tensor", "generator", "items", or ""."""

        has_attributes: bool
        holds: str

    def __init__(self) -> None:
        self._known: dict[type, _Kinds.Kind] = dict.fromkeys(PLAIN, self.Kind(False, ""))
        self._known[collections.OrderedDict] = self.Kind(False, "items")  # it could have attributes, and never does

    def of(self, value: Any) -> Kind:
        """What there is to record of ``value``."""
        kind = self._known.get(type(value))
        if kind is None:
            plain = not isinstance(value, (nn.Module, Tensor)) and not callable(value) and hasattr(value, "__dict__")
            holds = (
                "tensor"
                if isinstance(value, Tensor)
                else "items"
                if isinstance(value, HOLDERS)
                else "generator"
                if is_generator(value)
                else ""
            )
            kind = self._known[type(value)] = self.Kind(plain, holds)
        return kind


class _Loose:
    """What modules hold beside parameters, buffers and children and may write into as they run.

    Tensors and random generators of their own, and containers in containers, a few levels deep.
    """

    def __init__(self, level: list[Any], seen: set[int], kinds: _Kinds):
        self._tensors: list[tuple[Tensor, int | None, Tensor]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._contents: list[tuple[Any, list[Any]]] = []
        for _ in range(LEVELS):
            deeper: list[Any] = []
            for value in level:
                holds = kinds.of(value).holds
                if not holds or id(value) in seen:
                    continue
                seen.add(id(value))
                if holds == "tensor":
                    self._tensors.append((value, version_of(value), value.detach().clone()))
                elif holds == "generator":
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


def _kept(value: Any) -> Any:
    """The content of a container, for ``_reset``: a dict where it is nothing else than one."""
    return dict(value) if type(value) in (dict, collections.OrderedDict) else content_of(value)


def _reset(now: Any, then: Any) -> None:
    """Give a container its recorded content back, the order too; what is as it was costs two passes in C."""
    if not isinstance(then, dict):
        refill(now, then)
    elif len(now) != len(then) or not all(map(operator.is_, now, then)):
        refill(now, list(then.items()))
    elif not all(map(operator.is_, now.values(), then.values())):
        for name, value in then.items():
            if now[name] is not value:
                now[name] = value


def _unchanged(now: Sequence[Any], then: Sequence[Any]) -> bool:
    """Whether dicts hold the very objects that they held, under the same keys in the same order; all of it in C."""
    each = itertools.chain.from_iterable
    if list(map(len, now)) != list(map(len, then)) or list(each(now)) != list(each(then)):
        return False
    return all(map(operator.is_, each(map(_values, now)), each(map(_values, then))))


class Sight:
    """All that can be reached from ``roots``, and the random generators, as they are now.

    Args:
        roots: networks, and what hangs on them.
        known: tensors whose values are kept elsewhere.
    """

    def __init__(self, roots: Iterable[Any], known: Iterable[Tensor] = ()):
        self.tensors: list[_Held] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        self._classes: list[tuple[nn.Module, type, Callable[[], None]]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._seen: dict[int, Any] = {id(tensor): tensor for tensor in known}
        self.reshaped = False
        for root in sorted(roots, key=lambda root: isinstance(root, nn.Module)):  # a network may refer to the others
            self._visit(root)
        self._random = random_data()

    def keep(self, place: Callable[[Tensor], Tensor] = torch.clone) -> None:
        """Keep the values of the tensors, each at the place that ``place`` makes for it; before anything writes."""
        with torch.no_grad():
            for held in self.tensors:
                held.fill(place(held.storage))

    def restore(self) -> None:
        """Put structure, values and generators back."""
        for module, cls, reshape in self._classes:
            if type(module) is not cls:  # a parametrization makes a class of its own
                module.__class__ = cls
            reshape()
        with rehooking(module for module, *_ in self._classes):
            for container, content in self._containers:
                refill(container, content)
        for array, content in self._arrays:
            array[...] = content
        with torch.no_grad():
            for held in self.tensors:
                self.reshaped |= here(held.tensor).shape != held.storage.shape
                held.give_back()
        for generator, state in self._generators:
            set_generator_state(generator, state)
        restore_random(self._random)

    def _visit(self, value: Any, objects: float = math.inf) -> None:
        """Walk on from ``value``, into as many objects of unknown classes within each other as ``objects`` says."""
        if type(value) in PLAIN or id(value) in self._seen or isinstance(value, LEAVES):  # the first is told at once
            return
        if isinstance(value, Tensor):
            self._tensor(value)
            return
        self._seen[id(value)] = value
        if not isinstance(value, HOLDERS) and is_generator(value):
            self._generators.append((value, generator_state(value)))
        if isinstance(value, CONTAINERS):
            content = list(value.items()) if isinstance(value, dict) else list(value)
            self._containers.append((value, content))
            for item in content:
                self._visit(item, objects)
        elif isinstance(value, tuple):
            for item in value:
                self._visit(item, objects)
        elif isinstance(value, _array()):
            self._arrays.append((value, value.copy()))
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._object(value, objects)

    def _object(self, value: Any, objects: float) -> None:
        own = value.__dict__
        if isinstance(value, nn.Module):
            self._classes.append((value, type(value), shapes_of(value)))
            inside = min(objects, 1.0)
        else:
            inside = objects if isinstance(value, torch.optim.Optimizer) else objects - 1
        if inside < 0:
            del self._seen[id(value)]  # it may be met again, nearer by
            return
        self._containers.append((own, list(own.items())))
        for item in [value for name, value in own.items() if not str(name).startswith(COMPOSED)]:
            self._visit(item, inside)

    def _tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self._seen or tensor.device.type == "meta":
            return
        self._seen[id(tensor)] = tensor
        self.tensors += map(_Held, parts_of(tensor) or [tensor])  # of parts: its class need not know how it is copied
        if is_leaf(tensor) and tensor.grad is not None:
            self._tensor(tensor.grad)


class _Held:
    """One tensor: the object, where its values lived, and what they were."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.storage, self.reshape = tensor, here(tensor.detach()), shape_of(tensor)
        self.grad, self.requires_grad = tensor.grad if is_leaf(tensor) else None, tensor.requires_grad
        self.hooks = [(kind, hooks_of(tensor, kind)) for kind in HOOKS]
        self.value = self.storage

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.value.element_size()

    def fill(self, buffer: Tensor) -> None:
        if buffer.layout == torch.strided:
            buffer.copy_(self.storage)
        self.value = buffer

    def give_back(self) -> None:
        self.reshape()
        if not is_spread(self.tensor) and storage_of(self.tensor) != storage_of(self.storage):
            self.tensor.data = self.storage
        write(here(self.tensor), self.value)
        for kind, hooks in self.hooks:
            hook_again(self.tensor, kind, hooks)
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.requires_grad)
            if self.tensor.grad is not self.grad:
                self.tensor.grad = self.grad


def _array() -> tuple[type, ...]:
    """The class of NumPy's arrays, where it is loaded."""
    numpy = sys.modules.get("numpy")
    return () if numpy is None else (numpy.ndarray,)


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
            stack += [v for k, v in own.items() if not str(k).startswith(COMPOSED)] if isinstance(own, dict) else own
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
    local = here(tensor)
    return local.data_ptr(), tensor.shape, local.shape, local.stride(), local.dtype


def _are_where(tensors: list[Tensor], stored: list[Tensor]) -> bool:
    """Whether the values of all tensors live where they did, laid out alike; in C for what is nothing but a tensor."""
    try:
        if set(map(type, tensors)) <= {nn.Parameter, Tensor}:
            return all(map(Tensor.is_set_to, tensors, stored)) and list(map(_dtype, tensors)) == list(
                map(_dtype, stored)
            )
    except NotImplementedError:  # meta tensors, sparse ones
        pass
    return list(map(storage_of, tensors)) == list(map(storage_of, stored))


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Write values in place, also where elements share their memory (an expanded mask)."""
    for axis, stride in enumerate(tensor.stride() if tensor.layout == torch.strided else ()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor, value = tensor.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    tensor.copy_(value)


def _same(tensor: Tensor, value: Tensor) -> bool:
    """Whether two tensors hold the same bits (a negative zero is not a zero, a NaN equals itself)."""
    if tensor.device.type == value.device.type == "meta":
        return tensor.shape == value.shape and tensor.dtype == value.dtype
    if tensor.layout != torch.strided or tensor.dtype != value.dtype or tensor.shape != value.shape:
        return torch.equal(tensor, value)
    return torch.equal(*(_plain(t).contiguous().reshape(-1).view(torch.uint8) for t in (tensor, value)))


def _plain(tensor: Tensor) -> Tensor:
    """Without what autograd and lazy signs (``conj``) hang on it."""
    return here(tensor.detach()).resolve_conj().resolve_neg()
