"""What does not fit is told when a Grower or a callback is built, with the call that works; and nothing is written."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

import auxin as ax
from auxin import when


class Block(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        self.inner = nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.inner(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = 0
        self.blocks = nn.ModuleList([Block()])
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        self.seen += 1
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


EDIT, PROBE = ax.Duplicate("blocks", by=1), torch.ones(3, 4)


def built(schedule=None, **words):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    companions = [optimizer] + ([] if schedule is None else [schedule(optimizer)])
    words = {"edits": EDIT, "when": when.every(2), "probe": PROBE} | words
    return model, optimizer, ax.Grower(model, *companions, **words)


def depths(model, grower, calls=6, metric=1.0):
    found = []
    for _ in range(calls):
        grower.step(metric)
        found.append(len(model.blocks))
    return found


# Companions and edits


@pytest.mark.parametrize("given", ["one", "several"])
def test_companions_by_keyword_are_told_how_they_are_passed(given):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    companions = optimizer if given == "one" else [optimizer]
    with pytest.raises(ax.GrowthError, match=r"Grower\(companions=\.\.\.\): Pass each one by itself, by position: Gr"):
        ax.Grower(model, companions=companions, edits=EDIT, when=when.every(1))


def test_a_keyword_that_there_is_not():
    with pytest.raises(ax.GrowthError, match=r"Grower takes no prob\. It takes the arguments of auxin\.Grower: edits"):
        built(prob=PROBE)


@pytest.mark.parametrize("edits", ["blocks", "", b"blocks"])
def test_a_text_is_no_edit(edits):
    with pytest.raises(ax.GrowthError, match=r"is a text, not an edit; write edits=auxin\.Duplicate\("):
        built(edits=edits)


def test_edits_that_can_be_gone_through_once_are_kept():
    model, _, grower = built(edits=(edit for edit in [EDIT]), probe=PROBE)
    assert depths(model, grower) == [1, 2, 2, 3, 3, 4] and not grower.done


# Places


@pytest.mark.parametrize(
    ("edits", "match"),
    [
        (ax.Duplicate("layers"), r"layers'.*has no child 'layers'; its children: 'blocks', 'norm'.*edits=lambda model"),
        (ax.Duplicate("norm"), r"'norm' is a BatchNorm1d, not a container"),
        ([ax.After("blocks.7"), ax.Remove("head")], r"After\(at=\.\.\.\): at='blocks\.7': blocks .* has no child '7'"),
        (ax.Insert("blocks.0.inner", nn.Identity), "is a Linear, not a container"),
    ],
)
def test_edits_none_of_which_has_a_place_are_refused(edits, match):
    with pytest.raises(ax.GrowthError, match=match):
        built(edits=edits)


def test_a_place_that_a_growth_makes_is_warned_of_and_used():
    later = ax.After("blocks.1")
    with pytest.warns(UserWarning, match=r"has no child '1'.*As long as no growth makes that place, this edit is ref"):
        _, _, grower = built(edits=[EDIT, later], probe=PROBE, choose=ax.choose.cycle())
    changes = [change for _ in range(4) if (change := grower.step())]
    assert [str(change).split(" ·")[0] for change in changes] == [
        "blocks.1 <- copy of blocks.0",
        "blocks.2 <- ResidualLinear",
    ]


def test_a_function_is_not_asked_before_it_is_needed():
    asked = []
    _, _, grower = built(edits=lambda model: asked.append(1) or [ax.Duplicate("nowhere")], when=when.at([9]))
    before = len(asked)
    grower.step()
    assert before <= 1


def test_an_edit_of_somebody_elses_may_mean_what_it_likes_by_at():
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Everywhere:
        at: str = "*.inner"

        def plan(self, model, context):
            raise ax.GrowthError("not here")

    built(edits=Everywhere())


# Probes


@pytest.mark.parametrize(
    ("probe", "match"),
    [
        (torch.ones(3, 5), r"probe: Net does not run on it: mat1 .*Pass the batch as the training loop calls"),
        ("batch", "probe: Net does not run on it"),
        ({"y": torch.ones(3, 4)}, "probe: Net does not run on it: .*argument"),
        ((), "does not run on it|does not take it"),
    ],
)
def test_a_probe_that_the_network_does_not_take(probe, match):
    with pytest.raises(ax.GrowthError, match=match):
        built(probe=probe)


def test_a_callable_probe_is_not_drawn_from():
    built(probe=lambda: pytest.fail("it was asked"))


def test_checking_a_probe_costs_one_forward_and_writes_nothing():
    forwards = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: forwards.append(1) if isinstance(module, Net) else None
    )
    try:
        before = torch.random.get_rng_state()
        model, _, _ = built(probe=PROBE)
    finally:
        handle.remove()
    torch.manual_seed(0)
    fresh = Net()
    assert len(forwards) == 1 and model.seen == 0 and model.training and model.norm.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and before.shape == torch.random.get_rng_state().shape


def test_networks_without_values_yet_are_not_run():
    model = Net().to("meta")
    ax.Grower(model, torch.optim.SGD(model.parameters(), 0.1), edits=EDIT, when=when.every(1), probe=PROBE)


# Schedules and own groups


class Factors(lrs.LRScheduler):
    """It keeps a list of its own for each group."""

    def __init__(self, optimizer):
        self.factors = [1.0] * len(optimizer.param_groups)
        super().__init__(optimizer)

    def get_lr(self):
        pairs = zip(self.base_lrs, self.factors, strict=True)
        return [base * factor * 0.9**self.last_epoch for base, factor in pairs]


class Absolute(lrs.LRScheduler):
    """It sets the same rate in every group."""

    def get_lr(self):
        return [0.1 * 0.9**self.last_epoch for _ in self.optimizer.param_groups]


class NoScheduler:
    """Followed like one of torch's, and none."""

    def __init__(self, optimizer):
        self.optimizer, self.first = optimizer, tuple(group["lr"] for group in optimizer.param_groups)

    def step(self, epoch):
        for group, first in zip(self.optimizer.param_groups, self.first, strict=False):
            group["lr"] = first * 0.9**epoch


