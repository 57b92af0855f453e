"""FSDP2's private parts (``fully_shard``): every one that auxin needs, and in this file only.

torch has no public way to add a module to a network under FSDP2, or to give a sharded parameter another shape. The
names below are those of torch 2.12, 2.13 and 2.14. ``missing``, ``missing_to_resize`` and ``missing_to_regroup`` say
which of them another torch does not have; they are asked before anything is written.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError
from auxin.listing import COMPOSED, named_modules

FSDP = "torch.distributed.fsdp"
OF_ROOT = ("_is_root", "_state_ctx", "_lazy_init")  # of a state: to set the root up again
OF_STATE = ("_fsdp_param_groups", "_auto_reshard_after_forward")  # of a state, and of its group: to shard alike
OF_GROUP = (
    *("mesh_info", "post_forward_mesh_info", "mp_policy", "offload_policy", "reduce_grads", "modules"),
    "fsdp_params",
)
OF_PARAMETER = (
    "_orig_size",
    "sharded_param",
    "fsdp_placement",
    "mesh_info",
    "post_forward_mesh_info",
    "device",
    "mp_policy",
)
MAKING = (  # the arguments with which FSDP2 makes what it knows of a parameter
    *("param", "module_info", "mesh_info", "post_forward_mesh_info", "device", "shard_placement_fn", "mp_policy"),
    "offload_policy",
)
GROUPING = (  # the arguments with which FSDP2 makes the group of a unit
    *("params", "modules", "mesh_info", "post_forward_mesh_info", "device", "shard_placement_fn", "mp_policy"),
    "offload_policy",
)
PLACES = ("module", "param_name", "shared_modules", "shared_param_names")  # where a parameter stands, as FSDP2 keeps it
OF_DTYPES = ("orig_dtype", "param_dtype", "reduce_dtype")  # of a parameter, known from the first forward on
STAYING = ("_module_info", "_post_load_hook_handle", "_param_fqn")  # of it, where the parameter gets another shape
SAVING = ("_module_to_pre_save_state_dict_hook_handle", "_module_to_pre_load_state_dict_hook_handle")  # of a group
SENDING = ("_all_gather_comm", "_reduce_scatter_comm")  # of a group
UNFINISHED = (  # of a group, while an iteration runs
    *("_all_gather_result", "_post_reduce_event", "_all_reduce_state", "_reshard_after_forward_event"),
    "_partial_reduce_output",
)
THEIRS = (FSDP, __name__)  # where hooks come from that FSDP2 has on modules
MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")  # what fully_shard writes on the modules that it manages

Known = tuple[Any, Any]  # what FSDP2 knows of a parameter, and its group
Places = list[tuple[nn.Module, str]]  # the modules that hold a parameter, and under which name


def is_unit(module: Any) -> bool:
    """Whether ``fully_shard`` was called on it. Loads nothing: who has called that has loaded it."""
    kind: Any = getattr(sys.modules.get(FSDP), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def units(model: nn.Module) -> dict[str, Any]:
    """The modules of a network on which ``fully_shard`` was called, by path; {} for one that is not sharded."""
    kind: Any = getattr(sys.modules.get(FSDP), "FSDPModule", None)
    # fully_shard gives a module a class of its own below this one: as long as there is none, nothing is sharded.
    if kind is None or not kind.__subclasses__():
        return {}
    return {path: module for path, module in named_modules(model).items() if is_unit(module)}


def missing(unit: Any) -> str:
    """The first private part of torch's FSDP2 that is needed here and not there, or ""."""
    if not hasattr(unit, "_get_fsdp_state"):
        return "FSDPModule._get_fsdp_state"
    state = _state(unit)
    lacking = [f"FSDPState.{name}" for name in OF_STATE if not hasattr(state, name)]
    for group in getattr(state, "_fsdp_param_groups", ()):
        lacking += [f"FSDPParamGroup.{name}" for name in OF_GROUP if not hasattr(group, name)]
    return lacking[0] if lacking else ""


