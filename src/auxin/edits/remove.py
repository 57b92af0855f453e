"""``Remove``: a module out of its container, the path it stood on closed."""

from __future__ import annotations

import dataclasses

from torch import nn

from auxin.anatomy.blocks import Container
from auxin.anatomy.depth import followed
from auxin.anatomy.holders import places, strays
from auxin.anatomy.probe import PlanContext
from auxin.anatomy.tree import planned
from auxin.change import Change, New, Rewire
from auxin.edits.start import finish
from auxin.errors import GrowthError
from auxin.listing import module_at
from auxin.output_hook import NAME, has_grown


@dataclasses.dataclass(frozen=True)
class Remove:
    """Takes the module at ``at`` out of its Sequential, ModuleList or ModuleDict; those behind it move up.

    The inverse of ``Insert`` and ``Duplicate`` by one: names, order, optimizer entries and averages are as if it had
    not been, only what was trained since stays. Its parameters leave the optimizer with their state; one that is tied
    to another layer stays there. The function of the network changes by what the module did; the change prints by how
    much. What ``Replace``, ``Wake`` and ``surgery`` have done it does not undo: put the old layer, or a Dormant around
    the woken one, back inside ``with auxin.surgery(model, optimizer):``.

    Args:
        at: path of the module, e.g. "blocks.3".
        outputs: the shape of the network's own output may change.

    Examples:
        >>> Remove("blocks.3").at
        'blocks.3'
    """

    at: str
    outputs: bool = False

    def check(self, model: nn.Module) -> None:
        """Check that there is a module at ``at``.

        Raises:
            GrowthError: there is none.
        """
        module_at(model, self.at, "Remove(at=...): at")
        if not self.at:
            raise GrowthError("Remove(at=''): that is the model itself; name a module inside it.")

    def plan(self, model: nn.Module, context: PlanContext) -> Change:
        """Say what goes. Writes to nothing."""
        self.check(model)
        path, _, name = self.at.rpartition(".")
        parent = module_at(model, path)
        if name == NAME and has_grown(parent):
            return self._all_behind(model, context, path)
        if not isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise GrowthError(
                f"Remove(at={self.at!r}): it is an attribute of a {type(parent).__name__}, whose forward calls it by "
                f"name. Put something in its place: Replace({self.at!r}, torch.nn.Identity)."
            )
        container = Container.at(model, path, "Remove")
        _refuse_shared(model, self.at, container)
        owner, _, grown = container.path.rpartition(".")
        if grown == NAME and container.names == (name,) and has_grown(module_at(model, owner)):
            return self._all_behind(model, context, owner)
        items: list[str | New] = [other for other in container.names if other != name]
        rewire = container.renumbered(items) if container.numbered else container.named(items)
        left = [i for i, other in enumerate(container.names) if other != name]
        assigns = followed(model, container, left, {i: position for position, i in enumerate(left)})
        return finish(model, self, context, container, rewire, outputs=self.outputs, assigns=assigns, how="removed")

    def _all_behind(self, model: nn.Module, context: PlanContext, path: str) -> Change:
        """All that was grown behind a module outside of a container: the hook goes with it."""
        path = next(known for known, module in model.named_modules() if module is module_at(model, path))
        children = tuple((n, n if child is not None else None) for n, child in module_at(model, path)._modules.items())
        rewire = Rewire(path, tuple(pair for pair in children if pair[0] != NAME), hook=False)
        return planned(model, self, context.seed, [rewire], outputs=self.outputs, how="removed")


def _refuse_shared(model: nn.Module, at: str, container: Container) -> None:
    """Refuse a block that something else uses as well: it would go on running, and no optimizer would hold it."""
    block = container.module._modules[at.rpartition(".")[2]]
    assert block is not None
    # Other passes of it in the same list go on with its weights, as those that ``Repeat`` makes do.
    where = [path for path in places(model, block) if path.rpartition(".")[0] != container.path]
    where += strays(model, block, container.aliases(model, container.named(list(container.names))))
    if where:
        raise GrowthError(
            f"Remove(at={at!r}): the same module also stands at {', '.join(where)}, which would go on using it. Take "
            "it out of all of them inside `with auxin.surgery(model, optimizer):`."
        )
