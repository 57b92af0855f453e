"""A start that looks at output gradients, and several edits at once, on two ranks with data of their own."""

from typing import Any

import torch
from processes import on_ranks
from ranked import Block, Net, assert_ranks_equal, share, train_step, wrapped
from torch import nn
from torch.nn.functional import mse_loss

import auxin as ax
from auxin.journal import replay

PROBE = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return mse_loss(model(batch[0]), batch[1])


def wide_block() -> Block:
    return Block(8)


def against(block: Block, site: ax.init.InitSite) -> None:
    """The last layer of a block starts as a step against the gradient, which differs from rank to rank."""
    gradient, value = site.output_gradients[0], site.values[0]
    with torch.no_grad():
        block.down.weight.zero_()
        block.down.weight[:, :8] = -0.1 * gradient.T @ value
        block.down.bias.zero_()


EDITS = [
    ax.Insert("blocks", wide_block, init=against),
    ax.Duplicate("blocks", order=[0, 0, 1], content="fresh", output="keep", init=against),
    ax.After("inp"),
]


def grown(rank: int, edits: Any) -> tuple[list[Any], list[str], list[Any]]:
    model = wrapped(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    evidence = ax.Evidence(loss, [share(100, rank, 2)])
    grower = ax.Grower(model, optimizer, edits=[edits], when=ax.when.at([1]), probe=PROBE, evidence=evidence)
    train_step(model, optimizer, *share(0, rank, 2))
    optimizer.zero_grad()
    change = grower.step(1.0)
    assert change is not None
    assert_ranks_equal(model)
    weights = [p.detach().clone() for p in change.parameters]
    for step in range(1, 4):
        train_step(model, optimizer, *share(step, rank, 2))
        assert_ranks_equal(model)
    grower.verify()
    return weights, [name for name, _ in model.module.named_parameters()], grower.journal.to_json()


def test_ranks_with_other_data_start_with_the_values_of_rank_0_and_stay_equal() -> None:
    (first, names, journal), (second, _, _) = on_ranks(2, grown, EDITS[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(w.any() for w in first)
    twin = Net()
    replay(twin, journal, allow=[wide_block, against])
    assert [name for name, _ in twin.named_parameters()] == names


def test_several_edits_at_once() -> None:
    (first, names, journal), (second, _, _) = on_ranks(2, grown, EDITS)
    assert len(journal) == 1 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    twin = Net()
    replay(twin, journal, allow=[wide_block, against])
    assert [name for name, _ in twin.named_parameters()] == names


def one_refuses(rank: int) -> str:
    model = wrapped(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_step(model, optimizer, *share(0, rank, 2))
    optimizer.zero_grad()
    names = [name for name, _ in model.named_parameters()]
    edits = [ax.Duplicate("blocks", by=1), ax.Insert("blocks", wide_block, init=silent if rank else against)]
    try:
        ax.grow(model, edits, optimizer, probe=PROBE)
    except ax.GrowthError as error:
        assert [name for name, _ in model.named_parameters()] == names
        train_step(model, optimizer, *share(1, rank, 2))
        assert_ranks_equal(model)
        return str(error)
    return ""


def silent(block: Block) -> None:
    """Another start than the other rank's."""


def test_lists_that_differ_between_ranks_are_refused_on_both() -> None:
    first, second = on_ranks(2, one_refuses)
    assert first == second and "the ranks differ" in first and "silent" in first and "against" in first
