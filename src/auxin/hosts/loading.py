"""Where a Hugging Face Trainer loads weights: the network gets the structure that they were saved with first."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import transformers

from auxin.errors import GrowthError
from auxin.grower import Grower
from auxin.hosts.common import as_built, unwrapped
from auxin.hosts.files import check_weights, read_blocks, read_state
from auxin.journal import Journal
from auxin.refs import Allowed
from auxin.structure_history import StructureHistory

ELSE = (
    "Train without it; or grow between two runs: load the model in one process, auxin.grow(model, edit, probe=batch), "
    "model.save_pretrained(path), and start the next run from there."
)


class Loading(transformers.TrainerCallback):
    """Stands by where the Trainer that it belongs to loads weights, to resume or at the end the best.

    Neither place has an event, so the two methods of the Trainer that do it are wrapped, on that one object.

    Attributes:
        grower: the Grower, from the beginning of training on.
        allow: what the journal of a checkpoint may name.
        companions: what keeps step beside the Trainer's own optimizer and schedule.
    """

    def __init__(self, companions: Sequence[Any], allow: Sequence[Any]):
        self.companions, self.allow = list(companions), list(allow)
        self.grower: Grower | None = None
        self._trainer: Any = None
        self._history = StructureHistory()
        self._restored: dict[str, Any] | None = None  # what a checkpoint held, until training begins

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what kind of Trainer this is, and stand by."""
        self._attach()

    def _attach(self) -> bool:
        """Stand by; whether that is new."""
        trainer = _calling_trainer()
        if sum(isinstance(one, Loading) for one in trainer.callback_handler.callbacks) > 1:
            raise GrowthError("two GrowthCallbacks for one Trainer. Give one of them all edits: edits=[first, second].")
        kinds = {
            "DeepSpeed": trainer.is_deepspeed_enabled,
            "FSDP": trainer.is_fsdp_enabled,
            "DataParallel": trainer.args.n_gpu > 1,
        }
        for kind in (kind for kind, used in kinds.items() if used):
            raise GrowthError(f"GrowthCallback: this Trainer uses {kind}, under which networks do not grow. {ELSE}")
        if trainer is self._trainer:
            return False
        self._trainer = trainer
        trainer._load_from_checkpoint = functools.partial(self._resume, trainer, trainer._load_from_checkpoint)
        trainer._load_best_model = functools.partial(self._load_best, trainer, trainer._load_best_model)
        return True

    def _resume(self, trainer: Any, load: Callable[..., None], checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Grow the network to what it was at a checkpoint, before its weights are loaded."""
        model = trainer.model
        if self not in trainer.callback_handler.callbacks:
            return load(checkpoint, *args, **kwargs)
        self._restored = read_state(checkpoint, model, self.allow)
        if self._restored is None:
            warnings.warn(f"'{checkpoint}' holds no auxin.json: GrowthCallback begins to count anew.", stacklevel=2)
        with as_built(model):
            self._rebuild(trainer, model)
        left = check_weights(model, checkpoint)
        load(checkpoint, *args, **kwargs)
        model.load_state_dict(left, strict=False)
        read_blocks(model, checkpoint)

    def _rebuild(self, trainer: Any, model: Any) -> None:
        state = self._restored
        if state is None:
            return
        if self.grower is not None and self.grower.model is model:
            model.zero_grad()  # of a training that was interrupted; the Trainer does so next
            self.grower.go_to(state, self.allow)
            return
        self._history = StructureHistory()
        if trainer.optimizer is None:
            trainer.create_optimizer()  # on the network as it was built, as in the run that was saved
        theirs = [unwrapped(one) for one in (trainer.optimizer, trainer.lr_scheduler) if one is not None]
        with self._history.going_to(model, self._journal(model, state), [*theirs, *self.companions]):
            pass

    def _load_best(self, trainer: Any, load: Callable[[], None]) -> None:
        """Take the network to what it was at the best checkpoint, before its weights are loaded."""
        best, grower = trainer.state.best_model_checkpoint, self.grower
        if grower is None or self not in trainer.callback_handler.callbacks:
            return load()
        state = read_state(best, grower.model, self.allow)
        if state is not None:
            with as_built(grower.model):
                grower.go_to(state, self.allow)
        left = check_weights(grower.model, best)
        load()
        grower.model.load_state_dict(left, strict=False)
        read_blocks(grower.model, best)

    def _journal(self, model: Any, state: dict[str, Any]) -> Journal:
        return Journal.from_json(state["journal"], Allowed.of(model, self.allow))


def full(name: str) -> str:
    """A metric as evaluations name it."""
    return name if name.startswith("eval_") else f"eval_{name}"


def better(args: Any, name: str) -> tuple[str, str | None]:
    """The metric, and what of it is better to a Trainer: "max", "min" or None."""
    if args.metric_for_best_model is None or full(args.metric_for_best_model) != name or args.greater_is_better is None:
        return name, None
    return name, "max" if args.greater_is_better else "min"


def _calling_trainer() -> Any:
    """The Trainer that calls: events do not name it.

    Raises:
        GrowthError: none does.
    """
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, transformers.Trainer):
            return found
        frame = frame.f_back
    raise GrowthError("GrowthCallback works in a transformers.Trainer; in a loop of your own, use auxin.Grower.")
