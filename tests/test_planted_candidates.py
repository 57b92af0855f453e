"""A short branch picks the truly better of two planted candidates (P4)."""

import functools

import pytest
import torch
from torch import nn

import auxin as ax

WIDTH = 8


class Curved(nn.Module):
    """x + W tanh(V x): can learn what the data need."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Straight(nn.Module):
    """x + W V x: adds nothing that a linear network could not do already."""

    def __init__(self, hidden=32):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(x))


EDITS = [ax.Insert("", Straight, index=1), ax.Insert("", Curved, index=1)]


def run(seed):
    """A linear network, trained to its end on a task that bends."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(256, 4)
    y = torch.sin(2 * x @ torch.randn(4, 1)) + 0.1 * torch.randn(256, 1)
    batches = [(a, b) for a, b in zip(x.split(32), y.split(32), strict=True)]
    evidence = ax.Evidence(lambda net, batch: nn.functional.mse_loss(net(batch[0]), batch[1]), batches)
    grower = ax.Grower(model, optimizer, edits=EDITS, when=ax.when.every(10**6), probe=x[:8], evidence=evidence)
    train(model, optimizer, batches, 100)
    return grower, functools.partial(train, model, optimizer, batches)


def train(model, optimizer, batches, steps):
    for step in range(steps):
        a, b = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(a), b).backward()
        optimizer.step()


@functools.cache
def better(seed):
    """The edit with the lower loss after ten times as many steps as a branch has."""
    grower, go_on = run(seed)

    def long_run(edit):
        with grower.trial(edit):
            go_on(640)
            return float(grower.evidence.mean(grower.model))

    return min(EDITS, key=long_run)


CHOOSERS = {
    "by_trial": lambda: ax.choose.by_trial(steps=64),
    "by_gain per parameter": lambda: ax.choose.by_gain(per="parameter"),
    "by_gain per FLOP": lambda: ax.choose.by_gain(per="flop"),
}


@pytest.mark.parametrize("name", CHOOSERS)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seeds", [3, pytest.param(10, marks=pytest.mark.long)])
def test_p4_the_better_of_two_is_picked_in_nine_of_ten_seeds(seeds, name):
    right, chosen = 0, []
    for seed in range(seeds):
        truth, (grower, _) = better(seed), run(seed)
        before = {n: t.clone() for n, t in grower.model.state_dict().items()}
        picked = CHOOSERS[name]()(EDITS, grower)
        assert all(torch.equal(t, before[n]) for n, t in grower.model.state_dict().items())
        right += picked == truth
        chosen.append(EDITS.index(picked) if picked is not None else None)
    print(f"{name} picked the truly better one in {right} of {seeds} seeds: {chosen}")
    assert right >= 0.9 * seeds


MANY = [ax.Insert("", functools.partial(Straight, hidden), index=1) for hidden in (8, 12, 16, 20, 24, 28, 32)]
MANY.insert(3, EDITS[1])


def everything(grower):
    """All that a decision must leave as it was."""
    moments = [t.clone() for state in grower.optimizers[0].state.values() for t in state.values()]
    return [*(t.clone() for t in grower.model.state_dict().values()), *moments, torch.get_rng_state()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seeds", [2, pytest.param(10, marks=pytest.mark.long)])
def test_of_eight_the_planted_one_is_picked_by_halving(seeds):
    right = 0
    for seed in range(seeds):
        grower, _ = run(seed)
        before, choose = everything(grower), ax.choose.by_trial()
        right += choose(MANY, grower) == EDITS[1]
        assert all(map(torch.equal, before, everything(grower)))
        reasons = [score for _, score in choose.results if isinstance(score, str)]
        assert len(reasons) == 6 and all("behind after 64 of 128 steps" in why for why in reasons)
        assert choose.results[0][0] is None and isinstance(choose.results[0][1], float)
        assert grower.ledger.decisions[0].steps == 128
    print(f"the planted one of eight was picked in {right} of {seeds} seeds")
    assert right >= 0.9 * seeds
