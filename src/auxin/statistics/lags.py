"""Second moments of convolutions without their patches.

Between two layers that walk with stride 1, the product of what two places of the kernels see depends on how far they
are apart, but for the border: moments of patches are block-Toeplitz up to that. So the sum over all places is taken
once for each distance, by the routine that computes the gradient of a convolution's weight, and what a place of the
kernel does not see at the border is taken away. Exact, and less to compute than the product of the patches, which are
never written down.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from auxin.statistics.rows import Geometry

FEW = 2**18  # numbers of patches, as at a border, up to which it is faster to write them down


def between_patches(layer: Geometry, given: Tensor, places: Sequence[int]) -> Tensor:
    """X^T X of what a convolution multiplies its weights with, (features, features).

    Args:
        layer: of stride 1 and dilation 1.
        given: what it reads, (samples, channels, spatial axes).
        places: of its output.
    """
    source, begins = _source(layer, given)
    shifts = [tuple(begin + at for at in range(n)) for n, begin in zip(layer.kernel, begins, strict=True)]
    found = with_patches(layer, given, places, source, shifts)
    found = found.unflatten(1, (layer.places, layer.channels)).transpose(1, 2).flatten(1)
    if not layer.bias:
        return found
    corner = found.new_full((1,), len(given) * math.prod(places))
    return torch.cat([found, torch.cat([found[-1], corner]).unsqueeze(1)], 1)


def with_patches(
    layer: Geometry, given: Tensor, places: Sequence[int], other: Tensor, shifts: Sequence[tuple[int, ...]]
) -> Tensor:
    """X^T Y of what a convolution multiplies its weights with, and what lies so many places further: zero outside.

    Args:
        layer: of stride 1 and dilation 1.
        given: what it reads, (samples, channels, spatial axes).
        places: of its output.
        other: (samples, channels, spatial axes).
        shifts: from a place of its output to one of ``other``, for each spatial axis.

    Returns:
        (features, shifts x channels of ``other``).
    """
    source, begins = _source(layer, given)
    walked = zip(places, begins, layer.kernel, shifts, strict=True)
    found = correlated(source, other, [Axis(*one) for one in walked]).flatten(0, 1).flatten(1)
    if not layer.bias:
        return found
    sums = other.sum(0)
    for axis, (length, shift) in enumerate(zip(places, shifts, strict=True), start=1):
        least = min(shift)
        windows = _stretch(sums, axis, least, length + max(shift) - least).unfold(axis, length, 1).sum(-1)
        sums = windows.index_select(axis, torch.tensor(shift, device=sums.device) - least)
    return torch.cat([found, sums.movedim(0, -1).reshape(1, -1)])


def times_patches(layer: Geometry, given: Tensor, A: Tensor) -> Tensor:
    """X A, (samples, columns of A, places of the output), for A of (features, columns)."""
    weight = A[: layer.channels * layer.places].T.unflatten(1, (layer.channels, *layer.kernel)).to(given)
    shift, count = (A[-1].to(given) if layer.bias else None), len(layer.kernel)
    zeros, ones = [0] * count, [1] * count
    return torch.convolution(layer.padded(given), weight, shift, ones, zeros, ones, False, zeros, 1)


def _source(layer: Geometry, given: Tensor) -> tuple[Tensor, list[int]]:
    """What a convolution reads, zero outside, and where in it its first place begins."""
    if layer.mode != "zeros":
        return layer.padded(given), [0] * len(layer.kernel)
    return given, [-before for before, _ in layer.padding]


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a sum over u, 0 <= u < length, of A[u + place + begin] B[u + shift].

    Attributes:
        length: how many u there are.
        begin: of the first place.
        places: place = 0, 1, ...
        shifts: for each of which there is a sum.
    """

    length: int
    begin: int
    places: int
    shifts: tuple[int, ...]


