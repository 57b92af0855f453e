"""Every ``torch.optim`` optimizer: new parameters join existing groups or get their own, state follows what was
resized.

Old entries keep their order, their group and their state; a new whole tensor gets its state at its first step, with its
own step count, so that bias correction starts where it should.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from auxin.axes import BORN, Axes, Axis, Kind, carried, shape_after
from auxin.change import Change, Move, OwnGroup
from auxin.companion import Registration, register
from auxin.errors import GrowthError
from auxin.follow.groups import made, places_in
from auxin.follow.self_check import self_check, shaped_of
from auxin.newborn import is_corrected, restarts
from auxin.sharded import here, is_spread, spread_like, whole
from auxin.structure import reversible

# Second moments under bias correction: zeros with an old step count would take steps up to 6.6 times too long. Where
# that is not mended (``newborn.py``), they start from a mean of old ones.
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
# How a state scales with its parameter's gradient; others do not (counts, Rprop's step sizes, Adadelta's steps).
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg", "prev", "exp_inf"), "gradient"),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance", "row_var", "col_var"), "square"),
}
STATE_KINDS = ("amsgrad", "centered", "momentum")  # options that decide what a state holds
INSERTED = ("_checkpoint_wrapped_module", "_orig_mod")  # into names, by wrappers
LBFGS_HISTORY = ("d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss", "al")


def follow_optimizer(optimizer: Any, change: Change) -> Iterator[None]:
    """Add, drop and resize entries; see the module's docstring.

    Raises:
        GrowthError: the optimizer holds none of the model's parameters, holds one twice, or its state cannot be mapped.
    """
    _check(optimizer, change)
    yield
    entries = [(list(group["params"]), list(group.get("param_names") or ())) for group in optimizer.param_groups]
    state, flat = dict(optimizer.state), _flat(optimizer)
    after: dict[Any, Any] | None = None

    def write() -> None:
        nonlocal after
        _apply(optimizer, change)
        after = dict(optimizer.state)

    def back() -> None:
        left = dict(optimizer.state) if after is None else after
        _take_back(optimizer, entries, state, left, {move.old for move in change.moves if move.reshaped})
        for name, value in flat.items():
            setattr(optimizer, name, value)

    yield from reversible(write, back)


def _take_back(
    optimizer: Any, entries: list[Any], state: dict[Any, Any], after: dict[Any, Any], reshaped: set[Any]
) -> None:
    """Give groups and state the entries that they had; of what the change has not touched, the state goes on.

    Args:
        optimizer: it may have stepped since, or loaded a state, which makes its groups and states other objects.
        entries: parameters and names of each group before the change.
        state: before the change.
        after: the same after it.
        reshaped: parameters of another shape meanwhile; a state that they have got since is of that shape.
    """
    del optimizer.param_groups[len(entries) :]
    for group, (params, names) in zip(optimizer.param_groups, entries, strict=True):
        group["params"][:] = params
        if group.get("param_names") is not None:
            group["param_names"][:] = names
    left = {id(p) for params, _ in entries for p in params}
    own = {p: now for p, now in optimizer.state.items() if id(p) in left or p in state}
    touched = reshaped | {p for p in {**state, **after} if state.get(p) is not after.get(p)}
    for p in touched:
        own.pop(p, None)
    own |= {p: state[p] for p in touched if p in state}
    optimizer.state.clear()
    optimizer.state.update({p: own.pop(p) for p in state if p in own} | own)


for _name in torch.optim.__all__ if hasattr(torch.optim, "__all__") else dir(torch.optim):
    _kind = getattr(torch.optim, _name)
    if isinstance(_kind, type) and issubclass(_kind, torch.optim.Optimizer) and _kind is not torch.optim.Optimizer:
        register(_kind, Registration(follow_optimizer, self_check))


def _flat(optimizer: Any) -> dict[str, Any]:
    """Attributes that LBFGS derives from its parameter list."""
    return {name: getattr(optimizer, name) for name in ("_numel_cache",) if hasattr(optimizer, name)}


def _check(optimizer: Any, change: Change) -> None:
    kind = type(optimizer).__name__
    names = {id(p): name for name, p in change.before.parameters.items()}
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    if change.before.parameters and not any(i in names for i in held):
        raise GrowthError(
            f"{kind} holds none of this model's parameters: it belongs to another model, or was built from copies. "
            f"Build it from this one: torch.optim.{kind}(model.parameters(), ...)."
        )
    twice = (
        sorted({names.get(i, "a parameter of another model") for i, n in Counter(held).items() if n > 1})
        if len(set(held)) != len(held)
        else []
    )
    if twice:
        raise GrowthError(
            f"{kind} holds {', '.join(twice[:4])} more than once; it would be stepped twice. Build it with each once."
        )
    for group in optimizer.param_groups:
        listed = group.get("param_names")
        if listed is not None and len(listed) != len(group["params"]):
            raise GrowthError(
                f"{kind}: a group has {len(group['params'])} parameters and {len(listed)} param_names; something was "
                "appended without its name."
            )
    for move in change.moves:
        source = _source(move)
        if source is not None and source in optimizer.state:
            _mapped(optimizer, move, optimizer.state[source], dry=True)
    for own in change.groups:
        if own.optimizer is optimizer:
            _check_state(optimizer, own, change)
    if isinstance(optimizer, torch.optim.LBFGS) and any(join.group for join in change.joins.values()):
        raise GrowthError("LBFGS has one parameter group only.")


def _check_state(optimizer: Any, own: OwnGroup, change: Change) -> None:
    """Refuse to carry a state into a group whose options ask for another kind of state."""
    donor = optimizer.param_groups[own.donor]
    other = [key for key in STATE_KINDS if key in own.options and bool(own.options[key]) != bool(donor[key])]
    for move in change.moves if other else ():
        join = change.joins.get(id(move.new))
        if join is None or join.optimizer is not optimizer or join.group != own.index:
            continue
        copied = move.source is not None and move.source in optimizer.state
        if copied or move.new in optimizer.state:
            way = "Use state='fresh'." if copied else "Drop it first: del optimizer.state[p]."
            raise GrowthError(
                f"{move.name} would go on from an optimizer state that was made under {other[0]}={donor[other[0]]!r}, "
                f"which does not serve group=dict({other[0]}={own.options[other[0]]!r}). {way}"
            )


def _apply(optimizer: Any, change: Change) -> None:
    order = {id(p): place for place, p in enumerate(change.after.values())}
    first = next(iter(optimizer.param_groups[0]["params"]), None)
    touched, states = bool(change.trains), dict(optimizer.state)
    for move in change.moves:
        if move.continues:
            touched |= _continue(optimizer, move)
    for own in change.groups:
        if own.optimizer is optimizer:
            optimizer.param_groups.append(made(optimizer.param_groups[own.donor], own))
    for index, group in enumerate(optimizer.param_groups):
        joined = [m for m in change.moves if _joins(change, m, optimizer, index)]
        if joined:
            touched = True
            _enter(optimizer, group, joined, change, order, states)
        _thaw(optimizer, group, change, states)
    for move in change.moves:
        if move.removed:
            touched |= _drop(optimizer, move)
    _rename(optimizer, change)
    if touched and isinstance(optimizer, torch.optim.LBFGS):
        _forget_history(optimizer, first)


def _joins(change: Change, move: Move, optimizer: Any, index: int) -> bool:
    join = change.joins.get(id(move.new)) if move.new is not None else None
    return join is not None and join.optimizer is optimizer and join.group == index


def _enter(
    optimizer: Any,
    group: dict[str, Any],
    joined: list[Move],
    change: Change,
    order: dict[int, int],
    states: Mapping[Any, Any],
) -> None:
    names = {id(move.new): move.name for move in joined}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for move in joined:
        if id(move.new) in held:  # it waited in another group, frozen
            _leave(optimizer, move.new)
    entering = [(move.new, change.joins[id(move.new)].sibling) for move in joined]
    for index, new in places_in(group["params"], entering, order):
        group["params"].insert(index, new)
        if group.get("param_names") is not None:
            group["param_names"].insert(index, names[id(new)])
    for move in joined:
        _begin_state(optimizer, group, move, states)


def _thaw(optimizer: Any, group: dict[str, Any], change: Change, states: Mapping[Any, Any]) -> None:
    """Parameters that the group held frozen, and that begin to train."""
    starting = set(change.starting)
    thawing = [m for m in change.moves if m.name in starting and m.old is not None and m.new not in optimizer.state]
    held = {id(p) for p in group["params"]} if thawing else ()
    for move in thawing:
        if id(move.new) in held:
            _begin_state(optimizer, group, move, states)


def _begin_state(optimizer: Any, group: dict[str, Any], move: Move, states: Mapping[Any, Any]) -> None:
    new = move.new
    assert new is not None
    if new in optimizer.state:
        return  # it waited in another group, frozen
    if move.source is not None and move.source in states:
        optimizer.state[new] = _mapped(optimizer, move, states[move.source])
    elif isinstance(optimizer, torch.optim.SGD) and group.get("fused") and group.get("momentum"):
        # The fused kernel cannot mix entries with and without a buffer (TypeError in torch 2.13).
        if any("momentum_buffer" in optimizer.state.get(p, ()) for p in group["params"]):
            optimizer.state[new] = {"momentum_buffer": torch.zeros_like(new)}


def _continue(optimizer: Any, move: Move) -> bool:
    """A resized tensor, or one that took another's place: same entry, its state carried on."""
    entries = [(g["params"], i) for g in optimizer.param_groups for i, p in enumerate(g["params"]) if p is move.old]
    if not entries:
        return False
    state = optimizer.state.pop(move.old, None)
    goes_on = not move.reshaped if move.axes is None else all(axis.size for axis in move.axes)
    if state is not None and goes_on:
        optimizer.state[move.new] = _mapped(optimizer, move, state)
    for params, index in entries:
        params[index] = move.new
    return True


