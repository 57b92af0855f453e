"""Which tensors of a block must be zero so that it returns its input: solved numerically, with no names in the code.

The solver zeroes every parameter of a noised copy, checks that the block then is the identity, and gives the tensors
back one at a time in the order in which they are used; those whose return breaks the identity are the last writers.
Why noised: a tensor that happens to be zero at the start would not be found. Source: LLaMA Pro (Wu et al. 2024,
arXiv:2401.02415) zeroes output projections by name; this finds them for any block.

A norm behind a zeroed tensor divides by the root of its eps, so that the first gradient comes out many times too
large. Then the norm's gain is closed instead. A gain that is stored as w is found by the solver itself, since it is
used later; one that is stored as 1 + w is closed at -1 and is looked for afterwards.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.gradients import gradients_of, nodes_behind
from auxin.anatomy.probe import Call, tensors_in
from auxin.dynamo import kept_in_copies
from auxin.listing import modules_in, named_parameters
from auxin.randomness import random_state

NOISE = 0.02
TOLERANCE = 1e-6
AMPLIFIED = 5.0  # times the gradient of the same tensor in the block as it was: from here on a norm amplifies it


def arriving(call: Call) -> tuple[Tensor, str | int] | None:
    """The first floating tensor that a module was given, and where it stands: position or keyword."""
    for index, value in enumerate(call.args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, index
    for name, value in call.kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, name
    return None


def with_input(call: Call, x: Tensor) -> Call:
    """The same call with another first floating tensor."""
    found = arriving(call)
    if found is None:
        return call
    args, kwargs = list(call.args), dict(call.kwargs)
    if isinstance(found[1], int):
        args[found[1]] = x
    else:
        kwargs[found[1]] = x
    return Call(tuple(args), kwargs, None, kept=call.kept)


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of an output."""
    return next(tensors_in(output), None)


def is_identity(block: nn.Module, call: Call, tolerance: float = TOLERANCE) -> bool:
    """Whether ``block`` returns its first floating input, on this call and on one with that input rescaled at random.

    The second input is multiplied by values between 0.5 and 1.5, which keeps the range of a ReLU or a softplus.
    """
    found = arriving(call)
    if found is None:
        return False
    x = found[0]
    generator = torch.Generator().manual_seed(0)
    scale = 0.5 + torch.rand(x.shape, generator=generator)
    with torch.no_grad():
        for value in (x, x * scale.to(x)):
            out = first_tensor(with_input(call, value).run(block))
            if out is None or out.shape != value.shape or not out.is_floating_point():
                return False
            limit = tolerance * max(1.0, float(value.abs().max())) if value.numel() else 0.0
            if not bool(((out - value).abs() <= limit).all()):
                return False
    return True


def is_finite(block: nn.Module, call: Call) -> bool:
    """Whether ``block`` returns finite numbers."""
    with torch.no_grad():
        out = first_tensor(call.run(block))
    return out is not None and bool(out.isfinite().all())


def _blows_up(twin: nn.Module, call: Call, name: str, values: dict[str, Tensor]) -> bool:
    """Whether zeroing this one tensor alone divides by zero, as the direction of a weight norm does."""
    parameters = named_parameters(twin)
    for other, p in parameters.items():
        p.zero_() if other == name else p.copy_(values[other])
    return not is_finite(twin, call)


