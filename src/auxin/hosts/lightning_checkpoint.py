"""What has grown, in the checkpoints of Lightning's Trainer: written beside the rest, read before the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from auxin.anatomy.wrappers import copies_in
from auxin.checkpoint.groups import group_names, regroup
from auxin.follow.scheduler import optimizer_of
from auxin.grower import Grower
from auxin.hosts.lightning_trainer import averages_in
from auxin.journal import Journal, fingerprint
from auxin.ramp import resumed
from auxin.refs import Allowed
from auxin.structure_history import StructureHistory

KEY = "auxin"
WATCHED = ("load_checkpoint", "save_checkpoint", "load_optimizer_state_dict")


def load_from_checkpoint(kind: Any, path: Any, allow: Iterable[Any] = (), **options: Any) -> Any:
    """A grown LightningModule for inference: ``kind.load_from_checkpoint``, and what has grown since.

    Args:
        kind: the class of the module.
        path: of the checkpoint.
        allow: further classes, functions or modules that the journal may name.
        options: of ``kind.load_from_checkpoint``.

    Returns:
        A module of class ``kind``, with the structure and the weights of then.

    Raises:
        GrowthError: the checkpoint is of another module.
    """

    def on_load_checkpoint(self: Any, checkpoint: Mapping[str, Any]) -> None:
        with taken_to(StructureHistory(), self, None, checkpoint.get(KEY), allow):
            pass
        kind.on_load_checkpoint(self, checkpoint)

    own = {"on_load_checkpoint": on_load_checkpoint, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    model = type(kind.__name__, (kind,), own).load_from_checkpoint(path, **options)
    model.__class__ = kind
    return model


@contextlib.contextmanager
def taken_to(
    history: StructureHistory,
    module: Any,
    now: Mapping[str, Any] | None,
    saved: Mapping[str, Any] | None,
    allow: Iterable[Any],
) -> Iterator[bool]:
    """Take a module to the structure that ``saved`` tells of; None: to the one that it began with.

    What is raised inside takes it back to the structure that it had.

    Args:
        history: of the structures of this module.
        module: the LightningModule, without its Trainer.
        now: what is known of its structure, as ``state_of`` gives it.
        saved: the same of a checkpoint.
        allow: what a journal may name.

    Yields:
        Whether anything is another object now, or may be.

    Raises:
        GrowthError: the checkpoint is of another module, or there is no way back.
    """
    allowed, before = Allowed.of(module, allow), fingerprint(module)
    grown, wanted = (Journal.from_json(state["grower"]["journal"] if state else [], allowed) for state in (now, saved))
    with history.going_to(module, wanted, (), grown):
        ramps = saved["grower"]["ramps"] if saved else []
        resumed(ramps, module, (), (module,))
        yield before != fingerprint(module) or bool(ramps)


def has_grown(module: Any, saved: Mapping[str, Any] | None) -> bool:
    """Whether a module has the structure that ``saved`` tells of, and has grown to it."""
    journal = saved["grower"]["journal"] if saved is not None else []
    return bool(journal) and journal[-1]["fingerprint"] == fingerprint(module)


def state_of(grower: Grower) -> dict[str, Any]:
    """What goes into a checkpoint, as plain data: the Grower, where parameters stand, and which are frozen."""
    model = grower.model
    groups = [group_names(optimizer, model) for optimizer in grower.optimizers]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    return {"grower": grower.state_dict(), "groups": groups, "frozen": frozen}


def put_back(trainer: Any, saved: Mapping[str, Any]) -> None:
    """Freeze, thaw and group parameters as they were; Lightning restores optimizers by position after that."""
    module, schedulers = trainer.lightning_module, [config.scheduler for config in trainer.lr_scheduler_configs]
    for name, p in module.named_parameters():
        p.requires_grad_(name not in saved["frozen"])
    for optimizer, groups in zip(trainer.optimizers, saved["groups"], strict=True):
        regroup(optimizer, groups, module, [s for s in schedulers if optimizer_of(s) is optimizer])


def renew_averages(trainer: Any, pl_module: Any) -> None:
    """Give averages the structure that the module has now; their values come from the checkpoint."""
    renewed: list[tuple[dict[str, Any], str, Any]] = []
    for callback, average in averages_in(trainer):
        copies = copies_in(average)
        if any(copy is average for copy in copies):
            renewed.append((callback.__dict__, "_average_model", deepcopy(pl_module)))
            continue
        device = next(average.parameters()).device
        for holder in list(average.modules()):
            for name, child in holder._modules.items():
                if any(child is copy for copy in copies):
                    renewed.append((holder._modules, name, deepcopy(pl_module).to(device)))
    for holder, name, copy in renewed:  # all copies are there: what is held is exchanged at one go
        holder[name] = copy


class Around:
    """A method of the Trainer's strategy, at which a callback stands by. An object, so that it pickles."""

    def __init__(self, callback: Any, trainer: Any, name: str):
        self.callback, self.trainer, self.name = callback, trainer, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write what has grown, or read it, around the method itself."""
        strategy = self.trainer.strategy
        state = self.callback.state() if self.name == "save_checkpoint" else None
        if state is not None:
            args = ({**args[0], KEY: state}, *args[1:])
        if self.name == "load_optimizer_state_dict" and self.callback.saved is not None:
            put_back(self.trainer, self.callback.saved)
        result = getattr(type(strategy), self.name)(strategy, *args, **kwargs)
        if self.name == "load_checkpoint":
            self.callback.after_reading(self.trainer, result)
        return result


def stand_by(callback: Any, trainer: Any) -> None:
    """From now on the callback hears of every checkpoint; also of those that hold weights only."""
    trainer.strategy.__dict__.update({name: Around(callback, trainer, name) for name in WATCHED})
