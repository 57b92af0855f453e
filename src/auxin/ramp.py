"""What a growth does over the next optimizer steps: blocks that fade in, new parameters that warm up, entries that are
younger than their tensor.

A ramp rides on an optimizer by a step hook and ends by itself. Sources: the fade-in of progressive growing (Karras
et al. 2018, arXiv:1710.10196); an own warm-up of new parameters SPARKLING (arXiv:2602.02472).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.tree import unwrap
from auxin.anatomy.wrappers import networks_of
from auxin.axes import Part
from auxin.change import Change
from auxin.dynamo import outside_graphs
from auxin.errors import GrowthError
from auxin.gate import close_gate, gated, open_gate, set_gate
from auxin.newborn import Newborn, grown, is_corrected
from auxin.output_hook import rehooking
from auxin.sharded import here, part_here


class Fade:
    """Blocks whose gate opens over ``total`` optimizer steps and is folded away at the last one.

    Args:
        blocks: gated blocks of the network, and those of its averages that stand for them.
        total: optimizer steps from 0 to 1.
        taken: steps taken already.
    """

    def __init__(self, blocks: Sequence[nn.Module], total: int, taken: int = 0):
        self.blocks, self.total, self.taken = list(blocks), total, taken

    @property
    def done(self) -> bool:
        """Whether the gates are open."""
        return self.taken >= self.total

    def before_step(self, optimizer: Any) -> None:
        """Nothing: the gate moves after the step."""

    def after_step(self, optimizer: Any) -> None:
        """Open the gates further; fold them away at 1."""
        self.taken += 1
        for block in self.blocks:
            set_gate(block, self.taken / self.total)
            if self.taken == self.total:
                close_gate(block)

    def to_json(self, model: nn.Module) -> dict[str, Any]:
        """As data, by paths in ``model``."""
        own = {id(block) for block in self.blocks}
        paths = [path for path, block in gated(model) if id(block) in own]
        return {"kind": "fade", "names": paths, "total": self.total, "taken": self.taken}


class Rewarm:
    """New parameters, and new entries of old ones: their k-th update, decay included, counts k / ``total``.

    Args:
        parameters: those that are new, or new in part.
        total: optimizer steps until they take full steps.
        taken: steps taken already.
        parts: by ``id`` of a parameter, which of its entries are new; all of them where it is not in it.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        total: int,
        taken: int = 0,
        parts: Mapping[int, Part] | None = None,
    ):
        self.parameters, self.total, self.taken = list(parameters), total, taken
        self.parts = dict(parts or {})
        self._before: list[Tensor] = []

    @property
    def done(self) -> bool:
        """Whether the parameters take full steps."""
        return self.taken >= self.total

    def before_step(self, optimizer: Any) -> None:
        """Remember where the parameters stood."""
        self._before = [here(p.detach()).clone() for p in self.parameters]

    def after_step(self, optimizer: Any) -> None:
        """Take only a part of the step."""
        self.taken += 1
        share = self.taken / self.total
        with torch.no_grad():
            for p, before in zip(self.parameters, self._before, strict=True):
                if share < 1:
                    own, part = here(p.detach()), self.parts.get(id(p))
                    shorter = torch.lerp(before, own, share)
                    mask = None if part is None else part.within(part_here(p)).mask.to(own.device)
                    own.copy_(shorter if mask is None else torch.where(mask, shorter, own))
        self._before = []

    def follow(self, change: Change) -> None:
        """Stay with the same entries where parameters are resized or replaced."""
        moves = {id(move.old): move for move in change.moves if move.continues}
        for place, p in enumerate(self.parameters):
            move = moves.get(id(p))
            if move is not None and move.new is not None:
                self.parameters[place] = move.new
                part = self.parts.pop(id(p), None)
                if part is not None:
                    self.parts[id(move.new)] = part.after(move.axes)

    def to_json(self, model: nn.Module) -> dict[str, Any]:
        """As data, by names in ``model``."""
        own = {id(p) for p in self.parameters}
        names = [name for name, p in model.named_parameters() if id(p) in own]
        held = {name: self.parts[id(p)].to_json() for name, p in model.named_parameters() if id(p) in self.parts}
        return {"kind": "rewarm", "names": names, "total": self.total, "taken": self.taken, "parts": held}


