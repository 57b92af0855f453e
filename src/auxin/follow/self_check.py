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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from auxin.change import MISSING
from auxin.companion import Registration, registered
from auxin.dynamo import eagerly
from auxin.errors import GrowthError
from auxin.follow.groups import RATES
from auxin.follow.optimizer_state import optimizer_state, restore_optimizer
from auxin.randomness import random_state
from auxin.record import refill

WARM, STEPS = 12, 3  # of the toy before it grows, where RAdam has begun to move; and those that are compared
CLOSE = 1e-4  # relative difference of two steps that count as equal
EXACT = 1e-6  # ... of what a growth leaves alone
LIKE = 0.02  # ... of first steps: an epsilon may weigh otherwise
# How a step is carried out is settled where the optimizer is built; the others belong to a schedule.
SETTLED = {"foreach", "fused", "capturable", "differentiable", "base_momentum", "max_momentum", *RATES[1:]}
GROUPS = ("params", "param_groups")  # how constructors call them
DATA = (bool, int, float, str, type(None), tuple, list, dict, set, Tensor)
OLD, NEW = ("first", "third"), "second"  # the new parameter joins between the old ones


@dataclass(frozen=True)
class Found:
    """What the toy has shown of a class and its options.

    Attributes:
        problem: what goes wrong, and a way round.
        counted: what it counts in its groups, by key what that begins with. New parameters have a group of their own.
        shaped: keys of states that have the shape of their parameter; None where no toy could be trained.
        still: whether tensors of more than one dimension that are zero stay so, and the same of others: those of both
            kinds in it never begin to train.
    """

    problem: str | None = None
    counted: Mapping[str, Any] = field(default_factory=dict)
    shaped: frozenset[str] | None = None
    still: frozenset[bool] = frozenset()


_found: dict[tuple[Any, ...], Found] = {}


def self_check(optimizer: Any, known: Registration) -> None:
    """Try an optimizer on a toy: once for its class and options, on the CPU, in milliseconds, without a trace.

    Args:
        optimizer: as the user has built it; it is only read.
        known: how it is followed, saved and loaded.

    Raises:
        GrowthError: a growth or a resume of the toy goes wrong; says how, and a way round.
    """
    for place in range(len(getattr(optimizer, "param_groups", ()))):
        problem = found_of(optimizer, place, known).problem
        if problem is not None:
            raise GrowthError(f"{type(optimizer).__name__} {problem}")


def found_of(optimizer: Any, place: int = 0, known: Registration | None = None) -> Found:
    """What a toy shows of an optimizer; nothing of torch's own, and of one that is followed in a way of its own.

    Args:
        optimizer: it is only read.
        place: of the group that the toy is to have.
        known: how it is followed; looked up where it is not given.
    """
    kind, known = type(optimizer), registered(optimizer) if known is None else known
    if kind.__module__.startswith("torch.optim") or known is None or known.self_check is None:
        return Found()
    if not (hasattr(optimizer, "defaults") and optimizer.param_groups):
        return Found()
    found: list[Found] = []
    for part in _parts(_of_group(optimizer, place)):
        options = json.dumps([_options(part), rule_of(part.param_groups[0])], default=repr)
        key = (kind, known.save, known.load, _shape(part), options)
        if key not in _found:
            with _without_a_trace(kind):
                _found[key] = _tried(part, known)
        found.append(_found[key])
    return Found(
        next((one.problem for one in found if one.problem is not None), None),
        {key: value for one in found for key, value in one.counted.items()},
        found[0].shaped,
        frozenset[bool]().union(*(one.still for one in found)),
    )


def shaped_of(optimizer: Any) -> frozenset[str] | None:
    """Keys of states that have the shape of their parameter; None where no toy could be trained."""
    shaped = [found_of(optimizer, place).shaped for place in range(len(optimizer.param_groups))]
    return None if None in shaped else frozenset[str]().union(*(keys for keys in shaped if keys is not None))


