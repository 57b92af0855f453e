"""Growth in a loop under Accelerate: a ``Grower`` around what ``accelerator.prepare`` returned."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import accelerate
from torch import Tensor, nn

from auxin import grower
from auxin.anatomy.tree import unwrap
from auxin.arguments import check_words
from auxin.auto import AutoGrower, begun, budget_of, parts_of
from auxin.change import Change, Edit
from auxin.errors import GrowthError
from auxin.evidence import Evidence
from auxin.follow.own_groups import optimizers_in
from auxin.hosts.common import FORWARD, as_built, unwrapped, warn_untested
from auxin.hosts.files import STATE, read_state, write_state
from auxin.structure_history import StructureHistory

warn_untested("accelerate", accelerate.__version__, "1.10", "1.15")


class Grower(grower.Grower):
    """``auxin.Grower`` on prepared objects: they stay as they are, and nothing is prepared a second time.

    ``accelerator.save_state`` writes what has grown beside its own files, and ``accelerator.load_state`` takes the
    network there before it loads them, forward or back. A process without auxin loads such a directory too, into a
    network of that depth.

    Args:
        accelerator: the one that has prepared the others.
        model: the prepared network.
        companions: the prepared optimizers and schedulers, averages, scaler.
        allow: further classes, functions or modules that the journal of a checkpoint may name.
        options: the arguments of ``auxin.Grower``: ``edits``, ``when``, ``probe``, ...

    Raises:
        GrowthError: something was not prepared, an optimizer of the network was not handed over, the network has a
            Grower already, or it is distributed in a way under which networks do not grow.
    """

    def __init__(self, accelerator: Any, model: nn.Module, *companions: Any, allow: Iterable[Any] = (), **options: Any):
        check_words("auxin.hosts.accelerate.Grower", options, grower.Grower, needed=("edits", "when"))
        _check(accelerator, model)
        self._prepared: dict[str, Any] = {}  # while it decides: what was hung on the network
        plain = [unwrapped(one) for one in companions]
        _check_optimizers(accelerator, model, plain)
        super().__init__(model, *plain, **options)
        self._accelerator, self._allow, self.history = accelerator, list(allow), StructureHistory()
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def decide(self, metric: float | Tensor | None = None, /, **metrics: float | Tensor) -> tuple[Edit, int] | None:
        """The decision as data; see ``auxin.Grower``."""
        self._prepared = _forward_of(self.model)
        try:
            with as_built(self.model):
                return super().decide(metric, **metrics)
        finally:
            self._prepared = {}

    def grow(self, edit: Edit | Sequence[Edit], seed: int | None = None) -> Change:
        """Carry out one edit now; see ``auxin.Grower``."""
        _check_optimizers(self._accelerator, self.model, self.companions)
        with as_built(self.model):
            return super().grow(edit, seed)

    @contextmanager
    def trial(self, edit: Edit | None, seed: int | None = None) -> Iterator[Change | None]:
        """Grow, train and measure inside, as prepared; see ``auxin.Grower``."""
        prepared = self._prepared or _forward_of(self.model)  # a chooser that tries is asked without autocast
        with as_built(self.model), super().trial(edit, seed) as change:
            self.model.__dict__.update(prepared)
            yield change

    def _save(self, models: Sequence[nn.Module], weights: Any, directory: str) -> None:
        name = self._file(models)
        if name is not None and accelerate.PartialState().is_main_process:
            try:
                write_state(self, directory, name)
            except GrowthError as error:
                if self.journal:
                    raise
                warnings.warn(
                    f"'{directory}' gets no {name}: {error}", stacklevel=2
                )  # nothing of this Grower's is lost

    def _load(self, models: Sequence[nn.Module], directory: str) -> None:
        name = self._file(models)
        if name is None:
            return
        state = read_state(directory, self.model, [*self.references(), *self._allow], name)
        if state is not None:
            with as_built(self.model):
                self.go_to(state, self._allow)
        elif len(self.journal):
            raise GrowthError(
                f"'{directory}' holds no {name}: it was saved without this Grower, so it is not known what had grown. "
                "Load it before anything grows, into the network that saved it."
            )

    def _file(self, models: Sequence[nn.Module]) -> str | None:
        """The name of the file for this network, as Accelerate numbers its own; None once it has been let go."""
        for number, model in enumerate(models):
            if unwrap(model) is self.model:
                return f"{number}-{STATE}" if number else STATE
        return None


def auto(
    accelerator: Any,
    model: nn.Module,
    *companions: Any,
    evidence: Evidence,
    budget: float | None = None,
    probe: Any = None,
    depth: bool = True,
    width: bool = True,
    **options: Any,
) -> AutoGrower:
    """``auxin.auto`` on prepared objects: call ``grower.step()`` after each optimizer step, until ``grower.finished``.

    Args:
        accelerator: the one that has prepared the others.
        model: the prepared network, small.
        companions: the prepared optimizers and schedulers, averages, scaler.
        evidence: as for ``auxin.auto``, with batches on the device of the network.
        budget: as for ``auxin.auto``.
        probe: one batch to prove growths on; None: the first of the evidence.
        depth: whether lists of blocks may get longer.
        width: whether widths may get larger.
        options: of ``auxin.Grower``, and ``allow``.

    Raises:
        GrowthError: as for ``auxin.auto`` and ``Grower``.
    """
    if budget is None:
        budget = budget_of(model, [unwrapped(one) for one in companions], evidence)
    parts = parts_of(evidence, budget, probe, depth, width, options)
    return begun(_Auto(accelerator, model, *companions, **parts), budget, "when" not in options)


class _Auto(Grower, AutoGrower):
    """An AutoGrower on prepared objects."""


def _forward_of(model: nn.Module) -> dict[str, Any]:
    """What ``accelerator.prepare`` has hung on the ``forward`` of a network."""
    return {name: model.__dict__[name] for name in FORWARD if name in model.__dict__}


def _check(accelerator: Any, model: Any) -> None:
    if not hasattr(accelerator, "register_load_state_pre_hook"):
        raise GrowthError(f"Grower(accelerator, model, ...): the first is a {type(accelerator).__name__}.")
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise GrowthError(
            f"Grower: this Accelerator uses {kind}, under which networks do not grow. Train without it; or grow "
            "between two runs: load the plain model, auxin.grow(model, edit, probe=batch), save it, prepare it again."
        )
    if not any(unwrap(model) is unwrap(known) for known in accelerator._models):
        raise GrowthError("Grower: pass the model that accelerator.prepare(...) returned; this one is not prepared.")
    hooks = [getattr(hook, "__self__", None) for hook in accelerator._load_model_state_pre_hook.values()]
    if any(isinstance(one, Grower) and one.model is unwrap(model) for one in hooks):
        raise GrowthError("Grower: this model has a Grower already. Give that one all edits: edits=[first, second].")


def _check_optimizers(accelerator: Any, model: nn.Module, companions: Sequence[Any]) -> None:
    """Check that none of the prepared optimizers of this network was forgotten: it would not train what grows."""
    own, known = {id(p) for p in model.parameters()}, [id(one) for one in companions]
    for optimizer in optimizers_in([unwrapped(one) for one in accelerator._optimizers]):
        if id(optimizer) not in known and any(id(p) in own for g in optimizer.param_groups for p in g["params"]):
            raise GrowthError(
                f"Grower: {type(optimizer).__name__} was prepared for this model too, and would not train what grows. "
                "Hand over all that was prepared: Grower(accelerator, model, optimizer, scheduler, ...)."
            )