class Ramps:
    """All ramps that ride on one optimizer: one hook before its step and one after, for as long as there are any."""

    def __init__(self, optimizer: Any):
        self.ramps: list[Any] = []
        self.stepping: list[Any] = []  # those that have seen the beginning of the step under way
        self.before = _Before(self)
        self.after = _After(self)
        self.handles = [
            optimizer.register_step_pre_hook(self.before),
            optimizer.register_step_post_hook(self.after),
        ]

    def forget(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()


class _Before:
    """The hook before a step; an object, so that a snapshot of the optimizer finds the counts."""

    def __init__(self, ramps: Ramps):
        self.ramps = ramps

    @outside_graphs
    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.ramps.stepping = list(self.ramps.ramps)
        for ramp in self.ramps.stepping:
            ramp.before_step(optimizer)


class _After:
    """The hook after a step."""

    def __init__(self, ramps: Ramps):
        self.ramps = ramps

    @outside_graphs
    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        running, stepping = self.ramps.ramps, self.ramps.stepping
        self.ramps.stepping = []
        # A warm-up takes its part of what a step is: after entries that are young got their own.
        for ramp in sorted(running, key=_is_warm_up) if not _skipped(optimizer) else ():
            if any(ramp is one for one in stepping):  # not one that a hook of this very step has begun
                ramp.after_step(optimizer)
        running[:] = [ramp for ramp in running if not ramp.done]
        hooks = optimizer._optimizer_step_post_hooks
        if not running and next(reversed(hooks.values())) is self:
            # A dict must not shrink while it is walked, but behind its last entry nobody is looking any more.
            self.ramps.forget()


def _is_warm_up(ramp: Any) -> bool:
    return isinstance(ramp, Rewarm)


def _skipped(optimizer: Any) -> bool:
    """Whether this was no step: GradScaler tells a fused optimizer of infinite gradients, and calls it all the same."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def ramps_on(optimizer: Any) -> Ramps | None:
    """What rides on an optimizer, if anything does."""
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", {})
    return next((hook.ramps for hook in hooks.values() if isinstance(hook, _After)), None)


def opening(optimizers: Iterable[Any]) -> set[int]:
    """Ids of the blocks whose gates the steps of these optimizers open."""
    riding = [ramps for optimizer in optimizers if (ramps := ramps_on(optimizer)) is not None]
    return {id(block) for ramps in riding for ramp in ramps.ramps for block in getattr(ramp, "blocks", ())}


def start(change: Change, roots: Sequence[Any], undos: list[Callable[[], None]]) -> None:
    """Begin the ramps of a change that has just been applied.

    Args:
        change: with ``gates`` and ``fade``, or a placement with ``rewarm``.
        roots: the network, and everything that keeps step with it.
        undos: is given what takes it back.

    Raises:
        GrowthError: no optimizer whose steps would carry it.
    """
    if change.gates:
        homes = [join.optimizer for join in change.joins.values()] or list(change.optimizers)
        if not homes:
            raise GrowthError(
                f"{change.gates[0]}: the block cannot be added without changing the function at once, so it fades in "
                "over optimizer steps, and no optimizer was given. Pass it: auxin.grow(model, edit, optimizer, "
                "probe=batch); or accept the change: init='default', output='keep', or where a layer wakes fade=0."
            )
        _check_end(change, roots)
        _ride(homes[0], Fade(list(_at(roots, change.gates)), change.fade), undos)
    for optimizer in change.optimizers:
        _follow(optimizer, change, undos)
        new, parts = _beginning(change, optimizer) if change.placement.rewarm else ([], {})
        if new:
            _ride(optimizer, Rewarm(new, change.placement.rewarm, parts=parts), undos)
        if is_corrected(optimizer):
            _correct(optimizer, change, undos)


def _correct(optimizer: Any, change: Change, undos: list[Callable[[], None]]) -> None:
    """Let entries that are younger than their tensor have their own bias correction."""
    riding = ramps_on(optimizer)
    known = next((r for r in (riding.ramps if riding is not None else ()) if isinstance(r, Newborn)), None)
    held = grown({} if known is None else known.held, change, optimizer)
    if known is not None:
        undos.append(known.take(held))
    elif held:
        _ride(optimizer, Newborn(held), undos)


def _follow(optimizer: Any, change: Change, undos: list[Callable[[], None]]) -> None:
    riding = ramps_on(optimizer)
    for ramp in riding.ramps if riding is not None else ():
        if isinstance(ramp, Rewarm):
            undos.append(functools.partial(_reset, ramp, list(ramp.parameters), dict(ramp.parts)))
            ramp.follow(change)


def _reset(ramp: Rewarm, parameters: list[nn.Parameter], parts: dict[int, Part]) -> None:
    ramp.parameters[:] = parameters
    ramp.parts.clear()
    ramp.parts.update(parts)


def _check_end(change: Change, roots: Sequence[Any]) -> None:
    """Refuse a fade-in that a schedule shows to be longer than the run.

    Raises:
        GrowthError: names the schedule and the steps that are left.
    """
    for scheduler in roots:
        total = getattr(scheduler, "total_steps", None) or getattr(scheduler, "total", None)
        done = getattr(scheduler, "last_epoch", None)
        if type(total) is int and type(done) is int and not change.fade <= total - done:
            raise GrowthError(
                f"{change.gates[0]}: fade={change.fade} is longer than the run: {type(scheduler).__name__} ends in "
                f"{total - done} steps, and the block would never be whole. Grow earlier, or pass a smaller fade=."
            )


def saved(model: nn.Module, optimizers: Sequence[Any]) -> list[dict[str, Any]]:
    """All ramps under way of what the network still holds, as data; ``optimizer`` is an index."""
    found = []
    for number, optimizer in enumerate(optimizers):
        riding = ramps_on(optimizer)
        found += [{"optimizer": number, **r.to_json(model)} for r in (riding.ramps if riding is not None else ())]
    return [one for one in found if one["names"]]


def resumed(data: Any, model: nn.Module, optimizers: Sequence[Any], roots: Sequence[Any]) -> None:
    """Go on with ramps that ``saved`` has written; where it raises, nothing was changed.

    Args:
        data: of ``saved``.
        model: the network, replayed.
        optimizers: in the same order; none: only the gates are put back, for inference.
        roots: the network and its companions.

    Raises:
        GrowthError: the data is not what ``saved`` writes, or does not fit.
    """
    ramps = list(_read(data, model, optimizers, roots))  # all of it, before the first write
    for optimizer in optimizers:
        riding = ramps_on(optimizer)
        if riding is not None:
            riding.forget()
    for network in _networks(roots):
        for _, block in list(gated(network)):
            close_gate(block)
    fading = [(block, ramp) for _, ramp in ramps if isinstance(ramp, Fade) for block in ramp.blocks]
    with rehooking(block for block, _ in fading):
        for block, ramp in fading:
            open_gate(block, ramp.taken / ramp.total)
    for home, ramp in ramps:
        if home is not None:
            _ride(home, ramp, [])


def _read(
    data: Any, model: nn.Module, optimizers: Sequence[Any], roots: Sequence[Any]
) -> Iterator[tuple[Any, Fade | Rewarm | Newborn]]:
    """The ramps that ``saved`` has written, each with its optimizer; writes to nothing.

    Raises:
        GrowthError: see ``resumed``.
    """
    parameters = dict(model.named_parameters())
    known: dict[str, Any] = {"fade": dict(model.named_modules()), "rewarm": parameters, "newborn": parameters}
    try:
        for one in data:
            names, kind = list(one["names"]), one["kind"]
            total, taken = (1, 0) if kind == "newborn" else (one["total"], one["taken"])
            if not (type(total) is type(taken) is int and 0 <= taken < total):
                raise ValueError(f"{taken!r} of {total!r} steps")
            if len(set(names)) != len(names) or not all(name and name in known[kind] for name in names):
                raise ValueError(f"{kind} of {names}")
            number = one["optimizer"]
            if optimizers and not (type(number) is int and 0 <= number < len(optimizers)):
                raise ValueError(f"optimizer {number!r} of {len(optimizers)}")
            home = optimizers[number] if optimizers else None
            if kind == "newborn":
                yield home, Newborn.from_json(one, parameters)
            elif kind == "fade":
                yield home, Fade(list(_at(roots, names)), total, taken)
            else:
                held = dict(one.get("parts", {}))
                parts = {id(p): Part.from_json(n, held[n], p.shape) for n, p in parameters.items() if n in held}
                yield home, Rewarm([parameters[name] for name in names], total, taken, parts)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise GrowthError(
            f"the ramps of the checkpoint do not fit this run ({type(error).__name__}: {error})."
        ) from error


def _ride(optimizer: Any, ramp: Any, undos: list[Callable[[], None]]) -> None:
    if not hasattr(optimizer, "register_step_post_hook"):
        raise GrowthError(
            f"{type(optimizer).__name__} has no register_step_pre_hook and register_step_post_hook, as the optimizers "
            "of torch have, so no fade-in and no warm-up can follow its steps. Pass the optimizer of torch that it "
            "wraps, or fade=0 and rewarm=0."
        )
    riding = ramps_on(optimizer)
    ramps = Ramps(optimizer) if riding is None else riding
    ramps.ramps.append(ramp)

    def undo() -> None:
        ramps.ramps[:] = [one for one in ramps.ramps if one is not ramp]  # it may have ended
        if riding is None:
            ramps.forget()

    undos.append(undo)


def _beginning(change: Change, optimizer: Any) -> tuple[list[nn.Parameter], dict[int, Part]]:
    """The parameters of an optimizer that begin to train, also those that it has held in their sleep; parts of them."""
    names, parts = set(change.starting), {part.name: part for part in change.parts}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    moves = [(m.name, m.new) for m in change.moves if m.new is not None and id(m.new) in held]
    new = [p for name, p in moves if name in names or name in parts]
    return new, {id(p): parts[name] for name, p in moves if name in parts and name not in names}


def _at(roots: Iterable[Any], paths: Sequence[str]) -> Iterator[nn.Module]:
    """The modules at ``paths`` in a network, and in the copies of it that averages hold."""
    for network in _networks(roots):
        known = dict(network.named_modules())
        if all(path in known for path in paths):
            yield from (known[path] for path in paths)


def _networks(roots: Iterable[Any]) -> Iterator[nn.Module]:
    """The network, and the copies of it that averages hold, each once: a wrapper stands for the network itself."""
    found: dict[int, nn.Module] = {}
    for root in roots:
        held = networks_of(root) or ([unwrap(root)] if isinstance(root, nn.Module) else [])
        found |= {id(network): network for network in held}
    yield from found.values()
