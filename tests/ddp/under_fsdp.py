"""Networks under FSDP2 for the tests: built as on every rank, and read in full."""

from typing import Any

import torch
import torch.distributed as dist
from ranked import Net

PROBE = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def built(depth: int = 2, build: Any = Net, **policies: Any) -> Any:
    """A network of one seed, each block and then the whole sharded over all ranks."""
    torch.manual_seed(0)
    return shard(build(depth=depth), **policies)


def shard(model: Any, replicas: int = 1, **policies: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **policies)
    return fully_shard(model, mesh=mesh, **policies)


def plain(depth: int = 2) -> Any:
    """The same in one process."""
    torch.manual_seed(0)
    return Net(depth=depth)


def full(model: Any) -> dict[str, torch.Tensor]:
    """All of each parameter; every rank calls it."""
    model.reshard()
    return {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}


def shards(model: Any) -> dict[str, torch.Tensor]:
    model.reshard()
    return {name: p.detach().to_local().clone() for name, p in model.named_parameters()}


def set_up(model: Any) -> None:
    """One root over all units, one communication context, and each block reshards after its forward."""
    from torch.distributed.fsdp import FSDPModule

    model(PROBE)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    states = list(dict.fromkeys(unit._get_fsdp_state() for unit in units))  # passes of a unit have one
    root = model._get_fsdp_state()
    assert len(units) == 1 + len(model.blocks)
    assert root._is_root and [state._is_root for state in states] == [True] + [False] * (len(states) - 1)
    assert [id(state) for state in root._state_ctx.all_states] == list(map(id, states))
    assert (
        {id(state._comm_ctx) for state in states}
        == {id(root._comm_ctx)}
        == {id(group.comm_ctx) for state in states for group in state._fsdp_param_groups}
    )
    for state in states[1:]:
        assert state._fsdp_param_groups[0].post_forward_mesh_info is not None
    for block in model.blocks:
        assert all(hasattr(p, "full_tensor") for p in block.parameters())
    model.reshard()


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_equal_to_one_process(found: Any, losses: list[float], *tensors: dict[str, torch.Tensor]) -> None:
    """What each rank returned, to 1e-6: the mean of their losses, and all of each parameter on every one of them."""
    mean = torch.tensor([own for own, *_ in found]).mean(0)
    assert float((mean - torch.tensor(losses)).abs().max()) <= 1e-6
    for _, *own in found:
        for ours, theirs in zip(own, tensors, strict=True):
            assert ours.keys() == theirs.keys()
            assert max(float((ours[name] - p.detach()).abs().max()) for name, p in theirs.items()) <= 1e-6
