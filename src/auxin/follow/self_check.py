"""Whether an optimizer that is not torch's keeps its state where ``follow(..., like=torch.optim.AdamW)`` looks for it.

A copy of it trains a toy, which grows, is saved and loaded as a network would be. Where that goes wrong the optimizer
is refused: on the network it would go wrong without a word.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import itertools
import json
import math
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from auxin.companion import Registration
from auxin.dynamo import eagerly
from auxin.errors import GrowthError
from auxin.follow.groups import RATES
from auxin.follow.optimizer_state import optimizer_state, restore_optimizer
from auxin.randomness import random_state
from auxin.record import refill

STEPS = 3  # of the toy, before it grows
CLOSE = 1e-4  # relative difference of two steps that count as equal
LIKE = 0.02  # ... of first steps: an epsilon may weigh otherwise
# How a step is carried out is settled where the optimizer is built; the others belong to a schedule.
SETTLED = {"foreach", "fused", "capturable", "differentiable", "base_momentum", "max_momentum", *RATES[1:]}
DATA = (bool, int, float, str, type(None), tuple, list, dict, set, Tensor)
OLD, NEW = ("first", "third"), "second"  # the new parameter joins between the old ones

_problems: dict[tuple[Any, ...], str | None] = {}


def self_check(optimizer: Any, known: Registration) -> None:
    """Try an optimizer on a toy: once for its class and options, on the CPU, in milliseconds, without a trace.

    Args:
        optimizer: as the user has built it; it is only read.
        known: how it is followed, saved and loaded.

    Raises:
        GrowthError: a growth or a resume of the toy goes wrong; says how, and a way round.
    """
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim") or not (hasattr(optimizer, "defaults") and optimizer.param_groups):
        return
    key = (kind, known.save, known.load, _shape(optimizer), json.dumps(_options(optimizer), default=repr))
    if key not in _problems:
        with _without_a_trace(kind):
            _problems[key] = _problem(optimizer, known)
    if _problems[key] is not None:
        raise GrowthError(f"{kind.__name__} {_problems[key]}")


def built(optimizer: Any, groups: Any, options: Mapping[str, Any]) -> Any:
    """Another optimizer of the same class around other parameters; None where it is not built as torch's are.

    Args:
        optimizer: of that class.
        groups: parameters or groups, as its constructor takes them.
        options: by name; those that its constructor does not know, and those that are settled, are left out.
    """
    known = _signature(type(optimizer))
    words = {key: value for key, value in options.items() if key in known and key not in {"params", *SETTLED}}
    needed = {key for key, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return None if needed - {"params", *words} else type(optimizer)(groups, **words)


def _problem(optimizer: Any, known: Registration) -> str | None:
    """What goes wrong on the toy, and a way round; None where nothing does, or the toy cannot be trained at all."""
    kind, inner = type(optimizer).__name__, _inner(optimizer)
    way = (
        f"Grow without it, auxin.grow(model, edit, probe=batch), and build it from the grown network, {kind}("
        f"model.parameters(), ...); or write down how it keeps step: @auxin.follow({kind})."
    )
    try:
        at_first = _Toy(optimizer, joined=True).step(0)[NEW]
    except Exception:  # its step wants a closure, a GPU, more arguments: nobody knows how to try it
        return None
    try:
        toy = _Toy(optimizer)
        wrong = _wrong_in_a_growth(optimizer, toy, at_first)
        if wrong is None and toy.goes_on_like(toy.saved_and_loaded(known), STEPS + 2):
            return None
    except Exception as error:
        wrong = f"fails on a toy that grows, is saved and loaded ({type(error).__name__}: {error})"
    if wrong is None:
        wrong = (
            "does not go on as it did once it is saved and loaded, on a toy: its steps depend on something that is not "
            "in its state and param_groups"
        )
        way = f"Say what a checkpoint holds: auxin.follow({kind}, like=torch.optim.AdamW, save=..., load=...)."
        if inner is not None:
            way = f"Pass optimizer.{inner} in its place, and go on stepping the one around it. {way}"
    return f"{wrong}. {way}"


def _wrong_in_a_growth(optimizer: Any, toy: _Toy, at_first: Tensor) -> str | None:
    """What goes wrong where a parameter joins the toy after some steps."""
    for number in range(STEPS):
        toy.step(number)
    wanted, first = at_first, _Toy(optimizer, joined=True).step(0)[NEW]
    if not _differ(first, wanted, LIKE):
        alone = _Toy(optimizer)
        for number in range(STEPS):
            alone.step(number)
        toy.join()
        if not toy.goes_on_like(alone, STEPS, OLD):
            return "steps old parameters otherwise once a new one stands between them: it knows them by their place"
        fresh = toy.with_a_fresh_optimizer()
        first, wanted = toy.step(STEPS + 1)[NEW], fresh.step(STEPS + 1)[NEW]
    if not _differ(first, wanted, LIKE):
        return None
    where = f"in {', '.join(toy.counters().values())}" if toy.counters() else "in its class, or elsewhere"
    return (
        f"counts steps outside of state[p] ({where}), so the first step of a new parameter would be another than in a "
        f"fresh optimizer ({float(first.norm() / wanted.norm()):.2f} times that on a toy after {STEPS} steps)"
    )


class _Toy:
    """Two parameters, or three, and the optimizer under test, built anew around them."""

    def __init__(self, optimizer: Any, joined: bool = False):
        shape = _shape(optimizer)
        values = torch.linspace(-1.0, 1.0, 12).reshape(shape)
        names = [OLD[0], NEW, OLD[1]] if joined else OLD
        self.original = optimizer
        self.model = nn.ParameterDict({name: nn.Parameter(values + len(name)) for name in names})
        self.optimizer = _another(optimizer, list(self.model.values()))
        self.numbers: list[list[dict[str, float]]] = []  # of the optimizer, after each step

    def step(self, number: int, names: Any = None) -> dict[str, Tensor]:
        """Step all parameters, or the named ones; how far each has moved."""
        before = {name: p.detach().clone() for name, p in self.model.items()}
        for name, p in self.model.items():
            place = torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape)
            p.grad = torch.cos(place + len(name) + number) + 2 if names is None or name in names else None
        torch.default_generator.manual_seed(number)  # of the CPU, and no other
        self.optimizer.step()
        held = _held(self.optimizer)
        self.numbers.append([{key: float(v) for key, v in own.items() if _is_number(v)} for _, own in held])
        return {name: p.detach() - before[name] for name, p in self.model.items()}

    def join(self) -> None:
        """Grow as the follower of optimizers does: a new parameter between its siblings, without a state."""
        first, third = self.model.values()
        new = nn.Parameter(first.detach().flip(0))
        self.model = nn.ParameterDict({OLD[0]: first, NEW: new, OLD[1]: third})
        self.optimizer.param_groups[0]["params"].insert(1, new)

    def goes_on_like(self, other: _Toy, number: int, names: Any = None) -> bool:
        """Whether both take the same step."""
        ours, theirs = self.step(number, names), other.step(number, names)
        return not any(_differ(theirs[name], ours[name]) for name in names or ours)

    def with_a_fresh_optimizer(self) -> _Toy:
        """The same parameters under a fresh optimizer that knows the numbers of this one, but has counted nothing."""
        fresh, counters = self._copy(), self.counters()
        for (_, mine), (_, theirs) in zip(_held(self.optimizer), _held(fresh.optimizer), strict=True):
            learned = {key: v for key, v in mine.items() if _is_number(v) and type(v) is not int}
            theirs.update({key: copy.deepcopy(v) for key, v in learned.items() if key not in counters})
        return fresh

    def counters(self) -> dict[str, str]:
        """Numbers in groups and attributes that go up by as much with each step, and where they are, in words."""
        found = {}
        for place, (where, _) in enumerate(_held(self.optimizer)):
            for key in sorted(set.intersection(*(set(numbers[place]) for numbers in self.numbers))):
                values = [numbers[place][key] for numbers in self.numbers]
                rises = [after - before for before, after in itertools.pairwise(values)]
                if rises[0] and all(math.isclose(rise, rises[0], rel_tol=CLOSE) for rise in rises):
                    found[key] = where.format(key)
        return found

    def saved_and_loaded(self, known: Registration) -> _Toy:
        """What goes on from a checkpoint of this one."""
        other = self._copy()
        names = [{id(p): name for name, p in toy.model.items()} for toy in (self, other)]
        if known.save is not None and known.load is not None:
            known.load(other.optimizer, other.model, copy.deepcopy(known.save(self.optimizer, self.model)))
        else:
            tensors, data = optimizer_state(self.optimizer, names[0])
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            restore_optimizer(other.optimizer, tensors, data, names[1])
        return other

    def _copy(self) -> _Toy:
        other = _Toy(self.original, joined=True)
        with torch.no_grad():
            for name, p in other.model.items():
                p.copy_(self.model[name])
        return other


def _another(optimizer: Any, params: list[nn.Parameter]) -> Any:
    """The optimizer as it was when it was built, around other parameters.

    Raises:
        TypeError: it holds something of which nobody knows how to copy it.
    """
    new = built(optimizer, params, _options(optimizer))
    if new is None:  # it stands around another one
        hidden = {"params", "param_names"}
        group = {key: copy.deepcopy(v) for key, v in optimizer.param_groups[0].items() if key not in hidden}
        new = _twin(optimizer, {id(optimizer.param_groups): [{**group, **_options(optimizer), "params": params}]})
    if callable(getattr(new, "train", None)):  # as those without a schedule ask for
        new.train()
    return new


def _twin(optimizer: Any, groups: dict[int, Any]) -> Any:
    """A copy without state or hooks; what shares its groups with another shares them in the copy."""
    new = object.__new__(type(optimizer))
    own = vars(new)
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            own[name] = _twin(value, groups)
        elif name == "param_groups":
            own[name] = groups[id(value)]
        elif name == "state":
            own[name] = defaultdict(dict)
        elif name.endswith("_hooks"):
            own[name] = OrderedDict()
        elif isinstance(value, DATA):
            own[name] = copy.deepcopy(value)
        elif not callable(value):
            raise TypeError(name)
    return new


def _options(optimizer: Any) -> dict[str, Any]:
    """What it was built with, so far as that can be told; a learning rate of 0 would show nothing."""
    first = optimizer.param_groups[0]
    names = {*_signature(type(optimizer)), *optimizer.defaults} - {"params", "param_names"}
    options = {**{key: first[key] for key in names if key in first}, **optimizer.defaults}
    options = {key: float(v) if key in RATES and isinstance(v, Tensor) else v for key, v in options.items()}
    return {key: 1e-3 if key in RATES and type(v) in (int, float) and v == 0 else v for key, v in options.items()}


@functools.cache
def _signature(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind).parameters


def _shape(optimizer: Any) -> tuple[int, ...]:
    """Of the toy's parameters: matrices where there are some."""
    return (3, 4) if any(p.dim() > 1 for p in optimizer.param_groups[0]["params"]) else (12,)


