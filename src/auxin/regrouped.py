"""Which parameters each unit of a network under FSDP2 gathers, once other modules stand inside it.

``fully_shard`` looks once at the modules inside a unit. Here a unit takes in what has come since, and lets go of what
has left, so that a part of it can be replaced, put in or taken out. What of torch's private parts that needs is asked
for here and in ``sharded.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from auxin.listing import modules_in, named_parameters
from auxin.sharded import MARKS, holders, is_spread, is_unit, missing_to_resize, units

SAVING = ("_module_to_pre_save_state_dict_hook_handle", "_module_to_pre_load_state_dict_hook_handle")  # of a group
PLACES = ("module", "param_name", "shared_modules", "shared_param_names")  # where a parameter stands, as FSDP2 keeps it
GROUPING = (  # the arguments with which FSDP2 makes the group of a unit
    *("params", "modules", "mesh_info", "post_forward_mesh_info", "device", "shard_placement_fn", "mp_policy"),
    "offload_policy",
)

Known = tuple[Any, Any]  # what FSDP2 knows of a parameter, and its group
Places = list[tuple[nn.Module, str]]  # the modules that hold a parameter, and under which name


def missing(root: nn.Module) -> str:
    """The first private part of FSDP2 that is needed here and not there, or ""."""
    lacking = missing_to_resize(root)
    if lacking:
        return lacking
    known, group = next(iter(holders(root).values()))
    lacks = [f"FSDPParamGroup.{name}" for name in SAVING if not hasattr(group, name)]
    for kind, wanted in ((type(known._module_info), PLACES), (type(group), GROUPING)):
        taken = tuple(inspect.signature(kind).parameters)
        lacks += [] if taken == wanted else [f"{kind.__name__}({', '.join(wanted)}), which takes {', '.join(taken)}"]
    return lacks[0] if lacks else ""


def unit_around(root: nn.Module, path: str) -> str:
    """Path of the unit to which a module belongs."""
    found = units(root)
    while path not in found:
        path = path.rpartition(".")[0]
    return path


def gathered_in(root: nn.Module, path: str) -> set[int]:
    """Ids of the parameters that a module and its unit gather."""
    return set(_held(units(root)[unit_around(root, path)]))


def known_of(root: nn.Module) -> dict[int, Known]:
    """What FSDP2 knows of each parameter, by its ``id``; {} where nothing is sharded, or parts of torch are missing."""
    return {} if not units(root) or missing(root) else holders(root)


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
    example = _example(units(root)[unit_around(root, path)], root)
    like = named_parameters(root.get_submodule(path))
    names = {id(p): name for name, p in named_parameters(block).items()}
    made = {}
    for p, places in _held(block).values():
        if not is_spread(p):
            twin: Any = like.get(names[id(p)])
            alike = is_spread(twin) and twin.dim() == p.dim()
            known = _made(p, places, example, twin.placements[-1] if alike else None)
            made[id(known.sharded_param)] = known, example[1]
    return made


def regroup(root: nn.Module, known: Mapping[int, Known]) -> Callable[[], None]:
    """Let each unit gather the parameters that stand in it now. Plain ones are sharded as those beside them.

    Args:
        root: the sharded network, after its modules have changed.
        known: what ``known_of`` has given before, and ``shard_into`` of what is new.

    Returns:
        What takes it back.
    """
    if not units(root) or missing(root):
        return lambda: None
    backs: list[Callable[[], object]] = []
    found, known = list(units(root).values()), {**known, **holders(root)}
    for unit in found:
        unit.reshard()
    for unit in found:
        held, groups = _held(unit), unit._get_fsdp_state()._fsdp_param_groups
        if _is_as_it_was(groups, held):
            continue
        example = next((known[key] for key in held if key in known), None) or _example(unit, root)
        now = [known[key][0] if key in known else _made(p, at, example, None) for key, (p, at) in held.items()]
        group = groups[0] if groups else _new_group(unit, example)
        backs.append(functools.partial(_gather, groups, list(groups), group, list(group.fsdp_params)))
        for one, (_, places) in zip(now, held.values(), strict=True):
            backs.append(functools.partial(_stand, one, _places(one)))
            _stand(one, places)
        _gather(groups, [group] if now else [], group, now)
        for module in modules_in(unit):
            vars(module).update(dict.fromkeys(MARKS, True))

    def back() -> None:
        while backs:
            backs.pop()()

    return back


def _held(unit: nn.Module) -> dict[int, tuple[Any, Places]]:
    """The parameters of a unit, not of units inside it, by ``id``, and where each stands, in the order of torch."""
    found: dict[int, tuple[Any, Places]] = {}
    seen, left = set(), [unit]
    while left:
        module = left.pop()
        if id(module) in seen or (module is not unit and is_unit(module)):
            continue
        seen.add(id(module))
        for name, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), (p, []))[1].append((module, name))
        left += [child for child in reversed(module._modules.values()) if child is not None]
    return found


def _is_as_it_was(groups: list[Any], held: Mapping[int, tuple[Any, Places]]) -> bool:
    before = {id(one.sharded_param): _ids(_places(one)) for group in groups for one in group.fsdp_params}
    return before == {key: _ids(places) for key, (_, places) in held.items()}


def _ids(places: Places) -> set[tuple[int, str]]:
    return {(id(module), name) for module, name in places}


def _places(known: Any) -> Places:
    info = known._module_info
    return [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]


def _info(like: Any, places: Places) -> Any:
    (module, name), *shared = places
    return type(like)(module, name, [module for module, _ in shared], [name for _, name in shared])


def _example(unit: Any, root: nn.Module) -> Known:
    """What FSDP2 knows of a parameter: of one of this unit, if it gathers any."""
    found = holders(root)
    return next((one for one in found.values() if one[1].modules == (unit,)), next(iter(found.values())))


def _made(p: Any, places: Places, example: Known, placement: Any) -> Any:
    """What FSDP2 is to know of a new parameter, which is sharded with it, in its place."""
    like, group = example
    return type(like)(
        p,
        _info(like._module_info, places),
        like.mesh_info,
        like.post_forward_mesh_info,
        like.device,
        None if placement is None else lambda _: placement,
        like.mp_policy,
        group.offload_policy,
    )


def _new_group(unit: Any, example: Known) -> Any:
    """One for a unit that has gathered nothing so far."""
    like, group = example
    after, policies = like.post_forward_mesh_info, (group.mp_policy, group.offload_policy)
    return type(group)([], (unit,), group.mesh_info, after, group.device, None, *policies)


def _stand(known: Any, places: Places) -> None:
    """Let FSDP2 look for a parameter in these places: there it puts what it has gathered."""
    before, known._module_info = known._module_info, _info(known._module_info, places)
    owner = known._module_info.module
    if before.module is not owner:
        known._post_load_hook_handle.remove()
        known._post_load_hook_handle = owner.register_load_state_dict_post_hook(lambda *_: known.reset_sharded_param())


def _gather(groups: list[Any], now: list[Any], group: Any, parameters: list[Any]) -> None:
    """Let a unit have these groups, and one of them these parameters; the next forward sees to what follows."""
    groups[:] = now
    group.fsdp_params = parameters
    for name in SAVING:  # a module that came has no hook yet, by which its state_dict holds shards
        for handle in getattr(group, name).values():
            handle.remove()
        getattr(group, name).clear()
