"""Running a network, or pieces of it, on one batch without leaving a trace."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.tree import CONTAINERS, parts, registrations, runs_by_parts
from auxin.dynamo import eagerly
from auxin.errors import GrowthError
from auxin.listing import Listing, listing
from auxin.randomness import random_state
from auxin.ranks import in_step, together
from auxin.record import Record, coming_back
from auxin.sharded import computed_in, settle

Probe = Any  # a tensor, a tuple or list of arguments, a dict of keywords, or a callable that returns one of these


@dataclasses.dataclass
class Call:
    """What one module was given and gave back, the first time it ran.

    Attributes:
        kept: a deepcopy memo of what the module is given as it is: modules and parameters of the network.
        amplified: a block, constants of its tensors, and what ``amplification`` has said of them on this call.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    count: int = 1
    kept: dict[int, Any] = dataclasses.field(default_factory=dict, repr=False)
    amplified: tuple[nn.Module, Mapping[str, float], dict[str, float]] | None = dataclasses.field(
        default=None, repr=False
    )

    def run(self, module: nn.Module) -> Any:
        """What ``module`` gives back on it. It gets copies: it may write into them, as into a cache of keys."""
        args, kwargs = taken((self.args, self.kwargs), self.kept)
        return module(*args, **kwargs)


@contextmanager
def untouched(model: nn.Module, train: bool = False) -> Iterator[Record]:
    """Run ``model`` inside in eval mode (or as it stands, ``train=True``); afterwards buffers, modes and attributes
    are back. Gives the record of them.
    """
    together("a forward on the probe", model)
    settle(model)
    tree = Record(model)

    def back() -> None:
        settle(model)
        tree.restore()

    with coming_back(back):
        for module in () if train else tree.modules.values():
            if "training" in module.__dict__:  # without a word to methods of the user's
                module.__dict__["training"] = False
            else:
                module.training = False
        with random_state(seed=0), eagerly(), in_step("a forward on the probe", model):
            yield tree


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


def moved(value: Any, device: torch.device, dtypes: tuple[torch.dtype, torch.dtype] | None = None) -> Any:
    """The same nest with its tensors on ``device``; those of the first of ``dtypes`` become of the second."""
    if isinstance(value, Tensor):
        return value.to(device, dtypes[1]) if dtypes is not None and value.dtype == dtypes[0] else value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device, dtypes) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [moved(item, device, dtypes) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: moved(item, device, dtypes) for key, item in value.items()}
    return value


