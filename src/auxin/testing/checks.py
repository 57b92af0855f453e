"""The conformance checks on the run that has just grown, one function each: what must hold of every growth."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from auxin.anatomy.probe import PlanContext, tensors_in
from auxin.anatomy.rounding import EPSILONS
from auxin.anatomy.wrappers import networks_of
from auxin.change import Change, Edit, Grouping
from auxin.listing import join, module_at
from auxin.randomness import random_state
from auxin.testing.before import Before, Facts, changed_by, counts_of, hooks_of, name_after, state_of
from auxin.testing.exact import digest, exact
from auxin.testing.run import Options, Recipe, Run

GRADIENT_STEPS = 3
Homes = dict[int, list[tuple[int, int]]]  # by id of a parameter: optimizer and group


@dataclasses.dataclass
class Grown:
    """A run that has grown, beside what was recorded before, and what the checks find out.

    Attributes:
        recipe: how to set such a run up.
        edit, group: as the user passed them.
        run: the run that has grown.
        before: the record of it.
        change: what ``grow`` returned.
        ungrown: a copy of the network right before the growth.
        moved: whether a global random generator has moved.
        figures: measured differences, by name.
        notes: what could not be checked, and why.
    """

    recipe: Recipe
    edit: Any
    group: Grouping
    run: Run
    before: Before
    change: Change
    ungrown: nn.Module
    moved: bool
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        old = {id(p) for p in self.before.parameters.values()}
        starting = set(self.change.starting)
        self.born = {n: p for n, p in self.run.model.named_parameters() if id(p) not in old or n in starting}
        self.born_bits = {n: digest(p) for n, p in self.born.items()}
        self.changed = changed_by(self.change)


def fail(check: str, text: str) -> NoReturn:
    """Raise the one error of this package: which check, and what was found."""
    raise AssertionError(f"auxin.testing.check: {check}: {text}")


def randomness(grown: Grown) -> None:
    """Global random generators where they were."""
    if grown.moved:
        fail("random", "the growth has moved a global random generator: data order and dropout masks would change")


def old_tensors(grown: Grown) -> None:
    """Old parameters and buffers: the same objects, to the bit, under the names that the change says."""
    model = grown.run.model
    now = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    for name, (tensor, bits, trains) in grown.before.tensors.items():
        if name in grown.changed:
            continue
        if id(tensor) not in now:
            fail("old tensors", f"{name} is another Python object now; whoever holds the old one has lost it")
        if isinstance(grown.edit, Edit) and now[id(tensor)] != name_after(name, grown.change):
            fail("old tensors", f"{name} stands at {now[id(tensor)]}, not where the change says")
        if digest(tensor) != bits:
            fail("old tensors", f"the values of {name} have changed")
        if tensor.requires_grad != trains:
            fail("old tensors", f"requires_grad of {name} has become {tensor.requires_grad}")
    gained = {id(module_at(model, path)) for path in grown.change.gates}  # a hook of ours, as the change says
    gained |= {id(grown.before.modules[rewire.path][0]) for rewire in grown.change.rewires if rewire.hook is not None}
    for path, (module, training, hooks) in grown.before.modules.items():
        if module.training != training:
            fail("old tensors", f"the train flag of {path or 'the network'} has changed")
        if id(module) not in gained and hooks.differences(exact(hooks_of(module))):
            fail("old tensors", f"the hooks of {path or 'the network'} have changed")


def inherited(grown: Grown) -> None:
    """New modules have the train flag, new tensors the dtype and device, that all old ones share."""
    flags = {training for _, training, _ in grown.before.modules.values()}
    kinds = {(p.dtype, p.device) for p in grown.before.parameters.values() if p.is_floating_point()}
    for path, new in grown.change.added:
        for module in new.module.modules():
            if len(flags) == 1 and module.training not in flags:
                fail("inherited", f"{path} is in {'train' if module.training else 'eval'} mode, the rest is not")
        for name, p in new.module.named_parameters():
            if len(kinds) == 1 and p.is_floating_point() and (p.dtype, p.device) not in kinds:
                fail("inherited", f"{join(path, name)} is {p.dtype} on {p.device}, the rest is not")


def optimizers(grown: Grown) -> None:
    """Each trainable parameter in one group of one optimizer, once; old groups and their order as they were."""
    names = {id(p): name for name, p in grown.run.model.named_parameters()}
    homes: Homes = {}
    for index, optimizer in enumerate(grown.run.optimizers):
        old = grown.before.groups[index]
        beside = [one for one in grown.change.groups if one.optimizer is optimizer]
        own = sum(isinstance(grown.group, Mapping) or bool(one.begins) for one in beside)
        if len(optimizer.param_groups) != len(old) + own:
            count = f"{len(optimizer.param_groups)} parameter groups, it had {len(old)}"
            fail("optimizer", f"{type(optimizer).__name__} has {count}: schedulers and checkpoints do not expect that")
        for number, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                homes.setdefault(id(p), []).append((index, number))
            problem = old[number].problem(group, names, grown.changed) if number < len(old) else None
            if problem is not None:
                fail("optimizer", f"{type(optimizer).__name__} group {number}: {problem}")
    for name, p in grown.run.model.named_parameters():
        count = len(homes.get(id(p), ()))
        if p.requires_grad and count != 1 and grown.run.optimizers:
            fail("optimizer", f"{name} is held {count} times, it must be once")
    foreign = set(homes) - set(names) - grown.before.foreign
    if foreign:
        fail("optimizer", f"{len(foreign)} tensors are held that the network does not have")
    apart = grown.group is not None or any(own.begins for own in grown.change.groups)
    for path, new in () if apart else grown.change.added:
        _beside_its_sibling(grown, path, new.module, homes)


def _beside_its_sibling(grown: Grown, path: str, module: nn.Module, homes: Homes) -> None:
    """Each new tensor in the group of the one that it replaces, or of the nearest of its role in the same container."""
    at, _, key = path.rpartition(".")
    children = dict(module_at(grown.run.model, at).named_children())
    place = list(children).index(key)
    for name, p in module.named_parameters():
        near: dict[int, set[tuple[int, int]]] = {}
        if join(path, name) in grown.changed:
            groups = [(i, g, own.names) for i, o in enumerate(grown.before.groups) for g, own in enumerate(o)]
            near[-1] = {(i, g) for i, g, names in groups if join(path, name) in names}
        for distance, child in ((abs(i - place), c) for i, c in enumerate(children.values())):
            sibling = dict(child.named_parameters()).get(name)
            if sibling is None or id(sibling) not in grown.before.names or id(sibling) not in homes:
                continue
            if _owner(child, name) is _owner(module, name) and sibling.dim() == p.dim():
                near.setdefault(distance, set()).update(homes[id(sibling)])
        if near and near[min(near)] and p.requires_grad and not near[min(near)] & set(homes.get(id(p), ())):
            fail("optimizer", f"{join(path, name)} is not in the group of the nearest {name} beside it")


def _owner(module: nn.Module, name: str) -> type:
    return type(module_at(module, name.rpartition(".")[0]))


def state(grown: Grown) -> None:
    """Old optimizer state: the same tensors, to the bit. State of a new one: none, zeros, or its source's values."""
    for optimizer, before in zip(grown.run.optimizers, grown.before.state, strict=True):
        if isinstance(optimizer, torch.optim.LBFGS):
            continue  # flat vectors over all parameters, which a growth starts afresh
        kind = type(optimizer).__name__
        for name, facts in before.items():
            if name not in grown.changed and state_of(optimizer, grown.before.parameters[name]) != facts:
                fail("state", f"{kind}'s state of {name} has changed")
        _state_of_new(grown, optimizer, before)


