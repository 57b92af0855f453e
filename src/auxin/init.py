"""Named ways to start the weights of a new module. Each is a plain function that writes into the module it is given.

A user's own is any importable function ``f(module) -> None``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError


def default(module: nn.Module) -> None:
    """Leave every tensor as the layer's constructor made it."""


def zero(module: nn.Module) -> None:
    """Set every parameter to zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()


def kaiming(module: nn.Module) -> None:
    """Weights uniform with variance 2 / fan_in, biases 0, gains 1 (He et al. 2015, arXiv:1502.01852)."""
    _by_rule(module, lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"))


def xavier(module: nn.Module) -> None:
    """Weights uniform with variance 2 / (fan_in + fan_out), biases 0, gains 1 (Glorot and Bengio 2010)."""
    _by_rule(module, nn.init.xavier_uniform_)


def identity(module: nn.Module) -> None:
    """Make every Linear the identity matrix and every convolution a Dirac kernel, biases 0 (Net2Net, arXiv:1511.05641).

    Raises:
        GrowthError: nothing in the module can be an identity (unequal widths, grouped or strided or unpadded kernels).
    """
    found = 0
    with torch.no_grad():
        for name, inner in module.named_modules():
            if isinstance(inner, nn.Linear):
                _require(inner.in_features == inner.out_features, name, inner)
                inner.weight.copy_(torch.eye(inner.in_features, dtype=inner.weight.dtype))
            elif isinstance(inner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                _require(_keeps_shape(inner), name, inner)
                inner.weight.zero_()
                centre = tuple(k // 2 for k in inner.kernel_size)
                width = inner.in_channels // inner.groups
                for out in range(inner.out_channels):
                    inner.weight[(out, out % width, *centre)] = 1
            else:
                continue
            found += 1
            if inner.bias is not None:
                inner.bias.zero_()
    if not found:
        raise GrowthError(
            f"init='identity': {type(module).__name__} holds no Linear or convolution that could be an identity. "
            "init='default', 'kaiming' or 'xavier' would run."
        )


NAMED = {"default": default, "zero": zero, "kaiming": kaiming, "xavier": xavier, "identity": identity}


def _keeps_shape(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    same = all(k % 2 == 1 for k in conv.kernel_size) and all(s == 1 for s in conv.stride)
    padding = conv.padding
    if isinstance(padding, str):
        padded = padding == "same"
    else:
        spans = zip(conv.kernel_size, conv.dilation, padding, strict=True)
        padded = all(2 * pad == dilation * (k - 1) for k, dilation, pad in spans)
    return same and padded and conv.in_channels == conv.out_channels


def _require(holds: bool, name: str, module: nn.Module) -> None:
    if not holds:
        where = f"{name}: " if name else ""
        raise GrowthError(
            f"init='identity': {where}{module} changes the shape of what it is given, so it cannot be an identity. "
            "init='default', 'kaiming' or 'xavier' would run."
        )


def _by_rule(module: nn.Module, rule: Callable[[Tensor], Any]) -> None:
    norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    with torch.no_grad():
        for inner in module.modules():
            for name, p in inner.named_parameters(recurse=False):
                if p.dim() >= 2 and not isinstance(inner, norms):
                    rule(p)
                elif "bias" in name:
                    p.zero_()
                elif isinstance(inner, norms):
                    _fill_one(p)


def _fill_one(p: Tensor) -> None:
    p.fill_(1.0)