@pytest.mark.parametrize("schedule", [Factors, Absolute, NoScheduler])
def test_a_schedule_that_cannot_have_an_own_group_is_told_when_built_with_a_way_that_works(schedule):
    ax.follow(NoScheduler, like=lrs.LRScheduler)
    words = {"group": {"lr": 0.01}, "probe": PROBE, "when": when.every(1)}
    with pytest.raises(ax.GrowthError, match=r"Write it as torch\.optim\.lr_scheduler\.LambdaLR\(optimizer, f\)"):
        built(schedule, **words)
    model, optimizer, grower = built(lambda o: lrs.LambdaLR(o, lambda step: 0.9**step), **words)
    schedule = grower.companions[1]
    for _ in range(3):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        grower.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.1 * 0.9**3] + [0.01 * 0.9**3] * 3)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lrs.ExponentialLR(o, 0.9),
        lambda o: lrs.StepLR(o, 3),
        lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
        lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)]),
        lambda o: lrs.ReduceLROnPlateau(o),
        lambda o: lrs.OneCycleLR(o, 0.1, 50),
    ],
)
def test_schedules_of_torch_are_let_through_and_untouched(schedule):
    _, optimizer, grower = built(schedule, group={"lr": 0.01})
    assert len(optimizer.param_groups) == 1
    lists = {name: held for name, held in vars(grower.companions[1]).items() if isinstance(held, list)}
    fresh = vars(schedule(torch.optim.SGD(Net().parameters(), 0.1, momentum=0.9)))
    assert {name: len(held) for name, held in lists.items()} == {name: len(fresh[name]) for name in lists}


def test_values_that_no_optimizer_takes_are_told_when_built():
    with pytest.raises(ax.GrowthError, match="SGD refuses such a group"):
        built(group={"lr": -1.0})
    with pytest.raises(ax.GrowthError, match="sets momentum in every group at each step"):
        built(lambda o: lrs.OneCycleLR(o, 0.1, 50), group={"momentum": 0.5})


# Directions


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: when.any_of(t, when.at([9])), lambda t: when.cooldown(t, 3)])
def test_a_trigger_and_a_probation_that_disagree(wrap):
    trigger = wrap(when.plateau(patience=2, mode="max"))
    with pytest.raises(ax.GrowthError, match=r"look at one metric and take it the other way round.*Probation\(mode="):
        built(when=trigger, probation=ax.Probation())
    built(when=trigger, probation=ax.Probation(mode="max"))
    built(when=trigger, probation=ax.Probation(metric="loss"))
    built(when=when.threshold(0.9, mode="max"), probation=ax.Probation())


# Triggers and choosers that two Growers get


TRIGGERS = {
    "every": lambda: when.every(2),
    "plateau": lambda: when.plateau(patience=2),
    "any_of": lambda: when.any_of(when.every(2), when.at([5])),
    "cooldown": lambda: when.cooldown(when.every(2), 1),
    "slope": lambda: when.slope(window=8, level=0.2),
}


@pytest.mark.parametrize("name", TRIGGERS)
def test_two_growers_with_one_trigger_are_refused_at_the_first_step(name):
    shared = TRIGGERS[name]()
    (one, first), (other, second) = built(when=shared, probe=PROBE)[::2], built(when=shared, probe=PROBE)[::2]
    for call in (first.step, lambda metric: first.grow(EDIT), lambda metric: first.state_dict()):
        with pytest.raises(ax.GrowthError, match="handed to another Grower after this one.*build it where the Grower"):
            call(1.0)
    assert len(one.blocks) == 1 and first.calls == 0
    alone = built(when=TRIGGERS[name](), probe=PROBE)
    assert depths(other, second) == depths(alone[0], alone[2])


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_seed_loop_with_one_trigger_gets_the_same_depths_for_every_seed(name):
    shared, found = TRIGGERS[name](), []
    for _ in range(3):
        model, _, grower = built(when=shared, probe=PROBE, limit=ax.Limit(growths=3))
        found.append(depths(model, grower, calls=18))
    assert found[0][-1] > 1 and found[0] == found[1] == found[2]