def _state(unit: Any) -> Any:
    return unit._get_fsdp_state()


def groups_of(unit: Any) -> list[Any]:
    """The groups of parameters that a unit gathers; none where all that is in it belongs to units inside."""
    return _state(unit)._fsdp_param_groups


def shares_its_state(unit: Any) -> bool:
    """Whether a unit is one together with other modules, passes of it apart, or is sharded over several meshes."""
    groups = groups_of(unit)
    together = [module for group in groups for module in group.modules if len(group.modules) > 1]
    return len(groups) > 1 or not all(map(_own_hooks, together))


def passes_of_units(root: nn.Module) -> list[list[Any]]:
    """The modules of each unit in a network: one, or several where it runs again with the same weights."""
    found: dict[int, list[Any]] = {}
    for unit in units(root).values():
        found.setdefault(id(_state(unit)), []).append(unit)
    return list(found.values())


def _own_hooks(unit: Any) -> dict[str, Any]:
    """The hooks by which a unit gathers for the forward of this module alone, by the name of the list they are in."""
    state = _state(unit)
    return {name: hook for name, _, hook in their_hooks(unit) if getattr(hook, "__self__", None) is state}


def missing_to_repeat(root: nn.Module) -> str:
    """The first private part of FSDP2 that is needed to let a unit run again and not there, or ""."""
    lacking = missing_to_regroup(root)
    own = set(_own_hooks(root))
    wanted = {"_forward_pre_hooks": "_pre_forward", "_forward_hooks": "_post_forward"}
    return lacking or next((f"FSDPState.{hook}" for name, hook in wanted.items() if name not in own), "")


def run_again(block: Any, unit: Any) -> None:
    """Make a plain copy of a unit, which holds its very parameters, a further pass of it.

    Both gather and reduce by one state, each around its own forward.
    """
    from torch.distributed._composable_state import _insert_module_state

    hooks = _own_hooks(unit)
    vars(block).update({name: value for name, value in vars(unit).items() if is_mark(name)})
    block.__class__ = type(unit)
    _insert_module_state(block, _state(unit))
    block.register_forward_pre_hook(hooks["_forward_pre_hooks"], prepend=True, with_kwargs=True)
    block.register_forward_hook(hooks["_forward_hooks"])


def reduces_gradients(unit: Any) -> bool:
    """Whether a backward reduces the gradients of a unit (``set_requires_gradient_sync``)."""
    return all(group.reduce_grads for group in groups_of(unit))


def unreduced_gradients(unit: Any) -> list[Tensor]:
    """The gradients of a unit that ranks have not summed up yet."""
    kept = []
    for group in groups_of(unit):
        kept.append(getattr(group, "_partial_reduce_output", None))
        for known in group.fsdp_params:
            gathered = getattr(known, "_unsharded_param", None)
            kept += [getattr(known, "unsharded_accumulated_grad", None), getattr(gathered, "grad", None)]
    return [grad for grad in kept if grad is not None]


def computing_dtypes(unit: Any) -> list[torch.dtype]:
    """In which dtypes a mixed-precision policy lets a unit compute; none without one."""
    dtypes = (group.mp_policy.param_dtype for group in groups_of(unit))
    return [dtype for dtype in dtypes if dtype is not None]


def policies_of(unit: Any, root: nn.Module) -> tuple[Any, dict[str, Any]]:
    """The mesh of a unit, and the options with which another one is sharded alike."""
    state, groups = _state(unit), groups_of(unit) or groups_of(root) or list(_groups(root))
    group = groups[0]
    after = group.post_forward_mesh_info
    reshard: Any = after is not None if after is None or after is group.mesh_info else after.shard_mesh_size
    policies = {
        "reshard_after_forward": None if state._auto_reshard_after_forward else reshard,
        "mp_policy": group.mp_policy,
        "offload_policy": group.offload_policy,
    }
    return group.mesh_info.mesh, policies


