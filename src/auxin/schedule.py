"""Learning-rate schedules that know of growing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, LRScheduler

from auxin.errors import GrowthError

Shape = Literal["linear", "cosine", "sqrt"]
Phase = Literal["warmup", "stable", "decay"]


class Grows(Protocol):
    """What says when its growing is over; a Grower does."""

    @property
    def done(self) -> bool:
        """Whether nothing will grow any more."""
        ...


class Spends(Protocol):
    """Whatever knows which part of a budget is spent."""

    @property
    def spent(self) -> float:
        """From 0 to 1."""
        ...


def wsd(
    optimizer: Optimizer,
    warmup: int,
    decay: int,
    total: int | None = None,
    grower: Grows | None = None,
    settle: int = 0,
    final: float = 0.0,
    shape: Shape = "linear",
) -> WSD:
    """Warm-up, stable, decay: the learning rate rises, stays until growing is done, and falls to its end.

    Growing belongs into the stable phase. The decay starts `settle` steps after `grower.done`, or in time to end at
    step `total`, whichever is first, and never before the warm-up is over. With neither it does not start;
    `begin_decay()` starts it by hand. A grower that is made after its schedule is told afterwards:
    `schedule.grower = grower`.

    It is an ordinary scheduler of torch: call `step()` after each `optimizer.step()`, give it to the Grower as a
    companion, save it with `state_dict()`. The state holds where it stands and its arguments, not the grower.

    Args:
        optimizer: Its groups' present learning rates are those of the stable phase.
        warmup: Steps of the warm-up; step k of it (from 1) runs at k / warmup. 0: none.
        decay: Steps of the decay, at least 1. A fifth of the run is usual.
        total: Steps of the whole run. It arrives at `final` after the last of them; None: open end.
        grower: A Grower, or anything else with `done`. Kept by a weak reference: hold it yourself.
        settle: Steps at the stable rate once the grower is done, for what has grown last to learn.
        final: Where the decay ends, as a part of the stable learning rate, at least 0 and below 1.
        shape: Of the decay: "linear"; "cosine"; "sqrt", one minus the square root of the part that is over
            (Haegele et al. 2024, arXiv:2405.18392).

    Returns:
        A `torch.optim.lr_scheduler.LRScheduler`.

    Raises:
        GrowthError: If an argument is out of range, or the phases do not fit into `total`.

    Source:
        Hu et al. 2024 (MiniCPM), arXiv:2404.06395.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = wsd(optimizer, warmup=2, decay=4, total=8)
        >>> rates = []
        >>> for _ in range(9):
        ...     rates.append(schedule.get_last_lr()[0])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _check((warmup, decay, settle), total, final, shape)
    return WSD(optimizer, warmup, decay, total, grower, settle, float(final), shape)


class WSD(LRScheduler):
    """What `wsd` returns; see there.

    Attributes:
        decay_from: The last step, counted from 0, at the stable learning rate; None while that is open.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int,
        decay: int,
        total: int | None,
        grower: Grows | None,
        settle: int,
        final: float,
        shape: Shape,
    ):
        self.warmup, self.decay, self.total, self.settle = warmup, decay, total, settle
        self.final, self.shape = final, shape
        self.decay_from: int | None = None
        self.grower = grower
        super().__init__(optimizer)

    @property
    def grower(self) -> Grows | None:
        """The grower whose end starts the decay, or None."""
        return None if self._grower is None else self._grower()

    @grower.setter
    def grower(self, grower: Grows | None) -> None:
        if grower is not None and not hasattr(grower, "done"):
            raise GrowthError(f"wsd(grower={grower!r}): pass the Grower itself, or None.")
        self._grower = None if grower is None else weakref.ref(grower)

    @property
    def phase(self) -> Phase:
        """Of the next optimizer step: "warmup", "stable" or "decay"; "decay" also when that is over."""
        if self.last_epoch + 1 < self.warmup:
            return "warmup"
        return "stable" if self.decay_from is None or self.last_epoch <= self.decay_from else "decay"

    def begin_decay(self, after: int = 0) -> None:
        """Let the decay begin with the next step, or ``after`` further ones, but not before the warm-up is over."""
        if self.decay_from is None:
            self.decay_from = max(self.last_epoch + after, self.warmup)

    def step(self, epoch: int | None = None) -> None:
        """One step on; call it after `optimizer.step()`."""
        if self.total is not None and self.last_epoch >= self.total - self.decay:
            self.decay_from = self.last_epoch if self.decay_from is None else min(self.decay_from, self.last_epoch)
        elif self._has_grown():
            self.begin_decay(self.settle)
        super().step(epoch)

    def get_lr(self) -> list[Any]:
        """The learning rate of each group at this step."""
        return [base * self._factor() for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and its arguments, without optimizer and grower."""
        return {name: value for name, value in super().state_dict().items() if name != "_grower"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        missing = sorted(self.state_dict().keys() - state_dict.keys())
        if missing:
            raise GrowthError(f"wsd: this state has no {missing}: it is another scheduler's.")
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "_grower"})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_grower": None}

    def _has_grown(self) -> bool:
        """Whether the grower is done, or gone: then it will not grow any more."""
        if self._grower is None:
            return False
        grower = self._grower()
        return grower is None or bool(grower.done)

    def _factor(self) -> float:
        now = self.last_epoch
        if now + 1 < self.warmup:
            return (now + 1) / self.warmup
        if self.decay_from is None or now <= self.decay_from:
            return 1.0
        over = min(1.0, (now - self.decay_from) / self.decay)
        left = {"linear": 1 - over, "cosine": (1 + math.cos(math.pi * over)) / 2, "sqrt": 1 - math.sqrt(over)}
        return self.final + (1 - self.final) * left[self.shape]