def correlated(A: Tensor, B: Tensor, axes: Sequence[Axis]) -> Tensor:
    """All these sums, over samples and u: (channels of A, places, shifts, channels of B).

    Args:
        A: (samples, channels, spatial axes); zero outside.
        B: the same; zero outside.
        axes: one for each spatial axis; places and shifts of the result are numbered with the last one fastest.
    """
    shape = [n for axis in axes for n in (axis.places, len(axis.shifts))]
    total = A.new_zeros(B.shape[1], A.shape[1], *shape)
    choices = [_parts(axis, size) for axis, size in zip(axes, B.shape[2:], strict=True)]
    for parts in itertools.product(*choices):
        a, b = A, B
        for number, part in enumerate(parts, start=2):
            b = b.narrow(number, part.first, part.count)
            a = _stretch(a, number, part.at, part.count + part.offsets - 1)
        found = _products(a, b, [part.offsets for part in parts])
        here = total
        for number, part in reversed([*enumerate(parts)]):
            found = found.index_select(2 + number, part.index.flatten().to(found.device))
            found = found.unflatten(2 + number, part.index.shape)
            here = here.narrow(3 + 2 * number, part.shift, part.index.shape[1])
        here.add_(found, alpha=-1 if sum(part.is_strip for part in parts) % 2 else 1)
    spatial = len(axes)
    order = [1, *(2 + 2 * n for n in range(spatial)), *(3 + 2 * n for n in range(spatial)), 0]
    return total.permute(order).flatten(1 + spatial, 2 * spatial).flatten(1, spatial)


@dataclass(frozen=True)
class _Part:
    """A part of one axis: all of B for all shifts, or a strip of it that one shift must not see.

    Attributes:
        first, count: of B.
        at: where A begins; it may be outside of it.
        offsets: from there on.
        index: (places, shifts), the offset of each.
        shift: number of the first of these shifts.
    """

    first: int
    count: int
    at: int
    offsets: int
    index: Tensor
    shift: int
    is_strip: bool


@functools.lru_cache(maxsize=256)
def _parts(axis: Axis, size: int) -> list[_Part]:
    places, shifts = torch.arange(axis.places).unsqueeze(1), torch.tensor(axis.shifts)
    least, most = min(axis.shifts), max(axis.shifts)
    parts = [_Part(0, size, axis.begin - most, axis.places + most - least, places - shifts + most, 0, is_strip=False)]
    for number, shift in enumerate(axis.shifts):  # B[v] with v = u + shift
        seen = min(max(shift, 0), size), min(max(axis.length + shift, 0), size)
        for first, end in ((0, seen[0]), (max(seen), size)):
            if end > first:
                at = first - shift + axis.begin
                parts.append(_Part(first, end - first, at, axis.places, places, number, is_strip=True))
    return parts


def _stretch(A: Tensor, number: int, at: int, length: int) -> Tensor:
    """A[at : at + length] along one axis, with zeros where there is nothing."""
    size = A.shape[number]
    first, end = min(max(at, 0), size), min(max(at + length, 0), size)
    before, behind = min(max(-at, 0), length), 0
    A = A.narrow(number, first, max(end - first, 0))
    behind = length - before - A.shape[number]
    if before or behind:
        A = F.pad(A, [*[0, 0] * (A.dim() - number - 1), before, behind])
    return A


def _products(A: Tensor, B: Tensor, offsets: Sequence[int]) -> Tensor:
    """(channels of B, channels of A, offsets): the sum over samples and v of A[v + offset] B[v]."""
    rows = len(B) * math.prod(B.shape[2:])
    if rows * A.shape[1] * math.prod(offsets) <= FEW:
        patches = A
        for axis, offset in enumerate(offsets, start=2):
            patches = patches.unfold(axis, offset, 1)
        patches = patches.movedim(1, 1 + len(offsets)).reshape(rows, -1)
        return (B.movedim(1, -1).reshape(rows, -1).T @ patches).view(B.shape[1], A.shape[1], *offsets)
    weight, ones = A.new_empty(B.shape[1], A.shape[1], *offsets), [1] * len(offsets)
    zeros, mask = [0] * len(offsets), [False, True, False]
    return torch.ops.aten.convolution_backward(B, A, weight, None, ones, zeros, ones, False, zeros, 1, mask)[1]
