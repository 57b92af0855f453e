"""What hangs on a network in Lightning's Trainer: found, and read."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from auxin.anatomy.probe import taken
from auxin.engine import BadMoment, check_moment
from auxin.errors import GrowthError
from auxin.follow import follow
from auxin.grower import Grower
from auxin.hosts.common import check_direction

PATIENCE = 20  # batches without a clean moment, accumulated ones aside, before a warning


def companions_in(trainer: Any) -> list[Any]:
    """Optimizers, schedulers, scaler, averages and the DDP wrapper of a Trainer."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    wrapper = trainer.strategy.model if isinstance(trainer.strategy.model, DistributedDataParallel) else None
    averages = [average for _, average in averages_in(trainer)]
    return [c for c in (*trainer.optimizers, *schedulers, scaler, *averages, wrapper) if c is not None]


def averages_in(trainer: Any) -> Iterator[tuple[Any, nn.Module]]:
    """The callbacks that average weights (WeightAveraging, StochasticWeightAveraging), and their copies."""
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield callback, average


for _package in ("lightning.pytorch", "pytorch_lightning"):  # the copy into which StochasticWeightAveraging averages
    follow(f"{_package}.core.module:LightningModule", like=AveragedModel, wraps=lambda copy: [copy])


def metrics_in(trainer: Any, monitor: str | None) -> dict[str, float]:
    """What has been logged, as process 0 says it.

    Raises:
        GrowthError: the monitored metric is not among it.
    """
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if monitor is not None and monitor not in logged:
        found = ", ".join(map(repr, sorted(logged))) or "nothing"
        step = "validation_step" if trainer.enable_validation else "training_step (on_train_epoch_end is too late)"
        raise GrowthError(
            f"GrowthCallback(monitor={monitor!r}): no such metric was logged by the end of the evaluation. Logged: "
            f"{found}. Log it, self.log({monitor!r}, value), in {step}."
        )
    return trainer.strategy.broadcast(logged)


def check_mode(trainer: Any, options: Mapping[str, Any], monitor: str | None) -> None:
    """Check that the trigger, a probation and the callbacks that monitor the same metric take the same for better.

    Raises:
        GrowthError: they do not.
    """
    for callback in trainer.callbacks if monitor is not None else ():
        if getattr(callback, "monitor", None) == monitor and getattr(callback, "mode", None) in ("min", "max"):
            check_direction(options, str(monitor), callback.mode, f"{type(callback).__name__}(mode={callback.mode!r})")


def probe_of(trainer: Any, pl_module: Any, batch: Any) -> Any:
    """A copy of the batch of process 0, as ``forward`` takes it: where it takes one argument, a dict may be that."""
    batch = taken(trainer.strategy.broadcast(batch), {})
    names = list(inspect.signature(pl_module.forward).parameters)
    return (batch,) if isinstance(batch, Mapping) and len(names) == 1 and names[0] not in batch else batch


@contextlib.contextmanager
def told_of_the_probe(own: Any) -> Iterator[None]:
    """Where a growth fails with a probe that nobody passed, say where it comes from."""
    try:
        yield
    except GrowthError as error:
        if own is None and str(error).startswith("probe"):
            error.add_note(
                "The probe is the first training batch here. Pass what forward takes: GrowthCallback(..., probe=...)."
            )
        raise


@contextlib.contextmanager
def without_trainer(pl_module: Any) -> Iterator[None]:
    """The module by itself: a copy or a snapshot of it does not reach the Trainer, and a proof logs nothing."""
    trainer, pl_module.trainer = pl_module.trainer, None
    try:
        yield
    finally:
        pl_module.trainer = trainer


def decided(grower: Grower, metric: float | None, logged: Mapping[str, float]) -> Any:
    """What the Grower decides; where its trigger wants a metric, say how that is named here."""
    try:
        return grower.decide(metric, **logged)
    except GrowthError as error:
        if metric is None:
            error.add_note("In Lightning the metric is named: GrowthCallback(..., monitor='val_loss').")
        raise


def warn_unless_evaluated(grower: Grower | None, unread: Sequence[Any]) -> None:
    """Warn at the end of a training in which there was no evaluation."""
    if grower is not None and not grower.calls and not unread:
        warnings.warn(
            "nothing was evaluated in this training, so GrowthCallback has decided nothing: validate more often "
            "(check_val_every_n_epoch, val_check_interval) or train longer.",
            stacklevel=2,
        )


class Waiting:
    """Counts how long a growth waits for a batch that finds no half-used gradients; warns once."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, trainer: Any, grower: Grower) -> bool:
        """Whether it has to wait now."""
        try:
            check_moment(grower.model, grower.companions, grower.watch)
        except BadMoment as error:
            self.batches += 1
            if self.batches == PATIENCE + trainer.accumulate_grad_batches:
                warnings.warn(f"a growth has been waiting for {self.batches} batches: {error}", stacklevel=2)
            return True
        self.batches = 0
        return False
