"""Networks whose weights are masked so that an output depends on some inputs only, as in autoregressive flows (MADE).

A layer without a mask in their middle mixes what the masks keep apart, and no shape and no output says so. So it is
asked of the network: which inputs reach which outputs, before a growth and after it with the new weights moved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auxin.anatomy.probe import PlanContext, taken, tensors_in, untouched
from auxin.gate import set_gate

UNSEEN = (
    "{} masks its weight; what the masks keep apart could not be looked at (no floating inputs, or others than before)"
)
OUTPUTS = 16  # numbers of a sample's output that are asked for, spread evenly


def masked(modules: Mapping[str, nn.Module]) -> str:
    """Path and class of the first module with a buffer of zeros and ones for each entry of its weight, or "".

    Pruned layers have such a buffer too (beside ``weight_orig``); what they keep apart is no matter.
    """
    for path, module in modules.items():
        for leaf, p in module._parameters.items() if module._buffers else ():
            for mask in module._buffers.values() if p is not None and not leaf.endswith("_orig") else ():
                if mask is not None and p is not None and mask.shape == p.shape and mask.dim() > 1:
                    if bool(((mask == 0) | (mask == 1)).all()) and not bool(mask.all()):
                        return f"{path} ({type(module).__name__})"
    return ""


def reaching(context: PlanContext, moved: Collection[str] = (), gates: Collection[str] = ()) -> Tensor | None:
    """Which inputs of a sample reach which of its outputs on the probe, as gradients tell: (outputs, inputs), boolean.

    Args:
        context: the network on the probe.
        moved: names of parameters that are moved at random first, since zeros hide what they will let through.
        gates: paths of blocks that are to be faded in as far as they will be.

    Returns:
        None where the probe has no floating inputs, or the network no floating output with a batch in front.
    """
    model, generator = context.model, torch.Generator().manual_seed(6)
    args, kwargs = taken(context.batch, {})
    inputs = [t.requires_grad_() for t in tensors_in((args, kwargs)) if t.is_floating_point() and t.dim() > 1]
    if not inputs:
        return None
    with untouched(model), torch.enable_grad():
        for path in gates:
            set_gate(model.get_submodule(path), 1.0)
        own = dict(model.named_parameters())
        noise = {name: torch.randn(own[name].shape, generator=generator).to(own[name]) for name in moved}
        found = tensors_in(functional_call(model, {n: own[n].detach() + 0.3 * noise[n] for n in noise}, args, kwargs))
        output = next((t for t in found if t.requires_grad and t.dim() > 1), None)
        if output is None:
            return None
        flat = output.flatten(1)
        every = [*inputs, *(p for name, p in own.items() if p.requires_grad and name not in noise)]
        rows = []
        for column in torch.linspace(0, flat.shape[1] - 1, min(OUTPUTS, flat.shape[1])).round().long().tolist():
            grads = torch.autograd.grad(flat[:, column].sum(), every, retain_graph=True, allow_unused=True)
            pairs = zip(inputs, grads[: len(inputs)], strict=True)
            reached = [torch.zeros_like(t) if g is None else g for t, g in pairs]
            rows.append(torch.cat([(g != 0).flatten(1).any(0) for g in reached]))
        return torch.stack(rows)


def order_lost(
    context: PlanContext, before: Tensor | None, moved: Collection[str], gates: Collection[str] = ()
) -> bool | None:
    """Whether an input reaches an output that it did not reach ``before``; None where that cannot be looked at."""
    after = None if before is None else reaching(context, moved, gates)
    if before is None or after is None or after.shape != before.shape:
        return None
    return bool((after & ~before).any())
