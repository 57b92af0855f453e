"""What hangs on a network and must keep step with it: one follower per kind of companion, found by its type.

A follower is a generator ``f(companion, change)`` that yields twice. Before its first ``yield`` it checks, and may
raise: nothing has been touched yet. Between the two it changes the companion. At the second it waits for the growth
to be proved: what is thrown into it there makes it take its change back.

    @auxin.follow(MyAverage)
    def follow_my_average(average, change):
        check(average)
        yield                       # the network is changed here
        before = grow(average, change)
        try:
            yield                   # the growth is proved here
        except Exception:
            restore(average, before)
            raise
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from auxin.errors import GrowthError

Follower = Callable[[Any, Any], Iterator[None]]

_followers: dict[type | str, Follower] = {}


def follow(kind: type | str, *, like: type | None = None) -> Callable[[Follower], Follower]:
    """Say how companions of one type keep step; a decorator, or with ``like=`` a statement.

    Args:
        kind: a class, or "module:qualname" of one that need not be imported yet. Subclasses are included.
        like: a class that is followed already and whose follower serves, e.g. ``follow(Lion, like=torch.optim.AdamW)``
            for an optimizer whose state is created per parameter at its first step.

    Raises:
        GrowthError: nothing follows ``like``.
    """
    if like is not None:
        follower = _lookup(like)
        if follower is None:
            raise GrowthError(f"follow({kind!r}, like={like.__name__}): nothing follows {like.__name__} itself.")
        _followers[kind] = follower

    def register(follower: Follower) -> Follower:
        _followers[kind] = follower
        return follower

    return register


def follower_of(companion: Any) -> Follower:
    """Find the follower of a companion by its type.

    Raises:
        GrowthError: there is none; shows the line that registers one.
    """
    found = _lookup(type(companion))
    if found is None:
        kind = type(companion)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if kind.__module__.startswith("accelerate."):
            raise GrowthError(
                f"{kind.__name__} is what accelerator.prepare(...) has returned: pass all of that to "
                "auxin.hosts.accelerate.Grower(accelerator, model, optimizer, scheduler, edits=..., when=...); or, for "
                "a growth by hand, the plain ones inside, optimizer.optimizer and scheduler.scheduler."
            )
        if kind.__name__ == "ZeroRedundancyOptimizer":
            raise GrowthError(
                "ZeroRedundancyOptimizer keeps on each rank the state of a part of the parameters, and would not step "
                "new ones. Use the optimizer that it shards, e.g. AdamW."
            )
        hint = (
            f"auxin.follow({kind.__name__}, like=torch.optim.AdamW) if it keeps its state per parameter and creates "
            "it at the first step"
            if any(base.__name__ == "Optimizer" for base in kind.__mro__)
            else f"@auxin.follow({kind.__name__}) before `def f(companion, change): check(); yield; change(); yield`"
        )
        raise GrowthError(
            f"{name} is not a companion that auxin knows how to keep in step (torch optimizers, schedulers, "
            f"AveragedModel, GradScaler). Register it once: {hint}; or leave it out if it does not hold parameters."
        )
    return found


def _lookup(kind: type) -> Follower | None:
    for base in kind.__mro__:
        for key in (base, f"{base.__module__}:{base.__qualname__}"):
            if key in _followers:
                return _followers[key]
    return None


def _load_ours() -> None:
    """The followers of this package register themselves."""
    for name in ("average", "ddp", "optimizer", "scaler", "scheduler"):
        importlib.import_module(f"auxin.follow.{name}")


_load_ours()
