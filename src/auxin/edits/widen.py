"""``Widen``: more entries along a width, with everything that shares it."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from math import inf
from typing import Any

from torch import nn

from auxin.anatomy.probe import PlanContext
from auxin.anatomy.tree import join, module_at, planned, resized
from auxin.anatomy.widths.adapters import adapter_fields, half_grown
from auxin.anatomy.widths.configured import fields_for
from auxin.anatomy.widths.groups import (
    Width,
    bare_norms,
    by_steps,
    closure,
    constrained,
    module_attributes,
    output_axis,
    refusals,
    trace_of,
)
from auxin.anatomy.widths.quantized import stored_otherwise
from auxin.anatomy.widths.recipes import needed, recipes
from auxin.anatomy.widths.starts import COPIES, STARTS, Begun, start
from auxin.anatomy.widths.terms import Term, atoms, factors, find, pieces, product
from auxin.anatomy.widths.tracer import Trace
from auxin.anatomy.widths.tried import CHANGES, NOT_RUN, tried
from auxin.axes import Axis
from auxin.change import Assign, Change, Swap
from auxin.edits.data_start import DATA, data_start
from auxin.edits.experts import STARTS as OF_EXPERTS
from auxin.edits.experts import Asked, grown_change, hint_of_experts, more_experts, recorded, replayed
from auxin.edits.widen_init import own_start
from auxin.errors import GrowthError, reason
from auxin.listing import named_modules

CLEARLY = 4.0  # times by which a later start has to be nearer
STATES = ("map", "reset")
RATES = ("keep", "mup")
UNITS = ("heads", "groups", "head_dim", "rows", "experts")


@dataclasses.dataclass(frozen=True)
class Widen:
    """Makes a width of the network larger: units, channels, heads, classes, experts' hidden units, and whatever of the
    network shares it: biases, norms, the layers that read it, gates, tied weights, attributes, configurations.

    What shares it is read off one forward on the probe. ``print(auxin.sites(model, probe))`` lists the widths.

    Args:
        at: path of the module whose output gets wider, or a pattern over repeated blocks, as in
            "model.layers.*.mlp.gate_proj": all of them, as one field of a configuration would.
        by: how many entries more of that output. Where it grows in steps (a head, a group) a multiple of one.
        to: how many there shall be; in place of ``by``.
        init: "zero": what reads the new entries does so with weights of 0, what makes them starts at random; the
            function is kept. "split": copies of old entries, whose readers share the old weights unequally (Net2Wider,
            arXiv:1511.05641, LEMON, arXiv:2310.07999); kept. "tile": copies in order that share equally; kept, under
            norms too where the size is doubled, or three times it (HyperCloning, arXiv:2409.12903). "pair": new entries
            in pairs that cancel (V, V and Z, -Z); kept. "random": all at random; the function changes.
            From ``evidence``, for units between two layers: "tiny", those that lower the loss most, at the amplitude of
            lowest loss (TINY, arXiv:2405.19816); the function changes. "gradmax", those whose outgoing weights, zero at
            first, get the largest gradient; kept; "gradmax-in" the other way round (GradMax, arXiv:2201.05125). Or an
            importable
            ``init(module, site)``: it is given a copy of the smallest module that holds all that grows, wider already
            with "zero", and writes into the new entries; it returns True where the function is kept. See
            ``auxin.init.InitSite``.
        noise: added to copies, in standard deviations of the old weights; they share equally then, and the function is
            not kept exactly.
        lr: "keep", or "mup": learning rates and decays follow the size, in parameter groups of their own, which the
            schedules move along (Yang et al., arXiv:2203.03466). For Adam and its kin the rate of a tensor with m times
            as many inputs is divided by m and its decay multiplied, and epsilon goes with 1 / outputs; for SGD rates go
            with outputs / inputs; Muon follows the shape by itself.
        state: "map": optimizer states go with the entries, scaled as their gradients are; "reset": those of copies
            start at zero.
        unit: what ``by`` and ``to`` count: entries (None); "heads" of attention; "groups", heads of keys with all the
            queries that share them; "head_dim", entries of one head; "rows" of an embedding, its vocabulary; "experts"
            of a mixture, where ``at`` is the router: copies of experts and of its outputs for them. With init="tile" as
            many times as many are chosen, and the function is kept; with init="copy" as many as before.
        outputs: the network's own output may get wider, as for more classes.
        axes: found by the plan, as a journal records it: the axes of all tensors that move.
        assigns: found likewise, the attributes that follow.
        ratios: found likewise, the factors of values that are rescaled.

    Raises:
        GrowthError: the width is fixed by something, which is named with its place.

    Examples:
        >>> Widen("mlp.up", by=16).init
        'zero'
    """

    at: str
    by: int | None = None
    to: int | None = None
    init: Any = "zero"
    noise: float = 0.0
    state: str = "map"
    lr: str = "keep"
    unit: str | None = None
    outputs: bool = False
    axes: tuple[Any, ...] = ()
    assigns: tuple[Any, ...] = ()
    ratios: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self._check_words()

    def check(self, model: nn.Module) -> None:
        """Check that ``at`` names modules of the network.

        Raises:
            GrowthError: it names none.
        """
        self.paths(model)

    @property
    def needs_probe(self) -> str:
        """Why it cannot be planned without a batch; empty where it can."""
        said = f"{self._where}: which tensors share a width is seen in a forward; pass probe=batch."
        return "" if self.axes else said

    def plan(self, model: nn.Module, context: PlanContext) -> Change:
        """Find what grows, and with which values. Writes to nothing."""
        if self.axes:
            swaps = [self._replayed(model, *one) for one in self.axes]
            if self.unit == "experts":
                grown = replayed(model, self.paths(model), swaps, [Assign(*one) for one in self.assigns])
                return grown_change(model, self, grown, context, preserves=False, how="as the journal says")
            return self._change(model, context, self, swaps, how="as the journal says", preserves=False)
        if not context.has_probe:
            raise GrowthError(self.needs_probe)
        if self.unit == "experts":
            return self._experts(model, context)
        try:
            width, begun, assigns = self.tried(model, context)
        except GrowthError as error:
            if CHANGES not in str(error):
                raise
            raise GrowthError(f"{error} {self._instead(model, context)}") from error
        edit = dataclasses.replace(
            self,
            axes=recorded(begun.swaps),
            assigns=tuple((a.path, a.name, a.old, a.value) for a in assigns),
            ratios=_ratios(model, width) if self.lr == "mup" else (),
        )
        return self._change(
            model, context, edit, begun.swaps, how=begun.how, preserves=begun.preserves, remarks=begun.remarks
        )

    def _experts(self, model: nn.Module, context: PlanContext) -> Change:
        """More experts, which are copies."""
        asked = Asked(self._where, self.by, self.to, self.init, self.noise, self.state == "reset")
        grown, kept = more_experts(model, context, self.paths(model), asked)
        edit = dataclasses.replace(
            self,
            axes=recorded(grown.swaps),
            assigns=tuple((a.path, a.name, a.old, a.value) for a in grown.assigns),
        )
        return grown_change(model, edit, grown, context, kept, "copies of experts")

    def tried(self, model: nn.Module, context: PlanContext, fields: bool = True) -> tuple[Width, Begun, list[Assign]]:
        """The first way that lets the network run, and compute what it did where that is promised.

        Args:
            model: the network; nothing is written to it.
            context: runs it on the probe.
            fields: whether to look for the fields of a configuration that say the width.

        Returns:
            What grows, the tensors, and the attributes.

        Raises:
            GrowthError: there is none; says what stands in the way of each.
        """
        wrong: list[tuple[str, float]] = []
        missing: list[str] = []
        for width in self.widths(model, context):
            best: tuple[float, Begun, list[Assign]] | None = None
            own = None if isinstance(self.init, str) else self.init
            named = self.init if own is None and self.init not in DATA else "zero"
            for recipe in recipes(model, width, named):
                if recipe.last and best is not None:
                    break
                begun = start(model, width, named, self.noise, self.state == "reset", context, self._where, recipe)
                assigns = self._assigns(model, width, begun, fields)
                if self.init in DATA:
                    begun = data_start(model, width, begun, assigns, self.init, context, self._where)
                elif own is not None:
                    outputs = [
                        output_axis(width.trace, model, path, rows=self.unit == "rows") for path in self.paths(model)
                    ]
                    begun = own_start(model, width, outputs, begun, assigns, own, context, self._where)
                why, difference = tried(context, begun.swaps, assigns, same=begun.preserves)
                if why:  # a number that only happens to be the same, or whose root activations are multiplied by
                    fewer = self._assigns(model, width, begun, fields, namesakes=False)
                    if len(fewer) < len(assigns):
                        now = tried(context, begun.swaps, fewer, same=begun.preserves)
                        if not now[0] or why.startswith(NOT_RUN):
                            (why, difference), assigns = now, fewer
                wrong += [(why, difference)] if why else []
                if not why and (best is None or CLEARLY * difference < best[0]):
                    best = difference, begun, assigns
                if best is not None and best[0] == 0:
                    break
            if best is not None:
                return width, *best[1:]
            missing += needed(width) if self.init != "random" else []
        nearest = min((off for _, off in wrong), default=inf)  # of the starts that run
        told = [why for why, off in wrong if off in (nearest, inf)] + missing
        raise GrowthError(f"{self._where}: cannot grow: {'; '.join(list(dict.fromkeys(told))[:3])}.")

    def _instead(self, model: nn.Module, context: PlanContext) -> str:
        """What grows this width, where the start that was asked for does not keep the function."""
        path = self.paths(model)[0]
        trace = trace_of(context)
        size = find(self.counted(path, output_axis(trace, model, path, rows=self.unit == "rows"), trace)).size
        plain = dataclasses.replace(self, init="zero", noise=0.0)
        keep = []
        for other in (plain, dataclasses.replace(plain, init="tile", by=None, to=2 * size)):
            try:
                other.tried(model, context, fields=False)
            except GrowthError:
                continue
            unit = "" if self.unit is None else f", unit={self.unit!r}"
            keep.append(f"{other._where[:-1]}{unit}, init={other.init!r})")
        return (
            f"{' or '.join(keep)} keeps the function; " * bool(keep)
            + "init='random' grows it and changes the function."
        )

    def _change(
        self, model: nn.Module, context: PlanContext, edit: Widen, swaps: Sequence[Swap], **fields: Any
    ) -> Change:
        """The change of ``edit``, in which everything that was found is recorded."""
        made = [Assign(path, name, old, value) for path, name, old, value in edit.assigns]
        mup = {name: (inputs, outputs) for name, inputs, outputs in edit.ratios}
        return planned(model, edit, context.seed, swaps=swaps, assigns=made, outputs=self.outputs, mup=mup, **fields)

    @property
    def _where(self) -> str:
        size = f"to={self.to}" if self.by is None else f"by={self.by}"
        return f"Widen({self.at!r}, {size})"

    def _check_words(self) -> None:
        if not isinstance(self.at, str):
            raise GrowthError(f"Widen(at={self.at!r}): pass the path of a module as text, as in 'blocks.*.up'.")
        for name in ("by", "to"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value <= 0):
                raise GrowthError(f"Widen({self.at!r}, {name}={value!r}): pass a whole number from 1 on.")
        if (self.by is None) == (self.to is None):
            raise GrowthError(
                f"Widen({self.at!r}): pass by= (how many entries more) or to= (how many there shall be), one of them."
            )
        names = (*STARTS, *DATA, *(OF_EXPERTS if self.unit == "experts" else ()))
        if self.init not in names if isinstance(self.init, str) else not callable(self.init):
            known = ", ".join(names)
            raise GrowthError(
                f"{self._where}: init={self.init!r} is not known; use one of {known}, or an importable "
                "init(module, site)."
            )
        if self.state not in STATES:
            raise GrowthError(f"{self._where}: state={self.state!r} is not known; use 'map' or 'reset'.")
        if self.lr not in RATES:
            raise GrowthError(f"{self._where}: lr={self.lr!r} is not known; use 'keep' or 'mup'.")
        if self.unit not in (None, *UNITS):
            raise GrowthError(f"{self._where}: unit={self.unit!r} is not known; use one of {', '.join(UNITS)}.")
        if isinstance(self.noise, bool) or not isinstance(self.noise, (int, float)) or not 0 <= self.noise < inf:
            raise GrowthError(f"{self._where}: noise={self.noise!r}: pass a number from 0 on.")
        if self.unit == "experts" and self.lr != "keep":
            raise GrowthError(
                f"{self._where}: lr={self.lr!r} follows sizes of layers, and the number of experts is none; leave it "
                "out."
            )
        if self.noise and isinstance(self.init, str) and self.init not in (*COPIES, *OF_EXPERTS):
            raise GrowthError(
                f"{self._where}: noise= is added to copies, and init={self.init!r} makes none; pass init='split'."
            )
        if not isinstance(self.outputs, bool):
            raise GrowthError(f"{self._where}: outputs={self.outputs!r}: pass True or False.")

    def _replayed(self, model: nn.Module, path: str, name: str, axes: Sequence[Any]) -> Swap:
        maps = {number: Axis.from_json(data) for number, data in enumerate(axes) if data is not None}
        return resized(model, f"{path}.{name}".lstrip("."), maps)

    def widths(self, model: nn.Module, context: PlanContext) -> list[Width]:
        """What may grow, in as many ways as the numbers allow; the one that touches least first.

        Raises:
            GrowthError: nothing can.
        """
        paths = self.paths(model)
        quantized = [*stored_otherwise(model, paths)]
        if quantized:
            raise GrowthError(f"{self._where}: cannot grow: {quantized[0]}.")
        try:
            trace = trace_of(context)
        except GrowthError:
            raise
        except Exception as error:
            raise GrowthError(
                f"{self._where}: the network does not run on the probe: {reason(error)}. Pass the batch as the "
                "training loop calls the model."
            ) from error
        terms = [(path, output_axis(trace, model, path, rows=self.unit == "rows")) for path in paths]
        ways = [self._atoms(path, term, trace) for path, term in terms]
        found: list[Width] = []
        for way in range(max(map(len, ways))):  # as many heads more, or larger ones: the way that touches least
            growth = {id(atom): (atom, by) for atom, by in (one[min(way, len(one) - 1)] for one in ways)}
            width = closure(trace, growth.values())
            width.why_not[:0] = constrained(model, width)
            width.why_not += [] if self.unit else self._other(terms, width)
            width.why_not += [*stored_otherwise(model, {m.name for m in width.members})]
            width.why_not += half_grown(model, {(m.name, m.axis) for m in width.members})
            if not refusals(width) and width.reaches_output and not self.outputs:
                width.why_not.append("the network's own output would get wider; if it shall, pass outputs=True")
            found.append(width)
        fitting = [width for width in found if not refusals(width)]
        if not fitting:
            why = list(dict.fromkeys(reason for width in found for reason in refusals(width)))
            hint = hint_of_experts(model, paths[0], self.by, self.to)
            raise GrowthError(f"{self._where}: cannot grow: {'; '.join(why[:3])}.{hint}")
        return sorted(fitting, key=lambda width: len(width.members))

    def _other(self, terms: Sequence[tuple[str, Term]], width: Width) -> list[str]:
        """Where an axis would become another size than was asked for, since what follows is part of it too."""
        told = []
        for path, term in terms:
            size, new = find(term).size, width.length(term)
            if new != (self.to if self.by is None else size + self.by):
                told.append(f"{path} ({size} wide) would become {new} wide with all that must follow")
        return told[:1]

    def paths(self, model: nn.Module) -> list[str]:
        """The modules that ``at`` names.

        Raises:
            GrowthError: there is none.
        """
        if not any(sign in self.at for sign in "*?["):
            module_at(model, self.at, "Widen(at=...): at")
            return [self.at]
        alike = [path for path in named_modules(model) if path and path.count(".") == self.at.count(".")]
        found = [path for path in alike if fnmatch.fnmatchcase(path, self.at)]
        if not found:
            above, dot, _ = self.at.rpartition(".")
            names = {path.rpartition(".")[2] for path in alike if fnmatch.fnmatchcase(path.rpartition(".")[0], above)}
            there = (
                f"{above}{dot} has {', '.join(sorted(names)[:8])}" if names else "auxin.sites(model, probe) lists all"
            )
            raise GrowthError(f"{self._where}: no module of the network fits this pattern; {there}.")
        return found

    def _atoms(self, path: str, term: Term, trace: Trace) -> list[tuple[Term, int]]:
        """What of an axis may grow, and by how many.

        Raises:
            GrowthError: the number asked for is no multiple of a step.
        """
        counted = self.counted(path, term, trace)
        size = find(counted).size
        by = self.by if self.by is not None else (self.to or 0) - size
        unit = self.unit or "wide"
        if by <= 0:
            raise GrowthError(f"{self._where}: {path} is {size} {unit} already; Widen makes it wider.")
        steps = [(atom, closure(trace, [(atom, 1)]).length(counted) - size) for atom, _ in by_steps(counted)]
        fitting = [(atom, by // step) for atom, step in steps if by % step == 0]
        if not fitting:
            told = " or ".join(dict.fromkeys(str(step) for _, step in steps))
            raise GrowthError(f"{self._where}: {path} ({size} {unit}) grows in steps of {told}; {by} is no multiple.")
        return fitting[::-1] if self.unit == "heads" else fitting

    def counted(self, path: str, term: Term, trace: Trace) -> Term:
        """What ``by`` and ``to`` count: entries of an axis, or heads, groups of them, entries of one.

        What a later layer reads: the three of a projection to queries, keys and values are no heads.
        """
        if self.unit in (None, "rows"):
            return term
        read = (trace.inside(trace.tensors[name][axis]) for (name, axis), role in trace.roles.items() if role == "in")
        known = frozenset().union(*read)
        *heads, size = factors(pieces(term)[0])
        heads = [part for part in heads if trace.inside(part) & known]
        if not heads:
            raise GrowthError(f"{self._where}: {path} has no heads; leave out unit=, to count entries.")
        if self.unit == "head_dim":
            return size
        return heads[0] if self.unit == "groups" else product(heads)

    def _assigns(
        self, model: nn.Module, width: Width, begun: Begun, fields: bool, namesakes: bool = True
    ) -> list[Assign]:
        """Attributes that follow; ``namesakes``: those too that nothing but their value says."""
        swaps = begun.swaps
        named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        sizes = {id(named[join(s.path, s.name)]): s.value.shape for s in swaps if s.value is not None}
        shapes = {name: sizes[id(tensor)] for name, tensor in named.items() if id(tensor) in sizes}
        found: dict[tuple[int, str], Assign] = {}
        modules = dict(model.named_modules(remove_duplicate=False))

        def add(path: str, name: str, old: Any, value: Any) -> None:
            holder: Any = modules[path]
            *through, leaf = name.split(".")
            for part in through:
                holder = holder[part] if isinstance(holder, dict) else getattr(holder, part)
            found.setdefault((id(getattr(holder, "__dict__", holder)), leaf), Assign(path, name, old, value))

        for path, name, old, value in module_attributes(model, shapes, dict(width.groups)):
            add(path, name, old, value)
        for path, name, old, value in bare_norms(model, width):
            add(path, name, old, value)
        for attribute, value in width.attributes:
            *front, last = attribute.name.split(".")
            if last.isdigit():
                held: Any = modules[attribute.path]
                for part in front:
                    held = getattr(held, part)
                key = (attribute.path, ".".join(front))
                known = found.get((attribute.holder, front[-1]))
                items = list(held if known is None else known.value)
                items[int(last)] = value
                found[attribute.holder, front[-1]] = Assign(*key, held, type(held)(items))
            else:
                add(attribute.path, attribute.name, attribute.value, value)
        for path, name, old, value in _namesakes(model, width, swaps) if namesakes else ():
            add(path, name, old, value)
        for path, name, old, value in fields_for(model, shapes, width) if fields else ():
            add(path, name, old, value)
        for path, name, old, value in adapter_fields(model, shapes):
            add(path, name, old, value)
        return [*found.values(), *begun.assigns]


def _ratios(model: nn.Module, width: Width) -> tuple[tuple[str, float, float], ...]:
    """(Name, by how much its inputs, by how much its outputs grow) of each tensor.

    Classes and rows of a vocabulary are no width: nothing sums over them.
    """
    found: dict[str, tuple[float, float]] = {}
    for member in width.members if not width.reaches_output else ():
        owner = module_at(model, member.name.rpartition(".")[0])
        if isinstance(owner, nn.Embedding) and member.axis == 0:
            continue
        inputs, outputs = found.get(member.name, (1.0, 1.0))
        ratio = len(member.index) / member.size
        if member.role == "in":
            found[member.name] = (inputs * ratio, outputs)
        elif member.role not in ("mean", "var"):
            found[member.name] = (inputs, outputs * ratio)
    return tuple((name, inputs, outputs) for name, (inputs, outputs) in found.items())


def _namesakes(model: nn.Module, width: Width, swaps: Sequence[Swap]) -> Iterable[tuple[str, str, int, int]]:
    """Whole numbers of the modules around what grows that say the old size, and nothing else there has that size.

    Not those of which forward was seen to make lengths: of these it is known whether they follow. Nor the number of a
    block.
    """
    seen = {(a.path, a.name) for size, _ in width.trace.links for a in size.attributes}
    for path in dict.fromkeys(swap.path.rpartition(".")[0] for swap in swaps):
        module = module_at(model, path)
        if type(module).__module__.startswith("torch.nn.modules"):
            continue
        prefix = f"{path}." if path else ""
        inside = [m for m in width.members if m.name.startswith(prefix)]
        changes = {(m.size, len(m.index)) for m in inside}
        changes |= {(atom.size, atom.size + by) for atom, by in width.growth.values()}
        grown = {(m.name, m.axis) for m in inside}
        other = {
            size
            for name, tensor in module.named_parameters()
            for axis, size in enumerate(tensor.shape)
            if (prefix + name, axis) not in grown
        }
        terms = (term for name, _ in module.named_parameters() for term in width.trace.tensors.get(prefix + name, ()))
        other |= {atom.size for term in terms for atom in atoms(term) if id(atom) not in width.growth}
        for name, value in vars(module).items():
            if type(value) is not int:
                continue
            new = {after for before, after in changes if before == value}
            known = (path, name) in seen or _is_position(model, path, name)
            if not known and value > 1 and value not in other and len(new) == 1:
                yield path, name, value, new.pop()


def _is_position(model: nn.Module, path: str, name: str) -> bool:
    """Whether an attribute says where among its like a module stands: 8, or 9, in ``layers.8``."""
    module = module_at(model, path)
    here = getattr(module, name)
    numbers = {int(part) for part in path.split(".") if part.isdigit()}
    others = {vars(m).get(name) for m in model.modules() if type(m) is type(module)}
    return len(others) > 1 and (here in numbers or here - 1 in numbers)
