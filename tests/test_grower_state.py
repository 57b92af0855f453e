"""The Grower as one state machine: what is kept, what comes back, and what is refused at the door."""

import warnings

import pytest
import torch
from torch import nn

import auxin as ax

D = ax.Duplicate("blocks", by=1)
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


def build(**kwargs):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    options = {"edits": D, "when": ax.when.every(5), "probe": X[:8], **kwargs}
    return model, optimizer, ax.Grower(model, optimizer, **options)


def step(model, optimizer):
    loss = nn.functional.mse_loss(model(X), Y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_a_growth_that_was_not_recorded_is_refused_by_save_and_recorded_it_loads(tmp_path):
    model, optimizer, grower = build()
    change = ax.grow(model, D, optimizer, probe=X)
    with pytest.raises(ax.GrowthError, match=r"other code has changed it since.*grower\.record\(change\)"):
        ax.save(grower, tmp_path / "run")
    grower.record(change)
    ax.save(grower, tmp_path / "run")
    model, _, grower = build()
    ax.load(tmp_path / "run", grower)
    assert len(model.blocks) == 2


def test_surgery_of_a_grower_records_itself(tmp_path):
    model, _, grower = build()
    with grower.surgery():
        model.blocks.append(Block())
    assert len(grower.journal) == 1
    ax.save(grower, tmp_path / "run")
    model, _, grower = build()
    ax.load(tmp_path / "run", grower)
    assert len(model.blocks) == 2


def test_undo_does_not_reach_behind_a_surgery():
    model, optimizer, grower = build()
    grower.grow(D)
    with grower.surgery():
        model.out = nn.Linear(8, 3)
    with pytest.raises(ax.GrowthError, match="no growth that could be taken back.*not reach past a surgery"):
        grower.undo()
    ax.verify(model, optimizer)
    assert len(model.blocks) == 2 and model.out.out_features == 3 and len(grower.journal) == 2


def test_trials_hold_trials():
    model, optimizer, grower = build()
    before = model.state_dict()["out.weight"].clone()
    with grower.trial(D):
        step(model, optimizer)
        inside = model.state_dict()["out.weight"].clone()
        with grower.trial(D):
            step(model, optimizer)
            assert len(model.blocks) == 3
        assert len(model.blocks) == 2 and torch.equal(model.out.weight, inside)
    assert len(model.blocks) == 1 and torch.equal(model.out.weight, before)


@pytest.mark.parametrize("keep", [False, True])
def test_growing_inside_a_trial_leaves_undo_true(keep):
    model, optimizer, grower = build(keep=keep)
    step(model, optimizer)
    grower.grow(D)
    with grower.trial(None):
        grower.grow(D)
        step(model, optimizer)
    assert len(model.blocks) == 2 and len(grower.journal) == 1
    grower.undo()
    assert len(model.blocks) == 1 and len(grower.journal) == 0
    ax.verify(model, optimizer)


def test_a_trial_that_raises_leaves_the_counts():
    model, optimizer, grower = build()
    for _ in range(3):
        grower.step(step(model, optimizer))
    before = grower.state_dict()
    with pytest.raises(ZeroDivisionError), grower.trial(D):
        for _ in range(4):
            step(model, optimizer)
        raise ZeroDivisionError
    assert grower.state_dict() == before


def test_step_decides_nothing_inside_a_trial():
    model, optimizer, grower = build(when=ax.when.every(1))
    choose = ax.choose.by_trial(lambda net: 0.0, steps=lambda g: g.step(step(model, optimizer)))
    assert choose([D], grower) is None and grower.calls == 0


def test_a_probation_goes_on_after_a_resume(tmp_path):
    words = {"probation": ax.Probation(calls=4, margin=1e9), "keep": False}
    model, optimizer, grower = build(**words)
    for _ in range(7):
        grower.step(step(model, optimizer))
    ax.save(grower, tmp_path / "run")
    uninterrupted = [grower.step(step(model, optimizer)) is not None for _ in range(12)]
    model, optimizer, grower = build(**words)
    ax.load(tmp_path / "run", grower)
    assert [grower.step(step(model, optimizer)) is not None for _ in range(12)] == uninterrupted


def test_a_rolled_back_edit_stays_refused_after_a_resume(tmp_path):
    words = {"probation": ax.Probation(calls=2, window=3, margin=-1e9)}
    model, optimizer, grower = build(**words)
    for _ in range(9):
        grower.step(step(model, optimizer))
    assert grower.done and len(grower.undone) == 1 and len(model.blocks) == 1
    ax.save(grower, tmp_path / "run")
    model, optimizer, again = build(**words)
    ax.load(tmp_path / "run", again)
    assert again.done and again.undone == grower.undone


def test_a_growth_from_before_a_resume_that_did_not_pay_is_kept_with_a_warning(tmp_path):
    words = {"probation": ax.Probation(calls=4, window=3, margin=-1e9), "when": ax.when.at([5])}
    model, optimizer, grower = build(**words)
    for _ in range(6):
        grower.step(step(model, optimizer))
    ax.save(grower, tmp_path / "run")
    model, optimizer, grower = build(**words)
    ax.load(tmp_path / "run", grower)
    with pytest.warns(UserWarning, match=r"cannot be rolled back.*grower\.grow\(auxin\.Remove\('blocks\.1'\)\)"):
        for _ in range(4):
            grower.step(step(model, optimizer))
    assert len(model.blocks) == 2
    grower.grow(ax.Remove("blocks.1"))
    assert len(model.blocks) == 1


def test_undo_by_hand_ends_a_probation():
    model, optimizer, grower = build(probation=ax.Probation(calls=2, window=3), when=ax.when.at([2]))
    for _ in range(2):
        grower.step(step(model, optimizer))
    grower.undo()
    for _ in range(5):
        grower.step(step(model, optimizer))
    assert len(model.blocks) == 1 and not grower.undone


def test_a_probation_judges_a_named_metric():
    model, optimizer, grower = build(probation=ax.Probation(calls=2, window=3, margin=-1e9, metric="val"))
    for _ in range(8):
        grower.step(val=step(model, optimizer))
    assert len(grower.undone) == 1


def test_limits_are_errors_that_say_so():
    model, _, grower = build(limit=ax.Limit(parameters=10))
    with pytest.raises(ax.GrowthError, match=r"would have 297 parameters, more than limit=Limit\(parameters=10\)"):
        grower.grow(D)
    assert len(model.blocks) == 1
    _, _, grower = build(limit=ax.Limit(growths=1))
    grower.grow(D)
    with pytest.raises(ax.GrowthError, match=r"Limit\(growths=1\) is reached"):
        grower.grow(D)
    for words in ({"parameters": "1M"}, {"growths": -3}, {"flops": float("nan")}):
        with pytest.raises(ax.GrowthError, match="pass a number from 0"):
            ax.Limit(**words)


def test_a_decision_that_waits_for_long_says_why():
    model, optimizer, grower = build(when=ax.when.every(1))
    step(model, optimizer)
    nn.functional.mse_loss(model(X), Y).backward()  # an accumulation that does not end
    with pytest.warns(UserWarning, match=r"waiting for 20 calls .*; grow right after optimizer\.step"):
        for _ in range(25):
            grower.step(1.0)
    assert "no optimizer step has used" in grower.waiting_for
    optimizer.step()
    assert grower.step(1.0) is not None and grower.waiting_for is None


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"when": ax.when.plateau}, r"call it: when=auxin\.when\.plateau\(...\)"),
        ({"when": ax.when.every(1), "choose": ax.choose.cycle}, r"call it: choose=auxin\.choose\.cycle\(\)"),
        ({"choose": "first"}, r"choose is a str; pass auxin\.choose\.first"),
        ({"edits": ax.Duplicate}, "edits holds the class Duplicate"),
        ({"edits": [3]}, "edits holds a int"),
        ({"keep": "dsik"}, "store is one of"),
    ],
)
def test_refused_at_the_door(words, match):
    with pytest.raises(ax.GrowthError, match=match):
        build(**words)


