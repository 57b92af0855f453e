"""The proof of a growth on averages: the copies of the network that they hold still compute what they did.

They are run on the probe before and after. That is spared where a growth only adds blocks of which each can be told by
itself that it changes nothing: then all else has to be what it was, tensor by tensor. Where the function of the network
changes, or nothing is run, what stays as it is in the network has to stay as it is in its averages.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.probe import PlanContext, untouched
from auxin.anatomy.rounding import Outputs, by_rounding, distance, if_it_runs, outputs_of_copy, tolerance
from auxin.anatomy.wrappers import networks_of
from auxin.change import Alias, Change, New
from auxin.companion import registered
from auxin.errors import GrowthError, reason
from auxin.listing import join, listing, module_at, modules_in
from auxin.ranks import checksum
from auxin.record import storage_of, version_of
from auxin.sharded import is_spread, settle

_version = operator.attrgetter("_version")


@dataclasses.dataclass(frozen=True)
class Rest:
    """What must stay of an average that is not run: its tensors, and what says whether anything wrote to them."""

    tensors: list[Tensor]
    stamps: list[Any]


@dataclasses.dataclass(frozen=True)
class Twins:
    """What tells of each tensor of an average whether it and its twin in the network have stayed as they are.

    Attributes:
        network: the tensors of the network, by name.
        copy: those of the average.
        stamps: of both, by name, see ``_stamps``.
        sums: over the bits of the average's tensors, by name, where its follower may do anything; else empty.
    """

    network: dict[str, Tensor]
    copy: dict[str, Tensor]
    stamps: tuple[dict[str, Any], ...]
    sums: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Average:
    """A copy of the network in a companion of a kind, before the growth.

    Attributes:
        kind: of the companion.
        copy: the copy.
        rest: what must stay as it is; None: it is judged by its outputs.
        outputs: on the probe; None where it does not run.
        twins: by which it is judged where outputs tell nothing; None: they do.
    """

    kind: str
    copy: nn.Module
    rest: Rest | None
    outputs: Outputs | None
    twins: Twins | None


def averaged(
    context: PlanContext, companions: Sequence[Any], change: Change | None = None, whole: bool = False
) -> list[Average]:
    """What the copies of the network that averages hold are, or give on the probe, before the growth.

    Args:
        context: the network on the probe.
        companions: all of them.
        change: the growth, or the first edit of it, if it is known already.
        whole: whether that is all of it.
    """
    found: list[Average] = []
    preserves = context.has_probe and (change is None or change.preserves)
    alone = whole and preserves and change is not None and _only_adds_what_rests(change, context)
    for companion in companions:
        for copy in networks_of(companion):
            ours = _writes_to_nothing(companion)
            spared = alone and ours and _floats_as(copy) == _floats_as(context.model)
            held = _tensors(copy) if spared else []
            rest = Rest(held, _stamps(held)) if spared else None
            outputs = if_it_runs(copy, context) if preserves and not spared else None
            twins = None if change is None or (preserves and whole) else _twins(context.model, copy, ours)
            found.append(Average(type(companion).__name__, copy, rest, outputs, twins))
    return found


def prove_averages(before: Sequence[Average], change: Change, context: PlanContext) -> Change:
    """Check that averages still compute what they did, where the network itself does; a note where they cannot be run.

    Raises:
        GrowthError: names the average, and how far its outputs have moved, or what of it is not as it has to be.
    """
    idle = []
    for average in before:
        _check_order(average, change, context.model)
        if average.rest is not None:
            runs = _check_alone(average, average.rest, change, context)
        elif average.twins is None or (change.preserves and context.has_probe):
            runs = _check_outputs(average, change, context)
        else:
            runs = _check_twins(average, average.twins, context.model)
        if not runs:
            idle.append(f"{average.kind} does not run on the probe, so its outputs were not compared")
    return change.with_measured(*idle)


def _only_adds_what_rests(change: Change, context: PlanContext) -> bool:
    """Whether a growth does nothing but add blocks of which it can be told one by one that they change nothing."""
    plain = not (change.swaps or change.trains or change.gates) and bool(change.added)
    return plain and all(_rests(new.module, new, context) for _, new in change.added)


def _writes_to_nothing(companion: Any) -> bool:
    """Whether it is known of what follows a companion that it goes by the change alone; a user's may do anything."""
    found = registered(companion)
    return found is not None and found.follower.__module__.startswith("auxin.")


