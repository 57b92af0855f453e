"""Warned of once: growth beyond what is known to pay; and nothing else is."""

import functools
import warnings

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.limit import tokens_in

FIRST = ax.Insert("", functools.partial(nn.Linear, 4, 4), init="default")


def grower_of(edits, batch=None, width=4, **words):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [torch.randn(8, 4) if batch is None else batch]
    evidence = ax.Evidence(lambda net, b: net(b.float()).square().mean(), batches)
    when = ax.when.every(1)
    return ax.Grower(model, opt, edits=edits, when=when, evidence=evidence, probe=torch.randn(8, 4), **words)


def warned(grower, steps=1, calls=1):
    """What calls of ``step`` warn of, after so many optimizer steps."""
    grower.evidence.train(grower.model, grower.optimizers, steps)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(calls):
            assert grower.step() is not None
    return [str(one.message) for one in found if "may not pay" in str(one.message)]


def test_more_than_twice_the_parameters_at_once_once():
    (text,) = warned(grower_of(ax.Widen("0", by=12)), calls=2)
    assert text.startswith("Widen('0', by=12): this growth may not pay: ")
    assert "3.9 times as large at once (25 -> 97 parameters)" in text
    assert "2605.13405" in text and "choose=auxin.choose.by_race()" in text


def test_of_nothing_there_is_no_multiple():
    grower = ax.Grower(nn.Sequential(nn.Tanh()), edits=FIRST, when=ax.when.every(1), probe=torch.randn(8, 4))
    assert grower.step().added_parameters == 20


def test_up_to_twice_is_not():
    assert not warned(grower_of(ax.Widen("0", by=4)), calls=3)


def test_what_is_asked_for_by_hand_or_was_tried_is_not():
    grower = grower_of(ax.Widen("0", by=12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grower.grow(ax.Widen("0", by=100))
    assert not warned(grower_of([ax.Widen("0", by=12)], choose=ax.choose.by_trial(steps=1, margin=-1e9)))
    assert not warned(grower_of([ax.Widen("0", by=12)], choose=ax.choose.by_race(least=1, sure=0)), steps=30)


def test_a_branch_of_an_earlier_decision_is_no_excuse_for_a_growth_that_nobody_tried():
    by_trial = ax.choose.by_trial(steps=1, margin=-1e9)

    def choose(edits, grower):
        return (by_trial if grower.calls == 1 else ax.choose.first)(edits, grower)

    grower = grower_of(lambda model: [ax.Widen("0", by=3 * model[0].out_features)], choose=choose)
    assert not warned(grower)
    (text,) = warned(grower)
    assert "this growth may not pay" in text


def test_a_decision_that_has_to_wait_keeps_what_it_was_made_on():
    grower = grower_of(ax.Widen("0", by=12), choose=ax.choose.by_trial(steps=1, margin=-1e9))
    grower.progress.pending = grower.decide()
    grower.model(torch.randn(8, 4)).square().mean().backward()  # gradients that no step has used: not now
    assert grower.carry_out() is None and grower.progress.pending is not None
    assert not warned(grower)


def test_beyond_twenty_tokens_a_parameter_where_tokens_are_known():
    ids = torch.randint(0, 5, (8, 4))  # 32 tokens a step, 25 parameters: 500 are passed by the 16th
    assert not warned(grower_of(ax.Widen("0", by=2), ids), steps=15)
    (text,) = warned(grower_of(ax.Widen("0", by=2), ids), steps=16)
    assert "trained on 20 tokens a parameter" in text
    assert not warned(grower_of(ax.Widen("0", by=2)), steps=500)  # samples of numbers are no tokens


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"input_ids": torch.zeros(3, 7, dtype=torch.int64), "labels": torch.zeros(3)}, 21),
        ((torch.zeros(3, 7), torch.zeros(3, 7, dtype=torch.int64)), 0),
        (torch.zeros(3, dtype=torch.int64), 0),
        (torch.zeros(3, 7, dtype=torch.uint8), 0),
        ([], 0),
    ],
)
def test_tokens_of_a_batch(batch, tokens):
    assert tokens_in(batch) == tokens
