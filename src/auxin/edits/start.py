"""How a new module starts: the rule behind ``init="preserve"`` and the change that every edit returns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from auxin import init as inits
from auxin.anatomy.blocks import Container, shape_of
from auxin.anatomy.gradients import gradients_of
from auxin.anatomy.placed import Placed
from auxin.anatomy.probe import Call, PlanContext, untouched
from auxin.anatomy.residual_role import PASSED, ResidualRole, constants_of, forms_of, learns
from auxin.anatomy.tree import planned
from auxin.anatomy.zero_init import (
    amplified_by_a_norm,
    arriving,
    copy_of,
    first_tensor,
    gradients,
    is_identity,
    set_constants,
)
from auxin.change import Change, Rewire
from auxin.errors import GrowthError, about_arguments, reason
from auxin.gate import open_gate, set_gate
from auxin.init import InitSite
from auxin.listing import join, named_parameters
from auxin.randomness import random_state

OTHERS = "init='default', 'kaiming' or 'xavier' would run and change the function."


@dataclass(frozen=True)
class Start:
    """How a new module starts: in words, the tensors inside it that must get a gradient, and whether nothing
    changes. ``gated`` says that it has a gate and fades in, ``constants`` what its writers were set to.
    """

    how: str
    writers: tuple[str, ...] = ()
    preserves: bool = False
    gated: bool = False
    constants: Mapping[str, float] = field(default_factory=dict)


def remembered(module: nn.Module, constants: Mapping[str, float] | None, where: str, fade: int) -> Start:
    """Start a module as one of its kind has started before: its writers at these constants, or with a gate (None).

    Raises:
        GrowthError: it would need a gate, and may have none.
    """
    if constants is not None:
        set_constants(module, constants)
        return Start("last writers zero", tuple(constants), preserves=True, constants=constants)
    if not (fade and fade_in(module, None)):
        raise GrowthError(
            f"{where}: {_words(module)} could only fade in when one of its kind was added before; pass fade=100, or "
            f"probe=batch to look again. {OTHERS}"
        )
    return Start("fade-in", _trainable(module), preserves=True, gated=True)


def start(
    module: nn.Module, init: Any, site: InitSite, where: str, fade: int = 0, role: ResidualRole | None = None
) -> Start:
    """Write the first weights of ``module`` by ``init``; ``site.call`` is what arrives at it (needed to preserve).

    ``fade`` says that it may get a gate, if nothing else keeps the function; ``role`` what the network does with the
    outputs of the modules beside it (None: it hands them on).

    Raises:
        GrowthError: the function cannot be kept, or the layer does not take what arrives.
    """
    call = site.call
    if init == "preserve":
        assert call is not None
        return _preserve(module, call, where, fade, role)
    function = inits.named(init, where)
    promised = inits.run(function, module, site)
    if function is inits.identity and call is not None and is_identity(module, call):
        return Start("identity", _matrices(module), preserves=True)
    return Start(init if isinstance(init, str) else getattr(init, "__name__", "own init"), preserves=promised)


def takes(module: nn.Module, call: Call, where: str) -> Any:
    """Run a new module on what arrives at it, or say which shapes do not fit."""
    found = arriving(call)
    try:
        with torch.no_grad(), random_state(seed=0):
            return call.run(module)
    except Exception as error:  # whatever a user's forward raises
        given = f"the {shape_of(found[0])} tensor that arrives there" if found else "what arrives there"
        advice = "Give the layer the width of that place."
        if isinstance(call, Placed):
            advice = "The network's forward calls the parts of what stands there: build it of such parts."
        elif about_arguments(error):
            named = ", ".join(f"{name}=..." for name in call.kwargs)
            advice = f"It is called with {len(call.args)} by position{f' and {named}' if named else ''}: "
            advice += "give it a forward that takes these."
        raise GrowthError(f"{where}: {_words(module)} does not take {given}: {reason(error)}. {advice}") from error


def gets_gradient(module: nn.Module, call: Call, names: Iterable[str]) -> bool:
    """Whether each named tensor of ``module`` that trains gets a gradient on ``call``."""
    parameters = named_parameters(module)
    wanted = tuple(name for name in names if parameters[name].requires_grad)
    return bool(wanted) and all(bool(grad.any()) for grad in gradients(module, call, wanted).values())


def warn_of_norms(block: nn.Module, call: Call, constants: Mapping[str, float], where: str) -> None:
    """Name the zeroed tensors whose first gradient a norm behind them makes too large."""
    found = amplified_by_a_norm(block, call, constants)
    if not found:
        return
    names = ", ".join(f"{name} ({ratio:.0f} times)" for name, ratio in found.items())
    warnings.warn(
        f"{where}: zeroed in front of a norm, which makes the first gradient many times that of the same tensor in the "
        f"block as it was: {names}. Zeroing the gain of that norm instead is better, but it has none that would do: "
        "give it one, or use a small learning rate for the new block at first.",
        stacklevel=2,
    )


def fade_in(module: nn.Module, call: Call | None) -> bool:
    """Give a block a gate that is shut; whether it then returns its input, and would learn with the gate open.

    Args:
        module: the block; where the answer is no it is left without a gate.
        call: what arrives at it; None: it is known already that a gate does.

    Raises:
        GrowthError: parts of it would never learn, however far the gate is open.
    """
    if not any(p.requires_grad for p in module.parameters()):
        return False
    if call is None:
        open_gate(module)
        return True
    with untouched(module):
        with torch.no_grad():
            given, made = arriving(call), first_tensor(call.run(module))
        if given is None or made is None or made.shape != given[0].shape:
            return False
        open_gate(module)
        shut = is_identity(module, call, tolerance=0.0)
        set_gate(module, 1.0)
        learns = shut and any(bool(g.any()) for g in gradients(module, call, _trainable(module)).values())
        zeros = _products_of_zeros(module, call) if learns else []
    if zeros:
        raise GrowthError(
            f"{', '.join(zeros[:4])} of the new {type(module).__name__} are all zeros, and no gradient reaches them, "
            "nor after some steps of the others: factors of a product of zeros never learn. Let one be other than zero."
        )
    if learns:
        open_gate(module)
    return learns


def _products_of_zeros(module: nn.Module, call: Call) -> list[str]:
    """Matrices that are zero and whose gradient is zero too, and stays it while the others take some steps."""
    twin = copy_of(module)
    parameters = {name: p for name, p in named_parameters(twin).items() if p.requires_grad}
    zeros = [name for name, p in parameters.items() if p.dim() > 1 and not p.any()]
    for _ in range(3 if zeros else 0):
        with torch.enable_grad(), random_state(seed=0):
            out = first_tensor(call.run(twin))
            assert out is not None
            direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
            found = gradients_of((out * direction).sum(), twin)
        grads = {name: g.to_dense() for name, g in found.items() if g is not None}
        zeros = [name for name in zeros if name in grads and not grads[name].any()]  # None: not used at all here
        with torch.no_grad():
            for name, grad in grads.items():
                parameters[name].sub_(grad / grad.norm().clamp(min=torch.finfo(grad.dtype).tiny))
    return zeros


def _trainable(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, p in named_parameters(module).items() if p.requires_grad)


def _preserve(module: nn.Module, call: Call, where: str, fade: int, role: ResidualRole | None) -> Start:
    output = first_tensor(takes(module, call, where))
    given = arriving(call)
    if not isinstance(call, Placed) and (given is None or output is None or output.shape != given[0].shape):
        shapes = f"{shape_of(given[0]) if given else 'nothing'} -> {shape_of(output)}"
        raise GrowthError(
            f"{where}: {_words(module)} turns {shapes}, so it cannot leave the function as it was. Give it equal input "
            "and output shapes, or pass init='default' (and outputs=True where the network's own output may change)."
        )
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        return _first_that_holds(module, call, where, fade, role)
    finally:
        for inner, mode in modes.items():
            inner.training = mode


def _first_that_holds(module: nn.Module, call: Call, where: str, fade: int, role: ResidualRole | None) -> Start:
    if not any(p.requires_grad for p in module.parameters()):
        if is_identity(module, call):
            return Start("returns its input", preserves=True)
        raise GrowthError(
            f"{where}: {_words(module)} changes the function and has no weights that could prevent it. {OTHERS}"
        )
    constants = None
    for form in forms_of(call, role):
        constants = constants_of(module, call, form)
        if constants:
            trial = copy.deepcopy(module)
            set_constants(trial, constants)
            if learns(trial, call, constants, form):
                if form == PASSED:
                    warn_of_norms(module, call, constants, where)
                set_constants(module, constants)
                return Start("last writers zero", tuple(constants), preserves=True, constants=constants)
    if role is not None and role.added:
        raise GrowthError(
            f"{where}: the network adds what the modules there return, as in x + block(x), and no zeroing of the "
            f"tensors of {_words(module)} lets it return zeros and still learn. End it with a Linear. {OTHERS}"
        )
    try:
        trial = copy.deepcopy(module)
        inits.identity(trial)
        # Only Linear and convolutions were set: they must carry the identity, and be able to leave it.
        held = _matrices(trial)
        if held and is_identity(trial, call) and gets_gradient(trial, call, held):
            inits.identity(module)
            return Start("identity", held, preserves=True)
    except GrowthError:
        pass
    if fade and fade_in(module, call):
        return Start("fade-in", _trainable(module), preserves=True, gated=True)
    dead = constants is not None
    placed = isinstance(call, Placed)
    rests = "keeps what the network computes" if placed else "returns its input"
    why = "once its last writers are zero no gradient reaches them" if dead else f"no zeroing of its tensors {rests}"
    if placed:
        raise GrowthError(
            f"{where}: the network's forward calls the parts of what stands there, and {why}. Parts whose outputs are "
            f"added, as in x = x + part(x), and that end with a Linear can start so. {OTHERS}"
        )
    raise GrowthError(
        f"{where}: {_words(module)} cannot keep the function and still learn: {why}, and it is not an identity for "
        f"what arrives there. A residual block x + f(x) can{'' if fade else ', or a fade-in: fade=100'}. {OTHERS}"
    )


def _matrices(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, p in named_parameters(module).items() if p.requires_grad and p.dim() >= 2)


def _words(module: nn.Module) -> str:
    text = " ".join(repr(module).split())
    return text if len(text) <= 90 else type(module).__name__


def finish(
    model: nn.Module, edit: Any, context: PlanContext, container: Container, rewire: Rewire, **fields: Any
) -> Change:
    """The change that splices ``rewire`` into a container: plain lists that repeat it follow."""
    aliases = container.aliases(model, rewire)
    return planned(model, edit, context.seed, [rewire], aliases=aliases, network=context.network, **fields)


def inside(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names below ``path``."""
    return tuple(join(path, name) for name in names)
