"""What stands around a network: wrappers that keep step with it, and those under which nothing can grow."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from auxin.anatomy.tree import AT_A_CHECKPOINT, REFUSED, unwrap
from auxin.companion import original_of, registered
from auxin.errors import GrowthError
from auxin.fsdp2 import is_unit, units
from auxin.listing import modules_in, parameters_of
from auxin.sharded import check, is_spread, settle

PREPARED = {"AcceleratedOptimizer": "optimizer", "AcceleratedScheduler": "scheduler"}  # what each holds


def with_wrappers(model: nn.Module, companions: Sequence[Any]) -> tuple[Any, ...]:
    """The companions, with what stands around the model in front: DistributedDataParallel, a tree of compiled regions.

    Raises:
        GrowthError: the network is sharded, or stands in a DistributedDataParallel that was not handed over.
    """
    refuse_sharded(model)
    around = [w for w in wrappers_of(model) if not any(c is w for c in companions)]
    found = (*around, *companions)
    _refuse_hidden(unwrap(model), found)
    return found


def networks_of(companion: Any) -> list[nn.Module]:
    """The copies of the network that a companion holds (one for an average, none for most), without what is around."""
    return [unwrap(copy) for copy in copies_in(companion)]


def copies_in(companion: Any) -> list[nn.Module]:
    """The copies of the network that a companion holds, as it holds them; those inside of an average of an average.

    Raises:
        GrowthError: its kind was registered with a ``wraps`` that returns something else.
    """
    known = registered(companion)
    held = known.wraps(companion) if known is not None and known.wraps is not None else []
    copies: list[Any] = [held] if isinstance(held, nn.Module) else [copy for copy in held if copy is not None]
    for copy in copies:
        if not isinstance(copy, nn.Module):
            raise GrowthError(
                f"follow({type(companion).__name__}, wraps=...): it has returned a {type(copy).__name__}; let it "
                "return the copies of the network that are held, e.g. [average.module]."
            )
    # A kind may be its own copy, as a LightningModule is.
    return [inner for copy in copies for inner in (copies_in(copy) if copy is not companion else []) or [copy]]


def plain(companion: Any) -> Any:
    """The companion itself, without what Accelerate has put around it."""
    while type(companion).__name__ in PREPARED and type(companion).__module__.startswith("accelerate."):
        companion = getattr(companion, PREPARED[type(companion).__name__])
    return companion


def refuse_sharded(model: Any) -> None:
    """Refuse a network whose parameters are spread over ranks: what is in one process is not all of it.

    Raises:
        GrowthError: names the wrapper or the tensor, and the way round.
    """
    if not isinstance(model, nn.Module):
        return
    own = unwrap(model)
    settle(own)
    modules = modules_in(own)
    kinds, parameters = set(map(type, modules)), parameters_of(modules)
    if any(issubclass(kind, DistributedDataParallel) or _refused(kind) for kind in kinds):
        _refuse_module(own)
    if any(map(_partitioned, parameters)):
        name = next(name for name, p in own.named_parameters() if _partitioned(p))
        raise GrowthError(
            f"{name} is partitioned by DeepSpeed (ZeRO), so that each rank holds a part of it. {AT_A_CHECKPOINT}"
        )
    if units(own) or any(map(is_spread, parameters)):
        check(own)


def _partitioned(p: Any) -> bool:
    return hasattr(p, "ds_status") or hasattr(p, "ds_id")


def _refuse_module(own: nn.Module) -> None:
    for path, module in own.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise GrowthError(
                f"{path} is a DistributedDataParallel inside of the network; wrap the whole network in one, and pass "
                "that."
            )
        name = _refused(type(module))
        if name is not None:
            raise GrowthError(f"{path or 'the model'} is under {REFUSED[name]}. {AT_A_CHECKPOINT}")


def _refused(kind: type) -> str | None:
    names = (b.__name__ for b in kind.__mro__ if b.__module__.startswith(("torch.", "deepspeed")))
    return next((name for name in names if name in REFUSED), None)


def wrappers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Each wrapper between ``model`` and the user's own module that must keep step, outermost first."""
    own = unwrap(model)
    while model is not own:
        inner = original_of(model)
        if isinstance(model, DistributedDataParallel) or inner is not None:
            yield model
        model = inner or next(child for child in model._modules.values() if child is not None)
    if is_unit(own):
        yield own


def at_rest(model: nn.Module, companions: Sequence[Any]) -> None:
    """Let a network under FSDP2, and its averages, hold nothing but shards, as between two steps."""
    for network in (model, *(copy for companion in companions for copy in networks_of(companion))):
        settle(network)


def _refuse_hidden(model: nn.Module, companions: Sequence[Any]) -> None:
    """Refuse a network that some DistributedDataParallel wraps, unknown to us: what grows would not be synchronised.

    DDP leaves no trace on the network, so the garbage collector is asked: some 100 ms, and only where there is a
    process group and no wrapper was passed.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if is_unit(model) or any(isinstance(c, DistributedDataParallel) and unwrap(c) is model for c in companions):
        return
    if _wrapped(model) and gc.collect() >= 0 and _wrapped(model):  # a wrapper that is dead may be in a cycle still
        raise GrowthError(
            f"this {type(model).__name__} is wrapped in a DistributedDataParallel, which was not passed: it would not "
            "synchronise what grows, and the ranks would drift apart. Pass the wrapper in place of the network, e.g. "
            "Grower(ddp, optimizer, ...); places stay those of the network inside."
        )


def _wrapped(model: nn.Module) -> bool:
    """Whether a DistributedDataParallel of this process holds ``model``."""
    wrappers = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return any(module is model for wrapper in wrappers for module in wrapper.modules())


def uncovered(wrapper: DistributedDataParallel) -> list[str]:
    """Names of trainable parameters that the wrapper does not synchronise, since it was built before they came."""
    own, ignored, known = unwrap(wrapper), wrapper.parameters_to_ignore, {id(p) for p in wrapper._module_parameters}
    if not ignored and all(id(p) in known for p in parameters_of(modules_in(own)) if p.requires_grad):
        return []
    names = {name: p for name, p in own.named_parameters() if p.requires_grad}
    return [name for name, p in names.items() if id(p) not in known and name not in ignored]
