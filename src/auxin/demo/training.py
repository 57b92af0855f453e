"""One run: a network of a fixed depth, or one that grows, on a fixed budget of training FLOPs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import auxin as ax
from auxin.demo.network import Network
from auxin.demo.recipe import Recipe
from auxin.demo.series import Task, smape
from auxin.demo.trigger import WhileItPays
from auxin.demo.windows import Shape, Windows, last_windows, training_windows

_LOGGED = 100  # metrics per run once nothing is validated any more


@dataclass(frozen=True)
class Job:
    """What to train: ``depth`` blocks to begin with, and whether more may grow."""

    depth: int
    seed: int
    grows: bool = False


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        job: what was asked for.
        depth: blocks at the end.
        parameters: at the end.
        flops: of training; a grown network's validations and the checks of its growths are in it.
        steps: of the optimizer.
        seconds: of wall-clock time.
        forecast: (series, horizon) as nested lists.
        metrics: what was measured on the way.
    """

    job: Job
    depth: int
    parameters: int
    flops: float
    steps: int
    seconds: float
    forecast: list[list[float]]
    metrics: list[dict[str, Any]] = field(default_factory=list)


class LearningRate:
    """Factor of the learning rate by the share of the budget that is spent: up, flat, and down to 0.

    An object with numbers, and no closure, so that ``LambdaLR`` and a checkpoint can store it.
    """

    def __init__(self, budget: float, warmup: int, flat: float):
        self.budget, self.warmup, self.flat, self.spent = budget, warmup, flat, 0.0

    def __call__(self, step: int) -> float:
        """The factor at ``step``."""
        left = (1 - self.spent / self.budget) / (1 - self.flat)
        return min(1.0, (step + 1) / max(1, self.warmup)) * max(0.0, min(1.0, left))


class Data:
    """What a task's runs share: the windows to train on, with and without the validation months.

    Args:
        task: the series; of their futures nothing is looked at here.
        stride: every how many-th series is validated, where there are many.
    """

    def __init__(self, task: Task, stride: int):
        horizon = task.horizon
        self.task, self.shape = task, Shape.of(horizon, task.season)
        held_out = [history[:-horizon] for history in task.histories]
        self.before = training_windows(held_out, self.shape)
        self.after = training_windows(task.histories, self.shape)
        chosen = slice(None, None, stride if len(held_out) >= 100 * stride else 1)
        self._validation = last_windows(held_out[chosen], self.shape)
        self._actual = torch.stack([history[-horizon:] for history in task.histories[chosen]])
        self._end = last_windows(task.histories, self.shape)

    @property
    def validated(self) -> int:
        """Forecasts that one validation makes."""
        return len(self._actual)

    def validate(self, network: nn.Module) -> float:
        """SMAPE on the last known months, in percent."""
        return smape(self._actual, self._forecast(network, *self._validation))

    def forecast(self, network: nn.Module) -> Tensor:
        """(series, horizon): what comes after the histories."""
        return self._forecast(network, *self._end)

    @torch.no_grad()
    def _forecast(self, network: nn.Module, past: Tensor, unit: Tensor) -> Tensor:
        network.eval()
        relative = network(past) + 1
        network.train()
        return (relative.clamp_min(0) if self.task.nonnegative else relative) * unit


def relative_error(output: Tensor, future: Tensor, known: Tensor) -> Tensor:
    """The loss: sMAPE's own form, softened where both values are near 0.

    Args:
        output: (batch, horizon), relative to the level, minus 1.
        future: likewise, what happened.
        known: (batch, horizon), 1 where ``future`` is known.
    """
    size = (output + 1).abs() + (future + 1).abs() + 0.05
    return (2 * (output - future).abs() / size * known).sum() / known.sum()


