"""Where the entries of a resized tensor come from, axis by axis; the one place that combines old and new entries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from auxin.errors import GrowthError

BORN = -1
Kind = Literal["value", "gradient", "square", "plain"]


@dataclass(frozen=True, eq=False)
class Axis:
    """How the entries along one axis of a tensor continue those that it had.

    Attributes:
        index: int64 of shape (new size,): the old position that each new one continues, -1 where it is born.
        size: the old size.
        value: float64 of shape (new size,), by which old values are multiplied (Net2Wider: 1 / count of the copies on
            the outgoing axis); None: by 1.
        gradient: the same for gradients (Net2Wider: 1 / count on the incoming axis). If old parameters are a linear
            function P of the new ones and the function of the network is preserved through it, new gradients are P^T
            times the old ones.
        mean: whether new entries are the mean of the old ones, as where LayerNorm reads a wider residual stream; of a
            value only, states of new entries start fresh.
        gains: (name, value at new entries) of vectors that the network multiplies the entries by before they are read
            (LayerScale): a new entry is then the mean of the multiplied old ones, divided by the values.
        shift: float64 of shape (new size,), added to old values after they were multiplied (a router's bias, less the
            logarithm of how often each expert was copied); None: nothing.

    Raises:
        GrowthError: the map leaves the old range, or a scale has another length.
    """

    index: Tensor
    size: int
    value: Tensor | None = None
    gradient: Tensor | None = None
    mean: bool = False
    shift: Tensor | None = None
    gains: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        index = self.index
        if index.dim() != 1 or index.dtype != torch.int64:
            raise GrowthError(
                f"Axis: index is {tuple(index.shape)} {index.dtype}; pass one old position for each new one, -1 where "
                "it is born: Axis.of([0, 1, -1], size=2)."
            )
        outside = index[(index < BORN) | (index >= self.size)]
        if len(outside):
            raise GrowthError(
                f"Axis: index holds {int(outside[0])}, and the old positions are 0 to {self.size - 1} (-1 for a new "
                "entry)."
            )
        for name, scale in (("value", self.value), ("gradient", self.gradient), ("shift", self.shift)):
            if scale is not None and scale.shape != index.shape:
                raise GrowthError(f"Axis: {name} has shape {tuple(scale.shape)} for {len(index)} entries.")

    @classmethod
    def of(
        cls,
        index: Sequence[int] | Tensor,
        size: int,
        value: float | Sequence[float] | Tensor | None = None,
        gradient: float | Sequence[float] | Tensor | None = None,
        mean: bool = False,
    ) -> Axis:
        """Make one from plain numbers; a single scale counts for every entry."""
        positions = torch.as_tensor(index, dtype=torch.int64).detach().cpu()
        return cls(positions, size, _scale(value, len(positions)), _scale(gradient, len(positions)), mean)

    @classmethod
    def same(cls, size: int) -> Axis:
        """Nothing changes along this axis."""
        return cls(torch.arange(size), size)

    @classmethod
    def leading(cls, old: int, new: int) -> Axis:
        """The first entries go on, new ones stand at the end (or the last ones leave)."""
        index = torch.arange(new)
        index[old:] = BORN
        return cls(index, old)

    @classmethod
    def inserted(cls, size: int, at: int, count: int) -> Axis:
        """``count`` new entries stand before the old position ``at``."""
        positions = torch.arange(size)
        return cls(torch.cat([positions[:at], torch.full((count,), BORN), positions[at:]]), size)

    def copied(self, outgoing: bool) -> Axis:
        """The same map for copies that share what their original did: Net2Wider (Chen et al. 2016, arXiv:1511.05641).

        Args:
            outgoing: whether the tensor reads the copied entries (its values are divided by their count) or makes them
                (its gradients are).
        """
        share = 1 / self.counts.double()
        return Axis(self.index, self.size, share if outgoing else None, None if outgoing else share)

    @property
    def counts(self) -> Tensor:
        """How often the old entry that each new one continues occurs, itself included; 1 where it is born."""
        known = self.index >= 0
        often = torch.bincount(self.index[known], minlength=self.size)
        return torch.where(known, often[self.index.clamp(min=0)] if self.size else 1, 1)

    @property
    def born(self) -> Tensor:
        """Bool of shape (new size,): which entries are new."""
        return self.index < 0

    @property
    def is_same(self) -> bool:
        """Whether nothing changes along this axis."""
        return self.value is None and self.gradient is None and self.shift is None and self.keeps_all

    @property
    def keeps_all(self) -> bool:
        """Whether every old entry goes on where it stood, and there are no others."""
        return len(self.index) == self.size and bool((self.index == torch.arange(self.size)).all())

    @property
    def keeps_place(self) -> bool:
        """Whether every entry stands where it stood, or is new."""
        return bool(((self.index == torch.arange(len(self.index))) | self.born).all())

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(first old position or -1, length) of each run of entries that stood, or are born, side by side."""
        runs: list[tuple[int, int]] = []
        for position in self.index.tolist():
            start, length = runs[-1] if runs else (BORN, 0)
            if runs and ((position < 0 and start < 0) or (start >= 0 and position == start + length)):
                runs[-1] = (start, length + 1)
            else:
                runs.append((position, 1))
        return runs

    def __str__(self) -> str:
        """As runs, e.g. ``0-2, 1 new, 3-5``."""
        words = []
        for start, length in self.runs:
            words.append(
                f"{length} new" if start < 0 else f"{start}" if length == 1 else f"{start}-{start + length - 1}"
            )
        text = ", ".join(words) if len(words) <= 12 else f"{', '.join(words[:12])}, ... ({len(words)} runs)"
        scales = (("values", self.value), ("gradients", self.gradient))
        told = [f"{name} x {_told(scale)}" for name, scale in scales if scale is not None]
        return "; ".join([text, *told, *([] if self.shift is None else [f"values + {_told(self.shift)}"])])

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        scales = {"value": self.value, "gradient": self.gradient, "shift": self.shift}
        told = {name: _short(scale.tolist()) for name, scale in scales.items() if scale is not None}
        told |= {"mean": True} if self.mean else {}
        told |= {"gains": [list(gain) for gain in self.gains]} if self.gains else {}
        return {"size": self.size, "runs": [list(run) for run in self.runs], **told}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Axis:
        """Read it back.

        Raises:
            GrowthError: this is something else.
        """
        try:
            index: list[int] = []
            for start, length in data["runs"]:
                index += [BORN] * length if start < 0 else range(start, start + length)
            axis = cls.of(index, data["size"], data.get("value"), data.get("gradient"), data.get("mean", False))
            gains = tuple((str(name), float(value)) for name, value in data.get("gains", ()))
            return replace(axis, shift=_scale(data.get("shift"), len(index)), gains=gains)
        except (KeyError, TypeError, ValueError) as error:
            raise GrowthError(f"this is not an axis: {data!r:.80} ({type(error).__name__}: {error}).") from error


