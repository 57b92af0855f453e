"""The network with other weights: what holds there too lies in its forward, and not in the weights of the moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set

import torch
from torch import Tensor, nn

from auxin.anatomy.gradients import gradients_of
from auxin.anatomy.probe import PlanContext, tensors_in, untouched
from auxin.anatomy.tree import parts, registrations
from auxin.anatomy.zero_init import copy_of
from auxin.fsdp2 import is_unit
from auxin.randomness import random_state

TRIES = 16


def run_with_other_weights(context: PlanContext, paths: Iterable[str]) -> set[str]:
    """Which of these modules run on the probe with other weights, or run at times: an expert, a block that is dropped.

    What forward never comes to (a plain list beside the container, a stored depth) runs with no weights at all.
    """
    left, found = set(paths), set[str]()
    for network in _shaken(context, TRIES if left else 0, buffers=True):
        times = registrations(network.modules())
        for path in left:
            for part in parts(network.get_submodule(path), times):
                part.register_forward_hook(lambda *_, path=path: found.add(path))
        try:
            with torch.no_grad():
                context.run_of(network)
        except Exception:  # other weights may lead to what forward does not take
            continue
        if left <= found:
            break
    return found


def multiplied_by_zero(context: PlanContext, names: Iterable[str]) -> bool:
    """Whether the outputs depend on these parameters, and no weights of any layer let a gradient through to them.

    Then something that is no parameter multiplies what they give by zero: a fade-in that has not begun, a mask.
    """
    joined = False
    for network in _shaken(context, 3, buffers=False):
        grads = _gradients(network, context)
        found = [grad for name in names if (grad := grads.get(name)) is not None]
        if any(bool(grad.to_dense().any()) for grad in found):
            return False
        joined = joined or bool(found)
    return joined


def asleep(context: PlanContext, new: Mapping[str, Tensor]) -> bool:
    """Whether new entries that get no gradient would get one with other weights in place of those that move: a ReLU
    that is off on this probe, or a gain that still stands at zero (the last norm of a block of a ResNet, as it is
    built), and not two factors of a product that are both zero and stay so.

    Args:
        context: holds the probe.
        new: by name of a parameter, which of its entries are new.
    """
    if is_unit(context.model):
        return True  # for all that is known: other weights are tried in a copy, which would gather all of it
    with untouched(context.model):
        now = _gradients(context.model, context)
    moving = {name for name, grad in now.items() if grad is not None and bool(grad.to_dense().any())}
    for network in _shaken(context, TRIES, buffers=False, zeros=(new, moving)):
        grads = _gradients(network, context)
        for name, mask in new.items():
            grad = grads.get(name)
            if grad is not None and bool(grad.to_dense()[mask.to(grad.device)].any()):
                return True
    return False


def _gradients(network: nn.Module, context: PlanContext) -> Mapping[str, Tensor | None]:
    """Of the squares of all outputs on the probe; none where the network does not run with these weights."""
    try:
        with torch.enable_grad():
            out = [t for t in tensors_in(context.run_of(network)) if t.is_floating_point() and t.requires_grad]
            return gradients_of(torch.stack([t.float().square().sum() for t in out]).sum(), network) if out else {}
    except Exception:  # other weights may lead to what forward does not take
        return {}


def _shaken(
    context: PlanContext, tries: int, buffers: bool, zeros: tuple[Mapping[str, Tensor], Set[str]] | None = None
) -> Iterator[nn.Module]:
    """A copy of the network in eval mode, with drawn weights, again and again.

    With ``zeros``, which entries are new and which parameters move, entries that are zero stay so, but for old ones of
    parameters that move.
    """
    network: nn.Module | None = None
    for seed in range(tries):
        try:
            network = copy_of(context.model) if network is None else network
        except Exception:  # whatever a user's __deepcopy__ raises
            return
        with random_state(seed), torch.no_grad():
            for module in network.modules():
                module.training = False
            for name, p in network.named_parameters():
                if p.is_floating_point():
                    drawn = torch.randn(p.shape) / max(1, p[0].numel() if p.dim() > 1 else 4) ** 0.5
                    drawn = drawn + (0.5 if p.dim() < 2 else 0.0)
                    p.copy_(drawn if zeros is None else drawn.to(p) * ~_stay_zero(name, p, *zeros))
            for b in network.buffers() if buffers else ():
                if b.is_floating_point():
                    b.copy_(0.1 + torch.rand(b.shape))
            yield network


def _stay_zero(name: str, p: Tensor, new: Mapping[str, Tensor], moving: Set[str]) -> Tensor:
    """Bool: which entries are zero and will be after a step too, as far as is known."""
    if name not in moving:
        return p == 0
    return (p == 0) & new[name].to(p.device) if name in new else torch.zeros_like(p, dtype=torch.bool)