def _rests(block: nn.Module, new: New, context: PlanContext) -> bool | None:
    """Whether a block, in the place of a new one, leaves the function as it is, on what arrives at the network's.

    None: it does not run there.
    """
    at_rest = context.at_rest.get(id(new.module))
    try:
        with untouched(block):
            return at_rest is not None and at_rest(block)
    except Exception:  # whatever a user's forward raises; a cache that has no place for a further block
        return None


def _floats_as(network: nn.Module) -> tuple[Any, ...] | None:
    p = next((p for p in network.parameters() if p.is_floating_point()), None)
    return None if p is None else (p.dtype, p.device)


def _tensors(copy: nn.Module) -> list[Tensor]:
    """Every tensor of a copy, in the order of a walk that blocks in between do not change."""
    settle(copy)  # under FSDP2 a forward may have left full parameters in the place of shards
    modules = modules_in(copy)
    return [t for m in modules for held in (m._parameters, m._buffers) if held for t in held.values() if t is not None]


def _stamps(tensors: Sequence[Tensor]) -> list[Any]:
    """For each tensor, how often it was written to and where its values lie: the same as long as nothing writes to it.

    What FSDP2 has sharded is put together and taken apart again meanwhile.
    """
    try:
        if set(map(type, tensors)) <= {nn.Parameter, Tensor}:
            return [*map(_version, tensors), *map(Tensor.data_ptr, tensors)]
    except RuntimeError:  # made in inference mode; sparse ones
        pass
    return list(map(_stamp, tensors))


def _stamp(tensor: Tensor) -> Any:
    return None if is_spread(tensor) else (version_of(tensor), storage_of(tensor))


def _check_alone(average: Average, rest: Rest, change: Change, context: PlanContext) -> bool:
    """Check that old tensors of an average are what they were, where they have to be, and that new blocks are at rest.

    Returns:
        Whether all of them run there.
    """
    old = set(map(id, rest.tensors))
    now = [t for t in _tensors(average.copy) if id(t) in old]
    if list(map(id, now)) != list(map(id, rest.tensors)) or _stamps(now) != rest.stamps:
        raise _moved(average.kind, "no longer be the same: tensors of it would have other values or places", change)
    blocks = {path: _at(average.copy, path) for path, _ in change.added}
    resting = [_rests(block, new, context) for path, new in change.added if (block := blocks[path]) is not None]
    if False in resting:
        raise _moved(average.kind, "be others", change)
    return None not in resting  # where a block is missing, verify has said so


def _check_outputs(average: Average, change: Change, context: PlanContext) -> bool:
    """Check that the outputs of an average are as they were; whether it runs on the probe."""
    before = average.outputs
    if before is None:
        return False
    try:
        after = outputs_of_copy(average.copy, context)
    except Exception as error:  # whatever a user's forward raises
        raise GrowthError(
            f"{average.kind}: its averaged network runs on the probe, and would not run on it after this growth: "
            f"{reason(error)}. {_anew(average.kind)}"
        ) from error
    difference, limit = distance(before, after), tolerance(before)
    if not difference <= limit and any(move.reshaped for move in change.moves):
        limit = max(limit, by_rounding(average.copy, after, difference, limit, context))
    if not difference <= limit:
        raise _moved(average.kind, f"change by {difference:.3g} (at most {limit:.1g} was expected)", change)
    return True


