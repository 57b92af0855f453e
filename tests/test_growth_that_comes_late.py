"""Warned of once: growth in the decay of a learning rate; and nothing else is."""

import warnings

import torch
from torch import nn
from torch.optim import lr_scheduler as lr

import auxin as ax


def grown(make, steps, *, wrapped=False, by_hand=False):
    """What a growth at every step warns of, under the schedule that ``make(optimizer)`` returns; and the growths."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(8, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = make(opt)
    when = ax.when.every(1)
    when = ax.when.not_while_decaying(when, schedule) if wrapped else when
    grower = ax.Grower(model, opt, schedule, edits=ax.Widen("0", by=1), when=when, probe=x)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
            schedule.step()
            grower.grow(ax.Widen("0", by=1)) if by_hand else grower.step()
    return [str(one.message) for one in found if "comes late" in str(one.message)], grower


def wsd(opt):
    return ax.schedule.wsd(opt, warmup=0, decay=4, total=8)


def cosine(opt):
    return lr.CosineAnnealingLR(opt, T_max=8)


def test_in_the_decay_of_a_wsd_once():
    assert not grown(wsd, 4)[0]  # the next step is the last one at the stable rate
    (text,), grower = grown(wsd, 8)
    assert "WSD is in its decay" in text and len(grower.journal) == 8
    assert "not_while_decaying(trigger, schedule)" in text and "2511.04981" in text


def test_below_half_of_the_peak_of_any_other_schedule():
    assert not grown(cosine, 4)[0]  # half of it
    (text,), _ = grown(cosine, 7)
    assert "CosineAnnealingLR has taken the learning rate from 0.00962 to 0.00309" in text


def test_the_call_that_it_names_avoids_it():
    for make in (wsd, cosine):
        texts, grower = grown(make, 8, wrapped=True)
        assert not texts and 0 < len(grower.journal) < 8


def test_neither_a_warm_up_nor_a_rate_that_comes_back_nor_a_growth_by_hand():
    assert not grown(lambda opt: lr.LinearLR(opt, 0.01, 1.0, total_iters=8), 8)[0]
    assert not grown(lambda opt: lr.OneCycleLR(opt, 0.1, total_steps=40), 10)[0]
    assert not grown(lambda opt: lr.CosineAnnealingWarmRestarts(opt, T_0=8), 7)[0]
    assert not grown(cosine, 8, by_hand=True)[0]


def test_a_resumed_run_knows_the_peak_from_before(tmp_path):
    """The peak lies in the part of the run that another process has trained."""

    def run(cosine_of=cosine):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
        opt = torch.optim.SGD(model.parameters(), lr=0.01)
        schedule = cosine_of(opt)
        when = ax.when.at([7])
        return ax.Grower(model, opt, schedule, edits=ax.Widen("0", by=1), when=when, probe=torch.randn(8, 4))

    def calls(grower, steps):
        (opt,), schedule = grower.optimizers, grower.companions[-1]
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(steps):
                opt.zero_grad()
                grower.model(torch.ones(2, 4)).square().mean().backward()
                opt.step()
                schedule.step()
                grower.step()
        return [str(one.message) for one in found if "comes late" in str(one.message)]

    first = run()
    assert not calls(first, 6)
    ax.save(first, tmp_path / "run")
    for again in (run(), run(lambda opt: lr.ConstantLR(opt, 1.0))):
        again.load_state_dict(first.state_dict())  # the peak alone: the schedule's own state comes with ``ax.load``
    again = run()
    ax.load(tmp_path / "run", again)
    (text,) = calls(again, 1)
    assert "from 0.00962 to 0.00" in text and len(again.journal) == 1
    older = {name: value for name, value in first.state_dict().items() if name != "peaks"}
    run().load_state_dict(older)
