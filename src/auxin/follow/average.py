"""Averages, as ``AveragedModel``: the same change on their own copies, with their own averaged values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from auxin.anatomy.wrappers import networks_of
from auxin.change import Before, Change
from auxin.errors import GrowthError
from auxin.follow import follow
from auxin.follow.structure import Undo, apply, builder, undo


@follow(AveragedModel, wraps=lambda average: [average.module])
def follow_average(average: Any, change: Change) -> Iterator[None]:
    """Old averages keep their layers; a new block's average starts from what the average of its source holds.

    Raises:
        GrowthError: the averaged copy has another structure than the model had.
    """
    assert change.before is not None
    copies = [(copy, builder(change.before, copy)) for copy in networks_of(average)]
    for copy, _ in copies:
        _check(type(average).__name__, copy, change.before)
    undos: list[Undo] = []
    yield
    try:
        for copy, build in copies:
            apply(copy, change, build, undos)
        yield
    except GeneratorExit:
        raise
    except BaseException:
        undo(undos)
        raise


def _check(kind: str, copy: nn.Module, before: Before) -> None:
    ours = {name: before.shapes[id(p)] for name, p in before.parameters.items()}
    theirs = {name: p.shape for name, p in copy.named_parameters()}
    if ours != theirs:
        lacks = sorted(ours.keys() - theirs.keys())[:4]
        extra = sorted(theirs.keys() - ours.keys())[:4]
        differ = sorted(n for n in ours.keys() & theirs.keys() if ours[n] != theirs[n])[:4]
        raise GrowthError(
            f"{kind} averages another network than this one: it lacks {lacks or 'nothing'}, has "
            f"{extra or 'nothing'} more, and {differ or 'no'} shapes differ. Build it from the model as it is now: "
            f"{kind}(model, ...), and pass it to every growth."
        )
