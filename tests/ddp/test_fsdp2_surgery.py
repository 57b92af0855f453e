"""Surgery on a network under FSDP2: plain modules are put in by any code, and all goes on as in one plain process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import on_ranks
from ranked import Block, share, train_step
from test_fsdp2 import adam, held
from test_fsdp2_passes import job, known
from torch import Tensor, nn
from under_fsdp import PROBE, assert_equal_to_one_process, built, full, same, set_up, shards

import auxin as ax
from auxin.structure_history import StructureHistory


class Around(nn.Module):
    """An old block, and something new behind it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def whole(tensor: Any) -> Tensor:
    return getattr(tensor, "full_tensor", lambda: tensor)()


def block_more(model: Any) -> None:
    block = Block(8)
    nn.init.zeros_(block.down.weight)
    nn.init.zeros_(block.down.bias)
    model.blocks.append(block)


def wider(model: Any) -> None:
    """By hand, two layers of a unit; their old entries are known by their values."""
    old, up, down = model.blocks[0], nn.Linear(8, 20), nn.Linear(20, 8)
    up.weight[:16], up.bias[:16] = whole(old.up.weight), whole(old.up.bias)
    down.weight[:, :16], down.weight[:, 16:] = whole(old.down.weight), 0
    down.bias.copy_(whole(old.down.bias))
    old.up, old.down = up, down


def longer(model: Any) -> None:
    model.inp = nn.Sequential(model.inp, nn.Linear(8, 8))


def shorter(model: Any) -> None:
    del model.blocks[1]


def copied(model: Any) -> None:
    twin = Block(8)
    twin.load_state_dict({name: whole(tensor) for name, tensor in model.blocks[1].state_dict().items()})
    model.blocks.insert(1, twin)


def wrapped(model: Any) -> None:
    model.blocks[0] = Around(model.blocks[0])


def frozen(model: Any) -> None:
    model.inp[0].weight.requires_grad_(False)


OPERATIONS = (block_more, wider, longer, shorter, copied, wrapped, frozen)


def there_and_back(model: Any, optimizer: Any, grower: Any, operation: Any) -> None:
    """What is raised inside, and a way back over the surgery, leave all as it was."""
    before, moments, names = shards(model), held(optimizer), [*model.state_dict()]
    state = grower.state_dict()
    for raises in (True, False):
        with pytest.raises(ZeroDivisionError) if raises else grower.surgery():
            if raises:
                with grower.surgery(), torch.no_grad():
                    operation(model)
                    1 / 0  # noqa: B018
            else:
                operation(model)
        grower.go_to(state, allow=[Around])
        assert same(before, shards(model)) and same(moments, held(optimizer)) and names == [*model.state_dict()]
        assert all(p.requires_grad for p in model.parameters())


def trained(rank: int, size: int, path: str) -> Any:
    model, optimizer, average, grower = job(size)
    grower.history, losses = StructureHistory(), []

    def steps(count: int) -> None:
        for _ in range(count):
            losses.append(train_step(model, optimizer, *share(len(losses), rank, size)))
            average.update_parameters(model)

    for operation in OPERATIONS:
        steps(2)
        with torch.no_grad():
            if size > 1 and operation in (shorter, wrapped, frozen):
                there_and_back(model, optimizer, grower, operation)
            with grower.surgery():
                operation(model)
        if size > 1 and operation not in (wrapped, frozen):  # an old block in a new one is a unit in a unit
            known(model)
            known(average.module)
    steps(4)
    ax.verify(model, optimizer, average)
    if size == 1:
        return losses, dict(model.named_parameters()), dict(average.module.named_parameters())
    ax.save(grower, path)
    resumed, other_optimizer, _, other = job(size)
    ax.load(path, other, allow=[Around])
    assert same(shards(resumed), shards(model)) and same(held(other_optimizer), held(optimizer))
    return losses, full(resumed), full(average.module)


def test_any_code_grows_a_sharded_network_as_it_does_a_plain_one(tmp_path: Path) -> None:
    expected, *tensors = trained(0, 1, "")
    found = on_ranks(2, trained, 2, str(tmp_path), timeout=300)
    assert len(expected) == 18
    assert_equal_to_one_process(found, expected, *tensors)


def refusals(rank: int, model: Any) -> Iterator[tuple[str, Any]]:
    from torch.distributed.fsdp import fully_shard

    block = model.blocks[0]
    yield "resized", lambda: setattr(block.up.weight, "data", torch.cat([block.up.weight.data] * 2))
    yield "alone", lambda: setattr(block.up, "weight", nn.Parameter(torch.zeros(16, 8)))
    yield "sharded", lambda: model.blocks.append(fully_shard(Block(8)))
    yield "other", lambda: model.blocks.append(Block(8) if rank else nn.Linear(8, 8))
    yield "one", lambda: 1 // rank


def said(rank: int) -> dict[str, str]:
    model = built()
    optimizer, texts = adam(model), {}
    for name, call in refusals(rank, model):
        train_step(model, optimizer, *share(0, rank, 2))
        optimizer.zero_grad()
        before, moments = shards(model), held(optimizer)
        with pytest.raises(Exception) as error, ax.surgery(model, optimizer, probe=PROBE):
            call()
        assert same(before, shards(model)) and same(moments, held(optimizer)), name
        set_up(model)
        texts[name] = str(error.value)
    with ax.surgery(model, optimizer, probe=PROBE) as done, torch.no_grad():
        model.blocks[1].down.weight.zero_()
    texts["written"] = str(done.change)
    with ax.surgery(model, optimizer, probe=PROBE):
        model.blocks.append(Block(8))
        nn.init.constant_(model.blocks[2].down.bias, float(rank))  # every rank is given what rank 0 has
    texts["bias"] = str(full(model)["blocks.2.down.bias"].unique().tolist())
    return texts


def test_what_surgery_cannot_follow_there_is_refused_by_name_on_every_rank() -> None:
    first, second = on_ranks(2, said, timeout=120)
    for texts in (first, second):
        assert "surgery: blocks.0.up.weight has another shape than before, which is not done under" in texts["resized"]
        assert "replaces single tensors, which is not done under FSDP2" in texts["alone"]
        assert "blocks.2.norm.weight is new, and sharded already (fully_shard inside the block?)" in texts["sharded"]
        assert "rank 0" in texts["other"] and "rank 1" in texts["other"] and "blocks.2.weight" in texts["other"]
        assert "blocks.1.down.weight holds other values: its states, and averages, keep theirs" in texts["written"]
        assert texts["bias"] == "[0.0]"
    assert "by zero" in first["one"] and "rank 0: ZeroDivisionError" in second["one"]
