"""What trains, what chooses and what tests do not overlap, and forecasts stand beside what came."""

import pickle

import pytest
import torch

from auxin.demo.demand import CYCLE, DAY, LEAD, TRAINED, Demand, training_error
from auxin.demo.forecaster import Forecaster


@pytest.fixture(scope="module")
def numbered() -> Demand:
    """Three cycles whose demand is the number of the half-hour, so that one can read off which one a value is."""
    return Demand(numbers(3 * CYCLE * DAY))


def numbers(length: int) -> torch.Tensor:
    time = torch.arange(length, dtype=torch.float64)
    return torch.stack([time, (time / 7).sin(), (time % 7 < 5).double()], 1)


def half_hours(data: Demand, values: torch.Tensor) -> torch.Tensor:
    return (values * data.size + data.mean).round().long()


def test_every_target_of_a_part_lies_in_it(numbered: Demand) -> None:
    for number, part, (first, last) in ((1, numbered.validation, (19, 23)), (2, numbered.test, (23, 27))):
        places = half_hours(numbered, part.actual)
        day = places // DAY % CYCLE
        assert day.min() == first and day.max() == last - 1
        assert (places[:, 1:] - places[:, :-1] == 1).all() and len(places) == 3
        assert (numbered.part == number).sum() == 3 * (4 * DAY - DAY + 1) == part.actual[:, 0].numel()


def test_what_is_known_ends_where_the_targets_begin(numbered: Demand) -> None:
    part = numbered.validation
    known = half_hours(numbered, part.known[:, 0])
    assert (known[:, LEAD - 1 :] + 1 == half_hours(numbered, part.actual[:, 0])).all()
    assert (half_hours(numbered, part.as_a_day_ago()) == half_hours(numbered, part.actual) - DAY).all()
    assert part.error(part.actual) == 0


def test_only_what_is_trained_on_is_in_the_loss(numbered: Demand) -> None:
    known, future, trained = numbered.batch(torch.Generator().manual_seed(0), (64, 96))
    targets = half_hours(numbered, future)
    day = targets // DAY % CYCLE
    assert (day.amax(1, keepdim=True) < TRAINED)[trained].all()
    assert (trained.float().mean((1, 2)) >= 1 / 3 - 1e-6).all() and not trained.all()
    assert (half_hours(numbered, known[:, 0]) + 1 == targets[:, 0]).all()
    network = Forecaster(4, 1).double()
    spoiled = torch.where(trained, future, future + 100)
    assert training_error(network, (known, spoiled, trained)) == training_error(network, (known, future, trained))


def test_the_units_are_those_of_the_training_part() -> None:
    table = numbers(3 * CYCLE * DAY)
    held_out = torch.arange(len(table)) // DAY % CYCLE >= TRAINED
    changed = torch.where(held_out[:, None], table + 1000, table)
    assert Demand(changed).mean == Demand(table).mean and Demand(changed).size == Demand(table).size


def test_a_stretch_knows_as_much_as_six_blocks_look_back_to() -> None:
    network = Forecaster(4, 6).double()
    values = torch.randn(1, 3, 2 * LEAD, dtype=torch.float64, requires_grad=True)
    network(values)[0, :, -1].sum().backward()
    assert values.grad is not None
    seen = values.grad[0].abs().sum(0).nonzero()[:, 0]
    assert seen.min() >= len(values[0, 0]) - LEAD and len(values[0, 0]) - seen.min() == 127


def test_it_goes_to_another_process_and_comes_back_the_same(numbered: Demand) -> None:
    again = pickle.loads(pickle.dumps(numbered))
    assert (again.values == numbered.values).all() and (again.part == numbered.part).all()
