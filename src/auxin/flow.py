"""Gradient flow: whether what was just added learns as the network around it does.

A new block may be called, and yet its weights hardly learn: newborn units tend to be active forwards and starved
backwards (arXiv:2605.15435). So the gradients of each new block are compared with those of an old one: once on the
probe, and at each of the first optimizer steps after its birth, in the very gradients that those steps use.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.axes import Part
from auxin.change import Change, Move
from auxin.dynamo import outside_graphs
from auxin.sharded import is_spread, part_here, whole, zeroed

STEPS = 20  # optimizer steps after a growth
SETTLED = 10  # of these the first ones, in which what stands before a zeroed writer has hardly begun
STARVED = 1e-3  # a block below this fraction of its counterpart's gradient from then on hardly learns
OLD = " (counterpart)"

Size = tuple[float, int]  # sum of the squares, number of scalars


@dataclasses.dataclass(frozen=True)
class Flow:
    """The gradients of one growth's new blocks at one optimizer step.

    Attributes:
        growth: number of the growth in the journal.
        step: the optimizer step that used these gradients, counted from the start of the run.
        ratios: root mean square of a new block's gradient / of its counterpart's, by path of the block (as it was
            called right after its growth); None where the counterpart has no gradient, or a gradient is not finite.
        dead: at the last step that is watched, what has not learned: parameters whose gradient was exactly zero at
            every step, and blocks whose ratio has stayed below 0.001 since the tenth; empty before.
    """

    growth: int
    step: int
    ratios: Mapping[str, float | None]
    dead: tuple[str, ...] = ()


class FlowWatch:
    """Reads the gradients of new blocks, and of what they are compared with, in the optimizer steps after a growth.

    The gradients are those that the steps use: read in front of ``optimizer.step()``, since some optimizers write into
    them, and behind it where the step was given a closure that computes them. No backward is added and nothing is
    written. The hook on each optimizer is one for the life of the watch, like that of ``StepWatch``: hooks that come
    and go would be put back by whatever restores an optimizer. It returns at once where nothing is watched. Parameters
    are held by weak reference.

    Args:
        optimizers: that step the network.
        on_reading: is given each reading.

    Attributes:
        readings: since the last growth, one for each of ``STEPS`` optimizer steps; also those of a growth before that
            is still watched.
    """

    def __init__(self, optimizers: Iterable[Any], on_reading: Callable[[Flow], None] | None = None):
        self.readings: list[Flow] = []
        self.on_reading = on_reading
        self._births: list[_Birth] = []
        self._with_closure = False
        watch = weakref.ref(self)

        @outside_graphs
        def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            alive = watch()
            if alive is not None and alive._births:
                alive._with_closure = any(callable(a) for a in (*args[1:], *kwargs.values()))
                if not alive._with_closure:
                    alive._read(optimizer)

        hooked = [o for o in optimizers if hasattr(o, "register_step_pre_hook")]
        handles = [o.register_step_pre_hook(before_step) for o in hooked]
        weakref.finalize(self, _remove, handles)

    @property
    def watching(self) -> bool:
        """Whether the next optimizer step will be read."""
        return bool(self._births)

    def begin(self, change: Change, growth: int, step: int) -> None:
        """Watch the new blocks of a change that has just been carried out.

        Args:
            change: the growth.
            growth: its number in the journal.
            step: optimizer steps before it.
        """
        olds = counterparts(change)
        paths = {name: path for path, names in units(change).items() for name in names}
        pairs: dict[int, list[_Pair]] = {}
        for move in change.moves:
            join = change.joins.get(id(move.new))
            if move.name in olds and move.new is not None and join is not None:
                old = change.after.get(olds[move.name] or "")
                pair = _Pair(
                    paths[move.name], move.name, weakref.ref(move.new), None if old is None else weakref.ref(old)
                )
                pairs.setdefault(id(join.optimizer), []).append(pair)
        parts = change.parts
        homes = {id(p): id(o) for o in change.optimizers if parts for g in o.param_groups for p in g["params"]}
        for part in parts:
            p = change.after[part.name]
            if id(p) in homes:
                unit, name = part.name.rpartition(".")[0], f"{part.name} (new entries)"
                pairs.setdefault(homes[id(p)], []).append(_Pair(unit, name, weakref.ref(p), weakref.ref(p), part))
        gone = {id(move.old) for move in change.moves if move.old is not None and move.old is not move.new}
        self._births = [birth.without(gone) for birth in self._births]
        self.readings = []
        if pairs:
            self._births.append(_Birth(growth, step, pairs))

    def stepped(self, optimizer: Any) -> None:
        """Take note that an optimizer has stepped; call it behind each of its steps."""
        if self._with_closure:
            self._read(optimizer)
        for birth in [b for b in self._births if id(optimizer) in b.pairs]:
            again = id(optimizer) in birth.seen
            birth.seen.add(id(optimizer))
            if again or len(birth.seen) == len(birth.pairs):
                self._report(birth)

    def state(self) -> tuple[list[_Birth], list[Flow]]:
        """What is watched, to return to."""
        return [birth.copy() for birth in self._births], list(self.readings)

    def set_state(self, state: tuple[list[_Birth], list[Flow]]) -> None:
        """Return to what ``state`` gave."""
        self._births, self.readings = [birth.copy() for birth in state[0]], list(state[1])

    def forget(self) -> None:
        """Watch nothing."""
        self._births, self.readings = [], []

    @torch.no_grad()
    def _read(self, optimizer: Any) -> None:
        for birth in self._births:
            rows = [row for pair in birth.pairs.get(id(optimizer), ()) for row in pair.read()]
            try:
                found = sizes({name: grad for name, grad, _ in rows})
                alive = {name for name, grad, _ in rows if name in found and (found[name][0] != 0 or _any(grad))}
            except (RuntimeError, TypeError, NotImplementedError) as error:  # gradients of some unusual class
                warnings.warn(f"the gradients of growth {birth.growth} cannot be watched: {error}", stacklevel=2)
                self._births = [b for b in self._births if b is not birth]
                return
            birth.alive |= alive
            birth.found |= {name: (found[name][0] if name in found else 0.0, count) for name, _, count in rows}

    def _report(self, birth: _Birth) -> None:
        birth.steps, birth.seen = birth.steps + 1, set()
        ratios = birth.ratios()
        birth.found = {}
        if birth.steps > SETTLED:
            birth.learning |= {path for path, value in ratios.items() if value is None or value > STARVED}
        last = birth.steps >= STEPS
        reading = Flow(birth.growth, birth.step + birth.steps, ratios, birth.dead() if last else ())
        self.readings.append(reading)
        if last:
            self._births = [b for b in self._births if b is not birth]
        if self.on_reading is not None:
            self.on_reading(reading)
        fault = birth.fault() if last else None
        if fault is not None:
            warnings.warn(fault, stacklevel=2)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A new parameter of one unit and its counterpart, or the new entries of one tensor and its old ones."""

    unit: str
    name: str
    new: Callable[[], nn.Parameter | None]
    old: weakref.ref[nn.Parameter] | None
    part: Part | None = None

    def without(self, gone: set[int]) -> _Pair:
        """The same, which reads nothing of a parameter that has left."""
        new, old = self.new(), None if self.old is None else self.old()
        stays = new is not None and id(new) not in gone
        beside = old is not None and id(old) not in gone
        return dataclasses.replace(self, new=self.new if stays else _nobody, old=self.old if beside else None)

    def read(self) -> list[tuple[str, Tensor | None, int]]:
        """Name, gradient and number of scalars of each of the two that is there."""
        new, old = self.new(), None if self.old is None else self.old()
        names = self.name, f"{self.name}{OLD}"
        if self.part is None:
            both = zip(names, (new, old), strict=True)
            return [(name, p.grad, p.numel()) for name, p in both if p is not None]
        if new is None or new.shape != self.part.mask.shape:
            return []
        fresh = int(self.part.mask.sum())
        if is_spread(new.grad):
            mask = self.part.within(part_here(new)).mask.to(new.device)
            grads = zeroed(new.grad, mask), zeroed(new.grad, ~mask)
        else:
            grads = inside(self.part, new.grad)
        return list(zip(names, grads, (fresh, new.numel() - fresh), strict=True))


