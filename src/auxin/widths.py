"""The widths of a network, as places to grow: which tensors move together, and by which ``Widen``."""

from __future__ import annotations

import contextlib
import fnmatch
import html
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from auxin.anatomy.probe import PlanContext, tensors_in
from auxin.anatomy.tree import join
from auxin.anatomy.widths import groups
from auxin.anatomy.widths.mixtures import mixture_of
from auxin.anatomy.widths.recipes import needed
from auxin.anatomy.widths.terms import Term, find
from auxin.anatomy.widths.tracer import Trace
from auxin.anatomy.widths.tried import NOT_RUN
from auxin.edits.widen import Widen
from auxin.errors import GrowthError, reason
from auxin.listing import folded, in_words, named_modules, unnumbered

HEADER = ("width", "size", "step", "parameters", "FLOPs", "what moves together")
NUMBERS = HEADER[1:5]
ALIGNED = (4, 8)  # steps at once: 16 bytes of float32, of bfloat16


@dataclass(frozen=True)
class Width:
    """One width of a network: the tensors that get wider together.

    Attributes:
        at: path of the module whose output it is, the first one that makes it.
        size: of that output.
        step: how many entries of it come at least: 1, as many as a head has, or as kernels ask for (16 bytes).
        parameters: scalars that one step more costs.
        flops: of a forward that one step more costs, per sample (products and convolutions; a multiply-add is two).
        makes: names of the tensors whose outputs get wider.
        reads: names of those that read it.
        along: names of those that go along: biases, gains, statistics.
        attributes: whole numbers that follow, with their new values ("attention.heads 4 -> 5").
        start: how the new entries start where zeros alone would not do, as in a residual stream.
        edit: that grows it by one step; None where it does not grow.
        fits: the same, as one would write it.
        why_not: what is in the way; "" where nothing is.
    """

    at: str
    size: int
    step: int
    parameters: int
    flops: float
    makes: tuple[str, ...]
    reads: tuple[str, ...]
    along: tuple[str, ...]
    attributes: tuple[str, ...]
    start: str
    edit: Widen | None
    fits: tuple[str, ...]
    why_not: str


class Widths(list[Width]):
    """A list of widths that prints as a table; those of repeated blocks share a row, with a pattern for ``Widen``.

    Attributes:
        why_not: why they could not be read off a forward; "" where they could.
    """

    def __init__(self, widths: Iterable[Width] = (), why_not: str = "", paths: Sequence[str] = ()):
        super().__init__(widths)
        self.why_not, self._paths = why_not, tuple(paths)

    def __str__(self) -> str:
        if not self:
            return f"no widths: {self.why_not}" if self.why_not else ""
        rows = [HEADER, *self._rows()]
        sizes = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        lines = []
        for row in rows:
            padded = zip(HEADER, row, sizes, strict=True)
            cells = [f"{cell:>{size}}" if name in NUMBERS else f"{cell:<{size}}" for name, cell, size in padded]
            lines.append("  ".join(cells).rstrip())
        fit = sum(bool(width.fits) for width in self)
        return "\n".join(
            [*lines, f"{fit} of {len(self)} widths can grow (Widen); parameters and FLOPs of one step more"]
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        if not self:
            return f"<p>{html.escape(str(self))}</p>" if self.why_not else ""
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self._rows()]
        head = "".join(f"<th>{name}</th>" for name in HEADER)
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in (head, *rows))}</table>"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        return (_row(pattern, rows) for pattern, rows in self._folded())

    def _folded(self) -> Iterator[tuple[str, list[Width]]]:
        alike: dict[tuple[Any, ...], list[Width]] = {}
        for width in self:
            names = (width.makes, width.reads, width.along, width.attributes)
            texts = (tuple(map(unnumbered, one)) for one in names)
            edit = None if width.edit is None else replace(width.edit, at="")
            numbers = width.size, width.step, width.parameters, width.flops
            key = (unnumbered(width.at), *numbers, *texts, width.start, edit, unnumbered(width.why_not))
            alike.setdefault(key, []).append(width)
        for rows in alike.values():
            by_path = {width.at: width for width in rows if sum(other.at == width.at for other in rows) == 1}
            for pattern, paths in folded(list(by_path), star=True, fits=self._matches) if by_path else ():
                yield pattern, [by_path[path] for path in paths]
            for width in rows:
                if width.at not in by_path:
                    yield width.at, [width]

    def patterns(self) -> list[tuple[Width, int]]:
        """The widths that can grow, those of repeated blocks as one whose edit has a pattern, and how many each is."""
        found = []
        for pattern, rows in self._folded():
            edit = rows[0].edit
            if edit is not None:
                found.append((replace(rows[0], at=pattern, edit=replace(edit, at=pattern)), len(rows)))
        return found

    def having(self, holds: Callable[[Width], bool]) -> Widths:
        """Those for which something holds, as a list that prints and folds like this one."""
        return Widths(filter(holds, self), self.why_not, self._paths)

    def _matches(self, pattern: str, count: int) -> bool:
        """Whether a pattern names so many modules, as ``Widen`` reads it."""
        depth = pattern.count(".")
        found = (p for p in self._paths if p.count(".") == depth and fnmatch.fnmatchcase(p, pattern))
        return sum(1 for _ in found) == count


