"""Gradients on a probe: always of everything that trains, as a full backward takes them.

Some CPU kernels of torch end the process where only a part of what they could differentiate is asked for. A training
step asks for all of it, and so does every gradient that is taken here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError
from auxin.listing import named_parameters
from auxin.record import HOOKS, hook_again, hooks_of
from auxin.sharded import is_spread


def gradients_of(
    loss: Tensor,
    module: nn.Module,
    named: Mapping[str, nn.Parameter] | None = None,
    whole: Collection[str] | None = None,
) -> dict[str, Tensor | None]:
    """The gradients of a scalar, on the side: every ``.grad`` stays what it is, and no hook of a tensor fires.

    Args:
        loss: a scalar that was computed with gradients on.
        module: the network, or the block, whose parameters are wanted.
        named: its parameters by name, where they are known.
        whole: names of those whose gradients are wanted entry by entry; of others they come ``in_one_number``, so that
            they are not in memory all at once. None: of all of them.

    Returns:
        The gradient of each parameter that requires one, by name; None where the loss does not depend on it.
    """
    parameters = named_parameters(module) if named is None else named
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    nodes = nodes_behind([loss])
    leaves = [node.variable for node in nodes if node.name().endswith("AccumulateGrad")]
    # Inside a reentrant activation checkpoint there are gradients in a plain backward only.
    # Under FSDP2 they arrive at the shards, which the graph does not hold.
    reentrant = any(node.name() == "CheckpointFunctionBackward" for node in nodes) or any(
        map(is_spread, wanted.values())
    )
    every = list({id(p): p for p in (*wanted.values(), *leaves)}.values())
    inside = set(map(id, leaves))  # the others get no gradient: most of a deep network whose proof begins late
    # Hooks of tensors are the training loop's: they log, clip, or step an optimizer inside the backward pass.
    hooks = [(p, kind, hooks_of(p, kind)) for p in every for kind in HOOKS if getattr(p, kind, None)]
    short = set() if whole is None or reentrant else wanted.keys() - set(whole)
    thin = [p for name, p in wanted.items() if id(p) in inside and name in short and type(p) is nn.Parameter]
    bare = [p for p in thin if p._backward_hooks is None]
    handles: list[Any] = []
    try:
        for p, kind, _ in hooks:
            hook_again(p, kind, None)
        handles += [p.register_hook(in_one_number) for p in thin]
        found = _by_backward(loss, every) if reentrant else torch.autograd.grad(loss, every, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for p in bare:
            p._backward_hooks = None
        for p, kind, held in hooks:
            hook_again(p, kind, held)
    by_id = {id(p): grad for p, grad in zip(every, found, strict=True)}
    return {name: by_id[id(p)] for name, p in wanted.items()}


def in_one_number(grad: Tensor) -> Tensor:
    """A gradient in the memory of one number: each of its entries is the root of the mean of all their squares.

    Its norm, its size, and whether it is zero are as they were. It stays as it is where this number would not tell
    (squares that vanish), where the processor would have to wait for it (other devices), and of coarse dtypes.
    """
    told = type(grad) is Tensor and grad.is_cpu and grad.layout is torch.strided and grad.numel() > 1
    if not told or grad.dtype not in (torch.float32, torch.float64):
        return grad
    mean = torch.linalg.vector_norm(grad) / grad.numel() ** 0.5
    return mean.expand(grad.shape) if bool(mean) or not bool(grad.any()) else grad


def differentiable(loss: Tensor) -> Tensor:
    """A loss that a step can be taken on.

    Raises:
        GrowthError: it has no gradient.
    """
    if not getattr(loss, "requires_grad", False):
        raise GrowthError(
            "Evidence: the loss has no gradient, so no step can be taken on it. Compute it from the network's outputs, "
            "without detach or no_grad, and leave something in the network that trains (requires_grad=True)."
        )
    return loss


def probe_loss(outputs: Iterable[Tensor]) -> Tensor | None:
    """A scalar in which every floating number of a network's outputs has a random weight; None without a gradient."""
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in outputs]
    floating = [t for t in parts if t.is_floating_point() and t.requires_grad]
    generator = torch.Generator().manual_seed(3)
    weighted = [(t * torch.randn(t.shape, generator=generator).to(t)).sum().float() for t in floating]
    return torch.stack(weighted).sum() if weighted else None


def nodes_behind(outputs: Iterable[Tensor]) -> set[Any]:
    """The nodes of the autograd graph that these tensors come from. Keep the tensors for as long as the nodes."""
    held = list(outputs)  # without them a node of a Python function may end while it is looked at (before torch 2.13)
    left = [t.grad_fn for t in held if t.grad_fn is not None]
    found: set[Any] = set()
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [parent for parent, _ in node.next_functions]
    return found


def _by_backward(loss: Tensor, every: list[Any]) -> list[Tensor | None]:
    own = [p.grad for p in every]
    try:
        for p in every:
            p.grad = None
        loss.backward()
        return [p.grad for p in every]
    finally:
        for p, grad in zip(every, own, strict=True):
            p.grad = grad
