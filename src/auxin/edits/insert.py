"""``Insert``: a new layer into a Sequential, ModuleList or ModuleDict."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from auxin.anatomy.blocks import Container, adopt, number
from auxin.anatomy.depth import followed, numbered, numbers
from auxin.anatomy.placed import Placed, taken_apart
from auxin.anatomy.probe import Call, PlanContext
from auxin.anatomy.residual_role import ResidualRole, StandIn
from auxin.anatomy.zero_init import first_tensor, with_input
from auxin.change import Change, New, Rewire
from auxin.edits.build import begin, build, check_start, needs_batch
from auxin.edits.start import finish, inside
from auxin.errors import GrowthError
from auxin.init import InitSite
from auxin.listing import join


@dataclasses.dataclass(frozen=True)
class Insert:
    """A new layer in the container at ``at``.

    Args:
        at: path of an ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict``; "" is the model itself.
        layer: an importable class or factory, or a ``functools.partial`` of one; called without arguments. One that has
            a parameter ``index`` or ``depth`` without a default is given the position of the new layer, or the new
            length of the container, so that it goes on with a series such as dilations 1, 2, 4.
        index: position as in ``list.insert`` (negative counts from the end); None: the end.
        key: name in a ModuleDict or in a Sequential with named children.
        before: with ``key``: the name that the new one is put in front of; None: the end.
        init: "preserve" (the function stays, and the new weights can learn), "zero", "identity", "kaiming", "xavier",
            "default" (as the constructor made them), or an importable ``init(module)`` or ``init(module, site)``, see
            ``auxin.init.InitSite``; one that returns True promises that the function stays, which is proved.
        fade: optimizer steps over which a layer fades in, where init="preserve" finds no other way; 0: refuse then.
        outputs: the shape of the network's own output may change.

    Examples:
        >>> import functools
        >>> Insert("net", functools.partial(nn.Linear, 64, 64), index=-1, init="identity").at
        'net'
    """

    at: str
    layer: Any
    index: int | None = None
    key: str | None = None
    before: str | None = None
    init: Any = "preserve"
    fade: int = 100
    outputs: bool = False

    def __post_init__(self) -> None:
        check_start(self.init, self.fade, f"Insert(at={self.at!r})")
        if self.index is not None and type(self.index) is not int:
            raise GrowthError(
                f"Insert(at={self.at!r}, index={self.index!r}): index is a whole number, as in list.insert."
            )

    def check(self, model: nn.Module) -> None:
        """Check that there is a container at ``at``.

        Raises:
            GrowthError: there is none.
        """
        Container.at(model, self.at, "Insert")

    @property
    def needs_probe(self) -> str:
        """Why it cannot be planned without a batch; empty where it can."""
        return needs_batch(self.init, f"Insert(at={self.at!r})")

    def plan(self, model: nn.Module, context: PlanContext) -> Change:
        """Build the layer and say where it goes. Writes to nothing."""
        container = Container.at(model, self.at, "Insert")
        position, key = self._place(container)
        where = f"Insert(at={self.at!r}"
        size = len(container.names)
        built = build(self.layer, model, context, where, {"index": position, "depth": size + 1})
        adopt(built, _neighbours(container, position), model)
        path = join(container.path, key)
        where = f"{where}, index={position})" if self.key is None else f"{where}, key={key!r})"
        watched = context.has_probe and not context.structural
        call, beside = _arriving_at(container, position, context, where) if watched else (None, None)
        items: list[str | New] = list(container.names)
        homes = {i: i + (i >= position) for i in range(size)}
        sources = [*range(position), max(0, position - 1), *range(position, size)]
        alike = any(type(built) is type(container.child(i)) for i in range(size))
        at = numbered(built, numbers(container), position) if alike else {}
        number(built, at)
        assigns = followed(model, container, sources, homes) if size else ()
        keyed = self.key is not None or not container.numbered

        def rewired(new: New) -> Rewire:
            placed = [*items[:position], new, *items[position:]]
            pairs = tuple((key if item is new else str(item), item) for item in placed)
            return Rewire(container.path, pairs) if keyed else container.renumbered(placed)

        if watched and call is None:
            tried = rewired(New(nn.Identity()))
            call = Placed(context, tried, container.aliases(model, tried), assigns)
        role = None
        if beside is not None and size and isinstance(container.module, (nn.ModuleList, nn.ModuleDict)):
            tried = rewired(New(StandIn(beside)))
            role = ResidualRole(context, tried, assigns)
        tap = (container.child(min(position, size - 1)), position < size) if size else (container.module, True)
        begun = begin(built, self.init, InitSite(path, call, context, tap), where, self.fade, role)
        rewire = rewired(New(built, gated=begun.gated, numbers=at))
        resolved = dataclasses.replace(self, index=None if keyed else position)
        fields = {"how": begun.how, "writers": inside(path, begun.writers), "preserves": begun.preserves}
        fields |= {"assigns": assigns}
        fields |= {"gates": (path,) if begun.gated else (), "fade": self.fade}
        return finish(model, resolved, context, container, rewire, outputs=self.outputs, **fields)

    def _place(self, container: Container) -> tuple[int, str]:
        """Position and name of the new child."""
        size, where = len(container.names), f"Insert(at={self.at!r}"
        if self.key is not None or not container.numbered:
            if isinstance(container.module, nn.ModuleList) or (
                container.numbered and size and self.key is not None and isinstance(container.module, nn.Sequential)
            ):
                raise GrowthError(
                    f"{where}, key={self.key!r}): {self.at!r} has natural indices; pass index= instead of key=."
                )
            names = list(container.names)
            if self.key is None or self.index is not None:
                raise GrowthError(
                    f"{where}, index={self.index!r}, key={self.key!r}): the children of {self.at!r} have names "
                    f"({', '.join(names[:8])}); pass key='new_name' and, if it is not to come last, before='a_name'."
                )
            _check_key(self.key, container, where)
            if self.before is not None and self.before not in names:
                raise GrowthError(
                    f"{where}, before={self.before!r}): no such child; there are {', '.join(names[:12])}."
                )
            return (size if self.before is None else names.index(self.before)), self.key
        if self.before is not None:
            raise GrowthError(f"{where}, before={self.before!r}): before= goes with key=; here pass index=.")
        index = size if self.index is None else self.index
        if type(index) is not int or not -size <= index <= size:
            raise GrowthError(
                f"{where}, index={index!r}): {self.at!r} has {size} children; index is a whole number from {-size} "
                f"to {size}."
            )
        index = index + size if index < 0 else index
        return index, str(index)


def _check_key(key: str, container: Container, where: str) -> None:
    if key in container.names:
        raise GrowthError(f"{where}, key={key!r}): there is a {key!r} already.")
    if not key or "." in key or hasattr(container.module, key):
        raise GrowthError(
            f"{where}, key={key!r}): not usable as a module name (empty, with a dot, or an attribute of the container)."
        )


def _neighbours(container: Container, position: int) -> list[nn.Module]:
    """The children of the container, nearest to ``position`` first (the one in front wins)."""
    order = sorted(range(len(container.names)), key=lambda i: abs(i + 0.5 - position) + (i >= position) * 0.1)
    return [container.child(i) for i in order]


def _arriving_at(
    container: Container, position: int, context: PlanContext, where: str
) -> tuple[Call | None, Call | None]:
    """What the new child will be given: what its successor is given, or at the end what the last one returns.

    And the call of the child that this was seen at. None where forward calls only parts of it.
    """
    size = len(container.names)
    index = min(position, size - 1)
    if size == 0:
        if not isinstance(container.module, nn.Sequential):
            raise GrowthError(
                f"{where}: the container is empty, so nothing shows how its children are called. Build the model "
                "with one block, or add the first one inside `with auxin.surgery(model, optimizer):`."
            )
        watched = {"self": container.module}
    else:
        watched = {"self": container.child(index)}
    calls, _ = context.calls(watched)
    if "self" not in calls and taken_apart(context, watched.values()):
        return None, None
    if "self" not in calls and size:  # no row may be routed to this one, as among experts
        others, _ = context.calls({str(i): container.child(i) for i in range(size)})
        if others:
            near = others[min(others, key=lambda i: abs(int(i) - index))]
            return near, near
    if "self" not in calls:
        raise GrowthError(
            f"{where}: on this probe the network never calls what stands there, so a layer there would not run either."
        )
    call = calls["self"]
    if size == 0 or position < size:
        return call, call
    out = first_tensor(call.output)
    return call if out is None else with_input(call, out), call
