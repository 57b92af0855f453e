"""Mixtures of experts: a router, what it chooses among, and the numbers that say how many there are and are chosen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from auxin.anatomy.blocks import Container
from auxin.anatomy.hugging_face.blueprint import configured
from auxin.anatomy.probe import PlanContext, untouched
from auxin.anatomy.tree import join, module_at
from auxin.anatomy.widths.groups import trace_of
from auxin.anatomy.widths.sizes import Attribute, Size, numbers_of, remembered

CHOSEN = re.compile(r"top_?k|per_tok|active|select|chosen|^k$")
EXPERTS = re.compile(r"expert|router|moe")


@dataclass(frozen=True)
class Mixture:
    """Routers and what they choose among.

    Attributes:
        path: of the module that holds both.
        routers: paths of the modules whose outputs choose; mostly one.
        size: how many experts there are.
        lists: of experts that are modules.
        tensors: names of those of which each expert has an entry along axis 0; the routers' first.
    """

    path: str
    routers: tuple[str, ...]
    size: int
    lists: tuple[Container, ...]
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        fused = [name for name in self.tensors if name.rpartition(".")[0] not in self.routers]
        return " and ".join([*(one.path for one in self.lists), *fused])

    def and_by(self, other: Mixture) -> Mixture:
        """The same experts, chosen by the routers of both."""
        tensors = tuple(dict.fromkeys((*self.tensors, *other.tensors)))
        return replace(self, routers=(*self.routers, *other.routers), tensors=tensors)


def mixture_of(model: nn.Module, router: str) -> Mixture | None:
    """The experts around a router: in the smallest module that holds it and as many things as it has outputs.

    These are lists of modules, and tensors that no layer of torch holds. That they are experts is seen once they have
    grown.
    """
    module = module_at(model, router)
    own = [p for p in module._parameters.values() if p is not None]
    if not own:
        return None
    size = max(own, key=Tensor.dim).shape[0]
    mine = [join(router, name) for name, t in _tensors(module) if t.shape[:1] == (size,)]
    parts = router.split(".") if router else []
    for path in (".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)):
        lists = tuple(_lists(model, path, size))
        fused = [
            join(at, name)
            for at, inner in _around(model, path, lists)
            if at != router and not type(inner).__module__.startswith("torch.nn.modules")
            for name, t in _tensors(inner)
            if t.shape[:1] == (size,)
        ]
        named = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
        if lists or any(named[name].dim() > 1 for name in fused):
            return Mixture(path, (router,), size, lists, (*mine, *fused))
    return None


def router_of(model: nn.Module, experts: str, length: int) -> str | None:
    """The layer that may choose among the modules of a list: the only one beside it with ``length`` outputs."""
    above = experts.rpartition(".")[0]
    found = []
    for name, module in module_at(model, above)._modules.items() if experts and length > 1 else ():
        weight = None if module is None else module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and weight.shape[0] == length:
            found.append(join(above, name))
    return found[0] if len(found) == 1 else None


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own parameters and buffers."""
    held: Any = {**module._parameters, **module._buffers}
    return [(name, t) for name, t in held.items() if t is not None]


def _lists(model: nn.Module, path: str, size: int) -> Iterator[Container]:
    """Lists of so many modules at or below a path, none inside another."""
    inside = [path]
    while inside:
        at = inside.pop(0)
        module = module_at(model, at)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module._modules) == size:
            yield Container(at, module, tuple(module._modules))
        else:
            inside += [join(at, name) for name, child in module._modules.items() if child is not None]


def _around(model: nn.Module, path: str, lists: Sequence[Container]) -> Iterator[tuple[str, nn.Module]]:
    """What is at or below a path and in none of the lists."""
    for name, module in module_at(model, path).named_modules():
        at = join(path, name) if name else path
        if not any(f"{at}.".startswith(f"{one.path}.") for one in lists):
            yield at, module


# ---- how many are chosen


