"""An own group runs at the asked multiple of its donor's rate, and the old groups run as if nothing had grown."""

import functools
import inspect
import json

import grouped
import pytest
import torch
from grouped import END, ONE_GROUP, RATIO, SAVE_AT, SETUPS, Run
from growing import bits
from torch.optim import lr_scheduler

import anew
import auxin as ax
from auxin.follow import scheduler as follower

GROWTHS = [(1,), (13,), (4, 9, 17)]  # 13: right before the milestones of the sequences
TOLERANCE = 1e-12  # relative; a schedule that multiplies step by step rounds each product


@functools.cache
def never_grew(name):
    return Run(name, trained=5).steps(0, END)


def differences(name, grow_at, ratio=RATIO):
    """What is wrong with the rates of a run that grows, as a list of texts; and the largest error of the ratio."""
    run = Run(name, grow_at, ratio, trained=grow_at[-1] + 5)
    worst, told = 0.0, []
    curve = run.steps(0, END)
    assert len(run.model.blocks) == 1 + len(grow_at)
    count = run.donor + 1
    # A schedule without initial_lr: what was asked for is the rate from the growth on.
    begins = "initial_lr" in run.optimizer.param_groups[0]
    ratios = [ratio if begins else run.grower.group["lr"] / curve[at][run.donor][0] for at in grow_at]
    for number, (used, alone) in enumerate(zip(curve, never_grew(name), strict=True)):
        if used[:count] != alone:
            told.append(f"step {number}: old groups {used[:count]}, alone {alone}")
        if len(used) != count + sum(number >= at for at in grow_at):
            told.append(f"step {number}: {len(used)} groups")
        rate, momentum = used[run.donor]
        for (own, own_momentum), ratio in zip(used[count:], ratios, strict=False):
            if own_momentum != momentum:
                told.append(f"step {number}: momentum {own_momentum}, the donor's {momentum}")
            if rate > 0:
                worst = max(worst, abs(own / rate / ratio - 1))
            elif own != 0:
                told.append(f"step {number}: {own} beside 0")
    if worst > TOLERANCE:
        told.append(f"ratio off by {worst:.3g}")
    return told, worst


def test_every_class_of_torch_has_a_set_up():
    classes = {
        cls
        for _, cls in inspect.getmembers(lr_scheduler, inspect.isclass)
        if cls.__module__ == lr_scheduler.__name__ and hasattr(cls, "step") and not cls.__name__.startswith("_")
    }
    covered = {type(run.schedule) for run in map(Run, ONE_GROUP)}
    assert classes - {lr_scheduler.LRScheduler} <= covered
    covered = {type(run.schedule) for run in map(Run, SETUPS.keys() - ONE_GROUP.keys())}
    assert classes - {lr_scheduler.LRScheduler} <= covered


@pytest.mark.parametrize("grow_at", GROWTHS, ids=str)
@pytest.mark.parametrize("name", SETUPS)
def test_the_ratio_holds_at_every_step(name, grow_at):
    assert END - grow_at[-1] >= 50
    told, _ = differences(name, grow_at)
    assert not told, told[:4]


@pytest.mark.parametrize("ratio", [1e-3, 0.5])
@pytest.mark.parametrize("name", SETUPS)
def test_other_ratios(name, ratio):
    told, worst = differences(name, (4,), ratio)
    assert not told, told[:4]
    assert worst == 0 or ratio != 0.5  # halves are exact in binary


