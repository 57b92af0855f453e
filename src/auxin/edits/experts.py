"""``Widen(unit="experts")``: more experts of a mixture, which are copies, with the router's outputs for them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.blocks import Container, number, replica, shared_tensors
from auxin.anatomy.depth import numbered, numbers
from auxin.anatomy.holders import aliases
from auxin.anatomy.probe import PlanContext
from auxin.anatomy.tree import join, module_at, planned, resized
from auxin.anatomy.widths.configured import fields_that_count
from auxin.anatomy.widths.groups import module_attributes
from auxin.anatomy.widths.mixtures import Mixture, choosing, chosen, counting, mixture_of
from auxin.anatomy.widths.tried import tried
from auxin.axes import Axis
from auxin.change import Assign, Change, New, Rewire, Swap
from auxin.errors import GrowthError

STARTS = ("tile", "copy")
ALL_THE_SAME = "init='copy' grows all the same, and the change says by how much the function changed."


@dataclasses.dataclass(frozen=True)
class Asked:
    """What ``Widen`` was asked for: the number of experts, how they start, and how messages call it."""

    where: str
    by: int | None
    to: int | None
    init: Any
    noise: float
    reset: bool

    def sources(self, mixture: Mixture) -> list[int]:
        """The expert of which each one afterwards is, or is a copy of.

        Raises:
            GrowthError: there are as many already.
        """
        size = mixture.size
        new = size + self.by if self.by is not None else self.to or 0
        if new <= size:
            raise GrowthError(f"{self.where}: {mixture.routers[0]} chooses among {size} experts already.")
        return [number % size for number in range(new)]


@dataclasses.dataclass
class Grown:
    """What grows with the experts of all mixtures that were named."""

    swaps: list[Swap]
    rewires: list[Rewire]
    assigns: list[Assign] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)


def more_experts(model: nn.Module, context: PlanContext, paths: Sequence[str], asked: Asked) -> tuple[Grown, bool]:
    """Find what grows, and try it on the probe. Writes to nothing.

    Args:
        model: the network.
        context: runs it on the probe.
        paths: of the routers.
        asked: what was asked for.

    Returns:
        What grows, and whether the function is kept.

    Raises:
        GrowthError: there are no experts, the numbers do not fit, or the function would change where it must not.
    """
    if asked.init not in STARTS:
        raise GrowthError(
            f"{asked.where}, unit='experts': a new expert takes a part of what the router gives the old ones, so "
            f"init={asked.init!r} cannot keep the function. Pass init='tile' (copies, and as many times as many are "
            "chosen; the function is kept), or init='copy' (copies, and as many are chosen as before; it changes)."
        )
    mixtures: dict[str, Mixture] = {}
    for one in (_mixture(model, path, asked.where) for path in paths):
        mixtures[one.path] = mixtures[one.path].and_by(one) if one.path in mixtures else one
    counts = chosen(context, [*mixtures.values()])
    exact = asked.init == "tile"
    generator = torch.Generator().manual_seed(context.seed % (1 << 63))
    grown, more, remarks = Grown([], []), list[Assign](), list[str]()
    for mixture in mixtures.values():
        sources, count = asked.sources(mixture), counts.get(mixture.path)
        if exact and count is not None:
            more += _more_chosen(model, mixture, count, len(sources), asked.where)
            remarks.append(f"{mixture.path or 'the router'} chooses {more[-1].value} of {len(sources)}")
        if exact and count is None and len(sources) % mixture.size:
            _check_bias(model, mixture, asked.where)
        grown.swaps += _resized(model, mixture, sources, asked, exact and count is None, generator)
        grown.rewires += [_with_copies(model, one, sources, asked, generator) for one in mixture.lists]
    shapes = {join(s.path, s.name): s.value.shape for s in grown.swaps if s.value is not None}
    own = [Assign(*said) for said in module_attributes(model, shapes, {})]
    kept = exact and not asked.noise
    wrong: list[str] = []
    for way in counting(context, mixtures):
        fixed = [Assign(a.path, a.name, a.value, len(asked.sources(m))) for a, m in way]
        assigns = _with_fields(model, shapes, [*own, *more, *fixed])
        if not way and any("would change" in reason for reason in wrong):
            break  # the copies would stand there, and never be asked
        why, _ = tried(context, grown.swaps, assigns, kept, grown.rewires)
        if not why:
            return dataclasses.replace(grown, assigns=assigns, remarks=remarks), kept
        wrong.append(why)
    raise GrowthError(
        f"{asked.where}: with copies of {' and '.join(map(str, mixtures.values()))} {wrong[0]}"
        f"{f', though {remarks[0]}' if remarks else ''}.{_what_would(wrong[0]) if kept else ''}"
    )


def _what_would(why: str) -> str:
    if "would change" not in why:
        return ""
    return (
        " Copies share what their original was given only where the weights of all that are chosen are parts of one "
        f"softmax, or are divided by their sum. {ALL_THE_SAME}"
    )


def _mixture(model: nn.Module, path: str, where: str) -> Mixture:
    found = mixture_of(model, path)
    if found is None:
        kind = type(module_at(model, path)).__name__
        raise GrowthError(
            f"{where}, unit='experts': around {path} ({kind}) there is no list with as many modules as it has outputs, "
            "and no tensor with as many entries along axis 0. Name the layer whose outputs choose among the experts: "
            "Widen('mlp.router', by=4, unit='experts', init='tile')."
        )
    return found


def _more_chosen(model: nn.Module, mixture: Mixture, count: int, new: int, where: str) -> list[Assign]:
    """The attributes by which as many copies are chosen as there are of each expert.

    Raises:
        GrowthError: not all experts have as many copies, or the number is no attribute.
    """
    times, rest = divmod(new, mixture.size)
    if rest:
        raise GrowthError(
            f"{where}: {mixture.path} chooses {int(count)} of {mixture.size} experts, which is kept only if every "
            f"expert is copied as often, and {new} is no multiple of {mixture.size}; use "
            f"to={mixture.size * (times + 1)}. {ALL_THE_SAME}"
        )
    found = choosing(model, mixture, count, times)
    if not found:
        raise GrowthError(
            f"{where}: {mixture.path} chooses {int(count)} of {mixture.size} experts by a number that no attribute "
            f"holds; of {new} it has to choose {count * times}. Make it an attribute (self.top_k). {ALL_THE_SAME}"
        )
    return [Assign(one.path, one.name, one.value, value) for one, value in found]


def _check_bias(model: nn.Module, mixture: Mixture, where: str) -> None:
    """Of a softmax over copies, those that are more than others would count for more, unless a bias says less."""
    without = [at for at in mixture.routers if module_at(model, at)._parameters.get("bias") is None]
    if not without:
        return
    at, size = without[0], mixture.size
    router, give = module_at(model, at), f"Give {at} a bias first"
    if isinstance(router, nn.Linear):
        layer = f"functools.partial(torch.nn.Linear, {router.in_features}, {size})"
        give += f": auxin.Replace({at!r}, {layer}, init='zero')"
    raise GrowthError(
        f"{where}: not every one of the {size} experts would have as many copies, and those with more would count for "
        f"more: each needs a bias of -log(copies), and {at} has none. Use to={2 * size}. {give}. {ALL_THE_SAME}"
    )


def _axis(sources: Sequence[int], size: int, reset: bool) -> Axis:
    """Copies of entries, each of which gets its part of the gradient; ``reset``: none of the state."""
    axis = Axis.of(sources, size).copied(outgoing=False)
    assert axis.gradient is not None
    old = torch.arange(len(sources)) < size
    return dataclasses.replace(axis, gradient=torch.where(old, axis.gradient, 0.0)) if reset else axis


def _resized(
    model: nn.Module, mixture: Mixture, sources: Sequence[int], asked: Asked, shifts: bool, generator: torch.Generator
) -> list[Swap]:
    """The tensors of which each expert has an entry; a router's bias gets less where an expert has more copies."""
    axis, swaps = _axis(sources, mixture.size, asked.reset), []
    uneven = shifts and len(sources) % mixture.size
    for name in mixture.tensors:
        own = axis
        if uneven and name in [join(at, "bias") for at in mixture.routers]:
            own = dataclasses.replace(axis, shift=-axis.counts.double().log())
        swap = resized(model, name, {0: own})
        if asked.noise and swap.value is not None and swap.value.is_floating_point():
            _stir(swap.value[mixture.size :], asked.noise, generator)
        swaps.append(swap)
    return swaps