def _drop(optimizer: Any, move: Move) -> bool:
    held = _leave(optimizer, move.old)
    if held:
        optimizer.state.pop(move.old, None)
    return held


def _leave(optimizer: Any, parameter: Any) -> bool:
    """Take a parameter out of its group; whether it was in one."""
    for group in optimizer.param_groups:
        for index, p in enumerate(group["params"]):
            if p is parameter:
                del group["params"][index]
                if group.get("param_names") is not None:
                    del group["param_names"][index]
                return True
    return False


def _rename(optimizer: Any, change: Change) -> None:
    """Names in ``param_names`` that are the model's own names follow the model's new names.

    They may leave out what wrappers insert, as torchtitan's do; then those of new parameters leave it out too.
    """
    groups = [(group["params"], group["param_names"]) for group in optimizer.param_groups if group.get("param_names")]
    old_names = {id(p): name for name, p in change.before.parameters.items()}
    new_names = {id(p): name for name, p in change.after.items()}
    pairs = [pair for held, names in groups for pair in zip(held, names, strict=True)]
    named = [(old_names[id(p)], name) for p, name in pairs if id(p) in old_names]
    bare = any(name == _unwrapped(old) != old for old, name in named)
    for held, names in groups:
        for index, p in enumerate(held):
            new = new_names.get(id(p))
            old = old_names.get(id(p), new)  # a new one is listed by its name already
            if new is not None and old is not None and names[index] in (old, _unwrapped(old) if bare else old):
                names[index] = _unwrapped(new) if bare else new


