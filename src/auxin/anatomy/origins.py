"""Which old tensors those of a network continue, once any code has changed it, and how their entries go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from auxin.anatomy.matching import Maps, Match, is_scaled, match
from auxin.anatomy.tree import join
from auxin.axes import Axis
from auxin.change import Continued
from auxin.record import Record


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

    def rescaled(self) -> dict[int, float]:
        """Tensors that were multiplied by numbers: ``id`` -> what all that continues the same old one adds up to.

        A sum of 1 is a tensor that was split among copies, each of which gets the gradient that it had.
        """
        totals: dict[str, float] = {}
        for one in self.continued.values():
            totals[one.old] = totals.get(one.old, 0.0) + _scale(one)
        return {key: totals[one.old] for key, one in self.continued.items() if is_scaled(one.axes)}

    def with_gradients(self, totals: Mapping[int, float], unchanged: bool) -> None:
        """Say that rescaled tensors get 1 / total of the gradient that they had, if the function is ``unchanged``."""
        if not unchanged:
            names = ", ".join(self.continued[key].old for key in totals)
            self.notes.append(f"moments of {names} stay as they are: no probe shows that the function is kept")
            return
        for key, total in totals.items():
            one = self.continued[key]
            first = Axis.of(one.axes[0].index, one.axes[0].size, one.axes[0].value, 1 / total)
            self.continued[key] = replace(one, axes=(first, *one.axes[1:]))


def origins(model: nn.Module, tree: Record) -> Origins:
    """Compare a network with its record (taken with values).

    Args:
        model: as it is now.
        tree: as it was.
    """
    return _Search(model, tree).found


class _Search:
    def __init__(self, model: nn.Module, tree: Record):
        self.tree, self.found, self.maps = tree, Origins(), Maps()
        self.old = {**tree.buffers, **tree.parameters}
        self.names = {id(t): name for name, t in self.old.items()}
        self.now = {id(t): t for _, _, _, t in _tensors(model)}
        self.lost: list[tuple[str, Tensor, Tensor]] = []  # (name, new, old) of which nothing was found again
        pairs = list(self._pairs(model))
        # What has changed along one axis only tells most, and helps with the others.
        for name, path, new, old in sorted(pairs, key=lambda pair: _difficulty(pair[3], pair[2])):
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
            if old is None or (old is before and old is not tensor and id(old) in self.now):
                continue
            value = self.tree.value_of(old)
            written = isinstance(tensor, nn.Parameter) or value is None or value.shape != tensor.shape
            if value is not None and (old is not tensor or (written and not self.tree.holds(old))):
                self.names.setdefault(id(old), join(path, leaf))
                yield self.names[id(old)], path, tensor, old

    def _before(self, known: str | None, path: str, leaf: str) -> Tensor | None:
        """The tensor that stood in the same module, or under the same name in a module that has been replaced."""
        if known is not None:
            inner = {**dict(self.tree.inner(known, "_buffers")), **dict(self.tree.inner(known, "_parameters"))}
            return inner.get(leaf)
        return self.old.get(join(path, leaf))

    def _match(self, name: str, path: str, new: Tensor, old: Tensor) -> bool:
        value = self.tree.value_of(old)
        assert value is not None
        found = match(value, new, self.maps, path)
        if found is None:
            self.lost.append((name, new, old))
            return False
        self._keep(new, old, found, path)
        return True

    def _keep(self, new: Tensor, old: Tensor, found: Match, path: str) -> None:
        name = self.names[id(old)]
        self.found.continued[id(new)] = Continued(name, found.axes)
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
            trials = [self._as_copy(new, path) for path in known.get(_signature(inner), ())]
            best = max(trials, key=lambda trial: trial[0], default=(0, {}))
            if best[0]:
                self.found.continued |= best[1]
                whole |= {id(m) for m in module.modules()}

    def _inside(self, path: str) -> dict[str, Tensor]:
        prefix = f"{path}." if path else ""
        return {n[len(prefix) :]: p for n, p in self.tree.parameters.items() if n.startswith(prefix)}

    def _as_copy(self, new: Mapping[str, Tensor], path: str) -> tuple[int, dict[int, Continued]]:
        """How many tensors tell that this is a copy of the old module at ``path``, and all that go on from it."""
        telling, found = 0, {}
        for name, tensor in new.items():
            old = self._inside(path)[name]
            value = self.tree.value_of(old)
            one = None if value is None else match(value, tensor, Maps())
            if one is None or any(not axis.keeps_place or axis.born.any() for axis in one.axes):
                continue
            found[id(tensor)] = Continued(self.names[id(old)], one.axes)
            telling += bool((value != value.flatten()[0]).any()) if value is not None and value.numel() else 0
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
                value = self.tree.value_of(old)
                if name.rpartition(".")[2] != leaf or value is None:
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
