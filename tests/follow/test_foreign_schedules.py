"""Schedules that are no LRScheduler of torch: an own group is refused unless they are seen to move its rate."""

import math

import pytest
import torch
from growing import Net, assert_same, batch, picture, train
from torch.optim.lr_scheduler import LRScheduler

import auxin as ax

EDIT = ax.Duplicate("blocks", by=1)


class Schedule:
    """Sets the rate of each group from what that had when this was built; ``step`` asks for the number of the step."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def factor(self, number):
        return 0.5 + 0.5 * math.cos(math.pi * min(number, 100) / 100)

    def step(self, number):
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=False):
            group["lr"] = rate * self.factor(number)


class InIntegers(Schedule):
    """Counts per group what is no rate."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.rates, self.seen = tuple(self.rates), [0] * len(self.rates)


class WithPeriods(Schedule):
    """Keeps per group what is a number, and no rate."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.periods = [20.0 for _ in self.rates]

    def step(self, number):
        for group, rate, period in zip(self.optimizer.param_groups, self.rates, self.periods, strict=False):
            group["lr"] = rate * 0.9 ** (number / period)


class Late(Schedule):
    """Stands still for thirty steps, as a schedule by epochs does."""

    def factor(self, number):
        return 0.1 ** (number // 30)


class Never(Schedule):
    def factor(self, number):
        return 1.0


class ByGroups(Schedule):
    """Moves all groups that the optimizer has by then."""

    def step(self, number=None):
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.9


class Strict(Schedule):
    def step(self, number):
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate / number


class AroundAnother(Schedule):
    """Drives one of torch, and leaves out of its own state what that has counted."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.by_metric = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)

    def step(self, number, metric=1.0):
        self.by_metric.step(metric)

    def state_dict(self):
        return {"best": self.by_metric.best}

    def load_state_dict(self, state):
        self.by_metric.best = state["best"]


def ready(kind):
    ax.follow(kind, like=LRScheduler)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    return model, optimizer, kind(optimizer)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (
            InIntegers,
            r"InIntegers would go on with the rates .* kept per group.*@auxin\.follow\(InIntegers\).*group=<index>",
        ),
        (WithPeriods, r"WithPeriods would go on with the rates .* kept per group that auxin does not know"),
        (
            Never,
            r"Never is not a scheduler of torch, and a copy of it has not moved the rate of group 0 within 1000 st",
        ),
    ],
)
def test_an_own_group_that_would_stand_still(kind, match):
    model, optimizer, schedule = ready(kind)
    before = picture(model, optimizer), list(schedule.rates)
    with pytest.raises(ax.GrowthError, match=match):
        ax.grow(model, EDIT, optimizer, schedule, probe=batch()[0], group={"lr": 0.05})
    assert_same(before[0], picture(model, optimizer))
    assert list(schedule.rates) == before[1]
    ax.grow(model, EDIT, optimizer, schedule, probe=batch()[0], group=0)  # the way round that it names
    ax.verify(model, optimizer, schedule)
    schedule.step(1)


@pytest.mark.parametrize("kind", [Schedule, Late, Strict])
def test_rates_in_a_list_of_any_name_get_one_more(kind):
    model, optimizer, schedule = ready(kind)
    options = {"when": ax.when.every(10**9), "probe": batch()[0], "group": {"lr": 0.05}}
    grower = ax.Grower(model, optimizer, schedule, edits=EDIT, **options)
    held = schedule.rates
    ax.grow(model, EDIT, optimizer, schedule, probe=batch()[0], dry_run=True, group={"lr": 0.05})
    assert held == [0.1]
    grower.grow(EDIT)
    for number in (1, 2, 40):
        schedule.step(number)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.5 * optimizer.param_groups[0]["lr"])
    grower.undo()
    assert schedule.rates is held and held == [0.1]


def test_an_own_group_that_is_seen_to_move():
    model, optimizer, schedule = ready(ByGroups)
    ax.grow(model, EDIT, optimizer, schedule, probe=batch()[0], group={"lr": 0.05})
    for _ in range(3):
        schedule.step()
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.5 * optimizer.param_groups[0]["lr"])


def test_one_that_drives_another_goes_on_from_a_checkpoint(tmp_path):
    model, optimizer, schedule = ready(AroundAnother)
    options = {"edits": EDIT, "when": ax.when.every(10**9), "probe": batch()[0]}
    grower = ax.Grower(model, optimizer, schedule, **options)
    grower.grow(EDIT)
    for number in range(3):
        schedule.step(number)
    train(model, optimizer, 1)
    ax.save(grower, tmp_path)
    fresh, other, again = ready(AroundAnother)
    ax.load(tmp_path, ax.Grower(fresh, other, again, **options))
    for one in (schedule, again):
        one.step(3)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
