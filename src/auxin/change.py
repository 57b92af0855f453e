"""A plan made concrete: which modules and tensors a growth changes, by path, so that it fits every copy of a
network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar, cast, runtime_checkable

import torch
from torch import Size, Tensor, nn

from auxin.axes import Axes, Part, has_born, told
from auxin.dynamo import CompileTime
from auxin.fsdp2 import is_unit
from auxin.listing import Listing, folded, listing, unnumbered
from auxin.modules import Dormant
from auxin.output_hook import NAME as GROWN


@runtime_checkable
class Edit(Protocol):
    """What to grow and where, as plain data: a frozen dataclass with one method.

    ``plan`` is pure: it may build tensors and run pieces of the network through ``context``, it writes to nothing. An
    edit with an attribute ``once = True`` is chosen by a Grower once only.

    Two more are asked for when a Grower is built, where an edit has them: ``check(model)`` raises a GrowthError where
    the edit has no place in the network, without planning it; ``needs_probe`` is a text that says why it cannot be
    planned without a batch, empty where it can.
    """

    def plan(self, model: nn.Module, context: Any) -> Change:
        """Work out the change; ``context`` runs pieces of it on the probe (see ``auxin.anatomy.probe``)."""
        ...


@dataclass(frozen=True, eq=False)
class Continued:
    """A tensor whose entries come from the one that was named ``old`` before the change, as ``axes`` say."""

    old: str
    axes: Axes


@dataclass(frozen=True, eq=False)
class New:
    """A module that is to be spliced in.

    Attributes:
        module: the module itself, ready to train.
        gated: whether it has a gate and fades in.
        numbers: by (path inside, attribute), the position by which it and its parts know where they stand.
        source: path of the block that it copies (before the change); a copy of the network copies its own block.
        zeroed: tensors inside ``module`` that were set to a constant after copying, by name: to 0, or to -1 where a
            norm stores its gain as 1 + w.
        continues: tensors inside ``module`` that go on from old ones, by name: a copy of the network takes them from
            its own old tensors.
        tied: whether it holds the parameters of its source (True), or takes the place of its source with weights of its
            own where that shares them with other passes (False); None: it shares what the source shares.
    """

    module: nn.Module
    source: str | None = None
    zeroed: Mapping[str, float] = field(default_factory=dict)
    gated: bool = False
    numbers: Mapping[tuple[str, str], int] = field(default_factory=dict)
    continues: Mapping[str, Continued] = field(default_factory=dict)
    tied: bool | None = None


# ``group=``: the index of an existing group, the options of an own one, or None: the group of the sibling.
Grouping = int | Mapping[str, Any] | None
Children = tuple[tuple[str, "str | New | None"], ...]


@dataclass(frozen=True, eq=False)
class Rewire:
    """New children of the module at ``path``, in order: (name after, name before, a new module, or None for None).

    ``hook`` says that the module's output goes through its child ``_grown`` from now on (True), or no longer (False).
    """

    path: str
    children: Children
    hook: bool | None = None

    @property
    def renamed(self) -> dict[str, str]:
        """Old path -> new path of the children that stay under another name."""
        prefix = f"{self.path}." if self.path else ""
        pairs = ((prefix + old, prefix + new) for new, old in self.children if isinstance(old, str))
        return {old: new for old, new in pairs if old != new}

    @property
    def added(self) -> tuple[tuple[str, New], ...]:
        """(path after, new module) of the children that are new."""
        prefix = f"{self.path}." if self.path else ""
        return tuple((prefix + name, child) for name, child in self.children if isinstance(child, New))


@dataclass(frozen=True, eq=False)
class Alias:
    """A plain list or tuple, ``name`` of the module at ``path``, that repeats the children of ``rewire``."""

    path: str
    name: str
    rewire: Rewire


@dataclass(frozen=True, eq=False)
class Assign:
    """A plain attribute of the module at ``path``: ``value`` after, ``old`` before (``MISSING``: it was not there).

    ``name`` may lead through objects that the module refers to, and through dictionaries, as in ``config.vocab_size``
    and ``r.default``.
    """

    path: str
    name: str
    old: Any
    value: Any


def entries_of(holder: Any) -> dict[str, Any]:
    """What an object on the way of a dotted name holds: a dictionary its entries, anything else its attributes."""
    return holder if isinstance(holder, dict) else vars(holder)


@dataclass(frozen=True, eq=False)
class Swap:
    """A tensor that is a module's own and is replaced, resized, added or removed (``value`` None).

    Attributes:
        path, name: of the module that holds it, and under which name.
        value: what it holds afterwards, of the new shape.
        axes: how its entries continue those that stood there; every copy of the network takes these from its own old
            tensor, and optimizers carry their state by them. None: nothing continues.
        buffer: whether it is a buffer.
        resized: whether it stays the same object, so that ties and whoever holds it stay true.
    """

    path: str
    name: str
    value: Tensor | None
    axes: Axes | None
    buffer: bool = False
    resized: bool = False


MISSING = object()
PHRASES = 6  # about resized tensors, in the line that a change prints


@dataclass(frozen=True, eq=False)
class Before:
    """The network as it was before a change: modules, parameters and buffers by name, and shapes by ``id``.

    A follower matches a copy of the network to it.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    shapes: Mapping[int, Size] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, network: Listing | None = None) -> Before:
        """Read it off a network that has not been changed yet; ``network``: what it holds, where that is known."""
        network = listing(model) if network is None else network
        tensors = (*network.parameters.values(), *network.buffers.values())
        return cls(network.modules, network.parameters, network.buffers, {id(t): t.shape for t in tensors})


