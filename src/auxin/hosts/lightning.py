"""Growth in Lightning, as one callback: ``Trainer(callbacks=[GrowthCallback(edits, when, monitor="val_loss")])``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from auxin.arguments import checked_trigger, is_edit
from auxin.errors import GrowthError
from auxin.grower import Grower
from auxin.hosts import lightning_trainer as parts
from auxin.hosts.common import check_options
from auxin.hosts.lightning_callback import AnyCallback, check
from auxin.hosts.lightning_checkpoint import KEY, renew_averages, stand_by, state_of
from auxin.hosts.lightning_checkpoint import load_from_checkpoint as load_from_checkpoint
from auxin.hosts.structure import Structure, has_grown
from auxin.journal import references
from auxin.logbook import Logbook
from auxin.progress import load_states, states_of

PATIENCE = 20  # batches without a clean moment, accumulated ones aside, before a warning


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
        allow: further classes, functions or modules that the journal of a checkpoint may name.
        options: the other arguments of ``auxin.Grower``: ``limit``, ``choose``, ``on_growth=print``, ...

    Attributes:
        grower: the Grower of the run, from the beginning of training on.
        saved: what the last checkpoint that was read holds of it.

    Raises:
        GrowthError: an argument that no Grower takes.

    Example:
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
        allow: Iterable[Any] = (),
        **options: Any,
    ):
        self.options = {"edits": edits, "when": checked_trigger(when), "probe": probe, **options}
        check_options(self.options, "GrowthCallback")
        fixed = [edits] if is_edit(edits) else [] if callable(edits) else edits
        self.allow = [*allow, *(ref for edit in fixed for ref in references(edit))]
        self.monitor, self.reset_patience = monitor, reset_patience
        self._parts = {name: self.options[name] for name in ("when", "choose") if name in self.options}
        self._unused = copy.deepcopy(states_of(self._parts))
        self.grower: Grower | None = None
        self._structure: Structure | None = None
        self.saved: Mapping[str, Any] | None = None
        self._unread: list[dict[str, float]] = []
        self._batch: Any = None
        self._log: Logbook | None = None
        self._waited = 0

    def __getstate__(self) -> dict[str, Any]:
        """What a copy, or another process, needs: no network and no optimizer."""
        gone = dict.fromkeys(("grower", "_structure", "_batch", "_log"))
        return {**self.__dict__, **gone, "saved": self.state()}

    def state(self) -> Mapping[str, Any] | None:
        """What a checkpoint holds of it, under the key "auxin"."""
        if self.grower is None:
            return self.saved
        return {**state_of(self.grower), "unread": list(self._unread)}

    # ---- what Lightning calls

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the set-up, and stand by where checkpoints are written and read."""
        check(trainer, pl_module, self)
        if stage == "fit":
            self.saved, self.grower = self.state(), None
        if self._structure is None or self._structure.model is not pl_module:
            self._structure = Structure(pl_module)
            self.saved = self.saved if has_grown(pl_module, self.saved) else None
        stand_by(self, trainer)

    def after_reading(self, trainer: Any, checkpoint: Mapping[str, Any]) -> None:
        """Take the network to the structure of a checkpoint; its weights are loaded next."""
        self.saved, self.grower, module = checkpoint.get(KEY), None, trainer.lightning_module
        with parts.without_trainer(module):
            if self._structure is not None and self._structure.take_to(self.saved, self.allow):
                renew_averages(trainer, module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the Grower around what the Trainer has made and restored."""
        self._unread, self._waited = list((self.saved or {}).get("unread", ())), 0
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
        while self._unread and not self._waits(trainer, grower):
            self._step(trainer, grower, self._unread.pop(0))

    # ---- how

    def _built(self, trainer: Any) -> Grower:
        probe, log = self.options["probe"], self.options.get("log")
        if self._log is None:
            self._log = log if isinstance(log, Logbook) else Logbook(log)
        if self.saved is None:
            load_states(self._parts, self._unused)
        options = {**self.options, "log": self._log, "probe": (lambda: self._batch) if probe is None else probe}
        return parts.grower_for(trainer, options, self.saved, self.allow)

    def _waits(self, trainer: Any, grower: Grower) -> bool:
        reason = parts.why_not_now(grower)
        self._waited = 0 if reason is None else self._waited + 1
        if self._waited == PATIENCE + trainer.accumulate_grad_batches:
            warnings.warn(f"a growth has been waiting for {self._waited} batches: {reason}", stacklevel=2)
        return reason is not None

    def _step(self, trainer: Any, grower: Grower, logged: dict[str, float]) -> None:
        assert self._structure is not None
        try:
            with parts.without_trainer(trainer.lightning_module), self._structure.noting():
                change = grower.step(None if self.monitor is None else logged[self.monitor], **logged)
        except GrowthError as error:
            if self.monitor is None:
                error.add_note("In Lightning the metric is named: GrowthCallback(..., monitor='val_loss').")
            raise
        for stopping in trainer.early_stopping_callbacks if change is not None and self.reset_patience else ():
            stopping.wait_count = 0
