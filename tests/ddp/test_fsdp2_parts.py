"""Parts of units under FSDP2: replaced, put in, taken out, run again; as one plain process does it and trains on."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import on_ranks
from ranked import Block, Net, batch, share, train_step
from test_fsdp2 import adam, held
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from under_fsdp import PROBE, assert_equal_to_one_process, full, same, set_up, shard, shards

import auxin as ax


class Gelu(Block):
    """A block that keeps all tensors of one of the others, and has one more layer."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.more = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.more(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


class Tailed(Net):
    """Blocks that are units, a list of blocks that are not, and a head of several layers."""

    def __init__(self, dim: int = 8, depth: int = 2):
        super().__init__(dim, depth)
        self.tail = nn.ModuleList(Block(dim) for _ in range(2))
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in (*self.blocks, *self.tail):
            x = block(x)
        return self.out(x)


LINEAR = functools.partial(nn.Linear, 8, 8)
EDITS = [
    ax.Replace("blocks.0", functools.partial(Gelu, 8)),  # a unit, which keeps six tensors
    ax.Replace("blocks.1", functools.partial(Block, 8)),  # all that it has
    ax.Replace("blocks.1.norm", functools.partial(nn.RMSNorm, 8)),  # a part of a unit, of which one tensor stays
    ax.Replace("blocks.0.norm", nn.Identity),
    ax.Replace("out.1", nn.PReLU),  # where nothing was gathered
    ax.Replace("inp", functools.partial(nn.Linear, 4, 8, bias=False)),
    ax.Insert("out", LINEAR, index=1),
    ax.Repeat("tail"),
    ax.Untie("tail"),
    ax.Remove("tail.0"),
]


def job(size: int) -> Any:
    torch.manual_seed(0)
    model, twin = Tailed(), Tailed()
    twin.load_state_dict(model.state_dict())
    average = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    if size > 1:
        shard(model)
        shard(average.module)
    optimizer = adam(model)
    words: Any = {"edits": EDITS, "when": lambda reading: False, "probe": PROBE, "keep": True}
    return model, optimizer, average, ax.Grower(model, optimizer, average, **words)


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
        if size > 1:
            before, moments, names = shards(model), held(optimizer), [*model.state_dict()]
            grower.grow(edit)
            grower.undo()
            assert same(before, shards(model)) and same(moments, held(optimizer)) and names == [*model.state_dict()]
        grower.grow(edit)
    for _ in range(10):
        step()
    ax.verify(model, optimizer, average)
    if size == 1:
        return losses, dict(model.named_parameters()), dict(average.module.named_parameters())
    set_up(model)
    set_up(average.module)
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].placements == p.placements
    with torch.no_grad():
        model(PROBE)  # leaves the root with all of its tensors; its state_dict holds shards nevertheless
    found = model.state_dict()
    assert all(hasattr(tensor, "full_tensor") for tensor in found.values())
    ax.save(grower, path)
    resumed, _, _, other = job(size)
    ax.load(path, other)
    assert same(shards(resumed), shards(model))
    set_up(resumed)
    expected = model(PROBE)
    model.load_state_dict({name: tensor.clone() for name, tensor in found.items()}, assign=True)
    assert torch.equal(model(PROBE), expected)
    return losses, full(resumed), full(average.module)


def in_one_unit(rank: int) -> Any:
    """Passes of a block, made before ``fully_shard``, in one unit with it."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Net(depth=2)
    ax.grow(model, ax.Repeat("blocks"), probe=PROBE)
    for block, again in zip(model.blocks[:2], model.blocks[2:], strict=True):
        fully_shard([block, again])
    fully_shard(model)
    optimizer = adam(model)
    with pytest.raises(ax.GrowthError) as error:
        ax.grow(model, ax.Untie("blocks"), optimizer, probe=PROBE)
    losses = [train_step(model, optimizer, *share(step, rank, 2)) for step in range(20)]
    return losses, full(model), str(error.value)


def test_passes_that_are_made_before_the_network_is_sharded() -> None:
    torch.manual_seed(0)
    model = Net(depth=2)
    ax.grow(model, ax.Repeat("blocks"), probe=PROBE)
    optimizer = adam(model)
    expected = [train_step(model, optimizer, *batch(step)) for step in range(20)]
    found = on_ranks(2, in_one_unit)
    mean = torch.tensor([losses for losses, *_ in found]).mean(0)
    assert float((mean - torch.tensor(expected)).abs().max()) <= 1e-6
    for _, tensors, text in found:
        assert max(float((tensors[name] - p.detach()).abs().max()) for name, p in model.named_parameters()) <= 1e-6
        assert "blocks.0 shares its FSDP2 state with another module" in text


def test_parts_train_as_in_one_process(tmp_path: Path) -> None:
    expected, *tensors = trained(0, 1, "")
    found = on_ranks(2, trained, 2, str(tmp_path), timeout=300)
    assert len(expected) == 30
    assert_equal_to_one_process(found, expected, *tensors)
