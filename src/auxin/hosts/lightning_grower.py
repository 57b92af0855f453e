"""The Grower of a module in Lightning's Trainer: built again for each run, around what the Trainer has made."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from auxin.change import Change
from auxin.errors import GrowthError
from auxin.grower import Grower
from auxin.hosts.common import checked_parts, named_by
from auxin.hosts.lightning_trainer import companions_in, without_trainer
from auxin.logbook import Logbook
from auxin.ramp import resumed


class Arguments:
    """The arguments of a Grower, for one run after another: a log goes on.

    Args:
        options: of ``auxin.Grower``.
        counted_by: the hyperparameter of the module that counts its blocks.
        allow: what a journal may name besides what the edits name.
    """

    def __init__(self, options: dict[str, Any], counted_by: str | None, allow: Iterable[Any]):
        self.options, self.counted_by = checked_parts(options), counted_by
        self.allow = [*allow, *named_by(options["edits"])]
        self.make: Callable[..., Grower] = Grower
        self._log: Logbook | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy writes into no log of another's."""
        return {**self.__dict__, "_log": None}

    def grower(self, trainer: Any, saved: Mapping[str, Any] | None, batch: Any) -> Grower:
        """Build one around a module and all that hangs on it in a Trainer, as it was saved.

        Args:
            trainer: whose module is trained; its process 0 writes the log.
            saved: the state to go on from.
            batch: a callable that gives a batch, where no probe was given.
        """
        module, companions, log = trainer.lightning_module, companions_in(trainer), self.options.get("log")
        if self._log is None:
            self._log = log if isinstance(log, Logbook) else Logbook(log if trainer.is_global_zero else None)
        own: dict[str, Any] = {"log": self._log, "on_growth": functools.partial(self._grown, module)}
        own["on_undo"] = functools.partial(self._undone, module, trainer)
        probe = self.options.get("probe")
        with without_trainer(module):
            resumed((), module, (), (module, *companions))  # gates open again with the Grower's state
            own["probe"] = batch if probe is None else probe
            grower = self.make(module, *companions, **{**self.options, **own})
            if saved is not None:
                grower.load_state_dict(saved["grower"], self.allow)
        return grower

    def recount(self, module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Let the hyperparameter that counts blocks say what it says in a checkpoint."""
        hparams = checkpoint.get("hyper_parameters", {})
        if self.counted_by in hparams:
            module.hparams[self.counted_by] = hparams[self.counted_by]

    def _undone(self, module: Any, trainer: Any) -> None:
        module.trainer = trainer  # a snapshot was taken without it
        tell = self.options.get("on_undo")
        if tell is not None:
            tell()

    def _grown(self, module: Any, change: Change) -> None:
        tell = self.options.get("on_growth")
        if tell is not None:
            tell(change)
        if self.counted_by is not None:
            count(module, self.counted_by, change)


def count(module: Any, name: str, change: Change) -> None:
    """Let a hyperparameter count new blocks too, so that the module's class builds the network as it is now.

    Args:
        module: a LightningModule that has called ``save_hyperparameters``.
        name: of a number of blocks, or of a list of such numbers (one for each stack), e.g. "n_blocks".
        change: what has grown.

    Raises:
        GrowthError: it does not count the blocks.
    """
    copied = [(path, new.source) for path, new in change.added if new.source is not None]
    if not copied:
        return
    where, value = copied[0][0].rpartition(".")[0], module.hparams.get(name)
    many = isinstance(value, (list, tuple))
    counts = list(value) if isinstance(value, (list, tuple)) else [value]
    blocks = len(module.get_submodule(where)) - len(copied)
    if any(type(one) is not int for one in counts) or sum(counts) != blocks:
        raise GrowthError(
            f"counted_by={name!r}: this hyperparameter is {value!r}, and {where} had {blocks} blocks. Name the one "
            f"that counts them, as self.save_hyperparameters() has kept it: {', '.join(module.hparams) or 'nothing'}."
        )
    ends = list(itertools.accumulate(counts))
    for _, source in copied:
        counts[bisect.bisect_right(ends, int(source.rpartition(".")[2]))] += 1
    module.hparams[name] = counts if many else counts[0]
