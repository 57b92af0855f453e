"""``by_trial`` among candidates of which some cannot be had."""

import math

import pytest
import torch
from attacked import Run, assert_same, picture

import auxin as ax

torch.set_num_threads(1)
ONE, TWO, NOWHERE = ax.Duplicate("blocks", by=1), ax.Duplicate("blocks", by=2), ax.Duplicate("nowhere")


def deeper_is_better(model):
    return -len(model.blocks)


def train(grower):
    for optimizer in grower.optimizers:
        optimizer.zero_grad()
    grower.model(torch.randint(0, 7, (4, 3))).square().mean().backward()
    for optimizer in grower.optimizers:
        optimizer.step()


def ready(edits, score=deeper_is_better, **options):
    choose = ax.choose.by_trial(score=score, steps=train)
    run = Run(edits=edits, choose=choose, when=ax.when.every(1), **options)
    run.steps(2)
    return run, choose


def test_what_is_refused_is_passed_over():
    """It used to end the training loop."""
    run, choose = ready([NOWHERE, ONE])
    before = picture(run.model, *run.companions)
    edit, _ = run.grower.decide(1.0)
    assert edit == ONE and "no child 'nowhere'" in choose.results[1][1]
    assert_same(before, picture(run.model, *run.companions))


def test_what_is_beyond_the_limit_is_passed_over():
    """It used to win, and the Grower was done, though the smaller one had room."""
    block = sum(p.numel() for p in Run().model.blocks[0].parameters())
    limit = ax.Limit(parameters=sum(p.numel() for p in Run().model.parameters()) + block)
    run, choose = ready([TWO, ONE], limit=limit)
    assert run.grower.step(1.0) is not None and len(run.model.blocks) == 3
    assert "more than limit=" in choose.results[1][1] and not run.grower.done
    run.steps(1)
    assert run.grower.step(1.0) is None and run.grower.done  # nothing fits any more


def test_where_all_are_refused_the_grower_says_why():
    run, _ = ready(lambda model: [NOWHERE])  # a list is refused when the Grower is built
    with pytest.raises(ax.GrowthError, match="no child 'nowhere'"):
        run.grower.step(1.0)


def test_not_growing_may_be_what_diverges():
    run, _ = ready([ONE], score=lambda model: math.nan if len(model.blocks) == 2 else 1.0)
    assert run.grower.decide(1.0)[0] == ONE
    run, _ = ready([ONE, TWO], score=lambda model: math.nan)
    assert run.grower.decide(1.0) is None


def test_what_training_raises_in_the_branch_without_a_growth_passes_on():
    def fail(grower):
        raise ax.GrowthError("mine")

    run, choose = ready([ONE])
    choose.steps = fail
    with pytest.raises(ax.GrowthError, match="mine"):
        run.grower.step(1.0)