@dataclasses.dataclass
class _Birth:
    """One growth under watch; ``pairs`` by ``id`` of the optimizer that steps them."""

    growth: int
    step: int
    pairs: Mapping[int, list[_Pair]]
    steps: int = 0
    seen: set[int] = dataclasses.field(default_factory=set)
    alive: set[str] = dataclasses.field(default_factory=set)
    learning: set[str] = dataclasses.field(default_factory=set)
    found: dict[str, Size] = dataclasses.field(default_factory=dict)

    def copy(self) -> _Birth:
        """An own copy, to return to."""
        kept = {name: getattr(self, name).copy() for name in ("seen", "alive", "learning", "found")}
        return dataclasses.replace(self, **kept)

    def without(self, gone: set[int]) -> _Birth:
        """The same where parameters of these ``id``s have left: how long they live on must not change what is read.

        Under FSDP2 reading is done by all ranks together, and each frees what has left at a time of its own.
        """
        pairs = {optimizer: [pair.without(gone) for pair in of] for optimizer, of in self.pairs.items()}
        return dataclasses.replace(self.copy(), pairs=pairs)

    def ratios(self) -> dict[str, float | None]:
        """By path of each unit."""
        sides: dict[str, list[tuple[Size | None, Size | None]]] = {}
        for pair in self._all():
            sides.setdefault(pair.unit, []).append((self.found.get(pair.name), self.found.get(f"{pair.name}{OLD}")))
        return {unit: ratio(both) for unit, both in sides.items()}

    def dead(self) -> tuple[str, ...]:
        """Parameters that are there and never had a gradient; then units that had hardly any."""
        silent = tuple(p.name for p in self._all() if p.new() is not None and p.name not in self.alive)
        living = {p.unit for p in self._all() if p.new() is not None and p.name in self.alive}
        return silent + tuple(sorted(living - self.learning))

    def fault(self) -> str | None:
        """In words what a growth has made wrong: not a parameter whose counterpart has no gradient either."""
        same = {p.name for p in self._all() if p.old is not None and f"{p.name}{OLD}" not in self.alive}
        names = [name for name in self.dead() if name not in same]
        if not names:
            return None
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        return (
            f"growth {self.growth}: in the {self.steps} optimizer steps since, {', '.join(names[:6])}{more} had no "
            "gradient, or less than a thousandth of what the layers beside have, so it hardly learns. See grower.flow; "
            "undo it, or grow with another init."
        )

    def _all(self) -> list[_Pair]:
        return [pair for pairs in self.pairs.values() for pair in pairs]


