"""Which entries of a tensor continue which entries of an old one, found by their values.

Surgery lets any code resize, reorder, copy and rescale tensors. What that code has meant stands in the values: trained
weights hardly ever repeat, so a row that is found again is the same row. Where values do not tell (zeros, ones), the
maps that were found for other tensors of the same module decide, and else nothing is claimed.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from auxin.axes import BORN, Axes, Axis, born

COMBINATIONS = 64  # of maps for several axes at once that are tried
WORK = 10**9  # products of numbers to compare all slices with each other
DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
          torch.float32, torch.float64, torch.complex64, torch.complex128}  # fmt: skip
SAMPLE = 4096  # numbers of a tensor that are looked at first
DRAWN = 2**15  # numbers of a tensor that are sorted first
MIX = 0x5851F42D4C957F2D
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Maps:
    """Maps that were found so far, by (old size, new size): first those of the same module, then all others."""

    found: dict[tuple[str, int, int], list[Axis]] = field(default_factory=dict)

    def learn(self, path: str, axes: Axes) -> None:
        """Remember the maps of one tensor of the module at ``path``."""
        for axis in axes:
            plain = Axis(axis.index, axis.size)
            for place in (path, "*"):
                known = self.found.setdefault((place, axis.size, len(axis.index)), [])
                if not any(torch.equal(plain.index, other.index) for other in known):
                    known.append(plain)

    def of(self, path: str, old: int, new: int) -> list[Axis]:
        """What could lead from one size to the other, the likeliest first."""
        known = [*self.found.get((path, old, new), ()), *self.found.get(("*", old, new), ())]
        return [*known, Axis.leading(old, new)]


@dataclass(frozen=True)
class Match:
    """How a tensor continues an old one.

    Attributes:
        axes: the maps.
        sure: whether the values tell; False: they would fit other maps as well, and the likeliest was taken.
    """

    axes: Axes
    sure: bool = True


@torch.no_grad()
def match(old: Tensor, new: Tensor, maps: Maps, path: str = "") -> Match | None:
    """Find out how ``new`` continues ``old``.

    Args:
        old: the values before.
        new: the values now, of the same number of dimensions.
        maps: what was found for other tensors; nothing is added to it.
        path: of the module that holds the tensor.

    Returns:
        None where nothing of ``old`` is found again.
    """
    if old.dim() != new.dim() or not _comparable(old, new):
        return None
    if old.dim() == 0:
        return Match(()) if _equal(old, new) else None
    if not old.numel() or not new.numel():
        return None
    old, new = old.detach().cpu(), new.detach().cpu()
    if old.shape == new.shape and _equal(old, new):
        return Match(tuple(map(Axis.same, old.shape)))
    found = [*_by_slices(old, new, maps, path), *_by_known_maps(old, new, maps, path)]
    best = max(found, key=lambda one: _weight(old, one), default=None)
    if best is None or not _informative(old, best.axes):
        best = _by_unique_values(old, new) or _by_scale(old, new, maps, path) or best
    return best and Match(tuple(map(_with_gradient, best.axes)), best.sure)


@torch.no_grad()
def in_place(old: Tensor, new: Tensor) -> Match | None:
    """The same where each entry stands where it stood, all multiplied by one number or by none: much cheaper."""
    if old.shape != new.shape or not _comparable(old, new):
        return None
    same = tuple(map(Axis.same, old.shape))
    if _equal(old, new):
        return Match(same)
    if not old.dim() or not old.numel() or not old.is_floating_point():
        return None
    before, after = old.detach().flatten(), new.detach().flatten().to(old.device)
    scale = _ratio(before, after) if bool((before != before[0]).any()) else None
    return None if scale is None else Match((Axis.of(same[0].index, same[0].size, value=scale), *same[1:]))


def _comparable(old: Tensor, new: Tensor) -> bool:
    """Whether both hold values of one dtype, with which the CPU can calculate."""
    kinds = {(t.dtype, t.layout) for t in (old, new)}
    return (
        kinds == {(old.dtype, torch.strided)}
        and old.dtype in DTYPES
        and "meta" not in (old.device.type, new.device.type)
    )


def is_scaled(axes: Axes) -> bool:
    """Whether all entries stay, and are multiplied by something."""
    return any(a.value is not None for a in axes) and all(bool((a.counts == 1).all()) for a in axes)


def _weight(old: Tensor, found: Match) -> tuple[bool, int]:
    """How much a map explains: whether it rests on values that tell, and how many entries go on."""
    return _informative(old, found.axes), int((~born(found.axes)).sum())


def _informative(old: Tensor, axes: Axes) -> bool:
    """Whether what goes on is more than one number over and over."""
    region = _region(old, axes).flatten()
    if len(region) < 2:
        return bool(region.any())
    return any(bool((part != region[0]).any()) for part in (region[:SAMPLE], region[SAMPLE:]))


def _with_gradient(axis: Axis) -> Axis:
    """Copies of an entry share its gradient: together they move the network as it did."""
    if bool((axis.counts == 1).all()):
        return axis
    value = axis.value if axis.value is not None else torch.ones(len(axis.index), dtype=torch.float64)
    known = axis.index >= 0
    total = torch.zeros(axis.size, dtype=torch.float64).index_add(0, axis.index[known], value[known])
    share = torch.where(known, 1 / total[axis.index.clamp(min=0)], 1.0)
    return axis if bool((share == 1).all()) else Axis(axis.index, axis.size, axis.value, share)


def _by_slices(old: Tensor, new: Tensor, maps: Maps, path: str) -> Iterator[Match]:
    """One axis has changed, all others have not: whole slices along it are found again, whatever their order."""
    changed = [a for a in range(old.dim()) if old.shape[a] != new.shape[a]]
    if len(changed) > 1:
        return
    for number in changed or range(old.dim()):
        before, after = _flat(old, number), _flat(new, number)
        axis, sure = _found_again(before, after, maps.of(path, len(before), len(after)))
        axis = _multiples(before, after, axis)
        if axis.born.all():
            continue
        yield Match(tuple(axis if a == number else Axis.same(n) for a, n in enumerate(old.shape)), sure)


def _found_again(before: Tensor, after: Tensor, known: list[Axis]) -> tuple[Axis, bool]:
    """Which row of ``before`` each row of ``after`` is, to the bit.

    Rows that stand there several times, or hold one number only, do not tell by themselves: they go by their
    neighbours, or by a map that is known from elsewhere and fits.
    """
    keys, wanted = _keys(before), _keys(after)
    places: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    flat = _constant(before, keys)
    single, fitting = before.shape[1] == 1, []
    for axis in known[:-1]:  # a map from elsewhere that explains every row that could go on
        fits = all(place < 0 or keys[place] == key for place, key in zip(axis.index.tolist(), wanted, strict=True))
        rest = [key for place, key in zip(axis.index.tolist(), wanted, strict=True) if place < 0]
        # Single numbers meet by chance, so a new one that equals an old one says nothing.
        if fits and (single or not any(key in places and not flat[places[key][0]] for key in rest)):
            fitting.append(axis)
    if fitting:
        return max(fitting, key=lambda axis: int((~axis.born).sum())), True
    index: list[int] = []
    used: set[int] = set()
    expected, sure = 0, True
    for key in wanted:
        candidates = places.get(key, [])
        if not candidates:
            index.append(BORN)
            continue
        if len(candidates) == 1 and not flat[candidates[0]]:
            place = candidates[0]
        elif expected in candidates and expected not in used:
            place, sure = expected, sure and (len(candidates) == 1 or not flat[expected])
        elif flat[candidates[0]]:
            place, sure = BORN, False  # one number over and over: as good as new
        else:
            place = next((c for c in candidates if c not in used), candidates[0])
        index.append(place)
        used.add(place)
        expected = place + 1 if place >= 0 else expected
    if single and not _plausible(index, before, after):
        return Axis.of([BORN] * len(after), len(before)), False
    sure = sure or any(not flat[place] for place in used if place >= 0)
    often = Counter(wanted)  # of equal rows nothing tells which one has left, or was copied
    sure = sure and all(len(places[keys[p]]) in (1, often[keys[p]]) or (flat[p] and not single) for p in used if p >= 0)
    return Axis.of(index, len(before)), sure


def _plausible(index: list[int], before: Tensor, after: Tensor) -> bool:
    """Whether single numbers are found again in a way that chance does not bring about.

    Of other values altogether a few are always found; in 16 bits most are, and then only their order tells.
    """
    found = [place for place in index if place >= 0]
    if 2 * len(found) < min(len(before), len(after)):
        return False
    in_order = all(a < b for a, b in itertools.pairwise(found))
    return before.element_size() > 2 or in_order or sorted(index) == list(range(len(before)))


def _multiples(before: Tensor, after: Tensor, axis: Axis) -> Axis:
    """Rows that are not found again, but are an old row times a number (Net2Wider's outgoing weights)."""
    lost = axis.born.nonzero().flatten()
    if not len(lost) or not before.is_floating_point() or before.shape[1] < 2 or len(lost) * before.numel() > WORK:
        return axis
    index, value = axis.index.clone(), torch.ones(len(axis.index), dtype=torch.float64)
    ours, theirs = after[lost].double(), before.double()
    lengths = ours.norm(dim=1, keepdim=True), theirs.norm(dim=1, keepdim=True)
    cosine = (ours / lengths[0].clamp(min=1e-300)) @ (theirs / lengths[1].clamp(min=1e-300)).T
    near, place = cosine.abs().max(1)
    for row, (number, candidate) in enumerate(zip(lost.tolist(), place.tolist(), strict=True)):
        if float(near[row]) > 1 - 1e-6 and int((before[candidate] != 0).sum()) > 1:
            scale = _ratio(before[candidate], after[number])
            if scale is not None:
                index[number], value[number] = candidate, scale
    return axis if torch.equal(index, axis.index) else Axis(index, axis.size, value)


def _by_known_maps(old: Tensor, new: Tensor, maps: Maps, path: str) -> Iterator[Match]:
    """Maps that were found elsewhere between the same sizes, or the leading corner, where they hold to the bit."""
    for axes in _combinations(old, new, maps, path):
        region, there = _region(old, axes), _region_of(new, axes)
        if region.numel() and _equal(region, there):
            told = any(not a.keeps_place for a in axes) or _informative(old, axes)
            yield Match(axes, told)


def _by_scale(old: Tensor, new: Tensor, maps: Maps, path: str) -> Match | None:
    """All that goes on is multiplied by one number, or each entry of a single row by one over its count."""
    if not old.is_floating_point():
        return None
    for axes in _combinations(old, new, maps, path):
        region, there = _region(old, axes), _region_of(new, axes)
        if not region.numel() or not bool((region != region.flatten()[0]).any()):
            continue
        scale = _ratio(region.flatten(), there.flatten())
        if scale is not None:
            place = next((a for a, axis in enumerate(axes) if bool((axis.counts > 1).any())), 0)
            scaled = Axis.of(axes[place].index, axes[place].size, value=scale)
            return Match(tuple(scaled if a == place else axis for a, axis in enumerate(axes)))
        for number, axis in enumerate(axes):  # copies, each with its share
            shared = axis.copied(outgoing=True)
            trial = tuple(shared if a == number else other for a, other in enumerate(axes))
            if bool((axis.counts > 1).any()) and _close(_region(old, trial, scaled=True), there):
                return Match(trial)
    return None


def _by_unique_values(old: Tensor, new: Tensor) -> Match | None:
    """Several axes have changed at once: numbers that occur once in the old tensor tell where each slice has gone."""
    if not old.is_floating_point() or sum(max(sizes) > 1 for sizes in zip(old.shape, new.shape, strict=True)) < 2:
        return None
    # Sorting takes long, so some of the numbers are asked first, the same ones on both sides: what goes wrong with them
    # goes wrong with all.
    one_of = max(1, old.numel() // DRAWN, new.numel() // DRAWN)
    some = (_drawn(old.flatten(), one_of), _drawn(new.flatten(), one_of))
    if one_of > 1 and _axes_of(old, new, *some, at_least=1) is None:
        return None
    found = _axes_of(old, new, torch.arange(old.numel()), torch.arange(new.numel()))
    region = None if found is None else _region(old, found)
    if found is None or region is None or 4 * region.numel() < min(old.numel(), new.numel()):
        return None  # a few numbers are found again by chance
    return Match(found) if _equal(region, _region_of(new, found)) else None


def _drawn(flat: Tensor, one_of: int) -> Tensor:
    """Places of about one of so many numbers; equal ones are drawn or not drawn together."""
    bits = flat.view(WORDS[flat.element_size()]).long()
    mixed = bits * MIX
    return ((mixed ^ (mixed >> 29)) % one_of == 0).nonzero().flatten()


def _axes_of(old: Tensor, new: Tensor, here: Tensor, there: Tensor, at_least: int = 2) -> Axes | None:
    """Maps along all axes by the numbers at the places ``here`` of the old tensor and ``there`` of the new one."""
    values, inverse, counts = old.flatten()[here].unique(return_inverse=True, return_counts=True)
    wanted = new.flatten()[there]
    if not len(values):
        return None
    place = torch.empty(len(values), dtype=torch.int64)
    place[inverse] = here
    at = torch.searchsorted(values, wanted).clamp(max=len(values) - 1)
    known = ((values[at] == wanted) & (counts[at] == 1) & (values[at] != 0)).nonzero().flatten()
    if len(known) < at_least:
        return None
    source, target = _coordinates(place[at[known]], old.shape), _coordinates(there[known], new.shape)
    axes = []
    for number in range(old.dim()):
        index = torch.full((new.shape[number],), BORN)
        index[target[number]] = source[number]
        if not torch.equal(index[target[number]], source[number]):
            return None  # two entries of one slice come from two slices
        axes.append(Axis(index, old.shape[number]))
    return tuple(axes)


def _coordinates(flat: Tensor, shape: torch.Size) -> list[Tensor]:
    result = []
    for size in reversed(shape):
        result.append(flat % size)
        flat = flat // size
    return result[::-1]


def _combinations(old: Tensor, new: Tensor, maps: Maps, path: str) -> Iterable[Axes]:
    choices = [
        [Axis.same(a), *maps.of(path, a, b)[:-1]] if a == b else maps.of(path, a, b)
        for a, b in zip(old.shape, new.shape, strict=True)
    ]
    return itertools.islice(itertools.product(*choices), COMBINATIONS)


def _region(old: Tensor, axes: Axes, scaled: bool = False) -> Tensor:
    """The entries of the old tensor that go on, in their new order."""
    for number, axis in enumerate(axes):
        old = old.index_select(number, axis.index[~axis.born])
        if scaled and axis.value is not None:
            old = old * axis.value[~axis.born].view([-1 if a == number else 1 for a in range(len(axes))])
    return old


def _region_of(new: Tensor, axes: Axes) -> Tensor:
    """The entries of the new tensor that are not born."""
    for number, axis in enumerate(axes):
        new = new.index_select(number, (~axis.born).nonzero().flatten())
    return new


def _ratio(old: Tensor, new: Tensor) -> float | None:
    """The number by which ``old`` was multiplied, if it was; of those that fit, one over a whole number is taken."""
    first = slice(SAMPLE)  # tells of nearly all that it is another
    if len(old) > SAMPLE and bool(old[first].any()) and _ratio(old[first], new[first]) is None:
        return None
    largest = int(old.double().abs().argmax())
    if float(old[largest]) == 0 or not bool(new.isfinite().all() and old.isfinite().all()):
        return None
    scale = float(new[largest].double() / old[largest].double())
    if scale == 0 or not math.isfinite(scale) or not math.isfinite(1 / scale):
        return None
    count = round(1 / scale)
    for exact in (1 / count if count else scale, float(round(scale)), scale):
        if exact != 0 and abs(exact - scale) < 1e-2 * abs(scale) and _close(old.double() * exact, new):
            return exact
    return None


def _close(value: Tensor, new: Tensor) -> bool:
    """Whether they are equal up to the rounding of ``new``."""
    limit = 2 * torch.finfo(new.dtype).eps
    return bool(((value.double() - new.double()).abs() <= limit * new.double().abs()).all())


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _flat(tensor: Tensor, number: int) -> Tensor:
    """One row for each slice along an axis."""
    return tensor.movedim(number, 0).reshape(tensor.shape[number], -1).contiguous()


def _constant(rows: Tensor, keys: list[int]) -> list[bool]:
    """Which rows hold one number only: a single entry does so where another row has the same, or it is 0 or 1."""
    if rows.shape[1] > 1:
        return (rows == rows[:, :1]).all(1).tolist()
    counts, plain = Counter(keys), ((rows == 0) | (rows == 1)).flatten().tolist()
    return [counts[key] > 1 or one for key, one in zip(keys, plain, strict=True)]


def _keys(rows: Tensor) -> list[int]:
    """The bits of each row as one number: of a short row itself, of a longer one a hash of its bytes."""
    data, width = _bits(rows), rows.shape[1] * rows.element_size()
    if width in WORDS:
        return data.view(WORDS[width]).tolist()
    start = data.data_ptr()
    return [hash(ctypes.string_at(start + place * width, width)) for place in range(len(rows))]