def _state_of_new(grown: Grown, optimizer: Any, before: dict[str, Facts]) -> None:
    kind, sources = type(optimizer).__name__, sources_of(grown.change)
    continued = {id(m.new) for m in grown.change.moves if m.old is not None}
    theirs = {identity for facts in before.values() for identity, _ in facts.values() if identity}
    zeroed = {join(path, name) for path, new in grown.change.added for name in new.zeroed}
    for name, p in grown.born.items():
        source, found = before.get(sources.get(name, ""), {}), state_of(optimizer, p)
        for key, (identity, bits) in found.items() if id(p) not in continued else ():
            if identity in theirs:
                fail("state", f"{kind}'s {key} of {name} is an old parameter's very tensor: a step would write both")
            value = optimizer.state[p][key]
            empty = not value.count_nonzero() if isinstance(value, Tensor) else not value
            if not empty and (key not in source or source[key][1] != bits):
                fail("state", f"{kind}'s {key} of the new {name} is neither fresh nor that of the tensor it copies")
        asked = getattr(grown.edit, "state", None) == "copy" and name not in zeroed
        if asked and {k: bits for k, (_, bits) in found.items()} != {k: bits for k, (_, bits) in source.items()}:
            fail("state", f"{kind}'s state of {name} is not a copy of that of {sources[name]}, which state='copy' asks")


