"""``grow`` carries out one edit as one transaction: the edit plans, every follower checks, the network changes, every
companion changes, and the result is proved. Where any of this fails, nothing has happened at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from auxin import agreed, fsdp2, sharded, typed
from auxin.anatomy.hugging_face.stock import ACCEPT, check_stock, is_stock
from auxin.anatomy.masks import UNSEEN, masked, order_lost, reaching
from auxin.anatomy.probe import PlanContext, Probe
from auxin.anatomy.tree import unwrap
from auxin.anatomy.wrappers import at_rest, with_wrappers
from auxin.change import Change, Edit, Grouping, Measured
from auxin.companion import registration_of
from auxin.dynamo import eagerly, guards_are_off
from auxin.edits.several import as_edit, joined, steps, told_which
from auxin.errors import BadMoment, GrowthError
from auxin.follow.adapters import follow_adapters
from auxin.follow.compiled import counting, follow_compiled
from auxin.follow.ddp import take_hold_again
from auxin.follow.fsdp import check_edit, shard
from auxin.follow.own_groups import optimizers_in, placed
from auxin.follow.second_tree import follow_views
from auxin.listing import lines_of, named_parameters
from auxin.proof import Baseline, baseline_of, prove, spoiled_by_probe
from auxin.proof_of_averages import Average, averaged, prove_averages
from auxin.ramp import start
from auxin.randomness import random_state
from auxin.ranks import Ranks, together
from auxin.record import coming_back
from auxin.safe_point import StepWatch, why_not_now
from auxin.structure import Undo, apply, check_swaps, undo
from auxin.verify import verify_here


def grow(
    model: nn.Module,
    edit: Edit | Sequence[Edit],
    *companions: Any,
    probe: Probe = None,
    evidence: Any = None,
    seed: int | None = None,
    group: Grouping = None,
    rewarm: int = 0,
    stock: bool = True,
    dry_run: bool = False,
) -> Change:
    """Carry out one edit, or several as one, with everything that hangs on the network kept in step.

    Args:
        model: the network; it is changed in place and stays the same object.
        edit: what and where, e.g. ``Duplicate("blocks", by=1)``; or a list of edits, each planned on what the one
            before it left: all of them or none, proved once, one change and one entry of a journal.
        companions: optimizers, schedulers, averages, scalers that keep step.
        probe: one batch (a tensor, a tuple of arguments, a dict of keywords) or a callable that returns one; every
            growth is proved on it.
        evidence: a loss and batches, for edits that look at data.
        seed: of the new weights; None: derived from the edit and the structure, so equal in every process.
        group: of all new parameters. None: beside the nearest sibling of the same role. An index: that group. A dict
            of options: a new group of the same optimizer, which copies all other options of the group that they would
            have joined (one for each such group). Its ``lr`` is what one would have written when building the
            optimizer; the schedulers given move it as they move the donor's.
        rewarm: optimizer steps over which the updates of the new parameters grow to their full size; what was there
            already trains on as before.
        stock: a Hugging Face model stays one that plain transformers loads, or the edit is refused. A model that its
            configuration does not build already (adapters, a head of your own) is let through.
        dry_run: do all of it, prove it, and take it back.

    Returns:
        The change; ``print(change)`` is one line.

    Raises:
        GrowthError: refused or not proved; the model, the companions and the random generators are as they were.

    Examples:
        >>> import functools, torch
        >>> from torch import nn
        >>> from auxin import Insert
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> change = grow(net, Insert("", functools.partial(nn.Linear, 4, 4), index=2), probe=torch.randn(8, 4))
        >>> len(net)
        4
    """
    return transact(model, edit, companions, Options(probe, evidence, seed, group, rewarm, stock, dry_run))


@dataclasses.dataclass(frozen=True)
class Options:
    """How an edit is carried out: the arguments of ``grow``, and five that only a Grower has.

    Attributes:
        standing: whether ``group`` is for whatever grows; then it is left out where nothing is new as a whole.
        watch: knows which gradients an optimizer step has used.
        memory: of block kinds, see ``PlanContext``.
        accept: gets the last word on the proved change; raises to refuse it.
        keep: is given the way back once the change is kept for good, see ``transaction``.
    """

    probe: Probe = None
    evidence: Any = None
    seed: int | None = None
    group: Grouping = None
    rewarm: int = 0
    stock: bool = True
    dry_run: bool = False
    standing: bool = False
    watch: StepWatch | None = None
    accept: Callable[[Change], None] | None = None
    keep: Callable[[Undo], None] | None = None
    memory: dict[str, Mapping[str, float] | None] | None = None


def transact(model: nn.Module, edit: Edit | Sequence[Edit], companions: Sequence[Any], options: Options) -> Change:
    """``grow`` with ``options``."""
    with contextlib.ExitStack() as held:
        change = begin(model, edit, companions, options, held)
        if options.dry_run:
            take_back(held)
        return change


def begin(
    model: nn.Module, edit: Any, companions: Sequence[Any], options: Options, held: contextlib.ExitStack
) -> Change:
    """Grow, the transaction left open in ``held``: ``close()`` keeps it, an exception or ``take_back`` undoes it."""
    started = time.perf_counter()
    edit = as_edit(edit)
    companions = with_wrappers(model, companions)
    model, ranks = unwrap(model), Ranks.of(companions)
    # Every process checks what it was asked for, and all of them were asked for the same.
    with ranks.agree("grow") as said:
        seed = _asked(model, edit, companions, options)
        if not ranks.alone:
            said += [*agreed.question(edit, seed, options), *agreed.structure(model, optimizers_in(companions))]
    with random_state(), eagerly(), _uncollected():
        context = PlanContext(model, options.probe, seed, evidence=options.evidence, memory=options.memory)
        if context.has_probe and fsdp2.units(model):
            with ranks.agree("grow: the probe") as said:
                said += agreed.batch(context.batch)
        before: Baseline | None = None
        averages: list[Average] = []
        mask, order = masked(context.network.modules) if context.has_probe else "", None
        stock = options.stock and is_stock(model)
        made: list[Change] = []
        edits = steps(edit, seed)
        # Each edit is planned on the network that the one before it has left, and carried out. Transactions stay open.
        for (one, seed_of_one), way in zip(edits, ways_back(options.keep, len(edits)), strict=True):
            with ranks.agree("grow: the plan") as said:
                own = context if not made else context.seeded(seed_of_one)
                with told_which(edit, len(made)):
                    change = _planned(model, one, own)
                if not made and context.has_probe:  # after the plan, whose forward serves for it too
                    before = baseline_of(context)
                    order = reaching(context) if mask and not fsdp2.units(model) else None
                if not made:
                    averages = averaged(context, companions, change, whole=len(edits) == 1)
                said += [] if ranks.alone else agreed.plan(change)
            share_values(ranks, change, companions)
            with ranks.agree("grow: the change"):
                change = shard(model, change)
                group = options.group if change.starting or not options.standing else None
                going = transaction(model, change, companions, group, keep=way, rewarm=options.rewarm)
                made.append(held.enter_context(going))
        with ranks.agree("grow: the proof"):
            change = joined(model, edit, seed, made)
            change = _proved(model, change, context, before, companions, stock)
            change = prove_averages(averages, change, context)
            if mask:
                change = _in_order(change, context, mask, order)
            if stock:
                check_stock(model, change, context)
            change = change.with_measured(seconds=time.perf_counter() - started)
            if options.accept is not None:
                options.accept(change)
        return change


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Let the garbage collector wait inside: it would look through all that is recorded of a network, for nothing."""
    with coming_back(gc.enable) if gc.isenabled() else contextlib.nullcontext():
        gc.disable()
        yield