def forward_flops(network: nn.Module, past: Tensor) -> float:
    """FLOPs of one forward per window, counted by torch."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(past)
    return counter.get_total_flops() / len(past)


class Run:
    """Trains one network; ``go`` does it, ``grower`` is there where the job grows.

    Args:
        data: of the task.
        recipe: the settings.
        job: what to train.
        on_metrics: called with every dict of metrics.
        on_growth: called with every growth.
    """

    def __init__(
        self,
        data: Data,
        recipe: Recipe,
        job: Job,
        on_metrics: Callable[[dict[str, Any]], None] = lambda entry: None,
        on_growth: Callable[[ax.Change], None] = lambda change: None,
    ):
        self.data, self.recipe, self.job, self.on_metrics = data, recipe, job, on_metrics
        self.metrics: list[dict[str, Any]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            self.network = Network(data.shape.lookback, data.shape.horizon, recipe.dim, job.depth)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=recipe.learning_rate, fused=True)
        self.pace = LearningRate(recipe.budget, recipe.warmup, recipe.flat)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.pace)
        self.probe = data.before.past[:64]
        self.flops_per_window = forward_flops(self.network, self.probe)
        self.grower = self._grower(on_growth) if job.grows else None

    def _grower(self, on_growth: Callable[[ax.Change], None]) -> ax.Grower:
        """All that it takes to make the network grow."""
        return ax.Grower(
            self.network,
            self.optimizer,
            self.schedule,
            edits=ax.Duplicate("blocks", by=1),
            when=WhileItPays(self.recipe.patience, self.recipe.cooldown, self.recipe.tries),
            limit=ax.Limit(growths=self.recipe.growths),
            probe=self.probe,
            on_growth=on_growth,
        )

    def go(self) -> Outcome:
        """Train until the budget is spent, then forecast."""
        recipe, start = self.recipe, time.perf_counter()
        generator = torch.Generator().manual_seed(self.job.seed)
        steps, due, held_out, losses = 0, recipe.budget / recipe.readings, True, _Mean()
        batches = _batches(self.data.before, recipe.batch, generator)
        while self._affordable():
            if held_out and self.pace.spent >= recipe.hold * recipe.budget:
                held_out, batches = False, _batches(self.data.after, recipe.batch, generator)
            past, future, known = next(batches)
            loss = relative_error(self.network(past), future, known)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.pace.spent += 3 * self.flops_per_window * recipe.batch  # backward costs twice the forward
            self.schedule.step()
            steps += 1
            losses.add(loss)
            if self.pace.spent >= due:
                validates = held_out and self.grower is not None
                validation = self._read() if validates else None
                self._log(steps, losses.take(), validation, time.perf_counter() - start)
                due = self.pace.spent + recipe.budget / (recipe.readings if validates else _LOGGED)
        return Outcome(
            job=self.job,
            depth=len(self.network.blocks),
            parameters=_size(self.network),
            flops=self.pace.spent,
            steps=steps,
            seconds=time.perf_counter() - start,
            forecast=self.data.forecast(self.network).tolist(),
            metrics=self.metrics,
        )

    def _affordable(self) -> bool:
        """Whether to take one more step: a grown network stays below the budget, a fixed one just reaches it."""
        step = 3 * self.flops_per_window * self.recipe.batch if self.grower is not None else 0.0
        return self.pace.spent + step < self.recipe.budget

    def _read(self) -> float:
        """Validate, and let the network grow; both are paid for from the budget."""
        assert self.grower is not None
        validation = self.data.validate(self.network)
        self.pace.spent += self.flops_per_window * self.data.validated
        with FlopCounterMode(display=False) as counter:
            change = self.grower.step(validation)
        self.pace.spent += counter.get_total_flops()
        if change is not None:
            self.flops_per_window = forward_flops(self.network, self.probe)
        return validation

    def _log(self, steps: int, loss: float, validation: float | None, seconds: float) -> None:
        entry = {
            "step": steps,
            "seconds": round(seconds, 3),
            "flops": self.pace.spent,
            "loss": loss,
            "validation": validation,
            "parameters": _size(self.network),
            "depth": len(self.network.blocks),
            "learning_rate": self.schedule.get_last_lr()[0],
        }
        self.metrics.append(entry)
        self.on_metrics(entry)


class _Mean:
    """The mean of losses since it was last taken."""

    def __init__(self) -> None:
        self._total, self._count = torch.zeros(()), 0

    def add(self, loss: Tensor) -> None:
        self._total, self._count = self._total + loss.detach(), self._count + 1

    def take(self) -> float:
        mean = float(self._total) / max(1, self._count)
        self._total, self._count = torch.zeros(()), 0
        return mean


def _batches(windows: Windows, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Random windows for ever, each (batch, ...): past, future, known."""
    while True:
        for chosen in torch.randint(len(windows), (64, size), generator=generator):
            yield windows.past[chosen], windows.future[chosen], windows.known[chosen]


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