def bring_to_rest(root: Any) -> None:
    """Let no unit hold full parameters, and let a root forget an iteration that was not finished."""
    all_known = _state(root)._state_ctx.all_states
    if {id(state) for state in states(root)} != {id(state) for state in all_known}:
        set_up_again(root)
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
    else:
        _forget_iteration(_state(root))


def _forget_iteration(root: Any) -> None:
    """What ``reset_iter_state`` does, which torch 2.12 does not have, to the state of a root."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # nothing reads what is dropped here
    for state in root._state_ctx.all_states:
        state._modules_to_run_forward.clear()
        state._training_state = type(state._training_state).IDLE
        for group in state._fsdp_param_groups:
            work = getattr(group._all_gather_result, "all_gather_work", None)
            if work is not None:
                work.wait()
            vars(group).update(dict.fromkeys(UNFINISHED))
            group._post_forward_indices.clear()
            group._training_state = type(group._training_state).IDLE
            group._to_sharded()
    root._comm_ctx.all_gather_state = None
    root._comm_ctx.reduce_scatter_states.clear()
    root._comm_ctx.post_forward_order.clear()
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False


def can_be_root(unit: Any) -> bool:
    """Whether a unit is the root of all units inside it, or becomes one in its first forward."""
    return can_set_up(unit) and _state(unit)._is_root is not False


def can_set_up(root: nn.Module) -> bool:
    """Whether this torch has the private parts with which a root takes in new units."""
    return all(hasattr(_state(root), name) for name in OF_ROOT)


def states(model: nn.Module) -> list[Any]:
    """The FSDP2 states of a network."""
    return [_state(unit) for unit in units(model).values()]


def forget_root(root: nn.Module, known: Iterable[Any]) -> None:
    """Let the next forward find out again which units there are, among them those whose states are ``known``."""
    if not is_unit(root) or not can_set_up(root):
        return
    for state in known:
        state._is_root = None
    _state(root)._state_ctx.all_states.clear()


def set_up_again(root: nn.Module) -> None:
    """Let a root take in all units that the network has now: one communication context, each reshards as it should."""
    if is_unit(root) and can_set_up(root):
        forget_root(root, states(root))
        _state(root)._lazy_init()


class _Met:
    """How units send tensors, with a call before each time."""

    def __init__(self, sends: Any, before: Callable[[], None]):
        self._sends, self._before = sends, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._before()
        return self._sends(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sends, name)


@contextmanager
def before_sending(root: nn.Module, before: Callable[[], None]) -> Iterator[None]:
    """Call ``before()`` each time before the units of a network send each other tensors inside, forward and backward.

    As ``set_custom_all_gather`` and ``set_custom_reduce_scatter`` do, which cannot tell what was set before.
    """
    held = [(group, name, vars(group)[name]) for group in _groups(root) for name in SENDING if name in vars(group)]
    try:
        for group, name, sends in held:
            vars(group)[name] = _Met(sends, before)
        yield
    finally:
        for group, name, sends in held:
            vars(group)[name] = sends


def is_mark(name: str) -> bool:
    """Whether FSDP2 has hung the attribute of this name on a module."""
    return name in MARKS or name.startswith(COMPOSED)


def their_hooks(module: nn.Module) -> Iterator[tuple[str, int, Any]]:
    """The hooks of FSDP2 on a module: the attribute that holds each, its key there, and itself."""
    for name, held in module.__dict__.items():
        for key, hook in held.items() if name.endswith("hooks") and isinstance(held, dict) else ():
            if is_their_hook(hook):
                yield name, key, hook


def is_their_hook(hook: Any) -> bool:
    """Whether a hook on a module is one of FSDP2's."""
    inner = getattr(hook, "hook", hook)
    owner = getattr(inner, "__self__", None)
    home = getattr(inner, "__module__", None) if owner is None else type(owner).__module__
    return (home or "").startswith(THEIRS)


