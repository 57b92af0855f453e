"""Trial, undo and snapshots: bit for bit as before."""

import gc

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.trial import Snapshot


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.down(self.drop(torch.relu(self.up(x))))


class Net(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(depth))
        self.out = nn.Linear(8, 1)

    def forward(self, x):
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Run:
    def __init__(self, **kwargs):
        torch.manual_seed(0)
        self.model = Net()
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.sched = torch.optim.lr_scheduler.OneCycleLR(self.opt, 1e-2, total_steps=500)
        self.ema = torch.optim.swa_utils.AveragedModel(self.model, use_buffers=True)
        self.scaler = torch.amp.GradScaler("cpu")
        companions = (self.opt, self.sched, self.ema, self.scaler)
        options = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.every(1000), **kwargs}
        self.grower = ax.Grower(self.model, *companions, probe=torch.randn(4, 8), **options)

    def train(self, steps):
        losses = []
        for _ in range(steps):
            x = torch.randn(16, 8)
            loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
            self.opt.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.opt)
            self.scaler.update()
            self.sched.step()
            self.ema.update_parameters(self.model)
            losses.append(loss.item())
        return losses


@pytest.fixture
def expected():
    run = Run()
    run.train(5)
    return run.train(10)


def test_a_trial_leaves_no_trace(expected):
    run = Run()
    run.train(5)
    with run.grower.trial(ax.Duplicate("blocks", by=2)) as change:
        run.train(7)
        assert len(run.model.blocks) == 4 and change is not None
    assert len(run.model.blocks) == 2 and len(run.grower.journal) == 0
    run.grower.verify()
    assert run.train(10) == expected


def test_a_trial_that_raises_leaves_no_trace(expected):
    run = Run()
    run.train(5)
    with pytest.raises(ZeroDivisionError), run.grower.trial(ax.Duplicate("blocks", by=1)):
        run.train(2)
        _ = 1 / 0
    assert run.train(10) == expected


def test_undo_before_the_next_step_is_exact(expected):
    run = Run()
    run.train(5)
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.grower.undo()
    assert len(run.model.blocks) == 2 and len(run.grower.journal) == 0
    assert run.train(10) == expected


def test_undo_with_a_snapshot_after_more_training(expected):
    undone = []
    run = Run(keep=True, on_undo=lambda: undone.append(1))
    run.train(5)
    change = run.grower.grow(ax.Duplicate("blocks", by=1))
    assert "snapshot" in str(change)
    run.train(6)
    run.grower.undo()
    run.grower.verify()
    assert run.train(10) == expected and undone == [1]


def test_undo_without_a_snapshot_is_refused_after_a_step():
    run = Run()
    with pytest.raises(ax.GrowthError, match="no growth that could be taken back"):
        run.grower.undo()
    run.train(3)
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.train(1)
    with pytest.raises(ax.GrowthError, match="keep=True .* Remove"):
        run.grower.undo()
    assert len(run.model.blocks) == 3


def test_a_growth_stays_when_the_grower_is_dropped():
    run = Run()
    run.train(2)
    run.grower.grow(ax.Duplicate("blocks", by=1))
    del run.grower
    gc.collect()
    assert len(run.model.blocks) == 3 and len(run.ema.module.blocks) == 3
    ax.verify(run.model, run.opt, run.sched, run.ema)


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_snapshot_restores_values_written_in_place(store):
    model = Net()
    snapshot = Snapshot([model], store)
    snapshot.take()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for p in model.parameters():
        nn.init.zeros_(p)
    model.norm.running_mean.add_(1)
    model.blocks.append(Block(8))
    model.eval()
    snapshot.restore()
    after = model.state_dict()
    assert after.keys() == before.keys() and model.training
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_by_trial_takes_the_edit_that_helps_and_none_where_none_does():
    run = Run()
    run.train(3)
    good, bad = ax.Duplicate("blocks", by=1), ax.Duplicate("blocks", by=2)
    scores = {2: 1.0, 3: 0.5, 4: 2.0}
    choose = ax.choose.by_trial(lambda model: scores[len(model.blocks)], steps=lambda grower: run.train(2))
    assert choose([bad, good], run.grower) is good
    assert choose.results == [(None, 1.0), (bad, 2.0), (good, 0.5)]
    assert choose([bad], run.grower) is None
    assert ax.choose.by_trial(lambda model: 1.0, steps=lambda grower: None)([bad, good], run.grower) is None


def test_by_trial_on_evidence_needs_it():
    run = Run()
    with pytest.raises(ax.GrowthError, match="evidence=auxin.Evidence"):
        ax.choose.by_trial()([ax.Duplicate("blocks", by=1)], run.grower)


def test_by_trial_on_evidence_trains_each_branch_on_the_same_batches(expected):
    batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    evidence = ax.Evidence(lambda model, x: (model(x) - x.sum(1, keepdim=True)).square().mean(), batches)
    run = Run(evidence=evidence)
    run.train(5)
    choose = ax.choose.by_trial(steps=4)
    same = [ax.Duplicate("blocks", by=1), ax.Duplicate("blocks", by=1)]
    choose(same, run.grower)
    assert choose.results[1][1] == choose.results[2][1] and choose.results[0][1] != choose.results[1][1]
    assert run.train(10) == expected


def probationer(slope, **kwargs):
    run = Run(when=ax.when.at([6]), probation=ax.Probation(calls=3, window=5), **kwargs)
    changes = []
    for call in range(1, 15):
        run.train(1)
        after = call > 6 and run.model and len(run.model.blocks) > 2
        metric = 10.0 - call + (slope if after else 0.0)
        changes.append(run.grower.step(metric))
    return run, changes


def test_a_growth_behind_the_run_without_it_is_rolled_back_and_not_tried_again():
    put_back = []
    run, _ = probationer(5.0, on_undo=lambda: put_back.append(1))
    assert len(run.model.blocks) == 2 and len(run.grower.journal) == 0 and put_back == [1]
    assert [entry["undone_at"] for entry in run.grower.undone] == [{"calls": 9}]
    assert run.grower.done  # its only edit did not pay
    run.grower.verify()


def test_a_growth_ahead_of_the_run_without_it_stays():
    run, changes = probationer(-0.5)
    assert len(run.model.blocks) == 3 and not run.grower.undone and sum(c is not None for c in changes) == 1


def test_a_roll_back_leaves_the_run_that_never_grew(expected):
    run = Run(when=ax.when.at([5]), probation=ax.Probation(calls=2, window=3))
    for call in range(1, 6):
        run.train(1)
        run.grower.step(5.0 - call)
    assert len(run.model.blocks) == 3
    for _ in range(2):
        run.train(1)
        run.grower.step(100.0)
    assert len(run.model.blocks) == 2
    assert run.train(10) == expected


@pytest.mark.parametrize("words", [{"calls": 0}, {"window": 2}, {"mode": "least"}])
def test_bad_probations(words):
    with pytest.raises(ax.GrowthError, match="calls is at least 1"):
        ax.Probation(**words)