@dataclass(frozen=True, eq=False)
class Move:
    """What happens to one parameter; ``name`` and ``new`` are None where it leaves, ``old_name`` and ``old`` where
    it is born.

    Attributes:
        old_shape: shape before; differs from ``shape`` where the tensor is resized.
        source: the parameter whose optimizer state a copy starts from; None: it starts fresh.
        axes: how its entries continue those of ``old``; None: they all do, or (of another shape) none does.
        new_shape: where it differs from that of ``new``, which has not been resized yet.
    """

    name: str | None
    old_name: str | None
    new: nn.Parameter | None
    old: nn.Parameter | None
    old_shape: Size | None = None
    source: nn.Parameter | None = None
    axes: Axes | None = None
    new_shape: Size | None = None

    @property
    def shape(self) -> Size:
        """The shape after the change, known before it is carried out."""
        assert self.new is not None
        return self.new_shape or self.new.shape

    @property
    def continues(self) -> bool:
        """Whether entries of an old tensor go on in another shape, order, scale or object."""
        return self.old is not None and self.new is not None and (self.old is not self.new or self.reshaped)

    @property
    def reshaped(self) -> bool:
        """Whether entries of an old tensor stand elsewhere afterwards, are scaled, new or gone."""
        if self.old is None or self.new is None:
            return False
        return self.old_shape != self.shape or (self.axes is not None and not all(a.is_same for a in self.axes))

    @property
    def added(self) -> bool:
        """Whether the optimizer meets this tensor for the first time."""
        return self.old is None

    @property
    def removed(self) -> bool:
        """Whether the tensor leaves the network."""
        return self.new is None


@dataclass(frozen=True, eq=False)
class Join:
    """Where a new parameter goes: an optimizer, the index of its group, and the parameter that it stands beside."""

    optimizer: Any
    group: int
    sibling: nn.Parameter | None