def test_companions_in_a_list_and_arguments_in_the_wrong_order(tmp_path):
    model, optimizer, grower = build(edits=lambda model: D)
    with pytest.raises(ax.GrowthError, match="pass each one by itself"):
        ax.Grower(model, [optimizer], edits=D, when=ax.when.every(1))
    with pytest.raises(ax.GrowthError, match="pass the Grower first"):
        ax.save(tmp_path / "run", grower)
    with pytest.raises(ax.GrowthError, match="pass the directory first"):
        ax.load(grower, tmp_path / "run")
    for metric in (torch.ones(3), {"loss": 1.0}):
        with pytest.raises(ax.GrowthError, match="not a number"):
            grower.step(metric)
    assert "Grower(Net with Adam; every(" in repr(grower)


def test_loading_without_the_chooser_that_was_saved_changes_nothing(tmp_path):
    model, optimizer, grower = build(choose=ax.choose.cycle(), when=ax.when.plateau(patience=2))
    for _ in range(4):
        grower.step(step(model, optimizer))
    ax.save(grower, tmp_path / "run")
    model, optimizer, grower = build(when=ax.when.plateau(patience=2))
    before = (grower.state_dict(), {n: v.clone() for n, v in model.state_dict().items()})
    with pytest.raises(ax.GrowthError, match="choose= was saved with a state"):
        ax.load(tmp_path / "run", grower)
    assert grower.state_dict() == before[0]
    assert all(torch.equal(v, before[1][n]) for n, v in model.state_dict().items())