def by_budget(
    optimizer: Optimizer, warmup: int = 20, decay: float = 0.35, final: float = 0.0, grower: Spends | None = None
) -> ByBudget:
    """Warm-up, stable, decay over what is left of a budget: for runs whose steps get dearer while the network grows.

    The learning rate rises over `warmup` steps, stays until all but `decay` of the budget is spent, and falls linearly
    to `final` at its end. A grower that is made after its schedule is told afterwards: `schedule.grower = grower`;
    `auxin.auto` does so by itself. Without one the rate stays.

    Args:
        optimizer: Its groups' present learning rates are those of the stable phase.
        warmup: Steps of the warm-up. 0: none.
        decay: The last part of the budget, above 0 and at most 1.
        final: Where the decay ends, as a part of the stable learning rate, at least 0 and below 1.
        grower: What `auxin.auto` returns, or anything else with `spent`, the part of a budget that is spent. Kept by a
            weak reference.

    Returns:
        A `torch.optim.lr_scheduler.LRScheduler`.

    Raises:
        GrowthError: If an argument is out of range.
    """
    if type(warmup) is not int or warmup < 0:
        raise GrowthError(f"by_budget(warmup={warmup!r}): pass a whole number of steps from 0.")
    for name, value, least in (("decay", decay, "above 0"), ("final", final, "from 0 and below 1")):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not (0 < value <= 1 if name == "decay" else 0 <= value < 1):
            raise GrowthError(f"by_budget({name}={value!r}): pass a part, {least}.")
    return ByBudget(optimizer, warmup, decay, final, grower)


class ByBudget(LRScheduler):
    """What `by_budget` returns; see there."""

    def __init__(self, optimizer: Optimizer, warmup: int, decay: float, final: float, grower: Spends | None):
        self.warmup, self.decay, self.final = warmup, float(decay), float(final)
        self.grower = grower
        super().__init__(optimizer)

    @property
    def grower(self) -> Spends | None:
        """The grower whose budget it follows, or None."""
        return None if self._grower is None else self._grower()

    @grower.setter
    def grower(self, grower: Spends | None) -> None:
        if grower is not None and not hasattr(grower, "spent"):
            raise GrowthError(f"by_budget(grower={grower!r}): pass what auxin.auto returned, or None.")
        self._grower = None if grower is None else weakref.ref(grower)

    def get_lr(self) -> list[Any]:
        """The learning rate of each group at this step."""
        grower, rising = self.grower, min(1.0, (self.last_epoch + 1) / self.warmup) if self.warmup else 1.0
        left = 1.0 if grower is None else max(0.0, min(1.0, (1 - grower.spent) / self.decay))
        return [base * rising * (self.final + (1 - self.final) * left) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and its arguments, without optimizer and grower."""
        return {name: value for name, value in super().state_dict().items() if name != "_grower"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "_grower"})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_grower": None}


class Decays:
    """Tells which of a run's schedules decay, as far as that is known for sure.

    A `wsd` says its phase. Of any other scheduler the largest rate that `look` has seen is its peak, so that a warm-up
    is no decay, and below half of it the schedule decays. Cyclic schedules come back, and are left out.
    """

    def __init__(self, companions: Iterable[Any]):
        schedules = [one for one in companions if callable(getattr(one, "get_last_lr", None))]
        self.schedules = [one for one in schedules if not isinstance(one, CyclicLR | CosineAnnealingWarmRestarts)]
        self.peaks = [0.0] * len(self.schedules)

    def look(self) -> None:
        """Take in the rates of now."""
        self.peaks = [max(peak, _rate(one)) for one, peak in zip(self.schedules, self.peaks, strict=True)]

    def resumed(self, peaks: Sequence[float]) -> None:
        """Take in the peaks that a run had saved, if its schedules are as many as these."""
        if len(peaks) == len(self.schedules):
            self.peaks = [max(peak, float(saved)) for peak, saved in zip(self.peaks, peaks, strict=True)]

    def found(self) -> str | None:
        """The first schedule that decays, in words; None where none is known to."""
        for one, peak in zip(self.schedules, self.peaks, strict=True):
            name, rate = type(one).__name__, _rate(one)
            if isinstance(one, WSD):
                if one.phase == "decay":
                    return f"{name} is in its decay"
            elif rate < 0.5 * peak:
                return f"{name} has taken the learning rate from {peak:.3g} to {rate:.3g}, below half of its peak"
        return None


def _rate(schedule: Any) -> float:
    return max((float(rate) for rate in schedule.get_last_lr()), default=0.0)


def _check(phases: tuple[Any, Any, Any], total: Any, final: Any, shape: Any) -> None:
    warmup, decay, settle = phases
    for name, value, least in (("warmup", warmup, 0), ("decay", decay, 1), ("settle", settle, 0), ("total", total, 1)):
        if not (name == "total" and value is None) and (type(value) is not int or value < least):
            raise GrowthError(f"wsd({name}={value!r}): {name} takes whole numbers from {least}.")
    if total is not None and warmup + decay > total:
        raise GrowthError(
            f"wsd(warmup={warmup}, decay={decay}, total={total}): warm-up and decay together take {warmup + decay} "
            f"steps. Pass total={warmup + decay} or more, or make them shorter."
        )
    if isinstance(final, bool) or not isinstance(final, int | float) or not 0 <= final < 1:
        raise GrowthError(f"wsd(final={final!r}): final is a part of the stable learning rate, from 0 and below 1.")
    if shape not in ("linear", "cosine", "sqrt"):
        raise GrowthError(f"wsd(shape={shape!r}): shape is 'linear', 'cosine' or 'sqrt'.")
