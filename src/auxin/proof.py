"""The proof of a growth on the probe: outputs as promised, the new module called, a gradient at its writers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.blocks import CONTAINERS, Container, beside, counters
from auxin.anatomy.gradients import gradients_of, probe_loss
from auxin.anatomy.placed import parts, registrations
from auxin.anatomy.probe import PlanContext, tensors_in, untouched
from auxin.anatomy.rounding import Outputs, by_rounding, distance, tolerance
from auxin.anatomy.shaken import asleep, multiplied_by_zero, run_with_other_weights
from auxin.anatomy.tree import join, module_at, runs_by_parts
from auxin.anatomy.widths.mixtures import router_of
from auxin.axes import Part
from auxin.change import Change
from auxin.errors import GrowthError, about_arguments, reason
from auxin.flow import counterparts, distinct, inside, ratio, sizes, units
from auxin.fsdp2 import is_unit
from auxin.gate import set_gate
from auxin.listing import in_words
from auxin.record import Record
from auxin.sharded import spread_like, whole


@dataclasses.dataclass(frozen=True)
class Baseline:
    """The network's output tensors on the probe, in eval mode, and how often children of containers ran (by ``id``)."""

    outputs: Outputs
    called: Mapping[int, int]


def outputs_of(context: PlanContext) -> Outputs:
    """The network's output tensors on the probe, in eval mode.

    Raises:
        GrowthError: the network does not run on the probe.
    """
    return baseline_of(context).outputs


def baseline_of(context: PlanContext) -> Baseline:
    """What the network does on the probe before it grows; without a forward where the plan has had one.

    Raises:
        GrowthError: the network does not run on the probe.
    """
    try:
        if context.outputs is None:
            context.calls({})
        found = context.outputs or []
    except GrowthError:
        raise
    except Exception as error:  # whatever a user's forward raises
        raise does_not_run(context.model, error) from error
    if not found:
        raise GrowthError(f"probe: {type(context.model).__name__} returns no tensor, so nothing can be compared.")
    floating = [t for t in found if t.is_floating_point()]
    if floating and not any(bool(t.isfinite().any()) for t in floating):
        count = _not_finite(tensors_in(context.batch))
        why = (
            f"{_holds(count)}. Pass a batch without NaN and inf" if count else "the run has diverged before this growth"
        )
        raise GrowthError(
            f"probe: {type(context.model).__name__} returns no finite number on it, so nothing can be proved; {why}."
        )
    return Baseline(found, context.called)


def spoiled_by_probe(context: PlanContext) -> str:
    """What to say of a probe that is not finite, and of which the network's outputs are not either; else "".

    A mask may hold minus infinity, and outputs may: that is no reason by itself to refuse a growth.
    """
    lost = _not_finite(baseline_of(context).outputs)  # first: a probe that fails says so there
    count = _not_finite(tensors_in(context.batch))
    if not count or not lost:
        return ""
    return f"{_holds(count)}, and the network returns {lost} on it. Pass a batch without NaN and inf"


def _not_finite(tensors: Iterable[Tensor]) -> int:
    """Count them in dense tensors of a dtype that torch computes with: not in 8 bits."""
    dense = (t for t in tensors if t.is_floating_point() and t.layout is torch.strided and not t.is_nested)
    return sum(int((~t.isfinite()).sum()) for t in dense if t.element_size() > 1)


def _holds(count: int) -> str:
    return f"the probe holds {count} number{'s' * (count > 1)} that {'is' if count == 1 else 'are'} not finite"


def does_not_run(model: nn.Module, error: Exception) -> GrowthError:
    """Build the error that says why the network does not take the probe."""
    return GrowthError(
        f"probe: {type(model).__name__} does not run on it: {reason(error)}. Pass the batch as the "
        "training loop calls the model: a tensor, a tuple of positional arguments, or a dict of keywords."
    )