def _asked(model: nn.Module, edit: Edit, companions: Sequence[Any], options: Options) -> int:
    """Check what was asked for and that the network may be changed now; return the seed of the new weights."""
    if not isinstance(edit, Edit):
        raise GrowthError(
            f"edit is a {type(edit).__name__}; pass an edit such as Duplicate('blocks') or Insert('net', layer)."
        )
    written_down(edit)
    check_moment(model, companions, options.watch)
    for one in getattr(edit, "edits", (edit,)):
        check_edit(model, one)
    verify_here(model, *companions)
    if type(options.rewarm) is not int or options.rewarm < 0:
        raise GrowthError(f"rewarm={options.rewarm!r}: pass a number of optimizer steps, 0 for none.")
    return seed_of(model, edit) if options.seed is None else options.seed


def share_values(ranks: Ranks, change: Change, companions: Sequence[Any]) -> None:
    """Let every rank start from the new values of rank 0; buffers too where DDP keeps them alike."""
    if not ranks.alone:
        buffers = all(getattr(c, "forward_sync_buffers", True) for c in companions)
        ranks.broadcast(agreed.new_tensors(change, buffers))


def _planned(model: nn.Module, edit: Edit, context: PlanContext) -> Change:
    """Let the edit plan; whatever it raises becomes a GrowthError that says what the user can do."""
    try:
        return edit.plan(model, context)
    except Exception as error:  # a user's modules and a user's own edit may raise anything
        if context.has_probe:
            # If the network does not run on the probe at all, or is spoiled by it, this says so.
            if why := spoiled_by_probe(context):
                raise GrowthError(f"{type(edit).__name__}: {why}. What it was refused for there: {error}") from error
        if isinstance(error, GrowthError):
            raise
        raise GrowthError(
            f"{edit!r} could not be planned ({type(error).__name__}: {error}). Nothing was touched."
        ) from error


