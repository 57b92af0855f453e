"""Sums over rows, and the second moments that they come to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from auxin.errors import GrowthError
from auxin.statistics.lags import Axis, between_patches, correlated, times_patches, with_patches
from auxin.statistics.places import Pair, Proposal, Site
from auxin.statistics.rows import Geometry

WORKSPACE = 64 * 2**20  # bytes of rows that are looked at at once
ROWS = 4096  # whose products gather in float32


@dataclass(frozen=True, eq=False)
class PairMoments:
    """Second moments at a pair of layers: sums over places, means over samples, in float64.

    With i features of X and n of H (the one for a bias included, where the layer has one), o outputs of the consumer
    and K places of its kernel (1 for a Linear). Where K > 1, D is what each place of the kernel asks of the hidden unit
    that it reads, and columns are ordered (place, output).

    Attributes:
        pair: the layers.
        samples: N, seen with a gradient.
        kernel: K.
        biased: whether X, and whether H, ends with a column of ones.
        S_X: X^T X / N, (i, i); None where the pair has no producer.
        S_H: H^T H / N, (n, n); None where the pair is direct.
        S_XH: X^T H / N, (i, K n); None without a producer, or where the pair is direct.
        M: X^T D / N, (i, K o); None without a producer.
        M_H: H^T D / N, (n, o). Minus the gradient of the loss by the consumer's weights and bias, transposed. None
            where the pair is direct and has a producer.
        S_D: D^T D / N, (o, o); for a pair without a producer that is not direct.
        M_new: s(X A)^T D / N, (k, K o), for a proposal (A, s); None without one.
        rank: how many rows of X there were, and of H.
        mixing: the part of the gradient between hidden units (squared) that comes from other places or channels than
            their own; None: not looked at.
        tolerance: below which, relative to the largest, an eigenvalue is rounding.
    """

    pair: Pair
    samples: int
    kernel: int
    biased: tuple[bool, bool]
    S_X: Tensor | None
    S_H: Tensor | None
    S_XH: Tensor | None
    M: Tensor | None
    M_H: Tensor | None
    S_D: Tensor | None
    M_new: Tensor | None
    rank: tuple[int, int]
    mixing: float | None
    tolerance: float

    def hidden(self, call: str) -> tuple[Tensor, Tensor]:
        """S_H and M_H.

        Raises:
            GrowthError: the pair is direct.
        """
        if self.S_H is None or self.M_H is None:
            raise GrowthError(f"{call}: {self.pair} leaves out what the consumer reads; take it without direct=True.")
        return self.S_H, self.M_H

    def whole(self, call: str) -> tuple[Tensor, Tensor]:
        """S_X and M.

        Raises:
            GrowthError: the pair has no producer, or more than an elementwise function stands between its layers.
        """
        if self.S_X is None or self.M is None:
            raise GrowthError(
                f"{call}: {self.pair} has no producer, so nothing is known of what new units could read. Take "
                f"Pair(producer, {self.pair.consumer!r})."
            )
        if self.mixing is not None and self.mixing > MIXED:
            raise GrowthError(
                f"{call}: between {self.pair.producer} and {self.pair.consumer} hidden units mix with other places or "
                f"channels ({self.mixing:.0%} of the gradient, as in attention), so X^T D / N is not the gradient of a "
                f"unit. Pair(None, {self.pair.consumer!r}) says what the second layer alone can gain, and Site(path) "
                "what a layer behind could."
            )
        return self.S_X, self.M


MIXED = 0.05  # between units that keep to themselves it is 0, through a batch's norm about 1 / rows


@dataclass(frozen=True, eq=False)
class SiteMoments:
    """Second moments behind a module: sums over places, means over samples, in float64, for c channels.

    Attributes:
        site: the place.
        samples: N.
        S: X^T X / N, (c, c), of what comes out there.
        M: X^T D / N, (c, c); minus the transposed gradient of the loss by P in x + P x.
        S_D: D^T D / N, (c, c).
        rows: of X.
        tolerance: below which, relative to the largest, an eigenvalue is rounding.
    """

    site: Site
    samples: int
    S: Tensor
    M: Tensor
    S_D: Tensor
    rows: int
    tolerance: float


@dataclass(eq=False)
class Sums:
    """Sums of products of rows, by name. ``product`` takes rows in pieces, so that memory stays bounded.

    Products of float32 rows gather in float32, as one product of more rows would, and go to the float64 sums every
    ``ROWS`` rows: a float64 sum after each small step would cost more than its products.

    Attributes:
        sums: by name, float64; ``settle`` brings them up to date.
        samples: N so far.
        rows: of X and of H so far.
        mixing: see ``PairMoments``.
    """

    sums: dict[str, Tensor]
    samples: int = 0
    rows: list[int] = field(default_factory=lambda: [0, 0])
    mixing: float | None = None
    tolerance: float = 1e-6
    recent: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    @classmethod
    def zeros(cls, shapes: dict[str, tuple[int, ...]], device: torch.device) -> Sums:
        """Of these shapes."""
        return cls({name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()})

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add left^T right, over all axes but the last, if it is asked for."""
        if name not in self.sums:
            return
        left, right = left.flatten(0, -2), right.flatten(0, -2)
        self._gathered(name, left.dtype, len(left)).addmm_(left.T, right)
        self._settle_if_many(name)

    def add(self, name: str, found: Tensor, rows: int) -> None:
        """Add a sum of products of so many rows."""
        self._gathered(name, found.dtype, rows).add_(found)
        self._settle_if_many(name)

    def _gathered(self, name: str, dtype: torch.dtype, rows: int) -> Tensor:
        """Where so many rows of this dtype are to be added."""
        if dtype == torch.float64:
            return self.sums[name]
        recent, known = self.recent.get(name) or (torch.zeros_like(self.sums[name], dtype=dtype), 0)
        self.recent[name] = recent, known + rows
        return recent

    def _settle_if_many(self, name: str) -> None:
        if self.recent.get(name, (None, 0))[1] >= ROWS:
            self._settle(name)

    def settle(self) -> dict[str, Tensor]:
        """The sums, with all that was added so far."""
        for name in self.recent:
            self._settle(name)
        return self.sums

    def _settle(self, name: str) -> None:
        recent, _ = self.recent[name]
        self.sums[name] += recent
        self.recent[name] = recent.zero_(), 0


