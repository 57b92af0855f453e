"""Own groups that cannot be, schedules that could not follow: refused by name, nothing changed."""

import warnings

import pytest
import torch
from attacked import assert_same, picture
from growing import Block, Net, batch, train
from torch.optim import lr_scheduler as lrs

import auxin as ax
from auxin.companion import _registered

EDIT = ax.Duplicate("blocks", by=1)


def ready(kind=torch.optim.AdamW, schedule=None, groups=1, **options):
    torch.manual_seed(0)
    model = Net(depth=2)
    parts = [list(model.parameters())[number::groups] for number in range(groups)]
    optimizer = kind([{"params": part} for part in parts], **{"lr": 0.1, **options})
    companions = [optimizer] if schedule is None else [optimizer, schedule(optimizer)]
    train(model, optimizer, 2)
    return model, companions


def refused(match, model, companions, group):
    """By ``grow``, by ``surgery`` and by a Grower: the message, and nothing changed."""
    before = picture(model, *companions)
    with pytest.raises(ax.GrowthError, match=match):
        ax.grow(model, EDIT, *companions, probe=batch()[0], group=group)
    assert_same(before, picture(model, *companions))
    with pytest.raises(ax.GrowthError, match=match):
        with ax.surgery(model, *companions, group=group):
            model.blocks.append(Block())
    assert_same(before, picture(model, *companions))
    with pytest.raises(ax.GrowthError, match=match):
        grower = ax.Grower(model, *companions, edits=EDIT, when=ax.when.every(1), probe=batch()[0], group=group)
        grower.grow(EDIT)


ADAMW = "AdamW has lr, betas, eps, weight_decay, amsgrad, maximize"


@pytest.mark.parametrize(
    ("group", "match"),
    [
        ({}, r"group=\{\}: an own group needs an option that sets it apart, e\.g\. group=dict\(lr=1e-4\)"),
        ({"rate": 0.1}, rf"group=dict\(rate=\.\.\.\) is not an option of an own group\. {ADAMW}"),
        ({"lr": 0.1, "momentum": 0.9}, rf"group=dict\(momentum=\.\.\.\) is not an option of an own group\. {ADAMW}"),
        ({"params": []}, rf"dict\(params=.*The new parameters of the growth go into it, no others\. {ADAMW}"),
        ({"param_names": []}, r"dict\(param_names=.*The new parameters of the growth go into it"),
        ({"initial_lr": 0.1}, r"dict\(initial_lr=.*It follows lr, as every rate of the schedule does\."),
        ({"max_lr": 0.1}, r"dict\(max_lr=.*It follows lr"),
        ({"fused": True}, r"dict\(fused=.*It belongs to the whole optimizer or to its schedule\."),
        ({1: 2}, r"group=dict\(1=\.\.\.\) is not an option"),
        ({"lr": -0.1}, r"AdamW refuses such a group \(Invalid learning rate: -0\.1\)\. Pass values that AdamW takes"),
        ({"lr": float("nan")}, r"group=dict\(lr=nan\): not a finite number"),
        ({"lr": float("inf")}, r"group=dict\(lr=inf\): not a finite number"),
        ({"lr": "fast"}, r"group=dict\(lr='fast'\): a learning rate is one number, e\.g\. group=dict\(lr=1e-4\)"),
        ({"lr": None}, r"group=dict\(lr=None\): a learning rate is one number"),
        ({"lr": True}, r"group=dict\(lr=True\): a learning rate is one number"),
        ({"lr": [0.1, 0.2]}, r"group=dict\(lr=\[0\.1, 0\.2\]\): a learning rate is one number"),
        ({"lr": torch.ones(2)}, r"a learning rate is one number"),
        ({"betas": (0.9,)}, r"group=dict\(betas=\(0\.9,\)\): AdamW takes 2 values, as in \(0\.9, 0\.999\)"),
        ({"betas": 0.9}, r"group=dict\(betas=0\.9\): AdamW takes 2 values"),
        ({"betas": (0.9, 2.0)}, r"AdamW refuses such a group \(Invalid beta parameter at index 1: 2\.0\)"),
        ({"betas": (0.9, float("nan"))}, r"not a finite number"),
        ({"eps": -1.0}, r"AdamW refuses such a group \(Invalid epsilon value: -1\.0\)"),
        ({"weight_decay": -1}, r"AdamW refuses such a group \(Invalid weight_decay value: -1\)"),
        ({"weight_decay": "x"}, r"AdamW refuses such a group"),
        ({"amsgrad": 1}, r"group=dict\(amsgrad=1\): AdamW takes True or False"),
    ],
)
def test_options_and_values(group, match):
    refused(match, *ready(), group)


