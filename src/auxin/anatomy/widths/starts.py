"""Which values the entries of a grown width start with, and how the states of old ones go on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from auxin.anatomy.probe import PlanContext
from auxin.anatomy.tree import resized
from auxin.anatomy.widths.groups import Member, Width
from auxin.anatomy.widths.recipes import Recipe
from auxin.anatomy.widths.terms import BORN, Term, along, grown
from auxin.axes import Axis
from auxin.change import Assign, Swap
from auxin.errors import GrowthError
from auxin.sharded import in_one_piece

STARTS = ("zero", "split", "tile", "pair", "random")
COPIES = ("split", "tile")
HOW = {
    "zero": "new entries at random, read with zero weights",
    "split": "copies that share what reads them",
    "tile": "copies that share equally what reads them",
    "pair": "new entries in pairs that cancel",
    "random": "new entries at random",
}


@dataclass(frozen=True)
class Entries:
    """What happens to the entries of each atom that grows, by its ``id``.

    Attributes:
        index: the old entry that each new one continues, -1 where it is born.
        share: of each entry in what its original did; 1 where there are no copies.
        partner: for pairs, the entry of the new size that each one repeats.
    """

    index: Mapping[int, Sequence[int]]
    share: Mapping[int, Sequence[float]] = field(default_factory=dict)
    partner: Mapping[int, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Begun:
    """The tensors of a grown width, and what else the start of their values changes."""

    swaps: list[Swap]
    how: str
    preserves: bool
    assigns: list[Assign] = field(default_factory=list)
    remarks: tuple[str, ...] = ()


def start(
    model: nn.Module,
    width: Width,
    init: str,
    noise: float,
    reset: bool,
    context: PlanContext,
    where: str,
    recipe: Recipe,
) -> Begun:
    """Choose the values.

    Args:
        model: the network.
        width: what grows.
        init: a name in ``STARTS``.
        noise: on copies, in standard deviations of the old entries.
        reset: whether the states of copies start at zero.
        context: holds the seed.
        where: for messages.
        recipe: exceptions.
    """
    generator = torch.Generator().manual_seed(context.seed % (1 << 63))
    entries = _entries(width, init, generator, where, alike=noise > 0)
    by_name: dict[str, list[Member]] = {}
    for member in width.members:
        by_name.setdefault(member.name, []).append(member)
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    swaps, done = [], set()
    for name, members in by_name.items():
        if id(named[name]) in done:
            continue
        done.add(id(named[name]))
        axes = {m.axis: _axis(m, width, entries, reset, recipe) for m in members}
        old = in_one_piece(named[name])  # of a sharded network one tensor at a time
        fresh = _fresh(old, members, axes, width, entries, init, generator, recipe)
        swap = resized(model, name, axes, fresh, old)
        if noise and entries.share and any(m.role == "out" for m in members):
            assert swap.value is not None
            swap.value.copy_(_noised(swap.value, old, members, entries, width, noise, generator))
        swaps.append(swap)
    kept = init != "random" and not (noise and entries.share) and not width.reaches_output
    return Begun(swaps, recipe.how or HOW[init], kept, recipe.assigns)


def _entries(width: Width, init: str, generator: torch.Generator, where: str, alike: bool) -> Entries:
    index: dict[int, list[int]] = {}
    share: dict[int, list[float]] = {}
    partner: dict[int, list[int]] = {}
    for key, (atom, by) in width.growth.items():
        n = atom.size
        if init not in COPIES:
            index[key] = [*range(n), *([BORN] * by)]
        if init == "pair":
            if by % 2:
                raise GrowthError(
                    f"{where}: init='pair' adds units two by two, and this adds {by} of them; add an even number."
                )
            partner[key] = [*range(n), *(n + 2 * (i // 2) for i in range(by))]
        if init in COPIES:
            order = torch.randperm(n, generator=generator).tolist() if init == "split" else range(n)
            sources = [order[i % n] for i in range(by)]
            index[key] = [*range(n), *sources]
            share[key] = _shares(index[key], n, generator if init == "split" and not alike else None)
    return Entries(index, share, partner)


def _shares(index: Sequence[int], n: int, generator: torch.Generator | None) -> list[float]:
    """The shares of copies in what their original did, which sum to 1.

    Unequal ones let copies part (LEMON). Where noise does, they are equal (Net2Wider): only then each copy of what
    writes into a norm has a gradient in proportion to that of its original, and the states of optimizers fit.
    """
    weight = [1.0] * len(index)
    if generator is not None:
        weight = [0.5 + float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in index]
    total = [0.0] * n
    for source, w in zip(index, weight, strict=True):
        total[source] += w
    return [w / total[source] for source, w in zip(index, weight, strict=True)]


def _axis(member: Member, width: Width, entries: Entries, reset: bool, recipe: Recipe) -> Axis:
    term, key = width.trace.tensors[member.name][member.axis], (member.name, member.axis)
    index = grown(term, entries.index)
    mean = key in recipe.mean and member.name not in recipe.gains
    if key in recipe.scale:
        scale = recipe.scale[key]
        own = Axis(torch.tensor(index), member.size, scale, 1 / scale, shift=recipe.shift.get(key))
        return replace(own, mean=mean, gains=recipe.mean.get(key, ()))
    if not entries.share:
        return replace(Axis.of(index, member.size), mean=mean, gains=recipe.mean.get(key, ()))
    share = torch.tensor(along(term, entries.share), dtype=torch.float64)
    new = _copies(term, width, index)
    if member.role == "in":
        return Axis(torch.tensor(index), member.size, share, torch.where(new, 0.0, 1.0).double() if reset else None)
    if member.role in ("mean", "var"):
        return Axis.of(index, member.size)
    if not width.is_summed:
        return Axis(torch.tensor(index), member.size, None, torch.where(new, 0.0, 1.0).double() if reset else None)
    return Axis(torch.tensor(index), member.size, None, torch.where(new, 0.0, share) if reset else share)


def _copies(term: Term, width: Width, index: Sequence[int]) -> Tensor:
    """Bool: which entries were not there before."""
    new = grown(term, width.sizes)
    return (
        torch.tensor([position < 0 for position in new]) if len(new) == len(index) else torch.zeros(len(index)).bool()
    )


def _fresh(
    old: Tensor,
    members: Sequence[Member],
    axes: Mapping[int, Axis],
    width: Width,
    entries: Entries,
    init: str,
    generator: torch.Generator,
    recipe: Recipe,
) -> Tensor | float:
    """The values of new entries, as a tensor of the new shape."""
    roles = {m.role for m in members}
    if not old.is_floating_point() or old.is_meta:
        return 0.0
    if "var" in roles:
        return 1.0
    if "mean" in roles or (roles == {"bias"} and old.dim() == 1):
        return 0.0
    if members[0].name in recipe.gains:
        return recipe.gains[members[0].name]
    if roles == {"gain"}:
        return float(old.detach().double().mean()) if old.dim() == 1 else 1.0
    shape = [len(axes[n].index) if n in axes else size for n, size in enumerate(old.shape)]
    if not isinstance(old, nn.Parameter):  # a buffer of the user's: the last entry goes on
        fresh = _continued(old, axes, shape)
        for member in (m for m in members if (m.name, m.axis) in recipe.zero):
            fresh = _written(fresh, member, width, entries, init, recipe)
        return fresh
    if init == "zero" and all(m.role == "in" and (m.name, m.axis) not in recipe.free for m in members):
        return 0.0
    spread = float(old.detach().float().std()) if old.numel() > 1 else 0.0
    spread = spread or 1 / math.sqrt(max(1, old[0].numel() if old.dim() > 1 else 1))
    fresh = _drawn(shape, members, spread, generator)
    for member in members:
        fresh = _written(fresh, member, width, entries, init, recipe)
    return fresh.to(old.dtype)


def _drawn(shape: Sequence[int], members: Sequence[Member], spread: float, generator: torch.Generator) -> Tensor:
    """Normal numbers where entries are new, zeros elsewhere."""
    fresh = torch.zeros(list(shape))
    for member in members:
        new = (torch.tensor(member.index) < 0).nonzero().flatten()
        block = [len(new) if axis == member.axis else size for axis, size in enumerate(shape)]
        fresh.index_copy_(member.axis, new, spread * torch.randn(block, generator=generator))
    return fresh


def _written(fresh: Tensor, member: Member, width: Width, entries: Entries, init: str, recipe: Recipe) -> Tensor:
    """Zero what reads new entries, or let pairs cancel."""
    key = (member.name, member.axis)
    along_axis = [-1 if a == member.axis else 1 for a in range(fresh.dim())]
    if key in recipe.zero:  # what is new along another axis is that one's
        zero = recipe.zero[key] & (torch.tensor(member.index) < 0)
        return fresh * (~zero).to(fresh.dtype).view(along_axis)
    # The embedding of a tied head that reads the stream itself is a reader too.
    tied = member.role == "embedding" and (width.trace.first[member.name], member.axis) in width.trace.direct
    if init == "zero" and (member.role == "in" or tied) and key not in recipe.free:
        new = torch.tensor(member.index) < 0
        return fresh * (~new).to(fresh.dtype).view(along_axis)
    if init == "pair":
        term = width.trace.tensors[member.name][member.axis]
        lengths = {number: atom.size + by for number, (atom, by) in width.growth.items()}
        partner = torch.tensor(grown(term, entries.partner, lengths))
        paired = fresh.index_select(member.axis, partner)
        second = partner != torch.arange(len(partner))
        return (
            paired * torch.where(second, -1.0, 1.0).to(fresh.dtype).view(along_axis) if member.role == "in" else paired
        )
    return fresh


def _continued(old: Tensor, axes: Mapping[int, Axis], shape: Sequence[int]) -> Tensor:
    value = old.detach()
    for number, axis in axes.items():
        index = axis.index.clone()
        born = index < 0
        index[born] = old.shape[number] - 1
        value = value.index_select(number, index.to(value.device))
    return value.reshape(list(shape))


def _noised(
    value: Tensor,
    old: Tensor,
    members: Sequence[Member],
    entries: Entries,
    width: Width,
    noise: float,
    generator: torch.Generator,
) -> Tensor:
    spread = noise * float(old.detach().double().std())
    added = spread * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    for member in members:
        term = width.trace.tensors[member.name][member.axis]
        new = _copies(term, width, grown(term, entries.index))
        mask = new.view([-1 if a == member.axis else 1 for a in range(value.dim())])
        if member.role == "out":
            added = added * mask
    return (value.detach().double().cpu() + added).to(value.device, value.dtype)