class TakeBack(Exception):
    """Ends a transaction that is not to be kept, without an error."""


def take_back(held: contextlib.ExitStack) -> None:
    """Undo a transaction that is still open.

    Raises:
        GrowthError: a companion has failed on the way, so that not all of it is undone.
    """
    error = TakeBack()
    held.pop_all().__exit__(TakeBack, error, error.__traceback__)
    _check_taken_back(error)


def _check_taken_back(error: TakeBack) -> None:
    for note in getattr(error, "__notes__", ()):
        raise GrowthError(f"a companion could not go back to before a growth: {note}")


def written_down(edit: Edit) -> None:
    """Check that a journal could hold the edit: a dataclass of plain data and importable classes.

    Raises:
        GrowthError: names the field and what to write instead.
    """
    if not dataclasses.is_dataclass(edit):
        raise GrowthError(
            f"{type(edit).__name__} is not a dataclass, so a journal could not hold it; make it a frozen one."
        )
    for field in dataclasses.fields(edit):
        typed.encode(getattr(edit, field.name), f"{type(edit).__name__}.{field.name}")


@contextlib.contextmanager
def transaction(
    model: nn.Module,
    change: Change,
    companions: Sequence[Any],
    group: Grouping = None,
    applied: list[Undo] | None = None,
    keep: Callable[[Undo], None] | None = None,
    rewarm: int = 0,
) -> Iterator[Change]:
    """Let every follower check, change the network, let every follower change its companion, and wait for the proof.

    Whatever is raised inside takes all of it back.

    Args:
        model: the network, unwrapped.
        change: the plan.
        companions: everything that keeps step.
        group: as in ``grow``.
        applied: what takes the change to the network back, where it has been made already (surgery).
        keep: is given a call that takes all of it back, once, at any later time: network and companions get their
            structure, groups, shapes and the states of what was resized or removed. Other values stay as they are.
        rewarm: as in ``grow``.
    """
    if applied is None:
        check_swaps(model, change)
    placement, compiling = placed(model, change, companions, group, rewarm), counting(change)
    change = dataclasses.replace(change, placement=placement, measured=Measured(compiling=compiling))
    own = (follow_compiled(model, change), follow_views(change), follow_adapters(model, change))
    running: list[tuple[Any, Iterator[None]]] = [(model, follower) for follower in own]
    running += [(c, registration_of(c).follower(c, change)) for c in companions]
    undos: list[Undo] = [] if applied is None else applied
    try:
        for _, follower in running:
            next(follower)
        together(
            "what keeps step has checked", model
        )  # ranks of a sharded network send each other tensors from here on
        if applied is None:
            apply(model, change, undos=undos)
        for companion, follower in running:
            together("what keeps step changes", model)
            try:
                next(follower)
            except StopIteration:
                raise GrowthError(
                    f"the follower of {type(companion).__name__} ended after its first yield; it must yield a second "
                    "time, after its changes, so that they can be taken back."
                ) from None
        start(change, (model, *companions), undos)
        yield change
        _settle(running, undos, keep)
    except GeneratorExit:  # whoever held the transaction open has let go of it: the change is kept, as if it was closed
        _settle(running, undos, keep)
        raise
    except BaseException as error:
        _throw([f for _, f in running], error)
        undo(undos)
        if any(swap.resized for swap in change.swaps):
            take_hold_again(companions)  # autograd has let go of what a reducer had hooked to a tensor of another shape
        raise


