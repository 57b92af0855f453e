"""Races, looks and ``auto`` on two ranks: each on its own batches, one decision for both."""

from typing import Any

import pytest
import torch
from processes import on_ranks
from ranked import Net, assert_ranks_equal, share, train_step, values, wrapped
from torch import nn
from torch.nn import functional as F

import auxin as ax
from auxin.ledger import flops_of

PROBE = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
EDITS = [ax.Widen("blocks.*.up", by=16), ax.Duplicate("blocks", by=1), ax.Widen("inp", by=8)]


def loss(model: nn.Module, data: Any) -> torch.Tensor:
    return F.mse_loss(model(data[0]), data[1])


def evidence(rank: int, size: int, skew: float = 0.0) -> ax.Evidence:
    """A rank's part of the batches; ``skew``: what is added to the targets of rank 0's validation data."""
    held_out = [share(100 + n, rank, size) for n in range(10)]
    held_out = [(x, y + skew * (rank == 0)) for x, y in held_out]
    return ax.Evidence(loss, [share(n, rank, size) for n in range(12)], validation=held_out)


def setting(rank: int, size: int = 2, build: Any = Net, **options: Any) -> tuple[Any, Any, Any]:
    model: Any = wrapped(rank, build) if size > 1 else build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    given = {"edits": EDITS, "when": ax.when.at([1]), "probe": PROBE, "evidence": evidence(rank, size), **options}
    return model, optimizer, ax.Grower(model, optimizer, **given)


def raced(rank: int, size: int = 2) -> Any:
    model, optimizer, grower = setting(rank, size)
    if size == 1:  # as rank 0 of the two has built it
        torch.manual_seed(0)
        model.load_state_dict(Net().state_dict())
    race = grower.race(EDITS, steps=20, shrink=0.02, sure=1.0)
    grower.verify()
    train_step(model, optimizer, *share(50, rank, size))  # the wrapper synchronises what has grown
    if size > 1:
        assert_ranks_equal(model)
    scores = [(branch.score, len(branch.losses)) for branch in race.branches]
    return race.winner, scores, values(*model.parameters()), dict(grower.ledger.flops)


def test_a_race_of_two_ranks_is_that_of_one_process_on_all_of_the_data() -> None:
    """A mean over equal shares is the mean over the whole batch: weights, scores and winner agree to rounding."""
    one, other = on_ranks(2, raced)
    assert one[0] == other[0] > 0 and one[1] == other[1] and torch.equal(one[2], other[2]) and one[3] == other[3]
    torch.manual_seed(0)
    winner, scores, weights, _ = raced(0, 1)
    assert winner == one[0] and torch.allclose(weights, one[2], atol=1e-5)
    assert [count for _, count in one[1]] == [2 * count for _, count in scores]
    print("scores on two ranks and on one:", [s for s, _ in one[1]], [s for s, _ in scores])
    for (mine, _), (theirs, _) in zip(one[1], scores, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def chosen(rank: int, name: str) -> Any:
    """One decision on data that the ranks judge differently."""
    choosers = {"race": ax.choose.by_race(least=10), "gain": ax.choose.by_gain(), "trial": ax.choose.by_trial(steps=8)}
    model, optimizer, grower = setting(rank, choose=choosers[name], evidence=evidence(rank, 2, skew=3.0))
    change = grower.step()
    grower.verify()
    train_step(model, optimizer, *share(50, rank, 2))
    assert_ranks_equal(model)
    options = grower.ledger.decisions[0].options
    return str(change and change.edit), [(one.predicted, one.obtained) for one in options]


@pytest.mark.parametrize("name", ["race", "gain", "trial"])
def test_every_rank_takes_the_same_decision_on_the_same_numbers(name: str) -> None:
    one, other = on_ranks(2, chosen, name)
    assert one == other and len(one[1]) >= len(EDITS)


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 1))


def by_itself(rank: int) -> Any:
    model = wrapped(rank, Small)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = ax.schedule.by_budget(optimizer)
    own = evidence(rank, 2)
    budget = 400 * flops_of(model.module, loss, own.batches[0])
    grower = ax.auto(model, optimizer, schedule, evidence=own, budget=budget)
    least = grower.train()
    assert_ranks_equal(model)
    grower.verify()
    return least, len(grower.journal), len(grower.races), grower.spent, model.module[0].out_features


def test_auto_runs_on_two_ranks() -> None:
    one, other = on_ranks(2, by_itself)
    print("validation loss, growths, races, spent, width:", one)
    assert one == other and one[2] > 0 and one[4] > 2


def a_branch_that_fails(rank: int) -> Any:
    """An edit that one rank alone cannot have is passed over by both, and the race goes on."""
    model, _, grower = setting(rank)
    probe = PROBE if rank == 0 else torch.randn(4, 5)
    grower.probe = probe
    race = grower.race([EDITS[1]], steps=3)
    assert_ranks_equal(model)
    return race.winner, [branch.why_not for branch in race.branches]


def test_what_one_rank_refuses_is_passed_over_on_both() -> None:
    for winner, (_, why_not) in on_ranks(2, a_branch_that_fails):
        assert winner == 0 and "rank 1" in why_not
