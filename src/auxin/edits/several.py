"""Several edits as one growth: each is planned on the network that the one before it left, all are proved at once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from auxin.anatomy.tree import moves_between
from auxin.axes import Part
from auxin.change import Change, Edit, Measured, New, Placement, Rewire
from auxin.errors import GrowthError
from auxin.listing import join

STRIDE = 1_000_003  # between the seeds of two edits of one growth, so that no two draw the same weights


@dataclasses.dataclass(frozen=True)
class Several:
    """The edits of one growth, in order: what ``grow(model, [edit, edit])`` carries out, and a journal records.

    Examples:
        >>> from auxin import Duplicate
        >>> [edit.at for edit in Several((Duplicate("encoder"), Duplicate("decoder"))).edits]
        ['encoder', 'decoder']
    """

    edits: tuple[Edit, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        odd = [type(e).__name__ for e in self.edits if isinstance(e, (type, Several)) or not isinstance(e, Edit)]
        if odd or not self.edits:
            raise GrowthError(
                f"a list of edits holds {odd[0] if odd else 'nothing'}; pass edits, as in "
                "grow(model, [Duplicate('encoder'), Duplicate('decoder')], optimizer)."
            )

    @property
    def once(self) -> bool:
        """Whether one of them is for once only."""
        return any(getattr(edit, "once", False) for edit in self.edits)

    def check(self, model: nn.Module) -> None:
        """Check the first; it may make the places of the others.

        Raises:
            GrowthError: it has no place in the network.
        """
        check = getattr(self.edits[0], "check", None)
        if check is not None:
            check(model)

    @property
    def needs_probe(self) -> str:
        """Why one of them cannot be planned without a batch; empty where all can."""
        return next(filter(None, (getattr(edit, "needs_probe", "") for edit in self.edits)), "")

    def plan(self, model: nn.Module, context: Any) -> Change:
        """Refuse: only the first can be planned before it is carried out.

        Raises:
            GrowthError: always.
        """
        raise GrowthError("several edits are planned one after the other: auxin.grow(model, [edit, edit], optimizer).")


def as_edit(edit: Any) -> Any:
    """One edit as it is; a list or tuple of them as ``Several``."""
    return Several(tuple(edit)) if isinstance(edit, (list, tuple)) else edit


def steps(edit: Any, seed: int) -> list[tuple[Any, int]]:
    """The edits of one growth in order, each with the seed of its weights."""
    edits = edit.edits if isinstance(edit, Several) else (edit,)
    return [(one, seed + STRIDE * number) for number, one in enumerate(edits)]


@contextlib.contextmanager
def told_which(edit: Any, number: int) -> Iterator[None]:
    """Let a refusal say which of several edits it is about."""
    try:
        yield
    except GrowthError as error:
        if not isinstance(edit, Several):
            raise
        raise type(error)(f"edit {number + 1} of {len(edit.edits)}: {error} None of them is kept.") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Changes(Change):
    """The changes of several edits as one, to be read, measured and printed; ``each`` has been carried out.

    All names are as they are after the last of them.

    Attributes:
        each: one for each edit, in order.
        places: (path, new module) of all that was added and is still there.
        moved: old path -> new path of modules that stay under another name.
    """

    each: tuple[Change, ...] = ()
    places: tuple[tuple[str, New], ...] = ()
    moved: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> tuple[Change, ...]:
        """One change for each edit."""
        return self.each

    @property
    def parts(self) -> tuple[Part, ...]:
        """Trainable parameters of which some entries are new."""
        if not self.each:  # one of several, told with the names of the end
            return super().parts
        found: dict[str, Part] = {}
        for change in self.each:
            axes = {move.name: move.axes for move in change.moves if move.reshaped}
            found = {name: part.after(axes.get(name)) for name, part in found.items()}
            for part in change.parts:
                before = found.get(part.name, part)
                both = zip(before.new, part.new, strict=True)
                found[part.name] = Part(part.name, tuple(old | new for old, new in both))
        return tuple(found.values())

    @property
    def added(self) -> tuple[tuple[str, New], ...]:
        """(path after, new module) of all that was added."""
        return self.places

    @property
    def renamed(self) -> dict[str, str]:
        """Old path -> new path of modules that stay under another name."""
        return dict(self.moved)

    def _what(self) -> Any:
        yield from self._new() if self.each else super()._what()
        for part in self.each:
            if not part.added:
                yield from part._what()


def joined(model: nn.Module, edit: Any, seed: int, parts: Sequence[Change]) -> Change:
    """The one change that has been carried out, or all of them as one."""
    if not isinstance(edit, Several):
        return parts[0]
    final = _Final(model, parts[0], parts[-1])
    settled = [final.of(part) for part in parts]
    first, last = final.before, settled[-1]
    sources = {id(m.new): m.source for part in settled for m in part.moves if m.added and m.source is not None}
    touched = {id(m.new) for part in settled for m in part.moves if not m.added}
    axes = [(id(m.new), m.axes) for part in settled for m in part.moves if m.reshaped]
    once = {i: found for i, found in axes if [other for other, _ in axes].count(i) == 1}
    joins = {i: join for part in settled for i, join in part.joins.items()}
    groups = tuple(one for part in settled for one in part.groups)
    group = next((part.group for part in settled if part.group is not None), None)  # parts that only resize have none
    moves = moves_between(first.parameters, last.after, first.shapes, sources, touched)
    return dataclasses.replace(
        last,
        edit=Several(tuple(part.edit for part in settled if part.edit is not None)),
        seed=seed,
        each=tuple(settled),
        places=tuple(pair for part in settled for pair in part.places),
        rewires=tuple(final.rewire(part, rewire) for part in parts for rewire in part.rewires),
        assigns=tuple(assign for part in reversed(settled) for assign in part.assigns),  # the oldest values come last
        swaps=tuple(swap for part in settled for swap in part.swaps),
        trains={name: trains for part in settled for name, trains in part.trains.items()},
        moves=tuple(dataclasses.replace(m, axes=once.get(id(m.new))) if m.old is m.new else m for m in moves),
        before=first,
        preserves=all(part.preserves for part in settled),
        outputs=any(part.outputs for part in settled),
        how=", ".join(dict.fromkeys(part.how for part in settled if part.how)),
        writers=tuple(name for part in settled for name in part.writers),
        counterparts=tuple(name for part in settled for name in part.counterparts),
        gates=tuple(gate for part in settled for gate in part.gates),
        fade=max((part.fade for part in settled if part.gates), default=0),
        remarks=tuple(dict.fromkeys(note for part in settled for note in part.notes)),
        placement=Placement(last.optimizers, group, joins, groups, last.placement.rewarm),
        measured=Measured(compiling=next((p.compiling for p in settled if p.compiling is not None), None)),
    )


class _Final:
    """Where everything stands after the last of several changes, found by identity."""

    def __init__(self, model: nn.Module, first: Change, last: Change):
        self.before, self._after = first.before, last.after
        self._names = {id(p): name for name, p in last.after.items()}
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._old_names = {id(p): name for name, p in self.before.parameters.items()}
        self._old_paths = {id(module): path for path, module in self.before.modules.items()}
        self._sources: dict[int, str | None] = {}
        stands = {old: self._paths.get(id(module), old) for old, module in self.before.modules.items()}
        self._moved = {old: new for old, new in stands.items() if old != new and not _goes_along(old, new, stands)}

    def of(self, part: Change) -> Changes:
        """One of the changes, told with the names of the end."""
        own = {field.name: getattr(part, field.name) for field in dataclasses.fields(Change)}
        pairs = zip(part.writers, part.counterparts or part.writers, strict=True)
        writers = [(self._name(part, name), self._name(part, other)) for name, other in pairs]
        places = [(self._paths.get(id(new.module)), self._traced(part, new)) for _, new in part.added]
        own |= {
            "after": self._after,
            "moves": tuple(dataclasses.replace(m, name=self._names.get(id(m.new))) for m in part.moves),
            "trains": {self._old_names.get(id(part.before.parameters[n]), n): t for n, t in part.trains.items()},
            "writers": tuple(name for name, _ in writers if name),
            "counterparts": tuple((other or "") if part.counterparts else "" for name, other in writers if name),
            "gates": tuple(gate for path in part.gates if (gate := self._gate(part, path)) is not None),
        }
        there = tuple((path, new) for path, new in places if path is not None)
        return Changes(**own, places=there, moved=self._moved)

    def _name(self, part: Change, name: str) -> str | None:
        """What a parameter is called in the end; None: it has left."""
        return self._names.get(id(part.after.get(name)))

    def rewire(self, part: Change, rewire: Rewire) -> Rewire:
        """New children of a container, by the path that it has in the end."""
        path = self._paths.get(id(part.before.modules[rewire.path]), rewire.path)
        return dataclasses.replace(rewire, path=path)

    def _gate(self, part: Change, path: str) -> str | None:
        """Where a block that fades in stands in the end."""
        for at, new in part.added:
            if path == at or path.startswith(f"{at}."):
                return self._paths.get(id(new.module.get_submodule(path[len(at) + 1 :])))
        return self._paths.get(id(part.before.modules.get(path)))

    def _traced(self, part: Change, new: New) -> New:
        """With the source as it was called before the first change; a copy of a new copy has that one's."""
        source = part.before.modules.get(new.source) if new.source is not None else None
        path = self._old_paths.get(id(source), self._sources.get(id(source)))
        self._sources[id(new.module)] = path
        return dataclasses.replace(new, source=path)


def _goes_along(old: str, new: str, stands: Mapping[str, str]) -> bool:
    """Whether a module has another path only because one around it has."""
    parent, _, name = old.rpartition(".")
    return bool(old) and join(stands[parent], name) == new
