"""Where a run of growths stands: what is counted, decided, judged and written down, to return to and to save."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from auxin import ramp
from auxin.anatomy.blocks import CONTAINERS
from auxin.engine import BadMoment
from auxin.errors import GrowthError
from auxin.flow import FlowWatch
from auxin.follow.ddp import refresh, take_hold_again
from auxin.follow.own_groups import optimizers_in
from auxin.freezing import freeze, freeze_all_but, grown_paths, refuse_parts
from auxin.journal import Entry, Journal, edit_from_json, edit_to_json, fingerprint
from auxin.ledger import Ledger
from auxin.listing import module_at
from auxin.probation import Probation
from auxin.refs import Allowed
from auxin.safe_point import StepWatch
from auxin.schedule import Decays
from auxin.trial import Snapshot
from auxin.when.inner import inside

KEPT_READINGS = 1000
PATIENCE = 20  # calls in a row that a decision may wait for a clean moment before a warning in any case
COUNTS = ("calls", "since_growth", "optimizer_steps")
OWN = ("when", "choose", "ramps", "frozen", "ledger", "peaks")  # of a saved state: what is not progress
PLAIN = (*COUNTS, "done", "fired", "undone")

# By id of each trigger and chooser that has a state: itself, the state that it came with, and whose it is now.
_taken: dict[int, tuple[weakref.ref[Any], Any, object]] = {}


class Moments:
    """Tells a call of ``grower.step`` that stands in the wrong place from one that has only to wait.

    Some loops wait rightly, a few calls at most: a ``GradScaler`` has skipped a step (gradients that are not finite),
    or gradients are being accumulated (no optimizer step since the last call; or earlier calls have found none that
    were unused; of the first call nothing is known). Any other bad moment comes again at the next call, so it is worth
    a warning at once.

    Args:
        watch: knows which gradients a step has used.
        optimizers: whose parameters are looked at.
    """

    def __init__(self, watch: StepWatch, optimizers: Sequence[Any]):
        self.watch, self._optimizers = watch, optimizers
        self._steps = self._steps_before = 0  # optimizer steps at this call of ``step``, and at the one before
        self._clean = False  # whether a call after an optimizer step has found no unused gradients
        self._calls, self._waited, self._warned = 0, 0, False

    def call(self) -> None:
        """``step`` was called."""
        self._calls += 1
        self._steps_before, self._steps = self._steps, self.watch.steps
        self._clean = self._clean or (self._steps > 0 and self._unused() is None)

    def wait(self, reason: str) -> None:
        """A decision has to wait; warn once, where that will not help or has taken long."""
        self._waited += 1
        gradient = self._unused()
        still = self._calls < 2 or self._steps == self._steps_before
        passing = gradient is not None and (self._clean or still or not bool(gradient.isfinite().all()))
        if not self._warned and (not passing or self._waited == PATIENCE):
            self._warned = True
            since = "waits" if self._waited == 1 else f"has been waiting for {self._waited} calls"
            warnings.warn(f"a growth {since} where grower.step is called: {reason}", stacklevel=5)

    def over(self) -> None:
        """Nothing waits any more."""
        self._waited, self._warned = 0, False

    def _unused(self) -> Tensor | None:
        """The gradient of the first parameter that has one, where no step has used it."""
        held = (p for o in self._optimizers for group in o.param_groups for p in group["params"])
        first = next((p for p in held if p.grad is not None), None)
        if first is None or first.grad is None or self.watch.used(first):
            return None
        gradient = first.grad.coalesce().values() if first.grad.is_sparse else first.grad
        return gradient if bool(gradient.any()) else None


@dataclasses.dataclass
class Progress:
    """Everything of a Grower that changes as it goes on.

    Attributes:
        calls: of ``step``.
        since_growth: calls since the last growth.
        optimizer_steps: at the last time they were counted in (a resume, a way back).
        done: nothing will grow any more.
        fired: the trigger has fired, and the moment to choose has not come yet.
        pending: a decision that waits for a clean moment: (edit, seed).
        metrics: of the last call.
        history: (call, metric) of the last readings.
        on_probation: (edit, call of its growth, number of its journal entry) until the verdict.
        refused: edits that are not chosen any more, each with the reason.
        undone: the journal entries of rolled-back growths, each with ``undone_at``.
        entries: of the journal.
    """

    calls: int = 0
    since_growth: int = 0
    optimizer_steps: int = 0
    done: bool = False
    fired: bool = False
    pending: tuple[Any, int] | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    history: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    on_probation: tuple[Any, int, int] | None = None
    refused: list[tuple[Any, str]] = dataclasses.field(default_factory=list)
    undone: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    entries: list[Entry] = dataclasses.field(default_factory=list)

    def copy(self) -> Progress:
        """An own copy, to return to."""
        return dataclasses.replace(
            self,
            metrics=dict(self.metrics),
            history=list(self.history),
            refused=list(self.refused),
            undone=list(self.undone),
            entries=list(self.entries),
        )

    def read(self, number: float | None, named: Mapping[str, float]) -> None:
        """Count one call of ``step`` and remember what it was given."""
        self.calls += 1
        self.since_growth += 1
        self.metrics = {**({} if number is None else {"metric": number}), **named}

    def remember(self, value: float | None) -> None:
        """Keep one reading of the metric that a probation looks at."""
        if value is not None:
            self.history = [*self.history[1 - KEPT_READINGS :], (self.calls, value)]

    def to_json(self) -> dict[str, Any]:
        """Plain data; accepted by ``torch.load(weights_only=True)``."""
        pending = None if self.pending is None else [edit_to_json(self.pending[0]), self.pending[1]]
        judged = self.on_probation
        return {
            **{name: getattr(self, name) for name in PLAIN},
            "pending": pending,
            "metrics": dict(self.metrics),
            "history": [list(point) for point in self.history],
            "on_probation": None if judged is None else [edit_to_json(judged[0]), *judged[1:]],
            "refused": [[edit_to_json(edit), why] for edit, why in self.refused],
            "journal": Journal(self.entries).to_json(),
        }

    @classmethod
    def from_json(cls, data: Any, journal: Journal, allowed: Allowed) -> Progress:
        """Read it back, around a journal that was read already.

        Raises:
            GrowthError: this is something else.
        """
        expected = {*PLAIN, "pending", "metrics", "history", "on_probation", "refused", "journal"}
        if not isinstance(data, Mapping) or set(data) != expected:
            keys = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise GrowthError(f"this is not the state of a Grower: it holds {keys}, expected {sorted(expected)}.")
        wrong = [name for name in COUNTS if type(data[name]) is not int]
        if wrong:
            raise GrowthError(f"this is not the state of a Grower: {wrong[0]} is {data[wrong[0]]!r:.40}, not a count.")
        try:
            pending, judged = data["pending"], data["on_probation"]
            return cls(
                **{name: data[name] for name in PLAIN},
                pending=None if pending is None else (edit_from_json(pending[0], "pending", allowed), pending[1]),
                metrics=dict(data["metrics"]),
                history=[(float(call), float(value)) for call, value in data["history"]],
                on_probation=None
                if judged is None
                else (edit_from_json(judged[0], "on_probation", allowed), int(judged[1]), int(judged[2])),
                refused=[_refused(item, allowed) for item in data["refused"]],
                entries=list(journal.entries),
            )
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise GrowthError(f"this is not the state of a Grower: {error}.") from error


def _let_go(key: int, _: Any) -> None:
    _taken.pop(key, None)


def _refused(item: Any, allowed: Allowed) -> tuple[Any, str]:
    """An edit that was set aside, and why; earlier versions kept the edit alone, and only a probation did so."""
    edit, why = item if isinstance(item, (list, tuple)) else (item, "probation")
    return edit_from_json(edit, "refused", allowed), str(why)


class Standing:
    """Where a Grower stands: its progress, trigger, chooser, and the gradients used; one thing to go back to.

    Args:
        model: the network.
        companions: everything that keeps step with it.
        when: the trigger.
        choose: the chooser.

    Attributes:
        watch: counts optimizer steps and knows which gradients they have used.
        flow: reads the gradients of new blocks.
        frozen: the old parameters that stand still while only what has grown trains.
        ledger: what was spent; it does not go back to a mark.
        decays: knows the peaks of learning rates; they do not go back either.
    """

    def __init__(self, model: nn.Module, companions: Sequence[Any], when: Any, choose: Any):
        self.model, self.companions, self.when, self.choose = model, companions, when, choose
        self.optimizers = optimizers_in(companions)
        self.watch, self.flow = StepWatch(self.optimizers), FlowWatch(self.optimizers)
        self._token, self._stateful = object(), list[Any]()
        self.moments = Moments(self.watch, self.optimizers)
        self.progress = Progress()
        self.frozen: list[nn.Parameter] = []
        self.ledger, self.decays = Ledger(), Decays(companions)

    @property
    def optimizer_steps(self) -> int:
        """Steps of the first optimizer since the run began, restored ones included."""
        return self.progress.optimizer_steps + self.watch.steps

    def begin_parts(self) -> None:
        """Take trigger and chooser over, each as it was when a Grower got it first.

        Raises:
            GrowthError: one that another Grower has used cannot be set back.
        """
        made_of = itertools.chain(inside(self.when), inside(self.choose))
        self._stateful = [p for p in made_of if hasattr(p, "state_dict") and set(p.state_dict()) - {"triggers"}]
        for part in self._stateful:
            known = _taken.get(id(part))
            before = copy.deepcopy(part.state_dict()) if known is None else known[1]
            if known is not None and not hasattr(part, "load_state_dict"):
                raise GrowthError(
                    f"{part!r} has served another Grower, and has no load_state_dict that would set it back. Make a "
                    "new one for each Grower."
                )
            if known is not None:
                part.load_state_dict(copy.deepcopy(before))
            with contextlib.suppress(TypeError):  # it has slots, and none for weak references
                _taken[id(part)] = (weakref.ref(part, functools.partial(_let_go, id(part))), before, self._token)

    @property
    def parts(self) -> dict[str, Any]:
        """Trigger and chooser, as long as they are this Grower's.

        Raises:
            GrowthError: they have been handed to another Grower, which has set them back.
        """
        for part in self._stateful:
            if _taken.get(id(part), (None, None, self._token))[2] is not self._token:
                raise GrowthError(
                    f"{part!r} was handed to another Grower after this one, and counts for that one now. Growers that "
                    "are in use together need one each: build it where the Grower is built."
                )
        return {"when": self.when, "choose": self.choose}

    def mark(self) -> tuple[Any, ...]:
        """All of it, to return to."""
        parts = self.parts
        watched = self.watch.state(self.model), self.flow.state()
        return self.progress.copy(), watched, parts, copy.deepcopy(states_of(parts)), list(self.frozen)

    def return_to(self, mark: tuple[Any, ...]) -> None:
        """Go back to a mark."""
        progress, (watch, flow), parts, states, frozen = mark
        self.progress = progress.copy()
        self.watch.set_state(watch, self.model)
        self.flow.set_state(flow)
        load_states(parts, states)
        self._freeze(frozen)

    def freeze_old(self, freeze_them: bool) -> list[str]:
        """Let only what the journal says has grown train, or all that was frozen so again; names of what changed."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        if not freeze_them:
            thawed = [names[id(p)] for p in self.frozen if id(p) in names]
            self._freeze([])
            return thawed
        refuse_parts(self.progress.entries)
        frozen = set(freeze_all_but(self.model, grown_paths(self.progress.entries, self.model)))
        self.frozen += [p for name, p in self.model.named_parameters() if name in frozen]
        refresh(self.companions)
        return [name for name in names.values() if name in frozen]

    @contextlib.contextmanager
    def thawed(self) -> Iterator[None]:
        """Grow as if nothing were frozen: copies of frozen blocks train, and find their place in the optimizer."""
        frozen = list(self.frozen)
        self._freeze([])
        try:
            yield
        finally:
            self._freeze(frozen)

    def _freeze(self, parameters: list[nn.Parameter]) -> None:
        """Let these stand still, and the others that did train again."""
        for p in self.frozen:
            p.requires_grad_(True)
        freeze(parameters)
        if self.frozen or parameters:
            refresh(self.companions)
        self.frozen[:] = parameters

    def judge(self, probation: Probation, undo: Callable[[str], None]) -> str | None:
        """End a probation that is due: keep the growth, or roll the run back and never choose that edit again.

        Returns:
            Why the verdict waits for the next call, or None.
        """
        progress = self.progress
        if progress.on_probation is None or progress.calls - progress.on_probation[1] < probation.calls:
            return None
        edit, born, index = progress.on_probation
        verdict = probation.verdict(progress.history, born)
        if verdict is None:
            progress.on_probation = None
            return None
        before, why = verdict
        entry = {**Journal(progress.entries).to_json()[index], "undone_at": {"calls": progress.calls}, "why": why}
        try:
            undo(why)
        except BadMoment as error:
            return str(error)
        except GrowthError as error:  # after a resume: the snapshot is gone
            progress.on_probation = None
            added = [new["path"] for new in progress.entries[index].added]
            pruned = f" To take it out: {_removing(self.model, added)}." if added else ""
            warnings.warn(f"a growth did not pay, but cannot be rolled back: {error}{pruned}", stacklevel=5)
            return None
        self.progress.undone, self.progress.history = [*progress.undone, entry], before
        self.progress.refused = [*self.progress.refused, (edit, why)]
        self.progress.pending, self.progress.fired, self.progress.on_probation = None, False, None
        return None

    def check_grown(self, origin: str) -> None:
        """Check that the network is what the journal says; ``origin`` is its fingerprint before the first growth.

        Raises:
            GrowthError: other code has changed it.
        """
        if fingerprint(self.model) != (self.progress.entries[-1].fingerprint if self.progress.entries else origin):
            raise GrowthError(
                "the network is not what this Grower has grown: other code has changed it since, and a checkpoint "
                "could not be loaded into the original network. Use grower.grow(edit) or `with grower.surgery():`, or "
                "hand over what auxin.grow or auxin.surgery returned: grower.record(change)."
            )

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        parts = states_of(self.parts)
        ramps = ramp.saved(self.model, self.optimizers)
        still = {id(p) for p in self.frozen}
        frozen = [name for name, p in self.model.named_parameters() if id(p) in still]
        own = {"optimizer_steps": self.optimizer_steps, "ramps": ramps, "frozen": frozen}
        own |= {"ledger": self.ledger.state_dict(), "peaks": list(self.decays.peaks)}
        return {**self.progress.to_json(), **own, **parts}

    def restore(self, state: Mapping[str, Any], journal: Journal, allowed: Allowed) -> None:
        """Continue from ``state``, around a journal that was replayed already.

        Raises:
            GrowthError: it is another Grower's.
        """
        own = {name: value for name, value in state.items() if name not in OWN}
        progress = Progress.from_json(own, journal, allowed)
        if "ledger" in state:
            self.ledger.load_state_dict(state["ledger"])
        load_states(self.parts, state)
        self.decays.resumed(state.get("peaks", ()))
        ramp.resumed(state.get("ramps", ()), self.model, self.optimizers, (self.model, *self.companions))
        progress.optimizer_steps -= self.watch.steps
        self.progress = progress
        still = set(state.get("frozen", ()))
        self._freeze([p for name, p in self.model.named_parameters() if name in still])
        self.flow.forget()


