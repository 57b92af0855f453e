"""What hangs on a network (an optimizer, a schedule, an average): all that auxin knows of its kind, in one place.

A kind is registered once, by ``auxin.follow``: how it keeps step, and, where the general way does not serve, what
``verify`` looks at, and what a checkpoint holds of it. An average, or whatever else holds copies of the network, says
which: then the copies grow, are proved, verified, saved and loaded as the network is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from auxin.errors import GrowthError

Follower = Callable[[Any, Any], Iterator[None]]


@dataclasses.dataclass(frozen=True)
class Registration:
    """All that is known of one kind of companion.

    Attributes:
        follower: generator ``f(companion, change)`` that yields twice, see ``auxin.follow``.
        self_check: ``f(companion, registration)``: raises where a companion would not be followed rightly.
        wraps: ``f(companion)``: the copies of the network that it holds.
        verify: ``f(companion, model)``: what is wrong with it, one text each.
        save: ``f(companion, model)``: its state, as ``state_dict()`` would return it.
        load: ``f(companion, model, state)``: puts such a state back.
    """

    follower: Follower
    self_check: Callable[[Any, Registration], None] | None = None
    wraps: Callable[[Any], Iterable[Any]] | None = None
    verify: Callable[[Any, Any], Iterable[str]] | None = None
    save: Callable[[Any, Any], Any] | None = None
    load: Callable[[Any, Any, Any], None] | None = None


SECOND_TREE = "a second tree over the network's blocks"  # no class of its own says what it is
_registered: dict[type | str, Registration] = {}


def register(kind: type | str, registration: Registration) -> None:
    """Register all that is known of a kind of companion."""
    _registered[kind] = registration


def follow(
    kind: type | str,
    *,
    like: type | str | None = None,
    wraps: Callable[[Any], Iterable[Any]] | None = None,
    verify: Callable[[Any, Any], Iterable[str]] | None = None,
    save: Callable[[Any, Any], Any] | None = None,
    load: Callable[[Any, Any, Any], None] | None = None,
) -> Callable[[Follower], Follower]:
    """Say how companions of one type keep step; a decorator, or with ``like=`` a statement.

    Args:
        kind: a class, or "module:qualname" of one that need not be imported yet. Subclasses are included.
        like: a class that is followed already, or its text; its registration serves, but for what is given beside it,
            e.g. ``follow(Lion, like=torch.optim.AdamW)`` for an optimizer whose state is created per parameter at its
            first step, or ``follow(EMA, like=AveragedModel, wraps=lambda ema: [ema.ema_model])`` for an average.
        wraps: ``f(companion)``, returns the copies of the network that it holds, an average's for example. They are
            verified and saved with it, and with ``like=AveragedModel`` they grow.
        verify: ``f(companion, model)``, returns what ``auxin.verify`` is to tell of it, one text each.
        save: ``f(companion, model)``, returns what a checkpoint is to hold (numbers, texts, lists, dicts, tensors);
            without it, the copies that it wraps and its own tensors, or else its ``state_dict()``.
        load: ``f(companion, model, state)``, puts what ``save`` has returned back in place.

    Raises:
        GrowthError: nothing follows ``like``, or one of ``save`` and ``load`` is missing.
    """
    if (save is None) != (load is None):
        raise GrowthError(f"follow({kind!r}): pass save= and load= together; one without the other serves nothing.")
    hooks = {"wraps": wraps, "verify": verify, "save": save, "load": load}
    given = {name: hook for name, hook in hooks.items() if hook is not None}

    def register(follower: Follower) -> Follower:
        _registered[kind] = Registration(follower, **given)
        return follower

    if like is not None:
        known = _registered.get(like) if isinstance(like, str) else _lookup(like)
        if known is None:
            name = like if isinstance(like, str) else like.__name__
            raise GrowthError(f"follow({kind!r}, like={name}): nothing follows {name} itself.")
        _registered[kind] = dataclasses.replace(known, **given)
    return register


def registered(companion: Any) -> Registration | None:
    """Return what is registered for the kind of a companion, if anything is."""
    found = _lookup(type(companion))
    return _registered.get(SECOND_TREE) if found is None and original_of(companion) is not None else found


def registration_of(companion: Any) -> Registration:
    """Return what is registered for the kind of a companion, once the companion has passed the self-check of its kind.

    Raises:
        GrowthError: nothing is registered, and the message shows the line that does it; or the self-check fails.
    """
    found = registered(companion)
    if found is None:
        raise GrowthError(_unknown(companion))
    if found.self_check is not None:
        found.self_check(companion, found)
    return found


def original_of(model: Any) -> nn.Module | None:
    """Return the network over which ``model`` is a second tree of containers, as ``compile_regions`` makes one."""
    inner = model.__dict__.get("_orig_mod") if isinstance(model, nn.Module) else None
    return inner if isinstance(inner, nn.Module) and "_orig_mod" not in model._modules else None


def _lookup(kind: type) -> Registration | None:
    for base in kind.__mro__:
        for key in (base, f"{base.__module__}:{base.__qualname__}"):
            if key in _registered:
                return _registered[key]
    return None


def _unknown(companion: Any) -> str:
    """Say what a user can do about a companion that nothing follows."""
    kind = type(companion)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.startswith("accelerate."):
        return (
            f"{kind.__name__} is what accelerator.prepare(...) has returned: pass all of that to "
            "auxin.hosts.accelerate.Grower(accelerator, model, optimizer, scheduler, edits=..., when=...); or, for "
            "a growth by hand, the plain ones inside, optimizer.optimizer and scheduler.scheduler."
        )
    if kind.__name__ == "ZeroRedundancyOptimizer":
        return (
            "ZeroRedundancyOptimizer keeps on each rank the state of a part of the parameters, and would not step "
            "new ones. Use the optimizer that it shards, e.g. AdamW."
        )
    hint = (
        f"auxin.follow({kind.__name__}, like=torch.optim.AdamW) if it keeps its state per parameter and creates "
        "it at the first step"
        if any(base.__name__ == "Optimizer" for base in kind.__mro__)
        else f"@auxin.follow({kind.__name__}) before `def f(companion, change): check(); yield; change(); yield`"
    )
    tree = (
        " If it is a second tree over the blocks of the network: tree.__dict__['_orig_mod'] = model, and pass it in "
        "place of the model."
        if issubclass(kind, nn.Module)
        else ""
    )
    # A schedule holds no parameters, and yet what it keeps per group must grow with an own group.
    if not isinstance(getattr(getattr(companion, "optimizer", None), "param_groups", None), list):
        hint += (
            f", or, for an average of the network, auxin.follow({kind.__name__}, like=AveragedModel, "
            "wraps=lambda average: [average.module]); or leave it out if it does not hold parameters"
        )
    return (
        f"{name} is not a companion that auxin knows how to keep in step (torch optimizers, schedulers, "
        f"AveragedModel, GradScaler). Register it once: {hint}.{tree}"
    )
