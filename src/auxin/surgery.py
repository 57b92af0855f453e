"""``surgery``: whatever a user's own code adds, replaces, resizes or removes, found by identity and kept in step."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from auxin import agreed
from auxin.anatomy.blocks import CONTAINERS, PLAIN, hooks_on
from auxin.anatomy.masks import UNSEEN, masked, order_lost, reaching
from auxin.anatomy.numbering import repeated
from auxin.anatomy.origins import origins
from auxin.anatomy.probe import PlanContext, Probe
from auxin.anatomy.tree import moves_between, taken_over, unwrap
from auxin.anatomy.wrappers import with_wrappers
from auxin.change import MISSING, Alias, Assign, Before, Change, Continued, Grouping, New, Rewire, Swap
from auxin.edits.surgery import describe
from auxin.engine import check_moment, seed_of, share_values, transaction
from auxin.errors import GrowthError
from auxin.follow.ddp import take_hold_again
from auxin.follow.fsdp import shard
from auxin.follow.own_groups import optimizers_in
from auxin.fsdp2 import units
from auxin.listing import join, named_modules
from auxin.proof import baseline_of, distance, outputs_of, prove, tolerance
from auxin.proof_of_averages import averaged, prove_averages
from auxin.randomness import random_state
from auxin.ranks import Ranks
from auxin.record import Record, Sight
from auxin.safe_point import StepWatch
from auxin.sharded import settle
from auxin.structure import Undo, forget_shape, noted
from auxin.surgery_of_shards import alike_on_ranks, followed_by, put_before
from auxin.verify import verify_here

OWN = {"_parameters", "_buffers", "_modules", "training"}


class surgery:
    """Context manager: edit the network inside by any code; on leaving, everything that hangs on it is kept in step.

    What was added, replaced, resized, removed or unfrozen is found by identity and shape. If anything fails, inside
    or on leaving, network, companions and random generators are as before, and an exception of your own passes on
    unchanged. Random numbers drawn inside come from a fork, so data order does not move. Costs one copy of the
    network's tensors while the block runs.

    Args:
        model: the network.
        companions: optimizers, schedulers, averages, scalers that keep step.
        group: of all new parameters: None, an index, or a dict of options for groups of their own; see ``auxin.grow``.
        probe: one batch; if given, the new modules must be called on it and a gradient must reach them.

    Attributes:
        change: what was found, after the block.

    Raises:
        GrowthError: on entering at a bad moment; on leaving where something cannot be followed.

    Examples:
        >>> net = nn.Sequential(nn.Linear(10, 20), nn.ReLU())
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> with surgery(net, optimizer) as done:
        ...     _ = net.append(nn.Linear(20, 30))
        >>> len(optimizer.param_groups[0]["params"]), done.change.added[0][0]
        (4, '2')
    """

    def __init__(
        self,
        model: nn.Module,
        *companions: Any,
        group: Grouping = None,
        probe: Probe = None,
        watch: StepWatch | None = None,
        then: Callable[[Change], None] | None = None,
        around: contextlib.AbstractContextManager[Any] | None = None,
        keep: Callable[[Undo], None] | None = None,
        standing: bool = False,
    ):
        self.model, self.companions = unwrap(model), with_wrappers(model, companions)
        self._sharded = bool(units(self.model))
        self.group, self.probe, self.watch = group, probe, watch
        self._standing = standing  # ``group`` is for whatever grows, not asked for this once
        self._ranks = Ranks.of(self.companions)
        self._then, self._around, self._keep = then, around or contextlib.nullcontext(), keep
        self.change: Change | None = None

    def __enter__(self) -> surgery:
        with self._ranks.agree("surgery") as said:
            check_moment(self.model, self.companions, self.watch)
            verify_here(self.model, *self.companions)
            self._seed = seed_of(self.model, None)
            self._context = PlanContext(self.model, self.probe, self._seed)
            self._baseline = baseline_of(self._context) if self._context.has_probe else None
            self._averages = averaged(self._context, self.companions) if self._context.has_probe else []
            said += [] if self._ranks.alone else agreed.structure(self.model, optimizers_in(self.companions))
            self._mask = masked(named_modules(self.model))
            looks = self._mask and self._context.has_probe and not self._sharded
            self._order = reaching(self._context) if looks else None
        self._before = Before.of(self.model)
        self._started = time.perf_counter()
        self._operation = self._operate()
        return self._operation.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._operation.__exit__(kind, error, trace)
        except BaseException:
            self._operation.gen.close()
            raise

    @contextlib.contextmanager
    def _operate(self) -> Iterator[surgery]:
        """What is raised inside, or while it is followed, takes all of it back."""
        tree = Record(self.model, values=True)
        companions = Sight(self.companions, known=tree.tensors)
        companions.keep()
        self._differences = noted(self.model) if self._keep is not None else list
        change: Change | None = None
        with self._around:
            try:
                with contextlib.ExitStack() as held:
                    with random_state(self._seed):
                        with self._ranks.agree("surgery: what was changed") as said:
                            yield self
                            notes = alike_on_ranks(self.model, tree, self._ranks) if self._sharded else ()
                            change = found(self.model, tree, self._before, self._seed, self._unchanged, notes)
                            said += [] if self._ranks.alone else agreed.plan(change)
                        _settle_modes(change, tree)
                        if not self._sharded:
                            share_values(self._ranks, change, self.companions)
                        with self._ranks.agree("surgery: the proof"):
                            self.change = self._follow(change, held, tree)
                    if self._then is not None:
                        self._then(self.change)
            except BaseException:
                self.change = None
                tree.restore()
                settle(self.model)
                companions.restore()  # what the code has added to, taken from or written into companions itself
                if change is not None and any(swap.resized for swap in change.swaps):
                    take_hold_again(self.companions)
                raise

    def _unchanged(self) -> bool:
        """Whether the network does on the probe what it did before."""
        if self._baseline is None:
            return False
        now = outputs_of(self._context.seeded(self._seed))  # a context remembers what it has seen
        return distance(self._baseline.outputs, now) <= tolerance(self._baseline.outputs)

    def _follow(self, change: Change, held: contextlib.ExitStack, tree: Record) -> Change:
        _refuse_repeated_numbers(change)
        edit = describe(change)
        for swap in change.swaps:
            if swap.resized and swap.value is not None:
                if swap.value.is_leaf:
                    swap.value.grad = None  # of the old shape, or of other entries: a step has used it
                forget_shape(swap.value)
        undos, keep = self._differences(), self._keep
        if self._sharded:  # new modules are sharded before they stand in the network
            put_before(change, tree)
            change = shard(self.model, change)
            undos, keep = None, keep and followed_by(keep, undos)
        group = self.group if change.starting or not self._standing else None
        change = held.enter_context(transaction(self.model, change, self.companions, group, undos, keep))
        verify_here(self.model, *self.companions)
        if self._baseline is not None:
            change = prove(self.model, change, self._context, self._baseline)
            if change.max_difference is not None and change.max_difference <= tolerance(self._baseline.outputs):
                change = prove_averages(self._averages, change, self._context)
        if self._mask:
            change = self._in_order(change)
        change = dataclasses.replace(change, edit=edit)
        return change.with_measured(seconds=time.perf_counter() - self._started)

    def _in_order(self, change: Change) -> Change:
        """Say so where inputs reach outputs from which masks kept them, or where nobody has looked."""
        if self._baseline is None:
            told = "without a probe nothing tells whether the masks still keep apart what they did"
            return change.with_measured(f"{self._mask} masks its weight; {told}")
        moved = {*change.starting, *(m.name for m in change.moves if m.continues and m.name is not None)}
        lost = order_lost(self._context, self._order, moved)
        if lost is None:
            return change.with_measured(UNSEEN.format(self._mask))
        if not lost:
            return change
        note = (
            f"{self._mask} masks its weight, and now outputs depend on inputs that the masks kept from them (the order "
            "of an autoregressive network is lost)"
        )
        mend = "Unless that is meant, put in layers that are masked as those beside them."
        warnings.warn(f"surgery: {note}. {mend}", stacklevel=6)
        return change.with_measured(note)


def found(
    model: nn.Module,
    tree: Record,
    before: Before,
    seed: int,
    unchanged: Callable[[], bool] = lambda: False,
    remarks: Sequence[str] = (),
) -> Change:
    """What differs between the network now and its record, as a change.

    Args:
        model: as it is now.
        tree: as it was, with values.
        before: as it was, by name.
        seed: of the surgery.
        unchanged: whether the outputs on the probe are what they were; asked where tensors were rescaled or copied.
        remarks: what else is to be said of it.

    Raises:
        GrowthError: a plain list beside a container was left behind, so its new layers would not run.
    """
    now, come = {id(m) for m in model.modules()}, origins(model, tree)
    rescaled, unshared = come.rescaled(), come.unshared()
    kept = bool(rescaled or unshared) and unchanged()
    if rescaled:
        come.with_gradients(rescaled, kept)
    if not kept:
        come.without_shares(unshared)
    rewires, swaps, assigns = [], [], []
    for path, module in tree.modules.items():
        if id(module) not in now:
            continue
        rewire = _children(path, module, tree, come.continued)
        if rewire is not None:
            rewires.append(rewire)
        swaps += _tensors(path, module, tree, come.continued)
        _keep_hooks(path, module, tree, model)
        was = tree.classes[path]
        if type(module) is not was:
            raise GrowthError(
                f"surgery: {path or 'the model'} was a {was.__name__} and is a {type(module).__name__} now (a "
                "parametrization?), which neither an average nor a journal could repeat. Do it where the network is "
                "built."
            )
        assigns += _attributes(path, module, tree)
    assigns += _settings(tree)
    _refuse_strays(model, tree)
    _refuse_lost_hooks(model, tree)
    after = dict(model.named_parameters())
    unfrozen = {id(p) for p in after.values() if p.requires_grad and not tree.requires_grad.get(id(p), True)}
    moves = moves_between(before.parameters, after, before.shapes, touched=unfrozen, swaps=swaps)
    return Change(
        edit=None,
        seed=seed,
        rewires=tuple(rewires),
        aliases=_followed_lists(model, tree, rewires),
        assigns=tuple(assigns),
        swaps=tuple(swaps),
        trains={
            n: p.requires_grad for n, p in before.parameters.items() if tree.requires_grad[id(p)] != p.requires_grad
        },
        moves=taken_over(moves, come.continued),
        before=before,
        after=after,
        outputs=True,
        how="surgery",
        remarks=(*_untied(model, tree), *come.notes, *remarks),
    )


def _untied(model: nn.Module, tree: Record) -> Iterator[str]:
    """Names that held one tensor together and do not any more."""
    ties: dict[int, list[tuple[str, Tensor | None]]] = {}
    for path, module in tree.modules.items():
        for name, before in tree.inner(path, "_parameters"):
            if before is not None:
                ties.setdefault(id(before), []).append((join(path, name), module._parameters.get(name)))
    reachable = {id(p) for p in model.parameters()}
    for held in ties.values():
        now = [(name, p) for name, p in held if p is not None and id(p) in reachable]
        if len({id(p) for _, p in now}) > 1:
            yield f"{' and '.join(name for name, _ in now)} are no longer tied"


def _children(path: str, module: nn.Module, tree: Record, known: Mapping[int, Continued]) -> Rewire | None:
    old = tree.inner(path, "_modules")
    new = list(module._modules.items())
    if len(old) == len(new) and all(a[0] == b[0] and a[1] is b[1] for a, b in zip(old, new, strict=True)):
        return None
    names = {id(child): name for name, child in reversed(old) if child is not None}
    children = ((n, None if c is None else names[id(c)] if id(c) in names else _new(c, known)) for n, c in new)
    return Rewire(path, tuple(children))


def _new(module: nn.Module, known: Mapping[int, Continued]) -> New:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return New(module, continues={name: known[id(t)] for name, t in tensors if id(t) in known})


def _tensors(path: str, module: nn.Module, tree: Record, known: Mapping[int, Continued]) -> list[Swap]:
    swaps = []
    for kind, held in (("_parameters", module._parameters), ("_buffers", module._buffers)):
        old = dict(tree.inner(path, kind))
        for name, value in held.items():
            before, here = old.get(name), known.get(id(value))
            if value is None or (value is before and here is None and tree.shapes[id(value)] == value.shape):
                continue
            axes = None if here is None else here.axes
            swaps.append(Swap(path, name, value, axes, buffer=kind == "_buffers", resized=value is before))
        gone = [name for name, value in old.items() if value is not None and held.get(name) is None]
        swaps += [Swap(path, name, None, None, buffer=kind == "_buffers") for name in gone]
    return swaps


def _keep_hooks(path: str, module: nn.Module, tree: Record, model: nn.Module) -> None:
    """Refuse a parameter that took the place of one with tensor hooks: they would never fire again."""
    for name, before in tree.inner(path, "_parameters"):
        value = module._parameters.get(name)
        if before is None or value is None or value is before or any(p is before for p in model.parameters()):
            continue
        if before._backward_hooks or getattr(before, "_post_accumulate_grad_hooks", None):
            where = join(path, name)
            raise GrowthError(
                f"surgery: {where} is a new Parameter, and the hook registered on the old one would never fire again. "
                f"Keep the object: model.{where}.data = tensor. Or remove the hook, and register it on the new one."
            )


def _refuse_lost_hooks(model: nn.Module, tree: Record) -> None:
    """Refuse a module that took the place of one with hooks, unless it has some too: they would never fire again."""
    now = dict(model.named_modules())
    reachable = {id(m) for m in now.values()}
    for path, module in tree.modules.items():
        if path in now and id(module) not in reachable and hooks_on(module) and not hooks_on(now[path]):
            raise GrowthError(
                f"surgery: {path} was replaced, and the hooks registered on the old module would never fire again. "
                "Register them on the new one inside the block, or remove them first (handle.remove())."
            )


def _attributes(path: str, module: nn.Module, tree: Record) -> list[Assign]:
    """Plain attributes that changed (sizes, names, flags); anything else is the live model's own affair."""
    old, assigns = tree.attributes[path], []
    for name, value in module.__dict__.items():
        before = old.get(name, MISSING)
        if name in OWN or value is before or not _is_plain(value):
            continue
        if before is MISSING or not _is_plain(before) or before != value:
            assigns.append(Assign(path, name, before, value))
    gone = [name for name, value in old.items() if name not in module.__dict__ and _is_plain(value)]
    return assigns + [Assign(path, name, old[name], MISSING) for name in gone]