@pytest.mark.parametrize("kind", [lr_scheduler.OneCycleLR, lr_scheduler.CosineAnnealingLR])
def test_a_tenth_of_the_rate_over_three_hundred_steps(kind):
    def curve(grow_at):
        torch.manual_seed(0)
        model = grouped.Net(dim=4, depth=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = kind(optimizer, *([0.01] if kind is lr_scheduler.OneCycleLR else []), 301)
        rates = []
        for number in range(300):
            rates.append([group["lr"] for group in optimizer.param_groups])
            grouped.train(model, optimizer, seed=number)
            schedule.step()
            if number == grow_at:
                lr = 0.1 * optimizer.param_groups[0]["initial_lr"]
                edit, probe = ax.Duplicate("blocks", by=1), grouped.batch()[0]
                ax.grow(model, edit, optimizer, schedule, probe=probe, group=dict(lr=lr))
        return rates

    grown = curve(50)
    assert [used[:1] for used in grown] == curve(None)
    assert all(abs(used[1] / used[0] / 0.1 - 1) < TOLERANCE for used in grown[51:])


@pytest.mark.parametrize("name", SETUPS)
def test_all_parameters_of_the_new_block_train(name):
    run = Run(name, [4])
    run.steps(0, 5)
    new = list(run.model.blocks[1].parameters())
    assert [id(p) for p in run.optimizer.param_groups[-1]["params"]] == [id(p) for p in new]
    before = [bits(p) for p in new]
    run.steps(5, 20)
    assert all(bits(p) != b for p, b in zip(new, before, strict=True))


@pytest.mark.parametrize("name", [n for n in ONE_GROUP if n not in ("no schedule", "an object as function")])
def test_a_group_that_was_there_from_the_start_has_the_same_curve(name):
    run = Run(name, [4])
    curve = run.steps(0, END)
    first, second = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    lr = grouped.LR
    twin = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": lr * RATIO}], lr=lr, momentum=0.9)
    make = FROM_THE_START.get(name, SETUPS[name])
    schedule = make(twin)
    for number, used in enumerate(curve):
        if number > 4:
            assert used[1][0] == pytest.approx(twin.param_groups[1]["lr"], rel=1e-12, abs=0)
        metric = 1.0 / (1 + min(number, 2)) + (0.1 if number % 7 == 0 else 0.0)
        twin.step()
        schedule.step(*([metric] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))


# Schedules that take their rates as arguments, so that the twin needs one for each group.
PAIR = (1.0, RATIO)
FROM_THE_START = {
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [0.01 * k for k in PAIR], [0.1 * k for k in PAIR], 5),
    "triangular2": lambda o: lr_scheduler.CyclicLR(
        o, [0.01 * k for k in PAIR], [0.1 * k for k in PAIR], 3, mode="triangular2", cycle_momentum=False
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1 * k for k in PAIR], total_steps=END + 1),
    "three phases": lambda o: lr_scheduler.OneCycleLR(
        o, [0.1 * k for k in PAIR], total_steps=END + 1, three_phase=True, anneal_strategy="linear"
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, [0.02 * k for k in PAIR], anneal_epochs=20),
    "ReduceLROnPlateau, min_lr list": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, factor=0.5, patience=1, min_lr=[2e-3 * k for k in PAIR]
    ),
    "ReduceLROnPlateau, min_lr": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, factor=0.5, patience=1, min_lr=[5e-3 * k for k in PAIR]
    ),
}


