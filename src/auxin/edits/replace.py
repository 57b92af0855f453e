"""``Replace``: one module for another, keeping every tensor that fits."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from auxin.anatomy.blocks import CONTAINERS, adopt, hooks_on
from auxin.anatomy.holders import aliases, strays
from auxin.anatomy.probe import Call, PlanContext
from auxin.anatomy.tree import planned
from auxin.change import Change, New, Rewire
from auxin.edits.build import begin, build
from auxin.edits.start import inside
from auxin.errors import GrowthError
from auxin.init import InitSite
from auxin.listing import join, module_at
from auxin.output_hook import NAME, has_grown


@dataclasses.dataclass(frozen=True)
class Replace:
    """Puts a new module where another stands: a layer for an Identity, a better layer for a layer.

    A parameter that stood under the same name with the same shape and dtype stays the same object, with its values and
    its optimizer state; so does a buffer of the state_dict (running statistics). Other buffers are the new module's,
    since they follow from how it was built (masks, frequencies).

    Args:
        at: path of the module that goes.
        layer: an importable class or factory, or a ``functools.partial`` of one; called as by ``Insert``.
        init: as in ``Insert``, for the tensors that are new; "preserve" where what goes returned its input.
        outputs: the shape of the network's own output may change.

    Example:
        >>> Replace("act", nn.GELU).init
        'default'
    """

    at: str
    layer: Any
    init: Any = "default"
    outputs: bool = False

    def plan(self, model: nn.Module, context: PlanContext) -> Change:
        """Build the new module and say where it goes. Writes to nothing of the network."""
        where = f"Replace(at={self.at!r}"
        if not self.at:
            raise GrowthError(f"{where}): that is the model itself; name a module inside it.")
        old = module_at(model, self.at, "Replace(at=...): at")
        path, _, name = self.at.rpartition(".")
        parent = module_at(model, path)
        inside_it = set(old.modules())
        behind = next((p for p, m in model.named_modules() if m in inside_it and has_grown(m)), None)
        if behind is not None:
            raise GrowthError(
                f"{where}): a layer has been grown behind {behind}, which would be lost with it. Take that out first: "
                f"Remove('{behind}.{NAME}'); or replace a module inside."
            )
        hooked = hooks_on(old)
        if hooked:
            raise GrowthError(
                f"{where}): {hooked} has forward or backward hooks, which would never fire again. Remove them first "
                "(handle.remove()), and register them on the new module afterwards."
            )
        path = next(known for known, module in model.named_modules() if module is parent)
        names = list(parent._modules)
        position = {"index": names.index(name), "depth": len(names)} if isinstance(parent, CONTAINERS) else None
        built = build(self.layer, model, context, where, position)
        adopt(built, [old] if any(True for _ in old.parameters()) else [], model)
        built.train(old.training)
        call = None if context.structural or not context.has_probe else _arriving_at(old, context, where)
        begun = begin(built, self.init, InitSite(join(path, name), call, context, (old, False)), f"{where})")
        kept = _keep(old, built) if not begun.preserves else 0
        rewire = Rewire(path, tuple((n, New(built) if n == name else n) for n in parent._modules))
        lists = aliases(model, rewire)
        others = strays(model, old, lists)
        if others:
            raise GrowthError(
                f"{where}): {', '.join(others)} refers to the old module as well, outside of the modules that the "
                "network registers, and would go on using it. Change both inside `with auxin.surgery(model, "
                "optimizer):`."
            )
        return planned(
            model,
            self,
            context.seed,
            [rewire],
            aliases=lists,
            outputs=self.outputs,
            how=begun.how,
            writers=inside(join(path, name), begun.writers),
            preserves=begun.preserves,
            remarks=(f"{kept} tensors kept",) if kept else (),
        )


def _keep(old: nn.Module, new: nn.Module) -> int:
    """Let the new module hold the old one's tensors wherever name, kind, shape and dtype are the same."""
    before = _lasting(old)
    stands_for = {id(t): before[name] for name, t in _lasting(new).items() if _same_kind(t, before.get(name))}
    for module in new.modules():
        _exchange(module._parameters, stands_for)
        _exchange(module._buffers, stands_for)
    return len(stands_for)


def _exchange(held: dict[str, Any], stands_for: dict[int, Tensor]) -> None:
    held.update({leaf: stands_for[id(t)] for leaf, t in held.items() if id(t) in stands_for})


def _lasting(module: nn.Module) -> dict[str, Tensor]:
    """What a state_dict holds, each tensor once."""
    found: dict[str, Tensor] = {}
    for path, inner in module.named_modules():
        lasting = ((n, b) for n, b in inner._buffers.items() if n not in inner._non_persistent_buffers_set)
        for name, t in (*inner._parameters.items(), *lasting):
            if t is not None and not any(t is known for known in found.values()):
                found[join(path, name)] = t
    return found


def _same_kind(new: Tensor, old: Tensor | None) -> bool:
    if old is None or isinstance(new, nn.Parameter) != isinstance(old, nn.Parameter):
        return False
    return new.shape == old.shape and new.dtype == old.dtype


def _arriving_at(old: nn.Module, context: PlanContext, where: str) -> Call:
    calls, _ = context.calls({"self": old})
    if "self" not in calls:
        raise GrowthError(f"{where}): on this probe the network never calls it, so a layer there would not run either.")
    return calls["self"]