def prove(model: nn.Module, change: Change, context: PlanContext, before: Baseline) -> Change:
    """Run the grown network on the probe; fill in what was measured.

    Raises:
        GrowthError: it does not run, its outputs changed where they must not, a new module was not called, an old one
            is not called any more, or no gradient reaches a new one.
    """
    # Run the grown network with hooks on what is new and on what stands beside it, and take the gradients.
    called: set[str] = set()
    near = {p: m for p, m in _kept(model, change).items() if id(m) in before.called}
    with untouched(model) as tree:
        times = registrations(tree.modules.values())
        for path, new in change.added:
            _note_calls(path, parts(new.module, times), called)
        for path, module in near.items():
            _note_calls(path, parts(module, times) if runs_by_parts(module) else (module,), called)
        after, grads = _run(model, change, context, tree)
        late = _reached_late(model, change, context, grads, tree)
        if not near.keys() <= called:  # perhaps forward calls their parts now
            for path in near.keys() - called:
                _note_calls(path, parts(near[path], times), called)
            with torch.no_grad():
                context.run()
    # A new module that did not run is a fault, unless only these data lead past it; so is an old one that runs no more.
    missing = [path for path, _ in change.added if path not in called]
    cold = _cold(model, change, context, before, missing)
    lost = [path for path in missing if path not in cold]
    if lost:
        raise GrowthError(_never_called(model, lost[0], change))
    displaced = [path for path in near if path not in called]
    if displaced and change.how != "surgery":
        raise GrowthError(_displaced(model, displaced[0], change))
    notes = (*cold.values(), *(f"{path} is not called any more" for path in displaced))
    often = [f"{path} runs {before.called[id(m)]} times" for path, m in near.items() if before.called[id(m)] > 1]
    difference = _compare(before.outputs, after, change, often, context)
    unseen = {name for name in change.starting if name.startswith(tuple(f"{path}." for path in cold))}
    if not unseen or unseen < {name for name in change.starting if name in grads}:
        checked = {name: grad for name, grad in grads.items() if name not in unseen}
        for step in change.steps:
            notes = (*notes, *_check_gradients(step, checked, late, context))
    together, each = _ratios(change, grads)
    if difference is None:
        notes = (*notes, "output shape changed")
    idle = [n for n in _idle(change, grads) if n not in late] if change.preserves and not change.gates else []
    notes = (
        *notes,
        *(f"no gradient at {n}, as in the block that it copies" for n in idle),
        *_silent(change, grads, context),
    )
    return change.with_measured(*notes, max_difference=difference, gradient_ratio=together, gradient_ratios=each)


def _note_calls(path: str, modules: Iterable[nn.Module], called: set[str]) -> None:
    """Put ``path`` into ``called`` once one of the modules has run."""
    for module in modules:
        module.register_forward_hook(lambda *_: called.add(path))


def _cold(
    model: nn.Module, change: Change, context: PlanContext, before: Baseline, missing: list[str]
) -> dict[str, str]:
    """Find those of the new modules that did not run which forward may call with other data, and write a note for each.

    A module is one of them if it runs with other weights, or if an old entry beside it does not run on this probe
    either.
    """
    olds = change.before.modules
    known = {id(module) for module in olds.values()}
    reachable = run_with_other_weights(context, missing)
    notes: dict[str, str] = {}
    for path in missing:
        container = olds.get(at := path.rpartition(".")[0])
        beside = container._modules.items() if isinstance(container, CONTAINERS) else ()
        idle = [join(at, name) for name, m in beside if id(m) in known - before.called.keys()]
        if path in reachable or idle:
            nor = f" (nor to {', '.join(idle[:3])})" if idle else ""
            notes[path] = f"no row of this probe is routed to {path}{nor}, so its gradient was not checked"
    return notes


def _kept(model: nn.Module, change: Change) -> dict[str, nn.Module]:
    """Collect the old children of containers that have got new ones, by path after the change."""
    kept: dict[str, nn.Module] = {}
    for before, rewire in ((step.before, rewire) for step in change.steps for rewire in step.rewires):
        container = before.modules[rewire.path]
        if isinstance(container, CONTAINERS):
            names = [name for name, child in rewire.children if isinstance(child, str)]
            kept |= {join(rewire.path, n): c for n in names if (c := container._modules.get(n)) is not None}
    return kept