Axes = tuple[Axis, ...]


def leading(old: Sequence[int], new: Sequence[int]) -> Axes | None:
    """The leading corner of each axis goes on; None where the numbers of axes differ."""
    if len(old) != len(new):
        return None
    return tuple(Axis.leading(a, b) for a, b in zip(old, new, strict=True))


def shape_after(axes: Axes) -> torch.Size:
    """The shape of the tensor after the change."""
    return torch.Size(len(axis.index) for axis in axes)


def check(name: str, axes: Axes, old: Sequence[int], new: Sequence[int]) -> None:
    """Check that maps lead from one shape to another.

    Raises:
        GrowthError: names the tensor and the axis.
    """
    if len(axes) != len(old) or len(axes) != len(new):
        raise GrowthError(
            f"{name}: {len(axes)} axes are given for {tuple(old)} -> {tuple(new)}; give one Axis for each dimension."
        )
    for number, (axis, before, after) in enumerate(zip(axes, old, new, strict=True)):
        if axis.size != before or len(axis.index) != after:
            raise GrowthError(
                f"{name}: the map of axis {number} leads from {axis.size} to {len(axis.index)} entries, the tensor "
                f"goes from {tuple(old)} to {tuple(new)}."
            )


@torch.no_grad()
def carried(
    old: Tensor, axes: Axes, fresh: Tensor, kind: Kind = "value", gains: Mapping[str, Tensor] | None = None
) -> Tensor:
    """What a tensor holds after its axes have changed: old entries where they continue, ``fresh`` where they are born.

    Every value that moves in a growth comes through here: parameters and buffers, averages (from their own values),
    states of optimizers.

    Args:
        old: of the shape before.
        axes: one for each dimension.
        fresh: of the shape after, with the values of entries that are born. It gives dtype, device and memory order.
        kind: what the entries are, which says how they are scaled: a "value" by ``Axis.value``, what is linear in the
            gradient ("gradient") by ``Axis.gradient``, its "square" by the square of that, "plain" by nothing.
        gains: the vectors that ``Axis.gains`` names, as they were before, of the network that ``old`` is of.

    Returns:
        A new tensor like ``fresh``.

    Raises:
        GrowthError: the maps do not lead from one shape to the other.
    """
    check("carried", axes, old.shape, fresh.shape)
    if kind == "value":
        old, axes = _with_means(old.detach(), axes, gains or {})
    region = old.detach().to(device=fresh.device, dtype=fresh.dtype)
    for number, axis in enumerate(axes):
        if not axis.keeps_all:
            region = _at(region, number, side_by_side(axis.index[~axis.born], region.device))
        scale = _factor(axis, kind)
        if scale is not None:
            shape = [-1 if a == number else 1 for a in range(len(axes))]
            region = (region * scale[~axis.born].to(region.device).view(shape)).to(region.dtype)
        if kind == "value" and axis.shift is not None:
            shape = [-1 if a == number else 1 for a in range(len(axes))]
            region = (region + axis.shift[~axis.born].to(region.device).view(shape)).to(region.dtype)
    result = torch.empty_like(fresh, requires_grad=False).copy_(fresh.detach())
    put(result, [side_by_side((~axis.born).nonzero().flatten(), fresh.device) for axis in axes], region)
    return result


