"""Averages, as ``AveragedModel``: the same change on their own copies, with their own averaged values."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from auxin.anatomy.tree import unwrap
from auxin.anatomy.wrappers import copies_in, networks_of, wrappers_of
from auxin.change import Before, Change
from auxin.companion import original_of
from auxin.errors import GrowthError
from auxin.follow import follow
from auxin.follow.second_tree import in_step
from auxin.follow.twins import builder
from auxin.fsdp2 import forget_root, set_up_again, states
from auxin.listing import listing, named_parameters
from auxin.record import refill
from auxin.regrouped import known_of, regroup
from auxin.structure import Undo, apply, reversible, undo


@follow(AveragedModel, wraps=lambda average: [average.module])
def follow_average(average: Any, change: Change) -> Iterator[None]:
    """Old averages keep their layers; a new block's average starts from what the average of its source holds.

    Raises:
        GrowthError: the averaged copy has another structure than the model had.
    """
    copies = [(copy, builder(change.before, copy)) for copy in networks_of(average)]
    for copy, _ in copies:
        _check(type(average).__name__, copy, change.before)
    trees = [w for held in copies_in(average) for w in wrappers_of(held) if original_of(w) is not None]
    in_steps = [in_step(tree, dict(unwrap(tree).named_modules()), change) for tree in trees]  # of compiled regions
    undos: list[Undo] = []
    yield

    def write() -> None:
        for copy, build in copies:
            lists = _lists_of_names(average)
            before = _tensors(copy) if lists else {}
            undos.append(functools.partial(forget_root, copy, states(copy)))
            known = known_of(copy)
            apply(copy, change, build, undos)
            undos.append(regroup(copy, known))
            undos.append(functools.partial(forget_root, copy, states(copy)))
            set_up_again(copy)
            if lists:
                _rename(lists, before, _tensors(copy), undos)
        for follow_tree in in_steps:
            follow_tree(undos)

    yield from reversible(write, functools.partial(undo, undos))


def _tensors(copy: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers."""
    network = listing(copy)
    return {**network.parameters, **network.buffers}


def _lists_of_names(average: Any) -> list[Any]:
    """Lists and sets of texts that an average keeps."""
    held = [value for value in vars(average).values() if type(value) in (list, set) and value]
    return [value for value in held if all(type(name) is str for name in value)]


def _rename(lists: list[Any], before: dict[str, Tensor], after: dict[str, Tensor], undos: list[Undo]) -> None:
    """Let the names that an average keeps in lists and sets follow the tensors: else it would leave new ones out.

    A list of all parameters, or of all buffers (or of those that are no integers), gets the new ones too.
    """
    called = {id(tensor): name for name, tensor in after.items()}
    old = {id(tensor) for tensor in before.values()}
    for held in lists:
        if not all(name in before for name in held):
            continue
        names = {called.get(id(before[name]), name) for name in held}
        for kind in ((True, True), (True, False), (False, True), (False, False)):
            listed = {name for name, tensor in before.items() if _is(kind, tensor)}
            if listed and listed <= set(held):
                names |= {name for name, tensor in after.items() if _is(kind, tensor) and id(tensor) not in old}
        undos.append(functools.partial(refill, held, list(held)))
        refill(held, [name for name in after if name in names])


def _is(kind: tuple[bool, bool], tensor: Tensor) -> bool:
    """Whether it is (a parameter, not made of integers)."""
    return kind == (isinstance(tensor, nn.Parameter), tensor.is_floating_point() or tensor.is_complex())


def _check(kind: str, copy: nn.Module, before: Before) -> None:
    ours = {name: before.shapes[id(p)] for name, p in before.parameters.items()}
    theirs = {name: p.shape for name, p in named_parameters(copy).items()}
    if ours != theirs:
        lacks = sorted(ours.keys() - theirs.keys())[:4]
        extra = sorted(theirs.keys() - ours.keys())[:4]
        differ = sorted(n for n in ours.keys() & theirs.keys() if ours[n] != theirs[n])[:4]
        raise GrowthError(
            f"{kind} averages another network than this one: it lacks {lacks or 'nothing'}, has "
            f"{extra or 'nothing'} more, and {differ or 'no'} shapes differ. Build it from the model as it is now: "
            f"{kind}(model, ...), and pass it to every growth."
        )