# ---- a parameter of another shape


def missing_to_resize(root: nn.Module) -> str:
    """The first private part of FSDP2 that is needed to give a parameter another shape and not there, or ""."""
    for group in _groups(root):
        known = group.fsdp_params[0] if getattr(group, "fsdp_params", None) else None
        if known is None:
            return "FSDPParamGroup.fsdp_params"
        lacking = [f"FSDPParam.{name}" for name in (*OF_PARAMETER, *STAYING) if not hasattr(known, name)]
        lacking = lacking or [*_taken_otherwise(known, MAKING), *_taken_otherwise(known._module_info, PLACES)]
        if lacking:
            return lacking[0]
    return "" if can_set_up(root) else f"FSDPState.{next(n for n in OF_ROOT if not hasattr(_state(root), n))}"


def _taken_otherwise(known: Any, wanted: tuple[str, ...]) -> list[str]:
    """What is missing where the class of an object takes other arguments."""
    kind, taken = type(known).__name__, tuple(inspect.signature(type(known)).parameters)
    return [] if taken == wanted else [f"{kind}({', '.join(wanted)}), which takes {', '.join(taken)}"]


def _groups(root: nn.Module) -> Iterator[Any]:
    return (group for unit in units(root).values() for group in groups_of(unit))


def holders(root: nn.Module) -> dict[int, Known]:
    """What FSDP2 knows of each parameter and of its group, by ``id`` of the parameter; {} where nothing is sharded."""
    return {key: known for unit in units(root).values() for key, known in held_by(unit).items()}


def held_by(unit: Any) -> dict[int, Known]:
    """The same for the parameters that one unit gathers."""
    return {key_of(known): (known, group) for group in groups_of(unit) for known in group.fsdp_params}


def key_of(known: Any) -> int:
    """``id`` of the parameter of which FSDP2 knows this."""
    return id(known.sharded_param)


def mesh_of(known: Known) -> Any:
    """The mesh on which the unit of a parameter is sharded."""
    return known[1].mesh_info.mesh


