"""A run that grows into groups of its own, under every schedule; run as a script, it goes on from checkpoints.

`grouped.py FOLDER` prints what the runs that were saved there do next, as JSON.
"""

import functools
import hashlib
import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "scenarios"))

import schedules
from growing import Net, batch, train
from torch.optim import SGD
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

import auxin as ax

LR, SAVE_AT, END = 0.1, 12, 72
RATIO = 0.3


def linear_warm_up(step, *, warm_up, total):
    """As language-model libraries pass it: a plain function with its numbers bound."""
    if step < warm_up:
        return step / max(1, warm_up)
    return max(0.0, (total - step) / max(1, total - warm_up))


def root(step, *, warm_up):
    return min((step + 1) / warm_up, (warm_up / (step + 1)) ** 0.5)


class Half:
    """A callable object with a state of its own."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return 1.0 if self.calls < 9 else 0.5


def two_phases(o):
    return lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=14), lrs.CosineAnnealingLR(o, 40)], [14])


def chain(o):
    return lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, total_iters=15), lrs.ExponentialLR(o, 0.95)], o)


def deep(o):
    inner = lrs.SequentialLR(o, [lrs.StepLR(o, 4, 0.5), lrs.MultiStepLR(o, [2, 9, 9], 0.7)], [11])
    return lrs.ChainedScheduler([inner, lrs.LambdaLR(o, functools.partial(root, warm_up=20))])


def sequence_of_lambdas(o):
    first = lrs.LambdaLR(o, functools.partial(root, warm_up=10))
    return lrs.SequentialLR(o, [first, lrs.PolynomialLR(o, 30, 2.0), lrs.CosineAnnealingWarmRestarts(o, 6)], [13, 30])


# One group with learning rate 0.1: the seventeen set-ups of torch, and nested, stateful and language-model ones.
ONE_GROUP = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.95**step),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: lrs.StepLR(o, 7, 0.1),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [6, 20], 0.1),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 20),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, total_iters=25),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 40),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 5, 2),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 50, 2.0),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 5),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=END + 1),
    "SequentialLR": two_phases,
    "ChainedScheduler": chain,
    "SWALR": lambda o: SWALR(o, 0.02, anneal_epochs=20),
    # Patient enough to stay above its eps, below which it lowers no rate any more.
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=8),
    "ReduceLROnPlateau, min_lr list": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=[2e-3]),
    "ReduceLROnPlateau, min_lr": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=5e-3),
    "no schedule": None,
    "nested": deep,
    "sequence": sequence_of_lambdas,
    "triangular2": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 3, mode="triangular2", cycle_momentum=False),
    "three phases": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=END + 1, three_phase=True, anneal_strategy="linear"),
    "warm-up from zero": lambda o: lrs.LambdaLR(o, functools.partial(linear_warm_up, warm_up=10, total=80)),
    "warm-up and root": lambda o: lrs.LambdaLR(o, functools.partial(root, warm_up=12)),
    "an object as function": lambda o: lrs.LambdaLR(o, Half()),
    "wsd": lambda o: ax.schedule.wsd(o, warmup=5, decay=20, total=60),
}
TWO_GROUPS = {
    **schedules.SETUPS,
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, [0.02, 0.03], total_steps=END + 1),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=8),
}
SETUPS = {**ONE_GROUP, **{f"{name} (two groups)": make for name, make in TWO_GROUPS.items()}}


class Run:
    """A network, one or two groups, one schedule, and a grower with ``group=dict(lr=...)``.

    ``trained``: steps that have gradients; rates do not depend on them, and those behind cost a twentieth.
    """

    def __init__(self, name, grow_at=(), ratio=RATIO, trained=END, **options):
        torch.manual_seed(0)
        self.trained = trained
        self.model = Net(dim=4, depth=1)
        if name in ONE_GROUP:
            self.optimizer = SGD(self.model.parameters(), lr=LR, momentum=0.9)
        else:
            rest = [p for n, p in self.model.named_parameters() if not n.startswith("blocks.")]
            blocks = list(self.model.blocks.parameters())
            self.optimizer = SGD([{"params": rest, "lr": 0.01}, {"params": blocks, "lr": 0.02}], lr=0.01, momentum=0.9)
        make = SETUPS[name]
        self.schedule = make(self.optimizer) if make is not None else None
        first = self.optimizer.param_groups[-1]
        self.donor, lr = len(self.optimizer.param_groups) - 1, first.get("initial_lr", first["lr"])
        self.grower = ax.Grower(
            self.model,
            self.optimizer,
            *([self.schedule] if make is not None else []),
            edits=ax.Duplicate("blocks", by=1),
            when=ax.when.at(list(grow_at) or [10**6]),
            probe=batch()[0],
            group=dict(lr=lr * ratio, **options),
        )

    def step(self, number):
        """One step; the learning rates and momenta that it used."""
        used = [(float(group["lr"]), group["momentum"]) for group in self.optimizer.param_groups]
        if number < self.trained:
            train(self.model, self.optimizer, seed=number)
        else:
            self.optimizer.zero_grad()
            self.optimizer.step()
        metric = 1.0 / (1 + min(number, 2)) + (0.1 if number % 7 == 0 else 0.0)
        if self.schedule is not None:
            self.schedule.step(*([metric] if isinstance(self.schedule, lrs.ReduceLROnPlateau) else []))
            assert list(map(float, self.schedule.get_last_lr())) == [
                float(g["lr"]) for g in self.optimizer.param_groups
            ]
        self.grower.step(metric)
        return used

    def steps(self, first, last):
        return [self.step(number) for number in range(first, last)]

    def weights(self):
        """All weights and momenta, to the bit, in one number."""
        tensors = [p.detach() for p in self.model.parameters()]
        tensors += [self.optimizer.state[p]["momentum_buffer"] for p in self.model.parameters()]
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    told = {}
    for number, name in enumerate(SETUPS):
        run = Run(name, grow_at=[4, 9])
        ax.load(folder / str(number), run.grower)
        told[name] = [run.steps(SAVE_AT, END), run.weights()]
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
