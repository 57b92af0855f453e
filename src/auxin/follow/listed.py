"""Averages that are no module: a list of tensors, one for each parameter, in the order in which they were given.

Such a list grows as a copy of the network would that holds its values.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from auxin.change import Change
from auxin.errors import GrowthError
from auxin.follow import follow
from auxin.follow.twins import builder
from auxin.listing import named_parameters
from auxin.record import refill
from auxin.structure import Undo, apply, reversible, undo


class _Listed(NamedTuple):
    """A list of an average, and the names of the parameters whose values stand in it."""

    content: list[Any]
    names: list[str]


def lists_in(average: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[_Listed]:
    """Lists of tensors that an average keeps, and the names of the parameters that they follow.

    Raises:
        GrowthError: one has another length, or other shapes, than the parameters, or those of them that train.
    """
    found = False
    for key, content in vars(average).items():
        if type(content) is not list or not content or not all(isinstance(one, Tensor) for one in content):
            continue
        found, shapes = True, [tuple(one.shape) for one in content]
        for names in (list(parameters), [name for name, p in parameters.items() if p.requires_grad]):
            if shapes == [tuple(parameters[name].shape) for name in names]:
                yield _Listed(content, names)
                break
        else:
            raise GrowthError(
                f"{type(average).__name__}.{key} holds {len(content)} tensors, and not the shapes of the "
                f"{len(parameters)} parameters of this network in their order: it was left behind by a growth, or "
                "averages another network. Build it from the network as it is now, and pass it to every growth."
            )
    if not found:
        raise GrowthError(f"{type(average).__name__} holds no list of tensors in its attributes: nothing to grow.")


def listed_problems(average: Any, model: nn.Module) -> Iterator[str]:
    """What is wrong with an average of this kind."""
    try:
        list(lists_in(average, named_parameters(model)))
    except GrowthError as error:
        yield f"{error}"


def follow_listed(average: Any, change: Change) -> Iterator[None]:
    """Old averages stay the tensors that they are; a new block's begin from what those of its source hold.

    Raises:
        GrowthError: a list does not fit the network.
    """
    parameters = change.before.parameters
    twins: list[tuple[_Listed, nn.Module]] = []
    for listed in lists_in(average, parameters):
        twin = copy.deepcopy(change.before.modules[""])
        own = named_parameters(twin)
        for name, value in zip(listed.names, listed.content, strict=True):
            own[name].data = value
        twins.append((listed, twin))
    undos: list[Undo] = []
    yield

    def write() -> None:
        for listed, twin in twins:
            own = named_parameters(twin)
            known = {id(own[name]): value for name, value in zip(listed.names, listed.content, strict=True)}
            whole = len(listed.names) == len(parameters)
            apply(twin, change, builder(change.before, twin), undos)
            live = change.after
            now = [
                known[id(p)] if id(p) in known and known[id(p)].shape == p.shape else p.detach().clone()
                for name, p in named_parameters(twin).items()
                if whole or id(p) in known or (name in live and live[name].requires_grad)
            ]
            undos.append(functools.partial(refill, listed.content, list(listed.content)))
            refill(listed.content, now)
        _refer(average, change, undos)

    yield from reversible(write, functools.partial(undo, undos))


def _refer(average: Any, change: Change, undos: list[Undo]) -> None:
    """Let lists of weak references to all parameters refer to those that there are now."""
    before = list(map(id, change.before.parameters.values()))
    for content in vars(average).values():
        refers = type(content) is list and content and all(isinstance(one, weakref.ref) for one in content)
        if refers and [id(one()) for one in content] == before:
            undos.append(functools.partial(refill, content, list(content)))
            refill(content, [weakref.ref(p) for p in change.after.values()])


# ---- classes of other packages, by name, so that none of them is imported

for _kind in ("torch_ema.ema:ExponentialMovingAverage", "diffusers.training_utils:EMAModel"):
    follow(_kind, verify=listed_problems)(follow_listed)
for _kind, _held in {
    "ema_pytorch.ema_pytorch:EMA": "ema_model",
    "ema_pytorch.post_hoc_ema:KarrasEMA": "ema_model",
    "timm.utils.model_ema:ModelEma": "ema",
    "timm.utils.model_ema:ModelEmaV2": "module",
    "timm.utils.model_ema:ModelEmaV3": "module",
}.items():
    follow(_kind, like=AveragedModel, wraps=lambda average, name=_held: [getattr(average, name)])
