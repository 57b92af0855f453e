"""Named ways to start the weights of a new module. Each is a plain function that writes into the module it is given.

A user's own is any importable function ``init(module)``, or ``init(module, site)`` that may look at what arrives there
and at the gradients of what comes out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.gradients import gradients_of, probe_loss
from auxin.anatomy.probe import Call, PlanContext, tensors_in, untouched
from auxin.anatomy.residual_role import at_rest
from auxin.anatomy.zero_init import arriving, with_input
from auxin.errors import GrowthError


@dataclass(frozen=True, eq=False)
class InitSite:
    """The place of a new module, as a start of one's own may look at it: ``init(module, site)``.

    What it shows is computed when it is asked for, in eval mode, and leaves no trace in the network. "The value at the
    place" is, for ``Insert``, what the module behind the new one is given; for ``After``, ``Replace`` and ``Duplicate``
    what the module in front, the old module or the copied block returns.

    Attributes:
        path: of the new module after the growth.
        call: what the new module will be given on the probe, as ``call.args`` and ``call.kwargs``; None without one.
        context: the network on the probe, before the growth.

    Examples:
        >>> def against_the_gradient(linear, site):
        ...     gradient, value = site.output_gradients[0].flatten(0, -2), site.values[0].flatten(0, -2)
        ...     with torch.no_grad():
        ...         linear.weight.copy_(-gradient.T @ value / len(value))
    """

    path: str
    call: Call | None
    context: PlanContext
    _tap: tuple[nn.Module, bool]  # the module where the value is read off: its first input (True), or its output

    @property
    def tap(self) -> nn.Module:
        """The module where the value is read off: behind it, the new one will stand, unless it is given the value."""
        return self._tap[0]

    @property
    def seed(self) -> int:
        """The seed of the new weights; torch's own generators follow from it while ``init`` runs."""
        return self.context.seed

    @property
    def evidence(self) -> Any:
        """The loss and the batches that were given to ``grow`` or to the Grower; None without."""
        return self.context.evidence

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors among what the new module will be given on the probe."""
        return () if self.call is None else tuple(tensors_in((self.call.args, self.call.kwargs)))

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The value at the place, for each of ``output_gradients``."""
        return tuple(value for value, _ in self._observed)

    @property
    def output_gradients(self) -> tuple[Tensor, ...]:
        """The gradient of the loss with respect to the value at the place, one for each batch of the evidence.

        Without evidence there is one: of the outputs on the probe, each number with a random weight.

        Raises:
            GrowthError: there is neither evidence nor a probe, or the loss does not depend on the place.
        """
        return tuple(gradient for _, gradient in self._observed)

    @functools.cached_property
    def _observed(self) -> list[tuple[Tensor, Tensor]]:
        found = []
        for number, loss in enumerate(self._losses()):
            holder = nn.Module()  # the value becomes a parameter of it, at which the graph begins
            with untouched(self.context.model), torch.enable_grad():
                _begin_graph_at(*self._tap, holder)
                scalar = loss()
                grads = {} if scalar is None or not scalar.requires_grad else gradients_of(scalar, holder)
            gradient = grads.get("value")
            if gradient is None:
                raise GrowthError(
                    f"site.output_gradients: in batch {number} the loss does not depend on what stands at {self.path}. "
                    "Grow at a place that it depends on, or start by site.inputs alone."
                )
            found.append((holder.get_parameter("value").detach(), gradient))
        return found

    def _losses(self) -> Iterator[Callable[[], Tensor | None]]:
        context = self.context
        if context.evidence is not None:
            yield from (
                functools.partial(context.evidence.loss, context.model, batch) for batch in context.evidence.batches
            )
        elif context.has_probe:
            yield lambda: probe_loss(tensors_in(context.run()))
        else:
            raise GrowthError(
                f"site.output_gradients at {self.path}: there is no loss to take them of. Pass evidence=Evidence(loss, "
                "batches), or probe=batch."
            )


def named(init: Any, where: str) -> Callable[..., Any]:
    """The function that ``init=`` stands for.

    Raises:
        GrowthError: it stands for none.
    """
    function = NAMED.get(init) if isinstance(init, str) else init
    if not callable(function):
        known = ", ".join(map(repr, ["preserve", *NAMED]))
        raise GrowthError(
            f"{where}: init={init!r} is not known; use one of {known}, or an importable init(module) or "
            "init(module, site)."
        )
    return function


def run(init: Callable[..., Any], module: nn.Module, site: InitSite) -> bool:
    """Let ``init`` write into ``module``; whether it promises that the network computes what it did.

    Raises:
        GrowthError: ``init(module, site)`` returns something else than True, "preserves" or None.
    """
    by_name, alone = _takes(init, module, site=site), _takes(init, module)
    if alone and not (by_name and "site" in inspect.signature(init).parameters):
        init(module)
        return False
    said = init(module, site=site) if by_name else init(module, site)
    if said is None or said is False:
        return False
    if said is True or (isinstance(said, str) and said == "preserves"):
        return True
    raise GrowthError(
        f"init={getattr(init, '__name__', type(init).__name__)} returned {said!r:.60}. Return True (or 'preserves') "
        "where the network computes what it did, which is proved then, else None."
    )


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


def _takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a function can be called so; one in C, without a signature, takes a module alone."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:
        return not kwargs
    return True


def _begin_graph_at(module: nn.Module, given: bool, holder: nn.Module) -> None:
    """Let the first floating tensor that a module is given, or returns, come from a parameter ``value`` of ``holder``.

    The hooks are gone once the network is left ``untouched``.
    """

    def taken(tensor: Tensor) -> Tensor:
        holder.register_parameter("value", nn.Parameter(tensor.detach().clone()))
        return holder.get_parameter("value").clone()  # which may be written into

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        found = None if holder._parameters else arriving(Call(args, kwargs, None))
        if found is None:
            return args, kwargs
        call = with_input(Call(args, kwargs, None), taken(found[0]))
        return call.args, call.kwargs

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        first = next((t for t in tensors_in(output) if t.is_floating_point()), None)
        return output if first is None or holder._parameters else at_rest(output, [taken(first)], zeros=False)

    if given:
        module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        module.register_forward_hook(after)
