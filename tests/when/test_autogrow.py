"""AutoGrow's rule: grows when the gain of an interval is small, freezes what did not pay, and ends."""

import json
import math
import random

import pytest
import torch
from torch import nn

import auxin as ax
from auxin import when
from auxin.when import Reading

SITES = ["one", "two", "three"]


def simulate(rule, curve, sites=SITES, calls=400, delay=0):
    """What a Grower does with the rule: grown (call, site), on a metric `curve(calls, growths by site)`."""
    grown, waiting = [], None
    for call in range(1, calls + 1):
        if waiting is not None and call >= waiting[0]:
            grown.append((call - 1, waiting[1]))
            waiting = None
        value = curve(call, [site for _, site in grown])
        if rule(Reading(value, {}, call, call, len(grown), call)) and not rule.done:
            site = rule.choose(sites, None)
            if site is not None:
                waiting = (call + 1 + delay, site)
    return grown


def test_it_grows_at_the_first_interval_that_gains_less_than_the_threshold():
    # Best of the intervals of 3: 7, 4, 2.6, 2.5: gains 3, 1.4, 0.1.
    rule = when.autogrow(interval=3, threshold=0.2)
    losses = [9, 8, 7, 6, 5, 4, 3, 2.6, 2.8, 2.5, 2.7, 2.5]
    assert [i for i, v in enumerate(losses, 1) if rule(Reading(v, {}, i, i, 0, i))] == [12]
    assert rule.choose(SITES, None) == "one"


def test_the_smoothing_is_the_best_of_an_interval():
    rule = when.autogrow(interval=3, threshold=0.5, mode="max")
    accuracy = [1.0, 0.2, 0.2, 0.3, 0.1, 1.6, 0.0, 1.7, 0.0]
    assert [i for i, v in enumerate(accuracy, 1) if rule(Reading(v, {}, i, i, 0, i))] == [9]


def test_a_site_is_frozen_after_one_useless_growth_and_the_rest_go_on():
    """Only the growth of site two helps; then each of its further growths helps less."""

    def curve(call, grown):
        return 10.0 - sum(2.0 / (1 + i) for i in range(grown.count("two")))

    rule = when.autogrow(interval=4, threshold=0.9)
    grown = simulate(rule, curve)
    assert [site for _, site in grown] == ["one", "two", "three", "two", "two"]
    assert rule.frozen == ["'one'", "'three'", "'two'"] and rule.done
    assert [call for call, _ in grown] == [8, 12, 20, 24, 32]


@pytest.mark.parametrize("policy", ["convergent", "periodic"])
@pytest.mark.parametrize("seed", range(10))
def test_it_ends_on_every_curve_that_stops_gaining(policy, seed):
    rng = random.Random(seed)
    worth = {site: rng.uniform(0, 3) for site in SITES}

    def curve(call, grown):
        left = 20 * 0.9**call
        return left + sum(worth[s] * 0.6 ** grown.count(s) for s in SITES)

    rule = when.autogrow(interval=rng.randrange(1, 6), threshold=0.05, policy=policy)
    grown = simulate(rule, curve)
    assert rule.done and sorted(rule.frozen) == ["'one'", "'three'", "'two'"]
    assert {site for _, site in grown} == set(SITES) and grown[-1][0] < 350


def test_periodic_grows_at_the_end_of_each_interval_in_turn():
    rule = when.autogrow(interval=5, threshold=0.0, policy="periodic")
    grown = simulate(rule, lambda call, grown: -call, calls=31)
    assert grown == [(5, "one"), (10, "two"), (15, "three"), (20, "one"), (25, "two"), (30, "three")]


def test_a_growth_that_waits_is_followed_by_a_whole_interval():
    rule = when.autogrow(interval=5, threshold=0.0, policy="periodic")
    grown = simulate(rule, lambda call, grown: -call, calls=26, delay=3)
    assert grown == [(8, "one"), (16, "two"), (24, "three")]


def test_nothing_is_chosen_while_a_growth_is_in_its_first_interval():
    rule = when.autogrow(interval=2, threshold=1.0)
    for call in (1, 2, 3, 4):
        rule(Reading(5.0, {}, call, call, 0, call))
    assert rule.choose(SITES, None) == "one"
    rule(Reading(5.0, {}, 5, 5, 1, 1))
    assert rule.choose(SITES, None) is None and not rule.done