At = slice | Tensor  # where entries lie along an axis: side by side, or here and there


def side_by_side(places: Tensor, device: torch.device) -> At:
    """The same places as a slice, where they follow each other."""
    count = len(places)
    first = int(places[0]) if count else 0
    if torch.equal(places, torch.arange(first, first + count)):
        return slice(first, first + count)
    return places.to(device)


def _at(tensor: Tensor, number: int, at: At) -> Tensor:
    """The entries of one axis; a view where they lie side by side."""
    if isinstance(at, slice):
        return tensor.narrow(number, at.start, at.stop - at.start)
    return tensor.index_select(number, at)


def block(tensor: Tensor, places: Sequence[At]) -> Tensor:
    """The entries that lie at these places of each axis; a view where they all lie side by side."""
    for number, at in enumerate(places):
        tensor = _at(tensor, number, at)
    return tensor


def put(tensor: Tensor, places: Sequence[At], value: Tensor) -> None:
    """Write ``value`` to the entries that lie at these places of each axis."""
    if all(isinstance(at, slice) for at in places):
        block(tensor, places).copy_(value)
        return
    grid = []
    for number, at in enumerate(places):
        flat = torch.arange(at.start, at.stop, device=tensor.device) if isinstance(at, slice) else at
        grid.append(flat.view([-1 if a == number else 1 for a in range(len(places))]))
    tensor[tuple(grid)] = value.to(tensor.dtype)


