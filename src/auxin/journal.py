"""What was grown, as data; and growing the same again, on any device, before the weights come from a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from torch import nn

from auxin import typed
from auxin.anatomy.blocks import passes
from auxin.anatomy.probe import PlanContext
from auxin.anatomy.tree import CONTAINERS, unwrap
from auxin.change import Change, Grouping
from auxin.edits.several import as_edit, steps
from auxin.engine import transaction, ways_back
from auxin.errors import GrowthError
from auxin.follow.fsdp import shard
from auxin.follow.own_groups import optimizers_in
from auxin.gate import NAME as GATE
from auxin.listing import every_tensor, join, lines_of, named_modules
from auxin.randomness import random_state
from auxin.refs import Allowed, name_of
from auxin.structure import Undo

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """One growth.

    Attributes:
        edit: resolved to concrete places.
        seed: of the new weights.
        at: {"calls", "optimizer_steps"} at which it happened.
        metrics: what was passed to ``step``.
        added: {"path", "from", "parameters"} of each new module.
        renamed: old path -> new path of modules that moved.
        parameters: {"before", "after"} of the network.
        group: the ``group=`` that was asked for.
        before: fingerprint of the structure before it; None where that was not known.
        fingerprint: of the structure afterwards.
        summary: the change in one line.
        parts: names of the parameters that were resized, of which some entries are new.
    """

    edit: Any
    seed: int
    at: Mapping[str, int]
    metrics: Mapping[str, float]
    added: Sequence[Mapping[str, Any]]
    renamed: Mapping[str, str]
    parameters: Mapping[str, int]
    group: Grouping
    preserved: bool
    max_difference: float | None
    gradient_ratio: float | None
    seconds: float
    before: str | None
    fingerprint: str
    summary: str
    parts: Sequence[str] = ()


class Journal:
    """The growths of a network in order. Prints as a list; ``to_json`` and ``from_json`` are exact.

    ``journal[0]`` is an entry, and ``journal[:2]`` a journal of the first two growths, for ``replay`` up to there.
    """

    def __init__(self, entries: Iterable[Entry] = ()):
        self.entries: list[Entry] = entries if isinstance(entries, list) else list(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    @overload
    def __getitem__(self, index: int) -> Entry: ...

    @overload
    def __getitem__(self, index: slice) -> Journal: ...

    def __getitem__(self, index: int | slice) -> Entry | Journal:
        return Journal(self.entries[index]) if isinstance(index, slice) else self.entries[index]

    def __eq__(self, other: object) -> bool:
        return self.to_json() == other.to_json() if isinstance(other, Journal) else NotImplemented

    def __repr__(self) -> str:
        return "\n".join(f"{i}: {entry.summary}" for i, entry in enumerate(self)) or "nothing has grown"

    def record(
        self,
        model: nn.Module,
        change: Change,
        at: Mapping[str, int] | None = None,
        metrics: Mapping[str, float] | None = None,
        origin: str | None = None,
    ) -> Entry:
        """Write down a change that was carried out on ``model``; ``origin`` is the fingerprint before the first one."""
        added = [
            {"path": path, "from": new.source, "parameters": 0 if new.tied else _size(new.module)}
            for path, new in change.added
        ]
        before = change.parameters_before
        entry = Entry(
            edit=change.edit,
            seed=change.seed or 0,
            at=dict(at or {}),
            metrics=dict(metrics or {}),
            added=added,
            renamed=change.renamed,
            parameters={"before": before, "after": before + change.added_parameters},
            group=change.group,
            preserved=change.preserves,
            max_difference=change.max_difference,
            gradient_ratio=change.gradient_ratio,
            seconds=change.seconds,
            before=self.entries[-1].fingerprint if self.entries else origin,
            fingerprint=fingerprint(model),
            summary=str(change),
            parts=[part.name for part in change.parts],
        )
        self.entries.append(entry)
        return entry

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data, one mapping per growth; readable, and accepted by ``torch.load(weights_only=True)``."""
        return [
            {"id": i, **{f.name: _encode(getattr(entry, f.name), f.name) for f in dataclasses.fields(Entry)}}
            for i, entry in enumerate(self)
        ]

    @classmethod
    def from_json(cls, data: Any, allowed: Allowed) -> Journal:
        """Read it back; classes are resolved only where ``allowed`` says so.

        Raises:
            GrowthError: not a journal, or a reference that is not allowed.
        """
        if not isinstance(data, list):
            raise GrowthError(f"a journal is a list of growths, this is a {type(data).__name__}.")
        return cls(_entry(item, i, allowed) for i, item in enumerate(data))


def replay(model: nn.Module, journal: Journal | list[Any], *companions: Any, allow: Iterable[Any] = ()) -> nn.Module:
    """Grow ``model`` as the journal says: names, shapes and attributes; the weights come from a checkpoint afterwards.

    Args:
        model: the network as it was first built, on any device, the meta device too; changed in place.
        journal: a Journal, or the data of its ``to_json``.
        companions: optimizers and averages that keep step.
        allow: further classes, functions or modules that the journal may name.

    Returns:
        The model.

    Raises:
        GrowthError: an entry does not fit this model; nothing is changed then.
    """
    with replayed(model, journal, *companions, allow=allow):
        pass
    return model


