"""A width of a network: the axes, attributes and groups that must grow together."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

from auxin.anatomy.probe import PlanContext, untouched
from auxin.anatomy.tree import module_at
from auxin.anatomy.widths.sizes import Attribute, Size
from auxin.anatomy.widths.terms import BORN, Term, atoms, copies, find, grown, parts
from auxin.anatomy.widths.tracer import Event, Trace, traced
from auxin.errors import GrowthError
from auxin.fsdp2 import units

CONSTRAINTS: dict[type, str] = {
    parametrizations._SpectralNorm: "spectral_norm",
    parametrizations._Orthogonal: "orthogonal",
    SpectralNorm: "spectral_norm",
}
ORIGINALS = (
    "weight",
    "parametrizations.weight.original",
    "parametrizations.weight.original1",
    "weight_v",
    "weight_orig",
)
_seen: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Trace]] = weakref.WeakKeyDictionary()


def trace_of(context: PlanContext) -> Trace:
    """The axes of the network on the probe; remembered until a shape or a module changes."""
    model = context.model
    shapes = tuple((name, tuple(t.shape)) for name, t in (*model.named_parameters(), *model.named_buffers()))
    key = hash((shapes, tuple((path, id(type(m))) for path, m in model.named_modules())))
    known = _seen.get(model)
    if known is None or known[0] != key:
        if units(model):
            context.calls({})  # a forward makes what the next one computes with
        with untouched(model):
            known = (key, traced(model, context.run))
        _seen[model] = known
    return known[1]


@dataclass(frozen=True, eq=False)
class Member:
    """An axis of a tensor that grows.

    Attributes:
        name: of the parameter or buffer.
        axis: number of the dimension.
        role: "in" (the new entries are read), "out" (they are made), or "gain", "bias", "mean", "var".
        index: the old entry that each new one continues, -1 for a new one.
        size: the length before.
    """

    name: str
    axis: int
    role: str
    index: tuple[int, ...]
    size: int


@dataclass(eq=False)
class Width:
    """What grows together.

    Attributes:
        trace: of the network.
        growth: by ``id`` of each atom that grows: the atom, and by how many entries.
        members: axes of tensors.
        attributes: (attribute, value after) of modules and configurations that forward makes shapes of.
        groups: (path, groups after) of grouped convolutions and group norms.
        reaches_output: whether outputs of the network change shape.
        why_not: what forbids it.
        mixing: what sums up or normalises along the width: events that a start of the weights must respect.
    """

    trace: Trace
    growth: dict[int, tuple[Term, int]] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)
    attributes: list[tuple[Attribute, int]] = field(default_factory=list)
    groups: list[tuple[str, int]] = field(default_factory=list)
    reaches_output: bool = False
    why_not: list[str] = field(default_factory=list)
    mixing: list[Event] = field(default_factory=list)

    @property
    def sizes(self) -> dict[int, list[int]]:
        """By ``id`` of an atom that grows, the old entry of each new one."""
        return {key: [*range(atom.size), *([BORN] * by)] for key, (atom, by) in self.growth.items()}

    def grows(self, term: Term) -> bool:
        """Whether an axis contains an atom that grows."""
        return not self.trace.inside(term).isdisjoint(self.growth)

    @property
    def changes(self) -> set[tuple[int, int]]:
        """Lengths before and after, of axes and of what they are made of."""
        terms = (part for m in self.members for part in parts(self.trace.tensors[m.name][m.axis]))
        return {(find(term).size, self.length(term)) for term in terms if self.grows(term)}

    @property
    def is_summed(self) -> bool:
        """Whether anything sums over it; nothing does over classes and the words of a vocabulary."""
        return bool(self.mixing) or any(member.role == "in" for member in self.members)

    def length(self, term: Term) -> int:
        """Of an axis after the growth."""
        return len(grown(term, self.sizes)) if self.grows(term) else find(term).size


def output_axis(trace: Trace, model: nn.Module, path: str, rows: bool = False) -> Term:
    """The term of a module's output axis.

    Raises:
        GrowthError: it has none of its own.
    """
    module = module_at(model, path)
    prefix = f"{path}." if path else ""
    own = [name for name, _ in module.named_parameters(recurse=False)] + [
        name for name, _ in module.named_buffers(recurse=False) if name.endswith("running_mean")
    ]
    parametrized = [n for n, _ in module.named_parameters() if n.startswith("parametrizations.weight.")]
    recurrent = {nn.RNNBase: "weight_hh_l0", nn.RNNCellBase: "weight_hh"}
    for kind, name in recurrent.items():  # the hidden units; the rows are those of all gates
        if isinstance(module, kind) and prefix + name in trace.tensors:
            return trace.tensors[prefix + name][1]
    ranked = sorted((n for n in own + parametrized[-1:]), key=lambda n: -len(trace.tensors.get(prefix + n, ())))
    for name in ranked:
        terms = trace.tensors.get(prefix + name)
        if terms is None:
            continue
        if isinstance(module, nn.Embedding):
            return terms[0] if rows else terms[1]
        for number, term in enumerate(terms[:3]):
            if role_of(trace, prefix + name, number) not in ("in", "batch") and find(term).size > 1:
                return term
    raise GrowthError(
        f"Widen(at={path!r}): {type(module).__name__} has no weight of its own whose output could get wider; name the "
        f"layer inside it that makes the width: {_layers(module, path)}."
    )


def _layers(module: nn.Module, path: str) -> str:
    inside = [n for n, m in module.named_modules() if n and any(True for _ in m.parameters(recurse=False))]
    return ", ".join(f"{path}.{n}".lstrip(".") for n in inside[:6]) or "it holds none"


def role_of(trace: Trace, name: str, axis: int) -> str:
    """What an axis of a tensor does; ties have the role of the name that comes first."""
    return trace.roles.get((trace.first[name], axis), "out")


def closure(trace: Trace, growth: Iterable[tuple[Term, int]]) -> Width:
    """Everything that grows with some atoms.

    Args:
        trace: of the network.
        growth: atoms, and by how many entries each.
    """
    width = Width(trace, {id(find(atom)): (find(atom), by) for atom, by in growth})
    values: dict[tuple[int, str], int] = {}
    for _ in range(8):  # an attribute may bring another atom, which may bring another attribute
        known = len(width.growth)
        width.why_not = []
        values = _attributes(width)
        _follow_attributes(width, values)
        if len(width.growth) == known:
            break
    seen = {a.key: a for size, _ in trace.links for a in size.attributes}
    width.attributes = [(seen[key], value) for key, value in values.items() if value != seen[key].value]
    for name, terms in trace.tensors.items():
        for number, term in enumerate(terms):
            if width.grows(term):
                role = role_of(trace, name, number)
                index = tuple(grown(term, width.sizes))
                width.members.append(Member(name, number, role, index, find(term).size))
    width.groups = [(path, width.length(outer)) for path, outer in dict(trace.groups).items() if width.grows(outer)]
    width.reaches_output = any(width.grows(term) for terms in trace.outputs for term in terms)
    width.mixing = [event for event in trace.events if width.grows(event.term)]
    return width


def _attributes(width: Width) -> dict[tuple[int, str], int]:
    """New values of attributes that forward makes grown lengths of.

    First those that are a length by themselves; then those of which a product or a sum must be one.
    """
    values: dict[tuple[int, str], int] = {}
    links = [(size, term) for size, term in width.trace.links if width.grows(term)]
    for size, term in links:
        for attribute in _alone(size):
            length = width.length(term)
            if values.setdefault(attribute.key, length) != length:
                width.why_not.append(
                    f"{attribute} is the length of axes that would grow to {values[attribute.key]} and to {length}"
                )
    growing = {atom.size for atom, _ in width.growth.values()}
    staying = {a.key for size, term in width.trace.links if not width.grows(term) for a in _alone(size)}
    for size, term in links:
        length = width.length(term)
        if size.with_values(values) == length:
            continue
        unknown = [a for a in size.attributes if a.key not in values and a.key not in staying]
        for attribute in sorted(unknown, key=lambda a: a.value not in growing):
            low, high = size.with_values(values), size.with_values(values | {attribute.key: attribute.value + 1})
            new = attribute.value + (length - low) / (high - low) if high != low else Fraction(0)
            if new.denominator == 1 and new > attribute.value:
                values[attribute.key] = int(new)
                break
    return values


def _alone(size: Size) -> list[Attribute]:
    """The attribute that a number is, by itself."""
    return size.attributes if [*size.terms.values()] == [1] and len(next(iter(size.terms))) == 1 else []


def _follow_attributes(width: Width, values: Mapping[tuple[int, str], int]) -> None:
    """Let other lengths that forward makes of changed attributes follow; say where they cannot."""
    for size, term in width.trace.links:
        after, length = size.with_values(values), width.length(term)
        if after == length or (after == find(term).size and not _is_plain(size)):
            continue  # a number that was multiplied by a length of a tensor's says nothing
        ratio = after / find(term).size
        fitting = [atom for atom in atoms(term) if ratio > 1 and (find(atom).size * ratio).denominator == 1]
        free = [atom for atom in fitting if id(atom) not in width.growth]
        if free and not width.grows(term):
            changed = {s.value for s in size.attributes if values.get(s.key, s.value) != s.value}
            atom = next((a for a in free if a.size in changed), free[0])
            width.growth[id(atom)] = (atom, int(atom.size * ratio) - atom.size)
        elif _is_plain(size):
            what = f"{' and '.join(map(str, size.attributes))} (= {int(size)})"
            width.why_not.append(f"forward makes a length of {find(term).size} of {what}, which cannot follow")


def _is_plain(size: Size) -> bool:
    """Whether it was computed from attributes alone, as far as can be seen."""
    return all(factor == 1 for product, factor in size.terms.items() if product)


def by_steps(term: Term) -> list[tuple[Term, int]]:
    """The atoms of an axis, with how many entries one more of each brings, outermost first."""
    return [(atom, copies(term, atom)) for atom in atoms(term) if atom.size > 1]


def refusals(width: Width, init: str = "zero") -> list[str]:
    """Why a width cannot grow, in words; empty where it can."""
    found = list(dict.fromkeys(width.why_not))
    for event in width.mixing:
        if event.kind in ("softmax", "sort", "unknown", "mixed"):
            at = event.module or "the network"
            found.append(f"{at} runs {event.detail or event.kind} along it ({event.where})")
    return list(dict.fromkeys(found))


def constrained(model: nn.Module, width: Width) -> list[str]:
    """Why a width cannot grow where torch keeps a whole matrix orthogonal or of norm 1, which new entries change."""
    found: dict[str, str] = {}
    for member in width.members:
        path = member.name.rpartition(".")[0].partition("parametrizations")[0].rstrip(".")
        module = model.get_submodule(path)
        hooks = [*module._forward_pre_hooks.values()]
        hooks += [one for held in getattr(module, "parametrizations", {}).values() for one in held]
        for hook in hooks:
            kind = CONSTRAINTS.get(type(hook))
            if kind is not None:
                found[path] = (
                    f"{path} is under {kind} of torch, which looks at the whole matrix; take it off, widen, and "
                )
                found[path] += "put it on again"
    return [*found.values()]


def module_attributes(
    model: nn.Module, shapes: Mapping[str, torch.Size], groups: Mapping[str, int]
) -> list[tuple[str, str, Any, Any]]:
    """(path, name, old, new) of what layers of torch say of their tensors, for tensors of new shapes."""
    found: list[tuple[str, str, Any, Any]] = []
    owners = dict.fromkeys(name.rpartition(".")[0].partition("parametrizations")[0].rstrip(".") for name in shapes)
    for path in (*owners, *(p for p in groups if p not in owners)):
        module = module_at(model, path)
        prefix = f"{path}." if path else ""
        weight = next((shapes[prefix + name] for name in ORIGINALS if prefix + name in shapes), None)
        if weight is None:
            weight = getattr(getattr(module, "weight", None), "shape", None)
        bias = shapes.get(f"{prefix}bias")
        for name, new in _said(module, weight, bias, prefix, shapes, groups.get(path)).items():
            old = getattr(module, name, None)
            if name in module.__dict__ and old is not None and old != new:
                found.append((path, name, old, new))
    return found


def bare_norms(model: nn.Module, width: Width) -> Iterator[tuple[str, str, Any, Any]]:
    """(path, name, old, new) of what norms of torch say that have no tensors of their own."""
    for event in width.mixing:
        norm = model.get_submodule(event.module) if event.kind in ("norm", "reduce") else None
        if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and norm.weight is None and len(norm.normalized_shape) == 1:
            yield event.module, "normalized_shape", norm.normalized_shape, (width.length(event.term),)


def _said(
    module: nn.Module,
    weight: torch.Size | None,
    bias: torch.Size | None,
    prefix: str,
    shapes: Mapping[str, torch.Size],
    groups: int | None,
) -> dict[str, Any]:
    """What a layer of torch must say of itself."""
    if isinstance(module, nn.Linear) and weight is not None:
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        count = module.groups if groups is None else groups
        made, read = (weight[1], weight[0]) if module.transposed else (weight[0], weight[1])
        made, read = (made * count, read) if module.transposed else (made, read * count)
        return {"out_channels": made, "in_channels": read, "groups": count}
    if isinstance(module, nn.Embedding) and weight is not None:
        return {"num_embeddings": weight[0], "embedding_dim": weight[1]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        channels = next((s[0] for n, s in shapes.items() if n.startswith(prefix) and len(s) == 1), None)
        return {} if channels is None else {"num_features": channels}
    if isinstance(module, nn.GroupNorm):
        channels = weight[0] if weight is not None else module.num_channels * (groups or 1) // module.num_groups
        return {"num_channels": channels, "num_groups": groups or module.num_groups}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        return {"normalized_shape": tuple(weight)}
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        own = {name: tensor.shape for name, tensor in module.named_parameters(recurse=False)}
        read, hidden = (
            next(shapes.get(prefix + name, shape) for name, shape in own.items() if name.startswith(start))
            for start in ("weight_ih", "weight_hh")
        )
        return {"hidden_size": hidden[1], "input_size": read[1]}
    if isinstance(module, nn.MultiheadAttention):
        own = {name: shapes.get(prefix + name, t.shape) for name, t in module.named_parameters()}
        size, heads = own["out_proj.weight"][0], groups or module.num_heads
        read = {"kdim": "k_proj_weight", "vdim": "v_proj_weight"}
        dims = {key: own[name][1] if name in own else size for key, name in read.items()}
        return {"embed_dim": size, "num_heads": heads, "head_dim": size // heads, **dims}
    if isinstance(module, nn.Bilinear) and weight is not None:
        return {"out_features": weight[0], "in1_features": weight[1], "in2_features": weight[2]}
    return {}
