"""One run: its budget, its growths, its loss and its trigger."""

from dataclasses import replace

import pytest
import torch

import auxin as ax
from auxin.demo.network import Network
from auxin.demo.recipe import Recipe
from auxin.demo.training import Data, Job, LearningRate, Run, forward_flops, relative_error
from auxin.demo.trigger import WhileItPays
from auxin.when import Reading

RECIPE = replace(Recipe(), dim=16, budget=0.2e9, batch=32, warmup=5, readings=60)


@pytest.fixture(scope="module")
def run(example_task):
    """Builds a run on the example: ``run(depth, grows=False)``."""
    return lambda depth, grows=False: Run(Data(example_task, 1), RECIPE, Job(depth, 0, grows))


@pytest.fixture(scope="module")
def grown_once(run):
    """A run that has grown, and its outcome; the tests only look at it."""
    grown = run(1, grows=True)
    return grown, grown.go()


def test_flops_are_those_of_the_matrices() -> None:
    network = Network(lookback=6, horizon=4, dim=16, depth=3)
    by_hand = 2 * (6 * 16 + 3 * 2 * 16 * 16 + 16 * 4)
    assert forward_flops(network, torch.ones(5, 6)) == by_hand


def test_all_rows_cost_the_same(run, grown_once) -> None:
    spent = {depth: run(depth).go().flops for depth in (0, 1, 2, 4, 8)}
    _, outcome = grown_once
    assert outcome.depth > 1, "the budget of this test lets the network grow"
    assert max(spent.values()) / min(*spent.values(), outcome.flops) < 1.02
    assert outcome.flops <= sum(spent.values()) / 5


def test_a_grown_run_pays_for_its_validations_and_growths(grown_once) -> None:
    grown, outcome = grown_once
    assert grown.grower is not None
    trained = sum(
        (later["step"] - sooner["step"]) * 3 * 32 * 2 * (6 * 16 + sooner["depth"] * 2 * 16 * 16 + 16 * 4)
        for sooner, later in zip([{"step": 0, "depth": 1}, *outcome.metrics], outcome.metrics, strict=False)
    )
    validations = sum(entry["validation"] is not None for entry in outcome.metrics)
    at_least = validations * 60 * 2 * (6 * 16 + 2 * 16 * 16 + 16 * 4)
    assert outcome.metrics[-1]["flops"] - trained > at_least


def test_it_grows_only_while_months_are_held_out(grown_once) -> None:
    grown, outcome = grown_once
    held = [entry for entry in outcome.metrics if entry["validation"] is not None]
    assert max(entry["flops"] for entry in held) < 0.5 * RECIPE.budget
    assert held[-1]["depth"] == outcome.depth == 1 + len(grown.grower.journal)


def test_metrics_are_complete_and_in_order(grown_once) -> None:
    metrics = grown_once[1].metrics
    keys = {"step", "seconds", "flops", "loss", "validation", "parameters", "depth", "learning_rate"}
    assert all(set(entry) == keys for entry in metrics)
    for key in ("step", "flops", "parameters", "depth"):
        values = [entry[key] for entry in metrics]
        assert values == sorted(values), key


def test_the_same_seed_gives_the_same_forecast(run, grown_once) -> None:
    assert run(1, grows=True).go().forecast == grown_once[1].forecast


def test_a_run_leaves_the_global_random_numbers_alone(run) -> None:
    before = torch.get_rng_state()
    run(1, grows=True).go()
    assert torch.equal(before, torch.get_rng_state())


def test_a_grown_network_loads_into_a_hand_written_deeper_one(grown_once) -> None:
    grown, outcome = grown_once
    shape = grown.data.shape
    Network(shape.lookback, shape.horizon, RECIPE.dim, outcome.depth).load_state_dict(grown.network.state_dict())


def test_a_checkpoint_brings_the_run_back(run, grown_once, tmp_path) -> None:
    grown, _ = grown_once
    ax.save(grown.grower, tmp_path / "run")
    again = run(1, grows=True)
    ax.load(tmp_path / "run", again.grower)
    assert torch.equal(grown.data.forecast(grown.network), again.data.forecast(again.network))
    assert again.pace.spent == grown.pace.spent
    assert again.grower.when.state_dict() == grown.grower.when.state_dict()


def test_learning_rate_goes_up_stays_and_falls_to_zero() -> None:
    rate = LearningRate(budget=100.0, warmup=10, flat=0.5)
    assert rate(0) == pytest.approx(0.1) and rate(20) == 1
    rate.spent = 75.0
    assert rate(20) == pytest.approx(0.5)
    rate.spent = 101.0
    assert rate(20) == 0


def test_the_loss_is_smape_on_what_is_known() -> None:
    output, future = torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, 0.0]])
    known = torch.tensor([[1.0, 0.0]])
    assert float(relative_error(output, future, known)) == pytest.approx(2 * 1 / (2 + 3 + 0.05))


def fired(errors: list[float], **options: int) -> list[int]:
    trigger = WhileItPays(**{"patience": 2, "cooldown": 0, "tries": 2} | options)
    readings = [Reading(error, {}, call, 0, 0, 1) for call, error in enumerate(errors)]
    return [call for call, reading in enumerate(readings) if trigger(reading)]


def test_trigger_grows_on_plateaus_and_gives_up() -> None:
    assert fired([3.0, 3, 3, 2, 2, 2, 1, 1, 1]) == [2, 5, 8]
    # One plateau in vain is forgiven, the second in a row ends it, for good.
    assert fired([3.0, 3, 3, 3, 3, 3, 3, 1, 1, 1, 1]) == [2, 4]
    # A new best in between counts the vain ones anew.
    assert fired([3.0, 3, 3, 3, 3, 2, 2, 2, 2, 2]) == [2, 4, 7, 9]


def test_trigger_resumes_where_it_was() -> None:
    errors = [3.0, 3, 3, 3, 3, 2, 2, 2, 2, 2]
    sooner, later = WhileItPays(2, 0, 2), WhileItPays(2, 0, 2)
    calls = [Reading(error, {}, call, 0, 0, 1) for call, error in enumerate(errors)]
    first = [sooner(reading) for reading in calls[:4]]
    later.load_state_dict(sooner.state_dict())
    assert first + [later(reading) for reading in calls[4:]] == [call in (2, 4, 7, 9) for call in range(10)]
