"""What else must change so that a wider network computes what it did: where attention multiplies two activations along
the width, and where norms look at all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.widths.groups import Member, Width
from auxin.anatomy.widths.terms import Term, contains, factors, find, parts, pieces
from auxin.anatomy.widths.tracer import Event
from auxin.change import Assign
from auxin.sharded import in_one_piece

Gains = tuple[tuple[str, float], ...]
Slots = list[list[tuple[str, int, Tensor]]]  # by part of a weight's output: of it and its bias name, axis and mask
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
        shift: what is added to old entries then.
        mean: axes of which new entries are the mean of the old ones, with the gains by which that is weighted: the name
            of each, and its value at new entries.
        assigns: attributes that change.
        last: whether it is for where nothing else keeps the function.
    """

    how: str = ""
    zero: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    free: set[tuple[str, int]] = field(default_factory=set)
    scale: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    shift: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    mean: dict[tuple[str, int], Gains] = field(default_factory=dict)
    assigns: list[Assign] = field(default_factory=list)
    last: bool = False

    @property
    def gains(self) -> dict[str, float]:
        """The values at new entries of the gains by which means are weighted."""
        return dict(gain for gains in self.mean.values() for gain in gains)


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
    norms = [event for event in width.mixing if event.kind in ("norm", "reduce")]
    found = _without_a_mean(width, norms)
    lines = dict.fromkeys(line for term, line in width.trace.scales if width.grows(term))
    found += [f"forward computes a number from a length that grows ({line})" for line in lines]
    made = {width.trace.first[m.name] for m in width.members if m.role in ("out", "bias")}
    if norms and _of_no_use(width, made):
        never = "could only begin with zeros, since norms look at them, and would never learn"
        found.append(f"both factors of a product {never}")
    for event in width.mixing:
        at = event.module or "the network"
        if event.kind in ("norm", "reduce"):
            found.append(f"{at} takes a {event.detail} over it ({event.where}), which new entries change")
        if event.kind == "product":
            found.append(f"{at} multiplies two activations and sums over it ({event.where})")
    scaled = {(m.name, m.axis) for m in width.members} & width.trace.scaled
    found += [f"{name} is divided by its norm along it (weight_norm)" for name, _ in sorted(scaled)]
    return list(dict.fromkeys(found))


def _without_a_mean(width: Width, every: Sequence[Event]) -> list[str]:
    """What keeps a new entry of a stream from being the mean of the others, which norms that subtract one ask for."""
    centring = width.trace.centring
    kinds = {e.module: "rms" not in e.detail and (e.kind == "norm" or e.module in centring) for e in every}
    norms = {path for path, subtracts in kinds.items() if subtracts}
    called = {path or "the network" for path in norms}
    if not norms:
        return []
    if len(norms) < len(kinds):
        other = next(path for path, subtracts in kinds.items() if not subtracts) or "the network"
        return [f"{min(called)} subtracts a mean, which new entries must be then, and {other} does not"]
    made = {m.name.rpartition(".")[0] for m in width.members if m.role == "out"}
    reads = {m.name.rpartition(".")[0] for m in width.members if m.role == "in"}
    apart = [path for path, _ in width.groups if path in made - reads - norms]
    added, modulated = sorted(called & width.trace.residues), sorted(called & width.trace.modulated)
    gated = dict.fromkeys((path or "the network", line) for term, path, line in width.trace.gates if width.grows(term))
    widest = max((m.size for m in width.members if m.role == "out"), default=0)
    over = [e for e in every if e.kind == "norm" and (e.detail == "group norm" or find(e.term).size > widest)]
    of_places = dict.fromkeys(event.module or "the network" for event in over)
    told = "so that a new entry cannot be the mean of the others"
    return [
        *(f"{path} convolves each entry by itself, {told} behind it" for path in apart),
        *(f"what {path} gives, with a gain for each entry, is added to something else, {told} there" for path in added),
        *(f"{path} multiplies two activations entry by entry ({line}), {told}" for path, line in gated),
        *(f"what {path} gives is multiplied by another activation, which does not follow" for path in modulated),
        *(f"{path} takes one mean over entries and places, which new entries change" for path in of_places),
    ]


# ---- the size of a head