def _with_means(old: Tensor, axes: Axes, gains: Mapping[str, Tensor]) -> tuple[Tensor, Axes]:
    """The mean along an axis as one more entry of it, which the new ones continue."""
    result = list(axes)
    for number, axis in enumerate(axes):
        if axis.mean and axis.born.any():
            entries = old.double()
            for name, at_new in axis.gains:
                shape = [-1 if a == number else 1 for a in range(len(axes))]
                entries = entries * (gains[name].to(old.device).double() / at_new).view(shape)
            old = torch.cat([old, entries.mean(number, keepdim=True).to(old.dtype)], number)
            index = torch.where(axis.born, axis.size, axis.index)
            result[number] = Axis(index, axis.size + 1, axis.value, axis.gradient)
    return old, tuple(result)


def _factor(axis: Axis, kind: Kind) -> Tensor | None:
    if kind == "value":
        return axis.value
    if kind == "plain" or axis.gradient is None:
        return None
    return axis.gradient if kind == "gradient" else axis.gradient.square()


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter of which some entries are new.

    Attributes:
        name: after the change.
        new: for each axis a bool of its size; an entry is new if it is so along some axis.
    """

    name: str
    new: tuple[Tensor, ...]

    @property
    def mask(self) -> Tensor:
        """Bool of the tensor's shape: which entries are new."""
        mask = torch.zeros([len(along) for along in self.new], dtype=torch.bool)
        for number, along in enumerate(self.new):
            mask |= along.view([-1 if a == number else 1 for a in range(len(self.new))])
        return mask

    def within(self, held: Sequence[slice]) -> Part:
        """The same entries of a part of the tensor, as a rank holds it."""
        return Part(self.name, tuple(along[at] for along, at in zip(self.new, held, strict=True)))

    def after(self, axes: Axes | None) -> Part:
        """The same entries once the tensor has changed again."""
        if axes is None or len(axes) != len(self.new):
            return self
        moved = (along[axis.index.clamp(min=0)] & ~axis.born for along, axis in zip(self.new, axes, strict=True))
        return Part(self.name, tuple(moved))

    def to_json(self) -> list[list[int]]:
        """The new positions along each axis."""
        return [along.nonzero().flatten().tolist() for along in self.new]

    @classmethod
    def from_json(cls, name: str, data: Sequence[Sequence[int]], shape: Sequence[int]) -> Part:
        """Read it back, for a tensor of this shape; a ValueError or IndexError says that it is another's."""
        new = [torch.zeros(size, dtype=torch.bool) for size in shape]
        for along, positions in zip(new, data, strict=True):
            along[torch.tensor(positions, dtype=torch.int64)] = True
        return cls(name, tuple(new))


def born(axes: Axes) -> Tensor:
    """Bool of the shape after: the entries that are born along some axis."""
    return Part("", tuple(axis.born for axis in axes)).mask


def has_born(axes: Axes | None) -> bool:
    """Whether any entry is new."""
    return axes is not None and any(bool(axis.born.any()) for axis in axes)


def told(axes: Axes) -> str:
    """In words what happens along each axis that changes; empty where none does."""
    return "; ".join(f"axis {number}: {axis}" for number, axis in enumerate(axes) if not axis.is_same)


def _scale(scale: float | Sequence[float] | Tensor | None, size: int) -> Tensor | None:
    if scale is None:
        return None
    tensor = torch.as_tensor(scale, dtype=torch.float64).detach().cpu()
    return tensor.expand(size).contiguous() if tensor.dim() == 0 else tensor


def _short(numbers: list[float]) -> float | list[float]:
    return numbers[0] if numbers and all(n == numbers[0] for n in numbers) else numbers


def _told(scale: Tensor) -> str:
    low, high = float(scale.min()), float(scale.max())
    return f"{low:.4g}" if math.isclose(low, high) else f"{low:.4g} to {high:.4g}"
