"""``Widen(init=init)``: a start of the user's own for the new entries of a width."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auxin import init as inits
from auxin.anatomy.probe import PlanContext
from auxin.anatomy.tree import join, module_at
from auxin.anatomy.widths.groups import Width, closure
from auxin.anatomy.widths.starts import Begun
from auxin.anatomy.widths.terms import Term, atoms, find
from auxin.anatomy.widths.tried import standing
from auxin.axes import born
from auxin.change import Assign, Swap
from auxin.errors import GrowthError
from auxin.randomness import random_state


def own_start(
    model: nn.Module,
    width: Width,
    outputs: Sequence[Term],
    begun: Begun,
    assigns: Sequence[Assign],
    init: Callable[..., Any],
    context: PlanContext,
    where: str,
) -> Begun:
    """Let ``init(module, site)`` write the new entries.

    It is given a copy of the smallest module that holds all that grows, already wider, whose new entries stand as
    ``init="zero"`` would leave them; once for each place, where a pattern names several.

    Args:
        model: the network; nothing is written to it.
        width: what grows.
        outputs: the axis of each module that the edit names.
        begun: the start with zeros.
        assigns: attributes that change.
        init: of the user.
        context: what ``site`` shows.
        where: for messages.

    Raises:
        GrowthError: it wrote into old entries, changed a shape or returned something else than what it promises.
    """
    homes = {path: module_at(model, path) for path in _homes(width, outputs)}
    calls, _ = context.calls(homes)
    written: dict[int, Tensor] = {}
    promised = True
    for path, home in homes.items():
        with standing(model, begun.swaps, assigns):
            twin = copy.deepcopy(home)
        for name, parameter in home.named_parameters():
            twin.get_parameter(name).requires_grad_(parameter.requires_grad)
        site = inits.InitSite(path, calls.get(path), context, (home, False))
        with random_state(seed=context.seed):
            promised &= inits.run(init, twin, site)
        for number, swap in enumerate(begun.swaps):
            name = join(swap.path, swap.name)
            if name.startswith(f"{path}." if path else ""):
                written[number] = _taken(twin, name[len(path) + 1 if path else 0 :], name, swap, where)
    swaps = [
        dataclasses.replace(swap, value=written[number]) if number in written else swap
        for number, swap in enumerate(begun.swaps)
    ]
    name = getattr(init, "__name__", "own init")
    return dataclasses.replace(begun, swaps=swaps, how=name, preserves=promised and not width.reaches_output)


def _homes(width: Width, outputs: Sequence[Term]) -> list[str]:
    """The smallest modules that each hold all that grows with one of the named axes, none inside another."""
    found: dict[str, None] = {}
    for term in outputs:
        growing = [width.growth[id(find(atom))] for atom in atoms(term) if id(find(atom)) in width.growth]
        members = closure(width.trace, growing).members
        paths = [member.name.rpartition(".")[0].split(".") for member in members]
        found[".".join(os.path.commonprefix(paths))] = None
    return [path for path in found if not any(_holds(other, path) for other in found if other != path)]


def _holds(outer: str, inner: str) -> bool:
    return outer == "" or inner.startswith(f"{outer}.")


def _taken(twin: nn.Module, inside: str, name: str, swap: Swap, where: str) -> Tensor:
    """The value that the user's start has left of one tensor.

    Raises:
        GrowthError: it is not one of the wider network with the old entries in it.
    """
    named: Mapping[str, Tensor] = {**dict(twin.named_parameters(remove_duplicate=False)), **dict(twin.named_buffers())}
    value, before = named.get(inside), swap.value
    assert before is not None
    if value is None or value.shape != before.shape or not value.is_floating_point() == before.is_floating_point():
        raise GrowthError(
            f"{where}: init left {name} as {'nothing' if value is None else tuple(value.shape)}; it has to keep the "
            f"shape {tuple(before.shape)}. Write into the tensors, as in `module.weight[-16:] = ...` under no_grad()."
        )
    value = value.detach().to(before.device, before.dtype)
    old = ~born(swap.axes or ()).to(before.device)
    if not torch.equal(value[old], before[old]):
        raise GrowthError(
            f"{where}: init wrote into old entries of {name}, whose averages and optimizer states would not know of "
            "it. Write into the new ones only; they stand at the end, or where print(auxin.sites(model, probe).widths) "
            "and the change say. To change old weights too, use `with auxin.surgery(model, optimizer):`."
        )
    return torch.where(old, before, value)
