"""A block is appended at step 500 under Adam: it trains from the next step, and nothing else is held or lost."""

import functools
from collections import Counter

import pytest
import torch
from growing import Block, Net, batch, bits, train

import auxin as ax

torch.set_num_threads(1)


def at_step_500():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train(model, optimizer, 500)
    return model, optimizer


def test_by_hand_the_new_block_is_lost_and_verify_names_its_parameters():
    model, optimizer = at_step_500()
    model.blocks.append(Block())
    start = [bits(p) for p in model.blocks[2].parameters()]
    train(model, optimizer, 1)
    assert [bits(p) for p in model.blocks[2].parameters()] == start
    with pytest.raises(ax.GrowthError) as error:
        ax.verify(model, optimizer)
    for name, p in model.blocks[2].named_parameters():
        assert f"blocks.2.{name} {tuple(p.shape)} is in no optimizer" in str(error.value)
    assert "verify found 6 problems" in str(error.value)


@pytest.mark.parametrize("layer", [functools.partial(Block, 8), None], ids=["a new block", "a copy"])
def test_with_auxin_every_parameter_is_in_one_group_and_the_block_moves_at_once(layer):
    model, optimizer = at_step_500()
    old = {name: (p, {k: bits(v) for k, v in optimizer.state[p].items()}) for name, p in model.named_parameters()}
    edit = ax.Duplicate("blocks", by=1) if layer is None else ax.Insert("blocks", layer)
    ax.grow(model, edit, optimizer, probe=batch()[0])
    counts = Counter(id(p) for g in optimizer.param_groups for p in g["params"])
    assert counts == Counter({id(p): 1 for p in model.parameters() if p.requires_grad})
    for p, state in old.values():
        assert {k: bits(v) for k, v in optimizer.state[p].items()} == state
    start = [bits(p) for p in model.blocks[2].parameters()]
    train(model, optimizer, 1, seed=500)
    now = [bits(p) for p in model.blocks[2].parameters()]
    moved = [name for (name, _), a, b in zip(model.blocks[2].named_parameters(), start, now, strict=True) if a != b]
    assert moved == ["down.weight", "down.bias"]  # the last writers, which were zero, first
    train(model, optimizer, 1, seed=501)
    now = [bits(p) for p in model.blocks[2].parameters()]
    assert all(a != b for a, b in zip(start, now, strict=True))
    ax.verify(model, optimizer)
