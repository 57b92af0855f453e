"""Networks whose parameters are spread over ranks: refused by name, before anything is touched, with the way round."""

import sys
import types
import warnings
from typing import Any

import pytest
import torch
from processes import on_ranks
from ranked import Net
from torch import nn

import auxin as ax

ONE_MORE = ax.Duplicate("blocks", by=1)
PROBE = torch.randn(4, 4)


def sharded(kind: str) -> Any:
    """A network under one of them."""
    from torch.distributed.device_mesh import init_device_mesh

    warnings.simplefilter("ignore")
    model = Net(depth=2)
    if kind == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    if kind.startswith("FSDP2"):
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        if kind == "FSDP2 on two meshes":
            fully_shard(model.out, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")))
        if kind == "FSDP2 of replicas on some of the ranks":  # as between the stages of a pipeline
            names = ("stage", "replicate", "shard")
            mesh = init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=names)[names[1:]]
            return fully_shard(Net(), mesh=mesh)
        if kind == "FSDP2 and tensor parallel":
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

            mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
            plan = {"blocks.0.up": ColwiseParallel(), "blocks.0.down": RowwiseParallel()}
            return fully_shard(parallelize_module(Net(), mesh["tensor"], plan), mesh=mesh["data"])
        if kind == "FSDP2 with a plain tensor":
            return fully_shard(model, mesh=mesh, ignored_params={model.out.weight})
        if kind == "FSDP2 of two as one":
            fully_shard([model.inp, model.out], mesh=mesh)
        return model if kind == "FSDP2 of blocks" else fully_shard(model, mesh=mesh)
    if kind == "tensor parallel":
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        return parallelize_module(model, init_device_mesh("cpu", (2,)), {"blocks.0.up": ColwiseParallel()})
    if kind == "ZeRO 3":  # as deepspeed.zero.Init leaves it
        for p in model.parameters():
            p.ds_id, p.ds_status, p.data = 0, "NOT_AVAILABLE", torch.empty(0)
        return model
    if kind == "DeepSpeed":
        module = types.ModuleType("deepspeed.runtime.engine")
        engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": module.__name__})()
        sys.modules[module.__name__] = module
        engine.module = model
        return engine
    return nn.parallel.DistributedDataParallel(nn.Sequential(nn.parallel.DistributedDataParallel(model)))


def refusals(rank: int, kind: str) -> list[str]:
    model = sharded(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    before = [(name, id(p)) for name, p in model.named_parameters()], list(model.named_modules())
    texts = []
    for call in (
        lambda: ax.Grower(model, optimizer, edits=ONE_MORE, when=ax.when.every(1), probe=PROBE),
        lambda: ax.grow(model, ONE_MORE, optimizer, probe=PROBE),
        lambda: ax.surgery(model, optimizer).__enter__(),
        lambda: ax.verify(model, optimizer),
    ):
        with pytest.raises(ax.GrowthError) as error:
            call()
        texts.append(str(error.value))
    assert before == ([(name, id(p)) for name, p in model.named_parameters()], list(model.named_modules()))
    return texts


KINDS = {
    "FSDP1": "FSDP1 (FullyShardedDataParallel)",
    "FSDP2 of blocks": "blocks.0 is under FSDP2 (fully_shard), and inp.weight is not",
    "FSDP2 on two meshes": "out.weight lies on another device mesh",
    "FSDP2 of replicas on some of the ranks": "a mesh of 2 dimensions (HSDP) of 1 ranks, and the job has 2",
    "FSDP2 and tensor parallel": "blocks.0.up.weight is sharded over a mesh of 2 dimensions, and its FSDP2 unit over",
    "FSDP2 with a plain tensor": "out.weight is a plain tensor among the DTensors",
    "FSDP2 of two as one": "inp shares its FSDP2 state with another module",
    "tensor parallel": "blocks.0.up.weight is a DTensor (tensor parallel, by a plan of parallelize_module)",
    "ZeRO 3": "inp.weight is partitioned by DeepSpeed (ZeRO)",
    "DeepSpeed": "a DeepSpeedEngine",
    "inner": "0 is a DistributedDataParallel inside of the network",
}


WAYS = {
    "inner": "wrap the whole network in one",
    "FSDP2 of blocks": "Call fully_shard(model) on the whole network",
    "FSDP2 with a plain tensor": "Call fully_shard(model) on the whole network",
}


def all_refusals(rank: int) -> dict[str, list[str]]:
    return {kind: refusals(rank, kind) for kind in KINDS}


def test_sharded_networks_are_refused_by_name() -> None:
    for found in on_ranks(2, all_refusals):
        for kind, name in KINDS.items():
            assert len(found[kind]) == 4
            for text in found[kind]:
                assert name in text, kind
                assert WAYS.get(kind, "save, build the plain network") in text


def sharded_optimizer(rank: int) -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(Net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-2)
    with pytest.raises(ax.GrowthError) as error:
        ax.Grower(model, optimizer, edits=ONE_MORE, when=ax.when.every(1), probe=PROBE)
    return str(error.value)


def test_an_optimizer_whose_state_is_spread_is_refused() -> None:
    for text in on_ranks(2, sharded_optimizer):
        assert "Use the optimizer that it shards" in text and "like=" not in text