@dataclass(frozen=True, eq=False)
class OwnGroup:
    """A parameter group that a growth makes for its new parameters, because ``group=dict(...)`` asks for it.

    Attributes:
        optimizer: the one that it is made in.
        index: of the new group in ``optimizer.param_groups``.
        donor: index of the group that the new parameters would have joined; every option not asked for is its.
        options: what was asked for.
        reference: the donor's learning rate where its schedule began (``initial_lr``), or its own without a schedule.
        lr: what the new group has in place of ``reference``; equal to it where no ``lr`` was asked for.
        begins: what an optimizer counts in its groups, by key what that begins with
            (``MISSING``: it is not there before the first step).
    """

    optimizer: Any
    index: int
    donor: int
    options: Mapping[str, Any]
    reference: float
    lr: float
    begins: Mapping[str, Any] = field(default_factory=dict)

    def scaled(self, value: Any) -> Any:
        """A learning rate of the donor, times the ratio of ``lr`` to ``reference``; tensors stay tensors, cloned."""
        if isinstance(value, Tensor):
            value = value.detach().clone()
            if self.lr == self.reference:
                return value
            begins = bool((value == self.reference).all())
            return torch.full_like(value, self.lr) if begins else value * (self.lr / self.reference)
        if value is None or self.lr == self.reference:
            return value
        return self.lr if value == self.reference else value * (self.lr / self.reference)

    def __str__(self) -> str:
        kind = type(self.optimizer).__name__
        asked = {"lr": self.lr, **self.options}
        told = ", ".join(
            f"{key} {value:g}" if type(value) is float else f"{key} {value}" for key, value in asked.items()
        )
        ratio = "" if self.lr == self.reference else f"; {self.lr / self.reference:.3g}x the rate of group {self.donor}"
        return f"own group {self.index} of {kind} ({told}{ratio})"

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the new parameters of a change are trained.

    Attributes:
        optimizers: those that keep step.
        group: the ``group=`` that was asked for.
        joins: by ``id`` of each new trainable parameter, where it goes.
        groups: the parameter groups that are made for the new parameters.
        rewarm: over how many optimizer steps the updates of new parameters grow to their full size.
        notes: what is to be said about it.
    """

    optimizers: tuple[Any, ...] = ()
    group: Grouping = None
    joins: Mapping[int, Join] = field(default_factory=dict)
    groups: tuple[OwnGroup, ...] = ()
    rewarm: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of a change that was carried out.

    Attributes:
        max_difference: of the probe's outputs before and after (absolute); None without a probe.
        gradient_ratio: root mean square of the new weights' gradient / of their counterparts', on the probe: of the
            writers where there are any, against the same tensors of the copied block, else of the nearest siblings.
        gradient_ratios: the same for each new block, by path.
        seconds: of the whole growth.
        compiling: counts the seconds that ``torch.compile`` takes afterwards, where it has to compile again; None where
            no compiled code runs through the place.
        notes: what else was found.
    """

    max_difference: float | None = None
    gradient_ratio: float | None = None
    gradient_ratios: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    compiling: CompileTime | None = None
    notes: tuple[str, ...] = ()


Value = TypeVar("Value")


def _reads(get: Callable[[Change], Value]) -> Value:
    """A read-only property, of the type that it reads."""
    return cast(Any, property(get))


