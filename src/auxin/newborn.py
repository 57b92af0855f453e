"""The bias correction that entries younger than their tensor lack.

Adam counts steps for each tensor. Entries that are born when the count stands at t0 start with moments of zero, and are
corrected for moments that have seen t0 steps: on a constant gradient they would move up to 6.57 times too far. Around
each step the update of entries that are k steps old is therefore scaled by ``factor(k, t)``, decoupled decay excluded;
then they move as under a fresh optimizer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auxin.axes import At, Axis, block, put, side_by_side
from auxin.change import Change, Move
from auxin.sharded import here, part_here

ENOUGH = 1e-3  # factors nearer to 1 than this are dropped
SELDOM = 16  # steps from one look for what has grown up to the next: it may have to wait for a device
Since = tuple[Tensor, ...]  # for each axis int64 of its size: the count at which its entries were born, 0: with it
Held = dict[int, tuple[nn.Parameter, Since]]
_KINDS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SparseAdam, torch.optim.Adamax)
_STEPS = {inspect.unwrap(kind.step) for kind in _KINDS}


def is_corrected(optimizer: Any) -> bool:
    """Whether the bias correction of an optimizer is known, so that ``Newborn`` can ride on it: Adam and its kin.

    NAdam and RAdam do more with the count than to scale a step.
    """
    return isinstance(optimizer, _KINDS) and inspect.unwrap(type(optimizer).step) in _STEPS


def restarts(axis: Axis) -> Tensor:
    """Bool of shape (new size,): whose state starts anew: what is born, and copies that are to forget theirs."""
    return axis.born if axis.gradient is None else axis.born | (axis.gradient == 0)


def factor(k: Any, t: Any, betas: Sequence[Any], second: bool = True) -> Any:
    """By what an update at count ``t`` is to be scaled for entries that take their ``k``-th step.

    Args:
        k: from 1 on; a number, or a tensor.
        t: of the tensor.
        betas: of the optimizer.
        second: whether the optimizer corrects the second moment as well (Adamax does not).
    """
    scale = _mass(betas[0], t) / _mass(betas[0], k)
    return scale * (_mass(betas[1], k) / _mass(betas[1], t)) ** 0.5 if second else scale


def _mass(beta: Any, steps: Any) -> Any:
    """The sum of the weights of a running mean after so many steps: 1 - beta^steps."""
    if isinstance(steps, Tensor):
        return -torch.expm1(steps * torch.as_tensor(beta, dtype=steps.dtype).log())
    return 1.0 if float(beta) == 0 else -math.expm1(steps * math.log(beta))


@dataclass(frozen=True, eq=False)
class _Slab:
    """A block of entries that are young.

    Attributes:
        at: for each axis where it lies.
        ages: the counts at which its entries were born, each once.
        births: the same as a tensor beside the optimizer's counts.
        level: which of ``births`` each entry has; None: there is one only.
    """

    at: tuple[At, ...]
    ages: list[int]
    births: Tensor
    level: Tensor | None

    @property
    def is_view(self) -> bool:
        """Whether the entries lie side by side along each axis."""
        return all(isinstance(at, slice) for at in self.at)

    def of(self, tensor: Tensor) -> Tensor:
        """The entries; a view where they lie side by side."""
        return block(tensor, self.at)


def _slabs(parameter: Tensor, since: Since, device: torch.device) -> list[_Slab]:
    """The young entries of a parameter as blocks that do not overlap; an entry is as young as its youngest axis."""
    found = []
    for axis in range(len(since)):
        held = [(s == 0 if a < axis else s > 0 if a == axis else s >= 0) for a, s in enumerate(since)]
        at = [mask.nonzero().flatten() for mask in held]
        if not all(map(len, at)):
            continue
        births = torch.zeros((), dtype=torch.int64)
        for a, (s, places) in enumerate(zip(since, at, strict=True)):
            births = torch.maximum(births, s[places].view([-1 if b == a else 1 for b in range(len(since))]))
        known, level = births.unique(return_inverse=True)
        number = torch.float32 if device.type == "mps" else torch.float64
        found.append(
            _Slab(
                tuple(side_by_side(places, parameter.device) for places in at),
                known.tolist(),
                known.to(device, number),
                None if len(known) == 1 else level.to(parameter.device),
            )
        )
    return found


@dataclass(eq=False)
class _Begun:
    """A block of young entries in a step that is under way.

    Attributes:
        p: its parameter.
        group: of the optimizer.
        count: of the parameter, before the step.
        block: where the entries lie.
        here: the entries; those of the parameter itself where that is possible.
        start: where they would stand if the step were decay alone.
    """

    p: nn.Parameter
    group: Mapping[str, Any]
    count: Any
    block: _Slab
    here: Tensor
    start: Tensor

    def write(self, rest: Any) -> None:
        """Go back by a part of the way."""
        if self.is_live:
            self.here.lerp_(self.start, rest)
        else:
            own = here(self.p.detach())
            put(own, self.block.at, torch.lerp(_wide(self.block.of(own)), self.start, rest))

    @property
    def is_live(self) -> bool:
        """Whether writing to ``here`` writes to the parameter."""
        return self.block.is_view and self.p.dtype == self.here.dtype


class Newborn:
    """Rides on an optimizer as long as entries of its tensors are much younger than their tensors.

    Args:
        held: by ``id`` of each parameter the parameter and when its entries were born.
    """

    def __init__(self, held: Held):
        self.held = held
        self.calls = 0
        self._blocks: dict[int, list[_Slab]] = {}
        self._begun: list[_Begun] = []

    @property
    def done(self) -> bool:
        """Whether all entries have grown up."""
        return not self.held

    def take(self, held: Held) -> Callable[[], None]:
        """Go on with other entries; returns what goes back to those of before."""
        before = self.held, self._blocks
        self.held, self._blocks = held, {}

        def undo() -> None:
            self.held, self._blocks = before

        return undo

    def before_step(self, optimizer: Any) -> None:
        """Remember where young entries would stand if the step were decay alone, and the counts."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._begun = []
        for p, since in self.held.values():
            count, group = _count(optimizer, p), groups.get(id(p))
            if count is not None and group is not None:  # a step with a closure makes the gradients only now
                if id(p) not in self._blocks:
                    on = count.device if isinstance(count, Tensor) else torch.device("cpu")
                    own = tuple(s[part] for s, part in zip(since, part_here(p), strict=True))
                    self._blocks[id(p)] = _slabs(here(p), own, on)
                for block in self._blocks[id(p)]:
                    young = _wide(block.of(here(p.detach())))
                    self._begun.append(_Begun(p, group, count, block, young, young))
        for stays, alike in _alike((_after_decay(one.group), one) for one in self._begun):
            heres = [one.here for one in alike]
            starts = [here * stays for here in heres] if isinstance(stays, Tensor) else torch._foreach_mul(heres, stays)  # pyright: ignore[reportPrivateImportUsage]
            for one, start in zip(alike, starts, strict=True):
                one.start = start

    def after_step(self, optimizer: Any) -> None:
        """Scale what the step has done to them."""
        second = not isinstance(optimizer, torch.optim.Adamax)
        with torch.no_grad():
            for rest, alike in _alike((_rest(optimizer, one, second), one) for one in self._begun):
                live = [one for one in alike if one.is_live and type(rest) is float]
                if live:
                    torch._foreach_lerp_([one.here for one in live], [one.start for one in live], rest)  # pyright: ignore[reportPrivateImportUsage]
                for one in alike:
                    if rest is not None and not (one.is_live and type(rest) is float):
                        one.write(rest)
        self._begun = []
        self.calls += 1
        if self.calls % SELDOM == 1 and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self._grow_up(optimizer)

    def _grow_up(self, optimizer: Any) -> None:
        """Let go of entries that need no correction any more."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for p, since in list(self.held.values()):
            count, group = _count(optimizer, p), groups.get(id(p))
            if count is None or group is None:
                left: Since = ()  # it has left the optimizer
            else:
                at = float(count)
                if any(bool((s > at).any()) for s in since):
                    left = ()  # its state was put back to before their birth
                else:
                    left = tuple(torch.where(_young(s, at, group["betas"]), s, 0) for s in since)
            if not any(bool(s.any()) for s in left):
                del self.held[id(p)]
                self._blocks.pop(id(p), None)
            elif not all(map(torch.equal, left, since)):
                self.held[id(p)] = p, left
                self._blocks.pop(id(p), None)

    def to_json(self, model: nn.Module) -> dict[str, Any]:
        """As data, by names in ``model``."""
        held = {name: self.held[id(p)][1] for name, p in model.named_parameters() if id(p) in self.held}
        since = {name: [_runs(one) for one in own] for name, own in held.items()}
        return {"kind": "newborn", "names": list(held), "since": since}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> Newborn:
        """Read it back; a ValueError, KeyError or TypeError says that it is another network's."""
        held: Held = {}
        for name in data["names"]:
            since = tuple(_from_runs(runs) for runs in data["since"][name])
            if tuple(map(len, since)) != tuple(parameters[name].shape):
                raise ValueError(f"{name} is {tuple(parameters[name].shape)}, not {tuple(map(len, since))}")
            held[id(parameters[name])] = parameters[name], since
        return cls(held)