def pair_shapes(
    producer: Geometry | None, consumer: Geometry, proposal: Proposal | None, direct: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the sums of a pair."""
    n, o, K = consumer.features, consumer.outputs, consumer.places
    shapes: dict[str, tuple[int, ...]] = {} if direct else {"S_H": (n, n), "M_H": (n, o)}
    if producer is None:
        shapes |= {"M_H": (n, o)} if direct else {"S_D": (o, o)}
    else:
        i = producer.features
        shapes |= {"S_X": (i, i), "M": (i, K * o)} | ({} if direct else {"S_XH": (i, K * n)})
        if proposal is not None:
            shapes["M_new"] = (proposal.A.shape[1], K * o)
    return shapes


def bytes_of(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Of sums of these shapes over rows of this dtype."""
    return sum((8 if dtype == torch.float64 else 12) * math.prod(shape) for shape in shapes.values())


def add_pair(
    sums: Sums,
    layers: tuple[Geometry | None, Geometry],
    tensors: tuple[Tensor | None, Tensor, Tensor],
    proposal: Proposal | None,
) -> None:
    """Add one call of a pair: (input of the producer, input of the consumer, D at the consumer's output)."""
    producer, consumer = layers
    if consumer.slides and (producer is None or producer.slides):
        add_sliding_pair(sums, layers, tensors, proposal)
        return
    per_sample = 8 * sum(t[0].numel() for t in tensors if t is not None) * consumer.places
    per_sample *= 1 if producer is None else producer.places
    for x, h, d in _pieces(tensors, max(1, WORKSPACE // max(1, per_sample))):
        D = consumer.made(d)
        H = consumer.read(h) if sums.sums.keys() & {"S_H", "M_H"} else None
        if H is not None:
            sums.rows[1] += H.shape[0] * H.shape[1]
            sums.product("S_H", H, H)
            sums.product("M_H", H, D)
        sums.product("S_D", D, D)
        if producer is None:
            continue
        X = producer.read(x)
        sums.product("S_X", X, X)
        sums.rows[0] += X.shape[0] * X.shape[1]
        if consumer.kernel:
            D = consumer.brought_back(D.unflatten(1, d.shape[2:]), h.shape[2:]).flatten(2)
            if H is not None:
                H = consumer.brought_back(H.unflatten(1, d.shape[2:]), h.shape[2:]).flatten(2)
        if H is not None:
            sums.product("S_XH", X, H)
        sums.product("M", X, D)
        if proposal is not None:
            sums.product("M_new", proposal.activation(X @ proposal.A.to(X)), D)


def add_sliding_pair(
    sums: Sums,
    layers: tuple[Geometry | None, Geometry],
    tensors: tuple[Tensor | None, Tensor, Tensor],
    proposal: Proposal | None,
) -> None:
    """``add_pair`` between convolutions that go on by one place at a time: no patches are written down."""
    producer, consumer = layers
    wanted = sums.sums.keys()
    per_sample = 8 * sum(t[0].numel() for t in tensors if t is not None)
    per_sample *= consumer.places if "S_XH" in wanted else 1
    for x, h, d in _pieces(tensors, max(1, WORKSPACE // max(1, per_sample))):
        ends, rows = d.shape[2:], d[:, 0].numel()
        if wanted & {"S_H", "M_H"}:
            sums.rows[1] += rows
        if "S_H" in wanted:
            sums.add("S_H", between_patches(consumer, h, ends), rows)
        if "M_H" in wanted:
            sums.add("M_H", with_patches(consumer, h, ends, d, [(0,)] * len(ends)), rows)
        if "S_D" in wanted:
            outputs = consumer.made(d)
            sums.product("S_D", outputs, outputs)
        if producer is None:
            continue
        assert x is not None
        places, rows = h.shape[2:], h[:, 0].numel()
        shifts = [
            tuple(pad - at for at in range(n)) for n, (pad, _) in zip(consumer.kernel, consumer.padding, strict=True)
        ]
        sums.rows[0] += rows
        sums.add("S_X", between_patches(producer, x, places), rows)
        sums.add("M", with_patches(producer, x, places, d, shifts), rows)
        if "S_XH" in wanted:
            H = consumer.read(h).unflatten(1, ends).movedim(-1, 1)
            sums.add("S_XH", with_patches(producer, x, places, H, shifts), rows)
        if proposal is not None:
            made = proposal.activation(times_patches(producer, x, proposal.A))
            axes = [Axis(n, 0, 1, shift) for n, shift in zip(places, shifts, strict=True)]
            sums.add("M_new", correlated(made, d, axes).flatten(2).flatten(0, 1), rows)


def _pieces(tensors: tuple[Tensor | None, ...], size: int) -> Iterator[list[Tensor]]:
    length = next(len(t) for t in reversed(tensors) if t is not None)
    for begin in range(0, length, size):
        yield [t if t is None else t[begin : begin + size] for t in tensors]  # type: ignore[misc]


def add_site(sums: Sums, rows: Tensor, wanted: Tensor) -> None:
    """Add one call of a site: what came out, and what the loss asks of it, channels last."""
    sums.product("S", rows, rows)
    sums.product("M", rows, wanted)
    sums.product("S_D", wanted, wanted)
    sums.rows[0] += rows.shape[:-1].numel()


def pair_moments(pair: Pair, sums: Sums, layers: tuple[Geometry | None, Geometry], samples: int) -> PairMoments:
    """The means."""
    producer, consumer = layers
    means = {name: total / samples for name, total in sums.settle().items()}
    return PairMoments(
        pair,
        samples,
        consumer.places,
        (producer is not None and producer.bias, consumer.bias),
        means.get("S_X"),
        means.get("S_H"),
        means.get("S_XH"),
        means.get("M"),
        means.get("M_H"),
        means.get("S_D"),
        means.get("M_new"),
        (sums.rows[0], sums.rows[1]),
        sums.mixing,
        sums.tolerance,
    )