def _run(
    model: nn.Module, change: Change, context: PlanContext, tree: Record
) -> tuple[Outputs, dict[str, Tensor | None]]:
    """Return the outputs on the probe, and the gradients of the new weights and of what they are compared with.

    Autograd records from the first module on that holds one of these weights; what stands in front of it runs as in a
    frozen network.
    """
    parameters = tree.parameters
    others = [name for name in counterparts(change).values() if name is not None]
    exact = (*change.writers, *(part.name for part in change.parts))
    names = (*change.starting, *exact, *others)
    wanted = {n: p for n in names if (p := parameters.get(n)) is not None and p.requires_grad}
    try:
        after = _behind_shut_gates(model, change, context)
        out: Outputs = []
        grads: dict[str, Tensor | None] = {}
        for every in (True,) if is_unit(model) else (False, True):
            with torch.set_grad_enabled(every):
                if not every:
                    _record_from(tree.modules.values(), wanted)
                out = list(tensors_in(context.run()))
            with torch.enable_grad():
                loss = probe_loss(out) if wanted else None
                known = {} if loss is None else gradients_of(loss, model, parameters, exact)
            grads = {name: whole(known[name]) for name in wanted} if known else {}
            # Weights used before their module is called, or inside a reentrant checkpoint, need the whole forward.
            if not wanted or (grads and all(grad is not None for grad in grads.values())):
                break
        return [t.detach().clone() for t in out] if after is None else after, grads
    except GrowthError:
        raise
    except Exception as error:  # whatever a user's forward raises
        where = ", ".join(path for path, _ in change.added) or "the network"
        fit = "the network's forward may count, name or unpack what stands there."
        if about_arguments(error):
            fit = "its forward must take the arguments that the network calls it with."
        elif any("Cache" in type(given).__name__ for given in context.batch[1].values()):
            fit = "the cache in the probe has places for the old blocks alone: leave it out of the probe."
        elif isinstance(error, RuntimeError):
            fit = "its input and output widths must fit what stands before and behind it."
        at = where.split(", ")[0].rpartition(".")[0]
        shapes = "; ".join(dict.fromkeys(" ".join(repr(new.module).split())[:80] for _, new in change.added))
        raise GrowthError(
            f"{where}: the grown network does not run on the probe: {reason(error)}."
            f"{_counted(model, at, change)} The new layer is {shapes or 'none'}; {fit}{_whole(model, at)}"
        ) from error


def _record_from(modules: Iterable[nn.Module], wanted: Mapping[str, nn.Parameter]) -> None:
    """Let autograd record from the first call of a module on that holds a wanted parameter.

    ``untouched`` takes the hooks away again.
    """
    ids = {id(p) for p in wanted.values()}
    for module in modules:
        if not ids.isdisjoint(map(id, module._parameters.values())):
            module.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(True) and None, prepend=True)


def _reached_late(
    model: nn.Module, change: Change, context: PlanContext, grads: dict[str, Tensor | None], tree: Record
) -> set[str]:
    """Find writers that get a gradient only once the others have moved, since they stand in front of these."""
    at = {n: g for n in change.writers if (g := grads.get(n)) is not None and not g.is_sparse and _nonzero(g)}
    waiting = {n for n in change.writers if n in grads and n not in at}
    if not at or not waiting or change.gates:
        return set()
    parameters = tree.parameters
    values = {n: parameters[n].detach().clone() for n in at}
    try:
        with torch.no_grad():
            for n, g in at.items():
                parameters[n].sub_(spread_like(0.01 * g / g.abs().max(), parameters[n]))
        _, later = _run(model, change, context, tree)
    finally:
        with torch.no_grad():
            for n, value in values.items():
                parameters[n].copy_(value)
    return {n for n in waiting if (g := later.get(n)) is not None and _nonzero(g)}


def _behind_shut_gates(model: nn.Module, change: Change, context: PlanContext) -> Outputs | None:
    """Return the outputs with the gates shut, or None where there are no gates.

    The gates stay open afterwards, so that a gradient comes through; ``untouched`` shuts them again.
    """
    if not change.gates:
        return None
    with torch.no_grad():
        after = [t.clone() for t in tensors_in(context.run())]
    for path in change.gates:
        set_gate(module_at(model, path), 1.0)
    return after


def _never_called(model: nn.Module, path: str, change: Change) -> str:
    at = path.rpartition(".")[0]
    counted = _counted(model, at, change)
    return (
        f"{path}: the network's forward never calls it, so it would never train (a plain list beside the container, "
        f"a stored depth, or fixed names in forward).{counted} Let forward iterate over "
        f"{at or 'the container'} itself.{_whole(model, at)}"
    )


def _displaced(model: nn.Module, path: str, change: Change) -> str:
    at = path.rpartition(".")[0]
    return (
        f"{path}: the network's forward called this layer before the growth and never calls it now (a stored depth, or "
        f"fixed indices in forward).{_counted(model, at, change)} Let forward iterate over "
        f"{at or 'the container'} itself."
    )


