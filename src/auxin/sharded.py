"""FSDP2 (``fully_shard``): how a network is sharded, a block in plain tensors, a new one sharded as its neighbour is.

What that needs of torch's private parts is in ``fsdp2.py``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError
from auxin.fsdp2 import (
    FSDP,
    bring_to_rest,
    can_be_root,
    computing_dtypes,
    holders,
    is_mark,
    is_unit,
    mesh_of,
    missing,
    policies_of,
    put,
    reduces_gradients,
    run_again,
    shares_its_state,
    their_hooks,
    units,
    unreduced_gradients,
)
from auxin.listing import module_at, named_modules, named_parameters

AT_A_CHECKPOINT = (
    "Grow between two jobs: save, build the plain network in one process, load, grow and save it there, and shard the "
    "grown one."
)


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
        if shares_its_state(unit):
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
        own = mesh_of(known[id(p)]) if id(p) in known else None
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


def why_not_now(model: nn.Module) -> str | None:
    """The reason why a sharded network must not be changed at this moment, or None."""
    for path, unit in units(model).items():
        if not reduces_gradients(unit):
            return (
                f"{path or 'the model'} does not reduce its gradients (set_requires_gradient_sync(False)); grow after "
                "set_requires_gradient_sync(True) and the optimizer step"
            )
    return unreduced(model)


def unreduced(model: nn.Module) -> str | None:
    """In words, that units hold gradients which ranks have not summed up yet; they are no ``grad`` of a parameter."""
    for path, unit in units(model).items():
        if unreduced_gradients(unit):
            return (
                f"{path or 'the model'} holds gradients from while set_requires_gradient_sync or "
                "set_requires_all_reduce was False, which ranks have not summed up yet and zero_grad does not "
                "reach; go on with a backward under True and the optimizer step first"
            )
    return None


def computed_in(model: nn.Module) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtype in which a mixed-precision policy lets units compute, and that of their weights; None without one."""
    for unit in units(model).values():
        own = next((p.dtype for p in unit.parameters() if p.is_floating_point()), None)
        for dtype in computing_dtypes(unit):
            if own not in (None, dtype):
                return dtype, own
    return None


def settle(model: nn.Module) -> None:
    """Bring a sharded network to rest between two steps: no unit holds full parameters, all belong to one root.

    A forward without a backward leaves full parameters in the root, which are no parameters of the optimizer.
    """
    found = units(model)
    if found and is_unit(model) and can_be_root(model):
        bring_to_rest(model)
        return
    for unit in found.values():
        unit.reshard()


def shape_of(tensor: Any) -> Callable[[], None]:
    """What gives a spread tensor the shape of now again, and what it holds now."""
    if not is_spread(tensor):
        return lambda: None
    kept = tensor.detach()
    return lambda: None if tensor.shape == kept.shape else put(tensor, kept)


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
    memo.update((id(hook), hook) for module in modules for _, _, hook in their_hooks(module))
    for module in reversed(modules):
        if is_unit(module) and id(module) not in memo:
            memo[id(module)] = twin = object.__new__(_original(type(module)))
            own = {name: value for name, value in vars(module).items() if not is_mark(name)}
            own.pop("_compiled_call_impl", None)  # it calls the original
            vars(twin).update(copy.deepcopy(own, memo))


def unmark(block: nn.Module, kept: Collection[int] = ()) -> None:
    """Take from a plain copy what FSDP2 has hung on the modules of the original, but for those of the ids ``kept``."""
    for module in block.modules() if FSDP in sys.modules else ():
        if id(module) in kept:
            continue
        for name in [name for name in module.__dict__ if is_mark(name)]:
            del module.__dict__[name]
        for hooks, key, _ in list(their_hooks(module)):
            del module.__dict__[hooks][key]
            for flags in ("_with_kwargs", "_always_called"):
                module.__dict__.get(hooks + flags, {}).pop(key, None)


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


def pass_again(block: nn.Module, of: nn.Module) -> None:
    """Let a plain copy of a block, which holds its very parameters, be gathered as it is: by its units, if any."""
    for path, unit in units(of).items():
        again = block.get_submodule(path)
        if not is_unit(again):  # else something outside holds it too
            run_again(again, unit)


def _placing(block: nn.Module, neighbour: nn.Module, path: str) -> Any:
    """Along which axis each parameter of a block is sharded: as the neighbour's of the same name; else the first."""
    theirs: dict[str, Any] = named_parameters(neighbour.get_submodule(path)) if is_unit(neighbour) else {}
    placed = {
        id(p): theirs[n] for n, p in named_parameters(block).items() if n in theirs and theirs[n].dim() == p.dim()
    }
    return lambda p: placed[id(p)].placements[-1] if id(p) in placed else None
