"""A training run on copies of a user's network, optimizers and what hangs on them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from auxin.anatomy.probe import PlanContext, Probe, arguments, tensors_in
from auxin.anatomy.tree import unwrap
from auxin.anatomy.wrappers import networks_of
from auxin.change import Change, Edit, Grouping
from auxin.engine import grow
from auxin.errors import GrowthError
from auxin.proof import outputs_of
from auxin.randomness import random_state
from auxin.surgery import surgery

Options = list[list[dict[str, Any]]]  # per optimizer, per group, everything but the parameters
METRIC = 1.0  # what schedulers that look at a metric are given, in every run, so that only the growth could move them


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to set up the user's training afresh; see ``auxin.testing.check`` for the fields."""

    model: nn.Module
    optimizer: Any
    companions: Any
    probe: Probe
    loss: Callable[[nn.Module, Any], Tensor] | None

    def run(self, steps: int = 0) -> Run:
        """A fresh run on copies, after ``steps`` optimizer steps. Every call gives the same, to the bit."""
        with random_state(seed=0):
            if callable(self.optimizer):
                model = copy.deepcopy(unwrap(self.model))
                optimizers = _as_list(self.optimizer(model))
                given = self.companions
                companions = _as_list(given(model, *optimizers)) if callable(given) else copy.deepcopy(_as_list(given))
            else:
                whole = (unwrap(self.model), _as_list(self.optimizer), _as_list(self.companions))
                model, optimizers, companions = copy.deepcopy(whole)
        run = Run(model, optimizers, companions, self.probe, self.loss or mean_square)
        run.train(steps, seed=1)
        return run


class Run:
    """A network in training, with its optimizers and companions.

    Attributes:
        reached: names of the parameters that have got a gradient in which anything differs from zero, per step.
    """

    def __init__(self, model: nn.Module, optimizers: list[Any], companions: list[Any], probe: Probe, loss: Any):
        self.model, self.optimizers, self.companions, self.probe, self.loss = model, optimizers, companions, probe, loss
        self.reached: list[set[str]] = []

    @property
    def averages(self) -> list[Any]:
        """The companions that hold copies of the network, as an ``AveragedModel`` does."""
        return [c for c in self.companions if networks_of(c)]

    @property
    def others(self) -> list[Any]:
        """Companions that hold no copy of the network."""
        return [c for c in self.companions if not networks_of(c)]

    def grow(self, edit: Any, group: Grouping = None, last: tuple[Any, ...] = (), dry_run: bool = False) -> Change:
        """Carry out an edit, or a user's function under ``surgery``, with everything kept in step."""
        everyone = (*self.optimizers, *self.companions, *last)
        if isinstance(edit, Edit):
            return grow(self.model, edit, *everyone, probe=self.probe, group=group, dry_run=dry_run)
        with surgery(self.model, *everyone, probe=self.probe, group=group) as done:
            edit(self.model)
        assert done.change is not None
        return done.change

    def train(self, steps: int, seed: int) -> list[Options]:
        """Train on the probe; the options of every parameter group after each step."""
        history = []
        with random_state(seed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(lr_scheduler|epoch parameter).*")
            for _ in range(steps):
                self.reached.append(set())
                self._step()
                history.append(self.options())
        return history

    def options(self) -> Options:
        """Learning rates and all other options of the parameter groups."""
        hidden = ("params", "param_names")
        return [
            [{k: _plain(v) for k, v in g.items() if k not in hidden} for g in o.param_groups] for o in self.optimizers
        ]

    def outputs(self) -> list[Tensor]:
        """The network's outputs on the probe, in eval mode."""
        return outputs_of(PlanContext(self.model, self.probe))

    def _step(self) -> None:
        scaler = next((c for c in self.companions if isinstance(c, torch.amp.GradScaler)), None)
        whole = [o for o in self.optimizers if isinstance(o, torch.optim.LBFGS)]
        for optimizer in whole:
            optimizer.step(self._backward)
        if len(whole) < len(self.optimizers):
            self._backward(scaler)
        for optimizer in self.optimizers:
            if optimizer not in whole:
                scaler.step(optimizer) if scaler is not None else optimizer.step()
        if scaler is not None:
            scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for companion in self.companions:
            if networks_of(companion):
                _update(companion, self.model)
            elif isinstance(companion, ReduceLROnPlateau):
                companion.step(METRIC)
            elif isinstance(companion, LRScheduler):
                companion.step()

    def _backward(self, scaler: Any = None) -> Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        batch = self.probe() if callable(self.probe) and not isinstance(self.probe, Tensor) else self.probe
        loss = self.loss(self.model, batch)
        (loss if scaler is None else scaler.scale(loss)).backward()
        self.reached[-1] |= {name for name, p in self.model.named_parameters() if _nonzero(p.grad)}
        return loss


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared distance of all floating outputs from fixed random numbers."""
    args, kwargs = arguments(model, batch)
    total = torch.zeros(())
    for number, out in enumerate(tensors_in(model(*args, **kwargs))):
        if out.is_floating_point():
            target = torch.randn(out.shape, generator=torch.Generator().manual_seed(number)).to(out)
            total = total.to(out.device) + (out - target).square().mean()
    return total


def check_forms(optimizer: Any, companions: Any) -> None:
    """Refuse what could not be set up afresh.

    Raises:
        GrowthError: objects and functions are mixed, or an optimizer that a copy would break.
    """
    if callable(optimizer) and not callable(companions) and _as_list(companions):
        raise GrowthError(
            "testing.check: optimizer is a function and companions are objects, which would go on watching another "
            "optimizer. Pass a function for them too: companions=lambda model, optimizer: [StepLR(optimizer, 3)]."
        )
    if not callable(optimizer) and callable(companions):
        raise GrowthError(
            "testing.check: companions is a function and optimizer an object; pass a function for it too: "
            "optimizer=lambda model: torch.optim.AdamW(model.parameters())."
        )
    for item in [] if callable(optimizer) else _as_list(optimizer):
        if isinstance(item, torch.optim.LBFGS):
            raise GrowthError(
                "testing.check: a copy of an LBFGS object does not run (torch leaves its parameter list out). Pass a "
                "function: optimizer=lambda model: torch.optim.LBFGS(model.parameters())."
            )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _update(average: Any, model: nn.Module) -> None:
    """Let an average take the network's weights in; one without a method of a usual name stays what it is."""
    found = (getattr(average, name, None) for name in ("update_parameters", "update"))
    update = next((method for method in found if callable(method)), None)
    if update is not None:
        update(*[model] * bool(inspect.signature(update).parameters))


def _nonzero(grad: Tensor | None) -> bool:
    if grad is None:
        return False
    values = grad.coalesce().values() if grad.is_sparse else grad
    return bool(values.count_nonzero())
