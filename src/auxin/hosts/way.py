"""The way that a network has grown, forward and back: to the structure that an earlier checkpoint was saved with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from auxin.edits.remove import Remove
from auxin.engine import grow
from auxin.errors import GrowthError
from auxin.grower import Grower
from auxin.journal import Journal, fingerprint, replay
from auxin.record import Record
from auxin.refs import Allowed
from auxin.surgery import surgery


class Way:
    """How a network looked before each of its growths, by reference: no value is copied, but what an edit takes out of
    the network stays in memory.
    """

    def __init__(self) -> None:
        self._before: dict[int, Record] = {}

    def note(self, model: nn.Module, number: int) -> None:
        """Remember how the network looks before growth ``number``."""
        self._before[number] = Record(model)

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
            self.note(model, number)
            replay(model, Journal([journal.entries[number]]), *companions)

    def to(self, grower: Grower, state: Mapping[str, Any], allow: Iterable[Any] = ()) -> None:
        """Take a network, what hangs on it and its Grower to the structure and counts of ``grower.state_dict()``.

        The values are those of now: the host loads what it has saved afterwards.

        Raises:
            GrowthError: the state is of another network, or there is no way back.
        """
        rule = [*grower.references(), *allow]
        journal = Journal.from_json(state["journal"], Allowed.of(grower.model, rule))
        ours, theirs = grower.journal.to_json(), journal.to_json()
        shared = next((n for n in range(len(ours)) if ours[: n + 1] != theirs[: n + 1]), len(ours))
        if shared < len(ours):
            self._back(grower, shared)
        self.forward(grower.model, journal, grower.companions)
        grower.progress.entries[:] = journal.entries
        grower.load_state_dict(state, rule)

    def _back(self, grower: Grower, number: int) -> None:
        """Back to before growth ``number``, or to before an earlier one."""
        model = grower.model
        known = [n for n in self._before if n <= number]
        if known:
            then = self._before[max(known)]
            with surgery(model, *grower.companions, watch=grower._watch):
                attached = {name: v for name, v in model.__dict__.items() if name not in then.attributes[""]}
                then.restore()
                model.__dict__.update(attached)  # what a host has hung on the network since
            return
        for entry in reversed(grower.journal.entries[number:]):  # grown in another process
            for added in reversed(entry.added):
                grow(model, Remove(added["path"]), *grower.companions, stock=False)
            if fingerprint(model) != entry.before:
                raise GrowthError(
                    f"there is no way back to before this growth: {entry.summary}. It was carried out in another "
                    "process, and without what it added this is not the network of then. Build that network, and load "
                    "the checkpoint into it."
                )