def _with_copies(
    model: nn.Module, container: Container, sources: Sequence[int], asked: Asked | None, generator: torch.Generator
) -> Rewire:
    """A list of experts with copies behind the old ones, named as these are."""
    size, known = len(container.names), numbers(container)
    names = [re.fullmatch(r"(.*?)(\d+)", name) for name in container.names]
    front, first = ("copy_", size) if None in names or not names[0] else (names[0][1], int(names[0][2]))
    children: list[tuple[str, str | New]] = [(name, name) for name in container.names]
    for place in range(size, len(sources)):
        source = sources[place]
        twin = replica(model, container.child(source))
        new = New(twin, join(container.path, container.names[source]), numbers=numbered(twin, known, place))
        number(twin, new.numbers)
        shared = shared_tensors(model, container.child(source))
        noise = 0.0 if asked is None else asked.noise
        for p in twin.parameters() if noise else ():
            if id(p) not in shared:
                _stir(p, noise, generator)
        children.append((f"{front}{first + place}", new))
    return Rewire(container.path, tuple(children))


@torch.no_grad()
def _stir(values: Tensor, noise: float, generator: torch.Generator) -> None:
    """Move copies by so many standard deviations of what they copy; they are nobody's yet."""
    if values.is_floating_point() and values.numel() > 1 and not values.is_meta:
        spread = noise * float(values.double().std())
        added = spread * torch.randn(values.shape, generator=generator, dtype=torch.float64)
        values.add_(added.to(values.device, values.dtype))


