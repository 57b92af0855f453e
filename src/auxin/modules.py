"""The modules of ours that a network may hold: ``Dormant``, for a while, ``ResidualLinear`` and ``Mixture``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from auxin.errors import GrowthError


class Dormant(nn.Module):
    """A layer that is built in, and sleeps until ``Wake`` switches it on; until then its place is the identity.

    The layer is frozen and never called: no gradient, no optimizer state, no weight decay, no time. It is in the
    ``state_dict``, as ``<name>.layer.weight``; once it is awake as ``<name>.weight``. Give the optimizer all parameters
    or only those that train: both are right.

    A parameter that was frozen before stays frozen when the layer wakes; so does a Dormant layer inside this one.
    A tensor that is tied to a living layer must be tied after this, since it would be frozen there too.

    Args:
        layer: the ready layer, on any device. It is changed in place: ``requires_grad`` off, gradients dropped.

    Attributes:
        layer: the layer.
        trainable: names of its parameters that train once it is awake.

    Raises:
        GrowthError: this is no module, is dormant already, or has no shapes yet (lazy layers).

    Examples:
        >>> import torch
        >>> sleeping = Dormant(nn.Linear(20, 40))
        >>> sleeping(torch.ones(2, 20)).shape
        torch.Size([2, 20])
        >>> any(p.requires_grad for p in sleeping.parameters())
        False
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        if not isinstance(layer, nn.Module):
            raise GrowthError(
                f"Dormant(layer): layer is a {type(layer).__name__}; pass a ready module: Dormant(nn.Linear(20, 40))."
            )
        if isinstance(layer, Dormant):
            raise GrowthError("Dormant(layer): the layer is dormant already; wrap the layer itself, once.")
        if any(is_lazy(t) for t in (*layer.parameters(), *layer.buffers())):
            raise GrowthError(
                "Dormant(layer): it has lazy layers, which get their shapes in their first forward, and this one does "
                "not run. Write the sizes out: Dormant(nn.Linear(20, 40))."
            )
        self.trainable = tuple(name for name, p in layer.named_parameters() if p.requires_grad)
        self.layer = layer.requires_grad_(False)
        for p in layer.parameters():
            p.grad = None  # an optimizer would decay, and move, whatever has a gradient, even one of zeros

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument; whatever else the layer takes is ignored."""
        return args[0] if args else next(iter(kwargs.values()))


class ResidualLinear(nn.Module):
    """``x + P x`` along one axis, with ``P`` zero at first: the identity, bit for bit, wherever it stands.

    Args:
        features: size of the axis.
        axis: the channels: -1 behind linear layers (..., C), 1 behind convolutions (N, C, ...).

    Attributes:
        weight: ``P``, features x features.

    Source: layer addition by a residual whose last layer is zero, Gesmundo and Dean (arXiv:2205.12755).

    Examples:
        >>> layer = ResidualLinear(8, axis=1)
        >>> x = torch.randn(2, 8, 5, 5)
        >>> bool((layer(x) == x).all())
        True
    """

    def __init__(self, features: int, axis: int = -1):
        super().__init__()
        self.features, self.axis = features, axis
        self.weight = nn.Parameter(torch.zeros(features, features))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape, dtype and layout of ``x``."""
        change = nn.functional.linear(x.movedim(self.axis, -1), self.weight.to(x.dtype))
        out = x + change.movedim(-1, self.axis)
        if torch.compiler.is_compiling() or out.stride() == x.stride() or not _is_slice(x):
            return out
        # Laid out as the slice was: what follows may run another kernel otherwise, which rounds otherwise.
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(out)

    def extra_repr(self) -> str:
        """What it was built with."""
        return f"{self.features}, axis={self.axis}"


class Mixture(nn.Module):
    """A mixture of experts: for each row a router chooses ``top_k``, and what they return is summed up by weight.

    The weights are the router's softmax, divided by the sum of those that are chosen. Nothing is dropped.

    Args:
        expert: makes one: a class, or a function or ``functools.partial`` without arguments left.
        width: entries of a row (the last axis).
        experts: how many.
        top_k: how many of them each row is given to.
        renormalise: whether the weights are divided by their sum; where they are not, copies of one module give less
            than the module.

    Attributes:
        router: a Linear without a bias, whose weights are drawn from N(0, 0.02) as for sparse upcycling.
        experts: a ModuleList.

    Source: sparse upcycling, arXiv:2212.05055.

    Examples:
        >>> import functools
        >>> Mixture(functools.partial(nn.Linear, 8, 8), 8, experts=4)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self, expert: Callable[[], nn.Module], width: int, experts: int, top_k: int = 2, renormalise: bool = True
    ):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise GrowthError(f"Mixture(experts={experts}, top_k={top_k}): choose from 1 to all of the experts.")
        self.top_k, self.renormalise = top_k, renormalise
        self.router = nn.Linear(width, experts, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.experts = nn.ModuleList(expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows).softmax(-1).topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            if len(row):
                out = out.index_add(0, row, (weights[row, place, None] * expert(rows[row])).to(out.dtype))
        return out.view_as(x)


def awake(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below ``module``, itself included, without those that only Dormant layers hold."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            if not isinstance(current, Dormant):
                waiting += [child for child in current._modules.values() if child is not None]


def _is_slice(x: Tensor) -> bool:
    """Whether no two entries share memory, though there may be gaps between them."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent += stride * (size - 1)
    return True
