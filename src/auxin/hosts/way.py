"""The way that a network has grown, forward and back: to the structure that an earlier checkpoint was saved with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from auxin.checkpoint.groups import without_emptied
from auxin.edits.after import After
from auxin.edits.duplicate import Duplicate
from auxin.edits.insert import Insert
from auxin.edits.remove import Remove
from auxin.engine import grow
from auxin.errors import GrowthError
from auxin.grower import Grower
from auxin.journal import Entry, Journal, fingerprint, replay
from auxin.record import contents_of, refill
from auxin.refs import Allowed
from auxin.surgery import surgery

ADDING = (After, Duplicate, Insert)  # what they add can be taken out
Content = list[Any]  # of a container: its items, and for a dict pairs


class Way:
    """What each growth of a network has changed, by reference, and the way back. Values are left to a checkpoint."""

    def __init__(self) -> None:
        self._steps: dict[int, _Step] = {}

    @contextlib.contextmanager
    def noting(self, model: nn.Module, number: int) -> Iterator[None]:
        """Remember what growth ``number``, inside, changes."""
        step = _Step(model)
        yield
        step.done()
        self._steps[number] = step

    def forward(self, model: nn.Module, journal: Journal, companions: Sequence[Any]) -> None:
        """Replay those growths of a journal that the network does not have yet.

        Raises:
            GrowthError: one of them does not fit this network.
        """
        now, marks = fingerprint(model), [entry.fingerprint for entry in journal]
        if now not in marks or journal.entries[0].before == now:
            done = 0
        else:
            done = len(marks) - marks[::-1].index(now)
        for number in range(done, len(marks)):
            with self.noting(model, number):
                replay(model, Journal([journal.entries[number]]), *companions)

    def to(self, grower: Grower, state: Mapping[str, Any], allow: Iterable[Any] = ()) -> None:
        """Take a network, what hangs on it and its Grower to the structure and counts of ``grower.state_dict()``.

        The values are those of now: the host loads what it has saved afterwards.

        Raises:
            GrowthError: the state is of another network, or there is no way back.
        """
        rule = [*grower.references(), *allow]
        journal = Journal.from_json(state["journal"], Allowed.of(grower.model, rule))
        ours, theirs = _growths(grower.journal), _growths(journal)
        shared = next((n for n in range(len(ours)) if ours[: n + 1] != theirs[: n + 1]), len(ours))
        entries = grower.journal.entries
        lost = [n for n in range(shared, len(ours)) if n not in self._steps and not isinstance(entries[n].edit, ADDING)]
        if lost:
            raise GrowthError(_no_way(entries[lost[-1]]))
        for number in reversed(range(shared, len(entries))):
            with without_emptied(grower.companions):
                self._back(grower, number, entries[number])
        self.forward(grower.model, journal, grower.companions)
        grower.progress.entries[:] = journal.entries
        grower.load_state_dict(state, rule)

    def _back(self, grower: Grower, number: int, entry: Entry) -> None:
        """Undo the last growth that is left."""
        step = self._steps.pop(number, None)
        if step is not None:
            with surgery(grower.model, *grower.companions, watch=grower._watch):
                step.undo()
        else:  # it was carried out in another process
            for added in reversed(entry.added):
                grow(grower.model, Remove(added["path"]), *grower.companions, stock=False)
        if fingerprint(grower.model) != entry.before:
            raise GrowthError(_no_way(entry))


class _Step:
    """What one growth changes: containers with their content before and after, and which parameters train."""

    def __init__(self, model: nn.Module):
        self._held = [(held, content, content) for held, content in contents_of([model])]
        self._trains = [(p, p.requires_grad) for p in model.parameters()]

    def done(self) -> None:
        """Keep what has changed."""
        now = [(held, before, _content(held)) for held, before, _ in self._held]
        self._held = [(held, before, after) for held, before, after in now if not _same(before, after)]
        self._trains = [(p, trained) for p, trained in self._trains if p.requires_grad != trained]

    def undo(self) -> None:
        """Take back what the growth has changed, and leave what others have changed since."""
        for held, before, after in self._held:
            if not isinstance(held, dict) or _same(_content(held), after):
                refill(held, before)
                continue
            old, new = dict(before), dict(after)
            for key in {**old, **new}:
                if key not in old:
                    held.pop(key, None)
                elif key not in new or new[key] is not old[key]:
                    held[key] = old[key]
        for p, trained in self._trains:
            p.requires_grad_(trained)


def _no_way(entry: Entry) -> str:
    return (
        f"there is no way back to before this growth: {entry.summary}. It was carried out in another process, or other "
        "code has changed the network since. Build the network that it was then, and load the checkpoint into that."
    )


def _growths(journal: Journal) -> list[list[Any]]:
    """What each growth is, without the times and figures of the process that carried it out."""
    return [[entry[name] for name in ("edit", "seed", "group", "fingerprint")] for entry in journal.to_json()]


def _content(held: Any) -> Content:
    return list(held.items()) if isinstance(held, dict) else list(held)


def _same(one: Content, other: Content) -> bool:
    """Whether two contents are the same objects in the same order; of a dict, the pairs."""
    if len(one) != len(other):
        return False
    pairs = list(zip(one, other, strict=True))
    return all(
        a is b or (isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and all(map(_is, a, b)))
        for a, b in pairs
    )


def _is(a: Any, b: Any) -> bool:
    return a is b