def test_an_index_is_still_checked():
    refused(r"group=5: pass the index of an existing group \(0: AdamW group 0\)", *ready(), 5)
    refused(r"group=\[1\]: pass the index of an existing group", *ready(), [1])


def test_the_optimizers_own_rules():
    refused(
        r"SGD refuses such a group \(Nesterov momentum requires a momentum",
        *ready(torch.optim.SGD, momentum=0.9, nesterov=True),
        {"momentum": 0.0},
    )
    refused(r"Rprop takes 2 values, as in \(0\.5, 1\.2\)", *ready(torch.optim.Rprop), {"etas": (0.5, 1.2, 3.0)})
    refused(r"Rprop refuses such a group \(Invalid eta values", *ready(torch.optim.Rprop), {"etas": (0.5, 0.9)})


def test_lbfgs_has_one_group():
    torch.manual_seed(0)
    model = Net(depth=2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    refused(
        r"LBFGS refuses such a group \(LBFGS doesn't support per-parameter options", model, [optimizer], {"lr": 0.01}
    )


def test_no_optimizer():
    model = Net(depth=2)
    refused(r"group=\{'lr': 0\.1\}: there is no optimizer to make a group in\. Pass it", model, [], {"lr": 0.1})


def test_no_sibling_says_which_group():
    torch.manual_seed(0)
    model = Net(depth=2)
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    before = picture(model, optimizer)
    with pytest.raises(ax.GrowthError, match=r"no trained parameter of the same role shows which.*Pass group=<index>"):
        with ax.surgery(model, optimizer, group={"lr": 0.01}):
            model.blocks.append(torch.nn.PReLU())
    assert_same(before, picture(model, optimizer))


def test_a_schedule_that_was_not_given():
    model, (optimizer, schedule) = ready(schedule=lambda o: lrs.StepLR(o, 3))
    match = r"a schedule drives this AdamW \(its groups have an initial_lr\), and none was given.*optimizer, scheduler"
    refused(match, model, [optimizer], {"lr": 0.01})
    ax.grow(model, EDIT, optimizer, probe=batch()[0])  # an existing group needs none
    ax.grow(model, EDIT, optimizer, schedule, probe=batch()[0], group={"lr": 0.01})


def test_a_donor_without_a_rate():
    model, companions = ready(torch.optim.SGD, lr=0.0)
    match = r"group 0 of SGD began with a learning rate of 0, which the new group's cannot be a multiple of"
    refused(match, model, companions, {"lr": 0.01})
    ax.grow(model, EDIT, *companions, probe=batch()[0], group={"momentum": 0.9})


@pytest.mark.parametrize(("kind", "option"), [(torch.optim.SGD, "momentum"), (torch.optim.Adam, "betas")])
def test_a_momentum_that_the_schedule_would_overwrite(kind, option):
    own = {"momentum": 0.5, "betas": (0.5, 0.9)}[option]
    for make in (lambda o: lrs.OneCycleLR(o, 0.1, 50), lambda o: lrs.CyclicLR(o, 0.01, 0.1)):
        model, companions = ready(kind, make, **({"momentum": 0.9} if option == "momentum" else {}))
        match = rf"group=dict\({option}=\.\.\.\): \w+ sets {option} in every group at each step, so it would be lost"
        refused(match, model, companions, {option: own})
    model, companions = ready(kind, lambda o: lrs.CyclicLR(o, 0.01, 0.1, cycle_momentum=False))
    ax.grow(model, EDIT, *companions, probe=batch()[0], group={option: own})
    train(model, companions[0])
    companions[1].step()
    assert companions[0].param_groups[1][option] == own


def test_a_list_that_has_lost_count():
    model, companions = ready(schedule=lambda o: lrs.CyclicLR(o, 0.01, 0.1), groups=2)
    companions[1].max_lrs.append(0.3)
    refused(
        r"CyclicLR\.max_lrs has 3 entries for 2 groups.*Build the scheduler after the last",
        model,
        companions,
        {"lr": 0.01},
    )


# ---- functions


class Locked:
    """A function of the step that cannot be copied."""

    def __call__(self, step):
        return 1.0

    def __deepcopy__(self, memo):
        raise RuntimeError("held by another process")


class Counting:
    def __init__(self):
        self.seen = []

    def __call__(self, step):
        self.seen.append(step)
        return 0.9 ** len(self.seen)


def test_functions_are_shared_objects_are_copied():
    model, companions = ready(schedule=lambda o: lrs.LambdaLR(o, Locked()))
    refused(
        r"LambdaLR: its function <.*Locked object.* cannot be copied for the new group \(held by",
        model,
        companions,
        {"lr": 0.01},
    )

    def plain(step):
        return 0.9**step

    model, companions = ready(schedule=lambda o: lrs.LambdaLR(o, plain))
    ax.grow(model, EDIT, *companions, probe=batch()[0], group={"lr": 0.01})
    assert companions[1].lr_lambdas == [plain, plain]
    model, companions = ready(schedule=lambda o: lrs.LambdaLR(o, Counting()))
    ax.grow(model, EDIT, *companions, probe=batch()[0], group={"lr": 0.01})
    for _ in range(3):
        companions[0].step()
        companions[1].step()
    first, second = companions[1].lr_lambdas
    assert first is not second and len(first.seen) == len(second.seen) == 4  # the first call was when it was built


# ---- schedulers that are not torch's


class WithFactors(lrs.LRScheduler):
    """Keeps a factor per group, in an attribute of its own."""

    def __init__(self, optimizer, factors):
        self.factors = factors
        super().__init__(optimizer)

    def get_lr(self):
        return [base * f**self.last_epoch for base, f in zip(self.base_lrs, self.factors, strict=False)]


class Closed(lrs.LRScheduler):
    """Closes over the number of groups."""

    def __init__(self, optimizer):
        count = len(optimizer.param_groups)
        self.rates = lambda step: [0.1 * 0.9**step] * count
        super().__init__(optimizer)

    def get_lr(self):
        return self.rates(self.last_epoch)


class Absolute(lrs.LRScheduler):
    """One rate for all groups, whatever they began with."""

    def get_lr(self):
        return [0.1 * 0.9**self.last_epoch for _ in self.optimizer.param_groups]


class Blind(lrs.LRScheduler):
    """Needs more than the groups to take a step."""

    def get_lr(self):
        return [len(self.optimizer.no_such_thing) for _ in self.base_lrs] if self.last_epoch else self.base_lrs


class WarmUpThen(lrs.LRScheduler):
    """A warm-up around another scheduler, held under a name of its own."""

    def __init__(self, optimizer, after, steps):
        self.after, self.steps = after, steps
        super().__init__(optimizer)

    def get_lr(self):
        if self.last_epoch < self.steps:
            return [base * (self.last_epoch + 1) / self.steps for base in self.base_lrs]
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch=None):
        if self.last_epoch >= self.steps:
            self.after.step()
        super().step(epoch)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda o: WithFactors(o, (0.9,)), r"WithFactors does not go on with 1 group more \(ValueError: zip"),
        (
            lambda o: WithFactors(o, [0.9]),
            r"WithFactors would go on with the rates \[0\.09.*, 0\.0009\], not with",
        ),
        (Closed, r"Closed does not go on with 1 group more \(ValueError: zip"),
        (Absolute, r"Absolute would go on with the rates \[0\.09.*, 0\.09.*\], not with \[0\.09.*, 0\.009.*\]"),
        (Blind, r"Blind is not a scheduler of torch, and a copy of it takes no step \(AttributeError"),
        (
            lambda o: lrs.SequentialLR(o, [lrs.StepLR(o, 3), WithFactors(o, [0.9])], [1]),
            r"WithFactors would go on with the rates",
        ),
    ],
)
def test_a_scheduler_that_would_not_follow(make, match):
    model, companions = ready(schedule=make)
    refused(
        match + r".*@auxin\.follow\(\w+\), with change\.groups; or use group=<index>", model, companions, {"lr": 0.01}
    )
    ax.grow(model, EDIT, *companions, probe=batch()[0])  # in the group of its siblings


