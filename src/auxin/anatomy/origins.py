"""Which old tensors those of a network continue, once any code has changed it, and how their entries go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.matching import Maps, Match, in_place, is_scaled, match
from auxin.axes import BORN, Axes, Axis
from auxin.change import Continued
from auxin.listing import join
from auxin.record import Record
from auxin.sharded import is_spread, whole

ROUNDING = 1e-6


@dataclass
class Origins:
    """What was found.

    Attributes:
        continued: by ``id`` of a tensor of the network: the old tensor that it continues, and how. Tensors that are as
            they were are not in it.
        notes: tensors whose values do not tell, in words.
    """

    continued: dict[int, Continued] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rescaled(self) -> dict[int, Axes]:
        """Tensors that were multiplied by numbers: ``id`` -> maps by which they get one over these of their gradient.

        One that was split among copies, which add up to it, gets the gradient that it had, and is not listed.
        """
        totals: dict[str, list[float]] = {}
        for one in self.continued.values():
            totals.setdefault(one.old, []).append(_scale(one))
        rescaled: dict[int, Axes] = {}
        for key, one in self.continued.items():
            scales = totals[one.old]
            if not is_scaled(one.axes):
                continue
            if len(scales) == 1:  # each entry by its own number
                rescaled[key] = tuple(a if a.value is None else replace(a, gradient=1 / a.value) for a in one.axes)
            elif abs(sum(scales) - 1) > ROUNDING:
                first = one.axes[0]
                rescaled[key] = (Axis.of(first.index, first.size, first.value, 1 / sum(scales)), *one.axes[1:])
        return rescaled

    def unshared(self) -> dict[int, Axes]:
        """Copies whose share in the gradient nothing bears out: ``id`` -> maps by which each has that of its original.

        Copies of a unit share its gradient where whatever reads them shares too (Net2Wider); those of a class in the
        last layer, say, are further classes, each with a gradient of its own.
        """
        sharing = [axis for one in self.continued.values() for axis in one.axes if _shares(axis)]
        found: dict[int, Axes] = {}
        for key, one in self.continued.items():
            alone = [_is_copied(axis) and not any(_alike(axis, other) for other in sharing) for axis in one.axes]
            if any(alone):
                pairs = zip(one.axes, alone, strict=True)
                found[key] = tuple(replace(axis, gradient=None) if bare else axis for axis, bare in pairs)
        return found

    def without_shares(self, unshared: Mapping[int, Axes]) -> None:
        """Let these copies have the gradients of their originals, and say so."""
        names = ", ".join(dict.fromkeys(self.continued[key].old for key in unshared))
        if names:
            self.notes.append(f"copied entries of {names} have the moments of their originals: nothing shares them")
        for key, axes in unshared.items():
            self.continued[key] = replace(self.continued[key], axes=axes)

    def with_gradients(self, rescaled: Mapping[int, Axes], unchanged: bool) -> None:
        """Say what share of their gradient rescaled tensors get, if the function is ``unchanged``."""
        if not unchanged:
            names = ", ".join(self.continued[key].old for key in rescaled)
            self.notes.append(f"moments of {names} stay as they are: no probe shows that the function is kept")
            return
        for key, axes in rescaled.items():
            self.continued[key] = replace(self.continued[key], axes=axes)


def origins(model: nn.Module, tree: Record) -> Origins:
    """Compare a network with its record (taken with values).

    Under FSDP2 every rank must call it: old tensors are gathered, one after the other. Sharded tensors that are still
    there are taken for what they were.

    Args:
        model: as it is now; under FSDP2 new tensors are plain, and hold the same values on every rank.
        tree: as it was.
    """
    return _Search(model, tree).found


class _Search:
    def __init__(self, model: nn.Module, tree: Record):
        self.tree, self.found, self.maps = tree, Origins(), Maps()
        self.old = {**tree.buffers, **tree.parameters}
        self.names = {id(t): name for name, t in self.old.items()}
        self.now = {id(t): t for _, _, _, t in _tensors(model)}
        self.looked_up = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        self.lost: list[tuple[str, Tensor, Tensor]] = []  # (name, new, old) of which nothing was found again
        pairs = list(self._pairs(model))
        later: list[tuple[str, str, Tensor, Tensor]] = []  # whose values do not tell: once others have told
        # What has changed along one axis only tells most, and helps with the others.
        for name, path, new, old in sorted(pairs, key=lambda pair: _difficulty(pair[3], pair[2])):
            self._match(name, path, new, old, later)
        for name, path, new, old in later:
            self._match(name, path, new, old)
        self._copies(model)
        self._moved(model)
        self._tell()

    def _pairs(self, model: nn.Module) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """(name, path, new, old value) of each tensor that stands where another one stood, or was written to."""
        held = {id(module): path for path, module in self.tree.modules.items()}
        done: set[int] = set()
        for path, module, leaf, tensor in _tensors(model):
            if id(tensor) in done:
                continue
            done.add(id(tensor))
            before = self._before(held.get(id(module)), path, leaf)
            old = tensor if id(tensor) in self.names else before
            if old is None:
                continue
            value = self.tree.value_of(old)
            written = isinstance(tensor, nn.Parameter) or value is None or value.shape != tensor.shape
            written = written and not is_spread(tensor)
            if value is not None and (old is not tensor or (written and not self.tree.holds(old))):
                self.names.setdefault(id(old), join(path, leaf))
                yield self.names[id(old)], path, tensor, old

    def _value(self, old: Tensor) -> Tensor | None:
        """The recorded values of a tensor, all of them."""
        return whole(self.tree.value_of(old))

    def _before(self, known: str | None, path: str, leaf: str) -> Tensor | None:
        """The tensor that stood in the same module, or under the same name in a module that has been replaced."""
        if known is not None:
            inner = {**dict(self.tree.inner(known, "_buffers")), **dict(self.tree.inner(known, "_parameters"))}
            return inner.get(leaf)
        return self.old.get(join(path, leaf))

    def _match(self, name: str, path: str, new: Tensor, old: Tensor, later: list[Any] | None = None) -> None:
        value = self._value(old)
        assert value is not None
        found = match(value, new, self.maps, path)
        if found is None:
            self.lost.append((name, new, old))
        elif not found.sure and later is not None:
            later.append((name, path, new, old))
        else:
            self._keep(new, old, found, path)

    def _keep(self, new: Tensor, old: Tensor, found: Match, path: str) -> None:
        name, axes = self.names[id(old)], found.axes
        if id(new) in self.looked_up:  # each row for itself: a copy takes nothing from the gradient of its original
            axes = (replace(axes[0], gradient=None), *axes[1:])
        self.found.continued[id(new)] = Continued(name, axes)
        if found.sure:
            self.maps.learn(path, found.axes)
        else:
            self.found.notes.append(
                f"the values of {name} do not tell which of its entries go on where; they were taken in order"
            )

    def _copies(self, model: nn.Module) -> None:
        """New modules that are copies of old ones, or multiples of them."""
        old_modules = {id(module) for module in self.tree.modules.values()}
        known: dict[Any, list[str]] = {}
        for path in self.tree.modules:
            known.setdefault(_signature(self._inside(path)), []).append(path)
        whole: set[int] = set()
        for _, module in model.named_modules():
            inner = dict(module.named_parameters())
            if id(module) in old_modules or id(module) in whole or not inner:
                continue
            new = {
                name: p for name, p in inner.items() if id(p) not in self.names and id(p) not in self.found.continued
            }
            if len(new) < len(inner):
                continue
            new |= dict(module.named_buffers())
            trials = [self._as_copy(new, path) for path in known.get(_signature(inner), ())]
            best = max(trials, key=lambda trial: trial[0], default=(0, {}))
            if best[0]:
                self.found.continued |= best[1]
                whole |= {id(m) for m in module.modules()}

    def _inside(self, path: str, buffers: bool = False) -> dict[str, Tensor]:
        prefix, held = f"{path}." if path else "", self.old if buffers else self.tree.parameters
        return {n[len(prefix) :]: t for n, t in held.items() if n.startswith(prefix)}

    def _as_copy(self, new: Mapping[str, Tensor], path: str) -> tuple[int, dict[int, Continued]]:
        """How many tensors tell that this is a copy of the old module at ``path``, and all that go on from it."""
        telling, found, inside = 0, {}, self._inside(path, buffers=True)
        for name, tensor in new.items():
            old = inside.get(name)
            value = None if old is None or id(tensor) in self.names else self._value(old)
            one = None if value is None else in_place(value, tensor)
            if one is None:
                continue
            found[id(tensor)] = Continued(self.names[id(old)], one.axes)
            varied = value is not None and value.numel() > 1 and bool((value != value.flatten()[0]).any())
            telling += varied and isinstance(tensor, nn.Parameter)
        return telling, found

    def _moved(self, model: nn.Module) -> None:
        """Old tensors that have left, and whose entries are found in a new one under another name."""
        gone = {n: t for n, t in self.tree.parameters.items() if id(t) not in self.now}
        taken = {one.old for one in self.found.continued.values()}
        gone = {n: t for n, t in gone.items() if n not in taken}
        if not gone:
            return
        for path, _, leaf, tensor in _tensors(model):
            if id(tensor) in self.names or id(tensor) in self.found.continued or not isinstance(tensor, nn.Parameter):
                continue
            for name, old in gone.items():
                value = self._value(old) if name.rpartition(".")[2] == leaf else None
                if value is None:
                    continue
                found = match(value, tensor, self.maps, path)
                if found is not None and found.sure and not any(axis.value is not None for axis in found.axes):
                    self._keep(tensor, old, found, path)
                    break

    def _tell(self) -> None:
        """Say of which tensors nothing was found again, unless it was found under another name."""
        taken = {one.old for one in self.found.continued.values()}
        for name, new, old in self.lost:
            if id(new) in self.found.continued or name in taken:
                continue
            if new is old and self.tree.shapes[id(old)] == new.shape:
                text = (
                    f"{name} holds other values, which do not come from its old ones: states and averages keep theirs"
                )
            elif new is old:
                text = f"nothing of {name} goes on: its optimizer state starts afresh, averages take its values"
            else:
                continue  # a new tensor under an old name, as a person would expect of one: it starts afresh
            self.found.notes.append(text)


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(path, module, name, tensor) of everything that a network holds."""
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                if tensor is not None:
                    yield path, module, leaf, tensor


