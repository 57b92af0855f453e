"""Containers of blocks: how they name their children, which plain lists repeat them, and how one block is copied."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from auxin.anatomy.holders import aliases
from auxin.anatomy.tree import CONTAINERS
from auxin.anatomy.zero_init import copy_of
from auxin.change import Alias, New, Rewire
from auxin.dynamo import compile_copy
from auxin.errors import GrowthError
from auxin.fsdp2 import is_their_hook
from auxin.gate import faded
from auxin.listing import BARE, join, module_at, modules_in, named_modules, named_parameters, own_names, parameters_of
from auxin.modules import ResidualLinear, awake
from auxin.ranks import together
from auxin.sharded import AT_A_CHECKPOINT, copy_plainly, is_spread, unmark

PLAIN = (int, float, str, bytes, bool, type(None), type, types.FunctionType, types.BuiltinFunctionType)

HOOKS = tuple(name for name in BARE if name.endswith("hooks"))


@dataclass(frozen=True)
class Container:
    """An ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict`` of the user's, at ``path``.

    ``numbered`` says that its keys are 0, 1, ... in order, so that they are renumbered as a person would.
    """

    path: str
    module: nn.Module
    names: tuple[str, ...]

    @classmethod
    def at(cls, model: nn.Module, path: str, who: str) -> Container:
        """Find it, or say what stands there instead."""
        module = module_at(model, path, f"{who}(at=...): at")
        if not isinstance(module, CONTAINERS):
            kind = type(module).__name__
            holders = [p for p, m in model.named_modules() if isinstance(m, CONTAINERS)]
            known = f" Containers of this model: {', '.join(map(repr, holders[:8]))}." if holders else ""
            raise GrowthError(
                f"{who}(at={path!r}): {path!r} is a {kind}, not a container (Sequential, ModuleList, "
                f"ModuleDict).{known} "
                "For any other place edit the model inside `with auxin.surgery(model, optimizer):`."
            )
        first = next(known for known, m in model.named_modules() if m is module)
        return cls(first, module, tuple(module._modules))

    @classmethod
    def list_at(cls, model: nn.Module, path: str, who: str) -> Container:
        """Find one whose keys are the natural indices, or say what they are instead."""
        container = cls.at(model, path, who)
        if not container.numbered:
            raise GrowthError(
                f"{who}(at={path!r}): the children of {path!r} have names ({', '.join(container.names[:6])}), not the "
                "indices 0, 1, ...; use Insert(at, layer, key=...) for one of them."
            )
        return container

    @property
    def numbered(self) -> bool:
        """Whether the keys are the natural indices."""
        return self.names == tuple(str(i) for i in range(len(self.names))) and (
            bool(self.names) or not isinstance(self.module, nn.ModuleDict)
        )

    def child(self, index: int) -> nn.Module:
        """The block at a position."""
        child = self.module._modules[self.names[index]]
        assert child is not None
        return child

    def renumbered(self, items: list[str | New]) -> Rewire:
        """New children under natural indices."""
        return Rewire(self.path, tuple((str(i), item) for i, item in enumerate(items)))

    def named(self, items: list[str | New]) -> Rewire:
        """The same children, each under its own name."""
        return Rewire(self.path, tuple((item, item) for item in items if isinstance(item, str)))

    def aliases(self, model: nn.Module, rewire: Rewire) -> tuple[Alias, ...]:
        """Plain lists and tuples in the model that hold these very children in this order."""
        return aliases(model, rewire)


def counters(model: nn.Module, container: Container) -> list[str]:
    """Plain integer attributes of the modules above a container that equal its length: likely depth counters."""
    parts = container.path.split(".") if container.path else []
    above = [".".join(parts[:i]) for i in range(len(parts))]
    found = []
    for path in above:
        for name, value in module_at(model, path).__dict__.items():
            if type(value) is int and value == len(container.names) and not name.startswith("_"):
                found.append(join(path, name))
    return found


def beside(model: nn.Module, container: Container) -> list[str]:
    """What else may have an entry for each block: lists as long, and tensors with as many rows or one less, of the
    modules above a container and of their children.
    """
    parts, length, found = container.path.split(".") if container.path else [], len(container.names), []
    for path in (".".join(parts[:i]) for i in range(len(parts))):
        owner = module_at(model, path)
        lists = {name: m for name, m in owner._modules.items() if isinstance(m, CONTAINERS)}
        found += [join(path, n) for n, m in lists.items() if len(m._modules) == length and m is not container.module]
        for near, module in (("", owner), *owner._modules.items()):
            for name, t in {**module._parameters, **module._buffers}.items() if module is not None else ():
                if t is not None and t.dim() > 1 and t.shape[0] in (length, length - 1):
                    found.append(f"{join(join(path, near) if near else path, name)} {tuple(t.shape)}")
    return found


def passes(container: nn.Module) -> list[dict[str, nn.Module]]:
    """The children that run the very same weights, as ``Repeat`` leaves them: those of each block by name, in order."""
    found: dict[tuple[Any, ...], dict[str, nn.Module]] = {}
    for name, child in container._modules.items():
        own = () if child is None else tuple(map(id, parameters_of(modules_in(child))))
        if child is not None and own:
            found.setdefault((type(child), *own), {})[name] = child
    return [together for together in found.values() if len(together) > 1]


def replica(model: nn.Module, block: nn.Module, tied: bool = False, apart: Iterable[nn.Module] = ()) -> nn.Module:
    """A deep copy of a block that keeps sharing what the original shares with the rest of the network.

    Tied parameters stay tied, a configuration object held by every block stays one object, hooks of other objects stay
    theirs. Gradients are not copied; what is compiled is compiled in the copy too. Of a block under FSDP2 the copy is a
    plain one, of full tensors: its weights are gathered, so that every rank must call this.

    Args:
        model: the network.
        block: what is copied.
        tied: whether the copy holds the very parameters of the block.
        apart: further blocks; what is shared with these alone, the copy gets of its own.
    """
    memo = _shared(model, block)
    if tied:
        memo |= {id(p): p for p in block.parameters()}
    elif apart:
        beside = modules_beside(model, block, *apart)
        kept = {id(value) for value in (*beside, *parameters_of(beside))}
        memo = {i: v for i, v in memo.items() if i in kept or not isinstance(v, (nn.Module, nn.Parameter))}
    if any(map(is_spread, block.parameters())):
        together("a block in full", block)
        copy_plainly(block, memo)
    twin = copy_of(block, memo)
    unmark(twin)
    compile_copy(twin, block)
    inner = {id(p) for p in block.parameters()}
    for p in twin.parameters():
        if id(p) not in inner:
            p.grad = None
    return twin


def in_full(model: nn.Module, block: nn.Module, apart: Iterable[nn.Module] = ()) -> nn.Module:
    """A block in tensors that can be computed with here and now: itself, or a copy where it is spread over ranks.

    Args:
        model: the network.
        block: of it.
        apart: further blocks, with which it may share parameters.

    Raises:
        GrowthError: it is spread, and shares a parameter with the rest of the network.
    """
    spread = {id(p): p for p in block.parameters() if is_spread(p)}
    shared = {id(p) for p in parameters_of(modules_beside(model, block, *apart))} if spread else set()
    for name, p in named_parameters(model).items() if shared else ():
        if id(p) in spread and id(p) in shared:
            raise GrowthError(
                f"{name} is shared by the block that is to be copied and a module outside of it: not under FSDP2 "
                f"(fully_shard), where a copy is tried in plain tensors. {AT_A_CHECKPOINT}"
            )
    return replica(model, block, apart=apart) if spread else block


def _shared(model: nn.Module, block: nn.Module) -> dict[int, Any]:
    """Deepcopy memo: objects of the block that something outside it holds as well."""
    inside = {id(m) for m in block.modules()}
    own = {id(value): value for module in block.modules() for value in _held_by(module)}
    outside = [module for module in modules_in(model) if id(module) not in inside]
    held: list[Any] = [held for m in outside for held in (m._parameters, m._buffers, m._modules) if held]
    ids = {id(value) for one in held for value in one.values()}
    ids.update(id(m.__dict__[name]) for m in outside for name in own_names(m.__dict__))
    memo: dict[int, Any] = {i: value for i, value in own.items() if i in ids}
    for module in block.modules():
        for name in HOOKS:
            for hook in (module.__dict__.get(name) or {}).values():
                owner = hook.module() if getattr(hook, "with_module", False) else getattr(hook, "__self__", None)
                if id(owner) not in inside:
                    memo[id(hook)] = hook
    return memo


def _held_by(module: nn.Module) -> Iterator[Any]:
    """Parameters, buffers, children and attributes of a module that could be shared."""
    own = module.__dict__
    for held in (module._parameters, module._buffers, module._modules):
        for value in held.values():
            if value is not None:
                yield value
    for name in own_names(own):
        if not isinstance(own[name], PLAIN):
            yield own[name]


def hooks_on(module: nn.Module) -> str:
    """Name of the first module at or below that has forward or backward hooks of a user's, or ""."""
    for path, inner in module.named_modules():
        for name in HOOKS:
            hooks = (inner.__dict__.get(name) or {}).values()
            if "state_dict" not in name and any(h is not faded and not is_their_hook(h) for h in hooks):
                return path or type(inner).__name__
    return ""


