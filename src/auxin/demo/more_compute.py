"""A trained network that is too small, and some more compute: go on, grow, or start anew."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import auxin as ax
from auxin.demo.demand import DAY, Batch, Demand, training_error
from auxin.demo.forecaster import Dilated, Forecaster
from auxin.ledger import flops_of
from auxin.verdict import Verdict

PLANS = ("go on", "grow", "start anew")
PAST = 20  # looks at the validation part while the old network is trained


@dataclass(frozen=True)
class Setting:
    """Every setting; docs/demo.md says which others were tried, and how they scored on the validation part.

    Attributes:
        dim: width of the network.
        small: blocks of the old network.
        large: blocks of the one that it grows to, and of the one that starts anew.
        spent: training FLOPs of the old network.
        added: FLOPs that there are now, as a share of those.
        old_rate: learning rate of the old network, constant after ``warmup``.
        rates: learning rate of each plan, from which it falls in a line to 0.
        warmup: steps of linear warm-up of new networks.
        rewarm: steps over which the updates of grown layers get their full size.
        batch: series, and half-hours of each, in a training step.
        pilot_batch: series, and half-hours of each, in the batches that the judgement cuts into single series.
        smoke: whether this is a smoke test, whose numbers mean nothing.
    """

    dim: int = 32
    small: int = 3
    large: int = 6
    spent: float = 200e9
    added: float = 0.25
    old_rate: float = 1e-2
    rates: tuple[float, float, float] = (3e-3, 1e-2, 4e-2)
    warmup: int = 50
    rewarm: int = 50
    batch: tuple[int, int] = (4, 672)
    pilot_batch: tuple[int, int] = (8, 336)
    smoke: bool = False

    @property
    def more(self) -> float:
        """FLOPs that are added."""
        return self.added * self.spent

    def fuller(self) -> "Setting":
        """Four times the additional compute."""
        return replace(self, added=4 * self.added, rates=(3e-3, 1e-2, 2e-2))

    def quick(self) -> "Setting":
        """A smoke test; the numbers mean nothing then."""
        return replace(self, dim=4, spent=self.spent / 1000, smoke=True)


class Bench:
    """A network in training with all that belongs to it.

    Args:
        data: what it learns.
        setting: of the demo.
        depth: blocks to begin with.
        seed: of the weights and of the batches.
    """

    def __init__(self, data: Demand, setting: Setting, depth: int, seed: int):
        self.data, self.setting, self.seed = data, setting, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = Forecaster(setting.dim, depth)
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=setting.old_rate, weight_decay=0.01)
        example = data.batch(torch.Generator().manual_seed(1), setting.batch)
        self.missing = [
            ax.Insert("blocks", partial(Dilated, setting.dim, 2**place), index=place)
            for place in range(depth, setting.large)
        ]
        self.grower = ax.Grower(
            self.network,
            self.optimizer,
            **({"edits": [self.missing], "when": ax.when.signal()} if self.missing else {}),  # who starts anew has them
            probe=example[0][:1],
            rewarm=setting.rewarm,
        )
        self.steps, self.spent = 0, 0.0
        self.past: list[tuple[int, float]] = []

    def cost(self) -> float:
        """FLOPs of a training step."""
        batch = self.data.batch(torch.Generator().manual_seed(1), self.setting.batch)
        return flops_of(self.network, training_error, batch)

    def train(self, steps: int, rate: Callable[[float], float], warmup: int) -> Iterator[float]:
        """Take steps, and yield the loss of each; ``rate`` of the share that is done is the learning rate."""
        shape = self.setting.batch
        cost = self.cost()
        for step in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = rate(step / steps) * min(1.0, (step + 1) / max(1, warmup))
            loss = training_error(self.network, self.data.batch(self.generator, shape))
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.steps, self.spent = self.steps + 1, self.spent + cost
            yield loss.item()
        self.optimizer.zero_grad()

    def grow(self) -> ax.Change:
        """Grow by the blocks that are missing, as one growth; its checks are paid for."""
        with FlopCounterMode(display=False) as counter:
            change = self.grower.grow(self.missing)
        self.spent += counter.get_total_flops()
        return change

    @contextmanager
    def branch(self) -> Iterator[None]:
        """Whatever happens to this bench inside is gone afterwards."""
        batches, steps, spent = self.generator.get_state(), self.steps, self.spent
        with self.grower.trial(None):
            yield
        self.generator.set_state(batches)
        self.steps, self.spent = steps, spent


def old_network(data: Demand, setting: Setting, seed: int) -> tuple[Bench, Iterator[float]]:
    """The network that is there, trained at a constant rate as the losses are taken from the iterator.

    Its ``past`` has the error on the validation part after each twentieth.
    """
    bench = Bench(data, setting, setting.small, seed)
    steps = int(setting.spent // bench.cost())

    def losses() -> Iterator[float]:
        for loss in bench.train(steps, lambda share: setting.old_rate, setting.warmup):
            if bench.steps % max(1, steps // PAST) == 0:
                bench.past.append((bench.steps, data.validation.error(data.validation.forecast(bench.network))))
            yield loss

    return bench, losses()


def planned(plan: str, old: Bench, flops: float) -> tuple[Bench, Iterator[float]]:
    """Carry out a plan; its steps are taken as the losses are taken from the iterator.

    Args:
        plan: one of ``PLANS``.
        old: the network that is there; "start anew" leaves it alone.
        flops: to spend.

    Returns:
        The bench on which the plan ends, and the losses. What it has spent counts from the old network's FLOPs.
    """
    setting, before, bench, warmup = old.setting, old.spent, old, 0
    if plan == "start anew":
        bench, warmup = Bench(old.data, setting, setting.large, old.seed), setting.warmup
        bench.spent = before
    elif plan == "grow":
        bench.grow()
    steps = int((flops - (bench.spent - before)) // bench.cost())
    rate = setting.rates[PLANS.index(plan)]
    return bench, bench.train(steps, lambda share: rate * (1 - share), min(warmup, steps // 3))


class Drawn:
    """Batches for the judgement, each drawn by a generator of its number.

    Args:
        data: what they are of.
        shape: of each.
        seed: of all of them.
    """

    def __init__(self, data: Demand, shape: tuple[int, int], seed: int):
        self.data, self.shape, self.seed = data, shape, seed

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, number: int) -> Batch:
        return self.data.batch(torch.Generator().manual_seed(1_000_003 * self.seed + number), self.shape)


def judge(old: Bench, flops: float) -> Verdict:
    """What to do with so many FLOPs more, judged on validation data.

    Args:
        old: the network that is there; it is afterwards as before.
        flops: to be spent by the plan that is followed.
    """
    data, setting = old.data, old.setting
    batches: Any = Drawn(data, setting.pilot_batch, 1 + old.seed)
    evidence = ax.Evidence(training_error, batches, validation=data.validation.batches())

    def anew() -> tuple[Forecaster, torch.optim.Optimizer]:
        network = Forecaster(setting.dim, setting.large)
        return network, torch.optim.AdamW(network.parameters(), lr=setting.rates[-1], weight_decay=0.01)

    with old.branch():  # its own Grower counts no steps of the pilots
        return ax.verdict(
            old.network,
            old.optimizer,
            edits=[old.missing],
            anew=anew,
            evidence=evidence,
            budget=flops,
            probe=batches[0][0][:1, :, :DAY],
            history=old.past,
            rewarm=setting.rewarm,
        )
