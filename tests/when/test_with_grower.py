"""Every trigger in a Grower: it goes on exactly after a load, beside ReduceLROnPlateau, and after a wrong call."""

import math
import random

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

import auxin as ax
from auxin import when

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


class Stop:
    """A trigger of a user's, with a state."""

    def __init__(self):
        self.count = 0

    def __call__(self, reading):
        self.count += 1
        return self.count % 11 == 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


TRIGGERS = {
    "growth_pays": lambda schedule: when.growth_pays(2e5, least=3),
    "plateau": lambda s: when.plateau(patience=4, cooldown=2),
    "every": lambda s: when.every(9),
    "at": lambda s: when.at([3, 17, 18, 31]),
    "threshold": lambda s: when.all_of(when.threshold(4.0), when.every(8)),
    "slope": lambda s: when.slope(window=9, level=0.2),
    "diverging": lambda s: when.diverging(window=9, level=0.02, nonfinite=2),
    "drift": lambda s: when.drift(threshold=4.0, window=8),
    "autogrow": lambda s: when.autogrow(interval=4, threshold=0.3),
    "any_of": lambda s: when.any_of(when.plateau(patience=5), when.drift(window=6), lambda r: r.calls == 13),
    "cooldown": lambda s: when.cooldown(when.threshold(6.0), calls=7),
    "not_while_decaying": lambda s: when.not_while_decaying(when.every(3), s),
    "of a user": lambda s: when.any_of(when.not_while_decaying(Stop(), s), when.at([40])),
    "signal": lambda s: when.any_of(when.signal(), when.every(12)),
    "file": lambda s: when.any_of(when.file("no-such-file"), when.every(12)),
}


def stream() -> list[float]:
    """Falls, stalls, jumps and climbs, with a few NaN."""
    rng = random.Random(0)
    level = [10 * 0.9**t for t in range(24)] + [1.0] * 12 + [5.0] * 14 + [5.0 + 0.4 * t for t in range(14)]
    return [math.nan if t in (20, 45, 46) else value + rng.gauss(0, 0.2) for t, value in enumerate(level)]


def build(name):
    torch.manual_seed(0)
    model = nn.Sequential(Block())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    schedule = lrs.LambdaLR(optimizer, lambda step: min((step + 1) / 8, 1.0, max(0.1, (60 - step) / 20)))
    trigger = TRIGGERS[name](schedule)
    words = {"edits": ax.Duplicate("", by=1), "limit": ax.Limit(growths=6), "probe": X[:2]}
    words |= {"choose": trigger.choose} if name == "autogrow" else {}
    if name == "growth_pays":  # it reads FLOPs, which are counted on evidence
        words["evidence"] = ax.Evidence(lambda model, batch: model(batch).square().mean(), [X])
    grower = ax.Grower(model, optimizer, schedule, when=trigger, **words)
    return model, optimizer, schedule, grower


def run(parts, readings):
    model, optimizer, schedule, grower = parts
    depths = []
    for value in readings:
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        schedule.step()
        grower.step(value)
        depths.append(len(model))
    return depths