def steps_itself(parameter: nn.Parameter) -> bool:
    """Whether a post-accumulate hook handles its gradient: it may be stepped inside the backward pass."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def hooked_from_outside(block: nn.Module) -> list[str]:
    """Paths inside a block that have hooks of a user's, which a copy shares: not torch's, ours, or its own methods."""
    inside, found = {id(module) for module in block.modules()}, []
    for path, module in block.named_modules():
        hooks = [hook for name in HOOKS for hook in (module.__dict__.get(name) or {}).values() if callable(hook)]
        shared = [hook for hook in hooks if id(getattr(hook, "__self__", None)) not in inside]
        homes = {getattr(hook, "__module__", type(hook).__module__) or "" for hook in shared}
        if any(home.partition(".")[0] not in ("torch", "auxin") for home in homes):
            found.append(path)
    return found


def shared_tensors(model: nn.Module, block: nn.Module) -> set[int]:
    """Ids of the block's parameters that something outside it holds as well: tied ones, and those of shared modules."""
    outside = {id(p) for m in modules_beside(model, block) for p in m._parameters.values() if p is not None}
    return {id(p) for p in block.parameters() if id(p) in outside}


def modules_beside(model: nn.Module, *blocks: nn.Module) -> list[nn.Module]:
    """The modules of a network that it would still have without these blocks, those included that both hold."""
    found: dict[int, nn.Module] = {}
    without, left = set(map(id, blocks)), [model]
    while left:
        module = left.pop()
        if id(module) not in without and id(module) not in found:
            found[id(module)] = module
            left += [child for child in module._modules.values() if child is not None]
    return list(found.values())