def _inner(optimizer: Any) -> str | None:
    """The attribute that holds an optimizer with the same groups."""
    own = vars(optimizer)
    return next((name for name, v in own.items() if getattr(v, "param_groups", None) is optimizer.param_groups), None)


def _held(optimizer: Any) -> list[tuple[str, dict[str, Any]]]:
    """Where an optimizer, and one inside it, keep numbers: their first group, and their attributes."""
    inside = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    found = [("group['{}']", optimizer.param_groups[0]), ("optimizer.{}", vars(optimizer))]
    return found + [held for one in inside for held in _held(one)]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or (isinstance(value, Tensor) and value.numel() == 1)


def _differ(one: Tensor, other: Tensor, tolerance: float = CLOSE) -> bool:
    return not bool((one - other).abs().max() <= tolerance * other.abs().max())


@contextlib.contextmanager
def _without_a_trace(kind: type) -> Iterator[None]:
    """Leave generators, the class, and whatever listens to steps as they are; say nothing."""
    optimizers: Any = sys.modules[Optimizer.__module__]
    kinds = [cls for cls in kind.__mro__ if issubclass(cls, Optimizer) and cls is not Optimizer]
    own = [(cls, name, v) for cls in kinds for name, v in vars(cls).items() if not name.startswith("__")]
    values = [(cls, name, v) for cls, name, v in own if isinstance(v, DATA)]
    listening = [optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks]
    kept = [v for _, _, v in values if isinstance(v, (dict, list, set))] + listening
    content = [list(container.items()) if isinstance(container, dict) else list(container) for container in kept]
    with contextlib.ExitStack() as held:
        held.enter_context(random_state(0))
        held.enter_context(eagerly())
        if torch.get_default_device().type != "cpu":
            held.enter_context(torch.device("cpu"))
        held.enter_context(torch.enable_grad())
        held.enter_context(contextlib.redirect_stdout(io.StringIO()))
        held.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            for hooks in listening:
                hooks.clear()
            yield
        finally:
            for container, before in zip(kept, content, strict=True):
                refill(container, before)
            for cls, name, value in values:
                setattr(cls, name, value)