def inside(part: Part, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the new entries of a tensor, and that of its old ones."""
    if grad is None:
        return None, None
    dense = grad.to_dense() if grad.is_sparse else grad
    along = [(number, new) for number, new in enumerate(part.new) if new.any()]
    if len(along) == 1:
        number, new = along[0]
        halves = [dense.index_select(number, half.nonzero().flatten().to(dense.device)) for half in (new, ~new)]
        return halves[0], halves[1]
    mask = part.mask.to(dense.device)
    return dense[mask], dense[~mask]


def _nobody() -> None:
    """In place of a reference to a parameter that has left."""


def _any(grad: Tensor | None) -> bool:
    """Whether a gradient holds anything but zeros (the sum of its squares may have come out as zero)."""
    return grad is not None and bool(_dense(grad).any())


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def counterparts(change: Change) -> dict[str, str | None]:
    """Name of each parameter that begins to train -> the old one that it is compared with, both as named afterwards.

    That of the block that it copies; else the sibling beside which it stands in the optimizer; None: there is none.
    """
    renamed = change.renamed
    sources = {path: renamed.get(new.source, new.source) for path, new in change.added if new.source}
    known = dict(zip(change.writers, change.counterparts, strict=True)) if change.counterparts else {}
    found: dict[str, str | None] = {}
    for move in change.moves:
        thawed = change.trains.get(move.old_name or "", False)
        if move.name is None or not change.will_train(move) or not (move.added or thawed):
            continue
        path = _unit_of(move.name, sources)
        copied = None if path is None else f"{sources[path]}{move.name[len(path) :]}"
        same = copied if copied in change.after and copied != move.name else None
        found[move.name] = known.get(move.name) or same or _beside(change, move)
    return found


def _beside(change: Change, move: Move) -> str | None:
    """The name of the sibling beside which a parameter stands in the optimizer."""
    join = change.joins.get(id(move.new))
    return None if join is None else next((name for name, p in change.after.items() if p is join.sibling), None)


def units(change: Change) -> dict[str, list[str]]:
    """The parameters that begin to train, by the path of the new block, else of the module, that they are in."""
    added = dict(change.added)
    found: dict[str, list[str]] = {}
    for name in counterparts(change):
        path = _unit_of(name, added)
        found.setdefault(name.rpartition(".")[0] if path is None else path, []).append(name)
    return found


def _unit_of(name: str, paths: Iterable[str]) -> str | None:
    """The longest of ``paths`` that ``name`` lies under."""
    return max((path for path in paths if name.startswith(f"{path}.")), key=len, default=None)


def ratio(pairs: Iterable[tuple[Size | None, Size | None]]) -> float | None:
    """Root mean square of all the new gradients / of all their counterparts'; where both are there."""
    both = [(new, old) for new, old in pairs if new is not None and old is not None]
    mine, theirs = (_mean_square(side) for side in zip(*both, strict=True)) if both else (0.0, 0.0)
    value = math.sqrt(mine / theirs) if theirs > 0 and math.isfinite(mine) else math.nan
    return value if math.isfinite(value) else None


def _mean_square(parts: Iterable[Size]) -> float:
    squares, counts = zip(*parts, strict=True)
    return sum(squares) / max(1, sum(counts))


def sizes(grads: Mapping[str, Tensor | None]) -> dict[str, Size]:
    """Of each gradient that is there, with one transfer from the device."""
    held = {name: _dense(grad) for name, grad in grads.items() if grad is not None}
    if not held:
        return {}
    told = [distinct(grad) for grad in held.values()]
    together: Any = getattr(torch, "_foreach_norm")  # noqa: B009
    norms = together(told)
    if len({(norm.dtype, norm.device) for norm in norms}) > 1:
        norms = [norm.to(norms[0].device, torch.float64) for norm in norms]
    values = torch.stack([norm if type(norm) is Tensor else whole(norm) for norm in norms]).tolist()
    return {
        name: (norm * norm * (grad.numel() / max(1, alone.numel())), grad.numel())
        for (name, grad), alone, norm in zip(held.items(), told, values, strict=True)
    }


def distinct(grad: Tensor) -> Tensor:
    """The one entry of a gradient whose entries are all the same place in memory; else all of it."""
    return grad if grad.numel() < 2 or any(grad.stride()) else grad.as_strided((1,), (1,))


def _dense(grad: Tensor) -> Tensor:
    """The gradient's numbers, in a dtype in which their squares can be summed."""
    grad = grad.detach() if grad.requires_grad else grad
    if grad.is_sparse:
        grad = grad.coalesce().values()
    return grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