def others(grown: Grown) -> None:
    """Schedulers and scalers: as they were, but for own groups; a companion of the user's own may change."""
    left = [grown.run.model, *grown.run.optimizers]
    longer = {id(own.optimizer) for own in grown.change.groups}
    for companion, record in zip(grown.run.others, grown.before.others, strict=True):
        if not isinstance(companion, (LRScheduler, ReduceLROnPlateau, torch.amp.GradScaler)):
            continue
        if id(getattr(companion, "optimizer", None)) in longer:
            continue  # its lists have an entry for each group
        differences = record.differences(exact(companion, leave_out=left))
        if differences:
            fail("schedule", f"the growth has changed {type(companion).__name__}{differences[0]}")


def averages(grown: Grown) -> None:
    """Old averages to the bit and the same objects, new entries there, the averaged network's own function kept."""
    ours = [(n, p.shape) for n, p in grown.run.model.named_parameters()]
    live = {id(t): n for n, t in (*grown.run.model.named_parameters(), *grown.run.model.named_buffers())}
    for average, (copies, counts) in zip(grown.run.averages, grown.before.averages, strict=True):
        for averaged, (tensors, outputs) in zip(networks_of(average), copies, strict=True):
            theirs = [(n, p.shape) for n, p in averaged.named_parameters()]
            if ours != theirs:
                wrong = next((a[0] for a in ours if a not in theirs), "the order")
                kind = type(average).__name__
                fail("average", f"{kind} does not follow ({wrong}): it would mix layers or lack one")
            now = dict((*averaged.named_parameters(), *averaged.named_buffers()))
            for name, (tensor, bits, _) in tensors.items():
                there = now.get(live.get(id(grown.before.tensors[name][0]), ""))
                if name not in grown.changed and (there is not tensor or digest(tensor) != bits):
                    fail("average", f"the average of {name} is not what and where it was")
            if any(id(p) in live for p in averaged.parameters()):
                fail("average", "it holds parameters of the live network, so it would average nothing")
            if grown.change.preserves:
                change = gap(outputs, eval_outputs(averaged, grown.recipe.probe))
                if change > _limit(grown.change, outputs):
                    fail("average", f"the averaged network's own outputs changed by {change:.3g}")
        for name, count in counts_of(average).items():
            if counts.get(name) != count:
                fail("average", f"{name} has changed")


def function(grown: Grown) -> None:
    """Outputs as promised: in eval mode, and in train mode without dropout, each on copies."""
    if not grown.change.preserves:
        return
    model, probe = grown.run.model, grown.recipe.probe
    old, new = eval_outputs(grown.ungrown, probe), eval_outputs(model, probe)
    grown.figures["eval"] = _judge("in eval mode", grown.change, old, new)
    old = train_outputs(grown.ungrown, probe, seed=0)
    if gap(old, train_outputs(grown.ungrown, probe, seed=1)) > 0:
        grown.notes.append("train mode not compared: the network is random there even without dropout")
        return
    new = train_outputs(model, probe, seed=0)
    grown.figures["train"] = _judge("in train mode without dropout", grown.change, old, new)