def _row(pattern: str, rows: Sequence[Width]) -> tuple[str, ...]:
    one = rows[0]
    edit = pattern if one.edit is None else _written(replace(one.edit, at=pattern))
    lists = (("made by", "makes"), ("read by", "reads"), ("with", "along"), ("sets", "attributes"))
    told = [f"{word} {names}" for word, name in lists if (names := in_words(n for r in rows for n in getattr(r, name)))]
    told += [one.start] if one.start else []
    told += [f"cannot grow: {one.why_not}"] if one.why_not else []
    count = f" ({len(rows)})" if len(rows) > 1 else ""
    numbers = f"{one.size:,}", f"{one.step:,}", f"{one.parameters:,}", f"{one.flops:,.0f}"
    return (f"{edit}{count}", *numbers, "; ".join(told))


def widths_of(context: PlanContext) -> Widths:
    """The widths of a network, read off one forward on the probe."""
    model = context.model
    try:
        trace = groups.trace_of(context)
    except Exception as error:  # whatever a user's forward raises under the tracer
        return Widths(why_not=f"the forward could not be followed: {reason(error)}")
    modules = named_modules(model)
    order = {path: number for number, path in enumerate(modules)}
    matrices = {path for path, m in modules.items() if any(p.dim() > 1 for p in m.parameters(False))}
    # The network itself comes last, whatever parameters it has: a width is named by a layer, where one makes it.
    makers_first = sorted(modules, key=lambda path: (not path, path not in matrices))
    batch = next((t.shape[0] for t in tensors_in(context.batch) if t.dim()), 1) or 1
    costs = _Costs(model, trace, batch)
    found: dict[frozenset[int], Width] = {}
    tries: dict[Any, tuple[Widen | None, str, str]] = {}
    for path in makers_first:
        for place in _places(trace, model, path):
            width = groups.closure(trace, [(place.atom, 1)])
            key = frozenset(width.growth)
            known = found.get(key)
            if (known is not None and not known.why_not) or not _is_used(width):
                continue
            made = _width(place, width, context, costs, tries)
            if known is None or not made.why_not:
                found[key] = made
    # A width that can grow in one way only is told once, by the way in which it can.
    grows = {(width.at, width.makes, width.reads) for width in found.values() if width.fits}
    told = {key for key, one in found.items() if not one.fits and (one.at, one.makes, one.reads) in grows}
    told |= {key for key, one in found.items() if not one.fits and any(key < other for other in found)}
    shown = [width for key, width in found.items() if key not in told]
    experts = {width.at: width for path in modules for width in _of_experts(path, trace, context, costs, tries)}
    shown = [*(width for width in shown if width.fits or width.at not in experts), *experts.values()]
    return Widths(sorted(shown, key=lambda width: order[width.at]), paths=list(modules))