def _whole(model: nn.Module, at: str) -> str:
    """Say what to do where the container is itself an entry of one: a block that forward takes apart."""
    above, _, name = at.rpartition(".")
    outer, inner = (module_at(model, path) for path in (above, at)) if name else (None, None)
    if not (isinstance(outer, CONTAINERS) and isinstance(inner, CONTAINERS)):
        return ""
    return (
        f" {at} is an entry of {above or 'the model'}: Duplicate({above!r}, by=1) or Insert({above!r}, layer) adds a "
        "whole one."
    )


def _counted(model: nn.Module, at: str, change: Change) -> str:
    """Guess which attribute counts the children of a container, and say so."""
    module = module_at(model, at)
    if not isinstance(module, CONTAINERS):
        return ""
    length = len(module._modules) - len(change.added)
    container = Container(at, module, tuple(str(i) for i in range(length)))
    found, sized = counters(model, container), beside(model, container)
    counts = f" Perhaps {', '.join(found)} (= {length}) counts the blocks?" if found else ""
    tied = f" Beside it {', '.join(sized)} may go by the number of blocks too, and cannot follow." if sized else ""
    router = router_of(model, at, length)
    if router is None:
        return counts + tied
    call = f"Widen({router!r}, to={2 * length}, unit='experts', init='tile')"
    return f"{counts}{tied} If {router} chooses among them, {call} copies both; for one that is new, use auxin.surgery."


def _nonzero(grad: Tensor) -> bool:
    return bool((grad.coalesce().values() if grad.is_sparse else distinct(grad)).count_nonzero())


def _compare(before: Outputs, after: Outputs, change: Change, often: list[str], context: PlanContext) -> float | None:
    """Return how far the outputs are apart, or raise where they must not be.

    ``often`` says of layers beside the new ones that they run several times.
    """
    old, new = [tuple(t.shape) for t in before], [tuple(t.shape) for t in after]
    if old != new:
        if change.outputs:
            return None
        if len(old) != len(new):
            raise GrowthError(
                f"the network would return {len(new)} tensors instead of {len(old)}: one for each layer, it seems. "
                f"{_with_other_outputs(change)}"
            )
        old, new = next((a, b) for a, b in zip(old, new, strict=True) if a != b)
        wanted = " If that is wanted pass outputs=True; otherwise" if hasattr(change.edit, "outputs") else " Please"
        raise GrowthError(
            f"the network's output would change from {old} to {new}.{wanted} give the layer equal input and output "
            "widths."
        )
    lost = [int((b.isnan() & ~a.isnan()).sum()) for a, b in zip(before, after, strict=True)]
    if sum(lost):
        raise GrowthError(
            f"{type(change.edit).__name__}: {sum(lost)} of the {sum(t.numel() for t in after)} numbers that the "
            "network returns would be NaN on the probe, and they are not now; no network trains on from there. Look "
            "at what fills the new weights (init=...), and at what the new layer does with what arrives there."
        )
    difference, limit = distance(before, after), tolerance(before)
    if change.preserves and not difference <= limit and any(move.reshaped for move in change.moves):
        limit = max(limit, by_rounding(context.model, after, difference, limit, context))
    if change.preserves and not difference <= limit:
        raise GrowthError(
            f"{type(change.edit).__name__}: the outputs changed by {difference:.3g} (at most {limit:.1g} was "
            f"expected), though {change.how} was to keep them. {_suspects(change, often)} would accept that."
        )
    return difference


def _with_other_outputs(change: Change) -> str:
    """What to do where a network returns something of each layer."""
    network = change.before.modules.get("")
    if hasattr(getattr(network, "config", None), "output_hidden_states"):
        return "Prove the growth on a call that does not ask for these: probe={..., 'output_hidden_states': False}."
    if hasattr(change.edit, "outputs"):
        return "If that is wanted pass outputs=True."
    return "If that is wanted add the layer inside `with auxin.surgery(model, optimizer, probe=batch):`."


def _suspects(change: Change, often: list[str]) -> str:
    if not change.added:
        return "A norm's epsilon or a scale in the code goes by the width; init='random'"
    shared = f". In one forward {', '.join(often[:3])}: of weights shared over the depth a copy takes over some of "
    return (
        "Something outside the block depends on the number of layers, or uses more of what each of them gives than the "
        f"next one is given (parallel branches, a sum over all){f'{shared}the runs' * bool(often)}; "
        + ("fade=0" if any(new.tied for _, new in change.added) else "init='default' or output='keep'")
    )


