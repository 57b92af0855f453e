"""``auxin.auto``: nothing to name."""

import copy
import json

import pytest
import torch
from test_races import data, evidence, loss
from torch import nn

import auxin as ax
from auxin.ledger import flops_of

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Residual(nn.Module):
    def __init__(self, width=4, hidden=4, depth=2):
        super().__init__()
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def small(width=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 1))


def begun(model=None, steps=1500, **words):
    model = model or small()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.99))
    sched = ax.schedule.by_budget(opt)
    budget = steps * flops_of(model, loss, data())
    return model, opt, sched, ax.auto(model, opt, sched, evidence=evidence(), budget=budget, **words)


def test_it_finds_a_larger_network_and_spends_its_budget():
    model, opt, _, grower = begun()
    before = grower.evidence.validate(model)
    after = grower.train()
    print(f"{before:.3f} -> {after:.3f} at width {model[0].out_features}, {grower.spent:.3f} of the budget")
    for race in grower.races:
        print(race)
    assert model[0].out_features > 2 and after < 0.5 * before and grower.evidence.validate(model) == after
    assert 1 <= grower.spent < 1.03 and grower.finished and grower.done
    assert opt.param_groups[0]["lr"] < 1e-3 and len(grower.journal) == sum(r.change is not None for r in grower.races)
    grower.verify()


def test_the_loop_may_be_the_user_s():
    model, opt, sched, grower = begun()
    changes = []
    for number in range(100_000):
        if grower.finished:
            break
        opt.zero_grad()
        loss(model, data(number % 20)).backward()
        opt.step()
        sched.step()
        change = grower.step()
        if change:
            changes.append(change)
    assert grower.finished and changes and len(changes) == len(grower.journal)
    assert all(isinstance(change, ax.Change) for change in changes)


def test_two_runs_are_alike_to_the_last_bit():
    runs = []
    for _ in range(2):
        model, *_, grower = begun(steps=600)
        grower.train()
        runs.append((copy.deepcopy(model.state_dict()), [race.branches for race in grower.races]))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(v, runs[1][0][k]) for k, v in runs[0][0].items())


def test_what_it_offers():
    net, probe = Residual(), data()[0]
    found = ax.candidates(probe)(net)
    assert found == [ax.Widen("blocks.*.up", by=4), ax.Widen("first", by=4), ax.Duplicate("blocks")]
    assert ax.candidates(probe, width=False)(net) == [ax.Duplicate("blocks")]
    assert ax.candidates(probe, depth=False)(net) == found[:2]
    for edit in found:
        before = net(probe)
        ax.grow(net, edit, probe=probe)
        assert torch.allclose(net(probe), before, atol=1e-5)
    assert (len(net.blocks), net.first.out_features, net.blocks[3].up.out_features) == (4, 8, 8)
    with pytest.raises(ax.GrowthError, match="pass one batch"):
        ax.candidates(None)
    with pytest.raises(ax.GrowthError, match="nothing to offer"):
        ax.candidates(probe, depth=False, width=False)


def test_depth_and_width_race_together():
    torch.manual_seed(0)
    model, *_, grower = begun(Residual(), steps=400)
    grower.train()
    assert grower.races and all(len(race.branches) == 3 for race in grower.races)
    looked = grower.choose.looks[0]
    assert len(looked) == 3 and all(look.gain == look.gain for look in looked)  # measured: more edits than rivals


def test_saved_in_the_middle_it_goes_on(tmp_path):
    def until(grower, model, growths):
        while len(grower.journal) < growths:
            grower.evidence.train(model, grower.companions, 1, grower.optimizer_steps)
            grower.step()

    model, opt, sched, grower = begun(steps=600)
    until(grower, model, 1)
    ax.save(grower, tmp_path / "run")
    expected, spent = grower.train(), grower.spent
    model, opt, sched, grower = begun(steps=600)
    ax.load(tmp_path / "run", grower)
    assert grower.ledger.total > 0
    assert grower.train() == expected and grower.spent == pytest.approx(spent)


def test_parts_can_be_exchanged():
    model, *_, grower = begun(edits=[ax.Widen("0", by=1)], choose=ax.choose.by_race(shrink=1.0), steps=300)
    grower.train()
    assert model[0].out_features == 2 + len(grower.journal)


def test_the_budget_may_come_from_a_schedule():
    model = small()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=100)
    grower = ax.auto(model, opt, sched, evidence=evidence())
    assert grower.budget == 100 * flops_of(model, loss, data())


def test_what_is_missing_is_named():
    model = small()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(ax.GrowthError, match="validation=batches"):
        ax.auto(model, opt, evidence=ax.Evidence(loss, [data()]), budget=1e6)
    with pytest.raises(ax.GrowthError, match="Pass budget="):
        ax.auto(model, opt, evidence=evidence())
    with pytest.raises(ax.GrowthError, match="pass an optimizer"):
        ax.auto(model, evidence=evidence(), budget=1e6)


def test_the_rate_follows_the_budget():
    opt = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    sched = ax.schedule.by_budget(opt, warmup=2, decay=0.5)

    class Run:
        spent = 0.0

    run, rates = Run(), []
    sched.grower = run
    for spent in (0.1, 0.4, 0.5, 0.75, 1.0, 2.0):
        rates.append(sched.get_last_lr()[0])
        run.spent = spent
        opt.step()
        sched.step()
    assert rates == [0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    with pytest.raises(ax.GrowthError, match="by_budget"):
        ax.schedule.by_budget(opt, decay=0)
    assert "grower" not in " ".join(sched.state_dict())


def useless(module, site):
    """New units that say the same for every input, loudly."""
    with torch.no_grad():
        module[0].weight[2:] = 0.0
        module[0].bias[2:] = 5.0
        module[2].weight[:, 2:] = 30.0


def test_a_growth_that_only_did_harm_is_left_out_of_network_journal_and_log(tmp_path):
    """With a trigger that asks for no FLOPs, which are counted all the same."""
    edits, when = [ax.Widen("0", by=2, init=useless)], ax.when.at([380])
    model, opt, _, grower = begun(edits=edits, when=when, choose=ax.choose.first, steps=400, log=tmp_path / "run")
    loss_then = grower.train()
    assert model[0].out_features == 2 and len(grower.journal) == 0 and grower.finished
    assert grower.evidence.validate(model) == loss_then
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines if line["kind"] in ("growth", "undone")] == ["growth", "undone"]
    assert not json.loads((tmp_path / "run" / "journal.json").read_text())["entries"]
    grower.verify()
