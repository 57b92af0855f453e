"""How far the loss rises in the 20 steps after a growth, over some seeds."""

import copy
import functools
import statistics

import pytest
import torch
from growing import Block, Net
from torch import nn

import auxin as ax

torch.set_num_threads(1)
AFTER = 20


def samples(generator, count, noise):
    x = torch.randn(count, 8, generator=generator)
    y = torch.sin(2 * x[:, :4]).sum(1, keepdim=True) + x[:, 4:5] * x[:, 5:6]
    return x, y + noise * torch.randn(count, 1, generator=generator)


def peaks(seed: int, stream: bool) -> tuple[float, float]:
    """Peak loss in the next 20 steps / loss before; a zero-init block is appended to a residual MLP under Adam.

    The first with the state of the optimizer kept, the second with a new optimizer, from the same moment on.
    ``stream``: fresh noisy batches every step, loss on held-out data. Else 256 noise-free samples again and again
    until they are almost learnt by heart, training loss.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Net(dim=32, depth=2, features=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    held_out = samples(generator, 512 if stream else 256, 0.3 if stream else 0.0)

    def step(model, optimizer, generator) -> None:
        x, y = samples(generator, 64, 0.3) if stream else held_out
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    def loss(model) -> float:
        with torch.no_grad():
            return nn.functional.mse_loss(model(held_out[0]), held_out[1]).item()

    for _ in range(500 if stream else 200):
        step(model, optimizer, generator)
    before = loss(model)
    optimizer.zero_grad()
    change = ax.grow(model, ax.Insert("blocks", functools.partial(Block, 32)), optimizer, probe=held_out[0])
    assert change.how == "last writers zero" and change.max_difference == 0.0
    other, again = copy.deepcopy(model), torch.Generator()
    again.set_state(generator.get_state())
    ways = (model, optimizer, generator), (other, torch.optim.Adam(other.parameters(), lr=1e-3), again)
    kept, fresh = (max(loss(way[0]) for _ in range(AFTER) if step(*way) is None) / before for way in ways)
    return kept, fresh


@pytest.mark.parametrize("seeds", [4, pytest.param(10, marks=pytest.mark.long)])
@pytest.mark.parametrize("task", ["stream", "learnt by heart"])
def test_the_loss_after_a_growth(task, seeds, record_property, capsys):
    """At most 1.2x on a stream; a network at almost no loss feels every new step, and a new optimizer is far worse."""
    kept, fresh = zip(*(peaks(seed, task == "stream") for seed in range(seeds)), strict=True)
    for name, values in (("state kept", kept), ("new optimizer", fresh)):
        record_property(name, statistics.median(values))
        with capsys.disabled():
            figures = f"median {statistics.median(values):.2f}, max {max(values):.2f}"
            print(f"\npeak loss in the next {AFTER} steps / loss before, {task}, {name}: {figures}", end="")
    assert statistics.median(fresh) > 1.2 * statistics.median(kept)
    if task == "stream":
        assert statistics.median(kept) <= 1.2