@pytest.mark.parametrize("name", TRIGGERS)
@pytest.mark.parametrize("saved", [3, 21, 47])
def test_a_saved_grower_goes_on_exactly_with_every_trigger(tmp_path, name, saved):
    whole, first, second = build(name), build(name), build(name)
    expected = run(whole, stream())
    assert expected[-1] > 1  # it has grown
    depths = run(first, stream()[:saved])
    ax.save(first[3], tmp_path / "run")
    ax.load(tmp_path / "run", second[3])
    assert depths + run(second, stream()[saved:]) == expected
    assert repr(second[3].state_dict()["when"]) == repr(whole[3].state_dict()["when"])
    for old, new in zip(whole[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(old, new)


def test_every_trigger_is_here():
    named = set(when.__all__) - {"Mode", "Reading", "Trigger", "Unit", "all_of"}
    assert named <= set(TRIGGERS)


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_checkpoint_of_another_trigger_is_refused_and_changes_nothing(tmp_path, name):
    saved = build("drift" if name == "plateau" else "plateau")
    run(saved, stream()[:20])
    ax.save(saved[3], tmp_path / "run")
    fresh = build(name)
    run(fresh, stream()[:2])
    before = fresh[3].state_dict()
    with pytest.raises(ax.GrowthError, match="another trigger's"):
        ax.load(tmp_path / "run", fresh[3])
    assert repr(fresh[3].state_dict()) == repr(before)


@pytest.mark.parametrize("name", ["plateau", "slope", "diverging", "drift", "autogrow", "any_of", "cooldown"])
def test_a_missing_metric_is_explained_and_changes_nothing(name):
    parts = build(name)
    run(parts, stream()[:5])
    trigger = parts[3].when
    before = repr(trigger.state_dict())
    with pytest.raises(ax.GrowthError, match=r"needs a metric, but grower\.step\(acc=\.\.\.\) got none by position"):
        parts[3].step(acc=1.0)
    assert repr(trigger.state_dict()) == before and len(parts[0]) == 1


@pytest.mark.parametrize("trigger", [when.plateau, when.any_of, when.signal, when.drift, when.autogrow])
def test_a_trigger_that_was_not_built_is_named(trigger):
    model = nn.Sequential(Block())
    with pytest.raises(ax.GrowthError, match=f"when={trigger.__name__} is not a trigger yet; call it"):
        ax.Grower(model, torch.optim.SGD(model.parameters(), 0.1), edits=ax.Duplicate(""), when=trigger)


class Over:
    """A trigger that says that it will not fire any more."""

    def __init__(self, done):
        self.done = done

    def __call__(self, reading):
        return True


@pytest.mark.parametrize(("done", "stops"), [(True, True), (False, False), (lambda: True, False)])
def test_a_grower_is_done_when_its_trigger_says_so(done, stops):
    model = nn.Sequential(Block())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    grower = ax.Grower(model, optimizer, edits=ax.Duplicate("", by=1), when=Over(done), probe=X[:2])
    assert grower.done is stops and bool(grower.step()) is not stops


# ReduceLROnPlateau on the same metric


def beside_reduce(patience: int, cut_after: int, improves_at: int | None = None, calls: int = 20, guard: bool = False):
    """(calls of growths, calls of cuts) on a metric that stalls at once and gets better at one call."""
    model = nn.Sequential(Block())
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    schedule = lrs.ReduceLROnPlateau(optimizer, factor=0.1, patience=cut_after - 1)
    trigger = when.plateau(patience=patience, cooldown=0)
    trigger = when.not_while_decaying(trigger, schedule) if guard else trigger
    grower = ax.Grower(model, optimizer, schedule, edits=ax.Duplicate("", by=1), when=trigger, probe=X[:2])
    grown, cut = [], []
    for call in range(calls):
        metric = 5.0 if improves_at is None or call < improves_at else 4.0
        before = optimizer.param_groups[0]["lr"]
        schedule.step(metric)
        cut += [call] if optimizer.param_groups[0]["lr"] < before else []
        grown += [call] if grower.step(metric) else []
    return grown, cut


def test_both_count_the_same_readings_and_a_growth_does_not_stop_the_cut():
    assert beside_reduce(patience=4, cut_after=6) == ([4, 8, 12, 16], [6, 12, 18])


def test_a_growth_that_pays_in_time_puts_off_the_cut():
    grown, cut = beside_reduce(patience=4, cut_after=9, improves_at=7, calls=16)
    assert grown == [4, 11, 15] and cut == []


def test_a_cut_that_pays_puts_off_the_growth():
    grown, cut = beside_reduce(patience=9, cut_after=4, improves_at=7, calls=16)
    assert cut[0] == 4 and grown == []


def test_under_the_guard_growing_is_over_with_the_first_cut():
    assert beside_reduce(patience=4, cut_after=6, guard=True) == ([4], [6, 12, 18])


@pytest.mark.parametrize("choose", [ax.choose.first, ax.choose.by_trial()], ids=["first", "by_trial"])
def test_one_firing_is_one_growth_whoever_chooses(choose):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    evidence = ax.Evidence(lambda network, x: network(x).square().mean(), [X] * 3)
    edit, fires = ax.Duplicate("", by=1), when.at([2, 5])
    grower = ax.Grower(model, optimizer, edits=edit, when=fires, choose=choose, probe=X, evidence=evidence)
    grown = [call for call in range(1, 9) if grower.step(1.0)]
    assert grown == [2, 5] and len(model) == 4