def _heads(width: Width) -> Iterator[Recipe]:
    """New entries of keys start at zero, those of queries at random, and queries are scaled where attention divides by
    the root of the size of a head (the default of torch's).
    """
    first, second = _sides(width)
    if not first or not second:
        return
    one = first == second  # queries and keys, and perhaps values, in one projection: which is which is tried
    most = [max(len(slots) for slots in side) for side in (first, second)]
    chosen = [(i, j) for i in range(most[0]) for j in range(most[1]) if not one or i != j]
    for scaled in (True, False):
        for random, zeros in ((first, second),) if one else ((first, second), (second, first)):
            names = ("queries", "keys") if random is first else ("keys", "queries")
            for i, j in chosen if random is first else [(j, i) for i, j in chosen]:
                recipe = Recipe(f"{names[1]} zero, {names[0]} at random")
                for slots in zeros:
                    for name, axis, mask in slots[min(j, len(slots) - 1)]:
                        key = (name, axis)
                        recipe.zero[key] = recipe.zero.get(key, torch.zeros(len(mask)).bool()) | mask
                for slots in random if scaled else ():
                    for name, axis, mask in slots[min(i, len(slots) - 1)]:
                        ones = torch.ones(len(mask), dtype=torch.float64)
                        recipe.scale[name, axis] = torch.where(mask, _total(width), ones)
                yield recipe


def _sides(width: Width) -> tuple[list[Slots], list[Slots]]:
    """What makes the first factors of the products, and what makes the second ones: of each weight its slots."""
    sides: tuple[set[str], set[str]] = (set(), set())
    for event in width.mixing:
        if event.kind == "product":
            for side, names in zip(sides, event.writers, strict=True):
                side.update(names)
    slots = dict(_slots(width))
    made = [[found for name, found in slots.items() if width.trace.first[name] in side] for side in sides]
    return made[0], made[1]


def _multiplied(width: Width) -> list[tuple[Any, int]]:
    """The atoms that grow and are summed over in a product of activations."""
    terms = [event.term for event in width.mixing if event.kind == "product"]
    return [(atom, by) for atom, by in width.growth.values() if any(contains(term, atom) for term in terms)]


def _total(width: Width) -> float:
    """The root of how much longer the axis gets that is summed over."""
    term = next(event.term for event in width.mixing if event.kind == "product")
    return math.sqrt(width.length(term) / find(term).size)


def _slots(width: Width) -> Iterator[tuple[str, Slots]]:
    """For each weight that makes entries of the width its parts, each with its bias: name, axis and mask."""
    atoms = {id(atom) for atom, _ in _multiplied(width)}
    weights = [m for m in width.members if m.role == "out" and len(width.trace.tensors[m.name]) > 1]
    vectors = [m for m in width.members if m.role == "bias"]
    for member in weights:
        masks = _masks(width, member, atoms)
        own = [v for v in vectors if v.name.rpartition(".")[0] == member.name.rpartition(".")[0]]
        beside = [(v, _masks(width, v, atoms)) for v in own]
        slots = [
            [(member.name, member.axis, mask), *((v.name, v.axis, of[number]) for v, of in beside if number < len(of))]
            for number, mask in enumerate(masks)
        ]
        if slots:
            yield member.name, slots


def _masks(width: Width, member: Member, atoms: set[int]) -> list[Tensor]:
    """For each factor of a product that an axis may hold, which entries after are of it.

    As many places side by side as the axis has that is summed over: of a rotary head both halves.
    """
    term = width.trace.tensors[member.name][member.axis]
    found, start, total = [], 0, len(member.index)
    for piece in pieces(term):
        length = width.length(piece)
        if any(id(part) in atoms for part in parts(piece)):
            own = _places(width, piece, atoms)
            count = factors(piece)[0].size
            if _chooses(width, factors(piece)[0]):
                which = torch.arange(length) * count // length
                own = [mask & (which == number) for number in range(count) for mask in own]
            for one in own:
                mask = torch.zeros(total, dtype=torch.bool)
                mask[start : start + length] = one
                found.append(mask)
        start += length
    one = next(event.term for event in width.mixing if event.kind == "product")
    side = len(_places(width, one, atoms)) or 1
    if len(found) % side:
        return found
    return [torch.stack(found[n : n + side]).any(0) for n in range(0, len(found), side)]


