"""Running a network with wider tensors in it, for a look."""

from __future__ import annotations

import contextlib
import linecache
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.holders import aliases
from auxin.anatomy.placed import spliced
from auxin.anatomy.probe import PlanContext, tensors_in, untouched
from auxin.anatomy.rounding import FAR, by_rounding, distance, tolerance
from auxin.anatomy.tree import join
from auxin.change import MISSING, Assign, Rewire, Swap, entries_of
from auxin.errors import reason
from auxin.fsdp2 import holders, resize, units
from auxin.ranks import Ranks
from auxin.sharded import group_of, is_spread, settle

NOT_RUN = "the network would not run on the probe"
CHANGES = "the outputs on the probe would change"
SUSPECT = "a norm's epsilon or a scale in the code goes by the width"
ROUNDING = 256.0  # of the epsilon of the outputs' dtype (at best float32's), times their size
FINE = 16.0  # where the outputs are float64: what computes in float32 inside rounds less often


@contextlib.contextmanager
def standing(model: nn.Module, swaps: Iterable[Swap], assigns: Iterable[Assign]) -> Iterator[None]:
    """Let other tensors and attributes stand in the network inside."""
    modules = dict(model.named_modules(remove_duplicate=False))  # a list may be registered under two names
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    values = {id(named[join(s.path, s.name)]): s.value for s in swaps if s.value is not None}
    changed: list[tuple[dict[str, Any], str, Any]] = []
    spread = {id(t): t for t in named.values() if id(t) in values and is_spread(t)}
    known = holders(model) if spread else {}
    resized: list[Callable[[], None]] = []

    def put(own: dict[str, Any], name: str, value: Any) -> None:
        changed.append((own, name, own.get(name, MISSING)))
        own[name] = value

    try:
        for module in dict.fromkeys(modules.values()):
            for held in (module._parameters, module._buffers):
                for name, tensor in list(held.items()):
                    value = values.get(id(tensor))
                    if value is not None and id(tensor) not in spread:
                        is_parameter = isinstance(tensor, nn.Parameter)
                        put(held, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
        for key, tensor in spread.items():
            resized.append(resize(tensor, values[key], known[key]))
        for assign in assigns:
            *through, name = assign.name.split(".")
            own = modules[assign.path].__dict__
            for part in through:
                own = entries_of(own[part])
            put(own, name, assign.value)
        yield
    finally:
        for own, name, value in reversed(changed):
            own[name] = value
            if value is MISSING:
                del own[name]
        if spread:
            settle(model)
        for back in reversed(resized):
            back()


def tried(
    context: PlanContext,
    swaps: Iterable[Swap],
    assigns: Iterable[Assign],
    same: bool,
    rewires: Iterable[Rewire] = (),
) -> tuple[str, float]:
    """Run the network with wider tensors.

    Args:
        context: the network on the probe.
        swaps: the tensors.
        assigns: attributes that change with them.
        same: whether its outputs must be what they were.
        rewires: new modules that stand in it too.

    Returns:
        What is wrong, in words (empty: nothing), and by how many units of rounding the outputs differ. Of a sharded
        network the worst that any rank has found, so that all ranks go on alike.
    """
    ranks = Ranks(group_of(context.model)) if units(context.model) else Ranks()
    found = ranks.share("grow: a start", lambda: _tried(context, swaps, assigns, same, rewires))
    why, worst = max(found, key=lambda one: (bool(one[0]), one[1]))
    return why, worst


def _tried(
    context: PlanContext, swaps: Iterable[Swap], assigns: Iterable[Assign], same: bool, rewires: Iterable[Rewire]
) -> tuple[str, float]:
    if context.outputs is None:
        context.calls({})
    before = context.outputs or []
    try:
        with _wider(context, swaps, assigns, rewires), torch.no_grad():
            after = [t.detach().clone() for t in tensors_in(context.run())]
    except Exception as error:  # whatever a user's forward raises
        return f"{NOT_RUN}: {reason(error)}{_place(error)}", math.inf
    if not same:
        return "", 0.0
    if len(before) != len(after):
        return "the network would return another number of tensors", math.inf
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            return f"an output of shape {tuple(a.shape)} would have shape {tuple(b.shape)}", math.inf
        worst = max(worst, _difference(a, b))
    fine = all(t.dtype == torch.float64 for t in before if t.is_floating_point())
    if worst > (FINE if fine else ROUNDING):
        return f"{CHANGES} (by {worst:.2g} units of rounding)", worst
    off, limit = distance(before, after), tolerance(before)  # as the proof will ask
    if off > limit and units(context.model):
        limit *= FAR  # the proof measures it, on all ranks alike
    elif off > limit:
        with _wider(context, swaps, assigns, rewires):
            limit = max(limit, by_rounding(context.model, after, off, limit, context))
    if off > limit:
        return f"{CHANGES} (by {off:.2g}, of which rounding is {limit:.1g}: {SUSPECT})", worst
    return "", worst


@contextlib.contextmanager
def _wider(
    context: PlanContext, swaps: Iterable[Swap], assigns: Iterable[Assign], rewires: Iterable[Rewire]
) -> Iterator[None]:
    """Let the network be the wider one inside, in eval mode; afterwards all is as before."""
    with untouched(context.model), contextlib.ExitStack() as inside:
        for rewire in rewires:
            inside.enter_context(spliced(context.model, rewire, aliases(context.model, rewire), ()))
        inside.enter_context(standing(context.model, swaps, assigns))
        yield


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of rounding of the largest value."""
    if not a.is_floating_point() or not a.numel():
        return 0.0 if torch.equal(a, b) else float("inf")
    dtype, a, b = a.dtype, a.double(), b.double()
    told = a.isfinite() | b.isfinite()
    if not told.any():  # a network that gives nothing but NaN
        return 0.0
    size = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 1.0
    worst = float((a - b)[told].abs().nan_to_num(nan=float("inf")).max())
    eps = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else torch.finfo(torch.float32).eps
    return worst / (max(size, 1e-6) * eps)


def _place(error: BaseException) -> str:
    """The line of the network's own code at which it happened."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/torch/" not in frame.filename and "/auxin/" not in frame.filename:
            line = (linecache.getline(frame.filename, frame.lineno or 0)).strip()
            return f" ({frame.filename}:{frame.lineno}: {line[:80]})"
    return ""
