"""Warm-up, stable, decay: the curve, what starts the decay, and that it goes on exactly after anything."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import auxin as ax


class Stub:
    """As much of a grower as a schedule looks at."""

    def __init__(self, done):
        self.done = done


X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.out = nn.Linear(8, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def sgd(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in rates or (1.0,)])


def go(schedule, steps: int) -> list[float]:
    """The rates of the next steps, of the first group."""
    rates = []
    for _ in range(steps):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


def test_the_curve_with_a_total():
    rates = go(ax.schedule.wsd(sgd(2.0), warmup=4, decay=5, total=12), 15)
    assert rates == pytest.approx([0.5, 1, 1.5, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4, 0, 0, 0])


@pytest.mark.parametrize(
    ("shape", "over"),
    [
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("sqrt", lambda p: 1 - math.sqrt(p)),
    ],
)
def test_shapes_run_from_one_to_final(shape, over):
    rates = go(ax.schedule.wsd(sgd(), warmup=0, decay=10, total=10, final=0.1, shape=shape), 12)
    assert rates[:11] == pytest.approx([0.1 + 0.9 * over(k / 10) for k in range(11)])
    assert rates[0] == 1 and rates[11] == pytest.approx(0.1)


def test_every_group_keeps_its_own_rate():
    optimizer = sgd(1.0, 0.1)
    schedule = ax.schedule.wsd(optimizer, warmup=2, decay=2, total=4)
    go(schedule, 3)
    assert schedule.get_last_lr() == pytest.approx([0.5, 0.05])


def test_the_decay_starts_when_the_grower_is_done():
    grower = Stub(done=False)
    schedule = ax.schedule.wsd(sgd(), warmup=2, decay=4, grower=grower)
    assert go(schedule, 6) == [0.5, 1, 1, 1, 1, 1]
    grower.done = True
    assert go(schedule, 6) == [1, 0.75, 0.5, 0.25, 0, 0]


def test_a_grower_that_is_done_in_the_warm_up_waits_for_its_end():
    grower = Stub(done=True)
    assert go(ax.schedule.wsd(sgd(), 4, 2, grower=grower), 7) == [0.25, 0.5, 0.75, 1, 1, 0.5, 0]


def test_whichever_is_first_starts_the_decay():
    late, early = Stub(done=False), Stub(done=True)
    assert go(ax.schedule.wsd(sgd(), 0, 2, total=4, grower=late), 5) == [1, 1, 1, 0.5, 0]
    assert go(ax.schedule.wsd(sgd(), 0, 2, total=9, grower=early), 4) == [1, 0.5, 0, 0]


def test_a_grower_that_is_gone_is_done():
    grower = Stub(done=False)
    schedule = ax.schedule.wsd(sgd(), 0, 2, grower=grower)
    assert go(schedule, 2) == [1, 1]
    del grower
    assert go(schedule, 3) == [1, 0.5, 0]


def test_without_total_and_grower_it_begins_by_hand():
    schedule = ax.schedule.wsd(sgd(), 0, 2)
    assert go(schedule, 50) == [1] * 50
    schedule.begin_decay()
    schedule.begin_decay()
    assert go(schedule, 3) == [1, 0.5, 0]


def test_phases():
    schedule = ax.schedule.wsd(sgd(), warmup=3, decay=2, total=6)
    phases = []
    for _ in range(8):
        phases.append(schedule.phase)
        go(schedule, 1)
    assert phases == ["warmup"] * 2 + ["stable"] * 3 + ["decay"] * 3


def build(**options):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = ax.schedule.wsd(optimizer, warmup=5, decay=12, **options)
    words = {"edits": ax.Duplicate("blocks", by=1), "limit": ax.Limit(growths=2), "probe": X[:8]}
    grower = ax.Grower(model, optimizer, schedule, when=ax.when.every(8), **words)
    schedule.grower = grower
    return model, optimizer, schedule, grower


def train(run, steps: int) -> list[float]:
    model, optimizer, schedule, grower = run
    rates = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        grower.step(loss.item())
    return rates


def test_the_schedule_of_a_grower_made_after_it():
    run = build()
    rates = train(run, 35)
    assert len(run[0].blocks) == 3 and run[3].done  # grown at calls 8 and 16
    assert rates[4:17] == [1e-2] * 13 and rates[17] == pytest.approx(1e-2 * 11 / 12) and rates[-1] == 0


@pytest.mark.parametrize("saved", [3, 7, 12, 16, 17, 22, 29, 33])
def test_save_and_load_go_on_to_the_bit(tmp_path, saved):
    whole, first, second = build(), build(), build()
    expected = train(whole, 40)
    rates = train(first, saved)
    ax.save(first[3], tmp_path / "run")
    ax.load(tmp_path / "run", second[3])
    assert rates + train(second, 40 - saved) == expected
    assert vars(second[2])["decay_from"] == whole[2].decay_from == 16
    for old, new in zip(whole[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("saved", [2, 6, 9])
def test_its_own_state_dict_goes_on_too(saved):
    whole, first, second = (ax.schedule.wsd(sgd(0.3), 3, 4, total=10) for _ in range(3))
    expected, rates = go(whole, 13), go(first, saved)
    file = io.BytesIO()
    torch.save([first.state_dict(), first.optimizer.state_dict()], file)
    file.seek(0)
    state, of_optimizer = torch.load(file, weights_only=True)
    second.load_state_dict(state)
    second.optimizer.load_state_dict(of_optimizer)
    assert rates + go(second, 13 - saved) == expected


def test_a_group_of_its_own_follows_the_schedule():
    model, optimizer, schedule, grower = run = build()
    train(run, 3)
    optimizer.zero_grad()
    ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, schedule, probe=X[:8], group={"lr": 1e-3})
    schedule.grower = None
    schedule.begin_decay()
    seen = []
    for _ in range(20):
        optimizer.step()
        schedule.step()
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert len(seen[0]) == 2 and seen[-1] == [0, 0]
    assert all(own == pytest.approx(old / 10) for old, own in seen)


def test_trial_and_undo_put_the_schedule_back():
    run = build()
    model, optimizer, schedule, grower = run
    train(run, 10)
    before = schedule.state_dict()
    with grower.trial(ax.Duplicate("blocks", by=1)):
        schedule.begin_decay()
        train(run, 3)
        assert schedule.phase == "decay"
    assert schedule.state_dict() == before and schedule.grower is grower
    grower.grow(ax.Duplicate("blocks", by=1))
    assert grower.done
    grower.undo()
    assert schedule.state_dict() == before and not grower.done


def test_copies_and_pickles_hold_no_grower():
    run = build()
    train(run, 6)
    for twin in (copy.deepcopy(run[2]), pickle.loads(pickle.dumps(run[2]))):
        assert twin.grower is None and twin.state_dict() == run[2].state_dict()


def test_it_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(ax.schedule.wsd(sgd(), 3, 4, total=10), 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup": -1}, "wsd(warmup=-1): warmup takes whole numbers from 0."),
        ({"warmup": 2.0}, "wsd(warmup=2.0): warmup takes whole numbers from 0."),
        ({"decay": 0}, "wsd(decay=0): decay takes whole numbers from 1."),
        ({"decay": True}, "wsd(decay=True): decay takes whole numbers from 1."),
        ({"total": 0}, "wsd(total=0): total takes whole numbers from 1."),
        (
            {"total": 6},
            "wsd(warmup=3, decay=4, total=6): warm-up and decay together take 7 steps. Pass total=7 or more, or make "
            "them shorter.",
        ),
        ({"final": 1.0}, "wsd(final=1.0): final is a part of the stable learning rate, from 0 and below 1."),
        ({"final": math.nan}, "wsd(final=nan): final is a part of the stable learning rate, from 0 and below 1."),
        ({"shape": "exp"}, "wsd(shape='exp'): shape is 'linear', 'cosine' or 'sqrt'."),
        ({"grower": 3}, "wsd(grower=3): pass the Grower itself, or None."),
    ],
)
def test_wrong_arguments_are_explained_and_change_nothing(arguments, message):
    optimizer = sgd(0.3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ax.GrowthError) as raised:
        ax.schedule.wsd(optimizer, **{"warmup": 3, "decay": 4, **arguments})
    assert str(raised.value) == message
    assert optimizer.state_dict() == before


def test_the_state_of_another_scheduler_is_refused():
    optimizer = sgd()
    schedule = ax.schedule.wsd(optimizer, 3, 4)
    before = schedule.state_dict()
    other = torch.optim.lr_scheduler.StepLR(sgd(), 3)
    with pytest.raises(ax.GrowthError, match="it is another scheduler's"):
        schedule.load_state_dict(other.state_dict())
    assert schedule.state_dict() == before


def test_what_has_grown_last_may_settle():
    class Done:
        done = False

    optimizer, grower = torch.optim.SGD([torch.zeros(1)], lr=1.0), Done()
    schedule = ax.schedule.wsd(optimizer, warmup=0, decay=2, grower=grower, settle=3)
    rates = []
    for step in range(9):
        grower.done = step >= 2
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    early = ax.schedule.wsd(optimizer, warmup=0, decay=2, grower=grower, settle=50, total=6)
    rates = []
    for _ in range(7):
        rates.append(early.get_last_lr()[0])
        optimizer.step()
        early.step()
    assert rates == [rates[0]] * 5 + [rates[0] / 2, 0.0]
    with pytest.raises(ax.GrowthError, match="settle takes whole numbers"):
        ax.schedule.wsd(optimizer, warmup=0, decay=2, settle=-1)
