"""Checks of what users hand to a Grower, at the door, each with the call that works."""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from auxin import choose as choosers
from auxin import when as triggers
from auxin.anatomy.probe import PlanContext, Probe
from auxin.change import Edit
from auxin.companion import registration_of
from auxin.edits.several import as_edit
from auxin.errors import GrowthError
from auxin.follow.own_groups import optimizers_in
from auxin.follow.scheduler import SCHEDULERS, check_driven
from auxin.proof import does_not_run
from auxin.when.inner import inside


def check_words(door: str, given: Iterable[str], grower: type, needed: Iterable[str] = ()) -> None:
    """Check the names of the keywords that a door takes for a Grower.

    Raises:
        GrowthError: names what is wrong, and all that there are.
    """
    known = [p.name for p in inspect.signature(grower).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown, missing = sorted({*given} - {*known}), sorted({*needed} - {*given})
    if "companions" in unknown:
        way = "Pass each one by itself, by position: Grower(model, optimizer, scheduler, average, edits=..., when=...)"
        found = "Optimizers, schedules and averages are found in the Trainer"
        raise GrowthError(f"{door}(companions=...): {found if 'Callback' in door else way}.")
    if unknown or missing:
        what = f"takes no {', '.join(unknown)}" if unknown else f"needs {' and '.join(missing)}"
        raise GrowthError(f"{door} {what}. It takes the arguments of auxin.Grower: {', '.join(known)}.")


def checked_companions(companions: tuple[Any, ...]) -> tuple[Any, ...]:
    """Optimizers, schedulers, averages, scalers, each passed by itself."""
    for companion in companions:
        if isinstance(companion, (list, tuple, dict)):
            kind = type(companion).__name__
            raise GrowthError(
                f"companions: there is a {kind} among them; pass each one by itself: Grower(model, *{kind}_of_them)."
            )
        registration_of(companion)
    for schedule in (one for one in companions if isinstance(one, SCHEDULERS)):
        check_driven(schedule, optimizers_in(companions))
    return companions


def checked_trigger(when: Any) -> Any:
    """A trigger that was built."""
    if inspect.isfunction(when) and getattr(triggers, when.__name__, None) is when:
        raise GrowthError(f"when={when.__name__} is not a trigger yet; call it: when=auxin.when.{when.__name__}(...).")
    if isinstance(when, type) or not callable(when):
        raise GrowthError(
            f"when is {_words(when)}; pass a trigger such as auxin.when.plateau(patience=3), or any f(reading)."
        )
    if not _takes_one(when):
        raise GrowthError("when takes no reading; write it as when=lambda reading: ...")
    parts = list(inside(when))
    twice = next((part for n, part in enumerate(parts) if any(part is other for other in parts[:n])), None)
    if hasattr(twice, "state_dict"):
        raise GrowthError(f"when={when!r}: {twice!r} is given twice, and would see every reading twice.")
    return when


def checked_chooser(choose: Any, evidence: Any = None) -> Any:
    """A chooser that was built, with the evidence that it needs."""
    if choose in (choosers.cycle, choosers.by_trial, choosers.by_gain, choosers.by_race, choosers.least_change):
        name = choose.__name__
        raise GrowthError(f"choose={name} is not a chooser yet; call it: choose=auxin.choose.{name}().")
    if isinstance(choose, type) or not callable(choose):
        raise GrowthError(
            f"choose is {_words(choose)}; pass auxin.choose.first, another of auxin.choose, or f(edits, grower)."
        )
    if evidence is None and (why := getattr(choose, "needs_evidence", "")):
        raise GrowthError(why)
    return choose


def check_judge(when: Any, probation: Any) -> None:
    """Check that a probation takes the same for better as the trigger, where both look at one metric.

    Raises:
        GrowthError: they do not.
    """
    if probation is None:
        return
    for trigger in inside(when):
        mode = getattr(trigger, "mode", None)
        same = getattr(trigger, "metric", None) == probation.metric and not hasattr(trigger, "value")
        if same and mode in ("min", "max") and mode != probation.mode:
            raise GrowthError(
                f"when={trigger!r} and {probation!r} look at one metric and take it the other way round: give both "
                f"the same mode, e.g. Probation(mode={mode!r})."
            )


RISING = {"acc", "accuracy", "auc", "auroc", "f1", "iou", "precision", "recall", "r2", "bleu"}  # better when higher


def warn_of_direction(when: Any) -> None:
    """Warn where the name of a metric says that a trigger takes worse for better."""
    for trigger in inside(when):
        name, mode = getattr(trigger, "metric", None), getattr(trigger, "mode", None)
        words = set(re.split(r"[^a-z0-9]+", name.lower())) if isinstance(name, str) else set()
        other = "max" if words & RISING and mode == "min" else "min" if "loss" in words and mode == "max" else None
        if other is not None and not hasattr(trigger, "value"):
            warnings.warn(
                f"when={trigger!r} takes a {'smaller' if mode == 'min' else 'larger'} {name} for the better one; if "
                f"that is not meant, pass mode={other!r}.",
                stacklevel=3,
            )


def checked_edits(given: Any) -> Any:
    """What a Grower may choose from: a list of edits, or the function that makes it at each decision."""
    if not callable(given) or is_edit(given) or isinstance(given, type):
        return listed(given)
    if not _takes_one(given):
        raise GrowthError("edits takes no model; write it as edits=lambda model: [...]")
    return given


class ByHand:
    """The trigger of a Grower that was given none: it never fires."""

    def __call__(self, reading: Any) -> bool:
        """No growth now."""
        return False

    def __repr__(self) -> str:
        return "grown by hand"


def checked_choice(edits: Any, when: Any) -> tuple[Any, Any]:
    """Edits and trigger of a Grower: both, or neither for a run that only its user grows.

    Raises:
        GrowthError: one of them was given alone, or is none.
    """
    found = [] if edits is None else checked_edits(edits)
    if when is None:
        if found:
            raise GrowthError(
                "Grower(edits=...) needs when=, which says at which of the steps one of them is made, as in "
                "when=auxin.when.plateau(patience=3). To make one now, leave both out and call grower.grow(edit)."
            )
        return [], ByHand()
    checked_trigger(when)
    if edits is None:
        raise GrowthError("Grower(when=...) needs edits=, as in edits=auxin.Duplicate('blocks', by=1).")
    if not found:
        warnings.warn(
            f"edits={edits!r} holds no edit: nothing grows but by grower.grow(edit) and grower.surgery(). Where that "
            "is meant, leave out when= as well.",
            stacklevel=3,
        )
    return found, when


MOST = 10_000  # edits of one decision


def listed(edits: Any) -> list[Edit]:
    """One edit or several as a list."""
    if isinstance(edits, (str, bytes)):
        raise GrowthError(f"edits={edits!r} is a text, not an edit; write edits=auxin.Duplicate({edits!r}, by=1).")
    several = not is_edit(edits) and isinstance(edits, Iterable)
    found: list[Any] = list(map(as_edit, itertools.islice(edits, MOST + 1))) if several else [edits]
    if len(found) > MOST:
        raise GrowthError(f"edits gives more than {MOST:,} edits and may never end; pass a list of those that matter.")
    for edit in found:
        if not is_edit(edit):
            raise GrowthError(f"edits holds {_words(edit)}; pass edits such as auxin.Duplicate('blocks', by=1).")
    return found


def check_without_probe(edits: Any, probe: Probe) -> None:
    """Check that the edits of a list can be planned without a batch, where there is none. A function is not asked.

    Raises:
        GrowthError: one of them cannot; the message is that of the growth.
    """
    given = [] if probe is not None or (callable(edits) and not is_edit(edits)) else listed(edits)
    for edit in given:
        if why := getattr(edit, "needs_probe", ""):
            raise GrowthError(why)


def check_places(edits: Any, model: nn.Module) -> None:
    """Check that the edits of a list have a place in the network as it is now. A function is not asked.

    Raises:
        GrowthError: none of them has; the message is that of the growth. Where only some have none, a warning says so,
            since a growth may make their place.
    """
    given = [] if callable(edits) and not is_edit(edits) else listed(edits)
    wrong = [why for edit in given if (why := _misplaced(edit, model)) is not None]
    if wrong and len(wrong) == len(given):
        raise GrowthError(
            f"{wrong[0]} (If other code makes that place later, write edits=lambda model: [...], which is asked at "
            "each decision.)"
        )
    for why in wrong:
        warnings.warn(f"{why} As long as no growth makes that place, this edit is refused.", stacklevel=4)


def _misplaced(edit: Edit, model: nn.Module) -> str | None:
    """Why an edit that can tell has no place in the network."""
    check = getattr(edit, "check", None)
    try:
        return None if check is None else check(model)
    except GrowthError as error:
        return str(error)


def check_probe(model: nn.Module, probe: Probe) -> None:
    """Check by one forward that the network takes a probe. A callable is not asked: it may draw from the data.

    Raises:
        GrowthError: it does not.
    """
    tensors = [*model.parameters(), *model.buffers()]
    unasked = probe is None or (callable(probe) and not isinstance(probe, Tensor))
    if unasked or any(t.is_meta or is_lazy(t) for t in tensors):
        return
    try:
        PlanContext(model, probe).calls({})
    except GrowthError:
        raise
    except Exception as error:  # whatever a user's forward raises
        raise does_not_run(model, error) from error


def check_on_refused(said: Any) -> None:
    """Check what becomes of an edit that is refused in a run.

    Raises:
        GrowthError: neither of the two.
    """
    if said not in ("raise", "warn"):
        raise GrowthError(f"on_refused={said!r}: pass 'raise' or 'warn'.")


def note_way_on(refusal: GrowthError) -> None:
    """Note in a refusal that ends a run what would not."""
    refusal.add_note("Nothing has changed. on_refused='warn' sets such an edit aside, and the run goes on.")


def is_edit(value: Any) -> bool:
    """Whether a value is an edit (and not the class of one)."""
    return isinstance(value, Edit) and not isinstance(value, type)


def number(value: Any, name: str) -> float:
    """A metric as a float.

    Raises:
        GrowthError: it is none.
    """
    if isinstance(value, (str, bytes, bool)):
        raise GrowthError(
            f"step: {name} is {value!r}, not a number; pass grower.step(loss) or grower.step(accuracy=0.9)."
        )
    if isinstance(value, Tensor):
        value = value.detach()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise GrowthError(
            f"step: {name} is {_words(value)}, not a number; pass grower.step(loss) or grower.step(accuracy=0.9)."
        ) from error


def _takes_one(function: Any) -> bool:
    """Whether a callable can be called with one argument, as far as its signature tells."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # one in C, without a signature
        return True
    return True


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
