"""FSDP2 (``fully_shard``): how a network is sharded, a block in plain tensors, a new one sharded as its neighbour is.

torch has no public way to add a module to a network under FSDP2. What that needs of its private parts is asked for in
this file and ``regrouped.py`` only, and ``missing`` says which of them a version of torch does not have.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError
from auxin.listing import COMPOSED, module_at, named_modules, named_parameters

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
OF_DTYPES = ("orig_dtype", "param_dtype", "reduce_dtype")  # of it, known from the first forward on
STAYING = ("_module_info", "_post_load_hook_handle", "_param_fqn")  # of it, where the parameter gets another shape
SENDING = ("_all_gather_comm", "_reduce_scatter_comm")  # of a group
THEIRS = (FSDP, "auxin.regrouped")  # where hooks come from that FSDP2 has on modules
MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")  # what fully_shard writes on the modules that it manages
AT_A_CHECKPOINT = (
    "Grow between two jobs: save, build the plain network in one process, load, grow and save it there, and shard the "
    "grown one."
)


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


def is_spread(tensor: Any) -> bool:
    """Whether it is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """All of a tensor on every rank; every rank must call it. One that is not spread is returned as it is."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def in_one_piece(tensor: Any) -> Any:
    """The same for a parameter, which stays one."""
    return nn.Parameter(whole(tensor.detach()), requires_grad=False) if is_spread(tensor) else tensor


def here(tensor: Any) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if is_spread(tensor) else tensor


def is_leaf(tensor: Tensor) -> bool:
    """Whether a tensor is a leaf; some views that an optimizer keeps do not say."""
    try:
        return tensor.is_leaf
    except RuntimeError:  # a view made without gradients, of what was written into with them
        return False


def parts_of(tensor: Any) -> list[Tensor]:
    """The tensors of which one is made, as a quantized state is; none of a plain one, or of one that is spread."""
    plain = type(tensor) in (Tensor, nn.Parameter) or is_spread(tensor)
    flatten = None if plain else getattr(tensor, "__tensor_flatten__", None)
    parts = [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]
    return [one for part in parts for one in parts_of(part) or [part]]


def part_here(tensor: Any) -> tuple[slice, ...]:
    """Along each axis which entries this rank holds: all, or one of as many chunks (``torch.chunk``) as there are."""
    held = [slice(0, size) for size in tensor.shape]
    for number, placement in enumerate(tensor.placements if is_spread(tensor) else ()):
        if placement.is_shard():
            outer = held[placement.dim]
            size, rank = tensor.device_mesh.size(number), tensor.device_mesh.get_local_rank(number)
            chunk = -(-(outer.stop - outer.start) // size)
            start = min(outer.start + rank * chunk, outer.stop)
            held[placement.dim] = slice(start, min(start + chunk, outer.stop))
    return tuple(held)


def zeroed(tensor: Any, keep: Tensor) -> Any:
    """A spread tensor with zeros where ``keep``, of the shape of what this rank holds, is False."""
    from torch.distributed.tensor import DTensor

    local, shape, stride = torch.where(keep, here(tensor), 0), tensor.shape, tensor.stride()
    return DTensor.from_local(local, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def spread_like(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that every rank holds, spread as ``like`` is."""
    if not is_spread(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def group_of(root: nn.Module) -> Any:
    """The process group of all ranks that hold a part of a network."""
    mesh: Any = next(p for p in root.parameters() if is_spread(p)).device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    if mesh.ndim == 1:
        return mesh.get_group()
    from torch.distributed import group

    return group.WORLD  # of replicas that are sharded each, see ``check``


def check(model: nn.Module) -> None:
    """Refuse a network that is sharded in another way than over one mesh by FSDP2 alone, all of it.

    Raises:
        GrowthError: names the tensor or the module, and the way round.
    """
    parameters, found = named_parameters(model), units(model)
    spread = {name: p for name, p in parameters.items() if is_spread(p)}
    if not found:
        raise GrowthError(
            f"{next(iter(spread))} is a DTensor (tensor parallel, by a plan of parallelize_module), of which each rank "
            f"holds a part, and there is no plan for a new module. {AT_A_CHECKPOINT}"
        )
    plain = next((name for name in parameters if name not in spread), None)
    if plain is not None or not is_unit(model):
        what = (
            f"{plain or 'the model'} is a plain tensor among the DTensors of a network under FSDP2 (ignored_params=?)"
        )
        if not is_unit(model):
            what = f"{next(iter(found))} is under FSDP2 (fully_shard), and {plain or 'the model around it'} is not"
        raise GrowthError(
            f"{what}: each rank would train its own. Call fully_shard(model) on the whole network, after the blocks, "
            "before the optimizer is built, and pass that network."
        )
    for path, unit in found.items():
        lacking = missing(unit)
        if lacking:
            raise GrowthError(
                f"{path or 'the model'} is under FSDP2 (fully_shard), whose private {lacking} auxin reads to shard a "
                f"new block alike; torch {torch.__version__} does not have it. {AT_A_CHECKPOINT}"
            )
        if len(_state(unit)._fsdp_param_groups) > 1 or any(len(g.modules) > 1 for g in _state(unit)._fsdp_param_groups):
            raise GrowthError(
                f"{path or 'the model'} shares its FSDP2 state with another module, or has several meshes "
                f"(fully_shard([a, b]), shard_placement_fn=). {AT_A_CHECKPOINT}"
            )
    _check_meshes(model, spread)


def _check_meshes(model: nn.Module, spread: dict[str, Any]) -> None:
    """Let one mesh pass, that of all units: of ranks, or of all ranks as replicas that are sharded each (HSDP)."""
    from torch.distributed import get_world_size

    known, first = holders(model), next(iter(spread.values())).device_mesh
    for name, p in spread.items():
        own = known[id(p)][1].mesh_info.mesh if id(p) in known else None
        if own is not None and p.device_mesh != own:
            raise GrowthError(
                f"{name} is sharded over a mesh of {p.device_mesh.ndim} dimensions, and its FSDP2 unit over one of "
                f"{own.ndim}: a tensor-parallel plan (parallelize_module) shards it too, and there is no plan for a "
                f"new module. {AT_A_CHECKPOINT}"
            )
    for name, p in spread.items():
        if p.device_mesh != first:
            raise GrowthError(
                f"{name} lies on another device mesh than the tensors before it, and it is not known on which a new "
                f"block belongs. {AT_A_CHECKPOINT}"
            )
    if first.ndim > 1 and first.size() != get_world_size():
        raise GrowthError(
            f"the network is sharded over a mesh of {first.ndim} dimensions (HSDP) of {first.size()} ranks, and the "
            f"job has {get_world_size()}: there is no process group of these ranks alone. {AT_A_CHECKPOINT}"
        )


def refuse(model: nn.Module, call: str, way: str) -> None:
    """Refuse a call that does not know of networks under FSDP2.

    Raises:
        GrowthError: says what to do.
    """
    if units(model):
        raise GrowthError(f"{call}: not under FSDP2 (fully_shard), where each rank holds a part of every tensor. {way}")


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


def why_not_now(model: nn.Module) -> str | None:
    """The reason why a sharded network must not be changed at this moment, or None."""
    for path, unit in units(model).items():
        if not all(group.reduce_grads for group in _state(unit)._fsdp_param_groups):
            return (
                f"{path or 'the model'} does not reduce its gradients (set_requires_gradient_sync(False)); grow after "
                "set_requires_gradient_sync(True) and the optimizer step"
            )
    return unreduced(model)


def unreduced(model: nn.Module) -> str | None:
    """In words, that units hold gradients which ranks have not summed up yet; they are no ``grad`` of a parameter."""
    for path, unit in units(model).items():
        for group in _state(unit)._fsdp_param_groups:
            kept = [getattr(group, "_partial_reduce_output", None)]
            for known in group.fsdp_params:
                gathered = getattr(known, "_unsharded_param", None)
                kept += [getattr(known, "unsharded_accumulated_grad", None), getattr(gathered, "grad", None)]
            if any(grad is not None for grad in kept):
                return (
                    f"{path or 'the model'} holds gradients from while set_requires_gradient_sync or "
                    "set_requires_all_reduce was False, which ranks have not summed up yet and zero_grad does not "
                    "reach; go on with a backward under True and the optimizer step first"
                )
    return None


def computed_in(model: nn.Module) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtype in which a mixed-precision policy lets units compute, and that of their weights; None without one."""
    for unit in units(model).values():
        for group in _state(unit)._fsdp_param_groups:
            own = next((p.dtype for p in unit.parameters() if p.is_floating_point()), None)
            if group.mp_policy.param_dtype not in (None, own) and own is not None:
                return group.mp_policy.param_dtype, own
    return None


def settle(model: nn.Module) -> None:
    """Bring a sharded network to rest between two steps: no unit holds full parameters, all belong to one root.

    A forward without a backward leaves full parameters in the root, which are no parameters of the optimizer.
    """
    found = list(units(model).values())
    if not found:
        return
    if is_unit(model) and can_set_up(model) and _state(model)._is_root is not False:
        if {id(state) for state in states(model)} != {id(state) for state in _state(model)._state_ctx.all_states}:
            set_up_again(model)
        model.reset_iter_state()  # pyright: ignore[reportCallIssue]
    else:
        for unit in found:
            unit.reshard()


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


# ---- a parameter of another shape


def missing_to_resize(root: nn.Module) -> str:
    """The first private part of FSDP2 that is needed to give a parameter another shape and not there, or ""."""
    for group in _groups(root):
        known = group.fsdp_params[0] if getattr(group, "fsdp_params", None) else None
        if known is None:
            return "FSDPParamGroup.fsdp_params"
        lacking = [f"FSDPParam.{name}" for name in (*OF_PARAMETER, *STAYING) if not hasattr(known, name)]
        taken = tuple(inspect.signature(type(known)).parameters)
        if lacking or taken != MAKING:
            return (lacking or [f"FSDPParam({', '.join(MAKING)}), which takes {', '.join(taken)}"])[0]
    return "" if can_set_up(root) else f"FSDPState.{next(n for n in OF_ROOT if not hasattr(_state(root), n))}"


def _groups(root: nn.Module) -> Iterator[Any]:
    return (group for state in states(root) for group in state._fsdp_param_groups)


def holders(root: nn.Module) -> dict[int, tuple[Any, Any]]:
    """What FSDP2 knows of each parameter and of its group, by ``id`` of the parameter; {} where nothing is sharded."""
    return {id(known.sharded_param): (known, group) for group in _groups(root) for known in group.fsdp_params}


def gathered_by(root: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Each sharded parameter, and what its unit gathers it into for a forward; none before the first."""
    found = ((known, getattr(known, "_unsharded_param", None)) for known, _ in holders(root).values())
    return [(known.sharded_param, gathered) for known, gathered in found if gathered is not None]


def resize(p: Any, value: Tensor, holder: tuple[Any, Any]) -> Callable[[], None]:
    """Give a sharded parameter another shape; it stays the same object. Its unit gathers and reduces the new shape.

    Args:
        p: the parameter, at rest.
        value: all of it afterwards, in one piece, equal on every rank.
        holder: of ``holders``.

    Returns:
        What takes it back.
    """
    known, group = holder
    placed, size = known.fsdp_placement.dim, known.mesh_info.mesh.size(known.mesh_info.shard_mesh_dim)
    if placed and value.shape[placed] % size:
        raise GrowthError(
            f"FSDP2 shards it along axis {placed} (shard_placement_fn=), which must be a multiple of the {size} ranks, "
            f"and would be {value.shape[placed]} long"
        )
    kept, before = dict(vars(known)), p.detach()
    whole_one = nn.Parameter(value.detach().to(known.device).contiguous(), requires_grad=p.requires_grad)
    made = type(known)(
        whole_one,
        type(known._module_info)(nn.Module(), "weight"),
        known.mesh_info,
        known.post_forward_mesh_info,
        known.device,
        functools.partial(_placement, known.fsdp_placement),
        known.mp_policy,
        group.offload_policy,
    )
    new = {name: held for name, held in vars(made).items() if name not in STAYING}
    gone = {name for name in kept if name.startswith("_unsharded_") and name not in new}
    put(p, made.sharded_param.detach())
    for name in gone:
        del vars(known)[name]
    vars(known).update(new, sharded_param=p)
    return functools.partial(_resize_back, p, before, known, kept)


def _placement(placement: Any, _: Any) -> Any:
    return placement


def _resize_back(p: Any, before: Any, known: Any, kept: dict[str, Any]) -> None:
    put(p, before)
    _know_again(known, kept)


def _know_again(known: Any, kept: dict[str, Any]) -> None:
    vars(known).clear()
    vars(known).update(kept)


def shape_of(tensor: Any) -> Callable[[], None]:
    """What gives a spread tensor the shape of now again, and what it holds now."""
    if not is_spread(tensor):
        return lambda: None
    kept = tensor.detach()
    return lambda: None if tensor.shape == kept.shape else put(tensor, kept)


def shapes_of(unit: Any) -> Callable[[], None]:
    """What lets a unit gather its parameters in the shapes of now again; the parameters themselves are left alone."""
    if not is_unit(unit):
        return lambda: None
    held = [(known, dict(vars(known))) for group in _state(unit)._fsdp_param_groups for known in group.fsdp_params]

    def back() -> None:
        for known, kept in held:
            if vars(known)["_orig_size"] != kept["_orig_size"]:
                late = {name: value for name, value in vars(known).items() if name in OF_DTYPES and name not in kept}
                _know_again(known, {**kept, **late})

    return back


def put(p: Any, value: Any) -> None:
    """Let a DTensor hold what another one holds, in its shape."""
    p.data = value
    p._local_tensor, p._spec = value._local_tensor, value._spec


def copy_plainly(block: nn.Module, memo: dict[int, Any]) -> None:
    """Let a deepcopy of a sharded block become one of plain tensors. Every rank must call it.

    Args:
        block: whose parameters are gathered, one by one, in order.
        memo: of the deepcopy; gets what stands in the copy for what is sharded.
    """
    for p in block.parameters():
        if is_spread(p) and id(p) not in memo:
            memo[id(p)] = nn.Parameter(whole(p.detach()).clone(), requires_grad=p.requires_grad)
    modules = list(block.modules())
    memo.update((id(hook), hook) for module in modules for _, _, hook in _their_hooks(module))
    for module in reversed(modules):
        if is_unit(module) and id(module) not in memo:
            memo[id(module)] = twin = object.__new__(_original(type(module)))
            own = {name: value for name, value in vars(module).items() if not _theirs(name)}
            own.pop("_compiled_call_impl", None)  # it calls the original
            vars(twin).update(copy.deepcopy(own, memo))


def unmark(block: nn.Module) -> None:
    """Take from a plain copy what FSDP2 has hung on the modules of the original."""
    for module in block.modules() if FSDP in sys.modules else ():
        for name in [name for name in module.__dict__ if _theirs(name)]:
            del module.__dict__[name]
        for hooks, key, _ in list(_their_hooks(module)):
            del module.__dict__[hooks][key]
            for flags in ("_with_kwargs", "_always_called"):
                module.__dict__.get(hooks + flags, {}).pop(key, None)


def _theirs(name: str) -> bool:
    return name in MARKS or name.startswith(COMPOSED)


def _their_hooks(module: nn.Module) -> Iterator[tuple[str, int, Any]]:
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


def _original(kind: type) -> type:
    """The user's class of a unit."""
    names = [base.__name__ for base in kind.__mro__]
    return kind.__mro__[names.index("FSDPModule") + 1]


def shard_like(block: nn.Module, beside: str, root: nn.Module) -> dict[int, nn.Parameter]:
    """Shard a plain block on the mesh, and with the policies, of what stands beside it.

    Args:
        block: new; every rank holds the same values.
        beside: path of a block of the sharded network; where it is no unit, the policies are those of the unit around.
        root: the sharded network.

    Returns:
        The sharded parameter for each plain one, by ``id`` of the latter.
    """
    from torch.distributed.fsdp import fully_shard

    before, neighbour = named_parameters(block), module_at(root, beside)
    taken = {p for p in before.values() if is_spread(p)} or None  # over from what it replaces
    around = beside
    while around and not is_unit(module_at(root, around)):
        around = around.rpartition(".")[0]
    own, like = named_modules(block), units(neighbour) if is_unit(neighbour) else {"": module_at(root, around)}
    alike = [path for path in like if not path or type(own.get(path)) is _original(type(like[path]))]
    for path in reversed(alike):  # what is inside first
        mesh, policies = policies_of(like[path], root)
        placing = _placing(own[path], neighbour, path)
        fully_shard(own[path], mesh=mesh, shard_placement_fn=placing, ignored_params=taken, **policies)
    after = named_parameters(block)
    return {id(p): after[name] for name, p in before.items()}


def policies_of(unit: Any, root: nn.Module) -> tuple[Any, dict[str, Any]]:
    """The mesh of a unit, and the options with which another one is sharded alike."""
    state = _state(unit)
    groups = (
        state._fsdp_param_groups
        or _state(root)._fsdp_param_groups
        or [group for one in states(root) for group in one._fsdp_param_groups]
    )
    group = groups[0]
    after = group.post_forward_mesh_info
    reshard: Any = after is not None if after is None or after is group.mesh_info else after.shard_mesh_size
    policies = {
        "reshard_after_forward": None if state._auto_reshard_after_forward else reshard,
        "mp_policy": group.mp_policy,
        "offload_policy": group.offload_policy,
    }
    return group.mesh_info.mesh, policies


def _placing(block: nn.Module, neighbour: nn.Module, path: str) -> Any:
    """Along which axis each parameter of a block is sharded: as the neighbour's of the same name; else the first."""
    theirs: dict[str, Any] = named_parameters(neighbour.get_submodule(path)) if is_unit(neighbour) else {}
    placed = {
        id(p): theirs[n] for n, p in named_parameters(block).items() if n in theirs and theirs[n].dim() == p.dim()
    }
    return lambda p: placed[id(p)].placements[-1] if id(p) in placed else None
