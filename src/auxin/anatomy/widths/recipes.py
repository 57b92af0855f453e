"""What else must change so that a wider network computes what it did: where attention multiplies two activations along
the width, and where norms look at all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.widths.groups import Member, Width
from auxin.anatomy.widths.terms import Term, contains, factors, find, parts, pieces
from auxin.change import Assign

MANY = 3  # writers of a width inside a block
EPSILON = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "norm_eps")


@dataclass(eq=False)
class Recipe:
    """Exceptions from how new entries start, by (name of a tensor, axis).

    Attributes:
        how: in words.
        zero: masks over the entries after: those of them that are new start at zero.
        free: axes that are read, of which new entries need not be zero: what they read is.
        scale: factors of old entries, over the entries after.
        mean: axes of which new entries are the mean of the old ones.
        assigns: attributes that change.
    """

    how: str = ""
    zero: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    free: set[tuple[str, int]] = field(default_factory=set)
    scale: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    mean: set[tuple[str, int]] = field(default_factory=set)
    assigns: list[Assign] = field(default_factory=list)


def recipes(model: nn.Module, width: Width, init: str) -> Iterator[Recipe]:
    """Ways to start that may keep the function, to be tried in this order."""
    norms = [e for e in width.mixing if e.kind in ("norm", "reduce")]
    products = [e for e in width.mixing if e.kind == "product"]
    if init != "zero" or not (norms or products):
        yield Recipe()
    elif norms and not products:
        yield from _streams(model, width)
    elif products and not norms:
        yield from _heads(width)


def needed(width: Width) -> list[str]:
    """What along the width a plain start would change, in words."""
    found = []
    for event in width.mixing:
        at = event.module or "the network"
        if event.kind in ("norm", "reduce"):
            found.append(f"{at} takes a {event.detail} over it ({event.where}), which new entries change")
        if event.kind == "product":
            found.append(f"{at} multiplies two activations and sums over it ({event.where})")
    scaled = {(m.name, m.axis) for m in width.members} & width.trace.scaled
    found += [f"{name} is divided by its norm along it (weight_norm)" for name, _ in sorted(scaled)]
    return list(dict.fromkeys(found))


# ---- the size of a head


def _heads(width: Width) -> Iterator[Recipe]:
    """New entries of keys start at zero, those of queries at random, and queries are scaled where attention divides by
    the root of the size of a head (the default of torch's).
    """
    members = list(_slots(width))
    slots = [slot for member in members for slot in member]
    fused = {len(member) for member in members} == {3}  # queries, keys and values in one: which is which is tried
    count = 3 if fused else 2
    if len(slots) < 2 or len(slots) % count:
        return
    names = ("queries", "keys", "values")
    for scaled in (True, False):
        for random, zeros in ((0, 1), (1, 0)) if count == 2 else ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)):
            recipe = Recipe(f"{names[zeros]} zero, {names[random]} at random")
            for number, slot in enumerate(slots):
                for name, axis, mask in slot:
                    key = (name, axis)
                    if number % count == zeros:
                        recipe.zero[key] = recipe.zero.get(key, torch.zeros(len(mask)).bool()) | mask
                    elif scaled and number % count == random:
                        factor = _total(width)
                        scale = recipe.scale.get(key, torch.ones(len(mask), dtype=torch.float64))
                        recipe.scale[key] = torch.where(mask, factor, scale)
            yield recipe


def _multiplied(width: Width) -> list[tuple[Any, int]]:
    """The atoms that grow and are summed over in a product of activations."""
    terms = [event.term for event in width.mixing if event.kind == "product"]
    return [(atom, by) for atom, by in width.growth.values() if any(contains(term, atom) for term in terms)]


def _total(width: Width) -> float:
    """The root of how much longer the axis gets that is summed over."""
    term = next(event.term for event in width.mixing if event.kind == "product")
    return math.sqrt(width.length(term) / find(term).size)


def _slots(width: Width) -> Iterator[list[list[tuple[str, int, Tensor]]]]:
    """For each weight that makes factors of the product its parts, each with its bias: name, axis and mask."""
    atoms = {id(atom) for atom, _ in _multiplied(width)}
    weights = [m for m in width.members if m.role == "out" and len(width.trace.tensors[m.name]) > 1]
    vectors = [m for m in width.members if m.role == "bias"]
    for member in weights:
        masks = _masks(width, member, atoms)
        own = [v for v in vectors if v.name.rpartition(".")[0] == member.name.rpartition(".")[0]]
        beside = [(v, _masks(width, v, atoms)) for v in own]
        yield [
            [(member.name, member.axis, mask), *((v.name, v.axis, of[number]) for v, of in beside)]
            for number, mask in enumerate(masks)
        ]


def _masks(width: Width, member: Member, atoms: set[int]) -> list[Tensor]:
    """For each part of an axis that holds one of the atoms, which entries after are of it."""
    term = width.trace.tensors[member.name][member.axis]
    found, start, total = [], 0, len(member.index)
    for piece in pieces(term):
        length = width.length(piece)
        if any(id(part) in atoms for part in parts(piece)):
            count = 3 if _chooses(width, factors(piece)[0]) else 1
            for number in range(count):
                mask = torch.zeros(total, dtype=torch.bool)
                mask[start + number * length // count : start + (number + 1) * length // count] = True
                found.append(mask)
        start += length
    return found


def _chooses(width: Width, factor: Term) -> bool:
    """Whether the outermost factor of an axis is that of queries, keys and values: three, which no layer reads."""
    trace = width.trace
    read = (trace.inside(trace.tensors[name][axis]) for (name, axis), role in trace.roles.items() if role == "in")
    return factor.size == 3 and not any(inside & trace.inside(factor) for inside in read)


# ---- the residual stream


def _streams(model: nn.Module, width: Width) -> Iterator[Recipe]:
    """Norms that divide by the root mean square need zeros in what is added to the stream; those that also subtract the
    mean need the mean of the old entries. Gains and epsilons are rescaled, so that a norm of the
    longer vector gives what it gave.
    """
    norms = {event.module for event in width.mixing if event.kind in ("norm", "reduce")}
    if not all(norms):
        return
    subtracts = any(event.kind == "norm" and "rms" not in event.detail for event in width.mixing)
    shrink = {e.module: find(e.term).size / width.length(e.term) for e in width.mixing if e.kind in ("norm", "reduce")}
    writers = [m.name for m in width.members if m.role == "out" and m.name.rpartition(".")[0] not in norms]
    if not subtracts and 2 <= len(writers) <= MANY:  # inside a block, where factors may be multiplied
        for name in reversed(writers):  # of gate and up the latter: any activation lets it learn (relu'(0) = 0)
            yield _stream(model, width, shrink, subtracts, {name})
    yield _stream(model, width, shrink, subtracts, None)
    if not subtracts:  # what divides by a mean, and not by the root of one, shrinks by all of it
        yield _stream(model, width, shrink, subtracts, None, power=1.0)


def _stream(
    model: nn.Module,
    width: Width,
    shrink: Mapping[str, float],
    subtracts: bool,
    only: set[str] | None,
    power: float = 0.5,
) -> Recipe:
    """Zeros or means in what writes to the width (``only`` in some of it), gains and epsilons rescaled."""
    recipe = Recipe("the mean of the old entries is written to the new ones" if subtracts else "new entries get zeros")
    for member in width.members:
        key = (member.name, member.axis)
        everything = torch.ones(len(member.index), dtype=torch.bool)
        owner = member.name.rpartition(".")[0]
        if owner in shrink:
            if member.role == "gain":
                recipe.scale[key] = torch.full((len(member.index),), shrink[owner] ** power, dtype=torch.float64)
            else:
                recipe.zero[key] = everything
        elif member.role == "in":
            # Behind a norm that subtracts the mean the new entries are 0. What reads the mean itself must not use it,
            # and new entries of a weight that is divided by its norm would change the norm.
            own = (width.trace.first[member.name], member.axis)
            if own not in width.trace.scaled and not (subtracts and own in width.trace.direct):
                recipe.free.add(key)
        elif subtracts:
            if member.name not in width.trace.attended:  # queries, keys and values of new heads, which nothing reads
                recipe.mean.add(key)
        elif only is None or member.name in only:
            recipe.zero[key] = everything
    for path, share in shrink.items():
        module = model.get_submodule(path)
        own = {**vars(module)}
        for name in EPSILON:
            value = own.get(name)
            if isinstance(value, float):
                recipe.assigns.append(Assign(path, name, value, value * share))
            elif name in own and value is None and isinstance(module, nn.RMSNorm):
                weight = next(iter(module.parameters()), None)
                eps = torch.finfo(weight.dtype if weight is not None else torch.float32).eps
                recipe.assigns.append(Assign(path, name, None, eps * share))
    return recipe
