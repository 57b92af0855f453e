"""``Remove``: a module out of its container, the path it stood on closed."""

from __future__ import annotations

import dataclasses

from torch import nn

from auxin.anatomy.blocks import Container
from auxin.anatomy.probe import Look
from auxin.anatomy.tree import module_at
from auxin.change import Change, New
from auxin.edits.start import finish
from auxin.errors import GrowthError


@dataclasses.dataclass(frozen=True)
class Remove:
    """Takes the module at ``at`` out of its Sequential, ModuleList or ModuleDict; those behind it move up.

    The inverse of ``Insert`` and ``Duplicate``. Its parameters leave the optimizer with their state. The function of
    the network changes by what the module did; the change prints by how much.

    Args:
        at: path of the module, e.g. "blocks.3".
        outputs: the shape of the network's own output may change.

    Example:
        >>> Remove("blocks.3").at
        'blocks.3'
    """

    at: str
    outputs: bool = False

    def plan(self, model: nn.Module, look: Look) -> Change:
        """Say what goes. Writes to nothing."""
        module_at(model, self.at, "Remove(at=...): at")
        path, _, name = self.at.rpartition(".")
        if not self.at:
            raise GrowthError("Remove(at=''): that is the model itself; name a module inside it.")
        parent = module_at(model, path)
        if not isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise GrowthError(
                f"Remove(at={self.at!r}): it is an attribute of a {type(parent).__name__}, whose forward calls it by "
                f"name. Put something in its place: Replace({self.at!r}, torch.nn.Identity)."
            )
        container = Container.at(model, path, "Remove")
        items: list[str | New] = [other for other in container.names if other != name]
        rewire = container.renumbered(items) if container.numbered else container.named(items)
        return finish(model, self, look, container, rewire, outputs=self.outputs, how="removed")
