"""Every learning-rate schedule of torch in one loop that grows; run as a script, it goes on from checkpoints."""

import json
import sys
from pathlib import Path

import torch
from growing import Net, batch, train
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import SWALR

import auxin as ax

GROW_AT, SAVE_AT, END = 6, 10, 60


def warm_up(step):
    """As in language-model training: a linear warm-up, then an inverse square root."""
    return min((step + 1) / 12, (12 / (step + 1)) ** 0.5)


def decay(step):
    return 0.97


def constant(step):
    return 0.7 if step < 9 else 0.3


def two_phases(optimizer):
    first = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=14)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.CosineAnnealingLR(optimizer, 40)], [14])


def phases_with_milestones(optimizer):
    first = lr_scheduler.MultiStepLR(optimizer, [3, 8, 12], 0.5)
    second = lr_scheduler.MultiStepLR(optimizer, [5, 5, 20], 0.3)
    return lr_scheduler.SequentialLR(optimizer, [first, second], [16])


def chain(optimizer):
    first = lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=15)
    return lr_scheduler.ChainedScheduler([first, lr_scheduler.ExponentialLR(optimizer, 0.95)], optimizer)


SETUPS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, warm_up),
    "LambdaLR, one for each group": lambda o: lr_scheduler.LambdaLR(o, [warm_up, constant]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, decay),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [5, 9, 9, 30], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, total_iters=20),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=25),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.95),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 8, 2),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 45, 2.0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [0.001, 0.002], [0.02, 0.03], 7, mode="exp_range", gamma=0.99),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.02, 0.03], total_steps=END + 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "ReduceLROnPlateau, a floor for each group": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, patience=1, factor=0.5, min_lr=[1e-3, 2e-3]
    ),
    "SequentialLR": two_phases,
    "SequentialLR of milestones": phases_with_milestones,
    "ChainedScheduler": chain,
    "SWALR": lambda o: SWALR(o, [0.002, 0.004], anneal_epochs=20),
}


class Run:
    """A network, two groups with their own learning rates, one schedule, and a grower."""

    def __init__(self, name: str, grows: bool):
        torch.manual_seed(0)
        self.model = Net(dim=4, depth=1)
        rest = [p for n, p in self.model.named_parameters() if not n.startswith("blocks.")]
        groups = [{"params": rest, "lr": 0.01}, {"params": list(self.model.blocks.parameters()), "lr": 0.02}]
        self.optimizer = SGD(groups, lr=0.01, momentum=0.9)
        self.schedule = SETUPS[name](self.optimizer)
        self.grower = ax.Grower(
            self.model,
            self.optimizer,
            self.schedule,
            edits=ax.Duplicate("blocks", by=1),
            when=ax.when.at([GROW_AT] if grows else [10**6]),
            probe=batch()[0],
        )

    def step(self, number: int) -> list[float]:
        """One step; the learning rates that it used."""
        used = [group["lr"] for group in self.optimizer.param_groups]
        train(self.model, self.optimizer, seed=number)
        metric = 1.0 / (1 + min(number, 2)) + (0.1 if number % 7 == 0 else 0.0)
        plateau = isinstance(self.schedule, lr_scheduler.ReduceLROnPlateau)
        self.schedule.step(*([metric] if plateau else []))
        self.grower.step(metric)
        return used

    def steps(self, first: int, last: int) -> list[list[float]]:
        return [self.step(number) for number in range(first, last)]


def main(folder: Path) -> None:
    """Go on from every checkpoint in ``folder``; the learning rates by set-up, as JSON."""
    torch.set_num_threads(1)
    curves = {}
    for number, name in enumerate(SETUPS):
        run = Run(name, grows=True)
        ax.load(folder / str(number), run.grower)
        curves[name] = run.steps(SAVE_AT, END)
    print(json.dumps(curves))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