def test_a_trigger_inside_of_two_others():
    inner = when.every(2)
    _, _, first = built(when=when.any_of(inner, when.at([7])), probe=PROBE)
    model, _, second = built(when=when.cooldown(inner, 1), probe=PROBE)
    with pytest.raises(ax.GrowthError, match=r"every\(n=2\) was handed to another Grower"):
        first.step()
    assert depths(model, second) == [1, 2, 2, 3, 3, 4]


def test_a_trigger_that_stands_twice_in_one():
    inner = when.every(2)
    with pytest.raises(ax.GrowthError, match=r"every\(n=2\) is given twice, and would see every reading twice"):
        built(when=when.any_of(inner, when.cooldown(inner, 3)))


def test_choosers_too():
    choose, edits = ax.choose.cycle(), [EDIT, ax.After("blocks.0")]
    words = {"edits": edits, "choose": choose, "when": lambda reading: reading.calls == 1, "probe": PROBE}
    first, second = built(**words)[2], built(**words)[2]
    with pytest.raises(ax.GrowthError, match=r"cycle\(\) was handed to another Grower"):
        first.step()
    assert second.step() and second.journal[0].added[0]["path"] == "blocks.1"
    third = built(**words)[2]
    assert third.step() and third.journal[0].added[0]["path"] == "blocks.1"


def test_trigger_and_chooser_in_one():
    rule, found = when.autogrow(interval=2, threshold=0.5), []
    for _ in range(2):
        model, _, grower = built(when=rule, choose=rule.choose, probe=PROBE)
        found.append(depths(model, grower, calls=8))
    assert found[0] == found[1] and found[0][-1] > 1


def test_what_a_user_holds_stays_the_object_that_is_asked():
    switch, trend = when.signal(), when.slope(window=8)
    model, _, grower = built(when=when.any_of(switch, trend), probe=PROBE)
    assert depths(model, grower, calls=2) == [1, 1]
    switch.set()
    assert depths(model, grower, calls=2) == [2, 2]
    assert trend.trend == 0.0
    model, _, grower = built(when=switch, probe=PROBE)
    switch.set()
    assert depths(model, grower, calls=2) == [2, 2]


def test_functions_and_files_may_be_shared(tmp_path):
    for shared in (lambda reading: reading.calls == 2, when.threshold(1.0), when.file(tmp_path / "grow")):
        first, second = built(when=shared, probe=PROBE)[2], built(when=shared, probe=PROBE)[2]
        first.step(1.0)
        second.step(1.0)


class Counts:
    """A trigger of a user's, with a state that it cannot take back."""

    def __init__(self):
        self.count = 0

    def __call__(self, reading):
        self.count += 1
        return self.count == 2

    def state_dict(self):
        return {"count": self.count}


def test_a_trigger_that_cannot_be_set_back():
    shared = Counts()
    built(when=shared)
    with pytest.raises(ax.GrowthError, match="has no load_state_dict that would set it back. Make a new one"):
        built(when=shared)


def test_a_grower_that_could_not_be_built_has_not_taken_the_trigger():
    shared = when.every(2)
    model, _, grower = built(when=shared, probe=PROBE)
    grower.step()
    with pytest.raises(ax.GrowthError, match="does not run"):
        built(when=shared, probe=torch.ones(3, 5))
    assert depths(model, grower, calls=3) == [2, 2, 3]


def test_a_resume_in_the_same_process_with_the_same_trigger(tmp_path):
    shared = when.plateau(patience=2)
    model, _, grower = built(when=shared, probe=PROBE)
    before = depths(model, grower, calls=4)
    ax.save(grower, tmp_path)
    after = depths(model, grower, calls=6)
    model, _, grower = built(when=shared, probe=PROBE)
    ax.load(tmp_path, grower)
    assert depths(model, grower, calls=6) == after and before[-1] > 1


def test_nothing_that_is_right_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _, grower = built(lambda o: lrs.LambdaLR(o, lambda step: 1.0), probe=PROBE, group={"lr": 0.01})
        assert depths(model, grower) == [1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("trigger", "mode"),
    [
        (lambda: when.plateau(patience=2, metric="val_accuracy"), "max"),
        (lambda: when.plateau(patience=2, metric="val_loss", mode="max"), "min"),
        (lambda: when.plateau(patience=2, metric="val_loss"), None),
        (lambda: when.plateau(patience=2, metric="val/acc", mode="max"), None),
        (lambda: when.threshold(0.9, metric="accuracy", mode="max"), None),
        (lambda: when.plateau(patience=2, metric="perplexity"), None),
    ],
)
def test_a_direction_that_the_name_of_the_metric_speaks_against_is_warned_of(trigger, mode):
    model = Net()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ax.Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), edits=EDIT, when=trigger(), probe=PROBE)
    assert [f"pass mode={mode!r}" in str(one.message) for one in told] == ([True] if mode else [])
