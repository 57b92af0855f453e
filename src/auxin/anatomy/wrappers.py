"""What stands around a network: wrappers that keep step with it, and those under which nothing can grow."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from auxin.anatomy.tree import AT_A_CHECKPOINT, REFUSED, unwrap
from auxin.errors import GrowthError


def with_wrappers(model: nn.Module, companions: Sequence[Any]) -> tuple[Any, ...]:
    """The companions, with the DistributedDataParallel around the model in front of them.

    Raises:
        GrowthError: the network is sharded, or stands in a DistributedDataParallel that was not handed over.
    """
    refuse_sharded(model)
    around = [w for w in _wrappers(model) if not any(c is w for c in companions)]
    found = (*around, *companions)
    _refuse_hidden(unwrap(model), found)
    return found


def refuse_sharded(model: Any) -> None:
    """Refuse a network whose parameters are spread over ranks: what is in one process is not all of it.

    Raises:
        GrowthError: names the wrapper or the tensor, and the way round.
    """
    if not isinstance(model, nn.Module):
        return
    own = unwrap(model)
    for path, module in own.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise GrowthError(
                f"{path} is a DistributedDataParallel inside of the network; wrap the whole network in one, and pass "
                "that."
            )
        for base in type(module).__mro__:
            if base.__name__ in REFUSED and base.__module__.startswith(("torch.", "deepspeed")):
                raise GrowthError(f"{path or 'the model'} is under {REFUSED[base.__name__]}. {AT_A_CHECKPOINT}")
    for name, p in own.named_parameters():
        if any(base.__name__ == "DTensor" for base in type(p).__mro__):
            raise GrowthError(
                f"{name} is a DTensor (tensor parallel, or FSDP2), of which each rank holds a part. {AT_A_CHECKPOINT}"
            )
        if hasattr(p, "ds_status") or hasattr(p, "ds_id"):
            raise GrowthError(
                f"{name} is partitioned by DeepSpeed (ZeRO), so that each rank holds a part of it. {AT_A_CHECKPOINT}"
            )


def _wrappers(model: nn.Module) -> Iterator[DistributedDataParallel]:
    """Each DistributedDataParallel between ``model`` and the user's own module, outermost first."""
    own = unwrap(model)
    while model is not own:
        if isinstance(model, DistributedDataParallel):
            yield model
        model = next(child for child in model._modules.values() if child is not None)


def _refuse_hidden(model: nn.Module, companions: Sequence[Any]) -> None:
    """Refuse a network that some DistributedDataParallel wraps, unknown to us: what grows would not be synchronised.

    DDP leaves no trace on the network, so the garbage collector is asked: some 100 ms, and only where there is a
    process group and no wrapper was passed.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if any(isinstance(c, DistributedDataParallel) and unwrap(c) is model for c in companions):
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
    names = {name: p for name, p in unwrap(wrapper).named_parameters() if p.requires_grad}
    ignored, known = wrapper.parameters_to_ignore, {id(p) for p in wrapper._module_parameters}
    return [name for name, p in names.items() if id(p) not in known and name not in ignored]