@dataclass(frozen=True, eq=False)
class Change:
    """One growth as a plan, and after it was carried out, what was measured. Prints itself in one line.

    What ``placement`` and ``measured`` hold is read off the change itself too; ``notes`` are those of all three.

    Attributes:
        edit: the edit, resolved to concrete places (what the journal records).
        seed: of the new weights.
        rewires, aliases, assigns, swaps: what changes in the tree of modules, by path before the change.
        trains: which parameters are frozen or thawed, by name before the change.
        moves: what changes for parameters, for whoever holds them by identity.
        before: the network as it was.
        after: the network's parameters after the change, by name, in ``named_parameters()`` order.
        preserves: whether the outputs are promised to stay as they are.
        outputs: whether the edit allows outputs of another shape.
        how: how the new weights start, in words ("last writers zero", "identity", ...).
        writers: names (after) of the new tensors that must get a gradient at the first backward.
        counterparts: names (after) of the neighbour's same tensors, for the gradient ratio.
        gates: paths (after) of the new blocks that fade in.
        fade: over how many optimizer steps.
        mup: by how much inputs and outputs of tensors (names after) have grown, whose learning rates follow their size.
        remarks: what the plan has to say.
        joined: what FSDP2 knows of new parameters that a unit takes in which is there already, by ``id``.
        placement: where the new parameters go (known once the companions are).
        measured: what was measured (known once the change was carried out).
    """

    edit: Edit | None
    seed: int | None = None
    rewires: tuple[Rewire, ...] = ()
    aliases: tuple[Alias, ...] = ()
    assigns: tuple[Assign, ...] = ()
    swaps: tuple[Swap, ...] = ()
    trains: Mapping[str, bool] = field(default_factory=dict)
    moves: tuple[Move, ...] = ()
    before: Before = Before()
    after: Mapping[str, nn.Parameter] = field(default_factory=dict)
    preserves: bool = False
    outputs: bool = False
    how: str = ""
    writers: tuple[str, ...] = ()
    counterparts: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    fade: int = 0
    mup: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    joined: Mapping[int, Any] = field(default_factory=dict)
    placement: Placement = Placement()
    measured: Measured = Measured()

    optimizers = _reads(lambda self: self.placement.optimizers)
    group = _reads(lambda self: self.placement.group)
    joins = _reads(lambda self: self.placement.joins)
    groups = _reads(lambda self: self.placement.groups)
    max_difference = _reads(lambda self: self.measured.max_difference)
    gradient_ratio = _reads(lambda self: self.measured.gradient_ratio)
    gradient_ratios = _reads(lambda self: self.measured.gradient_ratios)
    seconds = _reads(lambda self: self.measured.seconds)
    compiling = _reads(lambda self: self.measured.compiling)
    notes = _reads(lambda self: (*self.remarks, *self.placement.notes, *self.measured.notes))

    def with_measured(self, *notes: str, **found: Any) -> Self:
        """The same change with more that was measured."""
        return replace(self, measured=replace(self.measured, notes=(*self.measured.notes, *notes), **found))

    def will_train(self, move: Move) -> bool:
        """Whether a parameter is trainable after the change."""
        return move.new is not None and self.trains.get(move.old_name or "", move.new.requires_grad)

    @property
    def starting(self) -> tuple[str, ...]:
        """Names (after) of the tensors that begin to train: new ones, and old ones that thaw."""
        moves = (m for m in self.moves if m.name is not None and self.will_train(m))
        return tuple(m.name or "" for m in moves if m.added or self.trains.get(m.old_name or "", False))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Trainable parameters of which some entries are new."""
        moves = (m for m in self.moves if not m.added and m.name is not None and self.will_train(m))
        axes = ((m.name or "", m.axes) for m in moves if m.axes is not None and has_born(m.axes))
        return tuple(Part(name, tuple(axis.born for axis in held)) for name, held in axes)

    @property
    def steps(self) -> tuple[Change, ...]:
        """One change for each edit: this one, unless several edits make one growth."""
        return (self,)

    @property
    def added(self) -> tuple[tuple[str, New], ...]:
        """(path after, new module) of all that was added."""
        return tuple(pair for rewire in self.rewires for pair in rewire.added)

    @property
    def renamed(self) -> dict[str, str]:
        """Old path -> new path of modules that stay under another name."""
        return {old: new for rewire in self.rewires for old, new in rewire.renamed.items()}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """New and resized parameters as whole tensors, for code that has cached a list of parameters."""
        return [move.new for move in self.moves if move.new is not None]

    @property
    def parameters_before(self) -> int:
        """Number of scalars before the change."""
        return sum(self.before.shapes[id(p)].numel() for p in self.before.parameters.values())

    @property
    def added_parameters(self) -> int:
        """Number of new scalars, minus those that left."""
        gained = sum(m.shape.numel() for m in self.moves if m.new is not None)
        return gained - sum(m.old_shape.numel() for m in self.moves if m.old_shape is not None)

    def __str__(self) -> str:
        return " · ".join(self._parts())

    __repr__ = __str__

    def _parts(self) -> Iterator[str]:
        yield from self._what()
        count = self.added_parameters
        share = f" ({100 * count / self.parameters_before:+.0f} %)" if self.parameters_before else ""
        if count or not any(self.trains.values()):
            yield f"{count:+,} parameters{share}"
        if self.max_difference is not None:
            same = self.preserves or self.max_difference == 0
            kept = "function unchanged" if same else "function changed"
            yield f"{kept} (max |d| = {self.max_difference:.3g})"
        elif not any("output shape" in note for note in self.notes):
            yield "not probed"
        if self.gradient_ratio is not None:
            several = sorted(self.gradient_ratios.values()) if len(self.gradient_ratios) > 1 else [self.gradient_ratio]
            ends = (f"{value:.1f}x" if value >= 0.1 else f"{value:.1g}x" for value in (several[0], several[-1]))
            span = " to ".join(dict.fromkeys(ends))
            yield f"gradient {span} its neighbour's"
        if self.gates:
            yield f"fades in over {self.fade} optimizer steps"
        if self.placement.rewarm and (self.starting or self.parts) and self.optimizers:
            yield f"warms up over {self.placement.rewarm} optimizer steps"
        if not self.optimizers and any(move.added for move in self.moves):
            yield "no optimizer given"
        yield from map(str, self.groups)
        yield from self.notes
        if self.compiling is not None:
            yield str(self.compiling)
        yield f"{1e3 * self.seconds:.0f} ms"

    def _what(self) -> Iterator[str]:
        """What was added, replaced, removed, resized; all names as they are afterwards."""
        yield from self._new()
        if not self.added:
            at = getattr(self.edit, "at", "")
            yield f"{type(self.edit).__name__}({at!r})" if at else "surgery"
        yield from _resizes([m for m in self.moves if m.old_shape is not None and m.reshaped and not _keeps_values(m)])

    def _new(self) -> Iterator[str]:
        """What was added or replaced."""
        old = self.before.modules
        renamed = self.renamed
        asleep = {id(module.layer) for module in old.values() if isinstance(module, Dormant)}
        for path, new in self.added:
            kind = _kind(new.module)
            if path.rpartition(".")[2] == GROWN and isinstance(new.module, nn.Sequential):
                path, kind = f"{path}.0", type(new.module[0]).__name__
            if new.source == path and new.tied is False:
                yield f"{path} has weights of its own"
            elif new.tied:
                yield f"{path} runs {renamed.get(new.source or '', new.source)} again"
            elif new.source:
                yield f"{path} <- copy of {renamed.get(new.source, new.source)}"
            elif id(new.module) in asleep:
                yield f"{path} wakes: {kind}"
            elif path in old and path not in renamed:
                yield f"{path}: {_kind(old[path])} replaced by {kind}"
            else:
                yield f"{path} <- {kind}"


def _keeps_values(move: Move) -> bool:
    """Whether nothing but a state changes, as where copies take a part of the gradient."""
    plain = move.axes is not None and all(a.keeps_all and a.value is None and a.shift is None for a in move.axes)
    return plain and move.old is move.new


def _kind(module: nn.Module) -> str:
    """The user's class of a module."""
    return type(module).__name__.removeprefix("FSDP" if is_unit(module) else "")


