"""``group=dict(lr=...)``: a parameter group of their own for the new parameters of a growth.

The parameters that would have joined group g of an optimizer, or that waited in it frozen, go into one new group behind
its last one; it has every option of g, with what was asked for over them. The learning rate that is asked for is what
one would have written when building the optimizer: it stands beside the donor's ``initial_lr``, and the schedule moves
both alike.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auxin.change import Change, Grouping, Join, OwnGroup, Placement
from auxin.companion import registration_of
from auxin.errors import GrowthError
from auxin.follow.groups import RATES, assign
from auxin.follow.mup import by_size
from auxin.follow.scheduler import floors, optimizer_of
from auxin.follow.self_check import SETTLED, built, check_rates, found_of, rule_of


def placed(model: nn.Module, change: Change, companions: Sequence[Any], group: Grouping, rewarm: int = 0) -> Placement:
    """Say where each new trainable parameter of a change goes.

    Args:
        model: the network.
        change: the plan.
        companions: everything that keeps step.
        group: what was asked for: an index, the options of an own group, or None.
        rewarm: over how many optimizer steps their updates grow to their full size.

    Raises:
        GrowthError: see ``assign``; or an own group that an optimizer or a schedule cannot have.
    """
    optimizers, notes = optimizers_in(companions), list[str]()
    if group is not None and change.parts:
        if not change.starting:
            raise GrowthError(
                f"group={group!r}: {change.parts[0].name} stays in its group, which holds whole tensors, and only some "
                "of its entries are new. Leave group out; rewarm=<steps> lets new entries begin with shorter steps."
            )
        names = ", ".join(part.name for part in change.parts)
        notes.append(f"{names} stay in their groups: some of their entries are old")
    if not isinstance(group, Mapping):
        joins, groups = assign(model, change, optimizers, group), list[OwnGroup]()
        counting = {id(o) for o in optimizers if any(_begins(o, place) for place in range(len(o.param_groups)))}
        if counting:
            waiting = {i: j for i, j in _held_already(change, optimizers).items() if id(j.optimizer) in counting}
            joins = {**joins, **_apart(change, {**waiting, **joins}, {}, companions, groups, counting)}
            notes += [f"{type(o).__name__} counts its steps in its groups" for o in optimizers if id(o) in counting]
        joins = {**joins, **_sized(change, optimizers, companions, groups)}
        _check_that_they_move(change, joins, groups)
        notes += [
            note for c in companions for own in groups if optimizer_of(c) is own.optimizer for note in floors(c, own)
        ]
        return Placement(optimizers, group, joins, tuple(groups), rewarm, tuple(dict.fromkeys(notes)))
    asked = checked(group, optimizers)
    joins = {**_held_already(change, optimizers), **assign(model, change, optimizers, None)}
    groups: list[OwnGroup] = []
    joins = _apart(change, joins, asked, companions, groups)
    notes += [note for c in companions for own in groups if optimizer_of(c) is own.optimizer for note in floors(c, own)]
    joins = {**joins, **_sized(change, optimizers, companions, groups)}
    _check_that_they_move(change, joins, groups)
    return Placement(optimizers, asked, joins, tuple(groups), rewarm, tuple(dict.fromkeys(notes)))


def _apart(
    change: Change,
    joins: Mapping[int, Join],
    asked: Mapping[str, Any],
    companions: Sequence[Any],
    groups: list[OwnGroup],
    counting: set[int] | None = None,
) -> dict[int, Join]:
    """Where new parameters go that have groups of their own; those groups are added to ``groups``.

    What an optimizer counts in its groups begins anew, but for parameters that go on from a copied state.

    Args:
        change: the plan.
        joins: where they would go otherwise.
        asked: the options of the groups.
        companions: everything that keeps step.
        groups: the groups that are made.
        counting: ids of the optimizers whose new parameters need a count of their own, where nothing was asked for.
    """
    found: dict[tuple[int, int, bool], list[tuple[Join, Tensor]]] = {}
    for move in change.moves:
        new, join = move.new, joins.get(id(move.new))
        if new is None or join is None:
            continue
        goes_on = (move.source is not None and move.source in join.optimizer.state) or new in join.optimizer.state
        goes_on = goes_on and bool(_begins(join.optimizer, join.group))  # others count by tensor: one group serves all
        if counting is not None and (goes_on or id(join.optimizer) not in counting):
            continue
        found.setdefault((id(join.optimizer), join.group, goes_on), []).append((join, new))
    moved: dict[int, Join] = {}
    order = [id(optimizer) for optimizer in optimizers_in(companions)]
    for key in sorted(found, key=lambda key: (order.index(key[0]), key[1:])):
        join, first = found[key][0]
        index = len(join.optimizer.param_groups) + sum(own.optimizer is join.optimizer for own in groups)
        own = _planned(join, index, asked, companions)
        own = own if key[2] else dataclasses.replace(own, begins=_begins(own.optimizer, own.donor))
        _check(own, first)
        groups.append(own)
        moved |= {id(new): Join(own.optimizer, own.index, join.sibling) for join, new in found[key]}
    return moved


def _check_that_they_move(change: Change, joins: Mapping[int, Join], groups: Sequence[OwnGroup]) -> None:
    """Refuse zeros that the optimizer would leave at zero.

    Raises:
        GrowthError: some would never train; says which.
    """
    left: dict[str, list[str]] = {}
    donors = {(id(own.optimizer), own.index): own.donor for own in groups}
    for move in change.moves:
        new, join = move.new, joins.get(id(move.new))
        if new is None or join is None or not move.added:
            continue
        still = found_of(join.optimizer, donors.get((id(join.optimizer), join.group), join.group)).still
        if (new.dim() > 1) in still and not new.detach().any():
            left.setdefault(type(join.optimizer).__name__, []).append(f"{move.name}")
    for kind, names in left.items():
        raise GrowthError(
            f"{kind} leaves tensors of zeros at zero, as a toy shows (its steps are as long as what they move): "
            f"{', '.join(names[:4])} would never train. Let it begin with values, as Duplicate(..., output='keep') and "
            "Insert(..., init='default') do, or step it by another optimizer."
        )


def _begins(optimizer: Any, place: int) -> Mapping[str, Any]:
    """What an optimizer counts in one of its groups, by key what that begins with."""
    return found_of(optimizer, place).counted


def _sized(
    change: Change, optimizers: Sequence[Any], companions: Sequence[Any], groups: list[OwnGroup]
) -> dict[int, Join]:
    """Where tensors go whose rate follows their size; their groups are added to ``groups``."""
    if not change.mup:
        return {}
    known = {id(p): p for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
    joins: dict[int, Join] = {}
    for own, moving in by_size(
        change,
        optimizers,
        lambda join, index, asked: _planned(join, index, asked, companions),
        lambda optimizer: len(optimizer.param_groups) + sum(own.optimizer is optimizer for own in groups),
    ):
        _check(own, known[moving[0]])
        groups.append(own)
        joins |= {parameter: Join(own.optimizer, own.index, None) for parameter in moving}
    return joins


def optimizers_in(companions: Sequence[Any]) -> tuple[Any, ...]:
    """Those of the companions that step parameters."""
    return tuple(c for c in companions if isinstance(getattr(c, "param_groups", None), list))


def checked(group: Any, optimizers: Sequence[Any]) -> Any:
    """``group=`` as plain data of our own; what no optimizer could take is refused.

    Raises:
        GrowthError: no optimizer, no option, or one that none of the optimizers has.
    """
    if not isinstance(group, Mapping):
        return group
    asked = {key: _plain(value) for key, value in group.items()}
    if not optimizers:
        raise GrowthError(
            f"group={asked}: there is no optimizer to make a group in. Pass it: auxin.grow(model, edit, optimizer, "
            "scheduler, group=...)."
        )
    if not asked:
        raise GrowthError(
            "group={}: an own group needs an option that sets it apart, e.g. group=dict(lr=1e-4). Leave group out to "
            "join the group of the nearest sibling."
        )
    for option in asked:
        if not any(option in options_of(o) for o in optimizers):
            raise _unknown(option, optimizers)
    return asked


def check_own_group(group: Grouping, companions: Sequence[Any]) -> None:
    """Check ahead of any growth that some group of some optimizer could have an own group beside it.

    Raises:
        GrowthError: none could; says why the first cannot, as the growth would.
    """
    if not isinstance(group, Mapping):
        return
    refused: list[GrowthError] = []
    for optimizer in optimizers_in(companions):
        for index, donor in enumerate(optimizer.param_groups):
            try:
                own = _planned(Join(optimizer, index, None), len(optimizer.param_groups), group, companions)
                if donor["params"]:
                    _check(own, donor["params"][0])
                change = Change(None, placement=Placement(optimizers_in(companions), groups=(own,)))
                for schedule in (c for c in companions if optimizer_of(c) is optimizer):
                    next(
                        registration_of(schedule).follower(schedule, change)
                    )  # it writes nothing before its first yield
                return
            except GrowthError as error:
                refused.append(error)
    if refused:
        raise refused[0]


def options_of(optimizer: Any) -> tuple[str, ...]:
    """The options that an own group of this optimizer may have to itself."""
    keys = dict.fromkeys((*optimizer.defaults, *(key for group in optimizer.param_groups for key in group)))
    return tuple(key for key in keys if key not in {"params", "param_names", *SETTLED})


def _held_already(change: Change, optimizers: Sequence[Any]) -> dict[int, Join]:
    """Where the parameters stand that begin to train and are in a group from before: they leave it for their own."""
    starting = set(change.starting)
    waiting = {id(move.new) for move in change.moves if move.name in starting}
    homes = [(p, o, i) for o in optimizers for i, group in enumerate(o.param_groups) for p in group["params"]]
    return {id(p): Join(o, i, None) for p, o, i in homes if id(p) in waiting}


def _unknown(option: Any, optimizers: Sequence[Any]) -> GrowthError:
    known = "; ".join(f"{type(o).__name__} has {', '.join(options_of(o))}" for o in optimizers)
    why = ""
    if option in ("params", "param_names"):
        why = " The new parameters of the growth go into it, no others."
    elif option in RATES:
        why = " It follows lr, as every rate of the schedule does."
    elif option in SETTLED:
        why = " It belongs to the whole optimizer or to its schedule."
    return GrowthError(f"group=dict({option}=...) is not an option of an own group.{why} {known}.")


def _planned(join: Join, index: int, asked: Mapping[str, Any], companions: Sequence[Any]) -> OwnGroup:
    """The new group that stands in for the one that ``join`` names.

    Raises:
        GrowthError: its schedule was not given, or there is no rate that the new one could stand beside.
    """
    optimizer, donor = join.optimizer, join.optimizer.param_groups[join.group]
    kind = type(optimizer).__name__
    for option in asked:
        if option not in options_of(optimizer):
            raise _unknown(option, [optimizer])
    if "initial_lr" in donor and not any(optimizer_of(c) is optimizer for c in companions):
        raise GrowthError(
            f"group={dict(asked)}: a schedule drives this {kind} (its groups have an initial_lr), and none was given; "
            "it would not know of the new group. Pass it too: auxin.grow(model, edit, optimizer, scheduler, group=...)."
        )
    reference = donor.get("initial_lr", donor.get("lr"))
    if "lr" not in asked and not isinstance(reference, (int, float, Tensor)):
        reference = 0.0
    reference = float(reference)
    if "lr" in asked and (reference == 0 or not math.isfinite(reference)):
        raise GrowthError(
            f"group={dict(asked)}: group {join.group} of {kind} began with a learning rate of {reference:g}, which "
            "the new group's cannot be a multiple of. Leave lr out, or pass group=<index> of another group."
        )
    options = {key: value for key, value in asked.items() if key != "lr"}
    return OwnGroup(optimizer, index, join.group, options, reference, asked.get("lr", reference))


def _check(own: OwnGroup, new: Tensor) -> None:
    """Whether the optimizer takes the values, by its own rules: it is built once more, around two scratch tensors.

    Raises:
        GrowthError: it does not; its own words are in it.
    """
    optimizer, donor = own.optimizer, own.optimizer.param_groups[own.donor]
    kind, shown = type(optimizer).__name__, {"lr": own.lr, **own.options}
    if isinstance(own.lr, bool) or not isinstance(own.lr, (int, float)):
        raise GrowthError(f"group=dict(lr={own.lr!r}): a learning rate is one number, e.g. group=dict(lr=1e-4).")
    for option, value in shown.items():
        was = donor.get(option)
        if isinstance(was, (tuple, list)) and not (isinstance(value, (tuple, list)) and len(value) == len(was)):
            raise GrowthError(f"group=dict({option}={value!r}): {kind} takes {len(was)} values, as in {tuple(was)}.")
        if isinstance(was, bool) and not isinstance(value, bool):
            raise GrowthError(f"group=dict({option}={value!r}): {kind} takes True or False.")
        flat = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(item, float) and not math.isfinite(item) for item in flat):
            raise GrowthError(f"group=dict({option}={value!r}): not a finite number.")
    lr = torch.full_like(donor["lr"], own.lr) if isinstance(donor.get("lr"), Tensor) else own.lr
    scratch = [nn.Parameter(torch.zeros(1, 1, dtype=new.dtype, device=new.device)) for _ in range(2)]
    try:
        rule = {key: value for key, value in rule_of(donor).items() if key not in own.options}
        rule = {} if type(optimizer).__module__.startswith("torch.optim") else rule
        built(optimizer, [{**rule, "params": [p]} for p in scratch], {**donor, **own.options, "lr": lr})
    except (ValueError, TypeError, RuntimeError, AssertionError, IndexError) as error:
        raise GrowthError(
            f"group={shown}: {kind} refuses such a group ({error}). Pass values that {kind} takes, or leave group out "
            "to join the group of the nearest sibling."
        ) from error
    check_rates(optimizer, own.donor, own.lr / own.reference if own.reference else 1.0)


def _plain(value: Any) -> Any:
    """Numbers of other libraries, and tensors of one number, as Python's own."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