def ways_back(keep: Callable[[Undo], None] | None, count: int) -> list[Callable[[Undo], None] | None]:
    """What each of ``count`` transactions of one growth is given, so that ``keep`` gets one way back over them all."""
    ways: dict[int, Undo] = {}

    def back() -> None:
        for number in reversed(range(count)):
            ways[number]()

    def take(number: int, way: Undo) -> None:
        ways[number] = way
        if keep is not None and len(ways) == count:
            keep(back)

    return [None if keep is None else functools.partial(take, number) for number in range(count)]


def _settle(
    running: Sequence[tuple[Any, Iterator[None]]], undos: list[Undo], keep: Callable[[Undo], None] | None
) -> None:
    """Let the followers end, but for those that a later way back needs: these stay where they are."""
    waiting = [f for c, f in running if keep is not None and not isinstance(c, DistributedDataParallel)]
    ending = [f for _, f in running if not any(f is one for one in waiting)]
    # This loop runs in C, so that an interrupt comes before all of it or after all of it: a follower that has gone on
    # cannot take its change back any more.
    list(map(next, ending, itertools.repeat(None)))
    if keep is not None:
        keep(functools.partial(_go_back, waiting, undos))


def _go_back(followers: list[Iterator[None]], undos: list[Undo]) -> None:
    """Take back a change that was kept; whoever asks for it builds the reducers of DistributedDataParallel again."""
    error = TakeBack()
    _throw(followers, error)
    undo(undos)
    _check_taken_back(error)


def _throw(followers: list[Any], error: BaseException) -> None:
    """Let every follower take its change back, the last one first."""
    for follower in reversed(followers):
        try:
            follower.throw(TakeBack())
        except (TakeBack, StopIteration):
            continue
        except Exception as raised:  # this follower has a bug of its own; the others must still take back
            error.add_note(f"while taking back: {raised!r}")


def _in_order(change: Change, context: PlanContext, mask: str, before: Tensor | None) -> Change:
    """Check that a growth of a masked network lets no input through to an output that did not reach it before."""
    lost = order_lost(context, before, change.starting, change.gates)
    if lost:
        raise GrowthError(
            f"{', '.join(path for path, _ in change.added) or change.edit}: {mask} masks its weight, and "
            "with the growth outputs would come to depend on inputs that the masks keep from them (the order of an "
            "autoregressive network would be lost). Name a layer that is masked as those beside it, "
            "layer=functools.partial(YourMaskedLayer, ...), or copy whole blocks: Duplicate."
        )
    return change if lost is not None else change.with_measured(UNSEEN.format(mask))


def check_moment(model: nn.Module, companions: Sequence[Any], watch: StepWatch | None) -> None:
    """Raise BadMoment where the network must not be changed now."""
    at_rest(model, companions)
    scalers = [c for c in companions if hasattr(c, "_per_optimizer_states")]
    reason = sharded.why_not_now(model) or why_not_now(model, scalers, watch)
    if reason is None and guards_are_off():
        reason = (
            "torch.compiler.set_stance(skip_guard_eval_unsafe=True) keeps compiled code from seeing a growth; grow "
            "outside of it, and run the grown network once before it is set again"
        )
    if reason is not None:
        raise BadMoment(f"not now: {reason}.")


def seed_of(model: nn.Module, edit: Edit | None) -> int:
    """Derive a seed from the edit and the structure; it is equal in every process that holds the same network."""
    text = [repr(edit), *lines_of(named_parameters(model).items())]
    return int.from_bytes(hashlib.sha256("\n".join(text).encode()).digest()[:6], "big")


def _proved(
    model: nn.Module,
    change: Change,
    context: PlanContext,
    before: Baseline | None,
    companions: Sequence[Any],
    stock: bool,
) -> Change:
    """Check the grown network on the probe, and that nothing around it was lost."""
    verify_here(model, *companions)
    if before is None:
        return change
    try:
        return prove(model, change, context, before)
    except GrowthError as error:
        if stock and not change.gates:  # perhaps its configuration does not allow the growth, which explains more
            try:
                check_stock(model, change, PlanContext(model))
            except GrowthError as why:
                raise GrowthError(f"{error} {str(why).removesuffix(ACCEPT).rstrip()}") from error
        raise