def learning(grown: Grown) -> None:
    """Every new trainable tensor has got a gradient within three steps, and each new module has moved."""
    known = grown.before.reached
    reached = set().union(*grown.run.reached[:GRADIENT_STEPS])
    sources = sources_of(grown.change)
    for name, p in grown.born.items():
        if not p.requires_grad or name in reached:
            continue
        if sources.get(name) in grown.before.parameters and sources[name] not in known:
            grown.notes.append(f"{name} gets no gradient, and neither does {sources[name]}")
            continue
        fail("learning", f"no gradient has reached {name} in {GRADIENT_STEPS} steps, so it would never train")
    for path, _ in grown.change.added:
        trained = [n for n, p in grown.born.items() if p.requires_grad and f"{n}.".startswith(f"{path}.")]
        if trained and all(digest(grown.born[n]) == grown.born_bits[n] for n in trained):
            fail("learning", f"{path} has not moved though gradients reached it: no optimizer steps it")


def schedule(history: list[Options], twin: list[Options]) -> None:
    """Options of all old groups, the learning rate first, as in a run that never grew."""
    for number, (ours, theirs) in enumerate(zip(history, twin, strict=True)):
        pairs = [
            (i, g, key, value) for i, o in enumerate(theirs) for g, own in enumerate(o) for key, value in own.items()
        ]
        for index, place, key, value in pairs:
            now = ours[index][place].get(key)
            if repr(now) != repr(value):
                when = f"{number + 1} steps after the growth"
                fail("schedule", f"{when} group {place} has {key}={now!r}, a run that never grew {value!r}")


def sources_of(change: Change) -> dict[str, str]:
    """New name -> old name of the tensor that it copies."""
    found = {}
    for path, new in change.added:
        if new.source is not None:
            found |= {join(path, n): join(new.source, n) for n, _ in new.module.named_parameters()}
    old = {id(p): name for name, p in change.before.parameters.items()}
    return found | {m.name: old[id(m.source)] for m in change.moves if m.name is not None and id(m.source) in old}


def gap(old: list[Tensor], new: list[Tensor]) -> float:
    """Largest absolute difference; infinite where shapes differ or numbers are lost."""
    if [(t.shape, t.dtype) for t in old] != [(t.shape, t.dtype) for t in new]:
        return float("inf")
    unequal = [(a, b) for a, b in zip(old, new, strict=True) if digest(a) != digest(b) and not torch.equal(a, b)]
    wide = torch.complex128 if any(a.is_complex() for a, _ in unequal) else torch.float64
    gaps = [(a.to(wide) - b.to(wide)).abs().nan_to_num(nan=float("inf")) for a, b in unequal]
    return max((float(g.max()) for g in gaps), default=0.0)


def eval_outputs(model: nn.Module, probe: Any) -> list[Tensor]:
    """Outputs on the probe in eval mode."""
    return Run(model, [], [], probe, None).outputs()


def train_outputs(model: nn.Module, probe: Any, seed: int) -> list[Tensor]:
    """Outputs of a copy in train mode with dropout at 0."""
    twin = copy.deepcopy(model).train()
    for module in twin.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
    with random_state(seed), torch.no_grad():
        return [t.detach().clone() for t in tensors_in(PlanContext(twin, probe).run())]


def _judge(where: str, change: Change, old: list[Tensor], new: list[Tensor]) -> float:
    found = gap(old, new)
    if found > _limit(change, old):
        fail("function", f"{where} the outputs changed by {found:.3g}, though {change.how} was to keep them")
    return found


def _limit(change: Change, outputs: list[Tensor]) -> float:
    """Zero, except where a product with an identity matrix may round, or a sum over more entries."""
    floating = [t for t in outputs if t.is_floating_point()]
    wider = any(move.continues and move.reshaped for move in change.moves)
    if (change.how != "identity" and not wider) or not floating:
        return 0.0
    return max(EPSILONS * torch.finfo(t.dtype).eps * max(1.0, float(t.abs().max())) for t in floating)
