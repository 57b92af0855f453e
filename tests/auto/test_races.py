"""Races: branches of one run on the same batches, of which the best one goes on; and what they cost."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import auxin as ax
from auxin.ledger import Ledger, flops_of
from auxin.race import Average, Branch, check_companions, shown, shrink_weights
from auxin.when.reading import Reading

torch.set_num_threads(1)


def data(seed=0, count=64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, torch.tanh(2 * x[:, :3]).sum(1, keepdim=True)


def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def evidence(**words):
    return ax.Evidence(loss, [data(n) for n in range(20)], validation=[data(99, 200)], **words)


def setup(width=4, momentum=0.9, **words):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 1))
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    sched = torch.optim.lr_scheduler.StepLR(opt, 1000)
    ema = AveragedModel(net)
    words = {"edits": ax.Widen("0", by=4), "when": ax.when.every(10**6), "evidence": evidence(), **words}
    return net, opt, sched, ema, ax.Grower(net, opt, sched, ema, probe=data()[0], **words)


def state(net, opt, sched, ema):
    held = {f"net.{k}": v for k, v in net.state_dict().items()} | {f"ema.{k}": v for k, v in ema.state_dict().items()}
    held |= {f"opt.{n}.{k}": v for n, s in opt.state_dict()["state"].items() for k, v in s.items()}
    return copy.deepcopy(held | {"lr": torch.tensor(sched.get_last_lr()), "epoch": torch.tensor(sched.last_epoch)})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(v), torch.as_tensor(b[k])) for k, v in a.items())


def test_the_run_goes_on_as_the_branch_that_won():
    """By hand: grow, train as many steps on the same batches, and compare every tensor of the run."""
    net, opt, sched, ema, grower = setup()
    race = grower.race([ax.Widen("0", by=12)], steps=60)
    print(race)
    assert race.winner == 1 and race.change is not None and len(grower.journal) == 1
    assert race.branches[1].score < race.branches[0].score

    own, opt2, sched2, ema2, other = setup()
    other.grow(ax.Widen("0", by=12))
    other.evidence.train(own, other.companions, 60)
    assert same(state(net, opt, sched, ema), state(own, opt2, sched2, ema2))
    assert grower.optimizer_steps == other.optimizer_steps == 60
    grower.verify()
    grower.evidence.train(net, grower.companions, 10, 60)
    other.evidence.train(own, other.companions, 10, 60)
    assert same(state(net, opt, sched, ema), state(own, opt2, sched2, ema2))


def useless(module, site):
    """New units that say the same for every input, so that growing does harm."""
    with torch.no_grad():
        module[0].weight[4:] = 0.0
        module[0].bias[4:] = 5.0
        module[2].weight[:, 4:] = 3.0


def test_where_growing_loses_the_network_as_it_was_goes_on_trained():
    net, opt, sched, ema, grower = setup()
    race = grower.race([ax.Widen("0", by=4, init=useless)], steps=5)
    assert race.winner == 0 and race.change is None and not len(grower.journal)
    own, opt2, sched2, ema2, other = setup()
    other.evidence.train(own, other.companions, 5)
    assert same(state(net, opt, sched, ema), state(own, opt2, sched2, ema2))


def test_of_several_the_winner_need_not_be_the_last():
    net, *_, grower = setup()
    edits = [ax.Widen("0", by=12), ax.Widen("0", by=4, init=useless)]
    race = grower.race(edits, steps=40, shrink=0.5)
    assert race.winner == 1 and net[0].out_features == 16
    assert [b.parameters for b in race.branches] == [33, 129, 65]


def test_what_is_refused_or_too_large_is_passed_over():
    net, *_, grower = setup(limit=ax.Limit(parameters=100))
    race = grower.race([ax.Widen("nowhere", by=1), ax.Widen("0", by=100)], steps=3)
    assert race.winner == 0 and net[0].out_features == 4
    assert "nowhere" in race.branches[1].why_not and "more than limit" in race.branches[2].why_not


def test_an_error_in_a_branch_leaves_all_as_it_was():
    calls = []

    def breaks(model, batch):
        calls.append(1)
        if len(calls) > 30:
            raise ZeroDivisionError("the data ran out")
        return loss(model, batch)

    net, opt, sched, ema, grower = setup(evidence=ax.Evidence(breaks, [data()]))
    before = state(net, opt, sched, ema)
    with pytest.raises(ZeroDivisionError):
        grower.race([ax.Widen("0", by=4)], steps=40)
    assert same(state(net, opt, sched, ema), before) and not len(grower.journal)
    with pytest.raises(ax.GrowthError, match="the loss failed: the data ran out"):  # before anything is tried
        grower.race([ax.Widen("0", by=4)], steps=1)
    assert same(state(net, opt, sched, ema), before)


def branch(score, losses=()):
    return Branch(None, score, 1, 1.0, "", tuple(losses))


def test_a_loss_that_is_not_finite_never_wins():
    assert branch(5.0).beats(branch(math.nan), 0) and not branch(math.nan).beats(branch(5.0), 0)
    assert not branch(math.nan).beats(branch(math.nan), 0) and not branch(math.inf).beats(branch(2.0), 0)
    assert not branch(2.0).beats(branch(2.0), 0)


def test_what_is_ahead_by_chance_does_not_win():
    noise = torch.randn(16, generator=torch.Generator().manual_seed(0)).tolist()
    one = branch(1.0, [1 + n for n in noise])
    chance, better = branch(0.99, [1.0 + n for n in reversed(noise)]), branch(0.9, [0.9 + n for n in noise])
    assert chance.beats(one, 0) and not chance.beats(one, 1.0) and better.beats(one, 3.0)
    assert branch(0.99, [0.99] * 4).beats(branch(1.0, [1.0] * 4), 1.0)  # too few to tell


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"steps": 0}, "whole number of training steps from 1"),
        ({"steps": 5, "shrink": 0}, "factor above 0"),
        ({"steps": 5, "averaged": 2}, "at most 1"),
    ],
)
def test_bad_arguments(words, match):
    *_, grower = setup()
    with pytest.raises(ax.GrowthError, match=match):
        grower.race([ax.Widen("0", by=4)], **words)


def test_without_evidence_it_says_what_is_missing():
    *_, grower = setup(evidence=None)
    with pytest.raises(ax.GrowthError, match=r"evidence=auxin.Evidence\(loss, batches\)"):
        grower.race([ax.Widen("0", by=4)], steps=5)


def test_a_user_s_own_step_is_taken():
    def step(model, batch):
        taken.append(len(taken))
        opt.zero_grad()
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()

    taken = []
    _, opt, *_, grower = setup(evidence=evidence(step=step))
    grower.race([ax.Widen("0", by=4)], steps=7)
    assert len(taken) == 14


def test_the_ledger_counts_winners_as_training_and_losers_as_races():
    net, *_, grower = setup()
    small = flops_of(net, loss, data())
    race = grower.race([ax.Widen("0", by=12)], steps=10)
    large = flops_of(net, loss, data())
    assert race.winner == 1 and large == 4 * small
    assert grower.ledger.flops["training"] == 10 * large and grower.ledger.flops["races"] == 10 * small
    assert grower.ledger.flops["evaluation"] > 0 and "training" in str(grower.ledger)
    # 6 x 4 and 4 x 1 products of 64 samples: forward, and backward for weights and for inputs but those of the first
    assert small == 64 * 2 * (24 + 4 + 24 + 4 + 4)


def test_a_network_that_is_not_counted_is_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.factor

    with pytest.raises(ax.GrowthError, match="no FLOPs are counted"):
        flops_of(Scale(), lambda m, b: m(b[0]).mean(), data())


def test_counting_leaves_the_network_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    flops_of(net, loss, data())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in net.parameters())


def test_shrinking_leaves_norms():
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.BatchNorm1d(3))
    before = copy.deepcopy(net)
    shrink_weights(net, 0.5)
    assert torch.equal(net[0].weight, before[0].weight / 2) and torch.equal(net[0].bias, before[0].bias / 2)
    assert torch.equal(net[1].weight, before[1].weight) and torch.equal(net[2].weight, before[2].weight)


def test_layers_are_shrunk_together():
    net = nn.Sequential(
        nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.LayerNorm(3), nn.Linear(3, 3, bias=False)
    )
    net, x = net.double(), torch.randn(4, 3, dtype=torch.float64)
    before, inner = net[0].weight.clone(), net[:2](x)
    shrink_weights(net, 0.5)
    assert torch.allclose(net[0].weight, before * 0.5 ** (1 / 3)) and torch.allclose(net[:2](x), inner * 0.5 ** (2 / 3))


def test_what_is_tied_is_shrunk_once_and_what_is_frozen_not_at_all():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    net[2].weight = net[0].weight
    net[1].requires_grad_(False)
    before = copy.deepcopy(net)
    shrink_weights(net, 0.5)
    assert torch.equal(net[2].weight, before[2].weight / 2) and net[2].weight is net[0].weight
    assert torch.equal(net[1].weight, before[1].weight) and torch.equal(net[1].bias, before[1].bias)


def test_a_schedule_that_counts_epochs_stands_still_in_a_race():
    net, opt, sched, _, grower = setup()
    epochs = torch.optim.lr_scheduler.StepLR(opt, 1)  # stepped twice in what follows, and not by the race
    for number in range(20):
        grower.evidence.train(net, [opt, sched], 1, number)
        if number % 10 == 9:
            epochs.step()
    metric = torch.optim.lr_scheduler.ReduceLROnPlateau(opt)  # waits for a metric
    grower.evidence.train(net, [opt, metric], 1, 0)
    grower.evidence.train(net, [opt, sched, epochs], 10, 20)
    assert epochs.last_epoch == 2 and sched.last_epoch == 30


def test_an_average_that_a_plain_step_leaves_out_is_named():
    class Ema:  # as other packages write them
        def __init__(self, model):
            self.shadow = copy.deepcopy(model)

        def update(self):
            pass

    with pytest.raises(ax.GrowthError, match=r"how Ema takes part in a step is not known.*step=f"):
        check_companions([Ema(nn.Linear(2, 2))])
    net = nn.Linear(2, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(opt)
    check_companions([opt, schedule, AveragedModel(net), torch.amp.GradScaler("cpu")])


def test_the_mean_of_weights_stands_only_inside():
    net = nn.Linear(2, 1)
    average, values = Average(net), []
    for _ in range(3):
        with torch.no_grad():
            net.weight.normal_()
        values.append(net.weight.detach().clone())
        average.add()
    with average.standing():
        assert torch.allclose(net.weight, sum(values) / 3)
    assert torch.equal(net.weight, values[-1])


def test_edits_are_shown_as_one_writes_them():
    several = ax.candidates(data()[0])(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 1)))
    assert shown(several[0]) == "Widen('0', by=4), Widen('2', by=3)"
    assert shown(ax.Duplicate("blocks", by=2)) == "Duplicate('blocks', by=2)"


# ---- when


def test_it_fires_at_growing_intervals_and_ends():
    trigger = ax.when.growth_pays(1000, least=10)
    spent, steps, fired = 0.0, 0, []
    while spent < 1000:
        spent, steps = spent + 10, steps + 1
        if trigger(Reading(None, {}, steps, steps, 0, 1, spent)):
            fired.append(spent)
            spent *= 2  # what a race costs
    assert fired == [100, 320] and trigger.done
    again = ax.when.growth_pays(1000)
    again.load_state_dict(trigger.state_dict())
    assert again.done


@pytest.mark.parametrize("words", [{"budget": 0}, {"budget": -1}, {"budget": 1, "ratio": 1}, {"budget": math.inf}])
def test_triggers_are_checked(words):
    with pytest.raises(ax.GrowthError, match="growth_pays"):
        ax.when.growth_pays(**words)


def test_a_ledger_goes_through_its_state():
    ledger = Ledger()
    ledger.spend("races", 3.0, 1.0)
    other = Ledger()
    other.load_state_dict(ledger.state_dict())
    assert other == ledger
    with pytest.raises(ax.GrowthError, match="not the state of a ledger"):
        other.load_state_dict({"flops": {}})


def test_a_network_that_an_evaluation_has_left_in_eval_mode_trains_in_train_mode():
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval()
    opt = torch.optim.SGD(net.parameters(), lr=0.01)
    evidence().train(net, [opt], 3)
    assert int(net[1].num_batches_tracked) == 3 and not any(m.training for m in net.modules())
    net.train()
    net[1].eval()  # on purpose: frozen statistics
    evidence().train(net, [opt], 3)
    assert int(net[1].num_batches_tracked) == 3 and net[0].training and not net[1].training


def test_an_edit_does_not_race_when_the_rest_of_the_budget_is_too_short_for_it():
    """Of the larger network the rest must pay for as many steps as were taken."""
    torch.manual_seed(0)
    x, y = data()
    for ahead, races in ((1.0, 1), (1e4, 0)):
        net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        evidence = ax.Evidence(lambda m, b: F.mse_loss(m(b[0]), b[1]), [(x, y)], validation=[(x, y)])
        when, choose = ax.when.growth_pays(1e7, least=5), ax.choose.by_race(ahead=ahead)
        grower = ax.auto(net, opt, evidence=evidence, budget=1e7, when=when, choose=choose)
        while not grower.ledger.decisions:
            evidence.train(net, [opt], 1, grower.optimizer_steps)
            grower.step()
        decision = grower.ledger.decisions[0]
        assert len(grower.races) == races and len(decision.options) == 1 + races
        assert (decision.chosen is None) == (races == 0)