@dataclass(frozen=True)
class _Place:
    """A part of a module's output axis."""

    path: str
    term: Term
    atom: Term
    rows: bool

    @property
    def size(self) -> int:
        """Of the axis."""
        return find(self.term).size

    def edits(self, width: groups.Width) -> Iterator[Widen]:
        """Those that may mean it, the plainest first."""
        step = width.length(self.term) - self.size
        yield Widen(self.path, by=step, unit="rows" if self.rows else None, outputs=width.reaches_output)
        for unit in ("heads", "groups", "head_dim") if not self.rows else ():
            edit = Widen(self.path, by=1, unit=unit, outputs=width.reaches_output)
            try:
                counted = edit.counted(self.path, self.term, width.trace)
            except GrowthError:
                return
            by = width.length(counted) - find(counted).size
            if by:
                yield replace(edit, by=by)


def _places(trace: Trace, model: nn.Module, path: str) -> Iterator[_Place]:
    for rows in (False, True):
        if rows and not isinstance(model.get_submodule(path), nn.Embedding):
            return
        try:
            term = groups.output_axis(trace, model, path, rows=rows)
        except GrowthError:
            return
        for atom, _ in groups.by_steps(term):
            yield _Place(path, term, atom, rows)


def _is_used(width: groups.Width) -> bool:
    """Whether the forward does anything with it."""
    return len({m.name for m in width.members}) > 1 or width.reaches_output or bool(width.mixing)


def _width(place: _Place, width: groups.Width, context: PlanContext, costs: _Costs, tries: dict[Any, Any]) -> Width:
    edit, start, why = None, "", "; ".join(groups.refusals(width))
    if not why:
        edit, start, why, width = _by_the_smallest_step(place, width, context, tries)
    step = width.length(place.term) - place.size
    roles: dict[str, list[str]] = {}
    for member in width.members:
        role = {"out": "makes", "embedding": "makes", "in": "reads"}.get(member.role, "along")
        roles.setdefault(role, []).append(member.name)
    return Width(
        at=place.path,
        size=place.size,
        step=step,
        parameters=costs.parameters(width),
        flops=costs.flops(width),
        makes=_once(roles.get("makes", ())),
        reads=_once(roles.get("reads", ())),
        along=_once(roles.get("along", ())),
        attributes=_once(f"{attribute} {attribute.value} -> {value}" for attribute, value in width.attributes),
        start=start,
        edit=edit,
        fits=() if edit is None else (_written(edit),),
        why_not=why,
    )


def _of_experts(path: str, trace: Trace, context: PlanContext, costs: _Costs, tries: dict[Any, Any]) -> Iterator[Width]:
    """The experts that a layer chooses among, where more copies of them keep the function."""
    chosen = [trace.inside(event.term) for event in trace.events if event.kind in ("softmax", "sort")]
    try:
        term = groups.output_axis(trace, context.model, path)
    except GrowthError:
        return
    mixture = None
    if any(trace.inside(term) & inside for inside in chosen):
        mixture = mixture_of(context.model, path)
    if mixture is None or mixture.size != find(term).size:
        return
    held = [join(one.path, name) for one in mixture.lists for name, _ in one.module.named_parameters()]
    members = _once((*mixture.tensors, *held))
    key = "experts", unnumbered(path), mixture.size, frozenset(map(unnumbered, members))
    if key not in tries:
        tries[key] = mixture.path, _more_experts(path, mixture.size, context)
    first, change = tries[key]
    if change is None:
        return
    edit = replace(change.edit, at=path, axes=(), assigns=())
    made = [name for name in mixture.tensors if name.rpartition(".")[0] in mixture.routers]
    inside = ((a, a.path.startswith(first)) for a in change.assigns)  # of one like it
    numbers = ((mixture.path + a.path[len(first) :] if within else a.path, a) for a, within in inside)
    yield Width(
        at=path,
        size=mixture.size,
        step=edit.by,
        parameters=change.added_parameters,
        flops=costs.flops_with(members) * edit.by / mixture.size,
        makes=_once(made),
        reads=(),
        along=_once(name for name in members if name not in made),
        attributes=_once(f"{join(at, a.name)} {a.old} -> {a.value}" for at, a in numbers),
        start="experts: copies",
        edit=edit,
        fits=(_written(edit),),
        why_not="",
    )