@contextlib.contextmanager
def replayed(
    model: nn.Module,
    journal: Journal | list[Any],
    *companions: Any,
    allow: Iterable[Any] = (),
    grown: Journal | None = None,
    keep: Callable[[int, Undo], None] | None = None,
) -> Iterator[Journal]:
    """``replay`` as a context: what is raised inside takes all of it back.

    ``grown`` has been carried out already; ``keep`` is given the number and the way back of each growth.
    """
    model = unwrap(model)
    if not isinstance(journal, Journal):
        journal = Journal.from_json(journal, Allowed.of(model, allow))
    stepped = bool(optimizers_in(companions))  # without an optimizer there are no groups to make
    with contextlib.ExitStack() as stack:
        with random_state():
            missing = _missing(model, journal, grown)
            for number, entry in enumerate(missing, len(journal) - len(missing)):
                group, own = entry.group if stepped else None, keep and functools.partial(keep, number)
                try:
                    edits = steps(entry.edit, entry.seed)
                    for (edit, seed), way in zip(edits, ways_back(own, len(edits)), strict=True):
                        change = shard(model, edit.plan(model, PlanContext(model, seed=seed, structural=True)))
                        asked = group if change.starting else None  # where nothing is new as a whole it says nothing
                        stack.enter_context(transaction(model, change, companions, asked, keep=way))
                except Exception as error:  # whatever a hostile journal brings about
                    raise GrowthError(
                        f"growth {number} of the journal ({entry.summary}) does not fit this model: {error} If the "
                        "model has grown since, build it afresh, as at the start of that run."
                    ) from error
                if fingerprint(model) != entry.fingerprint:
                    raise GrowthError(
                        f"growth {number} of the journal ({entry.summary}) gives another structure here than it gave "
                        "then: this model is not the one that was grown, or has grown further. Build it afresh, with "
                        "the same class and arguments as at the start of that run."
                    )
        yield journal
        stack.pop_all()  # all of them are kept, at one stroke


def fingerprint(model: nn.Module) -> str:
    """A short hash of the names and shapes of all parameters and buffers, and of which blocks of a list run the same
    weights; gates are not there for good.
    """
    lasting = [(name, t) for name, t in every_tensor(model) if name.rpartition(".")[2] != GATE]
    lines = [*lines_of(lasting)]
    if len({id(t) for _, t in lasting}) < len(lasting):
        lists = ((path, m) for path, m in named_modules(model).items() if isinstance(m, CONTAINERS))
        lines += [" = ".join(join(path, name) for name in together) for path, m in lists for together in passes(m)]
    text = "\n".join(lines)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def references(edit: Any) -> list[Any]:
    """The classes and functions that an edit holds: its user has handed them over."""
    edit = as_edit(edit)
    found: list[Any] = [type(edit)]
    stack = [getattr(edit, f.name) for f in dataclasses.fields(edit)] if dataclasses.is_dataclass(edit) else []
    while stack:
        value = stack.pop()
        if hasattr(value, "func") and hasattr(value, "keywords"):
            stack += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, (list, tuple)):
            stack += value
        elif isinstance(value, Mapping):
            stack += value.values()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            found += references(value)
        elif callable(value):
            found.append(value)
    return found


def _missing(model: nn.Module, journal: Journal, grown: Journal | None) -> list[Entry]:
    """The entries that the model does not have yet: all, where it looks as at the start (it may look so again)."""
    now = fingerprint(model)
    if grown and grown[-1].fingerprint == now and grown == journal:
        return []
    if journal.entries and journal[0].before == now:
        return journal.entries
    for done in range(len(journal), 0, -1):
        if journal[done - 1].fingerprint == now:
            return journal.entries[done:]
    return journal.entries


def _encode(value: Any, name: str) -> Any:
    return edit_to_json(value) if name == "edit" else typed.encode(value, name)


def edit_to_json(edit: Any) -> dict[str, Any]:
    """An edit as plain data: its class by name, and its fields."""
    fields = {f.name: typed.encode(getattr(edit, f.name), f.name) for f in dataclasses.fields(edit)}
    return {"type": name_of(type(edit)), **fields}


def edit_from_json(data: Any, where: str, allowed: Allowed) -> Any:
    """Read an edit back.

    Raises:
        GrowthError: not an edit, or a reference that is not allowed; ``where`` says of what.
    """
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise GrowthError(f"{where}: its edit has no type.")
    cls: Any = allowed.resolve(data["type"])
    if not hasattr(cls, "__dataclass_fields__") or not hasattr(cls, "plan"):
        raise GrowthError(f"{where}: {data['type']} is not an edit.")
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(data.keys() - known - {"type"})
    if unknown:
        raise GrowthError(f"{where}: {data['type']} has no field {', '.join(unknown)}; it has {sorted(known)}.")
    fields = {name: typed.decode(value, allowed.resolve, name) for name, value in data.items() if name != "type"}
    try:
        return cls(**fields)
    except Exception as error:  # whatever its own checks raise
        raise GrowthError(f"{where}: {data['type']}: {error}") from error


def _entry(item: Any, number: int, allowed: Allowed) -> Entry:
    names = [f.name for f in dataclasses.fields(Entry)]
    item = {"parts": [], **item} if isinstance(item, dict) else item  # journals of 0.1 have none
    if not isinstance(item, dict) or sorted(item) != sorted([*names, "id"]):
        keys = sorted(item) if isinstance(item, dict) else type(item).__name__
        raise GrowthError(f"growth {number} of the journal has the keys {keys}; expected {sorted(names)}.")
    values = {name: typed.decode(item[name], allowed.resolve, name) for name in names if name != "edit"}
    for name, kind in (
        ("seed", int),
        ("at", dict),
        ("metrics", dict),
        ("added", list),
        ("renamed", dict),
        ("parts", list),
        ("fingerprint", str),
    ):
        if not isinstance(values[name], kind):
            raise GrowthError(
                f"growth {number} of the journal: {name} is a {type(values[name]).__name__}, not a {kind.__name__}."
            )
    return Entry(edit=edit_from_json(item["edit"], f"growth {number} of the journal", allowed), **values)