def _difficulty(old: Tensor, new: Tensor) -> tuple[int, int]:
    same = old.dim() == new.dim()
    return (1 if old.dim() == 1 else 0, sum(a != b for a, b in zip(old.shape, new.shape, strict=True)) if same else 9)


def _signature(tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple((name, tuple(t.shape)) for name, t in tensors.items())


def _scale(one: Continued) -> float:
    """By how much the old tensor goes into this one; entries that are scaled differently count with the largest."""
    result = 1.0
    for axis in one.axes:
        result *= 1.0 if axis.value is None else float(axis.value.max())
    return result


def _is_copied(axis: Axis) -> bool:
    """Whether copies along it take a share of the gradient, and none of the value."""
    return axis.gradient is not None and axis.value is None


def _shares(axis: Axis) -> bool:
    """Whether there are copies along it, with values that add up to those of their originals."""
    return axis.value is not None and axis.gradient is None and bool((axis.counts > 1).any())


def _alike(axis: Axis, other: Axis) -> bool:
    """Whether both copy the same units; a unit may have several entries, side by side (pixels) or in runs (gates)."""
    small, large = sorted((axis.index, other.index), key=len)
    size, whole = sorted((axis.size, other.size))
    times = whole // size
    if times * size != whole or times * len(small) != len(large):
        return False
    born = small < 0
    beside = (small[:, None] * times + torch.arange(times)).masked_fill(born[:, None], BORN).flatten()
    runs = (small[None, :] + size * torch.arange(times)[:, None]).masked_fill(born[None, :], BORN).flatten()
    return torch.equal(large, beside) or torch.equal(large, runs)
