"""``Replace``: one module for another, keeping every tensor that fits."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from auxin.anatomy.blocks import adopt, hooks_on
from auxin.anatomy.probe import Call, Look
from auxin.anatomy.tree import join, module_at
from auxin.change import Before, Change, New, Rewire
from auxin.edits.build import begin, build
from auxin.edits.start import inside, spliced
from auxin.errors import GrowthError


@dataclasses.dataclass(frozen=True)
class Replace:
    """Puts a new module where another stands: a layer for an Identity, a better layer for a layer.

    A parameter that stood under the same name with the same shape and dtype stays the same object, with its values and
    its optimizer state.

    Args:
        at: path of the module that goes.
        layer: an importable class or factory, or a ``functools.partial`` of one; called without arguments.
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

    def plan(self, model: nn.Module, look: Look) -> Change:
        """Build the new module and say where it goes. Writes to nothing of the network."""
        where = f"Replace(at={self.at!r}"
        if not self.at:
            raise GrowthError(f"{where}): that is the model itself; name a module inside it.")
        old = module_at(model, self.at, "Replace(at=...): at")
        path, _, name = self.at.rpartition(".")
        parent = module_at(model, path)
        hooked = hooks_on(old)
        if hooked:
            raise GrowthError(
                f"{where}): {hooked} has forward or backward hooks, which would never fire again. Remove them first "
                "(handle.remove()), and register them on the new module afterwards."
            )
        path = next(known for known, module in model.named_modules() if module is parent)
        built = build(self.layer, model, look, where)
        adopt(built, [old] if any(True for _ in old.parameters()) else [], model)
        built.train(old.training)
        call = None if look.structural or not look.has_probe else _arriving_at(old, look, where)
        begun = begin(built, self.init, call, look, f"{where})")
        kept = _keep(old, built) if not begun.preserves else ()
        children = tuple(
            (n, New(built) if n == name else n) for n, child in parent._modules.items() if child is not None
        )
        return spliced(
            model,
            self,
            look,
            Rewire(path, children),
            Before.of(model),
            outputs=self.outputs,
            how=begun.how,
            writers=inside(join(path, name), begun.writers),
            preserves=begun.preserves,
            notes=(f"{len(kept)} tensors kept",) if kept else (),
        )


def _keep(old: nn.Module, new: nn.Module) -> tuple[str, ...]:
    """Let the new module hold the old one's Parameters wherever name, shape and dtype are the same."""
    before, kept = dict(old.named_parameters()), []
    for path, module in new.named_modules():
        for leaf, p in module._parameters.items():
            name = f"{path}.{leaf}" if path else leaf
            was = before.get(name)
            if p is not None and was is not None and was.shape == p.shape and was.dtype == p.dtype:
                module._parameters[leaf] = was
                kept.append(name)
    return tuple(kept)


def _arriving_at(old: nn.Module, look: Look, where: str) -> Call:
    calls, _ = look.calls({"self": old})
    if "self" not in calls:
        raise GrowthError(f"{where}): on this probe the network never calls it, so a layer there would not run either.")
    return calls["self"]