class Kept:
    """A state of a run to go to, from wherever it is then: network, companions, and where its Grower stands."""

    def __init__(self, standing: Standing):
        self._standing = standing
        self._snapshot = Snapshot([standing.model, *standing.companions])
        self._mark: tuple[Any, ...] | None = None

    def take(self) -> None:
        """Keep the state of now."""
        self._snapshot.take()
        self._mark = self._standing.mark()

    def restore(self) -> None:
        """Go to the state that was kept; what was spent stays spent."""
        assert self._mark is not None
        self._snapshot.restore()
        take_hold_again(self._standing.companions)  # the reducer of then may have lost its tensors meanwhile
        self._standing.return_to(self._mark)


def _removing(model: nn.Module, paths: Sequence[str]) -> str:
    """The calls that take out what stands at ``paths``, the last first, since those behind it move up."""
    calls = []
    for path in reversed(paths):
        inside = isinstance(module_at(model, path.rpartition(".")[0]), CONTAINERS)
        calls.append(f"auxin.Remove({path!r})" if inside else f"auxin.Replace({path!r}, torch.nn.Identity)")
    return ", then ".join(f"grower.grow({call})" for call in calls)


def states_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict()`` of each part that has one, by name; None for the others."""
    return {name: part.state_dict() if hasattr(part, "state_dict") else None for name, part in parts.items()}


def load_states(parts: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Load every part's state, or none.

    Raises:
        GrowthError: there is a state for a part that takes none, or that is none of its own.
    """
    for name, part in parts.items():
        if states.get(name) is not None and not hasattr(part, "load_state_dict"):
            raise GrowthError(f"{name}= was saved with a state, {part!r} takes none: pass the same {name}= as then.")
    before = copy.deepcopy(states_of(parts))
    try:
        for name, part in parts.items():
            if states.get(name) is not None:
                part.load_state_dict(states[name])
    except BaseException as error:
        for name, part in parts.items():
            if before[name] is not None:
                part.load_state_dict(before[name])
        if isinstance(error, (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError)):
            raise GrowthError(
                f"the state of a trigger or chooser is not what {parts} had saved ({type(error).__name__}: {error})."
            ) from error
        raise
