"""Everything lost, stale, doubled or mis-shaped around a network, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from auxin.anatomy.blocks import steps_itself
from auxin.anatomy.tree import unwrap
from auxin.anatomy.wrappers import networks_of, plain, with_wrappers
from auxin.companion import registration_of
from auxin.errors import GrowthError
from auxin.gate import NAME
from auxin.listing import Listing, listing
from auxin.modules import Dormant, awake
from auxin.ramp import opening
from auxin.ranks import Ranks, digest
from auxin.sharded import is_spread


def verify(model: nn.Module, *companions: Any) -> None:
    """Check that optimizers, averages and schedules fit the network as it is now, and under DDP that all ranks do.

    Args:
        model: the network. Pass the DistributedDataParallel where there is one, and call this on every rank: then
            parameters and optimizer state are compared over the ranks too, bit for bit (they are all read for that).
        companions: its optimizers, schedulers, averages.

    Raises:
        GrowthError: one error that lists everything found: trainable parameters that no optimizer steps (those of
            Dormant layers need none) or that are stepped twice, tensors of replaced layers that are still held, state
            of another shape, averages of another structure, gates of blocks that fade in and that no step opens;
            parameters that DDP does not synchronise, ranks that differ. Or a companion that auxin does not know.
    """
    companions = tuple(plain(companion) for companion in with_wrappers(model, companions))
    with Ranks.of(companions).agree("verify") as said:
        verify_here(model, *companions)
        if Ranks.of(companions).size > 1:
            optimizers = [c for c in companions if isinstance(getattr(c, "param_groups", None), list)]
            said += bits(unwrap(model), optimizers)


def verify_here(model: nn.Module, *companions: Any) -> None:
    """``verify`` without a word to other ranks."""
    known = [(companion, registration_of(companion)) for companion in companions]
    problems = list(_problems(unwrap(model), companions))
    for companion, registration in known:
        problems += registration.verify(companion, unwrap(model)) if registration.verify is not None else ()
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise GrowthError(f"verify found {len(problems)} problem{'s' * (len(problems) > 1)}:\n  {shown}")


def _problems(model: nn.Module, companions: tuple[Any, ...]) -> Iterator[str]:
    network = listing(model)
    parameters, modules = network.parameters, network.modules
    tensors = {**parameters, **network.buffers}
    lazy = [name for name, t in tensors.items() if is_lazy(t)] if _may_be_lazy(tensors) else ()
    if lazy:
        yield f"{', '.join(lazy[:6])} of lazy layers have no shape yet: run one batch through the model first"
        return
    yield from without_values(parameters, modules)
    names = {id(p): name for name, p in parameters.items()}
    sleeping = {path: m for path, m in modules.items() if isinstance(m, Dormant)}
    running = {id(p) for m in awake(model) for p in m._parameters.values() if p is not None} if sleeping else set(names)
    yield from _frozen_in_their_sleep(sleeping, names, running)
    optimizers = [c for c in companions if isinstance(getattr(c, "param_groups", None), list)]
    copies = [(type(c).__name__, listing(copy)) for c in companions for copy in networks_of(c)]
    if optimizers:
        yield from _membership(parameters, optimizers, names, running)
        yield from _gates(modules, copies, opening(optimizers))
    for name, p in parameters.items():
        if p.grad is not None and p.grad.shape != p.shape:
            yield f"{name}: gradient {tuple(p.grad.shape)} of a parameter {tuple(p.shape)}; call optimizer.zero_grad()"
    for kind, copy in copies:
        yield from _average(network, kind, copy)


def _may_be_lazy(tensors: Mapping[str, Tensor]) -> bool:
    """Whether one of them is more than a plain tensor."""
    return not set(map(type, tensors.values())) <= {nn.Parameter, Tensor}


def without_values(parameters: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Weights that were left on the meta device among others that have values.

    A network that is there as a whole is a plan (``replay`` works on those), and hooks of Accelerate give values to
    what is offloaded as it runs.
    """
    empty = [name for name, p in parameters.items() if p.is_meta]
    if empty and len(empty) < len(parameters) and not any("_hf_hook" in m.__dict__ for m in modules.values()):
        yield (
            f"{', '.join(empty[:6])} {'is' if len(empty) == 1 else 'are'} on the meta device and without values, which "
            "others of the network have: on a CPU torch may compute with what stands in memory instead. Give values: "
            "model.load_state_dict(state, assign=True), or to_empty(device=...) and reset_parameters()"
        )


def _frozen_in_their_sleep(sleeping: dict[str, Dormant], names: dict[int, str], running: set[int]) -> Iterator[str]:
    """Tensors of living layers that were frozen because a Dormant layer holds them too."""
    for path, dormant in sleeping.items():
        for name, p in dormant.layer.named_parameters():
            if name in dormant.trainable and id(p) in running and not p.requires_grad:
                yield (
                    f"{names[id(p)]} is frozen because the Dormant layer {path} holds it too: tie it after building "
                    "the Dormant, or call requires_grad_(True) on it"
                )


