"""A companion that holds copies of the network, as an average does: the copies, and its own numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.wrappers import networks_of
from auxin.checkpoint.network import check_network, network_data, network_tensors, write_network
from auxin.errors import GrowthError

NUMBERS = (bool, int, float, type(None))


def copies_state(companion: Any, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its copies of the network, its own tensors, and its attributes that are numbers or made of them."""
    copies = networks_of(companion)
    tensors = {f"own.{name}": tensor.detach() for name, tensor in _own(companion, model).items()}
    for number, copy in enumerate(copies):
        state, rest = network_tensors(copy)
        tensors |= {f"copy{number}.{name}": tensor for name, tensor in {**state, **rest}.items()}
    return tensors, {"copies": [network_data(copy) for copy in copies], "numbers": _numbers(companion)}


def check_copies(companion: Any, model: nn.Module, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    """Whether ``write_copies`` would succeed.

    Raises:
        GrowthError: its copies have another structure, or it has other tensors of its own.
    """
    kind, copies = type(companion).__name__, networks_of(companion)
    if len(copies) != len(data["copies"]):
        raise GrowthError(f"{kind} holds {len(copies)} copies of the network, in the checkpoint {len(data['copies'])}.")
    for number, copy in enumerate(copies):
        check_network(copy, _under(f"copy{number}.", tensors))
    ours, theirs = _own(companion, model), _under("own.", tensors)
    shapes = [{name: tuple(tensor.shape) for name, tensor in held.items()} for held in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise GrowthError(f"{kind} itself holds the tensors {shapes[0]}, there {shapes[1]}. Build it alike.")


def write_copies(
    companion: Any, model: nn.Module, tensors: Mapping[str, Tensor], data: Mapping[str, Any], keep: bool = False
) -> None:
    """Put back what ``copies_state`` has returned; every tensor stays the same object. ``keep``: see write_network."""
    for number, copy in enumerate(networks_of(companion)):
        write_network(copy, _under(f"copy{number}.", tensors), data["copies"][number], run=False, keep=keep)
    with torch.no_grad():
        for name, tensor in _own(companion, model).items():
            tensor.copy_(tensors[f"own.{name}"])
    own = vars(companion)
    own.update({name: value for name, value in data["numbers"].items() if _is_numbers(own.get(name))})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _own(companion: Any, model: nn.Module) -> dict[str, Tensor]:
    """Tensors that are neither a copy's nor the network's, by name."""
    others = {id(t) for network in (model, *networks_of(companion)) for _, t in _tensors(network)}
    return {name: tensor for name, tensor in _tensors(companion) if id(tensor) not in others}


def _tensors(holder: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(holder, nn.Module):
        yield from holder.named_parameters()
        yield from holder.named_buffers()
    yield from ((name, value) for name, value in vars(holder).items() if isinstance(value, Tensor))


def _numbers(companion: Any) -> dict[str, Any]:
    hidden = vars(nn.Module())
    return {name: v for name, v in vars(companion).items() if name not in hidden and v is not None and _is_numbers(v)}


def _is_numbers(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(_is_numbers(item) for item in value)
    if type(value) is dict:
        return all(type(key) is str and _is_numbers(item) for key, item in value.items())
    return type(value) in NUMBERS
