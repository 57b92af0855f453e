"""``Wake``: a layer that was built in as ``Dormant`` begins to run and to train."""

from __future__ import annotations

import copy
import dataclasses
from typing import ClassVar

from torch import nn

from auxin.anatomy.blocks import HOOKS, shape_of
from auxin.anatomy.holders import aliases, strays
from auxin.anatomy.probe import PlanContext
from auxin.anatomy.tree import moves_between, parameters_after
from auxin.anatomy.zero_init import arriving, first_tensor
from auxin.change import Before, Change, New, Rewire
from auxin.edits.start import fade_in, takes
from auxin.errors import GrowthError
from auxin.listing import module_at
from auxin.modules import Dormant


@dataclasses.dataclass(frozen=True)
class Wake:
    """Switches on the layer inside the ``Dormant`` at ``at``: the layer itself stands there afterwards.

    Its Parameters stay the same objects. Those that were trainable before the layer went to sleep train again: beside
    their siblings in the optimizer, or where they are if the optimizer holds them already. Without ``fade`` the
    function of the network changes by what the layer does, and the change prints by how much.

    Args:
        at: path of the Dormant layer, e.g. "extra". If it stands under several names, all of them wake.
        fade: optimizer steps over which the layer fades in, from changing nothing to all that it does; 0: at once.
        outputs: the shape of the network's own output may change.

    Examples:
        >>> Wake("extra", outputs=True).fade
        0
    """

    at: str
    fade: int = 0
    outputs: bool = False
    once: ClassVar[bool] = True  # what is awake cannot wake again

    def __post_init__(self) -> None:
        if type(self.fade) is not int or self.fade < 0:
            raise GrowthError(
                f"Wake(at={self.at!r}): fade={self.fade!r}; pass a whole number of optimizer steps, 0 for at once."
            )

    def check(self, model: nn.Module) -> None:
        """Check that something stands at ``at``: a layer that sleeps, or has woken already.

        Raises:
            GrowthError: nothing does.
        """
        module_at(model, self.at, "Wake(at=...): at")

    @property
    def needs_probe(self) -> str:
        """Why it cannot be planned without a batch; empty where it can."""
        said = (
            f"Wake(at={self.at!r}, fade={self.fade}): a fade-in needs one batch, to see what arrives there: pass "
            "probe=batch, or fade=0."
        )
        return said if self.fade else ""

    def plan(self, model: nn.Module, context: PlanContext) -> Change:
        """Say what wakes and what trains from then on. Writes to nothing."""
        dormant = self._dormant(model)
        new = New(dormant.layer)
        rewires = tuple(_rewires(model, dormant, new))
        lists = tuple(alias for rewire in rewires for alias in aliases(model, rewire))
        self._check(model, dormant, strays(model, dormant, lists))
        fades = bool(self.fade) and not context.structural
        if fades:
            if not context.has_probe:
                raise GrowthError(self.needs_probe)
            _check_fade(dormant, context, f"Wake(at={self.at!r}, fade={self.fade})")
        before, after = Before.of(model), parameters_after(model, rewires)
        inside = dormant.layer.named_parameters()
        woken = {id(p): p for name, p in inside if p.requires_grad or name in dormant.trainable}
        count = sum(p.numel() for p in woken.values())
        return Change(
            edit=self,
            seed=context.seed,
            rewires=rewires,
            aliases=lists,
            trains={name: True for name, p in before.parameters.items() if id(p) in woken},
            moves=moves_between(before.parameters, after, touched=woken),
            before=before,
            after=after,
            outputs=self.outputs,
            preserves=fades,
            how="fade-in" if fades else "woken",
            gates=(rewires[0].added[0][0],) if fades else (),
            fade=self.fade,
            writers=tuple(name for name, p in after.items() if id(p) in woken),
            remarks=(f"{count:,} parameters begin to train" if count else "all of it was frozen before, and stays so",),
        )

    def _dormant(self, model: nn.Module) -> Dormant:
        """The layer that is to wake, or a refusal that names those that could."""
        where = f"Wake(at={self.at!r})"
        module = module_at(model, self.at, "Wake(at=...): at")
        parts = self.at.split(".")
        for path in (".".join(parts[:i]) for i in range(1, len(parts))):
            if isinstance(module_at(model, path), Dormant):
                raise GrowthError(f"{where}: that is inside {path!r}, which sleeps itself. Wake({path!r}) comes first.")
        if not self.at:
            raise GrowthError(f"{where}: that is the model itself; name a Dormant layer inside it.")
        if not isinstance(module, Dormant):
            asleep = [path for path, m in model.named_modules() if isinstance(m, Dormant)]
            known = (
                f"Asleep in this model: {', '.join(map(repr, asleep[:8]))}."
                if asleep
                else ("No layer of this model sleeps: build one in as auxin.Dormant(layer).")
            )
            raise GrowthError(f"{where}: {self.at!r} is a {type(module).__name__}, not a Dormant layer. {known}")
        return module

    def _check(self, model: nn.Module, dormant: Dormant, others: list[str]) -> None:
        """Refuse what would go on using the sleeping layer without a word."""
        where = f"Wake(at={self.at!r})"
        if any(dormant.__dict__.get(name) for name in HOOKS if "state_dict" not in name):
            raise GrowthError(
                f"{where}: hooks are registered on the Dormant itself, and would never fire again. Remove them "
                f"(handle.remove()), or register them on the layer: model.{self.at}.layer."
            )
        if others:
            raise GrowthError(
                f"{where}: {', '.join(others)} refers to the Dormant layer as well, outside of the modules that the "
                "network registers, and would go on using it asleep. Keep it in an nn.ModuleList, or change both "
                "inside `with auxin.surgery(model, optimizer):`."
            )


def _rewires(model: nn.Module, dormant: Dormant, new: New) -> list[Rewire]:
    """New children for every module that holds the Dormant layer, under however many names."""
    found = []
    for path, parent in model.named_modules():
        if any(child is dormant for child in parent._modules.values()):
            children = ((name, new if child is dormant else name) for name, child in parent._modules.items())
            found.append(Rewire(path, tuple(children)))
    return found


def _check_fade(dormant: Dormant, context: PlanContext, where: str) -> None:
    """Refuse a fade-in that would not start from what the sleeping layer gave: its input."""
    calls, _ = context.calls({"self": dormant})
    if "self" not in calls:
        raise GrowthError(f"{where}: on this probe the network never calls it, so it would never train.")
    layer = copy.deepcopy(dormant.layer).requires_grad_(True)
    output, given = first_tensor(takes(layer.eval(), calls["self"], where)), arriving(calls["self"])
    if given is not None and output is not None and output.shape == given[0].shape:
        if fade_in(layer, calls["self"]):
            return
        raise GrowthError(
            f"{where}: a {type(layer).__name__} cannot fade in: it has no weights that would train, or writes into "
            "what it is given. Wake it at once: fade=0."
        )
    shapes = f"{shape_of(given[0]) if given else 'nothing'} -> {shape_of(output)}"
    raise GrowthError(
        f"{where}: the layer turns {shapes}, and a fade-in mixes its output with its input. Wake it at once: "
        "fade=0 (and outputs=True where the network's own output may change)."
    )
