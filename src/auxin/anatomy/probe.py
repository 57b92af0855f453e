"""Running a network, or pieces of it, on one batch without leaving a trace."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError
from auxin.randomness import random_state
from auxin.record import Record, coming_back

Probe = Any  # a tensor, a tuple or list of arguments, a dict of keywords, or a callable that returns one of these


@dataclasses.dataclass
class Call:
    """What one module was given and gave back, the first time it ran."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    count: int = 1


@contextmanager
def untouched(model: nn.Module, train: bool = False) -> Iterator[None]:
    """Run ``model`` inside in eval mode (or as it stands, ``train=True``); afterwards buffers, modes and attributes
    are back.
    """
    tree = Record(model)
    buffers = [(b, b.detach().clone(), b._version) for b in model.buffers()]

    def restore() -> None:
        tree.restore()
        with torch.no_grad():
            for buffer, value, version in buffers:
                if buffer._version != version:
                    buffer.copy_(value)

    with coming_back(restore):
        if not train:
            for module in model.modules():
                module.training = False
        with random_state(seed=0):
            yield


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from tensors_in(getattr(value, item.name))


def moved(value: Any, device: torch.device) -> Any:
    """The same nest with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    return value


def arguments(model: nn.Module, probe: Probe) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn a probe into call arguments: a batch ``(inputs, targets)`` loses what ``forward`` does not take.

    Raises:
        GrowthError: the probe does not fit ``model.forward``.
    """
    batch = probe() if callable(probe) and not isinstance(probe, Tensor) else probe
    first = next((t for t in [*model.parameters(), *model.buffers()]), None)
    batch = moved(batch, first.device) if first is not None and first.device.type != "meta" else batch
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    args = tuple(batch)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return args, {}
    for length in range(len(args), 0, -1):
        try:
            signature.bind(*args[:length])
        except TypeError:
            continue
        return args[:length], {}
    raise GrowthError(
        f"probe={type(batch).__name__} of {len(args)}: {type(model).__name__}.forward{signature} does not take it. "
        "Pass the tensor, a tuple of its positional arguments, or a dict of its keywords."
    )


class Look:
    """What a plan may look at: the network on the probe, under a guard; and the seed of its new weights.

    Attributes:
        model: the network, unwrapped.
        seed: of the new weights.
        structural: True in a replay: shapes and names only, weights will come from a checkpoint.
        memory: last writers of every kind of block that was solved before, with their constants; a Grower keeps it from
            growth to growth.
        evidence: batches and a loss for data-driven weights; unused by the edits of this version.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe = None,
        seed: int = 0,
        structural: bool = False,
        evidence: Any = None,
        memory: dict[str, Mapping[str, float]] | None = None,
    ):
        self.memory = {} if memory is None else memory
        self.model, self.seed, self.structural, self.evidence = model, seed, structural, evidence
        self._probe = probe
        self._batch: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def has_probe(self) -> bool:
        """Whether there is a batch to run."""
        return self._probe is not None

    @property
    def batch(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The probe as (args, kwargs)."""
        if self._batch is None:
            self._batch = arguments(self.model, self._probe)
        return self._batch

    def run(self) -> Any:
        """One forward of the network on the probe. Call it inside ``untouched(model)``."""
        args, kwargs = self.batch
        return self.model(*args, **kwargs)

    def calls(self, modules: Mapping[str, nn.Module]) -> tuple[dict[str, Call], Any]:
        """One guarded forward; what each of ``modules`` was given and gave, and the network's output."""
        seen: dict[str, Call] = {}
        with untouched(self.model), torch.no_grad():
            for name, module in modules.items():
                module.register_forward_hook(_recorder(seen, name), with_kwargs=True)
            output = self.run()
        return seen, output


def _recorder(seen: dict[str, Call], name: str) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if name in seen:
            seen[name].count += 1
        else:
            # Kept as they were: blocks may write into what they are given.
            seen[name] = Call(_copied(args), _copied(kwargs), _copied(output))

    return record


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict) and type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    return value
