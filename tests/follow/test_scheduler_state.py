import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from auxin.errors import GrowthError
from auxin.follow.optimizer_state import optimizer_state, restore_optimizer
from auxin.follow.scheduler_state import check_scheduler, restore_scheduler, scheduler_state
from auxin.typed import dumps, loads

STEPS, SAVED = 30, 11


class Warmup:
    """A callable with a state of its own, which its calls change."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.calls = 0
        self.seen: dict[int, float] = {}
        self.curve = math.sqrt

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        self.seen[epoch] = min(1.0, (1 + epoch) / self.steps) / (1 + 0.01 * self.calls)
        return self.seen[epoch]


class Shared(Warmup):
    def factor(self, epoch: int) -> float:
        return self(epoch)


class Slotted:
    __slots__ = ()

    def __call__(self, epoch: int) -> float:
        return 0.9**epoch


def halve(epoch: int, base: float = 0.5) -> float:
    return base ** (epoch / 10)


class OfAUser(lrs.LRScheduler):
    """Inverse square root, with a counter, a tuple, keys that are numbers and a function among its attributes."""

    def __init__(self, optimizer: Any, warmup: int) -> None:
        self.warmup, self.marks, self.range, self.curve = warmup, {5: "five"}, (1, math.inf), math.sqrt
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.marks[self.last_epoch] = "seen"
        factor = min((self.last_epoch + 1) / self.warmup, self.curve(self.warmup / (self.last_epoch + 1)))
        return [base * factor for base in self.base_lrs]


class OnItsOwn:
    """No class of torch at all, and no ``__dict__``."""

    __slots__ = ("optimizer", "count")

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.count = optimizer, 0
        self.step()

    def step(self) -> None:
        self.count += 1
        for group in self.optimizer.param_groups:
            lr = 0.1 / self.count
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else lr

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


Make = Callable[[Any], Any]
MADE: dict[str, Make] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, [halve, lambda epoch: 1 / (1 + epoch)]),
    "LambdaLR object": lambda o: lrs.LambdaLR(o, [Warmup(20), Warmup(5)]),
    "LambdaLR one object for both": lambda o: lrs.LambdaLR(o, Warmup(20)),
    "LambdaLR partial": lambda o: lrs.LambdaLR(o, functools.partial(halve, base=0.7)),
    "LambdaLR partial of an object": lambda o: lrs.LambdaLR(o, functools.partial(Warmup(20))),
    "LambdaLR builtin": lambda o: lrs.LambdaLR(o, math.cos),
    "LambdaLR slots": lambda o: lrs.LambdaLR(o, Slotted()),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, [lambda _: 0.95, Warmup(20)]),
    "StepLR": lambda o: lrs.StepLR(o, 7, 0.3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [5, 10, 12, 12, 20], 0.4),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.3, 15),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.2, 1.0, 20),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 20, 2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 8, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 4, 2),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=2, cooldown=1),
    "ReduceLROnPlateau max, list": lambda o: lrs.ReduceLROnPlateau(o, "max", 0.5, 1, min_lr=[1e-3, 1e-5]),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.2, 6),
    "CyclicLR triangular2": lambda o: lrs.CyclicLR(o, 0.01, 0.2, 4, 7, "triangular2"),
    "CyclicLR exp_range": lambda o: lrs.CyclicLR(o, 0.01, 0.2, 4, mode="exp_range", gamma=0.97),
    "CyclicLR function": lambda o: lrs.CyclicLR(o, 0.01, 0.2, 4, scale_fn=halve, scale_mode="iterations"),
    "CyclicLR object": lambda o: lrs.CyclicLR(o, 0.01, 0.2, 4, scale_fn=Warmup(20), scale_mode="iterations"),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, [0.2, 0.1], 40),
    "OneCycleLR three phases": lambda o: lrs.OneCycleLR(o, 0.2, 40, three_phase=True, anneal_strategy="linear"),
    "SWALR": lambda o: SWALR(o, [0.05, 0.01], 15),
    "SWALR linear": lambda o: SWALR(o, 0.05, 8, "linear"),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, 1.0, 5), lrs.MultiStepLR(o, [4, 9], 0.5), lrs.ExponentialLR(o, 0.9)], [5, 18]
    ),
    "SequentialLR saved on its milestone": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, 1.0, 11), lrs.CosineAnnealingLR(o, 19)], [SAVED]
    ),
    "SequentialLR before its milestone": lambda o: lrs.SequentialLR(
        o, [lrs.LambdaLR(o, Warmup(5)), lrs.CosineAnnealingWarmRestarts(o, 5)], [SAVED + 1]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.1, 15), lrs.ExponentialLR(o, 0.9), lrs.MultiStepLR(o, [13], 0.5)]
    ),
    "nested": lambda o: lrs.SequentialLR(
        o,
        [
            lrs.ChainedScheduler(
                [lrs.LinearLR(o, 0.1, 1.0, 15), lrs.LambdaLR(o, Warmup(20)), lrs.MultiStepLR(o, [9, 12])]
            ),
            lrs.CosineAnnealingWarmRestarts(o, 4),
        ],
        [17],
    ),
    "nested the other way": lambda o: lrs.ChainedScheduler(
        [
            lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.5, 7), lrs.MultiStepLR(o, [3, 9], 0.5)], [8]),
            lrs.ExponentialLR(o, 0.9),
        ]
    ),
    "of a user": lambda o: OfAUser(o, 9),
    "on its own": lambda o: OnItsOwn(o),
}


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def optimizer_of(model: nn.Module, kind: str) -> Any:
    lr: Any = torch.tensor(0.1) if "tensor" in kind else 0.1
    other: Any = torch.tensor(0.03) if "tensor" in kind else 0.03
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": other}]
    return SGD(groups, lr=lr, momentum=0.9) if "SGD" in kind else AdamW(groups, lr=lr)


def run(model: nn.Module, optimizer: Any, scheduler: Any, steps: range) -> list[Any]:
    """Train; learning rates, momenta, betas and weights after every step, to the bit."""
    found = []
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        metric = [1.0, 0.5, 0.8, 0.9, 0.85, 0.95, 0.7][step % 7]
        scheduler.step(metric) if isinstance(scheduler, lrs.ReduceLROnPlateau) else scheduler.step()
        groups = [{k: dumps(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        last = dumps(scheduler.get_last_lr()) if hasattr(scheduler, "get_last_lr") else None
        found.append((groups, last, [p.detach().tolist() for p in model.parameters()]))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "SGD tensor lr"])
@pytest.mark.parametrize("name", MADE)
def test_a_schedule_goes_on_to_the_bit(name: str, kind: str) -> None:
    make = MADE[name]
    model = model_of()
    optimizer = optimizer_of(model, kind)
    try:
        scheduler = make(optimizer)
        whole = run(model, optimizer, scheduler, range(SAVED))
    except (TypeError, ValueError, RuntimeError) as error:
        if "tensor" in kind:
            pytest.skip(f"torch itself cannot: {error}")
        raise
    names = {id(p): n for n, p in model.named_parameters()}
    tensors, data = optimizer_state(optimizer, names)
    tensors = {key: value.clone() for key, value in tensors.items()}
    texts = [dumps(data), dumps(scheduler_state(scheduler))]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    whole += run(model, optimizer, scheduler, range(SAVED, STEPS))

    fresh = model_of()
    fresh.load_state_dict(weights)
    again = optimizer_of(fresh, kind)
    restored = make(again)
    restore_optimizer(again, tensors, loads(texts[0]), {id(p): n for n, p in fresh.named_parameters()})
    restore_scheduler(restored, loads(texts[1]))
    assert dumps(scheduler_state(restored)) == texts[1]
    assert run(fresh, again, restored, range(SAVED, STEPS)) == whole[SAVED:]
    assert dumps(scheduler_state(restored)) == dumps(scheduler_state(scheduler))


def test_every_scheduler_of_torch_is_among_them() -> None:
    known = {n for n, c in vars(lrs).items() if isinstance(c, type) and issubclass(c, lrs.LRScheduler)}
    assert known - {"LRScheduler", "_LRScheduler"} <= {name.split()[0] for name in MADE}


def made(name: str, groups: int = 2) -> Any:
    model = model_of()
    optimizer = optimizer_of(model, "SGD") if groups == 2 else SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MADE[name](optimizer)


def test_functions_stay_those_of_the_fresh_object() -> None:
    scheduler = made("CyclicLR function")
    data = scheduler_state(scheduler)
    assert data["callables"] == [None]
    restore_scheduler(scheduler, data)
    assert scheduler._scale_fn_custom is halve


def test_the_mode_of_a_cycle_is_the_saved_one() -> None:
    scheduler = made("CyclicLR")
    restore_scheduler(scheduler, scheduler_state(made("CyclicLR exp_range")))
    assert scheduler.scale_fn(3) == 0.97**3


def test_nothing_is_shared_with_the_saved_data() -> None:
    scheduler = made("LambdaLR object")
    data = scheduler_state(scheduler)
    text = dumps(data)
    scheduler.lr_lambdas[0].seen[99] = 1.0
    scheduler.base_lrs[0] = 7.0
    assert dumps(data) == text
    restore_scheduler(scheduler, data)
    scheduler.lr_lambdas[0].seen[98] = 1.0
    scheduler.base_lrs.clear()
    assert dumps(data) == text


@pytest.mark.parametrize(
    ("saved", "here", "text"),
    [
        ("StepLR", "ExponentialLR", "ExponentialLR: it was saved from StepLR"),
        (
            "LambdaLR object",
            "LambdaLR",
            "LambdaLR: function 0 was an object with attributes, here it is <function halve",
        ),
        ("SequentialLR", "SequentialLR before its milestone", "was saved with 3 schedulers inside, here are 2"),
        (
            "nested",
            "SequentialLR saved on its milestone",
            r"SequentialLR\[0\] LinearLR: it was saved from ChainedScheduler",
        ),
        ("CyclicLR", "CyclicLR object", None),
    ],
)
def test_another_schedule_is_refused_and_untouched(saved: str, here: str, text: str | None) -> None:
    data, scheduler = scheduler_state(made(saved)), made(here)
    if text is None:
        check_scheduler(scheduler, data)
        return
    before = dumps(scheduler_state(scheduler))
    with pytest.raises(GrowthError, match=text):
        restore_scheduler(scheduler, data)
    assert dumps(scheduler_state(scheduler)) == before


def test_another_number_of_groups() -> None:
    data = scheduler_state(made("StepLR"))
    with pytest.raises(GrowthError, match="base_lrs has 2 entries in the checkpoint, one per parameter group, here 1"):
        restore_scheduler(made("StepLR", groups=1), data)
    with pytest.raises(GrowthError, match="it was saved with 2 functions, here are 1"):
        restore_scheduler(made("LambdaLR one object for both", groups=1), scheduler_state(made("LambdaLR object")))


@pytest.mark.parametrize("key", ["type", "state", "callables", "schedulers"])
@pytest.mark.parametrize("junk", [None, 3, [3], {"a": 1}, {3: 1}, {"optimizer": 1}, "text"])
@pytest.mark.parametrize("name", ["LambdaLR object", "SequentialLR"])
def test_data_that_is_nothing_of_ours(name: str, key: str, junk: Any) -> None:
    scheduler = made(name)
    data, before = scheduler_state(scheduler), dumps(scheduler_state(scheduler))
    try:
        restore_scheduler(scheduler, {**data, key: junk})
    except GrowthError:
        assert dumps(scheduler_state(scheduler)) == before
    else:
        assert key not in data or key == "state"


def test_what_cannot_be_copied_is_named() -> None:
    scheduler = made("StepLR")
    scheduler.stream = (x for x in ())
    with pytest.raises(GrowthError, match="StepLR: its attribute 'stream', a generator, cannot be saved"):
        scheduler_state(scheduler)
    scheduler.stream = object()
    with pytest.raises(GrowthError, match=r"sched\['state'\]\['stream'\]: a builtins.object"):
        dumps(scheduler_state(scheduler), "sched")
