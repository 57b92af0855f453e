"""Units under FSDP2 that run again with the same weights and get weights of their own: as in one plain process."""

import functools
from pathlib import Path
from typing import Any

import torch
from processes import on_ranks
from ranked import Block, Net, batch, share, train_step
from test_fsdp2 import adam, held
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from under_fsdp import PROBE, assert_equal_to_one_process, full, plain, same, set_up, shard, shards

import auxin as ax

EDITS = [
    ax.Repeat("blocks", blocks=(0, 2)),  # ABAB
    ax.Remove("blocks.0"),  # the pass that was there first; the weights stay with the other one
    ax.Widen("blocks.1.up", by=2),  # a unit with two passes, and one with one
    ax.Repeat("blocks", blocks=(1, 2), order="interleave", fade=3),  # a second pass of one that has none left
    ax.Insert("blocks", functools.partial(Block, 8), index=1),
    ax.Repeat("blocks", blocks=(0, 1), times=3),
    ax.Untie("blocks"),
]
TAKEN_BACK = (EDITS[0], EDITS[1], EDITS[6])


def job(size: int) -> Any:
    torch.manual_seed(0)
    model, twin = Net(depth=2), Net(depth=2)
    twin.load_state_dict(model.state_dict())
    average = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    if size > 1:
        shard(model)
        shard(average.module)
    optimizer = adam(model)
    words: Any = {"edits": EDITS, "when": lambda reading: False, "probe": PROBE, "keep": True}
    return model, optimizer, average, ax.Grower(model, optimizer, average, **words)


def known(model: Any) -> None:
    """The network is set up as one built so, and each unit knows its passes, and where each parameter stands."""
    from torch.distributed.fsdp import FSDPModule

    set_up(model)
    passes: dict[Any, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            passes.setdefault(module._get_fsdp_state(), []).append(module)
    parameters = []
    for state, modules in passes.items():
        (group,) = state._fsdp_param_groups
        assert list(group.modules) == list(state._modules) == modules
        for one in group.fsdp_params:
            parameters.append(one.sharded_param)
            info = one._module_info
            places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
            assert len(places) == len(modules)
            assert all(owner._parameters[name] is one.sharded_param for owner, name in places)
    assert sorted(map(id, parameters)) == sorted(map(id, model.parameters()))


def trained(rank: int, size: int, path: str) -> Any:
    """Losses, weights and averages over a growth each second step; what is taken back leaves all as it was."""
    model, optimizer, average, grower = job(size)
    losses = []

    def step() -> None:
        losses.append(train_step(model, optimizer, *share(len(losses), rank, size)))
        average.update_parameters(model)

    for edit in EDITS:
        step()
        step()
        if size > 1 and edit in TAKEN_BACK:
            before, moments, names = shards(model), held(optimizer), [*model.state_dict()]
            grower.grow(edit)
            grower.undo()
            assert same(before, shards(model)) and same(moments, held(optimizer)) and names == [*model.state_dict()]
            known(model)
            optimizer.zero_grad()
        grower.grow(edit)
        if size > 1:
            known(model)
            known(average.module)
        if size > 1 and edit is EDITS[5]:
            ax.save(grower, path)
            resumed, _, _, other = job(size)
            ax.load(path, other)
            assert same(shards(resumed), shards(model))
            known(resumed)
    for _ in range(6):
        step()
    ax.verify(model, optimizer, average)
    if size == 1:
        return losses, dict(model.named_parameters()), dict(average.module.named_parameters())
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].placements == p.placements
    return losses, full(model), full(average.module)


def test_passes_train_as_in_one_process(tmp_path: Path) -> None:
    expected, *tensors = trained(0, 1, "")
    found = on_ranks(2, trained, 2, str(tmp_path), timeout=300)
    assert len(expected) == 20
    assert_equal_to_one_process(found, expected, *tensors)


def around(kind: str, model: Any) -> Any:
    """Blocks in activation checkpoints, compiled, or units that hold units."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    if kind == "checkpointed":
        model.blocks = nn.ModuleList(map(checkpoint_wrapper, model.blocks))
    for block in model.blocks:
        if kind == "compiled":
            block.compile(backend="eager")
        if kind == "nested":
            fully_shard(block.up)
    policies = {"reshard_after_forward": False} if kind == "kept" else {}
    return shard(model, **policies)


KINDS = ("checkpointed", "compiled", "nested", "kept", "parts")


def repeated_and_untied(model: Any, batches: Any) -> list[float]:
    optimizer, losses = adam(model), []
    for edit in (None, ax.Repeat("blocks"), ax.Untie("blocks")):
        if edit is not None:
            ax.grow(model, edit, optimizer, probe=PROBE)
        losses += [train_step(model, optimizer, *batches(len(losses) + more)) for more in range(2)]
        optimizer.zero_grad()
    return losses


def of_every_kind(rank: int) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    from torch.distributed.fsdp import fully_shard

    found = {}
    for kind in KINDS:
        model = plain()
        if kind == "parts":  # the blocks are no units, and hold units
            for block in model.blocks:
                fully_shard(block.up)
            fully_shard(model)
        else:
            around(kind, model)
        losses = repeated_and_untied(model, lambda step: share(step, rank, 2))
        weights = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in full(model).items()}
        found[kind] = losses, weights
    return found


def test_passes_of_units_in_wrappers_of_units_in_units_and_of_other_policies() -> None:
    model = plain()
    expected = repeated_and_untied(model, batch)
    weights = dict(model.named_parameters())
    ranks = on_ranks(2, of_every_kind, timeout=300)
    for kind in KINDS:
        mean = torch.tensor([found[kind][0] for found in ranks]).mean(0)
        assert float((mean - torch.tensor(expected)).abs().max()) <= 1e-6, kind
        for found in ranks:
            tensors = found[kind][1]
            assert tensors.keys() == weights.keys(), kind
            assert max(float((tensors[name] - p.detach()).abs().max()) for name, p in weights.items()) <= 1e-6, kind
