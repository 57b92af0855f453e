"""What the broken twins share: a right set-up, and ways to spoil it."""

from collections.abc import Callable

import families
import pytest
from companions import make_companions, make_optimizers
from rows import BLOCKS
from torch import nn

from auxin import Duplicate, Insert
from auxin.testing import check
from auxin.testing.run import Run

COPY = Duplicate("blocks", by=1)
WITH_STATE = Duplicate("blocks", by=1, output="keep", state="copy")
LAYER = Insert("blocks", BLOCKS["mlp"], index=1)


def run_check(edit=COPY, optimizer: str = "AdamW-loop", groups: str = "one", model: nn.Module | None = None):
    return check(
        families.build("mlp") if model is None else model,
        edit,
        lambda m: make_optimizers(m, optimizer, groups),
        families.batch("mlp"),
        companions=lambda m, *o: make_companions(m, list(o), "LambdaLR", "ema", "none"),
    )


def caught(name: str, **arguments) -> None:
    with pytest.raises(AssertionError, match=rf"^auxin\.testing\.check: {name}: "):
        run_check(**arguments)


def group_of(run: Run) -> dict:
    return run.optimizers[0].param_groups[0]


def afterwards(patch: pytest.MonkeyPatch, spoil: Callable[[Run], None]) -> None:
    """Do something to a run right after it has grown."""
    right = Run.grow

    def grow(self: Run, *args, **kwargs):
        change = right(self, *args, **kwargs)
        if not kwargs.get("dry_run"):
            spoil(self)
        return change

    patch.setattr(Run, "grow", grow)