def _places(width: Width, term: Term, atoms: set[int]) -> list[Tensor]:
    """Masks over an axis, one for each place in it where one of the atoms stands: of keys beside values, two."""
    term = find(term)
    if term.kind == "atom":
        return [torch.ones(width.length(term), dtype=torch.bool)] if id(term) in atoms else []
    if term.kind == "cat":
        lengths = [width.length(item) for item in term.items]
        before = [sum(lengths[:number]) for number in range(len(lengths))]
        found = []
        for item, start, length in zip(term.items, before, lengths, strict=True):
            for inner in _places(width, item, atoms):
                mask = torch.zeros(sum(lengths), dtype=torch.bool)
                mask[start : start + length] = inner
                found.append(mask)
        return found
    every = factors(term)
    for number, factor in enumerate(every):
        inner = _places(width, factor, atoms)
        if inner:  # what stands around it runs through all of its entries
            outside = math.prod(width.length(other) for other in every[:number])
            inside = math.prod(width.length(other) for other in every[number + 1 :])
            return [mask.repeat_interleave(inside).repeat(outside) for mask in inner]
    return []


def _chooses(width: Width, factor: Term) -> bool:
    """Whether the outermost factor of an axis is that of queries and keys, or values too, which no layer reads."""
    trace = width.trace
    read = (trace.inside(trace.tensors[name][axis]) for (name, axis), role in trace.roles.items() if role == "in")
    return factor.size in (2, 3) and not any(inside & trace.inside(factor) for inside in read)


# ---- the residual stream


def _streams(model: nn.Module, width: Width) -> Iterator[Recipe]:
    """Norms that divide by the root mean square need zeros in what is added to the stream; those that also subtract the
    mean need the mean of the old entries. Gains and epsilons are rescaled, so that a norm of the
    longer vector gives what it gave.
    """
    norms = {event.module for event in width.mixing if event.kind in ("norm", "reduce")}
    subtracts = any(event.kind == "norm" and "rms" not in event.detail for event in width.mixing)
    subtracts = subtracts or not norms.isdisjoint(width.trace.centring)
    shrink = {e.module: find(e.term).size / width.length(e.term) for e in width.mixing if e.kind in ("norm", "reduce")}
    writers = [m.name for m in width.members if m.role == "out" and m.name.rpartition(".")[0] not in norms]
    if not subtracts and 2 <= len(writers) <= MANY:  # inside a block, where factors may be multiplied
        for name in reversed(writers):  # of gate and up the latter: any activation lets it learn (relu'(0) = 0)
            yield _stream(model, width, shrink, subtracts, {name})
    yield _stream(model, width, shrink, subtracts, None)
    if any(_offset(width, member, shrink) for member in width.members):
        yield _stream(model, width, shrink, subtracts, None, offset=True)
    if not all(_adjustable(model, width, path) for path in shrink):
        yield _longer(model, width, shrink, subtracts)
        if all(_gains(width, path) for path in shrink):
            yield _longer(model, width, shrink, subtracts, tied=True)
    if not subtracts:  # what divides by a mean, and not by the root of one, shrinks by all of it
        yield _stream(model, width, shrink, subtracts, None, power=1.0)
    if any(_of_heads(width, member) for member in width.members):
        recipe = replace(_stream(model, width, shrink, subtracts, None, heads=False), last=True)
        if not _of_no_use(width, {width.trace.first[name] for name, _ in recipe.zero}):
            yield recipe


def _stream(
    model: nn.Module,
    width: Width,
    shrink: Mapping[str, float],
    subtracts: bool,
    only: set[str] | None,
    power: float = 0.5,
    offset: bool = False,
    heads: bool = True,
) -> Recipe:
    """Zeros or means in what writes to the width (``only`` in some of it), gains and epsilons rescaled.

    ``offset``: norms keep their gains less 1, as Gemma's do. ``heads``: what is attended to is read by another layer.
    """
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
            if offset and _offset(width, member, shrink):
                recipe.scale[key] = torch.full((len(member.index),), shrink[owner] ** power, dtype=torch.float64)
                recipe.shift[key] = recipe.scale[key] - 1
        elif member.role == "in":
            # Behind a norm that subtracts the mean the new entries are 0. What reads the mean itself must not use it,
            # and new entries of a weight that is divided by its norm would change the norm.
            # New heads start at random, and what reads them with zeros.
            own = (width.trace.first[member.name], member.axis)
            reads = own not in width.trace.scaled and not (subtracts and own in width.trace.direct)
            if reads and not (heads and _of_heads(width, member)):
                recipe.free.add(key)
        elif heads and not subtracts and _of_heads(width, member):
            continue
        elif subtracts:
            if member.name not in width.trace.attended:  # queries, keys and values of new heads, which nothing reads
                recipe.mean[key] = _gained(model, width, member, shrink)
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