@pytest.mark.parametrize("kind", [lr_scheduler.CosineAnnealingLR, lr_scheduler.CosineAnnealingWarmRestarts])
def test_a_floor_for_all_groups_is_named(kind):
    model = grouped.Net(dim=4, depth=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = kind(optimizer, 20, eta_min=1e-3)
    change = ax.grow(model, ax.Duplicate("blocks"), optimizer, schedule, probe=grouped.batch()[0], group=dict(lr=0.01))
    assert f"{kind.__name__}(eta_min=0.001) is one floor for all groups" in str(change)
    change = ax.grow(
        model, ax.Duplicate("blocks"), optimizer, schedule, probe=grouped.batch()[0], group=dict(momentum=0.5)
    )
    assert [own.donor for own in change.groups] == [0, 1] and "floor" not in str(change)


def test_a_plateau_stops_each_group_at_its_own_floor():
    run = Run("ReduceLROnPlateau, min_lr list", [4])
    run.steps(0, END)
    assert [g["lr"] for g in run.optimizer.param_groups] == [2e-3, pytest.approx(2e-3 * RATIO, rel=1e-15)]
    assert run.schedule.min_lrs == [2e-3, pytest.approx(2e-3 * RATIO)]


# ---- broken twins: whoever forgets one of the lists is caught by the tests above

FORGOTTEN = {
    "base_lrs": "LambdaLR",
    "min_lrs": "ReduceLROnPlateau, min_lr list",
    "max_lrs": "CyclicLR",
    "_last_lr": "ExponentialLR",
    "lr_lambdas": "MultiplicativeLR",
    "base_momentums": "CyclicLR",
    "max_momentums": "CyclicLR",
}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_a_follower_that_forgets_a_list_is_caught(forgotten, monkeypatch):
    monkeypatch.setattr(follower, "LISTS", tuple(name for name in follower.LISTS if name != forgotten))
    try:
        told, _ = differences(FORGOTTEN[forgotten], (4,))
    except (ValueError, RuntimeError, KeyError, IndexError, AssertionError, ax.GrowthError):
        return
    assert told


@pytest.mark.parametrize("name", ["min_lrs", "base_lrs", "max_lrs", "base_momentums"])
def test_a_follower_that_scales_wrongly_is_caught(name, monkeypatch):
    swapped = {*follower.RATE_LISTS} ^ {name}  # rates copied as they are, momenta scaled
    monkeypatch.setattr(follower, "RATE_LISTS", tuple(swapped))
    at = "SequentialLR" if name == "base_lrs" else FORGOTTEN[name]
    assert differences(at, (4,))[0]


def test_a_follower_that_forgets_what_is_nested_is_caught(monkeypatch):
    monkeypatch.setattr(follower, "nested", lambda scheduler: [scheduler])
    for name in ("SequentialLR", "sequence", "nested"):
        with pytest.raises((ValueError, ax.GrowthError)):
            assert not differences(name, (4,))[0]


@pytest.mark.parametrize("key", ["lr", "initial_lr", "max_lr", "min_lr", "swa_lr"])
def test_a_group_that_forgets_a_rate_is_caught(key, monkeypatch):
    from auxin.follow import groups

    monkeypatch.setattr(groups, "RATES", tuple(name for name in groups.RATES if name != key))
    # lr: no schedule sets it afresh at once; initial_lr: only a milestone or a checkpoint looks at it again.
    at = {"lr": "no schedule", "initial_lr": "SequentialLR", "swa_lr": "SWALR"}.get(key, "OneCycleLR")
    if key == "initial_lr":
        run = Run(at, [4])
        run.steps(0, 6)
        assert run.optimizer.param_groups[1]["initial_lr"] == grouped.LR  # the twin is broken
        with pytest.raises(AssertionError):
            initial_rate_is_asked(run)
        return
    assert differences(at, (4,))[0]


def initial_rate_is_asked(run):
    assert run.optimizer.param_groups[1]["initial_lr"] == grouped.LR * RATIO


def test_the_initial_rate_is_exactly_what_was_asked():
    run = Run("SequentialLR", [4])
    run.steps(0, 6)
    initial_rate_is_asked(run)
    assert run.schedule._schedulers[1].base_lrs == [grouped.LR, grouped.LR * RATIO]


# ---- in a new process


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """All set-ups, grown twice, saved in the middle of the schedule, and continued by one new process."""
    folder = tmp_path_factory.mktemp("own-groups")
    for number, name in enumerate(SETUPS):
        run = Run(name, grow_at=[4, 9])
        run.steps(0, SAVE_AT)
        ax.save(run.grower, folder / str(number))
    done = anew.run(grouped.__file__, folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SETUPS)
def test_rates_and_weights_go_on_to_the_bit_in_a_new_process(name, resumed):
    run = Run(name, grow_at=[4, 9])
    curve = [[list(pair) for pair in used] for used in run.steps(0, END)]
    assert resumed[name] == [curve[SAVE_AT:], run.weights()]