def gathered_by(root: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Each sharded parameter, and what its unit gathers it into for a forward; none before the first."""
    found = ((known, getattr(known, "_unsharded_param", None)) for known, _ in holders(root).values())
    return [(known.sharded_param, gathered) for known, gathered in found if gathered is not None]


def resize(p: Any, value: Tensor, holder: Known) -> Callable[[], None]:
    """Give a sharded parameter another shape; it stays the same object. Its unit gathers and reduces the new shape.

    Args:
        p: the parameter, at rest.
        value: all of it afterwards, in one piece, equal on every rank.
        holder: of ``holders``.

    Returns:
        What takes it back.
    """
    known, _ = holder
    placed, size = known.fsdp_placement.dim, known.mesh_info.mesh.size(known.mesh_info.shard_mesh_dim)
    if placed and value.shape[placed] % size:
        raise GrowthError(
            f"FSDP2 shards it along axis {placed} (shard_placement_fn=), which must be a multiple of the {size} ranks, "
            f"and would be {value.shape[placed]} long"
        )
    kept, before = dict(vars(known)), p.detach()
    whole_one = nn.Parameter(value.detach().to(known.device).contiguous(), requires_grad=p.requires_grad)
    made = made_of(whole_one, [(nn.Module(), "weight")], holder, known.fsdp_placement)
    new = {name: held for name, held in vars(made).items() if name not in STAYING}
    gone = {name for name in kept if name.startswith("_unsharded_") and name not in new}
    put(p, made.sharded_param.detach())
    for name in gone:
        del vars(known)[name]
    vars(known).update(new, sharded_param=p)
    return functools.partial(_resize_back, p, before, known, kept)


def _resize_back(p: Any, before: Any, known: Any, kept: dict[str, Any]) -> None:
    put(p, before)
    _know_again(known, kept)


def _know_again(known: Any, kept: dict[str, Any]) -> None:
    vars(known).clear()
    vars(known).update(kept)


def shapes_of(unit: Any) -> Callable[[], None]:
    """What lets a unit gather its parameters in the shapes of now again; the parameters themselves are left alone."""
    if not is_unit(unit):
        return lambda: None
    held = [(known, dict(vars(known))) for group in groups_of(unit) for known in group.fsdp_params]

    def back() -> None:
        for known, kept in held:
            if vars(known)["_orig_size"] != kept["_orig_size"]:
                late = {name: value for name, value in vars(known).items() if name in OF_DTYPES and name not in kept}
                _know_again(known, {**kept, **late})

    return back


def put(p: Any, value: Any) -> None:
    """Let a tensor, a DTensor too, hold what another one holds, in its shape."""
    p.data = value
    if hasattr(value, "_spec"):
        p._local_tensor, p._spec = value._local_tensor, value._spec


# ---- other parameters in a unit


def missing_to_regroup(root: nn.Module) -> str:
    """The first private part of FSDP2 that is needed to let a unit gather others and not there, or ""."""
    lacking = missing_to_resize(root)
    if lacking:
        return lacking
    _, group = next(iter(holders(root).values()))
    lacking = [f"FSDPParamGroup.{name}" for name in SAVING if not hasattr(group, name)]
    return next(iter([*lacking, *_taken_otherwise(group, GROUPING)]), "")


def example_for(unit: Any, root: nn.Module) -> Known:
    """What FSDP2 knows of a parameter: of one of this unit, if it gathers any."""
    found = holders(root)
    own = (one for one in found.values() if any(module is unit for module in one[1].modules))
    return next(own, next(iter(found.values())))


def places_of(known: Any) -> Places:
    """Where a parameter stands, as FSDP2 knows it."""
    info = known._module_info
    return [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]


def _info(like: Any, places: Places) -> Any:
    (module, name), *shared = places
    return type(like)(module, name, [module for module, _ in shared], [name for _, name in shared])


def made_of(p: Any, places: Places, example: Known, placement: Any) -> Any:
    """What FSDP2 is to know of a new parameter, which is sharded with it; mesh and policies are an example's."""
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


def new_group(unit: Any, example: Known) -> Any:
    """One for a unit that has gathered nothing so far."""
    like, group = example
    after, policies = like.post_forward_mesh_info, (group.mp_policy, group.offload_policy)
    return type(group)([], (unit,), group.mesh_info, after, group.device, None, *policies)


def stand(known: Any, places: Places) -> None:
    """Let FSDP2 look for a parameter in these places: there it puts what it has gathered."""
    before, known._module_info = known._module_info, _info(known._module_info, places)
    owner = known._module_info.module
    if before.module is not owner:
        known._post_load_hook_handle.remove()
        known._post_load_hook_handle = owner.register_load_state_dict_post_hook(lambda *_: known.reset_sharded_param())


def gathered(group: Any) -> list[Any]:
    """What FSDP2 knows of the parameters of a group, in its order."""
    return list(group.fsdp_params)


def mark(module: nn.Module) -> None:
    """Write on a module what ``fully_shard`` writes on those of its unit."""
    vars(module).update(dict.fromkeys(MARKS, True))


def modules_of(unit: Any) -> tuple[Any, ...]:
    """The modules of a unit, as FSDP2 knows them."""
    return _state(unit)._modules


def gather(unit: Any, groups: list[Any], group: Any, parameters: list[Any], modules: tuple[Any, ...]) -> None:
    """Let a unit have these groups, one of them these parameters, and these modules; the next forward does the rest."""
    groups_of(unit)[:] = groups
    group.fsdp_params = parameters
    _state(unit)._modules = group.modules = modules
    for name in SAVING:  # a module that came has no hook yet, by which its state_dict holds shards
        for handle in getattr(group, name).values():
            handle.remove()
        getattr(group, name).clear()
