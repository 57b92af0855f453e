"""``param_names`` of an optimizer that was given ``named_parameters()`` follow the network's names."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import auxin as ax

torch.set_num_threads(1)
INSERTED = "._checkpoint_wrapped_module"
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def named(model, bare):
    return [(name.replace(INSERTED, "") if bare else name, p) for name, p in model.named_parameters()]


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("order", [[0, 0, 1], [0, 1, 1]])
def test_names_with_and_without_what_checkpointing_inserts(bare, order):
    """torchtitan leaves it out of its optimizers and of its checkpoints."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(checkpoint_wrapper(Block()) for _ in range(2))))
    optimizer = torch.optim.AdamW(named(model, bare))
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ax.grow(model, ax.Duplicate("1", order=order), optimizer, probe=X)
        order = [*order, len(order) - 1]
        (group,) = optimizer.param_groups
        held = dict(zip(group["param_names"], map(id, group["params"]), strict=True))
        assert held == {name: id(p) for name, p in named(model, bare)}
    assert any(INSERTED in name for name in held) is not bare
