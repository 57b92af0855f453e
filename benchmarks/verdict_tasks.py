"""The tasks of ``verdict.py``: a trained network, a way to grow it, and a larger one to start anew with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from no_size_search import Batches, chunks, network, one_loss, task
from torch import Tensor, nn

import auxin as ax

TUNED = ("digits", "friedman", "m3")  # what the settings of ``verdict`` were chosen on
FRESH = ("teacher", "diamonds", "mnist1d", "mnist5k", "cancer")
PARTS = 16  # batches of validation data


@dataclass(frozen=True)
class Task:
    """What is judged.

    Attributes:
        small: builds the network that is there.
        large: builds the one to start anew with; as large as the grown one.
        edits: one growth.
        loss: of a batch.
        batches: to train on.
        validation: to judge and to choose weights on.
        test: read at the end of full runs only.
        steps: that the old network has been trained for.
        rate: learning rate of the old network, of going on and of growing.
        rate_anew: of starting anew.
        rewarm: steps over which updates of what has grown rise.
    """

    small: Callable[[], nn.Module]
    large: Callable[[], nn.Module]
    edits: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Any
    validation: list[Any]
    test: list[Any]
    steps: int
    rate: float
    rate_anew: float
    rewarm: int = 20

    @property
    def probe(self) -> Tensor:
        """A few inputs."""
        return self.batches[0][0][:4]

    def evidence(self) -> ax.Evidence:
        return ax.Evidence(self.loss, self.batches, validation=self.validation)


class Numbered:
    """A stream of batches, each drawn by a generator of its number."""

    def __init__(self, draw: Callable[[torch.Generator], Any], seed: int):
        self.draw, self.seed = draw, seed

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, number: int) -> Any:
        return self.draw(torch.Generator().manual_seed(self.seed * 1_000_003 + number))


def table(name: str, site: Path, seed: int) -> Task:
    """A network of two hidden layers of width 8, which grow to 32 each, on tabular data or small images."""
    (train, validation, test), classes = task(name, site, seed)
    inputs, outputs = train[0].shape[1], classes or 1
    rate = 3e-3 if classes else 1e-2
    return Task(
        partial(network, inputs, 8, 2, outputs),
        partial(network, inputs, 32, 2, outputs),
        [ax.Widen("0", by=24), ax.Widen("2", by=24)],
        one_loss(classes),
        Batches(train, seed),
        chunks(validation, PARTS),
        chunks(test, 1),
        1000,
        rate,
        rate,
    )


def m3(seed: int) -> Task:
    """The forecaster of the demo's second part, width 64, 1 block that grows to 4; series are split, not months."""
    from auxin.demo.network import Network
    from auxin.demo.series import load_m3
    from auxin.demo.windows import Shape, Windows, training_windows

    found = load_m3()
    shape = Shape.of(found.horizon, found.season)
    order = torch.randperm(len(found.histories), generator=torch.Generator().manual_seed(seed)).tolist()
    series = [found.histories[n] for n in order]
    a, b = int(0.6 * len(series)), int(0.8 * len(series))

    def batch(part: Windows, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return part.past[chosen], part.future[chosen], part.known[chosen]

    def loss(model: nn.Module, held: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        past, future, known = held
        return ((model(past) - future).abs() * known).sum() / known.sum()

    train, *judged = (training_windows(part, shape) for part in (series[:a], series[a:b], series[b:]))
    random = torch.Generator().manual_seed(seed)
    drawn = [[batch(part, torch.randint(len(part), (64,), generator=random)) for _ in range(PARTS)] for part in judged]
    return Task(
        partial(Network, shape.lookback, shape.horizon, 64, 1),
        partial(Network, shape.lookback, shape.horizon, 64, 4),
        [ax.Duplicate("blocks", by=3)],
        loss,
        Numbered(lambda g: batch(train, torch.randint(len(train), (64,), generator=g)), seed),
        drawn[0],
        drawn[1],
        1000,
        1e-3,
        1e-3,
    )


def task_of(name: str, site: Path, seed: int) -> Task:
    sys.path.insert(0, str(site))
    torch.manual_seed(seed)
    return m3(seed) if name == "m3" else table(name, site, seed)
