"""``Grower``, the object that a user holds: it asks the trigger and the chooser, grows, and writes the journal.

The training loop stays the user's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Never

from torch import Tensor, nn

from auxin import arguments
from auxin.anatomy.probe import Probe
from auxin.anatomy.tree import unwrap
from auxin.anatomy.wrappers import with_wrappers
from auxin.change import Change, Edit, Grouping
from auxin.choose import first
from auxin.doubts import Doubts
from auxin.edits.several import as_edit
from auxin.engine import BadMoment, Options, begin, seed_of, transact
from auxin.errors import GrowthError
from auxin.evidence import Evidence
from auxin.follow.own_groups import check_own_group, checked
from auxin.journal import Journal, fingerprint, references, replayed
from auxin.ledger import Ledger
from auxin.limit import Limit, LimitReached
from auxin.logbook import Logbook
from auxin.prepared import Prepared, prepare
from auxin.probation import Probation, TakenBack
from auxin.progress import Kept, Progress, Standing
from auxin.race import Race, raced, step_flops
from auxin.race import check as check_race
from auxin.rank_consensus import RankConsensus
from auxin.ranks import Ranks
from auxin.record import coming_back
from auxin.refs import Allowed
from auxin.structure import Undo
from auxin.structure_history import StructureHistory
from auxin.surgery import surgery
from auxin.trial import Rollback, Store
from auxin.verify import verify, verify_here
from auxin.when import Reading
from auxin.when.inner import inside


class Grower:
    """Grows a network while it trains, with everything that hangs on it kept in step.

    Args:
        model: the network; it stays the same object.
        companions: optimizers, schedulers, averages, scalers.
        edits: an edit, a list of edits, or ``callable(model) -> iterable`` of them. A list inside that list is one
            growth by several edits, as in ``auxin.grow``. Left out together with ``when``: only its user grows it.
        when: a trigger, ``when(reading) -> bool``; see ``auxin.when``.
        choose: ``choose(edits, grower) -> edit or None``; see ``auxin.choose``. The default, ``first``, takes the
            first of several edits at every growth, until that one is set aside: ``cycle()`` takes them in turn.
        probe: one batch, or a callable that returns one; every growth is proved on it.
        evidence: a loss and batches for edits that look at data.
        limit: where growing ends.
        group: of new parameters: None, an index, or a dict of options for groups of their own; see ``auxin.grow``.
        rewarm: optimizer steps over which the updates of new parameters grow to their full size.
        stock: a Hugging Face model stays one that plain transformers loads, or the edit is refused.
        keep: take a snapshot before each growth, so that ``undo`` works after further training too: True ("memory"),
            "pinned" or "disk". Costs one copy of network and optimizer state; the change prints its size.
        probation: judge each growth some calls later and roll the run back if it is behind (implies ``keep``). An edit
            that was rolled back is not chosen again; ``undone`` lists them.
        on_refused: what a growth that is refused does in ``step``: "raise" ends the run. "warn" warns once, sets the
            edit aside for good (``refused`` lists it, with the reason), and the run goes on.
        on_growth: called with each change, for cached lists of parameters; if it raises, the growth is taken back.
        on_undo: called after ``undo``, e.g. to put the data back to where it was.
        log: a directory into which the run writes what happens; a logger, as TensorBoard's SummaryWriter or a run of
            Weights & Biases (``auxin.loggers``); a list of both; or a ``Logbook`` (``auxin.logbook``).

    Raises:
        GrowthError: something does not fit together already: a companion, edits none of which has a place in the
            network, a probe that it does not take, an own group that no optimizer or schedule can have, a trigger that
            belongs to another Grower.

    Examples:
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

    counts_flops = False  # whether training steps are counted, whatever the trigger asks for

    def __init__(
        self,
        model: nn.Module,
        *companions: Any,
        edits: Edit | Iterable[Edit | Sequence[Edit]] | Callable[[nn.Module], Iterable[Edit]] | None = None,
        when: Callable[[Reading], bool] | None = None,
        choose: Callable[[Any, Grower], Edit | None] = first,
        probe: Probe = None,
        evidence: Evidence | None = None,
        limit: Limit | None = None,
        group: Grouping = None,
        rewarm: int = 0,
        stock: bool = True,
        keep: bool | Store = False,
        probation: Probation | None = None,
        on_refused: Literal["raise", "warn"] = "raise",
        on_growth: Callable[[Change], None] | None = None,
        on_undo: Callable[[], None] | None = None,
        log: str | os.PathLike[str] | Logbook | Any = None,
        **unknown: Never,
    ):
        arguments.check_words("Grower", unknown, Grower)
        # Each argument is checked by itself, then together with the others; nothing is written before all of them fit.
        self.model, self._given = unwrap(model), model
        self.companions = arguments.checked_companions(with_wrappers(model, companions))
        self.limit, self.probation = Limit.of(limit), probation
        if self.limit.flops is not None and probe is None:
            raise GrowthError("limit=Limit(flops=...) is measured on a batch: pass probe=batch.")
        arguments.check_on_refused(on_refused)
        self.probe, self.evidence, self.rewarm, self.stock = probe, evidence, rewarm, stock
        self.on_growth, self.on_undo, self.on_refused = on_growth, on_undo, on_refused
        self.group = checked(group, self.optimizers)
        self._edits, when = arguments.checked_choice(edits, when)
        arguments.checked_chooser(choose, evidence)
        arguments.check_judge(when, probation)
        arguments.warn_of_direction(when)
        verify_here(self.model, *self.companions)
        arguments.check_places(self._edits, self.model)
        check_own_group(self.group, self.companions)
        arguments.check_probe(self.model, probe)
        arguments.check_without_probe(self._edits, probe)
        # From here on the Grower holds where the run stands, and watches the optimizers.
        self.waiting_for: str | None = None
        self.telling = False
        self._memory: dict[str, Mapping[str, float] | None] = {}
        self._standing = Standing(self.model, self.companions, when, choose)
        self.watch, self.flow = self._standing.watch, self._standing.flow
        self._all = RankConsensus(self.model, self.companions)
        self.edits()
        self._origin = fingerprint(self.model)
        self.history: StructureHistory | None = None
        self.rollback = Rollback([self.model, *self.companions], keep or probation is not None)
        self.watch.on_step = functools.partial(self.rollback.stepped, self.flow.stepped)
        self.log = log if isinstance(log, Logbook) else Logbook(self._all.on_one(log))  # last: it locks a directory
        self.flow.on_reading, self.log.rollback = self.log.flow, self.rollback
        self._standing.begin_parts()
        asks = self.counts_flops or any(getattr(part, "counts_flops", False) for part in inside(when))
        self._costs: dict[str, float] | None = {} if asks and evidence is not None else None
        self._counted, self._raced, self._tried, self._doubts = 0, None, False, Doubts(self._standing.decays)

    def __repr__(self) -> str:
        names = ", ".join(type(c).__name__ for c in self.companions) or "nothing else"
        state = f"{len(self.journal)} growths, {self.calls} calls{', done' if self.done else ''}"
        return f"Grower({type(self.model).__name__} with {names}; {self.when!r}; {state})"

    @property
    def when(self) -> Callable[[Reading], bool]:
        """The trigger."""
        return self._standing.when

    @property
    def choose(self) -> Callable[[Any, Grower], Edit | None]:
        """The chooser."""
        return self._standing.choose

    @property
    def progress(self) -> Progress:
        """Everything that changes as it goes on: counts, decisions, journal entries."""
        return self._standing.progress

    @property
    def journal(self) -> Journal:
        """What has grown."""
        return Journal(self.progress.entries)

    @property
    def undone(self) -> list[dict[str, Any]]:
        """Journal entries of growths that a probation rolled back, each with ``undone_at``."""
        return self.progress.undone

    @property
    def refused(self) -> list[tuple[Edit, str]]:
        """Edits that are not chosen any more, each with the reason: refused, or rolled back by a probation."""
        return self.progress.refused

    @property
    def calls(self) -> int:
        """How often ``step`` was called."""
        return self.progress.calls

    @property
    def done(self) -> bool:
        """Whether nothing will grow any more: a limit is reached, no edit is left, or the trigger says so."""
        full = self.limit.growths is not None and len(self.progress.entries) >= self.limit.growths
        fixed = not callable(self._edits) and bool(self._edits)
        none_left = (fixed or bool(self.progress.refused)) and not self.edits()
        return self.progress.done or full or none_left or getattr(self.when, "done", False) is True

    @property
    def optimizers(self) -> list[Any]:
        """The companions that step parameters."""
        return [c for c in self.companions if isinstance(getattr(c, "param_groups", None), list)]

    @property
    def optimizer_steps(self) -> int:
        """Steps of the first optimizer since the run began, restored ones included."""
        return self._standing.optimizer_steps

    @property
    def ranks(self) -> Ranks:
        """The processes that train the network together."""
        return self._all.ranks

    @property
    def ledger(self) -> Ledger:
        """FLOPs and seconds that were spent; training steps are counted where a trigger asks for FLOPs."""
        return self._standing.ledger

    def edits(self) -> list[Edit]:
        """The edits that may be chosen from now."""
        given = self._edits(self.model) if callable(self._edits) else self._edits
        over = [edit for edit, _ in self.progress.refused]
        over += [entry.edit for entry in self.progress.entries if getattr(entry.edit, "once", False)]
        return [edit for edit in arguments.listed(given) if edit not in over]

    def step(self, metric: float | Tensor | None = None, /, **metrics: float | Tensor) -> Change | TakenBack | None:
        """Say how training goes; grows at most once. Call it right after ``optimizer.step()``, outside autocast.

        Args:
            metric: the number that triggers look at, e.g. a validation loss.
            metrics: further numbers, by name.

        Returns:
            The change; or, where a probation has rolled the last growth back, a ``TakenBack``, which counts as false
            and prints what was taken back; or None. Where the moment is bad (gradients that no step has used, inside
            autocast) the decision is kept for the next call, and ``waiting_for`` says why; where the place of the call
            is to blame, a warning says so, once. Inside a ``trial`` nothing is decided.

        Raises:
            GrowthError: the growth was refused; everything is as it was. See ``on_refused``.
        """
        if self.rollback.in_branch:
            return None
        undone, self._raced = len(self.undone), None
        self.progress.pending = self.decide(metric, **metrics)
        if len(self.undone) > undone:
            return TakenBack(self.undone[-1])
        return self._raced or self.carry_out()

    def carry_out(self) -> Change | None:
        """Grow what ``decide`` has decided and left in ``progress.pending``; at a bad moment it stays there.

        Raises:
            GrowthError: the growth was refused; everything is as it was. See ``on_refused``.
        """
        decision, self.progress.pending = self.progress.pending, None
        if decision is None:
            return None
        try:
            change = self.grow(*decision)
        except BadMoment as error:
            self.progress.pending = decision
            self._wait(str(error))
            return None
        except LimitReached:
            self.progress.done = True
            return None
        except GrowthError as error:
            if self.on_refused == "raise":
                arguments.note_way_on(error)
                raise
            self._set_aside(decision[0], str(error))
            return None
        self.waiting_for = None
        self._standing.moments.over()
        self._doubts.warn(change, self, self._tried)
        return change

    def decide(self, metric: float | Tensor | None = None, /, **metrics: float | Tensor) -> tuple[Edit, int] | None:
        """The decision as data, (edit, seed) or None, without carrying it out; counts as one call of ``step``."""
        when = self._standing.parts["when"]
        value, named = self._all.read(metric, metrics)
        state = self.progress
        state.read(value, named)
        self._count_steps()
        self._standing.decays.look()
        self.log.reading(self, value, named)
        self._standing.moments.call()
        undone = len(state.undone)
        if self.probation is not None:
            state.remember(value if self.probation.metric is None else named.get(self.probation.metric))
            reason = self._standing.judge(self.probation, self._take_back)
            if reason is not None:
                self._wait(reason)
            state = self.progress
        if self._all.done(self):
            return None
        counts = state.calls, self.optimizer_steps, len(state.entries), state.since_growth
        reading = Reading(value, named, *counts, self.ledger.total)
        state.fired = self._all.fired(when, reading) or state.fired
        if len(state.undone) > undone:
            return None  # a call that takes back grows nothing: what has fired is decided at the next one
        if state.pending is not None or not state.fired or state.on_probation is not None:
            return state.pending
        weighed = len(self.ledger.decisions)
        try:
            edit = self._all.chosen(self)
        except BadMoment as error:  # a chooser that tries: it is asked again at the next call
            self._wait(str(error))
            return None
        decided = self.ledger.decisions[weighed:]
        self._tried = any(option.obtained is not None for one in decided for option in one.options)
        self.progress.fired = False  # not `state`: a chooser that tries growths has put another object in its place
        if isinstance(edit, Change):  # a chooser that races has carried its growth out
            self._raced, edit = edit, None
        self.log.decision(self, edit if self._raced is None else self._raced.edit, None, weighed)
        return None if edit is None else (edit, seed_of(self.model, edit))

    def grow(self, edit: Edit | Sequence[Edit], seed: int | None = None) -> Change:
        """Carry out one edit now, or a list of them as one growth; see ``auxin.grow``.

        Raises:
            GrowthError: refused, beyond the limit, or a bad moment; everything is as it was.
        """
        with self._all.agree("grow: the limit") as said:
            said.append(f"{self.limit} after {len(self.progress.entries)} growths")
        if self.limit.growths is not None and len(self.progress.entries) >= self.limit.growths:
            raise LimitReached(f"grow: limit=Limit(growths={self.limit.growths}) is reached.")
        self._all.rest()
        self._count_steps()
        edit, mark, sight = as_edit(edit), self._standing.mark(), self.rollback.look()
        try:
            with self.rollback.growing(mark) as held, self._standing.thawed():
                options = self._options(seed, lambda _: self.limit.check(self.model, self.probe), self._keep())
                change = begin(self.model, edit, self.companions, options, held)
                with self._all.agree("grow: the snapshot") if sight is not None else contextlib.nullcontext():
                    change = change.with_measured(*self.rollback.keep(sight))
            with self._all.agree("grow: the journal"):
                if self.probation is not None:
                    self.progress.on_probation = (edit, self.calls, len(self.progress.entries))
                self._write_down(change)
            self.ranks.share("grow: the log", functools.partial(self.log.growth, self, change))
            return change
        except BaseException:  # on_growth has raised, or the journal cannot hold the change: it is taken back
            if self.rollback.mark is mark:
                self.rollback.take_back(self._standing.return_to)
            self._standing.return_to(mark)
            raise

    def undo(self) -> None:
        """Take the last growth back, exactly: the network, its companions and the journal as before it.

        Before the next optimizer step that is free. Afterwards only ``keep=True`` can: it puts back the whole run as it
        was at the growth, the random generators too (the position in your data is yours: see ``on_undo``). A snapshot
        is not part of a checkpoint: a growth from before a resume cannot be taken back.

        Raises:
            GrowthError: there is nothing to take back, or training has gone on without ``keep=True``.
        """
        self._take_back("undo()")

    @contextlib.contextmanager
    def trial(self, edit: Edit | None, seed: int | None = None) -> Iterator[Change | None]:
        """Grow, train and measure inside; afterwards everything is bit for bit as before, also if the body raises.

        Network, companions, gradients, hooks, random generators and this grower's own state come back; only your data
        loader does not. The body may train, grow, undo, and try further; ``step`` decides nothing in it, and
        ``on_growth`` is not called. Costs one copy of the run's tensors in memory, kept for the next trial.

        Args:
            edit: what to try; None: a branch that does not grow, to compare with.
            seed: of the new weights.
        """
        self._all.check_moment("trial", self.watch)
        mark = self._standing.mark()
        with coming_back(lambda: self._standing.return_to(mark)), self.rollback.branch():
            with self._standing.thawed():
                grown = None if edit is None else transact(self.model, edit, self.companions, self._options(seed))
            yield grown

    def prepare(self, edit: Edit | Sequence[Edit], step: Callable[[], Any] | None = None) -> Prepared:
        """Compile now what the network grown by ``edit`` will need, on trials of a few steps, taken back bit for bit.

        Args:
            edit: the growth to come; a list of edits is one growth.
            step: ``step()`` takes one training step as your loop does; None: ``evidence`` does, by what was given here.

        Raises:
            GrowthError: the growth is refused, nothing takes a step, or what is compiled would not be run.
        """
        return prepare(self, edit, step, self._given)

    def race(
        self, edits: Sequence[Edit], steps: int, shrink: float = 1.0, averaged: float = 0.5, sure: float = 0.0
    ) -> Race:
        """Train on as it is and grown by each edit, on the same batches; the run goes on as the best branch.

        Every branch starts from this very state and takes as many steps on the batches of ``evidence``. It is judged by
        ``evidence.validate`` on its weights, averaged over the last ``averaged`` part of the steps. The steps of the
        winner are kept: network, optimizers, schedules and averages are where its branch ended, and its growth is in
        the journal. Costs two copies of the run in memory; what was spent is in ``ledger``. Under
        DistributedDataParallel every rank trains on its own batches, and the losses of all ranks decide.

        Args:
            edits: the rivals of the network as it is. What is refused, or beyond the limit, is passed over.
            steps: training steps of each branch.
            shrink: factor of all layers together as a branch begins; see ``auxin.race.shrink_weights``.
            averaged: part of the steps over which weights are averaged for the score.
            sure: by how many standard errors a rival has to be better than the network as it is, paired over at least
                8 batches of validation data.

        Raises:
            GrowthError: no evidence, or a bad moment; nothing has happened then.
        """
        check_race(steps, shrink, averaged, sure)
        winner = Kept(self._standing)
        self._count_steps()
        race = raced(self, edits, steps, shrink, averaged, sure, winner.take)
        with self.or_as_before():
            winner.restore()
            self.rollback.forget()
            if race.change is not None:
                with self._all.agree("race: the journal"):
                    self._write_down(race.change)
                self.log.growth(self, race.change)
        self._counted = self.optimizer_steps
        return race

    def surgery(self) -> surgery:
        """``auxin.surgery`` on this grower's network and companions; what it finds is written into the journal."""
        words = {"group": self.group, "probe": self.probe, "watch": self.watch, "keep": self._keep(), "standing": True}
        return surgery(self.model, *self.companions, **words, then=self.record, around=self.or_as_before())

    def record(self, change: Change) -> None:
        """Write a change into the journal that was made outside of this grower, by ``auxin.grow`` or ``auxin.surgery``.

        Without it a checkpoint could not be loaded into the original network. The last growth cannot be undone any
        more.
        """
        with self.or_as_before(), self._all.agree("record"):
            self._write_down(change)
            self.progress.on_probation = None
            self.rollback.forget()
        self.log.growth(self, change)

    def freeze_old(self, on: bool = True) -> list[str]:
        """Train only what has grown, by the journal; ``on=False`` lets train again what that froze. Returns its names.

        Optimizers pass over what is frozen: no step, no decay, its state stands still. Blocks that grow later train.

        Raises:
            GrowthError: nothing has grown, or there are gradients that no step has used.
        """
        self._all.check_moment("freeze_old", self.watch)
        return self._standing.freeze_old(on)

    def verify(self) -> None:
        """Check that optimizers, averages, schedules and other ranks fit the network as it is; see ``auxin.verify``."""
        verify(self.model, *self.companions)

    def state_dict(self) -> dict[str, Any]:
        """Counts, trigger, chooser and journal as plain data; passes ``torch.load(weights_only=True)``."""
        self._standing.check_grown(self._origin)
        return self._standing.state()

    def load_state_dict(self, state: Mapping[str, Any], allow: Iterable[Any] = ()) -> None:
        """Continue from ``state_dict``: grow the original model as the journal says, then set counts and trigger.

        Load the model's and the optimizers' own state dicts afterwards (or use ``auxin.load``, which does all of it).

        Raises:
            GrowthError: the state is not this grower's; nothing is changed then.
        """
        if not isinstance(state, Mapping) or "journal" not in state:
            raise GrowthError(f"this is not the state of a Grower: a {type(state).__name__} without a journal.")
        allowed = [*self.references(), *allow]
        replaying = replayed(self.model, state["journal"], *self.companions, allow=allowed, grown=self.journal)
        with self.or_as_before(), replaying as journal:
            self.restore(state, journal, Allowed.of(self.model, allowed))

    def restore(self, state: Mapping[str, Any], journal: Journal, allowed: Allowed) -> None:
        """Set counts, trigger and chooser for ``load``, which has replayed the network already."""
        self._standing.restore(state, journal, allowed)
        self._origin = next((entry.before for entry in journal if entry.before), self._origin)
        self.rollback.forget()
        self._counted = self.optimizer_steps
        self.log.resuming = (self.calls, self.optimizer_steps)

    @contextlib.contextmanager
    def or_as_before(self) -> Iterator[None]:
        """Put this grower's own state back where anything is raised inside; ``load`` needs it."""
        mark, rollback, resuming = self._standing.mark(), self.rollback.mark, self.log.resuming
        spent, counted, peaks = self.ledger.state_dict(), self._counted, self._standing.decays.peaks
        try:
            yield
        except BaseException:
            self.rollback.mark, self.log.resuming = rollback, resuming
            self.ledger.load_state_dict(spent)
            self._counted, self._standing.decays.peaks = counted, peaks
            self._standing.return_to(mark)
            raise

    def references(self) -> list[Any]:
        """Classes and functions in this grower's edits: a journal may name them, the user has handed them over."""
        if callable(self._edits):
            return []
        return [ref for edit in self.edits() for ref in references(edit)]

    def go_to(self, state: Mapping[str, Any], allow: Iterable[Any] = ()) -> None:
        """Take network, companions and this grower to the structure and counts of ``state``, forward or back.

        For hosts, which load a checkpoint afterwards; ``history`` leads back past growths that are no mere additions.

        Raises:
            GrowthError: the state is of another network, or there is no way back; nothing has been changed then.
        """
        allowed, history = [*self.references(), *allow], self.history or StructureHistory()
        journal = Journal.from_json(state["journal"], Allowed.of(self.model, allowed))
        self.rollback.settle()
        going = history.going_to(self.model, journal, self.companions, self.journal)
        with self.or_as_before(), going:
            self.progress.entries[:] = journal.entries
            self.load_state_dict(state, allowed)

    def _count_steps(self) -> None:
        """Write down what the training steps since the last count have cost, where a trigger asks for FLOPs."""
        if self._costs is None or self.evidence is None:
            return
        steps, self._counted = self.optimizer_steps - self._counted, self.optimizer_steps
        if steps <= 0:
            return
        now = self.progress.entries[-1].fingerprint if self.progress.entries else self._origin
        if now not in self._costs:
            self._costs[now] = step_flops(self)
        self.ledger.spend("training", steps * self._costs[now])

    def _keep(self) -> Callable[[Undo], None] | None:
        """Return the function that is given the way back of the next growth; None where nobody keeps it."""
        if self.history is None or self.rollback.in_branch:
            return None
        return functools.partial(self.history.keep, len(self.progress.entries))

    def _options(
        self,
        seed: int | None,
        accept: Callable[[Change], None] | None = None,
        keep: Callable[[Undo], None] | None = None,
    ) -> Options:
        own = {"watch": self.watch, "memory": self._memory, "accept": accept, "keep": keep}
        return Options(self.probe, self.evidence, seed, self.group, self.rewarm, self.stock, standing=True, **own)

    def _write_down(self, change: Change) -> None:
        at = {"calls": self.calls, "optimizer_steps": self.optimizer_steps}
        self.journal.record(self.model, change, at, self.progress.metrics, self._origin)
        self.progress.since_growth = 0
        if self.rollback.in_branch:
            return
        if self.on_growth is not None:
            self.telling = True  # all of the growth is there: a checkpoint may be saved
            try:
                self.on_growth(change)
            finally:
                self.telling = False
        self.flow.begin(change, len(self.progress.entries) - 1, self.optimizer_steps)

    def _take_back(self, why: str) -> None:
        self._all.check_moment("undo", self.watch, self.rollback.check)
        call, step = self.calls, self.optimizer_steps
        self.rollback.take_back(self._standing.return_to)
        if self.history is not None and not self.rollback.in_branch:
            self.history.forget(len(self.progress.entries))
        self.log.undone(self, why, call, step)
        self._all.undone(self.on_undo)

    def _wait(self, reason: str) -> None:
        """Remember why a decision waits, and warn once where waiting does not help."""
        self.waiting_for = reason
        self.log.decision(self, self.progress.pending and self.progress.pending[0], reason)
        self._standing.moments.wait(reason)

    def _set_aside(self, edit: Edit, why: str) -> None:
        """Never choose an edit again that was refused, and go on."""
        self.progress.refused = [*self.progress.refused, (edit, why)]
        self.waiting_for = None
        self._standing.moments.over()
        self.log.decision(self, edit, f"refused, and set aside: {why}")
        warnings.warn(f"{edit!r} was refused, and is not chosen any more: {why}", stacklevel=4)
