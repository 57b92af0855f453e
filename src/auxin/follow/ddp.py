"""``DistributedDataParallel``: the same wrapper object goes on, with a reducer that knows the new parameters.

The reducer, which sums gradients over the ranks, is fixed when DDP is built: what comes later is never synchronised,
without a word. It is built anew from the wrapper's own settings, so that hooks on the wrapper, its train flag, comm
hooks, ``static_graph``, ``find_unused_parameters`` and ``no_sync`` stay as they are; no weight is sent for that.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from auxin.anatomy.tree import unwrap
from auxin.anatomy.wrappers import uncovered
from auxin.change import Before, Change
from auxin.companion import original_of
from auxin.errors import GrowthError
from auxin.follow import follow
from auxin.structure import forget_shape, reversible

c10d: Any = dist  # with the names that its stubs do not list

# Parts of DDP that building a reducer needs. They are not public: in torch 2.13 they are what unpickling DDP uses.
PARTS = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper", "_comm_hooks")
REBUILT = (
    "reducer",
    "logger",
    "modules_buffers",
    "named_module_buffers",
    "parameters_to_ignore",
    "_module_parameters",
    "_has_rebuilt_buckets",
    "_static_graph_delay_allreduce_enqueued",
)
IGNORED = "_ddp_params_and_buffers_to_ignore"  # names that DDP looks for on the network itself
POWER = ("error_dict", "p_memory_dict", "q_memory_dict", "iter")  # what a PowerSGDState carries from step to step
HAND_OVER = "Grow at a checkpoint: save, and build the network, grow it and wrap it anew."


def unsynchronised(wrapper: Any, model: Any) -> Iterator[str]:
    """Parameters of the network that the wrapper does not know."""
    for name in uncovered(wrapper):
        yield (
            f"{name} is not synchronised by the DistributedDataParallel: it was put in without auxin, and each "
            "rank would train its own. Put such layers in inside `with auxin.surgery(ddp, optimizer, ...):`"
        )


@follow(DistributedDataParallel, verify=unsynchronised)
def follow_ddp(wrapper: Any, change: Change) -> Iterator[None]:
    """Build the reducer anew for the parameters of the grown network; the old one is kept to return to.

    Raises:
        GrowthError: it wraps another network, or works in a way that cannot be built anew.
    """
    known = change.before
    assert known is not None
    check(wrapper, known)
    yield
    before = {name: wrapper.__dict__[name] for name in REBUILT if name in wrapper.__dict__}
    inner = unwrap(wrapper)
    ignored = inner.__dict__.get(IGNORED)
    power = [(state, {name: getattr(state, name) for name in POWER}) for state in _power_states(wrapper)]

    def write() -> None:
        _rename_ignored(wrapper, known)
        for state, _ in power:
            _start_anew(state)
        rebuild(wrapper)

    def back() -> None:
        vars(wrapper).update(before)
        if ignored is not None:
            inner.__dict__[IGNORED] = ignored
        for state, own in power:
            vars(state).update(own)

    yield from reversible(write, back)


def check(wrapper: Any, before: Before) -> None:
    """Refuse what cannot be built anew.

    Raises:
        GrowthError: says what, and the way round.
    """
    inner = unwrap(wrapper)
    if before.modules.get("") is not inner:
        raise GrowthError(
            f"this DistributedDataParallel wraps another {type(inner).__name__} than the network that grows. Pass the "
            "wrapper of that network, and this one to a Grower of its own."
        )
    missing = [part for part in PARTS if not hasattr(wrapper, part)]
    if missing:
        raise GrowthError(
            f"DistributedDataParallel of this torch has no {', '.join(missing)}, so it cannot be built anew in place. "
            f"{HAND_OVER}"
        )
    for reason, found in (
        ("mixed_precision=", wrapper.mixed_precision is not None),
        ("delay_all_reduce_named_params=", bool(wrapper._delay_all_reduce_params)),
        ("the Python reducer of torch.compile (optimize_ddp='python_reducer')", wrapper._use_python_reducer),
        ("regional compilation around it", original_of(wrapper) is not None),
        (
            "an optimizer inside the backward pass (_register_fused_optim, _apply_optimizer_in_backward)",
            any(hasattr(p, "_in_backward_optimizers") for p in wrapper._module_parameters)
            or any("optim" in getattr(hook, "__qualname__", "").lower() for hook, _ in wrapper._comm_hooks),
        ),
    ):
        if found:
            raise GrowthError(
                f"DistributedDataParallel with {reason} sets up things on each parameter that new ones would lack. "
                f"{HAND_OVER}"
            )


def rebuild(wrapper: Any) -> None:
    """A new reducer for the trainable parameters that the network has now. Nothing is sent to other ranks."""
    hook = _builtin_hook(wrapper)
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    ignored = wrapper.parameters_to_ignore
    wrapper._module_parameters = [p for name, p in wrapper.module.named_parameters() if name not in ignored]
    gradients = [(p, p.grad) for p in parameters]
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    for p, grad in gradients:  # with gradient_as_bucket_view it has put copies in their place, which look unused
        p.grad = grad
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()
    for function, state in wrapper._comm_hooks:
        wrapper.logger._set_comm_hook_name(function.__qualname__)
        c10d._register_comm_hook(wrapper.reducer, state, function)
    if hook is not None:
        wrapper._register_builtin_comm_hook(hook)


def refresh(companions: Iterable[Any]) -> None:
    """Build the reducer of each DistributedDataParallel among ``companions`` anew: something was frozen or thawed."""
    for companion in companions:
        if isinstance(companion, DistributedDataParallel):
            rebuild(companion)


def take_hold_again(companions: Iterable[Any]) -> None:
    """Build reducers anew after tensors have got another shape and lost it again.

    A reducer hooks autograd's node for a tensor, and that node remembers a shape; each tensor gets a fresh one.
    """
    for companion in companions:
        if isinstance(companion, DistributedDataParallel):
            for p in companion.module.parameters():
                forget_shape(p)
            rebuild(companion)


def guard_steps(wrappers: Sequence[DistributedDataParallel], optimizers: Iterable[Any]) -> None:
    """Let an optimizer step raise that would move parameters which the wrapper does not synchronise.

    Looks closer only where the number of an optimizer's parameters has changed since its last step.
    """
    if not wrappers:
        return
    counts: dict[int, int] = {}
    held = [weakref.ref(wrapper) for wrapper in wrappers]

    def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if counts.get(id(optimizer)) == count:
            return
        for wrapper in (ref() for ref in held):
            lost = uncovered(wrapper) if wrapper is not None else []
            if lost:
                raise GrowthError(
                    f"optimizer.step(): {', '.join(lost[:4])} came in without auxin, so DistributedDataParallel does "
                    "not synchronise it and every rank would train its own. Nothing was stepped. Put layers in by "
                    "grower.grow(edit), or inside `with grower.surgery():`."
                )
        counts[id(optimizer)] = count

    for optimizer in optimizers:
        if hasattr(optimizer, "register_step_pre_hook"):
            optimizer.register_step_pre_hook(before_step)


def _builtin_hook(wrapper: DistributedDataParallel) -> Any:
    """The hook in C++ that is registered, if there is one; only the log of DDP knows."""
    name = wrapper._get_ddp_logging_data().get("comm_hook", "")
    kind = getattr(dist, "BuiltinCommHookType", None)
    return getattr(kind, name.partition(".")[2], None) if name.startswith("BuiltinCommHookType.") else None


def _rename_ignored(wrapper: DistributedDataParallel, before: Before) -> None:
    """Let the names of tensors that DDP ignores follow the tensors."""
    inner = unwrap(wrapper)
    if not wrapper.parameters_to_ignore:
        return
    old = {name: id(t) for held in (before.parameters, before.buffers) for name, t in held.items()}
    new = {id(t): name for held in (inner.named_buffers(), inner.named_parameters()) for name, t in held}

    def renamed(names: Iterable[str]) -> list[str]:
        return [new[old[name]] if old.get(name) in new else name for name in names]

    wrapper.parameters_to_ignore = set(renamed(wrapper.parameters_to_ignore))
    if IGNORED in inner.__dict__:
        inner.__dict__[IGNORED] = renamed(inner.__dict__[IGNORED])


def _power_states(wrapper: DistributedDataParallel) -> list[Any]:
    """States of PowerSGD, which hold residuals by number of bucket."""
    return [s for _, s in wrapper._comm_hooks if any(c.__name__ == "PowerSGDState" for c in type(s).__mro__)]


def _start_anew(state: Any) -> None:
    """Residuals of buckets that are no more cannot be added to those that come: let them go, as at a fresh start.

    The first two iterations of a reducer have other buckets than the later ones, so these are summed uncompressed.
    """
    state.error_dict, state.p_memory_dict, state.q_memory_dict = {}, {}, {}
    state.iter = max(0, min(state.iter, state.start_powerSGD_iter - 2))
