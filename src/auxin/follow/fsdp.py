"""FSDP2: new blocks are sharded as those beside them, and the root takes them in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from auxin import fsdp2, regrouped, sharded
from auxin.anatomy.widths.starts import STARTS
from auxin.change import Change, New, Rewire
from auxin.errors import GrowthError
from auxin.follow import follow
from auxin.listing import join, module_at, named_parameters
from auxin.structure import Undo, beside, reversible, undo

PASSES = ("Repeat", "Untie")  # of blocks that run again with the same weights
EDITS = ("After", "Duplicate", "Insert", "Remove", "Replace", *PASSES, "Widen")


def check_edit(model: nn.Module, edit: Any) -> None:
    """Refuse, before it is planned, an edit of ours that cannot be carried out on a network under FSDP2.

    Raises:
        GrowthError: says why, and the way round.
    """
    kind = type(edit).__name__
    if not fsdp2.units(model) or not type(edit).__module__.startswith("auxin."):
        return
    if kind == "Widen":
        if edit.unit == "experts":
            why = "unit='experts' is not done there"
        elif edit.init in STARTS:
            _check_torch(model, edit)
            return
        else:
            told = repr(edit.init) if isinstance(edit.init, str) else getattr(edit.init, "__name__", "of your own")
            why = f"init={told} works with all of the network; one of {', '.join(STARTS)} does not"
    elif kind == "Replace" and edit.init == "copies":
        why = "init='copies' is not done there"
    elif kind in PASSES:
        lacking = fsdp2.missing_to_repeat(model) if fsdp2.units(module_at(model, edit.at)) else ""
        if not lacking:
            return
        why = f"for that auxin needs the private {lacking} of FSDP2, and torch {torch.__version__} does not have it"
    elif kind in (*EDITS, "Surgery"):
        return
    else:
        why = "it is not known how"
    raise GrowthError(
        f"{kind}({getattr(edit, 'at', '')!r}): not under FSDP2 (fully_shard): {why}. There {', '.join(EDITS)} work. "
        f"{sharded.AT_A_CHECKPOINT}"
    )


def _check_torch(model: nn.Module, edit: Any) -> None:
    lacking = fsdp2.missing_to_resize(model)
    if lacking:
        raise GrowthError(
            f"{type(edit).__name__}({getattr(edit, 'at', '')!r}) resizes tensors, for which auxin needs the private "
            f"{lacking} of FSDP2, and torch {torch.__version__} does not have it. {sharded.AT_A_CHECKPOINT}"
        )


def shard(model: nn.Module, change: Change) -> Change:
    """The same change with its new blocks sharded as their neighbours are. Every rank holds the same new values.

    Raises:
        GrowthError: the change touches something else than blocks of a container, each of them a unit.
    """
    if not fsdp2.units(model):
        return change
    if any(not swap.resized and not swap.buffer for swap in change.swaps):
        raise GrowthError(
            f"{change.edit!r} replaces single tensors, which is not done under FSDP2 (fully_shard). "
            f"{sharded.AT_A_CHECKPOINT}"
        )
    if change.swaps:
        _check_torch(model, change.edit)
    found: dict[int, nn.Parameter] = {}
    joined: dict[int, Any] = {}
    remarks: list[str] = []
    for rewire in change.rewires:
        _check_removed(model, rewire)
        _check_alike(model, rewire)
        for name, new in rewire.children:
            if isinstance(new, New):
                before = named_parameters(new.module)
                joined |= _sharded(model, rewire, name, new, remarks)
                after = named_parameters(new.module)
                found |= {id(p): after[n] for n, p in before.items()}
    moves = tuple(dataclasses.replace(m, new=found.get(id(m.new), m.new)) for m in change.moves)
    after = {name: found.get(id(p), p) for name, p in change.after.items()}
    notes = (*change.remarks, *remarks)
    return dataclasses.replace(change, moves=moves, after=after, remarks=notes, joined=joined)


def _sharded(model: nn.Module, rewire: Rewire, name: str, new: New, remarks: list[str]) -> dict[int, Any]:
    """Shard a new module; what FSDP2 knows of its new parameters where it becomes a part of a unit."""
    path, neighbour = join(rewire.path, name), new.source or beside(module_at(model, rewire.path), rewire, name)
    if new.tied:
        sharded.pass_again(new.module, module_at(model, neighbour))
        return {}
    unit, lacking = fsdp2.is_unit(module_at(model, neighbour)), fsdp2.missing_to_regroup(model)
    again = unit and len(fsdp2.modules_of(module_at(model, neighbour))) > 1  # what leaves runs elsewhere too
    leaves = neighbour == path and not again
    own = regrouped.gathered_in(model, neighbour) if not lacking and (leaves or not unit) else set()
    tied = [n for n, p in new.module.named_parameters() if sharded.is_spread(p) and id(p) not in own]
    if tied:
        way = f"Give it weights of its own first: Untie({rewire.path!r})." if again else sharded.AT_A_CHECKPOINT
        raise GrowthError(f"{path}: its {tied[0]} is shared with the network, whose FSDP2 unit holds it already. {way}")
    if not unit and not lacking:
        return regrouped.shard_into(new.module, neighbour, model)
    if not unit:
        remarks.append(f"{path} is an FSDP2 unit of its own, those beside it belong to the unit around them")
    elif not fsdp2.can_set_up(model):
        remarks.append(
            f"{path} is an FSDP2 root of its own, since this torch has no {' or '.join(fsdp2.OF_ROOT)}: right, but "
            "not prefetched, and not resharded after forward"
        )
    sharded.shard_like(new.module, neighbour, model)
    return {}


def _check_removed(model: nn.Module, rewire: Rewire) -> None:
    """Without private parts of torch a module that leaves must be a unit: the one around would go on gathering it."""
    if not fsdp2.missing_to_regroup(model):
        return
    kept = {child for _, child in rewire.children if isinstance(child, str)}
    for name, child in module_at(model, rewire.path)._modules.items():
        if (
            name not in kept
            and child is not None
            and not fsdp2.is_unit(child)
            and any(True for _ in child.parameters())
        ):
            raise GrowthError(
                f"{join(rewire.path, name)} is no FSDP2 unit of its own, so the unit around it would go on gathering "
                f"its parameters. {sharded.AT_A_CHECKPOINT}"
            )


def _check_alike(model: nn.Module, rewire: Rewire) -> None:
    """Blocks of one container must have one policy of precision and of offloading, which the new ones get."""
    known: dict[str, Any] = {}
    for name, child in module_at(model, rewire.path)._modules.items():
        if fsdp2.is_unit(child):
            _, policies = fsdp2.policies_of(child, model)
            known[name] = policies["mp_policy"], policies["offload_policy"]
    first = next(iter(known), "")
    for name, policies in known.items():
        if policies != known[first]:
            raise GrowthError(
                f"{join(rewire.path, name)} is sharded by another policy than {join(rewire.path, first)} ({policies} "
                f"and {known[first]}), so it is not known which a new block is to have. {sharded.AT_A_CHECKPOINT}"
            )


@follow(f"{fsdp2.FSDP}:FSDPModule")
def follow_root(root: Any, change: Change) -> Iterator[None]:
    """Let the root of a sharded network take in what is new, and let go of what leaves."""
    before, known = fsdp2.states(root), regrouped.known_of(root) | dict(change.joined)
    backs: list[Undo] = []
    yield

    def write() -> None:
        backs.append(regrouped.regroup(root, known))
        fsdp2.set_up_again(root)

    def back() -> None:
        states = fsdp2.states(root)
        undo(backs)
        fsdp2.forget_root(root, [*before, *states])

    yield from reversible(write, back)
