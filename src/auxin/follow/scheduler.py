"""Learning-rate schedulers: new parameters join existing groups, so every schedule goes on unchanged.

Where a growth makes a group of its own (``group=dict(...)``), every list with one entry per group gets one more, from
the donor's: learning rates times the asked ratio, momenta and functions as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler

from auxin.anatomy.wrappers import plain
from auxin.change import Change, OwnGroup
from auxin.errors import GrowthError
from auxin.follow import follow
from auxin.follow.groups import made
from auxin.follow.scheduler_state import KINDS
from auxin.structure import reversible

SCHEDULERS = (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)
RATE_LISTS = ("base_lrs", "min_lrs", "max_lrs", "_last_lr", "swa_lrs")
LISTS = (*RATE_LISTS, "lr_lambdas", "base_momentums", "max_momentums")
# Their per-group lists are all among LISTS; any other class shows what it does in a rehearsal.
KNOWN = ("torch.optim.lr_scheduler", "torch.optim.swa_utils", "auxin.schedule")
# Steps, and how many where a list is only guessed to hold rates, or a schedule that is no LRScheduler must have moved.
REHEARSED, LONGEST = 3, 1000
CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)


def optimizer_of(scheduler: Any) -> Any:
    """The optimizer whose groups a scheduler drives."""
    found: Any = getattr(scheduler, "optimizer", None)
    if found is None:
        inner = getattr(scheduler, "_schedulers", None) or [None]
        found = getattr(inner[0], "optimizer", None)
    return plain(found)


def check_driven(scheduler: Any, optimizers: Sequence[Any]) -> None:
    """Check that the optimizer that a scheduler drives is among these.

    Raises:
        GrowthError: it is not.
    """
    driven = optimizer_of(scheduler)
    if all(driven is not plain(optimizer) for optimizer in optimizers):
        raise GrowthError(
            f"{type(scheduler).__name__} drives a {type(driven).__name__} that was not given. Pass the optimizer "
            "together with its scheduler: auxin.grow(model, edit, optimizer, scheduler)."
        )


def uneven(scheduler: Any, model: Any) -> Iterator[str]:
    """Lists of a scheduler that have another length than there are groups."""
    groups = getattr(optimizer_of(scheduler), "param_groups", [])
    for name, held in vars(scheduler).items() if groups else ():
        if name in RATE_LISTS and isinstance(held, list) and len(held) != len(groups):
            yield (
                f"{type(scheduler).__name__}.{name} has {len(held)} entries for {len(groups)} groups. Build the "
                "scheduler after the last add_param_group"
            )


@follow(lr_scheduler.LRScheduler, verify=uneven)
@follow(lr_scheduler.ReduceLROnPlateau, verify=uneven)
def follow_scheduler(scheduler: Any, change: Change) -> Iterator[None]:
    """Check that the optimizer it drives keeps step too, and extend its lists where that gets groups of its own.

    Raises:
        GrowthError: that optimizer was not given, or the schedule cannot go on with another number of groups.
    """
    check_driven(scheduler, change.optimizers)
    driven = optimizer_of(scheduler)
    count = len(driven.param_groups)
    groups = [own for own in change.groups if own.optimizer is driven]
    longer = lengthened(scheduler, groups, count)
    if groups:
        _rehearse(scheduler, groups)
    yield

    def back() -> None:
        if groups:
            _shorten([held for held, _ in longer], count)
            held = [held for one in nested(scheduler) for _, held in lists_of(one, count + len(groups))]
            _shorten(held, count)  # it may have stepped

    yield from reversible(functools.partial(extend, longer, count), back)


def nested(scheduler: Any) -> list[Any]:
    """A scheduler and all that it holds, directly or in lists."""
    found: dict[int, Any] = {}
    left = [scheduler]
    while left:
        one = left.pop()
        if (isinstance(one, KINDS) or one is scheduler) and id(one) not in found:
            found[id(one)] = one
            values = list(vars(one).values())
            left += [v for value in values for v in (value if isinstance(value, (list, tuple)) else (value,))]
    return list(found.values())


def lists_of(scheduler: Any, count: int = 0) -> list[tuple[str, list[Any]]]:
    """Name and list of all that a scheduler itself keeps per group.

    Of a class that is not torch's, also numbers in lists of the length ``count``: a rehearsal tells whether they are
    rates.
    """
    own = vars(scheduler)
    found = [(name, own[name]) for name in LISTS if isinstance(own.get(name), list)]
    if type(scheduler).__module__ not in KNOWN and count:
        others = [(name, held) for name, held in own.items() if name not in LISTS and type(held) is list]
        found += [(name, held) for name, held in others if len(held) == count and all(map(_is_rate, held))]
    return found


def _is_rate(value: Any) -> bool:
    return type(value) is float or (isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point())


def floors(scheduler: Any, own: OwnGroup) -> list[str]:
    """What keeps the new group's rate from staying the asked multiple of its donor's, in words."""
    return [
        f"{type(one).__name__}(eta_min={float(one.eta_min):g}) is one floor for all groups, the new one ends there too"
        for one in nested(scheduler)
        if own.lr != own.reference and getattr(one, "eta_min", 0)
    ]


def lengthened(scheduler: Any, groups: Sequence[OwnGroup], count: int) -> list[tuple[list[Any], list[Any]]]:
    """Each list of a scheduler that has one entry per group, and its new entries; writes nothing.

    Raises:
        GrowthError: a list has another length, a function cannot be copied, or an option would be overwritten.
    """
    found = []
    for one in nested(scheduler) if groups else ():
        kind = type(one).__name__
        for name, held in lists_of(one, count):
            if len(held) != count:
                raise GrowthError(
                    f"{kind}.{name} has {len(held)} entries for {count} groups, so it is not known how to go on with "
                    "one more. Build the scheduler after the last add_param_group."
                )
            found.append((held, [_entry(name, held[own.donor], own, kind) for own in groups]))
        cycled = {"momentum", "betas"} if getattr(one, "cycle_momentum", False) else set()
        lost = sorted(cycled.intersection(*(own.options for own in groups)))
        if lost:
            raise GrowthError(
                f"group=dict({lost[0]}=...): {kind} sets {lost[0]} in every group at each step, so it would be lost. "
                f"Leave it out, or build {kind} with cycle_momentum=False."
            )
    return found


def _entry(name: str, value: Any, own: OwnGroup, kind: str) -> Any:
    if name in RATE_LISTS or name not in LISTS:
        return own.scaled(value)
    if name != "lr_lambdas":
        return value.detach().clone() if isinstance(value, Tensor) else value
    code = value
    while isinstance(code, functools.partial):
        code = code.func
    if isinstance(code, CODE):
        return value
    try:
        return copy.deepcopy(value)  # an object may count its calls: the donor's must not get any more of them
    except Exception as error:
        raise GrowthError(
            f"{kind}: its function {value!r} cannot be copied for the new group ({error}). Use a plain function of "
            "the step, or leave group out."
        ) from error


def extend(longer: Sequence[tuple[list[Any], list[Any]]], count: int) -> None:
    """Give every list of ``lengthened`` its new entries, once."""
    for held, entries in longer:
        if len(held) == count:  # two schedulers may share a list, or a companion stand inside another
            held.extend(entries)


def _shorten(lists: Sequence[list[Any]], count: int) -> None:
    for held in lists:
        del held[count:]


# ---- classes that are not torch's


def _rehearse(scheduler: Any, groups: Sequence[OwnGroup]) -> None:
    """Let a copy of a scheduler of another making take some steps with the new groups.

    Raises:
        GrowthError: it fails, moves the old groups, or moves the new one unlike its donor.
    """
    inside = nested(scheduler) or [scheduler]
    foreign = [type(one) for one in inside if type(one).__module__ not in KNOWN]
    if not foreign:
        return
    count = len(optimizer_of(scheduler).param_groups)
    guessed = any(name not in LISTS for one in inside for name, _ in lists_of(one, count))
    steps = REHEARSED if isinstance(scheduler, KINDS) and not guessed else LONGEST
    names = ", ".join(dict.fromkeys(kind.__name__ for kind in foreign))
    advice = (
        "Write it as torch.optim.lr_scheduler.LambdaLR(optimizer, f), where f(step) is the rate at a step over the "
        f"first one; or write down how: @auxin.follow({foreign[0].__name__}), with change.groups; or use group=<index>."
    )
    try:
        before = list(_rates(scheduler, [], steps))
    except Exception as error:
        raise GrowthError(
            f"{names} is not a scheduler of torch, and a copy of it takes no step ({type(error).__name__}: {error}), "
            f"so it is not known whether it goes on with an own group. {advice}"
        ) from error
    try:
        after = list(_rates(scheduler, groups, steps))
    except Exception as error:
        raise GrowthError(
            f"{names} does not go on with {len(groups)} group more ({type(error).__name__}: {error}). {advice}"
        ) from error
    for old, new in zip(before, after, strict=True):
        wanted = [float(own.scaled(old[own.donor])) for own in groups]
        if new[: len(old)] != old or any(
            abs(a - b) > 1e-6 * abs(b) for a, b in zip(new[len(old) :], wanted, strict=True)
        ):
            raise GrowthError(
                f"{names} would go on with the rates {new}, not with {[*old, *wanted]}: something in it is kept per "
                f"group that auxin does not know. {advice}"
            )

    still = [own.donor for own in groups if len({rates[own.donor] for rates in before}) == 1]
    if still and steps == LONGEST:
        raise GrowthError(
            f"{names} is not a scheduler of torch, and a copy of it has not moved the rate of group {still[0]} within "
            f"{steps} steps, so it is not known whether it would move an own group's. {advice}"
        )


def _rates(scheduler: Any, groups: Sequence[OwnGroup], steps: int) -> Iterator[list[float]]:
    """The learning rates of some steps, on a copy around a stand-in for the optimizer."""
    driven = optimizer_of(scheduler)
    count = len(driven.param_groups)
    stand_in = types.SimpleNamespace(
        param_groups=[{**copy.copy(group), "params": []} for group in driven.param_groups],
        defaults=driven.defaults,
        state={},
        step=lambda: None,
    )
    for group in stand_in.param_groups:
        group |= {key: value.detach().clone() for key, value in group.items() if isinstance(value, Tensor)}
    twin = copy.deepcopy(scheduler, {id(driven): stand_in})
    extend(lengthened(twin, groups, count), count)
    stand_in.param_groups += [made(stand_in.param_groups[own.donor], own) for own in groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters = inspect.signature(twin.step).parameters.values()
        asks = any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        for number in range(1, steps + 1):  # it may ask for the step, or for a metric
            twin.step(*([number] if asks else []))
            yield [float(group["lr"]) for group in stand_in.param_groups]
