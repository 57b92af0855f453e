"""``Grower``: the object that a user holds. When -> choose -> grow -> journal; the training loop stays the user's."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from auxin.anatomy.probe import Probe
from auxin.anatomy.tree import unwrap
from auxin.boundary import StepWatch
from auxin.change import Change, Edit
from auxin.choose import first
from auxin.engine import BadMoment, Terms, begin, check_moment, seed_of, transact
from auxin.errors import GrowthError
from auxin.follow import follower_of
from auxin.journal import Journal, references, replayed
from auxin.limit import Limit
from auxin.probation import Probation
from auxin.surgery import surgery
from auxin.trial import Past, Store
from auxin.verify import verify
from auxin.when import Reading


class _TooLarge(Exception):
    """A proved growth would go beyond the limit."""


class Grower:
    """Grows a network while it trains, with everything that hangs on it kept in step.

    Args:
        model: the network; it stays the same object.
        companions: optimizers, schedulers, averages, scalers.
        edits: an edit, a list of edits, or ``callable(model) -> iterable`` of them.
        when: a trigger, ``when(reading) -> bool``; see ``auxin.when``.
        choose: ``choose(edits, grower) -> edit or None``; see ``auxin.choose``.
        probe: one batch, or a callable that returns one; every growth is proved on it.
        evidence: a loss and batches for edits that look at data.
        limit: where growing ends.
        group: index of the parameter group for new parameters; None: beside the nearest sibling of the same role.
        keep: take a snapshot before each growth, so that ``undo`` works after further training too: True ("memory"),
            "pinned" or "disk". Costs one copy of network and optimizer state; the change prints its size.
        probation: judge each growth some calls later, and roll the run back if it is behind (implies ``keep``). An edit
            that was rolled back is not chosen again; ``undone`` lists them.
        on_growth: called with each change, for whatever cached a list of parameters; if it raises, the growth is taken
            back and the exception passes on.
        on_undo: called after ``undo``, e.g. to put the data back to where it was.

    Raises:
        GrowthError: something does not fit together already.

    Example:
        >>> import torch
        >>> from auxin import Duplicate, when
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         return x + self.inner(x)
        >>> model = nn.Sequential(Block(), Block())
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> grower = Grower(model, optimizer, edits=Duplicate("", by=1), when=when.every(1), probe=torch.randn(4, 8))
        >>> change = grower.step()
        >>> len(model)
        3
    """

    def __init__(
        self,
        model: nn.Module,
        *companions: Any,
        edits: Edit | Iterable[Edit] | Callable[[nn.Module], Iterable[Edit]],
        when: Callable[[Reading], bool],
        choose: Callable[[Any, Grower], Edit | None] = first,
        probe: Probe = None,
        evidence: Any = None,
        limit: Limit | None = None,
        group: int | None = None,
        keep: bool | Store = False,
        probation: Probation | None = None,
        on_growth: Callable[[Change], None] | None = None,
        on_undo: Callable[[], None] | None = None,
    ):
        self.model = unwrap(model)
        self.companions = companions
        for companion in companions:
            follower_of(companion)
        if not callable(when):
            raise GrowthError(
                f"when is a {type(when).__name__}; pass a trigger such as auxin.when.plateau(patience=3)."
            )
        if limit is not None and limit.flops is not None and probe is None:
            raise GrowthError("limit=Limit(flops=...) is measured on a batch: pass probe=batch.")
        self._edits = edits
        self.undone: list[dict[str, Any]] = []
        self._memory: dict[str, tuple[str, ...]] = {}
        self._refused: list[Edit] = []
        self.when, self.choose, self.limit = when, choose, limit or Limit()
        self.probe, self.evidence, self.group = probe, evidence, group
        self.on_growth, self.on_undo = on_growth, on_undo
        self.journal = Journal()
        self.calls, self.since_growth, self.done = 0, 0, False
        self._pending: tuple[Edit, int] | None = None
        self._fired = False
        self._metrics: dict[str, float] = {}
        self._steps_before = 0
        self.edits()
        verify(self.model, *companions)
        self._watch = StepWatch(self.optimizers)
        self.probation = probation
        self._history: list[tuple[float, float]] = []
        self._on_trial: tuple[Edit, int] | None = None
        self._past = Past([self.model, *companions], keep or probation is not None)
        self._watch.on_step = self._past.settle

    @property
    def optimizers(self) -> list[Any]:
        """Those of the companions that step parameters."""
        return [c for c in self.companions if isinstance(getattr(c, "param_groups", None), list)]

    @property
    def optimizer_steps(self) -> int:
        """Steps of the first optimizer since the run began, restored ones included."""
        return self._steps_before + self._watch.steps

    def edits(self) -> list[Edit]:
        """The edits that may be chosen from now."""
        given = self._edits
        if isinstance(given, Edit):
            found = [given]
        else:
            found = list(given(self.model) if callable(given) else given)
        for edit in found:
            if not isinstance(edit, Edit):
                raise GrowthError(f"edits holds a {type(edit).__name__}; pass edits such as Duplicate('blocks', by=1).")
        return [edit for edit in found if edit not in self._refused]

    def step(self, metric: float | Tensor | None = None, /, **metrics: float | Tensor) -> Change | None:
        """Say how training goes; grows at most once.

        Args:
            metric: the number that triggers look at, e.g. a validation loss.
            metrics: further numbers, by name.

        Returns:
            The change, or None. Where the moment is bad (gradients that no step has used, inside autocast) the
            decision is kept for the next call.

        Raises:
            GrowthError: the growth was refused; everything is as it was.
        """
        pending = self._pending
        decision = self.decide(metric, **metrics)
        decision = pending or decision
        if decision is None:
            return None
        self._pending = decision
        try:
            change = self.grow(*decision)
        except BadMoment:
            return None
        except _TooLarge:
            self.done = True
            change = None
        except BaseException:
            self._pending = None
            raise
        self._pending = None
        return change

    def decide(self, metric: float | Tensor | None = None, /, **metrics: float | Tensor) -> tuple[Edit, int] | None:
        """The decision as data, (edit, seed) or None, without carrying it out; counts as one call."""
        number = None if metric is None else _number(metric)
        named = {name: _number(value) for name, value in metrics.items()}
        self.calls += 1
        self.since_growth += 1
        self._metrics = {**({} if number is None else {"metric": number}), **named}
        if number is not None:
            self._history = [*self._history[-999:], (self.calls, number)]
        self._judge()
        if self._full():
            return None
        reading = Reading(number, named, self.calls, self.optimizer_steps, len(self.journal), self.since_growth)
        self._fired = self.when(reading) or self._fired
        judged = self.probation is None or self._on_trial is None
        if not self._fired or self._pending is not None or not judged:
            return None
        try:
            edit = self.choose(self.edits(), self)
        except BadMoment:  # a chooser that tries: it is asked again at the next call
            return None
        self._fired = False
        return None if edit is None else (edit, seed_of(self.model, edit))

    def grow(self, edit: Edit, seed: int | None = None) -> Change:
        """Carry out one edit now.

        Raises:
            GrowthError: refused, or a bad moment; everything is as it was.
        """
        terms = self._terms(seed, accept=self._accept)
        mark = self._counts()
        note = self._past.before_growth()
        change, held = begin(self.model, edit, self.companions, terms)
        self._past.hold(held, mark)
        change = dataclasses.replace(change, notes=(*change.notes, *note))
        try:
            self.record(change)
        except BaseException:  # on_growth, or a journal that cannot hold it: as if it had not been
            self._set_counts(self._past.take_back())
            raise
        self._on_trial = (edit, self.calls)
        return change

    def undo(self) -> None:
        """Take the last growth back, exactly: the network, its companions and the journal as before it.

        Before the next optimizer step that is free. Afterwards only ``keep=True`` can: it puts back the whole run as it
        was at the growth, the random generators too (the position in your data is yours: see ``on_undo``).

        Raises:
            GrowthError: there is nothing to take back, or training has gone on without ``keep=True``.
        """
        check_moment(self.model, self.companions, self._watch)
        self._set_counts(self._past.take_back())
        if self.on_undo is not None:
            self.on_undo()

    @contextlib.contextmanager
    def trial(self, edit: Edit | None, seed: int | None = None) -> Iterator[Change | None]:
        """Grow, train and measure inside; afterwards everything is bit for bit as before.

        Network, companions, gradients, hooks, random generators and this grower's own counts come back; only your data
        loader does not. Costs one copy of the run's tensors in memory, kept for the next trial. ``on_growth`` is not
        called.

        Args:
            edit: what to try; None: a branch that does not grow, to compare with.
            seed: of the new weights.
        """
        check_moment(self.model, self.companions, self._watch)
        counts = self._counts()
        with self._past.branch():
            yield None if edit is None else transact(self.model, edit, self.companions, self._terms(seed))
        self._set_counts(counts)

    def surgery(self) -> surgery:
        """``auxin.surgery`` on this grower's network and companions; record it with ``grower.record(done.change)``."""
        return surgery(self.model, *self.companions, group=self.group, probe=self.probe, watch=self._watch)

    def record(self, change: Change) -> None:
        """Write a change into the journal: one of ``grow``'s, or one that ``surgery`` found."""
        at = {"calls": self.calls, "optimizer_steps": self.optimizer_steps}
        self.journal.record(self.model, change, at, self._metrics, self.group)
        self.since_growth = 0
        self._full()
        if self.on_growth is not None:
            self.on_growth(change)

    def verify(self) -> None:
        """Check that optimizers, averages and schedules fit the network as it is now; see ``auxin.verify``."""
        verify(self.model, *self.companions)

    def state_dict(self) -> dict[str, Any]:
        """Counts, trigger, chooser and journal as plain data; passes ``torch.load(weights_only=True)``."""
        pending = None
        if self._pending is not None:
            index = next((i for i, e in enumerate(self.edits()) if e == self._pending[0]), None)
            pending = None if index is None else {"edit": index, "seed": self._pending[1]}
        return {
            "journal": self.journal.to_json(),
            "calls": self.calls,
            "since_growth": self.since_growth,
            "optimizer_steps": self.optimizer_steps,
            "done": self.done,
            "pending": pending,
            "when": _state_of(self.when),
            "choose": _state_of(self.choose),
        }

    def load_state_dict(self, state: Mapping[str, Any], allow: Iterable[Any] = ()) -> None:
        """Continue from ``state_dict``: grow the original model as the journal says, then set counts and trigger.

        Load the model's and the optimizers' own state dicts afterwards (or use ``auxin.load``, which does all of it).

        Raises:
            GrowthError: the state is not this grower's; nothing is changed then.
        """
        expected = {
            "journal",
            "calls",
            "since_growth",
            "optimizer_steps",
            "done",
            "pending",
            "when",
            "choose",
        }
        if not isinstance(state, Mapping) or set(state) != expected:
            keys = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise GrowthError(f"this is not the state of a Grower: it holds {keys}, expected {sorted(expected)}.")
        with replayed(self.model, state["journal"], *self.companions, allow=[*self.references(), *allow]) as journal:
            self.restore(state, journal)

    def restore(self, state: Mapping[str, Any], journal: Journal) -> None:
        """Counts, trigger and chooser; the network has been replayed already."""
        for part, name in ((self.when, "when"), (self.choose, "choose")):
            own = state[name]
            if own is not None and not hasattr(part, "load_state_dict"):
                raise GrowthError(
                    f"{name}= was saved with a state ({own}), {part!r} takes none: pass the same {name}= as then."
                )
            if own is not None:
                part.load_state_dict(own)  # type: ignore[attr-defined]
        self.journal = journal
        self.calls, self.since_growth, self.done = state["calls"], state["since_growth"], state["done"]
        self._steps_before = state["optimizer_steps"] - self._watch.steps
        pending = state["pending"]
        self._pending = None if pending is None else (self.edits()[pending["edit"]], pending["seed"])

    def references(self) -> list[Any]:
        """Classes and functions in this grower's edits: a journal may name them, the user has handed them over."""
        if callable(self._edits) and not isinstance(self._edits, Edit):
            return []
        return [ref for edit in self.edits() for ref in references(edit)]

    def _terms(self, seed: int | None, accept: Callable[[Change], None] | None = None) -> Terms:
        own = {"watch": self._watch, "memory": self._memory, "accept": accept}
        return Terms(self.probe, self.evidence, seed, self.group, **own)

    def _counts(self) -> dict[str, Any]:
        """This grower's own counts, to return to."""
        return {
            "entries": list(self.journal.entries),
            "own": (self.calls, self.since_growth, self.done, self._pending, self._fired, dict(self._metrics)),
            "watch": self._watch.state(self.model),
            "parts": [copy.deepcopy(_state_of(part)) for part in (self.when, self.choose)],
        }

    def _set_counts(self, counts: dict[str, Any]) -> None:
        self.journal.entries[:] = counts["entries"]
        self.calls, self.since_growth, self.done, self._pending, self._fired, self._metrics = counts["own"]
        self._watch.set_state(counts["watch"], self.model)
        for part, state in zip((self.when, self.choose), counts["parts"], strict=True):
            if state is not None:
                part.load_state_dict(state)  # type: ignore[attr-defined]

    def _full(self) -> bool:
        reached = self.limit.growths is not None and len(self.journal) >= self.limit.growths
        self.done = self.done or reached or (bool(self._refused) and not self.edits())
        return self.done

    def _accept(self, change: Change) -> None:
        """Refuse a proved growth that goes beyond the limit."""
        if self.limit.exceeded(self.model, self.probe):
            raise _TooLarge

    def _judge(self) -> None:
        """End a probation: keep the growth, or roll the run back and never choose that edit again."""
        if self.probation is None or self._on_trial is None or self.since_growth < self.probation.calls:
            return
        edit, born = self._on_trial
        before = [point for point in self._history if point[0] <= born]
        after = [point for point in self._history if point[0] > born]
        if self.probation.behind(before, after):
            at, entry = self.calls, self.journal.to_json()[-1]
            try:
                self.undo()
            except BadMoment:
                return
            self.undone.append({**entry, "undone_at": {"calls": at}})
            self._refused.append(edit)
            self._history = before
            self._pending, self._fired = None, False
        self._on_trial = None


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _state_of(part: Any) -> Any:
    return part.state_dict() if hasattr(part, "state_dict") else None