def _check_gradients(change: Change, grads: dict[str, Any], late: set[str], context: PlanContext) -> tuple[str, ...]:
    """Check that the new weights can learn; those in ``late`` do so from the second step. Returns notes."""
    reached = {name for name, g in grads.items() if g is not None and _nonzero(g)}
    born = [m.name for m in change.moves if m.added and m.name and m.new is not None]
    trainable = [n for n in change.starting if n in grads]
    if born and not trainable and change.added:
        raise GrowthError(
            f"{change.added[0][0]}: nothing in it would train: the layers beside it are frozen (requires_grad=False) "
            "and a new one follows them, or the probe gives no gradient. Unfreeze them, or use auxin.surgery."
        )
    wanted = [n for n in change.writers if n in grads] if change.preserves and not change.gates else []
    learning = reached.union(late, _idle(change, grads))
    dead = [n for n in wanted if n not in learning]
    if not dead and (not trainable or any(n in reached for n in trainable)):
        return ()
    names = ", ".join(dead or trainable[:3])
    if not multiplied_by_zero(context, dead or trainable):
        other = "Begin with other values" if change.how == "surgery" else "Use init='kaiming' or 'xavier'"
        raise GrowthError(
            f"{names}: no gradient reaches the new weights on the probe, so they would never learn (a product with "
            f"another zero, or a ReLU that is off). {other}, or a residual block."
        )
    zeros = [join(a.path, a.name) for a in change.assigns if type(a.value) in (int, float) and not a.value]
    factor = f"{', '.join(zeros)} = 0" if zeros else "a fade-in of your own, a mask"
    why = f"something that is no parameter multiplies what they give by 0 now ({factor})"
    if change.how != "surgery":
        raise GrowthError(
            f"{names}: no gradient reaches the new weights on the probe: {why}. Grow once it is no longer 0, or add "
            "the layer inside `with auxin.surgery(model, optimizer):`."
        )
    return (f"no gradient reaches {names} on this probe: {why}",)


def _silent(change: Change, grads: dict[str, Any], context: PlanContext) -> Iterator[str]:
    """Name, in words, the new entries of old tensors that get no gradient on the probe.

    Raises:
        GrowthError: the edit promised that they learn.
    """
    sizes_of = {part.name: inside(part, grads.get(part.name)) for part in change.parts if part.name in grads}
    dead = [name for name, (new, _) in sizes_of.items() if new is None or not new.count_nonzero()]
    if not dead:
        return
    masks = {part.name: part.mask for part in change.parts if part.name in dead and not _looked_up(part, context)}
    if change.preserves and len(dead) == len(sizes_of) and masks and not asleep(context, masks):
        raise GrowthError(
            f"{', '.join(dead[:3])}: no gradient reaches the new entries on the probe, so they would never learn (both "
            "factors of a product are zero). Let one side start at random."
        )
    yield f"no gradient{' yet' if change.preserves else ''} at the new entries of {in_words(dead)} on the probe"


def _looked_up(part: Part, context: PlanContext) -> bool:
    """Whether all that is new are rows of an embedding, which no number in the probe can name yet."""
    owner = context.model.get_submodule(part.name.rpartition(".")[0])
    return isinstance(owner, nn.Embedding | nn.EmbeddingBag) and not bool(part.new[1].any())


def _idle(change: Change, grads: dict[str, Any]) -> list[str]:
    """Find writers on which nothing depends in the copied block either, as on a backcast that no block takes."""
    reached = {name for name, g in grads.items() if g is not None and _nonzero(g)}
    olds = counterparts(change)
    return [
        n
        for n in change.writers
        if n in grads and n not in reached and (o := olds.get(n)) in grads and o not in reached
    ]


def _ratios(change: Change, grads: dict[str, Any]) -> tuple[float | None, dict[str, float]]:
    """Return the gradient of the new weights over that of their counterparts, for all new blocks together and for each.

    Where the writers start at zero, only they have a gradient yet, so only they are compared.
    """
    writers, olds, found = set(change.writers), counterparts(change), sizes(grads)
    pairs = {
        path: [(found.get(n), found.get(olds[n] or "")) for n in ([n for n in names if n in writers] or names)]
        for path, names in units(change).items()
    }
    for part in change.parts:
        if (grad := grads.get(part.name)) is not None:
            halves = sizes(dict(zip(("new", "old"), inside(part, grad), strict=True)))
            pairs.setdefault(part.name.rpartition(".")[0], []).append((halves.get("new"), halves.get("old")))
    each = {path: value for path, both in pairs.items() if (value := ratio(both)) is not None}
    return ratio(pair for both in pairs.values() for pair in both), each