def _resizes(moves: Sequence[Move]) -> Iterator[str]:
    """What is resized: one phrase for tensors of repeated blocks, and no more phrases than fit in a line."""
    phrases = _folded(moves, by_map=True)
    if len(phrases) > PHRASES:
        phrases = _folded(moves, by_map=False)
    yield from (phrase for phrase, _ in phrases[:PHRASES])
    more = sum(count for _, count in phrases[PHRASES:])
    if more:
        yield f"and {more} more tensors" if more > 1 else "and one more tensor"


def _folded(moves: Sequence[Move], by_map: bool) -> list[tuple[str, int]]:
    """Phrases, and of how many tensors each tells; ``by_map`` tells tensors apart whose entries move differently."""
    alike: dict[tuple[str, ...], dict[str, str]] = {}
    for move in moves:
        name, mapped = move.name or "", _mapped(move)
        key = unnumbered(name), _resized(move), mapped if by_map else str(bool(mapped))
        alike.setdefault(key, {})[name] = mapped
    found = []
    for (_, shapes, _), maps in alike.items():
        for pattern, names in folded(list(maps)):
            told = {maps[name] for name in names}
            how = told.pop() if len(told) == 1 else "(each in places of its own)"
            found.append((" ".join(filter(None, (pattern, shapes, how))), len(names)))
    return found


def _resized(move: Move) -> str:
    old, new = tuple(move.old_shape or ()), tuple(move.shape)
    return f"{old} -> {new}" if old != new else f"{new}"


def _mapped(move: Move) -> str:
    """Say how entries move, if more happens than that new ones come at the end."""
    if move.axes is None:
        return "(nothing of it goes on)"
    plain = all(a.value is None and a.gradient is None and a.keeps_place for a in move.axes)
    return "" if plain else f"({told(move.axes)})"
