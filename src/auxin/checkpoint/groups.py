"""Which parameter stands where in an optimizer, by name; for checkpoints of others that restore it by position."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from auxin.change import OwnGroup
from auxin.checkpoint.companions import names_of
from auxin.errors import GrowthError
from auxin.follow.groups import made
from auxin.follow.optimizer_state import names_in
from auxin.follow.own_groups import optimizers_in
from auxin.follow.scheduler import extend, lengthened, lists_of, nested, optimizer_of

Names = Sequence[Sequence[str]]


def group_names(optimizer: Any, model: nn.Module) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer, in order."""
    own = names_in(optimizer, names_of(model))
    return [[own[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def regroup(optimizer: Any, groups: Names, model: nn.Module, schedulers: Sequence[Any] = ()) -> None:
    """Put parameters where ``group_names`` has seen them, so that a state restored by position meets the right ones.

    Groups that a growth had made for itself are made again, in the schedulers too; those that are here only because the
    network has grown (one group for each block) go. Options and state are left to ``load_state_dict``, which follows.

    Args:
        optimizer: built over the network as it has grown; it has not stepped yet.
        groups: of ``group_names``.
        model: the network.
        schedulers: those that drive this optimizer.

    Raises:
        GrowthError: a parameter is not known, or each group has a schedule of its own; nothing was changed.
    """
    own = names_in(optimizer, names_of(model))
    held = {own[id(p)]: (index, p) for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    known = {**dict(model.named_parameters()), **{name: p for name, (_, p) in held.items()}}
    count = len(optimizer.param_groups)
    problems = list(_differences(groups, count, known, schedulers))
    if problems:
        raise GrowthError(
            f"the checkpoint's groups do not fit this {type(optimizer).__name__}: {'; '.join(problems)}. Build the "
            "network and its optimizer as in the run that was saved."
        )
    donors = [held[group[0]][0] if group and group[0] in held else 0 for group in groups[count:]]
    more = [_own_group(optimizer, count + number, donor) for number, donor in enumerate(donors)]
    lists = [lengthened(scheduler, more, count) for scheduler in schedulers]
    # From here on nothing is expected to raise.
    for entries in lists:
        extend(entries, count)
    del optimizer.param_groups[len(groups) :]
    for held_per_group in _per_group(schedulers):
        del held_per_group[len(groups) :]
    optimizer.param_groups.extend(made(optimizer.param_groups[one.donor], one) for one in more)
    for group, wanted in zip(optimizer.param_groups, groups, strict=True):
        group["params"][:] = [known[name] for name in wanted]
        if group.get("param_names") is not None:
            group["param_names"][:] = wanted


@contextlib.contextmanager
def without_emptied(companions: Sequence[Any]) -> Iterator[None]:
    """Groups that lose their last parameter inside go, in the schedulers too: a growth had made them for itself."""
    optimizers = optimizers_in(companions)
    filled = {id(group) for optimizer in optimizers for group in optimizer.param_groups if group["params"]}
    yield
    for optimizer in optimizers:
        groups = optimizer.param_groups
        left = [n for n, group in enumerate(groups) if group["params"] or id(group) not in filled]
        schedulers = [c for c in companions if optimizer_of(c) is optimizer]
        lists = {id(held): held for held in (groups, *_per_group(schedulers))}  # one scheduler may hold another
        for held in lists.values():
            held[:] = [held[n] for n in left]


def _differences(groups: Names, count: int, known: Mapping[str, Any], schedulers: Sequence[Any]) -> Iterator[str]:
    own = any(len(set(map(id, held))) > 1 for s in schedulers for one in nested(s) for held in [_functions(one)])
    if len(groups) < count and own:
        yield f"it had {len(groups)} groups, here are {count}, each with a function of its own in the schedule"
    unknown = [name for group in groups for name in group if name not in known]
    if unknown:
        yield f"{', '.join(unknown[:6])} is not here"


def _functions(scheduler: Any) -> list[Any]:
    return getattr(scheduler, "lr_lambdas", [])


def _per_group(schedulers: Sequence[Any]) -> list[list[Any]]:
    return [held for scheduler in schedulers for one in nested(scheduler) for _, held in lists_of(one)]


def _own_group(optimizer: Any, index: int, donor: int) -> OwnGroup:
    group = optimizer.param_groups[donor]
    rate = float(group.get("initial_lr", group.get("lr", 0.0)))
    return OwnGroup(optimizer, index, donor, {}, rate, rate)