def arguments(model: nn.Module, probe: Probe) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn a probe into call arguments: a batch of inputs and targets loses what ``forward`` does not take.

    Raises:
        GrowthError: the probe does not fit ``model.forward``.
    """
    batch = probe() if callable(probe) and not isinstance(probe, Tensor) else probe
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    batch = moved(batch, first.device) if first is not None and first.device.type != "meta" else batch
    if not isinstance(batch, (Mapping, tuple, list)):
        return (batch,), {}
    args = () if isinstance(batch, Mapping) else tuple(batch)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return args, dict(batch) if isinstance(batch, Mapping) else {}
    if isinstance(batch, Mapping):
        return (), _known(batch, signature) or dict(batch)
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


def _known(batch: Mapping[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    """What of a batch is an argument of ``forward``: labels that only the loss takes are none."""
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return dict(batch)
    return {name: value for name, value in batch.items() if name in signature.parameters}


class PlanContext:
    """What a plan may look at: the network on the probe, under a guard; and the seed of its new weights.

    Attributes:
        model: the network, unwrapped.
        seed: of the new weights.
        structural: True in a replay: shapes and names only, weights will come from a checkpoint.
        memory: last writers of every kind of block that was solved before, with their constants; a Grower keeps it from
            growth to growth.
        evidence: batches and a loss for data-driven weights; unused by the edits of this version.
        outputs: tensors that the network gave at the first forward of ``calls``; None before.
        called: how often each child of a container ran in it, by ``id``.
        at_rest: by ``id`` of a new module that leaves the network's function as it is: whether another one does so in
            its place, on what arrives there.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe = None,
        seed: int = 0,
        structural: bool = False,
        evidence: Any = None,
        memory: dict[str, Mapping[str, float] | None] | None = None,
    ):
        self.memory = {} if memory is None else memory
        self.model, self.seed, self.structural, self.evidence = model, seed, structural, evidence
        self.outputs: list[Tensor] | None = None
        self.called: dict[int, int] = {}
        self.at_rest: dict[int, Callable[[nn.Module], bool]] = {}
        self._probe = probe
        self._batch: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._network: Listing | None = None

    @property
    def has_probe(self) -> bool:
        """Whether there is a batch to run."""
        return self._probe is not None

    @property
    def network(self) -> Listing:
        """What the network holds before the change; looked up once, since a plan writes to nothing."""
        if self._network is None:
            self._network = listing(self.model)
        return self._network

    @property
    def batch(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The probe as (args, kwargs)."""
        if self._batch is None:
            self._batch = arguments(self.model, self._probe)
        return self._batch

    def seeded(self, seed: int) -> PlanContext:
        """The same context, for new weights of another seed; the network may have changed since."""
        other = copy.copy(self)
        other.seed, other.outputs, other._network = seed, None, None
        return other

    def run(self) -> Any:
        """One forward of the network on the probe. Call it inside ``untouched(model)``."""
        return self.run_of(self.model)

    def run_of(self, network: nn.Module) -> Any:
        """One forward of a copy of the network on the probe, into which nothing is written (a cache of the user's).

        A copy on another device or in another dtype (an average in float32 of a network in bfloat16) is given it so.
        """
        args, kwargs = taken(self.batch, {})
        mine, theirs = (next((p for p in n.parameters() if p.is_floating_point()), None) for n in (self.model, network))
        if mine is not None and theirs is not None and (mine.dtype, mine.device) != (theirs.dtype, theirs.device):
            args, kwargs = moved((args, kwargs), theirs.device, (mine.dtype, theirs.dtype))
        return network(*args, **kwargs)

    def calls(self, modules: Mapping[str, nn.Module]) -> tuple[dict[str, Call], Any]:
        """One guarded forward; what each of ``modules`` was given and gave, and the network's output."""
        seen: dict[str, Call] = {}
        with untouched(self.model) as tree, torch.no_grad():
            modules_of_it = tree.modules.values()
            kept = {id(held): held for held in (*modules_of_it, *tree.parameters.values())}
            for name, module in modules.items():
                before, after = _recorders(seen, name, kept)
                module.register_forward_pre_hook(before, with_kwargs=True)
                module.register_forward_hook(after)
            counted = _counters(modules_of_it) if self.outputs is None else None
            output = self.run()
            if counted is not None:
                self.outputs = [t.detach().clone() for t in tensors_in(output)]
                self.called = counted()
        cast = computed_in(self.model)
        for call in seen.values() if cast is not None else ():  # what is new is tried in the dtype of its weights
            call.args, call.kwargs, call.output = (
                moved(value, next(self.model.parameters()).device, cast)
                for value in (call.args, call.kwargs, call.output)
            )
        return {name: call for name, call in seen.items() if call.count}, output


def _counters(modules: Collection[nn.Module]) -> Callable[[], dict[int, int]]:
    """Count from now on how often each child of a container runs, as a whole or by its parts; tells it by ``id``."""
    children = {id(c): c for m in modules if isinstance(m, CONTAINERS) for c in m._modules.values() if c is not None}
    by_parts = [child for child in children.values() if runs_by_parts(child)]
    times = registrations(modules) if by_parts else {}
    watched = {i: [i] for i in children} | {id(child): [id(p) for p in parts(child, times)] for child in by_parts}
    counts: dict[int, int] = {}

    def count(module: nn.Module, *_: Any) -> None:
        counts[id(module)] = counts.get(id(module), 0) + 1

    held = {id(p): p for child in by_parts for p in parts(child, times)} | children
    for module in held.values():
        module.register_forward_hook(count)

    def told() -> dict[int, int]:
        most = {child: max(counts.get(part, 0) for part in inner) for child, inner in watched.items()}
        return {child: count for child, count in most.items() if count}

    return told


def _recorders(seen: dict[str, Call], name: str, kept: dict[int, Any]) -> tuple[Callable[..., None], ...]:
    """Hooks that note what a module is given, before it can write into it, and what it gives back."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in seen:
            given = taken((args, kwargs), kept)
            seen[name] = Call(*given, output=None, count=0, kept=kept)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen[name].count += 1
        if seen[name].count == 1:
            seen[name].output = _copied(output)

    return before, after


def taken(value: Any, kept: dict[int, Any]) -> Any:
    """A deep copy, but for the objects in the deepcopy memo ``kept``; what cannot be copied so stays what it is."""
    if type(value) is tuple and len(value) == 2 and not value[1] and _one_tensor(value[0], kept):
        return (value[0][0].clone(),), {}  # as most modules are called, and as often as anything in a plan
    try:
        memo: Any = ChainMap({}, kept)  # not a copy of what is kept, which is the whole network
        return copy.deepcopy(value, memo)
    except Exception:  # a generator, a lock, a tensor in the middle of a graph
        return _copied(value)


def _one_tensor(args: Any, kept: dict[int, Any]) -> bool:
    """Whether these are one plain tensor, of which a clone is all that a deep copy would be."""
    if type(args) is not tuple or len(args) != 1:
        return False
    x = args[0]
    plain = type(x) is Tensor and not x.requires_grad and x.layout is torch.strided and not x.is_quantized
    return plain and x.is_contiguous() and not x.is_complex() and not x.__dict__ and id(x) not in kept


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict) and type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    return value