def _unwrapped(name: str) -> str:
    """A name without what activation checkpointing and compiling insert into it."""
    return ".".join(part for part in name.split(".") if part not in INSERTED)


def _forget_history(optimizer: Any, first: Any) -> None:
    """LBFGS keeps flat vectors over all parameters, under its first one: start the curvature estimate afresh."""
    now = optimizer.param_groups[0]["params"][0]
    held = [
        optimizer.state.pop(p, {}) for p in ((first,) if now is first else (first, now))
    ]  # it may be another object
    state = {k: v for one in held for k, v in one.items() if k not in LBFGS_HISTORY}
    if state:
        optimizer.state[now] = {**state, "n_iter": 0}
    optimizer._numel_cache = None


def _source(move: Move) -> Any:
    """The parameter whose state a move carries on, in another shape or order; None: there is nothing to work out."""
    return None if move.axes is None else move.source if move.added else move.old


def _mapped(optimizer: Any, move: Move, state: dict[str, Any], dry: bool = False) -> dict[str, Any]:
    """The state of a parameter whose axes change: old entries where they continue, new ones fresh.

    ``dry``: only look whether it can be mapped.
    """
    axes = move.axes if move.axes is None else tuple(map(_restarting, move.axes))
    if isinstance(optimizer, torch.optim.LBFGS):
        axes = None  # of all parameters, and forgotten
    same = axes is None or all(axis.is_same for axis in axes)
    shaped = shaped_of(optimizer)
    mapped: dict[str, Any] = {}
    for key, held in state.items():
        value = here(held)
        if axes is None or same or (isinstance(value, Tensor) and value.dim() == 0) or not _has_tensors(value):
            mapped[key] = _copy(optimizer, held, move)
            continue
        known = type(value) is Tensor and (shaped is None or key in shaped or held.numel() == 1)
        own = _axes_of(optimizer, key, held, axes) if known else None
        if own is None:
            raise GrowthError(
                f"{type(optimizer).__name__}: its state {key!r} {_told(held)} of {move.name} does not follow "
                f"the tensor's shape {tuple(axis.size for axis in axes)}, so it is not known how to resize it to "
                f"{tuple(move.shape)}. Drop it first: del optimizer.state[p]."
            )
        if dry:
            continue
        value, share = whole(held), _share(axes, own)  # of sharded ones one after the other
        value = value if share == 1 else (value * share).to(value.dtype)
        wider = carried(value, own, _fresh(optimizer, key, value, own, move), _kind(optimizer, key))
        mapped[key] = spread_like(wider, held)
    return mapped