def adopt(module: nn.Module, neighbours: list[nn.Module], model: nn.Module) -> None:
    """Give a new module what those beside it have: device, dtype, train flag, frozen where the same role is frozen."""
    beside = [p for n in neighbours for p in n.parameters()] or list(model.parameters())
    floating = next((p for p in beside if p.is_floating_point()), None)
    if floating is not None:
        module.to(device=floating.device, dtype=floating.dtype)
    elif beside:
        module.to(device=beside[0].device)
    training = neighbours[0].training if neighbours else model.training
    module.train(training)
    frozen: dict[tuple[type, str, int], bool] = {}
    for neighbour in neighbours:
        for owner in awake(neighbour):  # what sleeps is frozen for a reason of its own
            for leaf, p in owner._parameters.items():
                if p is not None:
                    key = role(owner, leaf, p)
                    frozen[key] = frozen.get(key, True) and not p.requires_grad
    for owner, leaf, p in owned(module):
        if frozen.get(role(owner, leaf, p), False):
            p.requires_grad_(False)


def number(block: nn.Module, values: Mapping[tuple[str, str], int]) -> None:
    """Write positions into a block that is not anybody's yet: by (path inside, attribute)."""
    for (path, name), value in values.items():
        module_at(block, path).__dict__[name] = value


def role(owner: nn.Module, leaf: str, p: Tensor) -> tuple[type, str, int]:
    """What a parameter is to its module: its class (each parametrized module has one of its own), leaf, dimensions."""
    kind = type_before_parametrizations(owner) if "parametrizations" in owner._modules else type(owner)
    return nn.Linear if kind is ResidualLinear else kind, leaf, p.dim()


def owned(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(owner, leaf name, parameter) of every parameter below ``module``."""
    modules = named_modules(module).values()
    return ((owner, leaf, p) for owner in modules for leaf, p in owner._parameters.items() if p is not None)


def shape_of(value: Any) -> str:
    """Shape of a tensor in words, for messages."""
    return f"({', '.join(map(str, value.shape))})" if isinstance(value, Tensor) else type(value).__name__