def _gates(modules: dict[str, nn.Module], copies: list[tuple[str, Listing]], opened: set[int]) -> Iterator[str]:
    """Blocks that would stay half faded in."""
    left = {path: block for path, block in modules.items() if NAME in block._buffers and id(block) not in opened}
    for path, block in left.items():
        if block._buffers[NAME] is not None:
            share = float(block.get_buffer(NAME))
            yield (
                f"{path} has a gate, open to {share:.3g}, that no step of these optimizers opens further: it is a copy "
                "of a block that fades in, or was grown with another optimizer. Make it whole: "
                f"auxin.gate.close_gate(model.get_submodule({path!r})); or load a checkpoint of the Grower, to go on"
            )
    for kind, copy in copies:
        late = [path for path, m in copy.modules.items() if NAME in m._buffers and id(m) not in opened]
        if late and not left:
            yield (
                f"{kind} has a gate at {', '.join(late[:4])} that no step of these optimizers opens: it was "
                "built while that faded in (build it before, or when the block is whole), or only the network's gate "
                f"was closed (close this one too: auxin.gate.close_gate(copy.get_submodule({late[0]!r})))"
            )


def _membership(
    parameters: dict[str, nn.Parameter], optimizers: list[Any], names: dict[int, str], running: set[int]
) -> Iterator[str]:
    counts = Counter(map(id, (p for o in optimizers for g in o.param_groups for p in g["params"])))
    outside = [(n, p) for n, p in parameters.items() if id(p) not in counts]
    lost = [f"{n} {tuple(p.shape)}" for n, p in outside if p.requires_grad and id(p) in running and not steps_itself(p)]
    for text in lost:
        yield f"{text} is in no optimizer: it would never train (or freeze it: requires_grad_(False))"
    for p_id, count in counts.items() if counts.total() > len(counts) else ():
        if count > 1:
            name = names.get(p_id, "a parameter of another model")
            yield f"{name} is held {count} times: it would be stepped {count} times"
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        stale = _stale(optimizer, names, parameters, bool(lost))
        yield from (f"{kind} holds {text}, which the model does not have" for text in stale)
        members = {id(p) for g in optimizer.param_groups for p in g["params"]}
        orphans = [p for p in optimizer.state if id(p) not in members and isinstance(p, Tensor)]
        if orphans:
            example = tuple(orphans[0].shape)
            yield f"{kind}.state has {len(orphans)} entries of tensors that are in no group (e.g. {example})"
        yield from _state_shapes(optimizer, names)


def _stale(optimizer: Any, names: dict[int, str], current: dict[str, nn.Parameter], lost: bool) -> Iterator[str]:
    """Tensors that were the model's: named like one of it, or foreign while the model has lost some."""
    for group in optimizer.param_groups:
        listed = group.get("param_names") or []
        if listed and len(listed) != len(group["params"]):
            yield f"{len(group['params'])} parameters under {len(listed)} param_names"
            continue
        for index, p in enumerate(group["params"]):
            if id(p) in names:
                continue
            if listed and listed[index] in current:
                yield f"another tensor {tuple(p.shape)} under the name {listed[index]}"
            elif lost:
                yield f"a tensor {tuple(p.shape)}"


def _state_shapes(optimizer: Any, names: dict[int, str]) -> Iterator[str]:
    if isinstance(optimizer, torch.optim.LBFGS):
        return
    ours = type(optimizer).__module__.startswith("torch.optim")
    entries = [(p, state) for p, state in optimizer.state.items() if isinstance(p, Tensor)]
    # Others keep flat vectors, or rows and columns of a moment in factors: such state does not follow the shape.
    loose = {
        key
        for p, state in ([] if ours else entries)
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() != p.dim()
    }
    for p, state in entries:
        shape = p.shape
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.shape == shape or value.numel() == 1 or key in loose:
                continue
            fits = value.dim() == p.dim() and all(s in (1, n) for s, n in zip(value.shape, shape, strict=True))
            if not fits:
                name = names.get(id(p), "a foreign parameter")
                kind, shapes = type(optimizer).__name__, f"{tuple(value.shape)} of {name} {tuple(p.shape)}"
                yield f"{kind}: state {key!r} {shapes} has another shape"


def _average(network: Listing, kind: str, copy: Listing) -> Iterator[str]:
    ours, theirs = ({n: p.shape for n, p in one.parameters.items()} for one in (network, copy))
    for name in {**ours, **theirs} if ours != theirs else ():
        if name not in theirs:
            yield f"{kind} lacks {name} {tuple(ours[name])}: it would not be averaged"
        elif name not in ours:
            yield f"{kind} has {name} {tuple(theirs[name])}, which the model does not have"
        elif ours[name] != theirs[name]:
            yield f"{kind} has {name} {tuple(theirs[name])} for {tuple(ours[name])}"
    held, others = list(network.buffers), list(copy.buffers)
    if held != others:
        differ = sorted(set(held) ^ set(others))[:6] or ["in another order"]
        yield f"{kind} has other buffers than the model, and copies them in order: {', '.join(differ)}"


def bits(model: nn.Module, optimizers: Sequence[Any]) -> list[str]:
    """Each parameter with a digest of its values, and of its state in each optimizer."""
    lines = [f"{name} {digest(p)}" for name, p in model.named_parameters() if not is_spread(p)]
    names = {id(p): name for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for p, state in optimizer.state.items():
            for key, value in state.items() if isinstance(p, Tensor) and isinstance(state, dict) else ():
                if isinstance(value, Tensor) and not is_spread(value):
                    lines.append(f"{key} of {names.get(id(p), '?')} in optimizer {number} {digest(value)}")
    return lines
