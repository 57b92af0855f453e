"""The structures that a network has had while it grew, and the way to each of them, back and forward.

A checkpoint may be older than a growth, and its weights fit the network of then only. A growth that is kept for good
hands over what takes it back (``engine.transaction``); the history holds these calls, one for each growth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from auxin.checkpoint.groups import without_emptied
from auxin.edits.after import After
from auxin.edits.duplicate import Duplicate
from auxin.edits.insert import Insert
from auxin.edits.remove import Remove
from auxin.edits.repeat import Repeat
from auxin.engine import grow
from auxin.errors import GrowthError
from auxin.follow.ddp import take_hold_again
from auxin.journal import Entry, Journal, fingerprint, replayed
from auxin.structure import Undo
from auxin.trial import Snapshot
from auxin.verify import verify_here

ADDING = (After, Duplicate, Insert, Repeat)  # what they add can be taken out by Remove


class StructureHistory:
    """What takes back each growth of a network, by its number in the journal.

    It keeps alive what growths have removed and the old values of what they have resized, optimizer states included.

    Examples:
        >>> from auxin import Duplicate, Grower, when
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> grower = Grower(net, edits=Duplicate("", by=1, output="keep"), when=when.every(1))
        >>> grower.history = StructureHistory()
        >>> before = grower.state_dict()
        >>> _ = grower.step()
        >>> grower.go_to(before)
        >>> len(net)
        2
    """

    def __init__(self) -> None:
        self._undos: dict[int, Undo] = {}

    def keep(self, number: int, undo: Undo) -> None:
        """Remember what takes growth ``number`` back, once all later ones are taken back."""
        self._undos[number] = undo

    def forget(self, number: int) -> None:
        """Growth ``number`` and all later ones are not known any more: they were taken back, or made by other code."""
        self._undos = {known: undo for known, undo in self._undos.items() if known < number}

    @contextlib.contextmanager
    def going_to(
        self, model: nn.Module, wanted: Journal, companions: Sequence[Any] = (), grown: Journal | None = None
    ) -> Iterator[None]:
        """Take a network, and what keeps step with it, to the structure that a journal ends with.

        It is one transaction over all growths on the way: what is raised on it or inside leaves everything as it was.
        Values are those of now, except of tensors that come back: a checkpoint is loaded afterwards.

        Args:
            model: the network.
            wanted: the journal of the structure that it shall have.
            companions: optimizers, schedulers, averages, wrappers as they are now.
            grown: the journal of the structure that it has; None: it is found in ``wanted``, and nothing is taken back.

        Raises:
            GrowthError: the network is another one, or a growth cannot be taken back; nothing has been changed then.
        """
        shared, going = 0, list[tuple[int, Entry]]()
        if grown is not None:
            ours, theirs = _growths(grown), _growths(wanted)
            shared = next((n for n in range(len(ours)) if ours[: n + 1] != theirs[: n + 1]), len(ours))
            going = list(enumerate(grown))[shared:]
            self._check(model, going)
        left, undos, now = Journal(wanted.entries[shared:]), dict(self._undos), Snapshot([model, *companions])
        now.take(values=False)
        try:
            self._back(model, going, companions)
            with replayed(model, left, *companions, keep=lambda number, undo: self.keep(shared + number, undo)):
                yield
        except BaseException:
            # What takes a growth back does so once. Of those that have, only the additions can still be gone back past.
            now.restore()
            take_hold_again(companions)
            self._undos = {number: undo for number, undo in undos.items() if self._undos.get(number) is undo}
            raise

    def _check(self, model: nn.Module, going: Sequence[tuple[int, Entry]]) -> None:
        """Check that there is a way back past these growths."""
        lost = [entry for n, entry in going if n not in self._undos and not isinstance(entry.edit, ADDING)]
        other = [entry for _, entry in going[-1:] if fingerprint(model) != entry.fingerprint]
        for entry in lost or other:
            raise GrowthError(_no_way(entry))

    def _back(self, model: nn.Module, going: Sequence[tuple[int, Entry]], companions: Sequence[Any]) -> None:
        """Take these growths back, the last one first."""
        gradients = {id(p): p.grad for p in model.parameters()}
        for number, entry in reversed(going):
            undo = self._undos.pop(number, None)
            with without_emptied(companions):
                if undo is not None:
                    undo()
                else:  # it was carried out in another process
                    for added in reversed(entry.added):
                        grow(model, Remove(added["path"]), *companions, stock=False)
            if fingerprint(model) != entry.before:
                raise GrowthError(_no_way(entry))
        for p in model.parameters():  # those of then are long used
            if p.grad is not gradients.get(id(p)):
                p.grad = None
        if going:
            take_hold_again(companions)
            verify_here(model, *companions)


def _no_way(entry: Entry) -> str:
    return (
        f"there is no way back to before this growth: {entry.summary}. It was carried out in another process, an "
        "error has ended an attempt to go back, or other code has changed the network since. Build the network that it "
        "was then, and load the checkpoint into that."
    )


def _growths(journal: Journal) -> list[list[Any]]:
    """What each growth is, without the times and figures of the process that carried it out."""
    return [[entry[name] for name in ("edit", "seed", "group", "fingerprint")] for entry in journal.to_json()]