def _copy(optimizer: Any, value: Any, move: Move) -> Any:
    """A state that goes on as it is."""
    try:
        return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise GrowthError(
            f"{type(optimizer).__name__}: its state of {move.name} cannot be copied ({type(error).__name__}: "
            f'{f"{error}".splitlines()[0][:120]}). Use state="fresh", or drop it first: del optimizer.state[p].'
        ) from error


def _has_tensors(value: Any) -> bool:
    """Whether a state is a tensor, or a list, deque, tuple or dict that holds some."""
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple, deque)) else ()
    return isinstance(value, Tensor) or any(map(_has_tensors, inside))


def _told(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"(a {type(value).__name__} of tensors)"


def _restarting(axis: Axis) -> Axis:
    """The axis for states: copies that are to forget theirs start as what is born."""
    return Axis(torch.where(restarts(axis), BORN, axis.index), axis.size, axis.value, axis.gradient)


def _axes_of(optimizer: Any, key: str, value: Tensor, axes: Axes) -> Axes | None:
    """The axes of a state tensor: the parameter's own, or one entry where it is reduced; None where that is not known.

    Adafactor keeps the mean over rows and over columns of the second moment; of an axis of size 1 the shape does not
    tell which it is.
    """
    if value.dim() != len(axes):
        return None
    reduced = {a for a, axis in enumerate(axes) if value.shape[a] == 1 != axis.size}
    if isinstance(optimizer, torch.optim.Adafactor) and key in ("row_var", "col_var"):
        reduced.add(len(axes) - (1 if key == "row_var" else 2))
    if any(value.shape[a] != axis.size for a, axis in enumerate(axes) if a not in reduced):
        return None
    return tuple(Axis.same(1) if a in reduced else axis for a, axis in enumerate(axes))


def _share(axes: Axes, own: Axes) -> float:
    """By what a mean of squares changes with the axes over which it is taken: by the mean square of their scales."""
    share = 1.0
    for axis, kept in zip(axes, own, strict=True):
        known = ~axis.born
        if kept is not axis and axis.gradient is not None and known.any():
            share *= float(axis.gradient[known].square().mean())
    return share


def _kind(optimizer: Any, key: str) -> Kind:
    """How a state scales with the gradient: linearly, with its square, as the parameter does, or not at all."""
    if isinstance(optimizer, torch.optim.ASGD) and key == "ax":
        return "value"
    if isinstance(optimizer, torch.optim.RMSprop) and key == "momentum_buffer":
        return "plain"  # of steps, not of gradients
    return KINDS.get(key, "plain")


def _fresh(optimizer: Any, key: str, value: Tensor, own: Axes, move: Move) -> Tensor:
    """What new entries start from, as a fresh optimizer would; in the parameter's memory order.

    Fused kernels step wrongly, without a word, where the two orders differ.
    """
    assert move.new is not None
    shape = shape_after(own)
    follows = move.new.shape == shape and not is_spread(move.new)
    like = move.new.detach() if follows else value.new_empty(shape)
    fresh = torch.empty_like(like, dtype=value.dtype, device=value.device)
    if key in SECOND_MOMENTS and not is_corrected(optimizer):
        grown = [a for a, axis in enumerate(own) if axis.born.any()]
        alone = len(grown) == 1 and value.dim() > 1 and value.shape[grown[0]] > 0
        kept = [axis if a not in grown else Axis.same(axis.size) for a, axis in enumerate(own)]
        if alone:  # the mean of the same row or column
            wide = carried(value, tuple(kept), value.new_zeros(shape_after(tuple(kept))), "square")
            return fresh.copy_(wide.mean(grown[0], keepdim=True).expand(shape))
        return fresh.copy_(value.mean().expand(shape))
    if isinstance(optimizer, torch.optim.ASGD) and key == "ax":
        return fresh.copy_(whole(move.new.detach())) if move.new.shape == shape else fresh.zero_()
    group = next(
        (g for g in optimizer.param_groups if any(p is move.new or p is _source(move) for p in g["params"])), {}
    )
    if isinstance(optimizer, torch.optim.Rprop) and key == "step_size":
        return fresh.fill_(float(group["lr"]))
    if isinstance(optimizer, torch.optim.Adagrad) and key == "sum":
        return fresh.fill_(float(group.get("initial_accumulator_value", 0.0)))
    return fresh.zero_()
