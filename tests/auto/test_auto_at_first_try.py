"""What one passes to ``auto`` at the first try: loaders, small budgets, frozen parts, schedules that count steps."""

import warnings

import pytest
import torch
from test_races import data, evidence, loss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import auxin as ax
from auxin.auto import _steps_of
from auxin.ledger import flops_of

torch.set_num_threads(1)
X, Y = data(0, 96)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (
            DataLoader(TensorDataset(X, Y), batch_size=32, shuffle=True),
            r"a DataLoader may draw others .* list\(loader\)",
        ),
        (TensorDataset(X, Y), r"gives single samples: list\(torch.utils.data.DataLoader\(dataset"),
        (X, r"a tensor is one batch: \[tensor\]"),
        ((X, Y), r"a tuple of tensors is one batch: Evidence\(loss, \[\(x, y\)\]\), or \[\*x.split"),
        ({"x": X, "y": Y}, r"a dict of tensors is one batch: Evidence\(loss, \[batch\]\)\.$"),
        (((x, y) for x, y in [(X, Y)]), r"a generator is empty after one pass: list\(...\)"),
        ([], r"a list of batches.*, not \[\]"),
        (3, r"a list of batches.*, not 3"),
    ],
)
def test_evidence_says_what_to_pass_instead(batches, said):
    with pytest.raises(ax.GrowthError, match=said):
        ax.Evidence(loss, batches)
    with pytest.raises(ax.GrowthError, match=said):
        ax.Evidence(loss, [(X, Y)], validation=batches)
    assert ax.Evidence(loss, list(DataLoader(TensorDataset(X, Y), batch_size=32))).mean(nn.Linear(6, 1)) > 0


def net():
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))


def begun(steps=None, schedule=None, model=None, **words):
    model = model or net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    budget = None if steps is None else steps * flops_of(model, loss, data())
    companions = [] if schedule is None else [schedule(opt)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        grower = ax.auto(model, opt, *companions, evidence=evidence(), budget=budget, **words)
    return grower, [str(warning.message) for warning in told]


def test_a_budget_in_which_nothing_can_grow_is_told_of():
    grower, told = begun(100)
    assert len(told) == 1 and "that is 100 training steps" in told[0] and "nothing will grow" in told[0]
    grower.train()
    assert not grower.races
    assert not begun(200)[1] and not begun(100, when=ax.when.growth_pays(1e9, least=5))[1]


def test_a_schedule_that_counts_steps_is_told_of():
    cosine, linear, constant = (
        getattr(torch.optim.lr_scheduler, name) for name in ("CosineAnnealingLR", "LinearLR", "ConstantLR")
    )
    grower, told = begun(schedule=lambda opt: cosine(opt, 1000))
    assert len(told) == 1 and "CosineAnnealingLR counts 1000 steps" in told[0] and "by_budget" in told[0]
    assert grower.budget == 1000 * flops_of(net(), loss, data())
    assert not begun(300, schedule=ax.schedule.by_budget)[1]
    opt = torch.optim.AdamW(net().parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [_steps_of(one) for one in (linear(opt, 0.1, total_iters=50), constant(opt))] == [None, None]  # warm-ups
        assert _steps_of(linear(opt, 1.0, 0.0, total_iters=50)) == 50
    with pytest.raises(ax.GrowthError, match="how long is the run"):
        begun(schedule=lambda opt: linear(opt, 0.1, total_iters=50))


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()).requires_grad_(False)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)))
        self.head = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, x):
        return self.head(self.blocks(self.body(x)))


def test_what_is_frozen_is_left_alone():
    model = Frozen()
    model.blocks.requires_grad_(False)
    assert ax.candidates(X)(model) == [ax.Widen("head.0", by=4)]
    model.blocks.requires_grad_(True)
    at = {one.at for edit in ax.candidates(X)(model) for one in getattr(edit, "edits", [edit])}
    assert at == {"blocks.0.0", "blocks.1.0", "head.0", "blocks"}
    model.head.requires_grad_(False)  # new units that a frozen layer reads would never count
    at = {one.at for edit in ax.candidates(X)(model) for one in getattr(edit, "edits", [edit])}
    assert at == {"blocks.0.0", "blocks"}
    assert "tensor" not in repr(ax.candidates(X))


class Unfollowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, x):
        if type(x.shape[0]) is not int:
            raise TypeError("a plain number, please")
        return self.b(torch.relu(self.a(x)))


def test_where_nothing_can_grow_a_warning_says_so():
    with pytest.warns(UserWarning, match="offers no width of Unfollowed: .*a plain number, please"):
        assert ax.candidates(X)(Unfollowed()) == []
    grower, _ = begun(400, model=nn.Sequential(nn.Flatten(), nn.Linear(6, 1)))
    with pytest.warns(UserWarning, match="there is no edit to race, Sequential stays as it is"):
        grower.train()


def test_a_candidate_that_is_refused_does_not_end_the_run():
    grower, _ = begun(400, model=nn.Sequential(nn.Linear(6, 1)))  # a list of one block, which no copy fits behind
    with pytest.warns(UserWarning, match=r"Duplicate.* was refused, and is not chosen any more"):
        assert grower.train() > 0
    assert grower.finished


def test_a_run_that_has_diverged_is_named():
    model = net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    broken = ax.Evidence(lambda m, b: loss(m, b) * float("nan"), evidence().batches, validation=evidence().validation)
    grower = ax.auto(model, opt, evidence=broken, budget=300 * flops_of(model, loss, data()))
    with pytest.raises(ax.GrowthError, match="the loss is nan.*has the run diverged"):
        grower.train()
