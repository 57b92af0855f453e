"""How a copy of the network, an average's for example, makes its own new modules."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from auxin.anatomy.blocks import number, passes, replica
from auxin.anatomy.zero_init import set_constants
from auxin.axes import carried
from auxin.change import Before, New
from auxin.fsdp2 import is_unit, missing_to_regroup
from auxin.gate import close_gate, close_gates, open_gate
from auxin.listing import module_at
from auxin.sharded import copy_plainly, pass_again, shard_like, unmark, whole


def builder(live: Before, twin: nn.Module) -> Callable[[New, str], nn.Module]:
    """How a copy of the network makes its own new modules: from its own tensors where the live one used its own.

    A block that copies block k becomes a copy of the twin's block k with the same tensors zeroed; tensors that continue
    old ones continue the twin's; anything old inside a new module (an adapter around an old layer, a tied weight) is
    the twin's. Mode, requires_grad, dtype and device are those of the module that stands beside it in the twin.
    """

    @functools.cache
    def stood() -> tuple[Before, dict[int, Any], frozenset[int]]:
        """The twin as it was, what stands in it for what the network holds, and the ids of the latter.

        One memo for all: what new modules share, their copies share.
        """
        own = Before.of(twin)
        pairs = [(getattr(live, kind), getattr(own, kind)) for kind in ("modules", "parameters", "buffers")]
        memo = {id(value): ours[n] for theirs, ours in pairs for n, value in theirs.items() if n in ours}
        return own, memo, frozenset(memo)

    def build(new: New, neighbour: str) -> nn.Module:
        if new.source is not None:
            path, _, name = new.source.rpartition(".")
            groups = passes(module_at(twin, path)) if new.tied is False else []
            apart = [block for together in groups if name in together for block in together.values()]
            module = replica(twin, module_at(twin, new.source), bool(new.tied), apart)
            close_gates(module)  # of a source that is fading in itself, or holds a block that does
            set_constants(module, new.zeroed)
            number(module, new.numbers)
        else:
            own, memo, there = stood()
            copy_plainly(new.module, memo)
            module = copy.deepcopy(new.module, memo)
            unmark(module, set(map(id, own.modules.values())))
            _settle(module, new.module, neighbour, own, live, there)
            old = {**own.buffers, **own.parameters} if new.continues else {}
            tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())} if new.continues else {}
            for name, continued in new.continues.items():
                tensor = tensors[name]
                tensor.data = carried(whole(old[continued.old]), continued.axes, tensor)
        if new.gated:
            close_gate(module)
            open_gate(module)
        like = new.source or neighbour
        if new.tied:
            pass_again(module, module_at(twin, like))
        elif is_unit(twin) and (is_unit(module_at(twin, like)) or missing_to_regroup(twin)):
            shard_like(module, like, twin)  # else the unit around takes it in
        return module

    return build


def _settle(module: nn.Module, original: nn.Module, path: str, own: Before, live: Before, old: frozenset[int]) -> None:
    """Give a twin's new module the flags of what stands beside it there, where the original has those of its own.

    Args:
        module: the new module of the twin, a copy of ``original``.
        original: the new module of the live network.
        path: of what stands beside it, before the change.
        own: the twin as it was.
        live: the live network as it was.
        old: ids of all that it held; what is old inside a new module keeps its twin's own flags.
    """
    while path not in live.modules:  # under a further name of a module: by what is around it
        path = path.rpartition(".")[0]
    for inner, one in zip(module.modules(), original.modules(), strict=True):
        if id(one) not in old and one.training == live.modules[path].training:
            inner.training = own.modules[path].training
    inside = (name for name in own.parameters if name.startswith(f"{path}."))
    beside = next(inside, next(iter(own.parameters), None))
    if beside is None:
        return
    twin, model = own.parameters[beside], live.parameters[beside]
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        one = _named(original, name)
        if id(one) in old or tensor.device.type == "meta":
            continue
        dtype = twin.dtype if one.is_floating_point() and one.dtype == model.dtype else tensor.dtype
        if (tensor.dtype, tensor.device) != (dtype, twin.device):
            tensor.data = tensor.data.to(twin.device, dtype)
        if isinstance(tensor, nn.Parameter) and one.requires_grad == model.requires_grad:
            tensor.requires_grad_(twin.requires_grad)


def _named(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    owner = module_at(module, path)
    tensor = owner._parameters.get(leaf, owner._buffers.get(leaf))
    assert tensor is not None
    return tensor