def _count(optimizer: Any, p: nn.Parameter) -> Any:
    """The count of a tensor: a number, or a copy of one that lies on a device; None: it has not stepped."""
    count = (optimizer.state.get(p) or {}).get("step")
    on_device = isinstance(count, Tensor) and count.device.type != "cpu"
    return count if count is None else count.detach().clone() if on_device else float(count)


def _alike(pairs: Iterable[tuple[Any, _Begun]]) -> list[tuple[Any, list[_Begun]]]:
    """Those of one number together; a tensor by itself."""
    found: dict[Any, tuple[Any, list[_Begun]]] = {}
    for number, one in pairs:
        key = (id(number),) if isinstance(number, Tensor) else number
        found.setdefault(key, (number, []))[1].append(one)
    return list(found.values())


def _after_decay(group: Mapping[str, Any]) -> Any:
    """By what a step multiplies parameters before it updates them."""
    return 1 - group["lr"] * group["weight_decay"] if group.get("decoupled_weight_decay") else 1.0


def _wide(tensor: Tensor) -> Tensor:
    """The same in float32 where it has half of that."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _rest(optimizer: Any, one: _Begun, second: bool) -> Any:
    """The part of its way that a block is to go back: a number or a tensor; None: there was no step."""
    now = _count(optimizer, one.p)
    share = None if now is None else _shares(one.block, (one.count, now), one.group["betas"], second)
    if share is None:
        return None
    return (1 - share).to(one.start.device, one.start.dtype) if isinstance(share, Tensor) else 1 - share


def _shares(block: _Slab, counts: tuple[Any, Any], betas: Sequence[Any], second: bool) -> Any:
    """The factor of a block, or of each of its entries; None: there was no step."""
    before, now = counts
    if not isinstance(now, Tensor):
        if now <= before:
            return None
        each = [factor(now - age, now, betas, second) if age < now else 1.0 for age in block.ages]
        return (
            each[0]
            if block.level is None
            else torch.tensor(each, dtype=torch.float64).to(block.level.device)[block.level]
        )
    before, now = (count.to(block.births.dtype) for count in counts)
    k = now - block.births
    each = torch.where((now > before) & (k > 0), factor(k.clamp(min=1), now, betas, second), 1.0)
    return each[0] if block.level is None else each[block.level]


def _young(since: Tensor, count: float, betas: Sequence[Any]) -> Tensor:
    """Bool: whether a factor may still differ from 1 by ``ENOUGH``, now or later."""
    b1, b2 = (float(beta) for beta in betas)
    k, t0 = (count - since).double(), since.double()
    late = b1**k * (1 - b1**t0) + b2**k * (1 - b2**t0) / (1 + (1 - b2**k).clamp(min=0).sqrt())
    return (since > 0) & (late >= ENOUGH)


def grown(held: Held, change: Change, optimizer: Any) -> Held:
    """What is young after a change that the optimizer's state has followed already."""
    result = dict(held)
    for move in change.moves:
        if move.old is not None and move.old is not move.new:
            result.pop(id(move.old), None)
    for move in change.moves:
        origin = move.source if move.old is None else move.old
        if move.new is None or origin is None:
            continue
        count = _count(optimizer, move.new)
        since = None if count is None else _since(held.get(id(origin)), move, int(float(count)))
        result.pop(id(move.new), None)
        if since is not None and any(bool(one.any()) for one in since):
            result[id(move.new)] = move.new, since
    return result


def _since(known: tuple[nn.Parameter, Since] | None, move: Move, count: int) -> Since | None:
    if move.axes is None or count <= 0:
        return None if known is None or move.reshaped else known[1]
    found = []
    for number, axis in enumerate(move.axes):
        before = torch.zeros(axis.size, dtype=torch.int64) if known is None else known[1][number]
        new = restarts(axis)
        places = axis.index.clamp(min=0)
        kept = before[places] if axis.size else torch.zeros(len(axis.index), dtype=torch.int64)
        found.append(torch.where(new, count, kept))
    return tuple(found)


def _runs(since: Tensor) -> list[list[int]]:
    """[count, how many entries] of entries side by side."""
    counts, lengths = since.unique_consecutive(return_counts=True)
    return [list(pair) for pair in zip(counts.tolist(), lengths.tolist(), strict=True)]


def _from_runs(runs: Sequence[Sequence[int]]) -> Tensor:
    found: list[Tensor] = []
    for count, length in runs:
        if type(count) is not int or type(length) is not int or count < 0 or length < 0:
            raise ValueError(f"{count!r} for {length!r} entries")
        found.append(torch.full((length,), count, dtype=torch.int64))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