def _with_fields(model: nn.Module, shapes: Mapping[str, torch.Size], assigns: Sequence[Assign]) -> list[Assign]:
    """With the fields of a configuration, and with what else follows from them; each attribute once."""
    counts = {(a.old, a.value) for a in assigns if type(a.old) is int and a.value > a.old}
    said = [(a.path, a.name, a.value) for a in assigns if "." not in a.name]
    found: dict[tuple[int, str], Assign] = {}
    fields = [Assign(*one) for one in fields_that_count(model, shapes, counts, said)]
    for assign in (*assigns, *fields):
        holder: Any = module_at(model, assign.path)
        *through, name = assign.name.split(".")
        for part in through:
            holder = getattr(holder, part)
        found.setdefault((id(vars(holder)), name), assign)
    return [*found.values()]


def grown_change(model: nn.Module, edit: Any, grown: Grown, context: PlanContext, preserves: bool, how: str) -> Change:
    """The change: copies start with the states of their originals, all scaled as their gradients are.

    Args:
        model: the network.
        edit: as a journal records it.
        grown: what grows.
        context: holds the seed.
        preserves: whether the function is kept.
        how: in words.
    """
    axes: dict[int, tuple[Axis, ...]] = {}
    sources: dict[int, nn.Parameter] = {}
    swaps = list(grown.swaps)
    reset = edit.state == "reset"
    for rewire in grown.rewires:
        container = Container(rewire.path, module_at(model, rewire.path), tuple(module_at(model, rewire.path)._modules))
        copies: dict[str, list[New]] = {}
        for _, new in rewire.added:
            copies.setdefault(new.source or "", []).append(new)
        for name in container.names:
            path = join(rewire.path, name)
            expert, made = module_at(model, path), copies.get(path, [])
            shared = shared_tensors(model, expert)
            for inside, old in expert.named_parameters() if made else ():
                if id(old) in shared or not old.dim():
                    continue
                share = 1 / (1 + len(made))
                own = _shared_out(old, share)
                swaps.append(resized(model, join(path, inside), {0: own[0]}))
                for new in made if not reset else ():
                    twin = new.module.get_parameter(inside)
                    axes[id(twin)], sources[id(twin)] = own, old
    change = planned(
        model,
        edit,
        context.seed,
        grown.rewires,
        swaps,
        sources,
        aliases=tuple(alias for rewire in grown.rewires for alias in aliases(model, rewire)),
        assigns=tuple(grown.assigns),
        preserves=preserves,
        how=how,
        remarks=tuple(dict.fromkeys(grown.remarks)),
    )
    moves = (dataclasses.replace(m, axes=axes.get(id(m.new), m.axes)) if m.added else m for m in change.moves)
    return dataclasses.replace(change, moves=tuple(moves))


def _shared_out(old: Tensor, share: float) -> tuple[Axis, ...]:
    """All entries where they were, each with a part of the gradient."""
    first, *others = (Axis.same(size) for size in old.shape)
    return (dataclasses.replace(first, gradient=torch.full((old.shape[0],), share, dtype=torch.float64)), *others)


def hint_of_experts(model: nn.Module, path: str, by: int | None, to: int | None) -> str:
    """What to say where a layer whose outputs choose cannot get more of them by itself; "" where none stand around."""
    if mixture_of(model, path) is None:
        return ""
    size = f"to={to}" if by is None else f"by={by}"
    return f" If it chooses among experts: Widen({path!r}, {size}, unit='experts', init='tile')."


def recorded(swaps: Sequence[Swap]) -> tuple[Any, ...]:
    """Resized tensors as a journal records them."""
    return tuple((s.path, s.name, tuple(None if a.is_same else a.to_json() for a in s.axes or ())) for s in swaps)


def replayed(model: nn.Module, paths: Sequence[str], swaps: Sequence[Swap], assigns: Sequence[Assign]) -> Grown:
    """What a journal records, with the lists of experts: these have the copies that the router has."""
    rewires, axes = dict[str, Rewire](), {join(s.path, s.name): s.axes for s in swaps}
    for path in paths:
        mixture = _mixture(model, path, f"Widen({path!r})")
        along = axes.get(mixture.tensors[0])
        assert along is not None
        sources, generator = along[0].index.tolist(), torch.Generator()
        rewires |= {one.path: _with_copies(model, one, sources, None, generator) for one in mixture.lists}
    return Grown(list(swaps), [*rewires.values()], list(assigns))