def _more_experts(path: str, size: int, context: PlanContext) -> Any:
    """The change by as few more experts as keep the function, one or as many again; None where neither does."""
    for by in (1, size):
        with contextlib.suppress(GrowthError):
            return Widen(path, by=by, unit="experts", init="tile").plan(context.model, context)
    return None


def _by_the_smallest_step(
    place: _Place, width: groups.Width, context: PlanContext, tries: dict[Any, Any]
) -> tuple[Widen | None, str, str, groups.Width]:
    """As ``_tried``, and the width that it is about: a coarser one where kernels refuse rows that are not aligned."""
    edit, start, why = None, "", ""
    for times in (1, *ALIGNED):
        coarser = width if times == 1 else groups.closure(width.trace, [(place.atom, times)])
        alike = tuple((unnumbered(m.name), m.axis, hash(m.index)) for m in coarser.members)
        key = unnumbered(place.path), place.size, times, frozenset(alike), coarser.reaches_output
        if key not in tries:
            tries[key] = _tried(place, coarser, context)
        edit, start, why = tries[key]
        if edit is not None:
            return replace(edit, at=place.path), start, why, coarser
        if NOT_RUN not in why:
            break
    return None, start, why, width


def _written(edit: Widen) -> str:
    """An edit as one would write it."""
    unit = f", unit={edit.unit!r}" if edit.unit else ""
    init = f", init={edit.init!r}" if edit.init != "zero" else ""
    return f"Widen({edit.at!r}, by={edit.by}{unit}{init}{', outputs=True' * edit.outputs})"


def _tried(place: _Place, width: groups.Width, context: PlanContext) -> tuple[Widen | None, str, str]:
    """The edit that grows this width, and how it starts, or why there is none."""
    why = ""
    for edit in place.edits(width):
        try:
            if not any(one.sizes == width.sizes for one in edit.widths(context.model, context)):
                continue
        except GrowthError:
            continue
        try:
            chosen, begun, _ = edit.tried(context.model, context, fields=False)
        except GrowthError as error:
            why = str(error).partition("cannot grow: ")[2].rstrip(".") or str(error)
            continue
        if chosen.sizes == width.sizes:
            return edit, f"{_kind(width)}: {begun.how}" if needed(width) else "", ""
    return None, "", why or f"Widen({place.path!r}) grows another part of that axis"


def _kind(width: groups.Width) -> str:
    """What a width is whose new entries need more than zeros."""
    if any(event.kind == "product" for event in width.mixing):
        return "head size"
    return "group norm" if {event.detail for event in width.mixing} == {"group norm"} else "residual stream"


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


class _Costs:
    """What one step more of a width costs."""

    def __init__(self, model: nn.Module, trace: Trace, batch: int):
        self.named, self.batch = dict(model.named_parameters()), batch
        self.first, self.by_weight = trace.first, trace.work
        self.work = [(factor, terms, frozenset().union(*map(trace.inside, terms))) for factor, terms, _ in trace.work]

    def parameters(self, width: groups.Width) -> int:
        """Scalars that are added."""
        lengths: dict[str, dict[int, tuple[int, int]]] = {}
        for m in width.members:
            lengths.setdefault(m.name, {})[m.axis] = (m.size, len(m.index))
        total = 0
        for name, axes in lengths.items():
            if name in self.named:
                shape = self.named[name].shape
                total += math.prod(axes.get(n, (0, size))[1] for n, size in enumerate(shape)) - shape.numel()
        return total

    def flops(self, width: groups.Width) -> float:
        """Of one forward, per sample."""
        total = 0.0
        for factor, terms, inside in self.work:
            if not inside.isdisjoint(width.growth):
                total += factor * math.prod(width.length(term) for term in terms)
                total -= factor * math.prod(find(term).size for term in terms)
        return total / self.batch

    def flops_with(self, tensors: Iterable[str]) -> float:
        """Of one forward, per sample, by these weights."""
        names = {self.first[name] for name in tensors if name in self.first}
        total = sum(f * math.prod(find(t).size for t in terms) for f, terms, name in self.by_weight if name in names)
        return total / self.batch
