"""``AveragedModel``: the same change on its own copy of the network, with its own averaged values."""

from __future__ import annotations

from collections.abc import Iterator

from torch.optim.swa_utils import AveragedModel

from auxin.anatomy.tree import unwrap
from auxin.change import Before, Change
from auxin.errors import GrowthError
from auxin.follow import follow
from auxin.follow.structure import Undo, apply, builder, undo


@follow(AveragedModel)
def follow_average(average: AveragedModel, change: Change) -> Iterator[None]:
    """Old averages keep their layers; a new block's average starts from what the average of its source holds.

    Raises:
        GrowthError: the averaged copy has another structure than the model had.
    """
    assert change.before is not None
    _check(average, change.before)
    copy = unwrap(average.module)
    build = builder(change.before, copy)
    undos: list[Undo] = []
    yield
    try:
        apply(copy, change, build, undos)
        yield
    except GeneratorExit:
        raise
    except BaseException:
        undo(undos)
        raise


def _check(average: AveragedModel, before: Before) -> None:
    ours = {name: before.shapes[id(p)] for name, p in before.parameters.items()}
    theirs = {name: p.shape for name, p in unwrap(average.module).named_parameters()}
    if ours != theirs:
        lacks = sorted(ours.keys() - theirs.keys())[:4]
        extra = sorted(theirs.keys() - ours.keys())[:4]
        differ = sorted(n for n in ours.keys() & theirs.keys() if ours[n] != theirs[n])[:4]
        raise GrowthError(
            f"AveragedModel averages another network than this one: it lacks {lacks or 'nothing'}, has "
            f"{extra or 'nothing'} more, and {differ or 'no'} shapes differ. Build it from the model as it is now: "
            "AveragedModel(model, ...), and pass it to every growth."
        )
