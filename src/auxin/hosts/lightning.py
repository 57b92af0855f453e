"""Growth in Lightning, as one callback: ``Trainer(callbacks=[GrowthCallback(edits, when, monitor="val_loss")])``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from auxin.arguments import check_places, check_words
from auxin.auto import AutoGrower, begun, parts_of, warn_unless_spent
from auxin.evidence import Evidence
from auxin.grower import Grower
from auxin.hosts import lightning_trainer as parts
from auxin.hosts.lightning_callback import AnyCallback, check
from auxin.hosts.lightning_checkpoint import KEY, has_grown, renew_averages, stand_by, state_of, taken_to
from auxin.hosts.lightning_checkpoint import load_from_checkpoint as load_from_checkpoint
from auxin.hosts.lightning_grower import Arguments
from auxin.structure_history import StructureHistory


class GrowthCallback(AnyCallback):
    """Grows a LightningModule while a Trainer trains it, with all that Lightning hangs on it kept in step.

    Optimizers, schedulers, scaler and averages are found in the Trainer. What has grown is in every checkpoint; with
    ``ckpt_path=`` the module that you build is the original one. An evaluation is the end of a validation, or of a
    training epoch where nothing is validated; the growth comes before the next batch with no half-used gradients.

    Args:
        edits: as for ``auxin.Grower``; places are paths in the LightningModule.
        when: a trigger of ``auxin.when``; its calls are evaluations.
        monitor: the logged metric that the trigger looks at.
        probe: as for ``auxin.Grower``; None: the first training batch.
        reset_patience: let ``EarlyStopping`` begin to count anew at a growth.
        counted_by: the hyperparameter that counts the blocks: it grows with them, so that the module's class builds the
            network as it is, also for a library that saves and loads by itself.
        allow: further classes, functions or modules that the journal of a checkpoint may name.
        options: the other arguments of ``auxin.Grower``: ``limit``, ``choose``, ``on_growth=print``, ...

    Attributes:
        grower: the Grower of the run, from the beginning of training on.
        saved: what the last checkpoint that was read holds of it.

    Raises:
        GrowthError: an argument that no Grower takes.

    Examples:
        >>> from auxin import Duplicate, when
        >>> callback = GrowthCallback(Duplicate("blocks", by=1), when.plateau(patience=3), monitor="val_loss")
    """

    def __init__(
        self,
        edits: Any,
        when: Callable[[Any], bool],
        monitor: str | None = None,
        *,
        probe: Any = None,
        reset_patience: bool = False,
        counted_by: str | None = None,
        allow: Iterable[Any] = (),
        **options: Any,
    ):
        options |= {"edits": edits, "when": when, "probe": probe}
        check_words("GrowthCallback", options, Grower)
        self._arguments = Arguments(options, counted_by, allow)
        self.monitor, self.reset_patience = monitor, reset_patience
        self.grower: Grower | None = None
        self._history, self._module = StructureHistory(), None
        self.saved: Mapping[str, Any] | None = None
        self._unread: list[dict[str, float]] = []
        self._batch: Any = None
        self._waiting = parts.Waiting()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy, or another process, needs: no network and no optimizer."""
        return {
            **self.__dict__,
            **dict.fromkeys(("grower", "_module", "_batch")),
            "_history": StructureHistory(),
            "saved": self.state(),
        }

    def state(self) -> Mapping[str, Any] | None:
        """What a checkpoint holds of it, under the key "auxin"."""
        if self.grower is None:
            return self.saved
        return {**state_of(self.grower), "unread": list(self._unread)}

    # ---- what Lightning calls

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the set-up, and stand by where checkpoints are written and read."""
        check(trainer, pl_module, self)
        parts.check_mode(trainer, self._arguments.options, self.monitor)
        if stage == "fit":
            check_places(self._arguments.options["edits"], pl_module)
            self.saved, self.grower = self.state(), None
        if self._module is not None and self._module is not pl_module:
            self._history, self._module = StructureHistory(), None
        stand_by(self, trainer)

    def after_reading(self, trainer: Any, checkpoint: Mapping[str, Any]) -> None:
        """Take the network to the structure of a checkpoint; its weights are loaded next."""
        module, saved, now = trainer.lightning_module, checkpoint.get(KEY), self.state()
        if self.grower is not None:
            self.grower.rollback.settle()
        now = now if self._module is module and has_grown(module, now) else None
        taking = taken_to(self._history, module, now, saved, self._arguments.allow)
        with parts.without_trainer(module), taking as another:
            self._arguments.recount(module, checkpoint)
            if another:
                renew_averages(trainer, module)
        self.saved, self.grower, self._module = saved, None, module

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the Grower around what the Trainer has made and restored."""
        if self._module is None:  # a new module, or a copy of this callback with its own
            self._module, self.saved = pl_module, self.saved if has_grown(pl_module, self.saved) else None
        self._unread, self._batch = list((self.saved or {}).get("unread", ())), None
        self.grower = self._built(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take in what the evaluation says."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._unread.append(parts.metrics_in(trainer, self.monitor))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The same where nothing is validated."""
        if not trainer.enable_validation:
            self._unread.append(parts.metrics_in(trainer, self.monitor))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Decide, and grow, between two batches."""
        if self._batch is None:
            self._batch = parts.probe_of(trainer, pl_module, batch)
        grower = self.grower
        if grower is None or [*map(id, grower.companions)] != [*map(id, parts.companions_in(trainer))]:
            self.saved = self.state()  # a callback of Lightning has exchanged the schedule
            self.grower = grower = self._built(trainer)
        if batch_idx == 0 and grower.journal:
            grower.verify()
        while self._unread and not self._waiting(trainer, grower):
            self._step(trainer, grower, self._unread.pop(0))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so where nothing could grow."""
        parts.warn_unless_evaluated(self.grower, self._unread)

    def _built(self, trainer: Any) -> Grower:
        grower = self._arguments.grower(trainer, self.saved, lambda: self._batch)
        grower.history = self._history
        return grower

    def _step(self, trainer: Any, grower: Grower, logged: dict[str, float]) -> None:
        metric, change = None if self.monitor is None else logged[self.monitor], None
        with parts.without_trainer(trainer.lightning_module):
            grower.log.name = self.monitor
            grower.progress.pending = parts.decided(grower, metric, logged)
            if grower.progress.pending is not None:
                with parts.told_of_the_probe(self._arguments.options["probe"]):
                    change = grower.carry_out()
        for stopping in trainer.early_stopping_callbacks if change is not None and self.reset_patience else ():
            stopping.wait_count = 0


def auto(
    *, evidence: Evidence, budget: float, probe: Any = None, depth: bool = True, width: bool = True, **options: Any
) -> GrowthCallback:
    """``auxin.auto`` as a callback: ``Trainer(callbacks=[auto(evidence=..., budget=...)], max_epochs=-1)``.

    It decides after every optimizer step, and ends the training when the budget is spent.

    Args:
        evidence: a loss, batches to train on in races, and ``validation=`` batches, on the device of the module.
        budget: FLOPs of the whole run, races included: steps x ``auxin.ledger.flops_of(module, loss, batch)``.
        probe: one batch to prove growths on; None: the first of the evidence.
        depth: whether lists of blocks may get longer.
        width: whether widths may get larger.
        options: of ``auxin.Grower``, and of ``GrowthCallback``.

    Raises:
        GrowthError: no validation data, or an argument that no Grower takes.
    """
    return cast(GrowthCallback, _Auto(budget, **parts_of(evidence, budget, probe, depth, width, options)))


class _Auto(GrowthCallback):
    def __init__(self, budget: float, **options: Any):
        super().__init__(**options)
        self._arguments.make = functools.partial(_begun, budget)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """It looks at its evidence."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """It looks at its evidence."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Decide, race, and grow, once the schedule has stepped too."""
        grower = self.grower
        assert isinstance(grower, AutoGrower)
        if not self._waiting(trainer, grower):
            self._step(trainer, grower, {})
        trainer.should_stop = trainer.should_stop or grower.finished

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so where the budget is not spent."""
        warn_unless_spent(self.grower, "max_epochs or max_steps")  # pyright: ignore[reportArgumentType]


def _begun(budget: float, *parts: Any, **options: Any) -> AutoGrower:
    return begun(AutoGrower(*parts, **options), budget, False)