def _gained(model: nn.Module, width: Width, member: Member, norms: Mapping[str, float]) -> Gains:
    """The gains between what makes entries of a stream and the stream, by which the mean of the latter is weighted.

    At new entries each has the root mean square of its old ones, which is not small where they have both signs.
    """
    along = {m.name: m for m in width.members if m.role == "gain"}
    found = []
    for name in width.trace.gained.get(width.trace.first[member.name], ()):
        gain = along.get(name)
        if gain is not None and name.rpartition(".")[0] not in norms and name != member.name:
            values = in_one_piece(model.get_parameter(name)).detach().double()
            if values.numel() == member.size:
                found.append((name, float(values.square().mean().sqrt()) or 1.0))
    return tuple(found)


def _offset(width: Width, member: Member, norms: Mapping[str, float]) -> bool:
    """Whether a norm may keep in it its gains less 1: a vector of its own that multiplies nothing by itself."""
    owner = member.name.rpartition(".")[0]
    return member.role == "out" and owner in norms and len(width.trace.tensors[member.name]) == 1


def _of_heads(width: Width, member: Member) -> bool:
    """Whether it makes queries, keys and values, or reads what attention made of them."""
    own = width.trace.first[member.name]
    made = width.trace.reads.get((own, member.axis), set()) if member.role == "in" else {own}
    return bool(made) and made <= width.trace.attended


def _of_no_use(width: Width, zero: Set[str]) -> bool:
    """Whether queries and keys that nothing else reads would both be zero: each gets its gradient from the other.

    ``zero``: names of the tensors of which all new entries would be.
    """
    trace = width.trace
    for one, other in (event.writers for event in trace.events if event.kind == "product"):
        both = one | other
        readers = [made for made in trace.reads.values() if made & both]
        if one and other and both <= zero:  # values are made by others, or all three by one projection
            if all(made <= trace.attended and (made - both or one == other) for made in readers):
                return True
    return False


def _adjustable(model: nn.Module, width: Width, path: str) -> bool:
    """Whether a norm has a gain, and an epsilon that is not written into its code."""
    return _gains(width, path) and any(name in vars(model.get_submodule(path)) for name in EPSILON)


def _gains(width: Width, path: str) -> bool:
    """Whether a norm has a gain."""
    return any(m.role == "gain" and m.name.rpartition(".")[0] == path for m in width.members)


def _longer(model: nn.Module, width: Width, norms: Mapping[str, float], subtracts: bool, tied: bool = False) -> Recipe:
    """All that is written to the width is multiplied by the root of new / old, and all that reads it divided by it.

    The root mean square is what it was then, and the deviation too, whatever a norm does with it. ``tied``: a head is
    an embedding too, and cannot be both; all readers are multiplied then, and gains divided twice.
    """
    new = "the mean of the old entries is written to the new ones" if subtracts else "new entries get zeros"
    recipe = Recipe(f"{new}, and old ones as much more as keeps what norms divide by")
    for member in width.members:
        key, own = (member.name, member.axis), (width.trace.first[member.name], member.axis)
        factor, of_norm = math.sqrt(len(member.index) / member.size), member.name.rpartition(".")[0] in norms
        everything = torch.ones(len(member.index), dtype=torch.float64)
        if _of_heads(width, member):  # at random, and read with zeros; no norm of the width looks at them
            continue
        if member.role == "in":
            recipe.scale[key] = everything * factor if tied else everything / factor
            if own not in width.trace.scaled and not (subtracts and own in width.trace.direct):
                recipe.free.add(key)
        elif member.role == "gain":
            if tied and of_norm:
                recipe.scale[key] = everything / factor**2
        else:
            if subtracts and not of_norm:
                recipe.mean[key] = _gained(model, width, member, norms)
            else:
                recipe.zero[key] = everything.bool()
            if not _offset(width, member, norms):
                recipe.scale[key] = everything / factor if tied and of_norm else everything * factor
    return recipe
