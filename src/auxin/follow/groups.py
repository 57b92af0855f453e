"""Which optimizer and group a new parameter joins, and at which place of the group."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.blocks import owned, role, steps_itself
from auxin.change import MISSING, Change, Join, OwnGroup
from auxin.errors import GrowthError

# Multiples of the learning rate that optimizers and schedules keep in a group.
RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr")


def assign(model: nn.Module, change: Change, optimizers: Sequence[Any], group: int | None) -> dict[int, Join]:
    """Choose for each new trainable parameter the group of its nearest sibling of the same role.

    Role is the type of the owning module, the leaf name and the number of dimensions. Nearest is, in this order: the
    same place inside another child of the same container, the same role inside that container, the same role anywhere.

    Args:
        model: the network.
        change: the plan.
        optimizers: all that step a part of it.
        group: index of the group for all new parameters, counted over the optimizers in the order given.

    Raises:
        GrowthError: no sibling and more than one group, or a group that cannot take the tensor.
    """
    alone = _self_stepping(model, change)
    groups = [((o, i), g["params"]) for o in optimizers for i, g in enumerate(o.param_groups)]
    homes = {id(p): home for home, params in groups for p in params}
    wanted = [
        m
        for m in change.moves
        if m.new is not None and change.will_train(m) and id(m.new) not in homes and id(m.old) not in homes
    ]
    wanted = [m for m in wanted if id(m.new) not in alone]
    leaving = {m.old_name: m.old for m in change.moves if m.removed and id(m.old) in homes}
    if not optimizers or not wanted:
        return {}
    forced = _forced(optimizers, group)
    roles = _roles(model, change)
    places = {id(p): place for place, p in enumerate(change.after.values())}
    candidates: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    for name, p in change.after.items():
        if id(p) in homes and id(p) in roles:
            candidates.setdefault(roles[id(p)], []).append((name, p))
    joins: dict[int, Join] = {}
    for move in wanted:
        assert move.new is not None and move.name is not None
        sibling = (
            leaving[move.name]
            if move.name in leaving
            else _sibling(move.name, move.new, change, candidates.get(roles.get(id(move.new)), []), places)
        )
        if forced is not None:
            home = forced
        elif sibling is not None:
            home = homes[id(sibling)]
        else:
            home = _only(optimizers, move.name, move.new)
        _fits(home[0], move.name, move.new)
        beside = sibling if sibling is not None and homes[id(sibling)] == home else None
        joins[id(move.new)] = Join(home[0], home[1], beside)
    return joins


def _self_stepping(model: nn.Module, change: Change) -> set[int]:
    """Ids of parameters that begin to train and, like all of their role, are stepped by a hook in the backward pass.

    Raises:
        GrowthError: all of a new parameter's role are, and nothing would step the new one.
    """
    starting = set(change.starting)
    born = [m for m in change.moves if m.name in starting]
    if not born or not any(map(steps_itself, change.after.values())):
        return set()
    new = {id(m.new) for m in born}
    old = [(name, p) for name, p in change.after.items() if id(p) not in new and p.requires_grad]
    if not any(steps_itself(p) for _, p in old):
        return set()
    roles = _roles(model, change)
    known: dict[Any, str | None] = {}
    for name, p in old:  # one without a hook shows that the role is stepped otherwise
        role = roles.get(id(p))
        known[role] = name if steps_itself(p) and known.get(role, name) is not None else None
    alone = [m for m in born if known.get(roles[id(m.new)]) is not None]
    for move in alone:
        if move.new is not None and not steps_itself(move.new):
            like = known[roles[id(move.new)]]
            raise GrowthError(
                f"{move.name}: {like} has a hook that runs when its gradient is there (an optimizer step inside the "
                "backward pass?), and the new tensor would have none: it would never train, and its gradient would "
                "pile up. Add the layer inside `with auxin.surgery(model):` and register the same hook "
                "on its parameters there."
            )
    return {id(move.new) for move in alone}


def places_in(
    group: Sequence[Any], entering: Sequence[tuple[Any, Any]], order: Mapping[int, int]
) -> list[tuple[int, Any]]:
    """At which index each new parameter enters a group's list.

    In a list that runs in model order (or exactly against it) the index that keeps it so; else right behind the
    sibling, or at the end.

    Args:
        group: the list, which may hold foreign parameters.
        entering: (new parameter, its sibling) in model order.
        order: position in ``named_parameters()`` after the change, by ``id``.

    Returns:
        (index, parameter), to be inserted one after the other.
    """
    known = [(i, order[id(p)]) for i, p in enumerate(group) if id(p) in order]
    ranks = [rank for _, rank in known]
    forward, backward = ranks == sorted(ranks), ranks == sorted(ranks, reverse=True)
    if not forward and not backward:
        ids = [id(p) for p in group]
        places = [(ids.index(id(s)) + 1 if s is not None and id(s) in ids else len(ids), new) for new, s in entering]
        return sorted(reversed(places), key=lambda place: -place[0])
    ranks = ranks if forward else [-rank for rank in ranks]
    sign = 1 if forward else -1
    entering = sorted(entering, key=lambda pair: -sign * order[id(pair[0])])
    at = [bisect.bisect_left(ranks, sign * order[id(new)]) for new, _ in entering]
    first = known[0][0] if known else len(group)
    return [(known[k - 1][0] + 1 if k else first, new) for k, (new, _) in zip(at, entering, strict=True)]


def made(donor: Mapping[str, Any], own: OwnGroup) -> dict[str, Any]:
    """The new group, without parameters yet."""
    group: dict[str, Any] = {}
    for key, value in donor.items():
        if key == "params" or (key == "param_names" and value is not None):
            group[key] = []
        elif key in RATES:
            group[key] = own.scaled(value)
        else:
            group[key] = _copied(own.options.get(key, own.begins.get(key, value)))
    return {key: value for key, value in group.items() if value is not MISSING}


def _forced(optimizers: Sequence[Any], group: int | None) -> tuple[Any, int] | None:
    homes = [(o, i) for o in optimizers for i in range(len(o.param_groups))]
    if group is None:
        return None
    if type(group) is not int or not 0 <= group < len(homes):
        listing = ", ".join(f"{n}: {type(o).__name__} group {i}" for n, (o, i) in enumerate(homes))
        raise GrowthError(f"group={group!r}: pass the index of an existing group ({listing}).")
    return homes[group]


def _roles(model: nn.Module, change: Change) -> dict[int, tuple[type, str, int]]:
    roles: dict[int, tuple[type, str, int]] = {}
    known: dict[tuple[type, str, int], tuple[type, str, int]] = {}  # few differ
    for module in (model, *(new.module for _, new in change.added)):
        for owner, leaf, p in owned(module):
            if id(p) not in roles:
                one = role(owner, leaf, p)
                roles[id(p)] = known.setdefault(one, one)
    return roles


def _sibling(
    name: str,
    new: nn.Parameter,
    change: Change,
    candidates: list[tuple[str, nn.Parameter]],
    places: dict[int, int],
) -> nn.Parameter | None:
    """The nearest parameter of the same role that an optimizer holds."""
    home = next(
        (r.path for r in change.rewires for path, _ in r.added if name == path or name.startswith(path + ".")),
        None,
    )
    prefix = "" if not home else home + "."
    tail = name[len(prefix) :].partition(".")[2] if home is not None else None
    found: dict[int, nn.Parameter] = {}
    for other, p in _outward(candidates, places[id(new)], places):
        inside = home is not None and other.startswith(prefix)
        same = inside and other[len(prefix) :].partition(".")[2] == tail
        if same:
            return p
        found.setdefault(1 if inside else 2, p)
    return found[min(found)] if found else None


def _outward(
    candidates: list[tuple[str, nn.Parameter]], place: int, places: dict[int, int]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Candidates by distance from ``place``, the nearest first, the one in front where two are as near."""
    after = bisect.bisect_left(candidates, place, key=lambda pair: places[id(pair[1])])
    before = after - 1
    while before >= 0 or after < len(candidates):
        ahead = place - places[id(candidates[before][1])] if before >= 0 else len(places)
        behind = places[id(candidates[after][1])] - place if after < len(candidates) else len(places)
        if ahead <= behind:
            yield candidates[before]
            before -= 1
        else:
            yield candidates[after]
            after += 1


def _only(optimizers: Sequence[Any], name: str, new: nn.Parameter) -> tuple[Any, int]:
    homes = [(o, i) for o in optimizers for i in range(len(o.param_groups))]
    if len(homes) == 1:
        return homes[0]
    listing = "; ".join(
        f"{n}: {type(o).__name__} group {i}, {len(o.param_groups[i]['params'])} tensors"
        for n, (o, i) in enumerate(homes)
    )
    raise GrowthError(
        f"{name} {tuple(new.shape)}: no trained parameter of the same role shows which of {len(homes)} groups it "
        f"belongs to. Pass group=<index> ({listing})."
    )


def _fits(optimizer: Any, name: str, new: nn.Parameter) -> None:
    if isinstance(optimizer, torch.optim.Muon) and new.dim() != 2:
        raise GrowthError(
            f"{name} {tuple(new.shape)}: Muon only takes matrices. Give an AdamW for the rest, as torch.optim.Muon "
            "asks, and pass both: auxin.grow(model, edit, muon, adamw)."
        )


def _copied(value: Any) -> Any:
    """A copy that no step of another group reaches."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    return dict(value) if type(value) is dict else value
