"""Which parameters each unit of a network under FSDP2 gathers, once other modules stand inside it.

``fully_shard`` looks once at the modules inside a unit. Here a unit takes in what has come since, and lets go of what
has left, so that a part of it can be replaced, put in or taken out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from auxin.fsdp2 import (
    Known,
    Places,
    example_for,
    gather,
    gathered,
    groups_of,
    held_by,
    holders,
    is_unit,
    key_of,
    made_of,
    mark,
    missing_to_regroup,
    modules_of,
    new_group,
    passes_of_units,
    places_of,
    stand,
    units,
)
from auxin.listing import modules_in, named_parameters
from auxin.sharded import is_spread


def unit_around(root: nn.Module, path: str) -> str:
    """Path of the unit to which a module belongs."""
    found = units(root)
    while path not in found:
        path = path.rpartition(".")[0]
    return path


def gathered_in(root: nn.Module, path: str) -> set[int]:
    """Ids of the parameters that a module and its unit gather."""
    unit = units(root)[unit_around(root, path)]
    return set(_held(*next(together for together in passes_of_units(root) if any(one is unit for one in together))))


def known_of(root: nn.Module) -> dict[int, Known]:
    """What FSDP2 knows of each parameter, by its ``id``; {} where nothing is sharded, or parts of torch are missing."""
    return {} if not units(root) or missing_to_regroup(root) else holders(root)


def shard_into(block: nn.Module, path: str, root: nn.Module) -> dict[int, Known]:
    """Shard the plain parameters of a new block as those of the unit into which it goes; others stay as they are.

    Args:
        block: new; every rank holds the same values.
        path: of the module that it replaces, or that stands beside it: parameters of the same name and number of
            dimensions are sharded along the same axis.
        root: the sharded network.

    Returns:
        What FSDP2 knows of each of them, for ``regroup``.
    """
    example = example_for(units(root)[unit_around(root, path)], root)
    like = named_parameters(root.get_submodule(path))
    names = {id(p): name for name, p in named_parameters(block).items()}
    made = {}
    for p, places in _held(block).values():
        if not is_spread(p):
            twin: Any = like.get(names[id(p)])
            alike = is_spread(twin) and twin.dim() == p.dim()
            known = made_of(p, places, example, twin.placements[-1] if alike else None)
            made[key_of(known)] = known, example[1]
    return made


def regroup(root: nn.Module, known: Mapping[int, Known]) -> Callable[[], None]:
    """Let each unit gather the parameters that stand in it now. Plain ones are sharded as those beside them.

    Args:
        root: the sharded network, after its modules have changed.
        known: what ``known_of`` has given before, and ``shard_into`` of what is new.

    Returns:
        What takes it back.
    """
    if not units(root) or missing_to_regroup(root):
        return lambda: None
    backs: list[Callable[[], object]] = []
    found, known = passes_of_units(root), {**known, **holders(root)}
    for unit, *_ in found:
        unit.reshard()
    for unit, *again in found:
        held, groups = _held(unit, *again), list(groups_of(unit))
        if _is_as_it_was(unit, held):
            continue
        example = next((known[key] for key in held if key in known), None) or example_for(unit, root)
        now = [known[key][0] if key in known else made_of(p, at, example, None) for key, (p, at) in held.items()]
        group = groups[0] if groups else new_group(unit, example)
        backs.append(functools.partial(gather, unit, groups, group, gathered(group), modules_of(unit)))
        for one, (_, places) in zip(now, held.values(), strict=True):
            backs.append(functools.partial(stand, one, places_of(one)))
            stand(one, places)
        gather(unit, [group] if now else [], group, now, (unit, *again))
        for module in (inner for one in (unit, *again) for inner in modules_in(one)):
            mark(module)

    def back() -> None:
        while backs:
            backs.pop()()

    return back


def _held(*passes: nn.Module) -> dict[int, tuple[Any, Places]]:
    """The parameters of a unit, not of units inside it, by ``id``, and where each stands, in the order of torch."""
    found: dict[int, tuple[Any, Places]] = {}
    own = set(map(id, passes))
    seen, left = set(), list(reversed(passes))
    while left:
        module = left.pop()
        if id(module) in seen or (id(module) not in own and is_unit(module)):
            continue
        seen.add(id(module))
        for name, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), (p, []))[1].append((module, name))
        left += [child for child in reversed(module._modules.values()) if child is not None]
    return found


def _is_as_it_was(unit: Any, held: Mapping[int, tuple[Any, Places]]) -> bool:
    before = {key: _ids(places_of(known)) for key, (known, _) in held_by(unit).items()}
    return before == {key: _ids(places) for key, (_, places) in held.items()}


def _ids(places: Places) -> set[tuple[int, str]]:
    return {(id(module), name) for module, name in places}
