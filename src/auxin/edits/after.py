"""``After``: a new layer behind any module, wherever it stands."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from auxin.anatomy.activations import Activations, activations_of, called_next, depended_on, flows_through
from auxin.anatomy.blocks import Container, adopt, shape_of
from auxin.anatomy.depth import followed
from auxin.anatomy.probe import Call, PlanContext
from auxin.anatomy.tree import planned
from auxin.change import Change, New, Rewire
from auxin.edits.build import begin, build, check_start, needs_batch
from auxin.edits.data_layer import by_data
from auxin.edits.start import Start, inside, takes
from auxin.errors import GrowthError
from auxin.gate import NAME as GATE
from auxin.init import InitSite
from auxin.listing import join, module_at
from auxin.modules import ResidualLinear
from auxin.output_hook import NAME, has_grown


@dataclasses.dataclass(frozen=True)
class After:
    """A new layer behind the module at ``at``, whatever kind of module that is, and whoever calls it.

    Where the module is an entry of a Sequential, ModuleList or ModuleDict that simply runs its entries one after the
    other, the new layer becomes the next entry. Elsewhere it becomes the first entry of a Sequential ``_grown``, a
    child of the module, and the module's output goes through that: all old names stay, and copying, pickling,
    ``torch.save``, ``torch.export`` and ``torch.compile`` work as before. A second layer behind the same module goes
    behind the first; ``Remove("path._grown.0")`` takes one out again.

    Args:
        at: path of a module whose output is one floating tensor; ``auxin.sites(model, probe)`` lists them.
        layer: an importable class or factory, or a ``functools.partial`` of one, called as by ``Insert``; None:
            ``x + P x`` over the channels of that place, with ``P`` zero at first.
        init: as in ``Insert``; or "tiny": of the layer x + P x, the P that lowers the loss on ``evidence`` at once.
        fade: optimizer steps over which a layer fades in, where init="preserve" finds no other way; 0: refuse then.
        as_hook: True: always as a child ``_grown``, so that no old name moves; False: always as the next entry of the
            container; None: as told above.

    Source: layer addition, Gesmundo and Dean (arXiv:2205.12755).

    Examples:
        >>> net = nn.ModuleDict({"stem": nn.Linear(4, 8)})
        >>> change = After("stem", functools.partial(nn.Linear, 8, 8), init="default").plan(net, PlanContext(net))
        >>> [path for path, _ in change.added]
        ['stem._grown']
    """

    at: str
    layer: Any = None
    init: Any = "preserve"
    fade: int = 100
    as_hook: bool | None = None

    def __post_init__(self) -> None:
        where = f"After(at={self.at!r})"
        check_start(by_data(self.init, where), self.fade, where)

    def check(self, model: nn.Module) -> None:
        """Check that there is a module at ``at``.

        Raises:
            GrowthError: there is none.
        """
        module_at(model, self.at, "After(at=...): at")

    @property
    def needs_probe(self) -> str:
        """Why it cannot be planned without a batch; empty where it can."""
        if self.layer is not None:
            return needs_batch(self.init, f"After(at={self.at!r})")
        return (
            f"After(at={self.at!r}): to choose a layer that fits it needs one batch: pass probe=batch; or name the "
            "layer: After(at, functools.partial(torch.nn.Linear, 64, 64), init='default')."
        )

    def plan(self, model: nn.Module, context: PlanContext) -> Change:
        """Build the layer and say where it goes. Writes to nothing of the network."""
        where = f"After(at={self.at!r}"
        path, module = self._site(model, f"{where})")
        place = _Place.behind(model, path, module, self.as_hook, f"{where})")
        activations = None
        if context.has_probe and not context.structural:
            activations = self._activations(context, place, f"{where})")
            place = place.chosen(context, activations, self.as_hook)
            _check_use(context, place, activations, f"{where})")
        else:
            place = place.unseen(self.as_hook)
        if place.container is None and GATE in module._buffers:  # a checkpoint would not know which hook came first
            raise GrowthError(
                f"{where}): {path} is still fading in. Grow behind it once it is whole, or behind a module inside it."
            )
        layer = self.layer
        if layer is None:
            if activations is None:
                raise GrowthError(self.needs_probe)
            layer = _pointwise(model, place.path, module, activations, where)
        size = 0 if place.container is None else len(place.container.names)
        built = build(layer, model, context, where, {"index": place.position, "depth": size + 1})
        adopt(built, _neighbours(model, place.path, module), model)
        built.train(module.training)
        init = by_data(self.init, f"{where})")
        begun = self._begun(built, init, activations, context, place, f"{where})")
        rewire = place.rewire(built, gated=begun.gated)
        new = f"{rewire.added[0][0]}.0" if rewire.hook else rewire.added[0][0]
        return planned(
            model,
            dataclasses.replace(self, layer=layer, as_hook=place.hooked),
            context.seed,
            [rewire],
            aliases=() if place.container is None else place.container.aliases(model, rewire),
            how=begun.how,
            remarks=getattr(init, "remarks", ()),
            writers=inside(new, begun.writers),
            preserves=begun.preserves,
            gates=(new,) if begun.gated else (),
            fade=self.fade,
        )

    def _site(self, model: nn.Module, where: str) -> tuple[str, nn.Module]:
        """The first known path of the module, and the module; behind compiled ones what they hold."""
        _refuse_scripted(model, self.at, where)
        module = module_at(model, self.at, "After(at=...): at")
        while type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
            module = module.get_submodule("_orig_mod")
        path = next(known for known, m in model.named_modules() if m is module)
        if path.rpartition(".")[2] == NAME and has_grown(module_at(model, path[: -len(NAME) - 1])):
            path = path[: -len(NAME) - 1]
            module = module_at(model, path)
        if not has_grown(module) and (NAME in module._modules or hasattr(module, NAME)):
            raise GrowthError(
                f"{where}: {type(module).__name__} has an attribute {NAME!r} of its own, the name that the new layer "
                "would get. Rename it, or wrap the module: put it into an nn.Sequential and use Insert."
            )
        return path, module

    def _activations(self, context: PlanContext, place: _Place, where: str) -> Activations:
        """What comes out there; refused where it is not one floating tensor."""
        module = module_at(context.model, place.path)
        activations = activations_of(context, module, place.container.module if place.container is not None else None)
        if not activations.count:
            holds = isinstance(module, (nn.ModuleList, nn.ModuleDict))
            hint = f"Insert({place.path!r}, layer) adds an entry to it." if holds else "See auxin.sites(model, probe)."
            raise GrowthError(
                f"{where}: on this probe the network never calls it, so a layer behind it would not run either. {hint}"
            )
        if activations.odd:
            raise GrowthError(
                f"{where}: it returns {activations.odd}, not one floating tensor, so nothing says where a layer "
                f"belongs. {_instead(context, module)}"
            )
        if self.layer is None and not any(bool(sample.any()) for sample in activations.samples.values()):
            raise GrowthError(
                f"{where}: only zeros come out of it on this probe (as from a copy that has not trained yet), so an "
                "x + P x behind it would get no gradient. Train some steps first, or name a layer with a bias."
            )
        return activations

    def _begun(
        self,
        built: nn.Module,
        init: Any,
        activations: Activations | None,
        context: PlanContext,
        place: _Place,
        where: str,
    ) -> Start:
        """The first weights; the layer must take all that arrives."""
        samples = [] if activations is None else list(activations.samples.values())
        calls = [Call((sample,), {}, None) for sample in samples]
        if len(calls) > 1:
            modes = {m: m.training for m in built.modules()}
            try:
                for call in calls:
                    takes(built.eval(), call, where)
            except GrowthError as error:
                shapes = ", ".join(shape_of(sample) for sample in samples[:4])
                raise GrowthError(
                    f"{where}: it is called several times and returns tensors of several sizes ({shapes}); one layer "
                    f"does not fit them all. {error}"
                ) from error
            finally:
                for inner, mode in modes.items():
                    inner.training = mode
        path, call = place.rewire(built).added[0][0], calls[0] if calls else None
        return begin(built, init, InitSite(path, call, context, (place.module, False)), where, self.fade)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the new layer goes.

    Attributes:
        path: of the module that it stands behind.
        module: that module.
        container: the Sequential, ModuleList or ModuleDict that gets one more entry; None: the module gets a child.
        position: among its entries.
        sure: it need not be tried whether the container runs its entries one after the other.
        counted: something around the container counts or lists its entries.
    """

    path: str
    module: nn.Module
    container: Container | None
    position: int = 0
    sure: bool = False
    counted: bool = False

    @property
    def hooked(self) -> bool:
        """Whether it is, or goes into, a child ``_grown`` of the module."""
        return self.container is None or self.container.path == join(self.path, NAME)

    @classmethod
    def behind(cls, model: nn.Module, path: str, module: nn.Module, as_hook: bool | None, where: str) -> _Place:
        """What the structure says."""
        if has_grown(module) and as_hook is not False:
            inner = Container.at(model, join(path, NAME), "After")
            return cls(path, module, inner, len(inner.names), sure=True)
        plain = type(module).forward is nn.Sequential.forward
        if as_hook is True:
            if plain:
                raise GrowthError(
                    f"{where}, as_hook=True): a Sequential runs all of its children, so a child {NAME} would run "
                    "twice. Leave as_hook out: the layer becomes its last entry."
                )
            return cls(path, module, None)
        if isinstance(module, nn.Sequential):
            own = Container.at(model, path, "After")
            return cls(path, module, own, len(own.names), sure=plain and not own.names)
        parent, _, name = path.rpartition(".")
        above = module_at(model, parent) if path else None
        if isinstance(above, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            container = Container.at(model, parent, "After")
            size, at = len(container.names), container.names.index(name) + 1
            listed = not isinstance(above, nn.Sequential)
            beside = [*range(at), at - 1, *range(at, size)]
            homes = {i: i + (i >= at) for i in range(size)}
            counted = listed and bool(followed(model, container, beside, homes))
            return cls(path, module, container, at, counted=counted)
        if as_hook is False:
            raise GrowthError(f"{where}, as_hook=False): it stands in no container. Leave as_hook out.")
        return cls(path, module, None)

    def chosen(self, context: PlanContext, activations: Activations, as_hook: bool | None) -> _Place:
        """This place where it serves on the probe, else a child of the module."""
        if self.container is None or self.sure or as_hook is False:
            return self
        tried = self.rewire(nn.Identity())
        plain = not self.counted and not self.container.aliases(context.model, tried)
        if plain and flows_through(context, self.module, tried, activations):
            return self
        return _Place(self.path, self.module, None)

    def unseen(self, as_hook: bool | None) -> _Place:
        """This place where the structure alone says that it serves, else a child of the module."""
        plain = self.container is not None and type(self.container.module).forward is nn.Sequential.forward
        return self if as_hook is not None or plain or self.sure else _Place(self.path, self.module, None)

    def rewire(self, built: nn.Module, gated: bool = False) -> Rewire:
        """The new children of the container, or of the module."""
        if self.container is None:
            kept = tuple((name, name if child is not None else None) for name, child in self.module._modules.items())
            return Rewire(self.path, (*kept, (NAME, New(nn.Sequential(built).train(self.module.training)))), hook=True)
        items: list[str | New] = list(self.container.names)
        items.insert(self.position, New(built, gated=gated))
        if self.container.numbered:
            return self.container.renumbered(items)
        key = next(key for key in _keys() if not hasattr(self.container.module, key))
        return Rewire(self.container.path, tuple((key if isinstance(i, New) else i, i) for i in items))


def _check_use(context: PlanContext, place: _Place, activations: Activations, where: str) -> None:
    """Refuse a place whose output nothing uses, and a module that would run a new child itself."""
    used, runs_all = depended_on(context, place.module, activations)
    if not used:
        raise GrowthError(
            f"{where}: the network's output does not depend on what it returns (the result is not used, or it was "
            "written in place), so a layer behind it would never learn. See auxin.sites(model, probe)."
        )
    if runs_all and place.container is None:
        raise GrowthError(
            f"{where}: {type(place.module).__name__} runs all of its children, in a way of its own, so a new child "
            "would run in the middle of it. Choose the module that comes next: auxin.sites(model, probe)."
        )


def _refuse_scripted(model: nn.Module, at: str, where: str) -> None:
    """Refuse a place that is, or is inside, a ScriptModule."""
    module: nn.Module | None = model
    parts = at.split(".") if at else []
    for depth in range(len(parts) + 1):
        if isinstance(module, torch.jit.ScriptModule):
            raise GrowthError(
                f"{where}: {'.'.join(parts[:depth]) or 'the model'} is a ScriptModule, whose modules cannot be "
                "changed, and whose compiled forward calls no hook. Grow the nn.Module and script it again."
            )
        module = module._modules.get(parts[depth]) if module is not None and depth < len(parts) else None


def _instead(context: PlanContext, module: nn.Module) -> str:
    """Where a layer can go, if not behind a module that returns a tuple."""
    inside, behind = called_next(context, module)
    if inside:
        return "Choose a module inside it: auxin.sites(model, probe) lists them."
    holds = f"A {type(module).__name__} runs no module inside that one could choose."
    if not behind:
        return f"{holds} Write a module that holds it and the layer, and put it there inside `with auxin.surgery(...)`."
    taker = context.model.get_submodule(behind)
    if type(taker) is nn.Sequential and "0" in taker._modules:
        return f"{holds} Put the layer in front of what takes its output: Insert({behind!r}, layer, index=0)."
    return (
        f"{holds} Put the layer in front of what takes its output: `with auxin.surgery(model, optimizer, probe=batch): "
        f"model.set_submodule({behind!r}, torch.nn.Sequential(layer, model.get_submodule({behind!r})))`."
    )


def _keys() -> Iterator[str]:
    yield "grown"
    number = 2
    while True:
        yield f"grown_{number}"
        number += 1


def _neighbours(model: nn.Module, path: str, module: nn.Module) -> list[nn.Module]:
    """The module, or the nearest one around it that has parameters."""
    while next(module.parameters(), None) is None and path:
        path = path.rpartition(".")[0]
        module = module_at(model, path)
    return [module]


def _pointwise(model: nn.Module, path: str, module: nn.Module, activations: Activations, where: str) -> Any:
    """The layer that fits any place: ``x + P x`` over the channels of what comes out there."""
    samples = list(activations.samples.values())
    first = samples[0]
    if first.dim() < 2:
        raise GrowthError(f"{where}): it returns {shape_of(first)}, which has no channels. Name a layer: layer=....")
    axis = channel_axis(model, path, module, first.shape)
    sizes = sorted({sample.shape[axis] if sample.dim() > 1 else 0 for sample in samples})
    if len(sizes) > 1:
        raise GrowthError(
            f"{where}): it is called several times and returns {', '.join(map(str, sizes))} channels, which no one "
            "layer fits. Choose the modules before or behind it, one for each call: auxin.sites(model, probe)."
        )
    return functools.partial(ResidualLinear, sizes[0], axis=axis)


def channel_axis(model: nn.Module, path: str, module: nn.Module, shape: torch.Size) -> int:
    """The axis of the channels, 1 or -1: where the width of the module's parameters, or of those around it, stands."""
    parts = path.split(".") if path else []
    for known in (".".join(parts[:i]) for i in range(len(parts), -1, -1)):
        widths = {p.shape[0] for p in module_at(model, known).parameters() if p.dim()}
        first, last = shape[1] in widths, shape[-1] in widths
        if first != last:
            return 1 if first else -1
        if first and last:
            break
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
    return 1 if len(shape) > 3 or (convolves and len(shape) == 3) else -1