class _Choices(TorchFunctionMode):
    """Notes how many of so many entries ``topk`` is asked for."""

    def __init__(self, sizes: set[int]):
        super().__init__()
        self.sizes = sizes
        self.inside: list[str] = []
        self.found: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "topk" and self.inside:
            given: Any = args[0] if args else kwargs.get("input")
            count: Any = args[1] if len(args) > 1 else kwargs.get("k")
            axis: Any = args[2] if len(args) > 2 else kwargs.get("dim", -1)
            if isinstance(count, int) and given.shape[axis] in self.sizes:
                self.found.setdefault(self.inside[-1], count)
        return func(*args, **kwargs)


def chosen(context: PlanContext, mixtures: Sequence[Mixture]) -> dict[str, int]:
    """By path of a mixture, how many of its experts are chosen for each row; those are left out where none are.

    The number remembers the attributes that it was computed from, where they are seen (a ``Size``).
    """
    model, counted = context.model, _Choices({one.size for one in mixtures})
    with untouched(model), remembered(model), counted, torch.no_grad():
        for one in mixtures:
            module = module_at(model, one.path)
            module.register_forward_pre_hook(lambda *_, path=one.path: counted.inside.append(path))
            module.register_forward_hook(lambda *_: counted.inside.pop() and None)
        context.run()
    return counted.found


def choosing(model: nn.Module, mixture: Mixture, count: int, times: int) -> list[tuple[Attribute, int]]:
    """Attributes by which ``times`` as many experts are chosen, with their new values; empty where none can be seen."""
    remembers = count.attributes if isinstance(count, Size) else []
    for attribute in remembers:
        new = attribute.value * times
        assert isinstance(count, Size)
        if count.with_values({attribute.key: new}) == Fraction(count * times):
            return [(attribute, new)]
    held = numbers_of(module_at(model, mixture.path))
    return [
        (_below(mixture, one), one.value * times)
        for one in held
        if one.value == count and CHOSEN.search(one.name.rpartition(".")[2])
    ]


def counting(context: PlanContext, mixtures: Mapping[str, Mixture]) -> list[list[tuple[Attribute, Mixture]]]:
    """Sets of attributes that may be the number of experts, the most likely one first.

    Args:
        context: the network on the probe.
        mixtures: by path.
    """
    others = _other_lengths(context, mixtures)
    found: list[tuple[Attribute, Mixture]] = []
    for mixture in mixtures.values():
        for one in numbers_of(module_at(context.model, mixture.path)):
            of_configuration = "." in one.name and configured(context.model)  # such fields are found by building
            inside = any(f"{join(mixture.path, one.path)}.".startswith(f"{held.path}.") for held in mixture.lists)
            if one.value == mixture.size and not inside and not of_configuration:
                found.append((_below(mixture, one), mixture))
    named = [pair for pair in found if EXPERTS.search(pair[0].name)]
    ways = [[pair for pair in found if pair[0].key not in others], found, named, []]
    return [way for place, way in enumerate(ways) if way not in ways[:place]]


def _other_lengths(context: PlanContext, mixtures: Mapping[str, Mixture]) -> set[tuple[int, str]]:
    """Attributes that are lengths of something else, by holder and name."""
    try:
        trace = trace_of(context)
    except Exception:  # of what cannot be traced nothing is known
        return set()
    growing = frozenset().union(*(trace.inside(trace.tensors[n][0]) for m in mixtures.values() for n in m.tensors))
    lengths = [(size, term) for size, term in trace.links if len(size.attributes) == 1]
    return {size.attributes[0].key for size, term in lengths if trace.inside(term).isdisjoint(growing)}


def _below(mixture: Mixture, one: Attribute) -> Attribute:
    """An attribute that was found from a mixture on, as it is called from the whole network on."""
    path = join(mixture.path, one.path) if one.path else mixture.path
    return Attribute(path, one.name, one.holder, one.value)