def _settings(tree: Record) -> list[Assign]:
    """Plain values that changed in objects which modules refer to: ``config.vocab_size``."""
    assigns = []
    for (path, through), own, content in tree.objects:
        old = dict(content)
        for name, value in own.items():
            before = old.get(name, MISSING)
            if value is before or not _is_plain(value) or not (before is MISSING or _is_plain(before)):
                continue
            if before is MISSING or before != value:
                assigns.append(Assign(path, f"{through}.{name}", before, value))
    return assigns


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, torch.Size)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (*PLAIN, torch.dtype, torch.device))


def _followed_lists(model: nn.Module, tree: Record, rewires: list[Rewire]) -> tuple[Alias, ...]:
    """Plain lists that held the children of a rewired container, and hold its new ones now."""
    aliases = []
    for rewire in rewires:
        container = tree.modules[rewire.path]
        if not isinstance(container, CONTAINERS):
            continue
        old = [child for _, child in tree.inner(rewire.path, "_modules")]
        new = list(container._modules.values())
        for path, module in tree.modules.items():
            for name, value in module.__dict__.items():
                if type(value) not in (list, tuple) or not old:
                    continue
                if [id(c) for c in _recorded(tree, path, name)] != [id(c) for c in old]:
                    continue
                if [id(c) for c in value] != [id(c) for c in new]:
                    raise GrowthError(
                        f"surgery: {join(path, name)} is a plain {type(value).__name__} of the blocks in "
                        f"{rewire.path!r}, which was changed without it; a forward that iterates over {name} would "
                        "never run the new layer. Change both: "
                        f"e.g. model.{join(path, name)} = {type(value).__name__}(model.{rewire.path})."
                    )
                aliases.append(Alias(path, name, rewire))
    return tuple(aliases)


