"""An old network, three plans for it, and a judgement that costs what it says and leaves nothing behind."""

import copy
from dataclasses import replace

import pytest
import torch

from auxin.demo.demand import CYCLE, DAY, Demand, training_error
from auxin.demo.more_compute import PLANS, Bench, Setting, judge, old_network, planned

TINY = replace(Setting(), dim=4, spent=30e6, batch=(1, 288), pilot_batch=(8, 96), warmup=2)


def demand() -> Demand:
    """Three cycles of something that repeats each day, with a little noise."""
    time = torch.arange(3 * CYCLE * DAY)
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    return Demand(torch.stack([(time * (2 * torch.pi / DAY)).sin() + noise / 10, noise, (time % 7 < 5).float()], 1))


@pytest.fixture(scope="module")
def old() -> Bench:
    bench, losses = old_network(demand(), TINY, 0)
    assert len(list(losses)) == bench.steps > 10
    return bench


def state(bench: Bench) -> list[torch.Tensor]:
    held = [entry for entries in bench.optimizer.state.values() for entry in entries.values()]
    return [*bench.network.parameters(), *held, bench.generator.get_state()]


def test_every_plan_has_the_same_flops(old: Bench) -> None:
    added = 4 * TINY.more  # so that a step is a small part of it
    for plan in PLANS:
        with old.branch():
            before, step = old.spent, 0.0
            bench, losses = planned(plan, old, added)
            step = bench.cost()
            assert len(list(losses)) > 3
            assert added - step < bench.spent - before <= added, plan
            assert len(bench.network.blocks) == (3 if plan == "go on" else 6)
            assert bench.optimizer.param_groups[0]["lr"] < TINY.rates[PLANS.index(plan)] / 2, "it has decayed"


def test_growing_keeps_the_function_and_starting_anew_does_not(old: Bench) -> None:
    values = old.data.validation
    before = values.forecast(old.network)
    with old.branch():
        assert "function unchanged" in str(old.grow())
        assert torch.equal(values.forecast(old.network), before)
    with old.branch():
        bench, _ = planned("start anew", old, TINY.more)
        assert bench is not old and not torch.allclose(values.forecast(bench.network), before, atol=0.01)


def test_the_judgement_leaves_everything_as_it_was(old: Bench) -> None:
    before, steps, spent = copy.deepcopy(state(old)), old.steps, old.spent
    verdict = judge(old, 40 * TINY.more)
    assert [plan.name for plan in verdict.plans] == list(PLANS) and verdict.rounds
    assert 0 < verdict.price <= 4 * TINY.more and verdict.best.name in PLANS
    assert len(old.network.blocks) == 3 and (old.steps, old.spent) == (steps, spent)
    assert old.grower.optimizer_steps == steps
    assert all(torch.equal(a, b) for a, b in zip(state(old), before, strict=True))


def test_the_batches_that_are_judged_have_the_errors_of_the_part(old: Bench) -> None:
    part = old.data.validation
    losses = [training_error(old.network, batch).item() for batch in part.batches()]
    assert sum(losses) / len(losses) == pytest.approx(part.error(part.forecast(old.network)), rel=1e-4)