class OwnAverage:
    """A user's own average, with tensors in its state."""

    def __init__(self, model):
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def state_dict(self):
        return {"shadow": self.shadow}

    def load_state_dict(self, state):
        self.shadow = {name: value.clone() for name, value in state["shadow"].items()}


@ax.follow(OwnAverage)
def follow_own_average(average, change):
    yield
    before = dict(average.shadow)
    average.shadow = {name: before.get(name, p.detach().clone()) for name, p in change.after.items()}
    try:
        yield
    except Exception:
        average.shadow = before
        raise


def test_a_companion_of_ones_own_is_saved_at_any_size(tmp_path):
    def big():
        torch.manual_seed(0)
        model = nn.Sequential(Block(), nn.Linear(8, 60_000))
        optimizer, average = torch.optim.SGD(model.parameters(), 0.1), OwnAverage(model)
        words = {"edits": ax.Insert("", Block, index=1), "when": ax.when.every(1), "probe": X[:4]}
        return average, ax.Grower(model, optimizer, average, **words)

    average, grower = big()
    average.shadow["1.bias"].fill_(3.0)
    grower.grow(ax.Insert("", Block, index=1))
    ax.save(grower, tmp_path / "run")
    again, grower = big()
    ax.load(tmp_path / "run", grower)
    assert again.shadow.keys() == average.shadow.keys()
    assert all(torch.equal(value, average.shadow[name]) for name, value in again.shadow.items())


def test_a_network_of_nans_is_not_proved():
    model, _, grower = build()
    nn.init.constant_(model.out.weight, float("nan"))
    with pytest.raises(ax.GrowthError, match="no finite number"):
        grower.grow(D)


def test_a_scheduler_without_its_optimizer_is_refused():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(ax.GrowthError, match="drives a SGD that was not given"):
        ax.grow(model, D, scheduler, probe=X)
    other = torch.optim.SGD(model.parameters(), 0.1)
    for given in ((scheduler,), (other, scheduler)):
        with pytest.raises(ax.GrowthError, match="drives a SGD that was not given"):
            ax.Grower(model, *given, edits=D, when=ax.when.every(1), probe=X)


def test_a_refusal_that_ends_a_run_says_how_the_run_could_go_on():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    words = {"edits": lambda model: [ax.Duplicate("nowhere", by=1)], "when": ax.when.every(1), "probe": X}
    grower = ax.Grower(model, optimizer, **words)
    with pytest.raises(ax.GrowthError, match="no child 'nowhere'") as raised:
        grower.step(1.0)
    assert any("on_refused='warn'" in note for note in raised.value.__notes__)


def test_no_warning_in_an_ordinary_loop():
    model, optimizer, grower = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changes = [grower.step(step(model, optimizer)) for _ in range(12)]
    assert sum(change is not None for change in changes) == 2