def scratch(block: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters and running statistics are moved by noise, to hide nothing."""
    twin = copy_of(block)
    generator = torch.Generator().manual_seed(1)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        for p in twin.parameters():
            if p.is_floating_point():
                p.add_(NOISE * noise(p))
        for module in _still(twin).modules():
            mean, var = module._buffers.get("running_mean"), module._buffers.get("running_var")
            if mean is not None and var is not None:
                mean.add_(0.1 * noise(mean))
                var.mul_(1 + 0.3 * noise(var).abs())
    return twin


def _still(twin: nn.Module) -> nn.Module:
    """In eval mode, without a word to methods of the user's."""
    for module in twin.modules():
        module.training = False
    return twin


def copy_of(block: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy that also takes blocks holding computed tensors (old-style ``weight_norm``)."""
    memo = {**kept_in_copies(block), **(memo or {})}
    for module in modules_in(block):
        for value in module.__dict__.values():
            if type(value) is OrderedDict:
                if not value:  # of hooks, a dozen in each module: deepcopy takes ten times as long to make another
                    memo.setdefault(id(value), OrderedDict())
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(block, memo)


def order_of_use(block: nn.Module, call: Call) -> list[str]:
    """Names of the block's parameters by first use in the autograd graph; those without a use come last."""
    names = {id(p): name for name, p in named_parameters(block).items()}
    with torch.enable_grad():
        for p in block.parameters():
            p.requires_grad_(p.is_floating_point())
        outputs = list(tensors_in(call.run(block)))
        nodes = nodes_behind(outputs)
    use: dict[str, int] = {}
    for node in nodes:
        for parent, _ in node.next_functions:
            name = names.get(id(getattr(parent, "variable", None)))
            if name is not None:
                use[name] = min(use.get(name, node._sequence_nr()), node._sequence_nr())
    last = max(use.values(), default=0) + 1
    return sorted(names.values(), key=lambda name: use.get(name, last))


def last_writers(block: nn.Module, call: Call) -> dict[str, float] | None:
    """The constants that make ``block`` the identity: 0, or -1 for the gain of a norm that is stored as 1 + w.

    Args:
        block: a module whose first output has the shape of its first floating input.
        call: what arrives at it.

    Returns:
        Constant by name of the tensor, the minimal set in order of use; empty where the block is the identity already,
        None where no zeroing makes it one.
    """
    with random_state(seed=0):
        zeroed = fewest_zeros(block, call)
        if not zeroed:
            return None if zeroed is None else {}
        plain = dict.fromkeys(zeroed, 0.0)
        ratios = amplification(block, call, plain)
        call.amplified = block, plain, ratios  # whoever warns of norms asks for them again
        hot = tuple(name for name, ratio in ratios.items() if ratio > AMPLIFIED)
        closed = _with_gains(block, call, zeroed, hot) if hot else plain
        if closed != plain and max((ratios := amplification(block, call, closed)).values()) <= AMPLIFIED:
            call.amplified = block, closed, ratios
            return closed
        return plain


def amplification(block: nn.Module, call: Call, constants: Mapping[str, float]) -> dict[str, float]:
    """Gradient norm of each tensor once all have their constant, over what it is in the block as it stands.

    The same random direction at the output, in eval mode. Infinite where the block as it stands has no gradient there.
    """
    twin = _still(copy_of(block))
    before = gradients(twin, call, tuple(constants))
    set_constants(twin, constants)
    after = gradients(twin, call, tuple(constants))
    pairs = {name: (float(after[name].norm()), float(before[name].norm())) for name in constants}
    return {name: new / old if old else float("inf") for name, (new, old) in pairs.items()}


def amplified_by_a_norm(block: nn.Module, call: Call, constants: Mapping[str, float]) -> dict[str, float]:
    """Those zeroed tensors whose gradient starts too large because a norm follows them, with the factor."""
    with random_state(seed=0):
        known = call.amplified
        same = known is not None and known[0] is block and known[1] == constants
        ratios = known[2] if known is not None and same else amplification(block, call, constants)
        hot = tuple(name for name, ratio in ratios.items() if AMPLIFIED < ratio < float("inf"))
        return {name: ratios[name] for name in hot} if hot and _scale_vanishes(block, call, hot) else {}


def gradients(block: nn.Module, call: Call, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradient of the named tensors for a fixed random direction at the output; zeros where none arrives."""
    parameters = named_parameters(block)
    none = {name: torch.zeros(parameters[name].shape, device=parameters[name].device) for name in names}
    floating = [name for name in names if parameters[name].is_floating_point()]  # not those of a quantized layer
    wanted = [parameters[name].requires_grad_() for name in floating]
    with torch.enable_grad(), random_state(seed=0):
        out = first_tensor(call.run(block))
        if out is None or not out.requires_grad or not wanted:
            return none
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        found = gradients_of((out * direction).sum(), block)
    return none | {name: grad.to_dense() for name in floating if (grad := found[name]) is not None}


def set_constants(module: nn.Module, constants: Mapping[str, float]) -> None:
    """Fill each named tensor with its constant."""
    parameters = named_parameters(module)
    with torch.no_grad():
        for name, value in constants.items():
            parameters[name].fill_(value)


def fewest_zeros(
    block: nn.Module,
    call: Call,
    holds: Callable[[nn.Module, Call], bool] = is_identity,
    learns: Callable[[nn.Module, Call, tuple[str, ...]], bool] | None = None,
) -> tuple[str, ...] | None:
    """Names of the tensors that must be zero for ``holds`` to be true, in order of use; None where no zeros do.

    Args:
        block: a module.
        call: what arrives at it.
        holds: what must be true of it.
        learns: whether it learns with these at zero. Asked where some tensors do not train: with one of them zero
            instead of one in front of it, or the other way round, it may not.
    """
    twin = scratch(block)
    if holds(twin, call):
        return ()
    frozen = {name for name, p in named_parameters(block).items() if not p.requires_grad}
    order = order_of_use(twin, call)
    parameters = named_parameters(twin)
    values = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for p in parameters.values():
            p.zero_()
        if not is_finite(twin, call):
            order = [name for name in order if not _blows_up(twin, call, name, values)]
            for name, p in parameters.items():
                p.zero_() if name in order else p.copy_(values[name])
        if not holds(twin, call):
            return None
        if 0 < len(frozen) < len(parameters):
            found = _given_back(twin, call, sorted(order, key=lambda name: name not in frozen), values, 0.0, holds)
            still = copy_of(block)
            set_constants(still, dict.fromkeys(found, 0.0))
            if (learns or _all_learn)(_still(still), call, found):
                return found
            for name in order:
                parameters[name].zero_()
        return _given_back(twin, call, order, values, 0.0, holds)


def _all_learn(block: nn.Module, call: Call, names: tuple[str, ...]) -> bool:
    """Whether each of them that trains gets a gradient from the first output, and one does."""
    wanted = tuple(name for name, p in named_parameters(block).items() if name in names and p.requires_grad)
    return bool(wanted) and all(bool(grad.any()) for grad in gradients(block, call, wanted).values())


def _with_gains(block: nn.Module, call: Call, zeroed: tuple[str, ...], hot: tuple[str, ...]) -> dict[str, float]:
    """Give the ``hot`` ones of the zeroed tensors back where closing a gain behind them, stored as 1 + w, will do."""
    twin = scratch(block)
    order = order_of_use(twin, call)
    parameters = named_parameters(twin)
    values = {name: p.detach().clone() for name, p in parameters.items()}
    set_constants(twin, dict.fromkeys(zeroed, 0.0))
    behind = order[order.index(hot[0]) + 1 :]
    closed = []
    with torch.no_grad():
        for name in behind:
            if name in zeroed or parameters[name].dim() > 1:  # gains are vectors
                continue
            parameters[name].fill_(-1.0)
            if is_identity(twin, call):
                closed.append(name)
            else:
                parameters[name].copy_(values[name])
        still = _given_back(twin, call, hot, values, 0.0)
        gains = _given_back(twin, call, closed, values, -1.0)
    return {name: 0.0 for name in zeroed if name not in hot or name in still} | dict.fromkeys(gains, -1.0)


def _given_back(
    twin: nn.Module,
    call: Call,
    order: Iterable[str],
    values: Mapping[str, Tensor],
    constant: float,
    holds: Callable[[nn.Module, Call], bool] = is_identity,
) -> tuple[str, ...]:
    """Give tensors their values back one at a time; those that break what holds stay at ``constant``, named here."""
    parameters = named_parameters(twin)
    kept = []
    for name in order:
        parameters[name].copy_(values[name])
        if not holds(twin, call):
            parameters[name].fill_(constant)
            kept.append(name)
    return tuple(kept)


def _scale_vanishes(block: nn.Module, call: Call, names: tuple[str, ...]) -> bool:
    """Whether twice as large values in the named tensors give the same output, as in front of a norm."""
    twin = _still(copy_of(block))
    parameters = named_parameters(twin)
    with torch.no_grad():
        before = first_tensor(call.run(twin))
        for name in names:
            parameters[name].mul_(2)
        after = first_tensor(call.run(twin))
    found = arriving(call)
    if before is None or after is None or found is None:
        return False
    wrote = float((before - found[0]).norm())
    return float((after - before).norm()) <= 0.05 * wrote
