"""What choosers and data-driven weights look at: a loss and a few batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

from auxin.anatomy.gradients import differentiable
from auxin.errors import GrowthError


@dataclass(frozen=True)
class Evidence:
    """A loss and the batches that it is taken on.

    Args:
        loss: ``loss(model, batch) -> scalar``, a mean over samples.
        batches: to train on, in memory, used in this order every time, so that candidates see the same data.
        validation: to judge on, batches that training does not see; None: ``batches`` themselves.
        step: ``step(model, batch)`` takes one training step as your loop does, the optimizer's step included, where a
            plain one will not do (clipping, accumulation, a scaler). A plain one clears gradients, goes backward, and
            steps every optimizer, every ``AveragedModel``, and every schedule that has kept pace with the steps so
            far: one that counts epochs, or waits for a metric, stands still.

    Examples:
        >>> from torch.nn.functional import mse_loss
        >>> batches = [(torch.ones(2, 1), torch.ones(2, 1))]
        >>> evidence = Evidence(lambda model, batch: mse_loss(model(batch[0]), batch[1]), batches)
        >>> evidence.mean(nn.Identity())
        0.0
    """

    loss: Callable[[nn.Module, Any], Tensor]
    batches: Sequence[Any]
    validation: Sequence[Any] | None = None
    step: Callable[[nn.Module, Any], Any] | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise GrowthError(
                f"Evidence({self.loss!r}, batches): pass loss(model, batch) -> scalar and a list of batches."
            )
        if not _is_list(self.batches):
            raise GrowthError(f"Evidence(loss, batches): pass a list of batches{_instead(self.batches)}.")
        if self.validation is not None and not _is_list(self.validation):
            raise GrowthError(
                "Evidence(validation=...): pass a list of batches that training does not see, or None"
                f"{_instead(self.validation)}."
            )
        if self.step is not None and not callable(self.step):
            raise GrowthError("Evidence(step=...): pass step(model, batch), which takes one training step, or None.")

    def mean(self, model: nn.Module) -> float:
        """Mean loss over ``batches`` in eval mode; train flags are put back."""
        return _mean(self._each(model, self.batches))

    def validate(self, model: nn.Module) -> float:
        """Mean loss over ``validation`` in eval mode, or over ``batches`` where there is none."""
        return _mean(self.losses(model))

    def losses(self, model: nn.Module) -> list[float]:
        """The loss on each batch of ``validation`` in eval mode, or of ``batches`` where there is none."""
        return self._each(model, self.batches if self.validation is None else self.validation)

    def _each(self, model: nn.Module, batches: Sequence[Any]) -> list[float]:
        with in_mode(model, False), torch.no_grad():
            return [float(self.loss(model, batch)) for batch in batches]

    def train(
        self,
        model: nn.Module,
        companions: Sequence[Any],
        steps: int,
        begin: int = 0,
        each: Callable[[int], None] | None = None,
    ) -> None:
        """Take ``steps`` optimizer steps over the batches, round and round.

        A network that an evaluation has left in eval mode is in train mode meanwhile. Under DistributedDataParallel it
        is the wrapper that is trained, each rank on its own batches.

        Args:
            model: the network.
            companions: optimizers, schedules and averages that take the steps with it, and the wrapper around it.
            steps: how many.
            begin: number of the first batch, and of the optimizer steps so far.
            each: called after each step with its number from 0.
        """
        optimizers = [c for c in companions if isinstance(getattr(c, "param_groups", None), list)]
        stepped = [c for c in companions if isinstance(c, LRScheduler) and not isinstance(c, ReduceLROnPlateau)]
        schedules = [c for c in stepped if 2 * _count(c) >= begin]
        averages = [c for c in companions if hasattr(c, "update_parameters")]
        whole = next((c for c in companions if isinstance(c, DistributedDataParallel)), model)
        with contextlib.nullcontext() if model.training else in_mode(model, True):
            for number in range(steps):
                batch = self.batches[(begin + number) % len(self.batches)]
                if self.step is not None:
                    self.step(whole, batch)
                else:
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    differentiable(self.loss(whole, batch)).backward()
                    for taken in (*optimizers, *schedules):
                        taken.step()
                    for average in averages:
                        average.update_parameters(_source(average, averages, model))
                if each is not None:
                    each(number)
        for optimizer in optimizers:
            optimizer.zero_grad()


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set train or eval mode inside; every module's flag is put back."""
    modes = {m: m.training for m in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _source(average: Any, averages: Sequence[Any], model: nn.Module) -> Any:
    """What an average is of: the network, or, of an average of an average, the first of that class that steps along."""
    inner = getattr(average, "module", None)
    if not hasattr(inner, "update_parameters"):
        return model
    return next((one for one in averages if one is not average and type(one) is type(inner)), model)


def _count(schedule: LRScheduler) -> int:
    """How often a schedule was stepped; one that chains others counts in these."""
    count = getattr(schedule, "last_epoch", None)
    return count if count is not None else max(map(_count, getattr(schedule, "_schedulers", ())), default=0)


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def _is_list(batches: Any) -> bool:
    if isinstance(batches, (Tensor, Dataset, Mapping)) or _is_one_batch(batches):
        return False
    return hasattr(batches, "__getitem__") and hasattr(batches, "__len__") and len(batches) > 0


def _is_one_batch(batches: Any) -> bool:
    """Whether it is (inputs, targets) rather than a list of batches."""
    return isinstance(batches, tuple) and len(batches) > 1 and all(isinstance(part, Tensor) for part in batches)


def _instead(batches: Any) -> str:
    """What to pass in place of something that holds batches, or could."""
    kind = type(batches).__name__
    if isinstance(batches, DataLoader):
        return f"; a {kind} may draw others each time, and what is compared must see the same: list(loader)"
    if isinstance(batches, Dataset):
        return f"; a {kind} gives single samples: list(torch.utils.data.DataLoader(dataset, batch_size=64))"
    if isinstance(batches, Mapping) or _is_one_batch(batches):
        one = "(x, y)" if isinstance(batches, tuple) else "batch"
        more = ", or [*x.split(64)] if each tensor is a batch" if isinstance(batches, tuple) else ""
        return f"; a {kind} of tensors is one batch: Evidence(loss, [{one}]){more}"
    if isinstance(batches, Tensor):
        return "; a tensor is one batch: [tensor], or [*tensor.split(64)]"
    if hasattr(batches, "__iter__") and not hasattr(batches, "__len__"):
        return f"; a {kind} is empty after one pass: list(...) of it"
    return f", not {batches!r:.80}"
