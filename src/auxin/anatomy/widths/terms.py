"""The lengths of axes as terms: what they are made of, and which of them are one.

An axis is an *atom*, a *product* (heads times head size) or a *concatenation* (queries, keys and values in one
projection). Where two axes meet, as in a sum, they are *unified*: from then on they are one width. Where one of them
turns out to have parts, so does the other. This is type inference for sizes (Robinson 1965), and it finds, besides
which axes must grow together, where in each of them the new entries belong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeVar

BORN = -1
Item = TypeVar("Item")


class Mixed(Exception):
    """Two axes meet in a way that is no product or concatenation of common parts."""


class Term:
    """The length of an axis.

    Attributes:
        size: how many entries.
        kind: "atom", "product" (the last factor runs fastest) or "cat".
        items: factors or parts.
    """

    __slots__ = ("items", "kind", "link", "size")

    def __init__(self, size: int, kind: Literal["atom", "product", "cat"] = "atom", items: Sequence[Term] = ()):
        self.size, self.kind, self.items = size, kind, tuple(items)
        self.link: Term | None = None

    def __repr__(self) -> str:
        root = find(self)
        if root.kind == "atom":
            return f"{root.size}"
        sign = " x " if root.kind == "product" else " + "
        return f"({sign.join(map(repr, root.items))})"


def find(term: Term) -> Term:
    """The term that stands for all that were unified with this one."""
    while term.link is not None:
        if term.link.link is not None:
            term.link = term.link.link
        term = term.link
    return term


def product(factors: Sequence[Term]) -> Term:
    """The term of axes that were merged into one, in order."""
    flat = list(_factors(factors))
    return flat[0] if len(flat) == 1 else Term(math.prod(f.size for f in flat), "product", flat) if flat else Term(1)


def concatenation(parts: Sequence[Term]) -> Term:
    """The term of axes that stand behind each other in one."""
    flat = [piece for part in parts for piece in pieces(part) if piece.size]
    return flat[0] if len(flat) == 1 else Term(sum(p.size for p in flat), "cat", flat)


def _factors(terms: Sequence[Term]) -> Iterator[Term]:
    """Factors of factors, without those of size 1."""
    for term in map(find, terms):
        if term.kind == "product":
            yield from _factors(term.items)
        elif term.size != 1:
            yield term


def factors(term: Term) -> list[Term]:
    """What an axis is a product of; itself, if it is none."""
    return list(_factors([term])) or [find(term)]


def pieces(term: Term) -> list[Term]:
    """What an axis is a concatenation of: (q + k) x d is q x d, then k x d."""
    term = find(term)
    if term.kind == "cat":
        return [piece for item in term.items for piece in pieces(item)]
    if term.kind == "product":
        first, *rest = factors(term)
        if first.kind == "cat":
            return [product([piece, *rest]) for piece in pieces(first)]
    return [term]


def unify(a: Term, b: Term) -> None:
    """Make two terms of equal size one.

    Raises:
        Mixed: they are made of parts that do not fit.
    """
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise Mixed(f"{a.size} and {b.size}")
    if a.size == 1:
        return
    if b.kind == "atom":
        a, b = b, a
    if a.kind == "atom":
        if not any(part is a for part in parts(b)):
            a.link = b
    elif a.kind == b.kind == "product" and not _breaks(a, b):
        _unify_products(a, b)
    else:
        _unify_pieces(a, b)
    if find(a) is not find(b) and find(a).kind != "atom":
        find(a).link = find(b)


def _breaks(a: Term, b: Term) -> bool:
    """Whether the factors of one cannot be told by splitting those of the other, so that pieces must do."""
    x, y = factors(a)[-1].size, factors(b)[-1].size
    return bool(x % y and y % x)


def _unify_products(a: Term, b: Term) -> None:
    left, right = factors(a), factors(b)
    while left and right:
        x, y = left.pop(), right.pop()
        if x.size == y.size:
            unify(x, y)
        elif x.size % y.size == 0:
            left += split(x, y.size)
            unify(left.pop(), y)
        elif y.size % x.size == 0:
            right += split(y, x.size)
            unify(right.pop(), x)
        else:
            raise Mixed(f"{a} and {b}")
        left, right = factors(product(left)) if left else [], factors(product(right)) if right else []
        left, right = ([t for t in side if t.size != 1] for side in (left, right))


def _unify_pieces(a: Term, b: Term) -> None:
    left, right = pieces(a)[::-1], pieces(b)[::-1]
    if len(left) == len(right) == 1:
        raise Mixed(f"{a} and {b}")
    while left and right:
        x, y = left.pop(), right.pop()
        if x.size > y.size:
            x, rest = cut(x, y.size)
            left.append(rest)
        elif y.size > x.size:
            y, rest = cut(y, x.size)
            right.append(rest)
        unify(x, y)
        left, right = (
            [piece for term in side for piece in reversed(pieces(term))] if side else [] for side in (left, right)
        )


def split(term: Term, inner: int) -> tuple[Term, Term]:
    """An axis as outer times inner, the inner one of the given size.

    Raises:
        Mixed: it is made of parts that forbid it.
    """
    term = find(term)
    if inner == 1:
        return term, Term(1)
    if term.size == inner:
        return Term(1), term
    if term.size % inner:
        raise Mixed(f"{term} by {inner}")
    if term.kind == "atom":
        outer, within = Term(term.size // inner), Term(inner)
        term.kind, term.items = "product", (outer, within)
        return outer, within
    if term.kind == "product":
        kept: list[Term] = []
        rest = factors(term)
        have = 1
        while have < inner:
            last = rest.pop()
            need = inner // have
            if inner % have:
                raise Mixed(f"{term} by {inner}")
            if last.size > need:
                outer, last = split(last, need)
                rest.append(outer)
            kept.insert(0, last)
            have *= last.size
        return product(rest), product(kept)
    within = Term(inner)  # a concatenation: every part is a multiple of the inner size
    outers = []
    for piece in pieces(term):
        outer, end = split(piece, inner)
        unify(within, end)
        outers.append(outer if outer.size > 1 else Term(1))
    flat = [o for o in outers if o.size]
    outer = flat[0] if len(flat) == 1 else Term(sum(o.size for o in flat), "cat", flat)
    return outer, find(within)


def cut(term: Term, at: int) -> tuple[Term, Term]:
    """An axis as its first ``at`` entries and the rest.

    Raises:
        Mixed: a product is cut in the middle of an inner factor.
    """
    term = find(term)
    if not 0 < at < term.size:
        raise Mixed(f"{term} at {at}")
    if term.kind == "atom":
        first, rest = Term(at), Term(term.size - at)
        term.kind, term.items = "cat", (first, rest)
        return first, rest
    if term.kind == "product":
        outer, *inner = factors(term)
        length = math.prod(t.size for t in inner)
        if at % length:
            raise Mixed(f"{term} at {at}")
        if outer.kind == "product":
            raise Mixed(f"{term} at {at}")
        one, two = cut(outer, at // length)
        return product([one, *inner]), product([two, *inner])
    left, right, have = [], [], 0
    for piece in pieces(term):
        if have + piece.size <= at:
            left.append(piece)
        elif have >= at:
            right.append(piece)
        else:
            one, two = cut(piece, at - have)
            left.append(one)
            right.append(two)
        have += piece.size
    return concatenation(left), concatenation(right)


def parts(term: Term) -> Iterator[Term]:
    """A term and all that it is made of."""
    term = find(term)
    yield term
    for item in term.items:
        yield from parts(item)


def atoms(term: Term) -> list[Term]:
    """The atoms that an axis is made of, each once, outermost first."""
    return list({id(part): part for part in parts(term) if part.kind == "atom"}.values())


def contains(term: Term, atom: Term) -> bool:
    """Whether an axis grows with an atom."""
    atom = find(atom)
    return any(part is atom for part in parts(term))


def grown(term: Term, entries: Mapping[int, Sequence[int]], lengths: Mapping[int, int] | None = None) -> list[int]:
    """Which entry each one along an axis stands for, once those of some atoms do.

    Args:
        term: of the axis.
        entries: for atoms that change, by ``id``: the entry that each of its new ones stands for, -1 for none.
        lengths: of atoms, where entries are counted in other sizes than those of now.

    Returns:
        For each new entry an old one of the whole axis, -1 for none.
    """
    return _grown(term, entries, lengths or {})[0]


def _grown(term: Term, entries: Mapping[int, Sequence[int]], lengths: Mapping[int, int]) -> tuple[list[int], int]:
    """The entries, and the length that they are counted in."""
    term = find(term)
    if term.kind == "atom":
        length = lengths.get(id(term), term.size)
        return list(entries.get(id(term), range(length))), length
    if term.kind == "product":
        result, total = [0], 1
        for factor in factors(term):
            inner, length = _grown(factor, entries, lengths)
            result = [BORN if a < 0 or b < 0 else a * length + b for a in result for b in inner]
            total *= length
        return result, total
    result, offset = [], 0
    for item in term.items:
        inner, length = _grown(item, entries, lengths)
        result += [BORN if a < 0 else a + offset for a in inner]
        offset += length
    return result, offset


def along(term: Term, values: Mapping[int, Sequence[float]]) -> list[float]:
    """A number for each entry along an axis: the product of those of the atoms that have some, by ``id``."""
    term = find(term)
    if term.kind == "atom":
        return list(values.get(id(term), [1.0] * term.size))
    if term.kind == "product":
        result = [1.0]
        for factor in factors(term):
            inner = along(factor, values)
            result = [a * b for a in result for b in inner]
        return result
    return [value for item in term.items for value in along(item, values)]


def copies(term: Term, atom: Term) -> int:
    """How many entries along an axis one more of an atom brings."""
    term, atom = find(term), find(atom)
    if term is atom:
        return 1
    if term.kind == "atom":
        return 0
    return len(grown(term, {id(atom): [*range(atom.size), BORN]})) - term.size


def ends(a: Sequence[Item], b: Sequence[Item]) -> Iterator[tuple[Item, Item]]:
    """Pairs from the end on, as long as there are two: the way tensors are broadcast."""
    count = min(len(a), len(b))
    return zip(reversed(a[len(a) - count :]), reversed(b[len(b) - count :]), strict=True)