def _recorded(tree: Record, path: str, name: str) -> Sequence[Any]:
    """What a plain list or tuple held before."""
    value = tree.attributes[path].get(name)
    return tree.inner(path, name) if isinstance(value, list) else value if isinstance(value, tuple) else ()


def _refuse_strays(model: nn.Module, tree: Record) -> None:
    """Refuse a new module that stands in a plain list only: it would run, and no optimizer could train it."""
    registered = {id(m) for m in model.modules()}
    for path, module in tree.modules.items():
        for name, value in module.__dict__.items():
            if type(value) not in (list, tuple):
                continue
            known = {id(item) for item in _recorded(tree, path, name)}
            for item in value:
                if isinstance(item, nn.Module) and id(item) not in registered | known:
                    raise GrowthError(
                        f"surgery: {join(path, name)} holds a {type(item).__name__} that is not part of the network: "
                        f"a plain {type(value).__name__} registers nothing, so it would never train, move or be saved. "
                        "Add it to an nn.ModuleList as well."
                    )


def _refuse_repeated_numbers(change: Change) -> None:
    """Refuse a copied block that still says the position of the one that it copies."""
    for rewire in change.rewires:
        container = change.before.modules[rewire.path]
        new = {name for name, child in rewire.children if isinstance(child, New)}
        found = repeated(container, new) if isinstance(container, CONTAINERS) and new else ""
        if found:
            raise GrowthError(
                f"surgery: {join(rewire.path, found)}. A cache for generating is kept by such numbers, and two of one "
                "number mix it up. Give each block its position, or let Duplicate do it."
            )


def _settle_modes(change: Change, tree: Record) -> None:
    """New modules take the train flag that all old ones agree on."""
    modes = {own["training"] for own in tree.attributes.values()}
    if len(modes) == 1:
        for _, new in change.added:
            new.module.train(next(iter(modes)))
