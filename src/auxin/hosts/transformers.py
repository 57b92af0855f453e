"""Growth in the Hugging Face Trainer, as one callback: ``Trainer(..., callbacks=[GrowthCallback(edits=..., ...)])``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from auxin.arguments import check_places, check_without_probe, check_words
from auxin.auto import AutoGrower, begun, parts_of, warn_unless_spent
from auxin.errors import GrowthError
from auxin.evidence import Evidence
from auxin.follow import follow
from auxin.grower import Grower
from auxin.hosts.common import as_built, check_direction, checked_parts, named_by, unwrapped, warn_untested
from auxin.hosts.files import write_blocks, write_state
from auxin.hosts.loading import Loading, better, full
from auxin.logbook import Logbook
from auxin.structure_history import StructureHistory

warn_untested("transformers", transformers.__version__, "5.23", "5.24")
follow("transformers.optimization:Adafactor", like=torch.optim.AdamW)  # state per parameter, from its first step on


class GrowthCallback(Loading):
    """Grows the model of a ``transformers.Trainer`` while it trains, with optimizer and schedule kept in step.

    It decides at each evaluation and carries out before the next step, so what the Trainer saves in between is the
    model that was evaluated. A file ``auxin.json`` in each checkpoint lets a resumed run go on, and the best model be
    loaded with the structure that it had.

    Args:
        edits: as for ``auxin.Grower``.
        when: a trigger of ``auxin.when``; its calls are evaluations.
        monitor: the metric of the evaluation that it looks at; None: ``metric_for_best_model``, or the loss.
        companions: what else must keep step, as averages of the weights. Optimizer and schedule are the Trainer's.
        allow: further classes, functions or modules that the journal of a checkpoint may name.
        options: the other arguments of ``auxin.Grower``: ``probe``, ``limit``, ``choose``, ...

    Raises:
        GrowthError: an option is wrong; later, from the Trainer: it is one under which networks do not grow, there are
            two callbacks, or an evaluation lacks the metric.
    """

    looks_at_evaluations = True

    def __init__(
        self,
        edits: Any,
        when: Callable[[Any], bool],
        monitor: str | None = None,
        *,
        companions: Iterable[Any] = (),
        allow: Iterable[Any] = (),
        **options: Any,
    ):
        log = options.get("log")
        options |= {"edits": edits, "when": when}
        check_words("GrowthCallback", options, Grower)
        if isinstance(companions, torch.nn.Module) or not isinstance(companions, Iterable):
            raise GrowthError(
                f"GrowthCallback(companions={type(companions).__name__}): pass a list, companions=[average]."
            )
        checked_parts(options)
        check_without_probe(options["edits"], options.get("probe"))
        options["log"] = log if isinstance(log, Logbook) else Logbook(log)
        super().__init__(list(companions), [*allow, *named_by(options["edits"])])
        self.monitor, self.options = monitor, options
        self._training = False
        self._seen: list[str] = []  # metrics of evaluations that lacked the one that is looked at

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what kind of Trainer this is, and stand by."""
        super().on_init_end(args, state, control, **kwargs)
        self._check(args)
        if kwargs.get("model") is not None:
            check_places(self.options["edits"], kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Build the Grower around what the Trainer has prepared, and go on where the checkpoint was."""
        if self._attach() and state.global_step:
            raise GrowthError(
                "GrowthCallback was added after the Trainer was built, so it has not seen from where this run resumes. "
                "Hand it over: Trainer(..., callbacks=[GrowthCallback(...)])."
            )
        self._check(args)
        if state.is_hyper_param_search:
            raise GrowthError("GrowthCallback: not in a hyperparameter_search; give each trial a Trainer of its own.")
        if args.eval_strategy == "no" and self.looks_at_evaluations:
            warnings.warn("GrowthCallback decides at evaluations; with eval_strategy='no' nothing grows.", stacklevel=2)
        model, before, restored = kwargs["model"], self.grower, self._restored
        theirs = (kwargs["optimizer"], kwargs["lr_scheduler"], getattr(self._trainer.accelerator, "scaler", None))
        companions = [unwrapped(one) for one in theirs if one is not None]
        if restored is None and before is not None and before.model is model:
            restored = before.state_dict()  # a second train() goes on
        elif restored is None:
            self._history = StructureHistory()
        self.grower = self._built(self._trainer.model_wrapped, *companions, *self.companions)
        self.grower.history = self._history
        if restored is not None:
            self.grower.progress.entries[:] = self._journal(model, restored).entries
            self.grower.load_state_dict(restored, self.allow)
        self._restored, self._training, self._seen = None, True, []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide."""
        if not self._training or self.grower is None:
            return
        name = self._monitored(args)
        numbers = {key: value for key, value in kwargs["metrics"].items() if type(value) in (int, float)}
        if name not in numbers:  # so far: of several evaluation sets one may have it
            self._seen += numbers
            return
        self._seen = []
        self.grower.log.name = name
        with as_built(self.grower.model):
            self.grower.progress.pending = self.grower.decide(numbers.pop(name), **numbers)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Carry out what the evaluation has decided."""
        self._check_monitor(args)
        grower = self.grower
        if grower is not None and grower.progress.pending is not None:
            with as_built(grower.model):
                grower.carry_out()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Carry out what could not be carried out before the step."""
        self.on_step_begin(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the journal into the checkpoint."""
        self._check_monitor(args)
        if self.grower is not None and state.is_world_process_zero:
            directory = Path(args.output_dir, f"checkpoint-{state.global_step}")
            write_state(self.grower, directory)
            if hasattr(self.grower.model, "peft_config"):
                write_blocks(self.grower, directory)
        self._trainer.accelerator.wait_for_everyone()  # the others may read it next

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluations from here on decide nothing."""
        self._training = False
        self._check_monitor(args)

    def _built(self, *parts: Any) -> Grower:
        return Grower(*parts, **self.options)

    def _check(self, args: Any) -> None:
        check_direction(self.options, *better(args, self._monitored(args)), "greater_is_better of the Trainer")

    def _monitored(self, args: Any) -> str:
        return full(self.monitor or args.metric_for_best_model or "loss")

    def _check_monitor(self, args: Any) -> None:
        """Raise where evaluations have passed without the metric."""
        seen, self._seen = self._seen, []
        if seen:
            raise GrowthError(
                f"GrowthCallback: no evaluation gave {self._monitored(args)}, only {', '.join(dict.fromkeys(seen))}. "
                "Pass one of these as monitor=..., or return it from compute_metrics."
            )


def auto(
    *, evidence: Evidence, budget: float, probe: Any = None, depth: bool = True, width: bool = True, **options: Any
) -> GrowthCallback:
    """``auxin.auto`` as a callback: ``Trainer(..., callbacks=[auto(evidence=..., budget=...)])``.

    It decides after every optimizer step, and ends the training when the budget is spent.

    Args:
        evidence: a loss, batches to train on in races, and ``validation=`` batches, on the device of the model.
        budget: FLOPs of the whole run, races included: steps x ``auxin.ledger.flops_of(model, loss, batch)``.
        probe: one batch to prove growths on; None: the first of the evidence.
        depth: whether lists of blocks may get longer.
        width: whether widths may get larger.
        options: of ``auxin.Grower``, and of ``GrowthCallback``.

    Raises:
        GrowthError: no validation data, or an argument that no Grower takes.
    """
    return _Auto(budget, **parts_of(evidence, budget, probe, depth, width, options))


class _Auto(GrowthCallback):
    looks_at_evaluations = False

    def __init__(self, budget: float, **options: Any):
        super().__init__(**options)
        self._budget = budget

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """It looks at its evidence."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, race, and grow."""
        grower = self.grower
        assert isinstance(grower, AutoGrower)
        with as_built(grower.model):
            grower.step()
        control.should_training_stop = control.should_training_stop or grower.finished

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so where the budget is not spent."""
        super().on_train_end(args, state, control, **kwargs)
        warn_unless_spent(self.grower, "max_steps or num_train_epochs")  # pyright: ignore[reportArgumentType]

    def _built(self, *parts: Any) -> Grower:
        return begun(AutoGrower(*parts, **self.options), self._budget, False)
