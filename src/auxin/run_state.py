"""What the rooms below the Grower know of it: the parts that choosers, ranks, logs and checkpoints ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from auxin.anatomy.probe import Probe
from auxin.change import Change, Edit
from auxin.evidence import Evidence
from auxin.journal import Journal
from auxin.ledger import Ledger
from auxin.limit import Limit
from auxin.ranks import Ranks
from auxin.refs import Allowed
from auxin.safe_point import StepWatch
from auxin.trial import Rollback


class Run(Protocol):
    """A network that grows while it trains; a ``Grower`` is one.

    Attributes:
        model: the network.
        companions: everything that keeps step with it.
        probe: one batch, or a callable that returns one.
        evidence: a loss and batches.
        limit: where growing ends.
        watch: which gradients a step has used.
        rollback: what the run can go back to.
        telling: whether ``on_growth`` is being called; all of the growth is there then.
    """

    model: nn.Module
    companions: tuple[Any, ...]
    probe: Probe
    evidence: Evidence | None
    limit: Limit
    watch: StepWatch
    rollback: Rollback
    telling: bool

    @property
    def when(self) -> Callable[[Any], bool]:
        """The trigger."""
        ...

    @property
    def choose(self) -> Callable[[Any, Any], Edit | None]:
        """The chooser."""
        ...

    @property
    def journal(self) -> Journal:
        """What has grown."""
        ...

    @property
    def calls(self) -> int:
        """How often ``step`` was called."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing will grow any more."""
        ...

    @property
    def optimizers(self) -> list[Any]:
        """Those of the companions that step parameters."""
        ...

    @property
    def optimizer_steps(self) -> int:
        """Steps of the first optimizer."""
        ...

    @property
    def ranks(self) -> Ranks:
        """The processes that train the network together."""
        ...

    @property
    def ledger(self) -> Ledger:
        """What has been spent."""
        ...

    def edits(self) -> list[Edit]:
        """The edits that may be chosen from."""
        ...

    def references(self) -> list[Any]:
        """What those edits name."""
        ...

    def trial(self, edit: Edit | None) -> AbstractContextManager[Change | None]:
        """Grow inside; afterwards everything is as before."""
        ...

    def race(
        self, edits: Sequence[Edit], steps: int, shrink: float = 1.0, averaged: float = 0.5, sure: float = 0.0
    ) -> Any:
        """Let branches train, and go on as the best one; see ``auxin.race.Race``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Counts, trigger, chooser and journal as plain data."""
        ...

    def restore(self, state: Mapping[str, Any], journal: Journal, allowed: Allowed) -> None:
        """Counts, trigger and chooser; the network has been replayed already."""
        ...

    def or_as_before(self) -> AbstractContextManager[None]:
        """What is raised inside puts this run's own state back."""
        ...
