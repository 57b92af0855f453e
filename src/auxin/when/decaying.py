"""A guard: no growth while the learning rate warms up, or after its stable phase."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from auxin.errors import GrowthError
from auxin.when.checks import check_number, check_state, check_trigger
from auxin.when.inner import asked, is_done, load_states, name_of, states_of
from auxin.when.reading import Reading, Trigger

_OWN = ("peak", "last", "same", "fallen", "steps", "stable")
# After so many equal learning rates in a row the phase is stable, and any fall is the start of the decay.
_STABLE = 3
# Schedules that multiply step by step collect rounding errors.
_NEARLY = 1 - 1e-6


def not_while_decaying(trigger: Trigger, scheduler: Any, below: float = 0.5) -> "_NotWhileDecaying":
    """Lets a trigger fire in the stable phase of a learning-rate schedule only.

    What grows in the decay has too little learning rate left to learn, and what grows in the warm-up grows a network
    that has not started. The trigger sees every reading; what it fires outside of the stable phase is dropped.

    `auxin.schedule.wsd` says by itself in which phase it is. Of other schedulers the largest learning rate of all
    groups is read at each call of `grower.step`. It is decaying

    - where the rate is below `below` times the largest one seen (cosine, linear and other slow decays);
    - where the rate has fallen after three readings at which it was the same (a warm-up-stable-decay schedule made
      otherwise), until it has been the same for three readings again.

    It is warming up while the rate rises, and before the first step, unless the rate is at the scheduler's own peak
    then (which is known for all schedulers of torch but those with a function of the user's). Readings between two
    steps of the scheduler count once. Build the trigger when the run starts, so that it sees the schedule from there.

    Under ReduceLROnPlateau, StepLR and their like it is blocked for good by the first cut to less than `below`.

    Args:
        trigger: A trigger, or a callable `f(reading) -> bool`.
        scheduler: A learning-rate scheduler of torch, or an object with `get_last_lr() -> list of numbers`; or a
            function without arguments that returns it, where a host builds it later: `lambda: trainer.lr_scheduler`.
        below: Part of the peak below which the stable phase is over, above 0 and at most 1. The default is ours.

    Returns:
        A trigger; its state holds the inner one's.

    Raises:
        GrowthError: If an argument does not fit.

    Examples:
        >>> import torch
        >>> from auxin.when import every
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=6)
        >>> trigger = not_while_decaying(every(1), schedule)
        >>> fired = []
        >>> for call in (1, 2, 3, 4, 5):
        ...     optimizer.step()
        ...     schedule.step()
        ...     fired.append(trigger(Reading(None, {}, call, 0, 0, call)))
        >>> fired
        [True, True, True, False, False]
    """
    check_trigger("not_while_decaying", trigger)
    if not inspect.isfunction(scheduler):
        _checked(scheduler, trigger)
    check_number("not_while_decaying", "below", below)
    if not 0 < below <= 1:
        raise GrowthError(f"not_while_decaying(below={below!r}): below is a part of the peak, above 0 and at most 1.")
    return _NotWhileDecaying(trigger, scheduler, float(below))


def _checked(scheduler: Any, trigger: Trigger) -> Any:
    if isinstance(scheduler, type) or not callable(getattr(scheduler, "get_last_lr", None)):
        raise GrowthError(
            f"not_while_decaying({name_of(trigger)}, {scheduler!r}): the second argument is the learning-rate "
            "scheduler, an object with get_last_lr(), or a function without arguments that returns it."
        )
    return scheduler


@dataclass(eq=False, repr=False)
class _NotWhileDecaying:
    trigger: Trigger
    scheduler: Any
    below: float = 0.5
    peak: float = field(init=False, default=0.0)
    last: float = field(init=False, default=math.nan)
    same: int = field(init=False, default=0)
    fallen: bool = field(init=False, default=False)
    steps: int | None = field(init=False, default=None)
    stable: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if not inspect.isfunction(self.scheduler):
            self._is_stable()

    def __call__(self, reading: Reading) -> bool:
        (fires,) = asked([self.trigger], reading)
        return self._is_stable() and fires

    def _is_stable(self) -> bool:
        scheduler = _checked(self.scheduler(), self.trigger) if inspect.isfunction(self.scheduler) else self.scheduler
        phase = getattr(scheduler, "phase", None)
        if phase in ("warmup", "stable", "decay"):
            return phase == "stable"
        steps = _steps_of(scheduler)
        if steps is None or steps != self.steps or math.isnan(self.last):
            self.steps = steps
            self._look(max((float(rate) for rate in scheduler.get_last_lr()), default=0.0), _peak_of(scheduler))
        return self.stable

    def _look(self, rate: float, known: float) -> None:
        """Take in one learning rate, and the largest one that there will be, where that is known."""
        last = self.last
        at_peak = known > 0 and rate >= known * _NEARLY
        warming = not at_peak and (math.isnan(last) or rate > last)
        was_stable = self.same >= _STABLE
        self.same = self.same + 1 if rate == last else 1
        self.fallen = rate < last if was_stable else self.fallen and self.same < _STABLE
        self.last, self.peak = rate, max(self.peak, rate, known)
        self.stable = not warming and not self.fallen and rate >= self.below * self.peak * _NEARLY

    @property
    def done(self) -> bool:
        """Whether the trigger will not fire any more."""
        return is_done(self.trigger)

    def state_dict(self) -> dict[str, Any]:
        return {"triggers": states_of([self.trigger]), **{name: getattr(self, name) for name in _OWN}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(self, state, ("triggers", *_OWN))
        load_states(self, [self.trigger], state["triggers"])
        self.peak, self.last, self.same = float(state["peak"]), float(state["last"]), int(state["same"])
        self.fallen, self.steps, self.stable = bool(state["fallen"]), state["steps"], bool(state["stable"])

    def __repr__(self) -> str:
        below = "" if self.below == 0.5 else f", below={self.below}"
        return f"not_while_decaying({name_of(self.trigger)}, {type(self.scheduler).__name__}{below})"


def _peak_of(scheduler: Any) -> float:
    """The largest learning rate that a schedule comes to; 0 where that cannot be known."""
    inner = getattr(scheduler, "_schedulers", None)
    if inner:
        peaks = [_peak_of(one) for one in inner]
        return max(peaks) if all(peaks) else 0.0
    kind = type(scheduler)
    if not kind.__module__.startswith("torch.optim.") or kind.__name__ in _OPEN:
        return 0.0
    if kind.__name__ in ("OneCycleLR", "CyclicLR"):
        rates = getattr(scheduler, "max_lrs", None) or [g["max_lr"] for g in scheduler.optimizer.param_groups]
    else:
        rates = getattr(scheduler, "base_lrs", ())
    return max((float(rate) for rate in rates), default=0.0)


def _steps_of(scheduler: Any) -> int | None:
    """How often a scheduler has stepped, where it says so."""
    inner = getattr(scheduler, "_schedulers", None)
    steps = getattr(scheduler, "last_epoch", None)
    return _steps_of(inner[0]) if inner and steps is None else steps


# Those whose rates are a function of the user's, or go where the metric sends them.
_OPEN = ("LambdaLR", "MultiplicativeLR", "ReduceLROnPlateau", "SWALR")