class Half(lrs.StepLR):
    """Somebody's own subclass, with nothing per group."""


@pytest.mark.parametrize(
    "make",
    [
        lambda o: Half(o, 4, 0.5),
        lambda o: WarmUpThen(o, lrs.CosineAnnealingLR(o, 30), 6),
        lambda o: WarmUpThen(o, lrs.LambdaLR(o, Counting()), 6),
        lambda o: WithFactors(o, [0.9, 0.9, 0.8]),  # by chance long enough
    ],
)
def test_a_scheduler_that_shows_that_it_follows(make):
    def curve(grows):
        model, companions = ready(torch.optim.SGD, make)
        rates = []
        for number in range(60):
            rates.append([group["lr"] for group in companions[0].param_groups])
            companions[0].step()
            companions[1].step()
            if grows and number == 3:
                ax.grow(model, EDIT, *companions, probe=batch()[0], group={"lr": 0.03})
        return rates

    alone, grown = curve(False), curve(True)
    assert [used[:1] for used in grown] == alone
    assert all(used[1] == pytest.approx(0.3 * used[0], rel=1e-12) for used in grown[4:])


def test_a_rehearsal_touches_nothing():
    model, companions = ready(torch.optim.SGD, lambda o: WarmUpThen(o, lrs.LambdaLR(o, Counting()), 6))
    before = picture(model, *companions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.grow(model, EDIT, *companions, probe=batch()[0], group={"lr": 0.03}, dry_run=True)
    assert_same(before, picture(model, *companions))


def test_a_users_own_follower_makes_its_entry():
    """As in docs/own_groups.md."""

    def followed(schedule, change):
        groups = [own for own in change.groups if own.optimizer is schedule.optimizer]
        count = len(schedule.base_lrs)
        yield
        schedule.factors += [0.5 for own in groups]
        for rates in (schedule.base_lrs, schedule._last_lr):
            rates += [own.scaled(rates[own.donor]) for own in groups]
        try:
            yield
        except BaseException:
            for held in (schedule.factors, schedule.base_lrs, schedule._last_lr):
                del held[count:]
            raise

    model, companions = ready(torch.optim.SGD, lambda o: WithFactors(o, [0.9]))
    before = picture(model, *companions)
    ax.follow(WithFactors)(followed)
    try:
        ax.grow(model, EDIT, *companions, probe=batch()[0], group={"lr": 0.01}, dry_run=True)
        assert_same(before, picture(model, *companions))
        ax.grow(model, EDIT, *companions, probe=batch()[0], group={"lr": 0.01})
    finally:
        del _registered[WithFactors]
    companions[0].step()
    companions[1].step()
    assert [g["lr"] for g in companions[0].param_groups] == [pytest.approx(0.09), pytest.approx(0.005)]


@pytest.mark.parametrize("order", [1, -1])
def test_a_scheduler_given_beside_one_that_holds_it(order):
    model, (optimizer, whole) = ready(
        schedule=lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=4), lrs.StepLR(o, 3, 0.5)], [4])
    )
    given = [whole, *whole._schedulers][::order]
    before = picture(model, optimizer, *given)
    ax.grow(model, EDIT, optimizer, *given, probe=batch()[0], group={"lr": 0.01}, dry_run=True)
    assert_same(before, picture(model, optimizer, *given))
    ax.grow(model, EDIT, optimizer, *given, probe=batch()[0], group={"lr": 0.01})
    assert [len(s.base_lrs) for s in whole._schedulers] == [2, 2] and len(whole._last_lr) == 2
    for _ in range(10):
        optimizer.step()
        whole.step()
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 * optimizer.param_groups[0]["lr"], rel=1e-12)


def test_two_schedules_on_one_optimizer():
    model, (optimizer,) = ready(torch.optim.SGD)
    both = [lrs.LambdaLR(optimizer, lambda step: 1.0), lrs.ReduceLROnPlateau(optimizer, min_lr=[1e-3])]
    ax.grow(model, EDIT, optimizer, *both, probe=batch()[0], group={"lr": 0.01})
    assert both[0].base_lrs == [0.1, 0.01] and both[1].min_lrs == [1e-3, pytest.approx(1e-4)]


def test_a_follower_that_counts_the_lists_twice_is_caught(monkeypatch):
    from auxin.follow import scheduler as follower

    monkeypatch.setattr(follower, "extend", lambda longer, count: [held.extend(new) for held, new in longer])
    with pytest.raises(ax.GrowthError, match=r"StepLR\.base_lrs has 3 entries for 2 groups"):
        test_a_scheduler_given_beside_one_that_holds_it(1)
