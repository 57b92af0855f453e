"""Whole numbers of modules and configurations that remember where they came from, so that it is seen which of them
``forward`` makes shapes of.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from torch import nn

from auxin.anatomy.tree import is_scripted, join
from auxin.anatomy.widths.terms import Term


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A whole number that an object of the network holds.

    Attributes:
        path: of the module.
        name: dotted where it is held by an object that the module refers to, as in ``config.hidden_size``.
        holder: ``id`` of the dictionary that holds it; a configuration is held by many modules.
        value: the number.
    """

    path: str
    name: str
    holder: int
    value: int

    @property
    def key(self) -> tuple[int, str]:
        """Holder and name."""
        return self.holder, self.name

    def __str__(self) -> str:
        return join(self.path, self.name)


Monomial = tuple[Attribute, ...]


class _Remembering(int):
    """A whole number that knows where it comes from; a copy of it does not."""

    def __copy__(self) -> int:
        """Forget."""
        return int(self)

    def __deepcopy__(self, memo: Any) -> int:
        """Forget."""
        return int(self)

    def __reduce__(self) -> Any:
        """Forget."""
        return int, (int(self),)


class Size(_Remembering):
    """A whole number that was computed from attributes.

    Attributes:
        terms: the polynomial that it is: for each product of attributes its factor; the empty product is a constant.
    """

    terms: dict[Monomial, Fraction]

    def __new__(cls, value: int, terms: dict[Monomial, Fraction]) -> Size:
        """Make one; an int otherwise."""
        made = super().__new__(cls, value)
        made.terms = terms
        return made

    @classmethod
    def of(cls, attribute: Attribute) -> Size:
        """The number that an attribute holds."""
        return cls(attribute.value, {(attribute,): Fraction(1)})

    @property
    def attributes(self) -> list[Attribute]:
        """Those that it was computed from, each once."""
        return list(dict.fromkeys(a for product in self.terms for a in product))

    def with_values(self, values: Mapping[tuple[int, str], int]) -> Fraction:
        """What it would be with other values of attributes, by holder and name."""
        total = Fraction(0)
        for product, factor in self.terms.items():
            for attribute in product:
                factor *= values.get(attribute.key, attribute.value)
            total += factor
        return total

    def __add__(self, other: Any) -> Any:
        """The sum remembers both."""
        if not isinstance(other, int) or isinstance(other, bool):
            return int(self) + other
        terms = dict(self.terms)
        for product, factor in _terms(other).items():
            terms[product] = terms.get(product, Fraction(0)) + factor
        return Size(int(self) + int(other), terms)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        """The difference remembers both."""
        return self + -1 * other if isinstance(other, int) else int(self) - other

    def __rsub__(self, other: Any) -> Any:
        """The difference remembers both."""
        return -1 * self + other if isinstance(other, int) else other - int(self)

    def __mul__(self, other: Any) -> Any:
        """The product remembers both."""
        if not isinstance(other, int) or isinstance(other, bool):
            return int(self) * other
        terms: dict[Monomial, Fraction] = {}
        for a, x in self.terms.items():
            for b, y in _terms(other).items():
                terms[a + b] = terms.get(a + b, Fraction(0)) + x * y
        return Size(int(self) * int(other), terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        """A quotient by a plain number that divides it remembers."""
        if type(other) in (int, Length) and other and int(self) % other == 0:
            return Size(int(self) // int(other), {product: f / int(other) for product, f in self.terms.items()})
        return int(self) // int(other) if isinstance(other, Size) else int(self) // other


class Length(_Remembering):
    """The length of an axis of a tensor, as ``x.shape`` gave it; what is computed from it is a plain number.

    Attributes:
        term: of the axis.
        note: called with the term where a number with a fraction is computed from it.
    """

    term: Term
    note: Callable[[Term], None]

    def __new__(cls, value: int, term: Term, note: Callable[[Term], None]) -> Length:
        """Make one."""
        made = super().__new__(cls, value)
        made.term, made.note = term, note
        return made

    def __float__(self) -> float:
        """Note it, as ``math.sqrt`` does that."""
        self.note(self.term)
        return float(int(self))

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        """Note a root, or one over the length."""
        if not isinstance(other, int) or other < 0:
            self.note(self.term)
        return pow(int(self), other, mod)

    def __truediv__(self, other: Any) -> Any:
        """Note it."""
        self.note(self.term)
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        """Note it."""
        self.note(self.term)
        return other / int(self)

    def __add__(self, other: Any) -> Any:
        """Forget, but let the other number remember."""
        return int(self) + other

    def __sub__(self, other: Any) -> Any:
        """Forget, but let the other number remember."""
        return int(self) - other

    def __mul__(self, other: Any) -> Any:
        """Forget, but let the other number remember."""
        return int(self) * other


def _terms(number: int) -> dict[Monomial, Fraction]:
    return number.terms if isinstance(number, Size) else {(): Fraction(number)}


def _holders(model: nn.Module) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(path, prefix of the name, dictionary) of all that holds numbers; each dictionary once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if is_scripted(module):
            continue
        held: list[tuple[str, Any]] = [("", module)]
        while held:
            prefix, owner = held.pop()
            own = getattr(owner, "__dict__", None)
            if not isinstance(own, dict) or id(own) in seen:
                continue
            seen.add(id(own))
            yield path, prefix, own
            for name, value in own.items():
                config = hasattr(value, "to_dict") or dataclasses.is_dataclass(value)
                if config and not isinstance(value, (type, nn.Module)):
                    held.append((f"{prefix}{name}.", value))


def _plain(module: nn.Module | None) -> bool:
    """Whether a module's numbers are those of a layer of torch, which follow its tensors."""
    return module is not None and type(module).__module__.startswith("torch.nn.modules") and not module._modules


def numbers_of(module: nn.Module) -> Iterator[Attribute]:
    """Whole numbers from 1 on of a module, of those inside it that are no layers of torch, and of configurations."""
    modules = dict(module.named_modules())
    for path, prefix, own in _holders(module):
        if prefix or not _plain(modules.get(path)):
            for name, value in own.items():
                if type(value) is int and value > 0 and not name.startswith("__"):
                    yield Attribute(path, prefix + name, id(own), value)


@contextlib.contextmanager
def remembered(model: nn.Module) -> Iterator[None]:
    """Let every number from 2 on remember where it comes from, inside."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    modules = dict(model.named_modules())
    try:
        for path, prefix, own in list(_holders(model)):
            if not prefix and _plain(modules.get(path)):
                continue
            for name, value in list(own.items()):
                made: Any = None
                kind: Any = type(value)
                if kind is int and value > 1 and not name.startswith("__"):
                    made = Size.of(Attribute(path, prefix + name, id(own), value))
                elif kind in (tuple, list) and value and all(type(v) is int for v in value):
                    made = kind(
                        Size.of(Attribute(path, f"{prefix}{name}.{i}", id(own), v)) if v > 1 else v
                        for i, v in enumerate(value)
                    )
                if made is not None:
                    changed.append((own, name, value))
                    own[name] = made
        yield
    finally:
        for own, name, value in changed:
            own[name] = value
