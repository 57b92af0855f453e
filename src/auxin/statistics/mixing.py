"""Whether the hidden units between two layers keep to themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def mixing_of(made: Tensor, read: Tensor, channels: int) -> float | None:
    """The part of the gradient from what the consumer reads to what the producer made that comes from elsewhere.

    Once half of the places and once half of the channels of ``read`` are asked, with random signs; what then arrives
    at the other half of ``made`` comes from mixing, as in attention or under a LayerNorm.

    Args:
        made: output of the producer.
        read: input of the consumer, of the same shape, with the graph that it was computed by.
        channels: axis of the channels.

    Returns:
        The larger of the two parts, of the squared gradient; 1 where nothing of ``read`` comes from ``made``; None
        where the graph does not let itself be asked here.
    """
    if read is made:
        return 0.0
    worst = 0.0
    shape = [1] * read.dim()
    shape[channels] = read.shape[channels]
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, read.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(read)
    every_other = torch.arange(read.shape[channels], device=read.device) % 2 == 0
    places = read.movedim(channels, -1).shape[:-1]
    alternating = (torch.arange(places.numel(), device=read.device) % 2 == 0).reshape(places).unsqueeze(-1)
    masks = [every_other.reshape(shape).expand(read.shape), alternating.movedim(-1, channels).expand(read.shape)]
    for mask in masks:
        if bool(mask.all()):
            continue
        try:
            (found,) = torch.autograd.grad(read, made, signs * mask, retain_graph=True, allow_unused=True)
        except RuntimeError:  # inside a reentrant checkpoint, for one
            return None
        if found is None:
            return 1.0
        squares = found.square()
        total = float(squares.sum(dtype=torch.float64))
        if total:
            worst = max(worst, float(squares.masked_fill_(mask, 0).sum(dtype=torch.float64)) / total)
    return worst
