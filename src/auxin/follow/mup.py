"""``Widen(lr="mup")``: learning rates and decays that follow the size of a tensor, each in a group of its own.

Under the maximal update parametrisation (Yang and Hu 2021, arXiv:2011.14522; Yang et al. 2022, arXiv:2203.03466) the
outputs of a layer move as far in a step however wide the network is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from auxin.change import Change, Join, OwnGroup
from auxin.errors import GrowthError


def _adam(inputs: float, outputs: float) -> float:
    """Each entry moves by the rate: the sum over m times as many inputs moves m times as far."""
    return 1 / inputs


def _gradient(inputs: float, outputs: float) -> float:
    """Each entry moves with its gradient, of which one output more has less: out / in."""
    return outputs / inputs


def _shape(inputs: float, outputs: float) -> float:
    """The step has a norm that follows the shape by itself."""
    return 1.0


RULES: dict[type, Callable[[float, float], float]] = {
    **dict.fromkeys((torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam), _adam),
    **dict.fromkeys((torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Adagrad), _adam),
    torch.optim.SGD: _gradient,
    torch.optim.Muon: _shape,
}


def by_size(
    change: Change,
    optimizers: Sequence[Any],
    plan: Callable[[Join, int, Mapping[str, Any]], OwnGroup],
    count: Callable[[Any], int],
) -> Iterator[tuple[OwnGroup, list[int]]]:
    """The groups of tensors whose rate follows their size, and the ``id`` of those that move there.

    Args:
        change: with ``mup``: by how much the inputs and the outputs of each tensor have grown.
        optimizers: that hold them.
        plan: makes an own group beside another.
        count: how many groups an optimizer will have, those that are planned included.

    Raises:
        GrowthError: no rule is known for an optimizer.
    """
    new = {move.name: move.new for move in change.moves}
    ratios = {id(new[name]): ratio for name, ratio in change.mup.items() if new.get(name) is not None}
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            alike: dict[tuple[float, float], list[int]] = {}
            for parameter in group["params"]:
                if id(parameter) in ratios:
                    rule, (inputs, outputs) = _rule(optimizer), ratios[id(parameter)]
                    shrunk = outputs if rule is _adam else 1.0
                    alike.setdefault((rule(inputs, outputs), shrunk), []).append(id(parameter))
            for (rate, shrunk), moving in alike.items():
                asked = _asked(group, rate, shrunk)
                if asked:
                    yield plan(Join(optimizer, index, None), count(optimizer), asked), moving


def _asked(group: Mapping[str, Any], rate: float, shrunk: float) -> dict[str, Any]:
    """The options of a group whose rate is ``rate`` times as high and whose gradients are 1 / ``shrunk``."""
    asked: dict[str, Any] = {}
    if rate != 1:
        asked["lr"] = float(group.get("initial_lr", group["lr"])) * rate
        if group.get("weight_decay"):
            asked["weight_decay"] = group["weight_decay"] / rate
    if shrunk != 1 and group.get("eps"):
        asked["eps"] = group["eps"] / shrunk
    return asked


def _rule(optimizer: Any) -> Callable[[float, float], float]:
    for kind, rule in RULES.items():
        if isinstance(optimizer, kind):
            return rule
    known = ", ".join(kind.__name__ for kind in RULES)
    raise GrowthError(
        f'lr="mup": how the rate of {type(optimizer).__name__} follows the size of a tensor is not known; it is for '
        f'{known}. Leave lr="keep".'
    )