def check_rates(optimizer: Any, donor: int, rate: float) -> None:
    """Whether a foreign optimizer steps a group at another rate than the one beside it.

    Args:
        optimizer: it is only read.
        donor: index of the group beside which the other would stand.
        rate: of the new group, over the donor's.

    Raises:
        GrowthError: its step fails, or takes no notice of the rate.
    """
    kind = type(optimizer)
    found = found_of(optimizer, donor)
    if found.shaped is None or rate == 1 or not optimizer.param_groups[donor].get("lr"):
        return
    optimizer = _of_group(optimizer, donor)
    with _without_a_trace(kind):
        try:
            moved = []
            for ratio in (1.0, rate):
                toy = _Toy(optimizer)
                toy.step(0)
                toy.join(found.counted, ratio)
                moved.append(sum(float(toy.step(number)[NEW].norm()) for number in range(1, WARM)))
        except Exception as error:
            raise GrowthError(
                f"{kind.__name__} does not step groups of different learning rates, as a toy shows "
                f"({type(error).__name__}: {error}). Leave lr out of group, or group=<index> of one that is there."
            ) from error
    if moved[0] and not moved[1]:
        raise GrowthError(
            f"{kind.__name__} does not step a group that is added beside its first one, as a toy shows: what is new "
            "would never train. Leave group out, or group=<index> of one that is there."
        )
    if moved[0] == moved[1]:
        raise GrowthError(
            f"{kind.__name__} takes no notice of the learning rate of a group beside its first one, as a toy shows: "
            "group=dict(lr=...) would change nothing. Leave lr out of group."
        )