def test_nan_is_no_gain():
    rule = when.autogrow(interval=2, threshold=0.1)
    assert [rule(Reading(v, {}, 1, 1, 0, 1)) for v in (3, 2, math.nan, math.nan, math.nan, 1)] == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 11, 12, 13, 20, 25, 31])
def test_a_restored_rule_goes_on(cut):
    def run(rule, calls, grown):
        for call in calls:
            value = 10.0 - sum(2.0 / (1 + i) for i in range(grown.count("two")))
            if rule(Reading(value, {}, call, call, len(grown), call)) and not rule.done:
                grown += [site for site in [rule.choose(SITES, None)] if site]
        return grown

    build = lambda: when.autogrow(interval=4, threshold=0.9)  # noqa: E731
    expected = run(build(), range(1, 60), [])
    first, second = build(), build()
    grown = run(first, range(1, cut + 1), [])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert run(second, range(cut + 1, 60), grown) == expected and len(expected) == 5


# with a Grower

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.early, self.late = nn.ModuleList([Block()]), nn.ModuleList([Block()])

    def forward(self, x):
        for block in (*self.early, *self.late):
            x = block(x)
        return x


def build(wrap=lambda rule: rule):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    rule = when.autogrow(interval=3, threshold=0.5)
    schedule = ax.schedule.wsd(optimizer, 0, 4)
    edits = [ax.Duplicate("early", by=1), ax.Duplicate("late", by=1)]
    words = {"edits": edits, "when": wrap(rule), "choose": rule.choose, "probe": X[:4]}
    grower = ax.Grower(model, optimizer, schedule, **words)
    schedule.grower = grower
    return model, schedule, grower, rule


def metric(model) -> float:
    """Depth pays in the late stage, up to three blocks."""
    return 10.0 - min(3, len(model.late))


def run(parts, calls):
    model, schedule, grower, _ = parts
    depths = []
    for _ in range(calls):
        schedule.optimizer.step()
        schedule.step()
        grower.step(metric(model))
        depths.append((len(model.early), len(model.late), schedule.get_last_lr()[0]))
    return depths


@pytest.mark.parametrize("wrap", [lambda rule: rule, lambda rule: when.any_of(rule, lambda reading: False)])
def test_a_grower_stops_by_itself_and_the_decay_starts(wrap):
    parts = build(wrap)
    depths = run(parts, 60)
    model, schedule, grower, rule = parts
    assert rule.frozen == ["Duplicate('early')", "Duplicate('late')"]
    assert (len(model.early), len(model.late)) == (2, 4)  # the last growth of each did not pay
    assert grower.done is (wrap(rule) is rule) and depths[-1][2] == (0.0 if grower.done else 0.01)


@pytest.mark.parametrize("saved", [2, 6, 7, 9, 14, 22, 30])
def test_a_saved_grower_goes_on(tmp_path, saved):
    expected = run(build(), 40)
    first, second = build(), build()
    depths = run(first, saved)
    ax.save(first[2], tmp_path / "run")
    assert first[2].state_dict()["choose"] is None  # the state is in the trigger, once
    ax.load(tmp_path / "run", second[2])
    assert depths + run(second, 40 - saved) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 0}, "autogrow(interval=0): interval takes whole numbers from 1."),
        ({"threshold": -1}, "autogrow(threshold=-1): a gain that pays is not negative, pass 0 or more."),
        ({"threshold": math.nan}, "autogrow(threshold=nan): threshold takes a finite number."),
        ({"mode": "up"}, "autogrow(mode='up'): mode is 'min' or 'max'."),
        ({"policy": "always"}, "autogrow(policy='always'): policy is 'convergent' or 'periodic'."),
        ({"metric": 3}, "autogrow(metric=3): metric is the name of a keyword of grower.step,"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ax.GrowthError) as raised:
        when.autogrow(**{"interval": 3, "threshold": 0.1, **arguments})
    assert str(raised.value).startswith(message)
