"""What the network sees, and what it must not see."""

import torch

from auxin.demo.training import Data
from auxin.demo.windows import Shape, last_windows, training_windows

SHAPE = Shape(lookback=6, horizon=2, level=3, season=3)


def test_windows_by_hand() -> None:
    history = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    windows = training_windows([history], SHAPE)
    # The first: 1 2 3 are known, their season is repeated before them, the level is 2; 4 and 5 come next.
    assert torch.allclose(windows.past[0], torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]) / 2 - 1)
    assert torch.allclose(windows.future[0], torch.tensor([4.0, 5.0]) / 2 - 1)
    # The last: 5 comes next, and then the series has ended.
    assert torch.allclose(windows.past[1], torch.tensor([2.0, 3.0, 1.0, 2.0, 3.0, 4.0]) / 3 - 1)
    assert torch.allclose(windows.future[1], torch.tensor([5.0 / 3 - 1, 0.0]))
    assert windows.known.tolist() == [[1, 1], [1, 0]] and len(windows) == 2


def test_too_short_series_give_no_window() -> None:
    assert len(training_windows([torch.ones(3), torch.ones(2)], SHAPE)) == 0


def test_a_level_of_zero_is_harmless() -> None:
    windows = training_windows([torch.zeros(6)], SHAPE)
    assert torch.isfinite(windows.past).all() and torch.isfinite(windows.future).all()


def test_the_end_of_a_series_is_the_past_of_its_forecast() -> None:
    past, unit = last_windows([torch.arange(1.0, 11.0), torch.arange(1.0, 6.0)], SHAPE)
    assert unit.tolist() == [[9.0], [4.0]]
    assert torch.allclose((past + 1) * unit, torch.tensor([[5.0, 6, 7, 8, 9, 10], [3, 1, 2, 3, 4, 5]]))


def test_windows_before_never_see_the_validation_months(example) -> None:
    plain, shifted = Data(example(), 1), Data(example(validation=7.0, test=9.0), 1)
    for name in ("past", "future", "known"):
        assert torch.equal(getattr(plain.before, name), getattr(shifted.before, name)), name
    network = torch.nn.Linear(plain.shape.lookback, 4)
    assert torch.equal(plain._forecast(network, *plain._validation), shifted._forecast(network, *shifted._validation))
    assert plain.validate(network) != shifted.validate(network)


def test_nothing_sees_the_test_months(example) -> None:
    plain, shifted = Data(example(), 1), Data(example(test=9.0), 1)
    for windows in ("before", "after"):
        for name in ("past", "future", "known"):
            assert torch.equal(getattr(getattr(plain, windows), name), getattr(getattr(shifted, windows), name))
    network = torch.nn.Linear(plain.shape.lookback, 4)
    assert plain.validate(network) == shifted.validate(network)
    assert torch.equal(plain.forecast(network), shifted.forecast(network))


def test_windows_after_do_see_the_validation_months(example) -> None:
    assert len(Data(example(), 1).after) == len(Data(example(), 1).before) + 60 * 4