def built(optimizer: Any, groups: Any, options: Mapping[str, Any]) -> Any:
    """Another optimizer of the same class around other parameters; None where it is not built as torch's are.

    Args:
        optimizer: of that class.
        groups: parameters or groups, as its constructor takes them.
        options: by name; those that its constructor does not know, and those that are settled, are left out.
    """
    known = _signature(type(optimizer))
    words = {key: value for key, value in options.items() if key in known and key not in {*GROUPS, *SETTLED}}
    needed = {key for key, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return None if needed - {*GROUPS, *words} else type(optimizer)(groups, **words)


def _tried(optimizer: Any, known: Registration) -> Found:
    """What goes wrong on the toy, and a way round; nothing where the toy cannot be trained at all."""
    kind, inner = type(optimizer).__name__, _inner(optimizer)
    way = (
        f"Grow without it, auxin.grow(model, edit, probe=batch), and build it from the grown network, {kind}("
        f"model.parameters(), ...); or write down how it keeps step: @auxin.follow({kind})."
    )
    try:
        at_first = _Toy(optimizer, joined=True).step(0)[NEW]
    except Exception as error:  # its step wants a GPU, more arguments: nobody knows how to try it
        kept, said = _elsewhere(optimizer), f"{error}".partition("\n")[0]
        if inner is None and kept is None:
            return Found()
        does = f"keeps parameters in optimizer.{kept}" if inner is None else f"stands around optimizer.{inner}"
        wrong = f"{does}, and takes no step on a toy ({type(error).__name__}: {said})"
        return Found(f"{wrong}, so it is not known what it keeps besides. {way}")
    shaped: frozenset[str] = frozenset()
    try:
        counted, toy, wrong = _as_it_counts(optimizer, at_first)
        shaped, still = toy.shaped(), frozenset({len(_shape(optimizer)) > 1} if toy.still else ())
        if wrong is None and toy.goes_on_like(toy.saved_and_loaded(known), WARM + 2):
            return Found(None, counted, shaped, still)
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
    return Found(f"{wrong}. {way}", {}, shaped)


def _as_it_counts(optimizer: Any, at_first: Tensor) -> tuple[Mapping[str, Any], _Toy, str | None]:
    """With what the own group of a new parameter begins to count, the toy that has it, and what goes wrong in that.

    What counts for little at first (a perturbation may be ten times as long as a step) is found with the tight limit.
    """
    ways = [{}, *_counters(optimizer)]
    tried = _grown(optimizer, {}, at_first, CLOSE)
    if tried[1] is None:
        return {}, *tried
    for limit in (CLOSE, LIKE):
        for apart in ways:
            with contextlib.suppress(Exception):
                toy, wrong = _grown(optimizer, apart, at_first, limit)
                if wrong is None:
                    return apart, toy, None
    return {}, *tried


def _of_group(optimizer: Any, place: int) -> Any:
    """The same optimizer, of which one group is all that is seen."""
    if place == 0 or _inner(optimizer) is not None:
        return optimizer
    return _seen(optimizer, optimizer.param_groups[place])


def _parts(optimizer: Any) -> list[Any]:
    """The same optimizer seen with its first group's matrices alone, and with all else in it: rules may differ."""
    group = optimizer.param_groups[0]
    kinds = [[p for p in group["params"] if (p.dim() > 1) == matrices] for matrices in (True, False)]
    if not all(kinds) or _inner(optimizer) is not None:
        return [optimizer]
    return [_seen(optimizer, {**group, "params": kind}) for kind in kinds]


def _seen(optimizer: Any, group: dict[str, Any]) -> Any:
    one = object.__new__(type(optimizer))
    vars(one).update({**vars(optimizer), "param_groups": [group]})
    return one


def _warm(optimizer: Any, dtype: torch.dtype = torch.float32) -> _Toy:
    toy = _Toy(optimizer, dtype=dtype)
    for number in range(WARM):
        toy.step(number)
    return toy


def _counters(optimizer: Any) -> Iterator[dict[str, Any]]:
    """What a new parameter's own group may have to begin with: all that has moved by itself, or what is counted."""
    toy, fresh = _warm(optimizer), _Toy(optimizer)
    began, group = fresh.optimizer.param_groups[0], toy.optimizer.param_groups[0]
    counted = [key for key in toy.counters() if key in group]
    plain = [k for k, v in group.items() if _is_number(v) or type(v) is bool]
    moved = [k for k in plain if k not in began or bool(torch.as_tensor(group[k] != began[k]).any())]
    for keys in ([key for key in moved if key not in _signature(type(optimizer))], counted):
        if keys:
            yield {key: copy.deepcopy(began[key]) if key in began else MISSING for key in keys}


def _grown(optimizer: Any, counted: Mapping[str, Any], at_first: Tensor, limit: float) -> tuple[_Toy, str | None]:
    """A toy that a parameter has joined after some steps, and what goes wrong in it.

    Args:
        optimizer: under test.
        counted: with what the new parameter's own group begins to count; empty: it joins that of the others.
        at_first: the step of that parameter where it was there from the start.
        limit: relative difference of its first steps that count as equal.
    """
    toy, wanted, first = _warm(optimizer), at_first, _Toy(optimizer, joined=True).step(0)[NEW]
    if not _differ(first, wanted, LIKE):
        if not _leaves_old_ones_alone(optimizer, counted):
            return toy, (
                "steps old parameters otherwise once a new one stands between them: it knows them by their place, or "
                "reckons over all of them"
            )
        still = False
        for zero in (True, False):  # where steps are as long as their parameter, one of zero tells a scale, no other
            toy = _warm(optimizer)
            toy.join(counted, zero=zero)
            first, wanted = _first_steps(toy, counted, limit)
            if _differ(first, wanted, limit):
                break
            toy.still = still and bool(first.any())
            still = not first.any()
        else:
            return toy, None
    where = f"in {', '.join(toy.counters().values())}" if toy.counters() else "in its class, or elsewhere"
    return toy, (
        f"counts steps outside of state[p] ({where}), so the first step of a new parameter would be another than in a "
        f"fresh optimizer ({float(first.norm() / wanted.norm()):.2f} times that on a toy after {WARM} steps)"
    )


def _first_steps(toy: _Toy, counted: Mapping[str, Any], limit: float) -> tuple[Tensor, Tensor]:
    """A step of a parameter that has joined, and its step under a fresh optimizer: the first that differ, if any."""
    first = wanted = torch.zeros(())
    fresh, known, moving = toy.with_a_fresh_optimizer(counted), {*toy.counters(), *counted}, 0
    for number in range(WARM, 2 * WARM):  # some stand still at first
        first, wanted = toy.step(number)[NEW], fresh.step(number)[NEW]
        moving += bool(wanted.any())
        if _differ(first, wanted, limit) or moving == STEPS:
            break
        if moving and toy.learned(known) != fresh.learned(known):
            break
    return first, wanted


def _leaves_old_ones_alone(optimizer: Any, counted: Mapping[str, Any]) -> bool:
    """Whether old parameters step as without the new one, while that has no gradient, and while it has one of zero.

    The weights before a last writer of zero have a gradient of zero at first.
    """
    for idle in (False, True):
        try:
            if not _as_without(optimizer, counted, idle, torch.float32, CLOSE):
                return False
        except Exception:
            if idle:
                raise
            continue  # some ask for every gradient
        with contextlib.suppress(Exception):  # some know no such numbers
            if not _as_without(optimizer, counted, idle, torch.float64, EXACT):  # a decay may be lost in rounding
                return False
    return True


def _as_without(optimizer: Any, counted: Mapping[str, Any], idle: bool, dtype: torch.dtype, limit: float) -> bool:
    alone, beside = _warm(optimizer, dtype), _warm(optimizer, dtype)
    beside.join(counted)
    beside.idle = idle
    return beside.goes_on_like(alone, WARM, OLD, limit)


class _Toy:
    """Two parameters, or three, and the optimizer under test, built anew around them."""

    def __init__(self, optimizer: Any, joined: bool = False, dtype: torch.dtype = torch.float32):
        shape = _shape(optimizer)
        values = torch.linspace(-1.0, 1.0, 12, dtype=dtype).reshape(shape)
        names = [OLD[0], NEW, OLD[1]] if joined else OLD
        self.original = optimizer
        self.model = nn.ParameterDict({name: nn.Parameter(values + len(name)) for name in names})
        self.optimizer = _another(optimizer, list(self.model.values()))
        self.numbers: list[list[dict[str, float]]] = []  # of the optimizer, after each step
        self.idle = False  # whether what does not move has a gradient of zero
        self.apart = False  # whether the new parameter has a group of its own
        self.still = False  # whether one of zeros has stayed so

    def shaped(self) -> frozenset[str]:
        """Keys of states that have the shape of their parameter."""
        held = [
            (key, type(value) is Tensor and value.shape == p.shape)
            for p in self.model.values()
            for key, value in self.optimizer.state.get(p, {}).items()
        ]
        return frozenset(key for key, _ in held) - {key for key, alike in held if not alike}

    def step(self, number: int, names: Any = None) -> dict[str, Tensor]:
        """Step all parameters, or the named ones; how far each has moved."""
        before = {name: p.detach().clone() for name, p in self.model.items()}

        def closure() -> Tensor:
            for name, p in self.model.items():
                place = torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape)
                moves = torch.cos(place + len(name) + number) + 2 if names is None or name in names else None
                p.grad = torch.zeros_like(p) if moves is None and self.idle else moves
            return torch.ones((), requires_grad=True)

        closure()
        torch.default_generator.manual_seed(number)  # of the CPU, and no other
        asks = inspect.signature(self.optimizer.step).parameters.get("closure")
        try:
            self.optimizer.step(*([closure] if asks is not None and asks.default is asks.empty else []))
        except Exception:
            if asks is None or asks.default is asks.empty:
                raise
            self.optimizer.step(closure)  # it asks for one all the same
        held = _held(self.optimizer)
        self.numbers.append([{key: float(v) for key, v in own.items() if _is_number(v)} for _, own in held])
        return {name: p.detach() - before[name] for name, p in self.model.items()}

    def join(self, counted: Mapping[str, Any], rate: float = 1.0, zero: bool = False) -> None:
        """Grow as the follower of optimizers does: a new parameter between its siblings, without a state.

        Args:
            counted: with what a group of its own begins to count; empty: it needs none.
            rate: of a group of its own, over that of the others.
            zero: whether it begins at zero, as last writers do.
        """
        first, third = self.model.values()
        new = nn.Parameter(torch.zeros_like(first) if zero else first.detach().flip(0))
        self.model = nn.ParameterDict({OLD[0]: first, NEW: new, OLD[1]: third})
        self.apart = rate != 1 or bool(counted)
        if self.apart:
            self.part(new, counted, rate)
        else:
            self.optimizer.param_groups[0]["params"].insert(1, new)

    def part(self, new: nn.Parameter, counted: Mapping[str, Any], rate: float = 1.0) -> None:
        """Give a parameter a group of its own."""
        donor: dict[str, Any] = self.optimizer.param_groups[0]
        group = {key: copy.deepcopy(v) for key, v in donor.items() if key != "params"}
        group |= {key: group[key] * rate for key in RATES if _is_number(group.get(key)) and rate != 1}
        group |= {**{k: v if v is MISSING else copy.deepcopy(v) for k, v in counted.items()}, "params": [new]}
        self.optimizer.param_groups.append({key: value for key, value in group.items() if value is not MISSING})

    def goes_on_like(self, other: _Toy, number: int, names: Any = None, limit: float = CLOSE) -> bool:
        """Whether both take the same step."""
        ours, theirs = self.step(number, names), other.step(number, names)
        return not any(_differ(theirs[name], ours[name], limit) for name in names or ours)

    def with_a_fresh_optimizer(self, counted: Mapping[str, Any]) -> _Toy:
        """The same parameters under a fresh optimizer that knows the numbers of this one, but has counted nothing."""
        fresh, counters = self._copy(), {*self.counters(), *counted}
        for (_, mine), (_, theirs) in zip(_held(self.optimizer), _held(fresh.optimizer), strict=True):
            learned = {key: v for key, v in mine.items() if _is_number(v) and type(v) is not int}
            theirs.update({key: copy.deepcopy(v) for key, v in learned.items() if key not in counters})
        return fresh

    def learned(self, counted: set[str]) -> list[dict[str, float]]:
        """Numbers of the optimizer that are not counted."""
        return [{key: v for key, v in numbers.items() if key not in counted} for numbers in self.numbers[-1]]

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
        if self.apart:
            other.optimizer.param_groups[0]["params"].pop(1)
            other.part(other.model[NEW], {})
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
    new, rule = None, rule_of(optimizer.param_groups[0])
    with contextlib.suppress(Exception):
        new = built(optimizer, params, _options(optimizer))
        rule = {key: v for key, v in rule.items() if new is not None and key not in new.param_groups[0]}
    if rule:  # it asks by which of its rules a group is stepped
        with contextlib.suppress(Exception):
            new = built(optimizer, [{**rule, "params": params}], _options(optimizer))
    if new is None:  # it stands around another one
        kept = {*_innermost(optimizer).defaults, *rule_of(optimizer.param_groups[0])}
        group = {key: copy.deepcopy(v) for key, v in optimizer.param_groups[0].items() if key in kept}
        new = _twin(optimizer, {id(optimizer.param_groups): [{**group, **_options(optimizer), "params": params}]})
    if callable(getattr(new, "train", None)):  # as those without a schedule ask for
        with contextlib.suppress(AttributeError):  # of the one inside, which may ask for no such thing
            new.train()
    return new


def rule_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What says by which rule a group is stepped, and not how far."""
    return {key: value for key, value in group.items() if isinstance(value, (bool, str)) and key not in SETTLED}


def _innermost(optimizer: Any) -> Any:
    inner = _inner(optimizer)
    return optimizer if inner is None else _innermost(getattr(optimizer, inner))


def _twin(optimizer: Any, shared: dict[int, Any]) -> Any:
    """A copy without state or hooks; what shares its groups or its state with another shares them in the copy."""
    new = object.__new__(type(optimizer))
    own = vars(new)
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            own[name] = _twin(value, shared)
        elif name == "param_groups":
            own[name] = shared[id(value)]
        elif name == "state":
            own[name] = shared.setdefault(id(value), defaultdict(dict))
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
    options |= {key: value for key, value in rule_of(first).items() if key in options}
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


def _elsewhere(optimizer: Any) -> str | None:
    """The attribute in which an optimizer keeps parameters besides its groups and its state."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = (key for key, value in vars(optimizer).items() if key not in (GROUPS[1], "state") and _holds(value, own))
    return next(found, None)


def _holds(value: Any, ids: set[int]) -> bool:
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return id(value) in ids or (type(items) in (list, tuple, set) and any(_holds(one, ids) for one in items))


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