def _twins(model: nn.Module, copy: nn.Module, ours: bool) -> Twins:
    settle(copy)
    network, own = _named_tensors(model), _named_tensors(copy)
    stamps = tuple({name: _stamp(t) for name, t in held.items()} for held in (network, own))
    return Twins(network, own, stamps, {} if ours else {name: _sum(t) for name, t in own.items()})


def _check_twins(average: Average, twins: Twins, model: nn.Module) -> bool:
    """Check that what stays as it is in the network stays as it is in an average, under the name that it has now."""
    settle(average.copy)
    called = {id(t): name for name, t in _named_tensors(model).items()}
    held = _named_tensors(average.copy)
    kept = {name for name, t in twins.network.items() if id(t) in called and _stamp(t) == twins.stamps[0][name]}
    for name in kept & twins.copy.keys():
        mine, now = twins.copy[name], held.get(called[id(twins.network[name])])
        same = now is mine and _stamp(mine) == twins.stamps[1][name]
        if now is None or not (_sum(now) == twins.sums[name] if twins.sums else same):
            raise GrowthError(
                f"{average.kind}: {name} of its averaged network would have other values or another place, and that of "
                f"the network stays as it is. {_anew(average.kind)}"
            )
    return True


def _named_tensors(network: nn.Module) -> dict[str, Tensor]:
    held = listing(network)
    return {**held.parameters, **held.buffers}


def _sum(tensor: Tensor) -> Any:
    """Equal where a tensor's dtype, shape and bits are."""
    kind = [str(tensor.dtype), list(tensor.shape)]
    plain = tensor.layout is torch.strided and not tensor.is_meta and not is_spread(tensor)
    return [*kind, checksum(tensor)] if plain else kind


def _check_order(average: Average, change: Change, model: nn.Module) -> None:
    """Check that an average holds, and runs, the same blocks in the same order as the network.

    One that it leaves out shows in no output as long as that block changes nothing.
    """
    for path, what, mine, own in _lists(change, model, average.copy):
        if mine != own:
            raise GrowthError(
                f"{average.kind}: {path or 'the network'} of its averaged network would hold {what} {own}, and that of "
                f"the network {mine}. {_anew(average.kind)}"
            )


def _lists(change: Change, model: nn.Module, copy: nn.Module) -> Iterator[tuple[str, str, list[Any], list[Any]]]:
    """What was rewired, and plain lists of it, as names in the network and in a copy."""
    for step in change.steps:
        for rewire in step.rewires:
            ours, theirs = _at(model, rewire.path), _at(copy, rewire.path)
            if ours is not None and theirs is not None:
                yield rewire.path, "the children", list(ours._modules), list(theirs._modules)
        for alias in step.aliases:
            ours, theirs = (_named(tree, alias) for tree in (model, copy))
            if ours is not None and theirs is not None:
                yield join(alias.path, alias.name), "of them", ours, theirs


def _named(tree: nn.Module, alias: Alias) -> list[Any] | None:
    """The items of a plain list by their names in the container that it repeats."""
    holder, container = _at(tree, alias.path), _at(tree, alias.rewire.path)
    if holder is None or container is None:
        return None
    names = {id(child): name for name, child in container._modules.items()}
    return [names.get(id(item)) for item in holder.__dict__[alias.name]]


def _at(tree: nn.Module, path: str) -> nn.Module | None:
    """What stands at a path that is of before the change; None: it has another one now."""
    try:
        return module_at(tree, path)
    except GrowthError:
        return None


def _anew(kind: str) -> str:
    return (
        f"What follows a {kind} has to make the same change on the copy; leave it out of this growth, and build it "
        f"anew afterwards: {kind}(model, ...)."
    )


def _moved(kind: str, how: str, change: Change) -> GrowthError:
    return GrowthError(
        f"{kind}: the outputs of its averaged network on the probe would {how}, though the network's own stay as they "
        f"are: {change.how} fits the live values, and not the averaged ones. Leave it out of this growth, and build it "
        f"anew afterwards: {kind}(model, ...)."
    )
