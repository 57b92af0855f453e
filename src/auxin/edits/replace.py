"""``Replace``: one module for another, keeping every tensor that fits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.blocks import CONTAINERS, adopt, hooks_on
from auxin.anatomy.holders import aliases, strays
from auxin.anatomy.probe import Call, PlanContext
from auxin.anatomy.tree import planned
from auxin.anatomy.widths.tried import tried
from auxin.axes import Axes, Axis
from auxin.change import Alias, Change, Continued, Move, New, Rewire
from auxin.edits.build import begin, build, check_start, needs_batch
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
        init: as in ``Insert``, for the tensors that are new; "preserve" where what goes returned its input. "copies":
            every module inside the new one that has the tensors of the old one starts as a copy of it, with its state,
            as the experts of a mixture do in sparse upcycling (arXiv:2212.05055); whether the function stays is tried
            on the probe.
        outputs: the shape of the network's own output may change.

    Examples:
        >>> Replace("act", nn.GELU).init
        'default'
    """

    at: str
    layer: Any
    init: Any = "default"
    outputs: bool = False

    def __post_init__(self) -> None:
        check_start(self.init, 0, f"Replace(at={self.at!r})", ("copies",))

    def check(self, model: nn.Module) -> None:
        """Check that there is a module at ``at``.

        Raises:
            GrowthError: there is none.
        """
        if not self.at:
            raise GrowthError("Replace(at=''): that is the model itself; name a module inside it.")
        module_at(model, self.at, "Replace(at=...): at")

    @property
    def needs_probe(self) -> str:
        """Why it cannot be planned without a batch; empty where it can."""
        return needs_batch(self.init, f"Replace(at={self.at!r})")

    def plan(self, model: nn.Module, context: PlanContext) -> Change:
        """Build the new module and say where it goes. Writes to nothing of the network."""
        where = f"Replace(at={self.at!r}"
        self.check(model)
        old = module_at(model, self.at)
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
        if self.init == "copies":
            return self._copies(model, context, built, path, name)
        begun = begin(built, self.init, InitSite(join(path, name), call, context, (old, False)), f"{where})")
        kept = _keep(old, built) if not begun.preserves else 0
        rewire = Rewire(path, tuple((n, New(built) if n == name else n) for n in parent._modules))
        lists = self._followed(model, rewire, old)
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

    def _followed(self, model: nn.Module, rewire: Rewire, old: nn.Module) -> tuple[Alias, ...]:
        """The plain lists that follow; refuse what else refers to the old module."""
        lists = aliases(model, rewire)
        others = strays(model, old, lists)
        if others:
            raise GrowthError(
                f"Replace(at={self.at!r}): {', '.join(others)} refers to the old module as well, outside of the "
                "modules that the network registers, and would go on using it. Change both inside "
                "`with auxin.surgery(model, optimizer):`."
            )
        return lists

    def _copies(self, model: nn.Module, context: PlanContext, built: nn.Module, path: str, name: str) -> Change:
        """Every module inside that has the tensors of the old one becomes a copy of it; the first one keeps them.

        Raises:
            GrowthError: there is none.
        """
        old, parent = module_at(model, self.at), module_at(model, path)
        copies = _like(built, old)
        if not copies:
            raise GrowthError(
                f"Replace(at={self.at!r}, init='copies'): no module inside the new {type(built).__name__} has the "
                f"tensors of the old {type(old).__name__}, {_shapes_of(old)}. Build its experts by the same class, as "
                "auxin.modules.Mixture(expert=...) does; weights of experts in one tensor of three dimensions have to "
                "be filled inside `with auxin.surgery(model, optimizer):`."
            )
        first, *others = map(built.get_submodule, copies)
        _keep(old, first)
        tensors, share = _lasting(old), 1 / len(copies)
        axes = {leaf: _shared_out(t, share) for leaf, t in tensors.items()}
        continued: dict[str, Continued] = {}
        states: dict[int, tuple[str, Tensor]] = {}
        for expert, at in zip(others, copies[1:], strict=True):
            for leaf, t in _lasting(expert).items():
                with torch.no_grad():
                    t.copy_(tensors[leaf])
                continued[join(at, leaf)] = Continued(join(self.at, leaf), axes[leaf])
                states[id(t)] = (leaf, tensors[leaf])
        new = New(built, continues=continued)
        rewire = Rewire(path, tuple((n, new if n == name else n) for n in parent._modules))
        lists = self._followed(model, rewire, old)
        tries = context.has_probe and not context.structural
        why = tried(context, (), (), same=True, rewires=[rewire])[0] if tries else "it was not run"
        change = planned(
            model,
            self,
            context.seed,
            [rewire],
            sources={i: t for i, (_, t) in states.items() if isinstance(t, nn.Parameter)},
            aliases=lists,
            outputs=self.outputs,
            how=f"{len(copies)} copies of what stood there",
            preserves=not why,
            remarks=(f"copies do not keep the function: {why}",) if why and tries else (),
        )
        names = {id(p): n for n, p in change.after.items()}
        kept = [
            Move(names[id(t)], join(self.at, leaf), t, t, t.shape, axes=axes[leaf])
            for leaf, t in tensors.items()
            if isinstance(t, nn.Parameter) and id(t) in names
        ]
        moves = [
            dataclasses.replace(m, axes=axes[states[id(m.new)][0]]) if id(m.new) in states else m for m in change.moves
        ]
        return dataclasses.replace(change, moves=(*moves, *kept))


def _like(built: nn.Module, old: nn.Module) -> list[str]:
    """Paths inside a new module of those that have the tensors of an old one, by name, shape and dtype."""
    wanted = {name: (t.shape, t.dtype, type(t)) for name, t in _lasting(old).items()}
    found = (
        path
        for path, module in built.named_modules()
        if wanted and {name: (t.shape, t.dtype, type(t)) for name, t in _lasting(module).items()} == wanted
    )
    return list(found)


def _shared_out(tensor: Tensor, share: float) -> Axes:
    """All entries where they were, each with a part of the gradient."""
    axes = [Axis.same(size) for size in tensor.shape]
    if axes:
        axes[0] = dataclasses.replace(axes[0], gradient=torch.full((tensor.shape[0],), share, dtype=torch.float64))
    return tuple(axes)


def _shapes_of(module: nn.Module) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in list(_lasting(module).items())[:4]) or "which has none"


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
