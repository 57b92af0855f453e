"""Pilots: short runs of each way to go on, on parts of batches, after which everything is as before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from auxin.anatomy.probe import PlanContext, tensors_in, untouched
from auxin.anatomy.tree import unwrap
from auxin.errors import GrowthError, reason
from auxin.evidence import Evidence
from auxin.follow.own_groups import optimizers_in
from auxin.grower import Grower
from auxin.ledger import flops_of
from auxin.race import Average
from auxin.randomness import random_state

GO_ON, GROW, ANEW = "go on", "grow", "start anew"
FINEST = 16  # parts into which a batch is cut at most
WITH_BATCH_NORM = 8  # samples that a part has at least where statistics are taken over it
JUDGED = 64  # batches of validation data that there are at least, where they can be cut
SAME_LOSS = 0.02  # relative difference up to which a loss is the mean of the losses of parts
WARMUP = 20  # steps of a linear warm-up of a network that starts anew
NOISE, NOISE_ANEW = 0.5, 0.25  # powers of the parts of a batch by which rates get smaller; early on noise matters less
AVERAGED_FROM = 0.7  # of the steps up to a look, from where on weights are averaged for it
Anew = Callable[[], Any]
Look = tuple[int, tuple[float, ...]]  # steps so far, and the loss on each batch of the validation data


@dataclass(frozen=True)
class Way:
    """One way to go on.

    Attributes:
        name: "go on", "grow" or "start anew".
        edit: what it grows by; None for the others.
        parameters: of its network.
        flops: of one of its training steps on a whole batch.
        look: FLOPs of the loss on a batch of validation data.
        check: FLOPs of building it: the checks of its growth.
    """

    name: str
    edit: Any
    parameters: int
    flops: float
    look: float
    check: float


class Parts:
    """Batches, each cut along the first dimension of its tensors into equally many parts, one after the other.

    Args:
        batches: that are cut.
        count: parts of each.
    """

    def __init__(self, batches: Sequence[Any], count: int):
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return len(self.batches) * self.count

    def __getitem__(self, number: int) -> Any:
        batch, part = divmod(number, self.count)
        return part_of(self.batches[batch], part, self.count)


def part_of(batch: Any, part: int, count: int) -> Any:
    """One of the equal parts of a batch; a nest of tensors keeps its form, and the rest is left out."""
    size = samples_in(batch) // count
    return batch if count == 1 else _piece(batch, part * size, (part + 1) * size)


def _piece(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if isinstance(batch, dict):
        return {key: _piece(value, start, stop) for key, value in batch.items()}
    items = [_piece(value, start, stop) for value in batch]
    return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)


def samples_in(batch: Any) -> int:
    """Samples of a batch that can be cut; 1 where that is not known: tensors of several lengths, or something else."""
    if not _is_nest(batch):
        return 1
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors_in(batch)}
    return max(1, sizes.pop()) if len(sizes) == 1 else 1


def _is_nest(value: Any) -> bool:
    if type(value) is dict:
        return all(map(_is_nest, value.values()))
    plain = type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields"))
    return isinstance(value, Tensor) or (plain and all(map(_is_nest, value)))


def finest(model: nn.Module, evidence: Evidence) -> int:
    """Into how many parts a batch to train on can be cut, at most ``FINEST``, a power of two."""
    batch = evidence.batches[0]
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    most = min(FINEST, samples_in(batch) // (WITH_BATCH_NORM if normed else 1))
    count = 2 ** int(math.log2(most)) if most > 1 else 1
    while count > 1:
        try:
            with untouched(model), torch.no_grad():
                whole = evidence.loss(model, batch)
                part = evidence.loss(model, part_of(batch, 0, count))
            if part.shape == whole.shape and bool(part.isfinite().all()):
                break
        except Exception:  # a loss that takes whole batches only
            return 1
        count //= 2
    return count


def finer(model: nn.Module, evidence: Evidence) -> Evidence:
    """The evidence with validation data in many small batches, where they can be cut, in random order.

    So a look at the first of them tells something, and their spread how much.
    """
    judged = evidence.validation
    assert judged is not None
    count = min(-(-JUDGED // len(judged)), *map(samples_in, judged))
    if count > 1 and _adds_up(model, evidence.loss, judged[0], count):
        judged = [part_of(batch, n, count) for batch in judged for n in range(count)]
    order = torch.randperm(len(judged), generator=torch.Generator().manual_seed(0)).tolist()
    return replace(evidence, validation=[judged[n] for n in order])


def _adds_up(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, count: int) -> bool:
    """Whether the loss of a batch is the mean of those of its parts."""
    try:
        with untouched(model), torch.no_grad():
            whole = float(loss(model, _piece(batch, 0, count * (samples_in(batch) // count))))
            parts = sum(float(loss(model, part_of(batch, n, count))) for n in range(count)) / count
    except Exception:  # a loss that takes whole batches only
        return False
    return abs(parts - whole) <= SAME_LOSS * abs(whole)


class Bench:
    """Builds each way, trains it for a while, looks at it, and puts everything back.

    Args:
        grower: of the network that is there.
        anew: builds the larger network and what trains it; None: nobody starts anew.
        evidence: to train and to judge on.
        cut: parts of a batch in a step of a pilot.
        budget: FLOPs of a whole run.
    """

    def __init__(self, grower: Grower, anew: Anew | None, evidence: Evidence, cut: int, budget: float):
        self.grower, self.anew, self.evidence, self.cut, self.budget = grower, anew, evidence, cut, budget
        self.spent: dict[str, float] = {"races": 0.0, "probing": 0.0, "evaluation": 0.0}

    def ways(self, edits: Sequence[Any]) -> list[Way]:
        """Every way, built once for a look.

        Raises:
            GrowthError: an edit does not fit, or what starts anew is not what it has to be.
        """
        names = [(GO_ON, None), *((GROW, edit) for edit in edits), *([(ANEW, None)] if self.anew else [])]
        return [self._looked_at(name, edit) for name, edit in names]

    def _looked_at(self, name: str, edit: Any) -> Way:
        before = sum(self.spent.values())
        with self.open(name, edit, 0) as (model, _, evidence):
            check = sum(self.spent.values()) - before
            cost = flops_of(model, evidence.loss, part_of(evidence.batches[0], 0, self.cut))
            judged = evidence.validation or evidence.batches
            one = flops_of(model, evidence.loss, judged[0], backward=False)
            self.spent["probing"] += cost + one
            size = sum(p.numel() for p in model.parameters())
            return Way(name, edit, size, self.cut * cost, one, check)

    @contextmanager
    def open(self, name: str, edit: Any, seed: int) -> Iterator[tuple[nn.Module, tuple[Any, ...], Evidence]]:
        """The network of a way, what trains it, and its evidence; afterwards everything is as before."""
        from torch.utils.flop_counter import FlopCounterMode  # only where it is asked for: it loads triton

        with ExitStack() as held:
            with FlopCounterMode(display=False) as counter:
                held.enter_context(self.grower.trial(edit, seed))
            self.spent["probing"] += counter.get_total_flops()
            held.enter_context(random_state(seed))
            if name == ANEW:
                yield self._anew()
            else:
                wrapped = [c for c in self.grower.companions if isinstance(c, DistributedDataParallel)]
                yield self.grower.model, (*self.grower.optimizers, *wrapped), self.evidence

    @contextmanager
    def _shortened(self, share: float) -> Iterator[None]:
        """Let what grows warm up inside over this share of the steps that it would take in a whole run."""
        rewarm = self.grower.rewarm
        self.grower.rewarm = math.ceil(min(1.0, share) * rewarm)
        try:
            yield
        finally:
            self.grower.rewarm = rewarm

    def _anew(self) -> tuple[nn.Module, tuple[Any, ...], Evidence]:
        return started(self.anew, self.grower.model, self.evidence, self.grower.probe)

    def pilot(self, way: Way, steps: int, looks: Sequence[int], seed: int, judges: int) -> tuple[Look, ...]:
        """Train a way for a while at a constant rate, and look at averaged weights, in place of a decay at each look.

        A step is on a part of a batch, so that there are more of them; far from its end, training counts steps rather
        than samples. A network that is there takes smaller ones: its second moments know the noise of whole batches.

        Args:
            way: which.
            steps: how many.
            looks: after how many of them to look.
            seed: of the new weights, and of the batches.
            judges: batches of validation data to look at.
        """
        found: list[Look] = []
        with self._shortened(steps * way.flops / self.budget), self.open(way.name, way.edit, seed) as opened:
            model, companions, evidence = opened
            judged = (evidence.validation or ())[:judges]
            parts: Any = Parts(evidence.batches, self.cut)
            small = Evidence(evidence.loss, parts, judged, evidence.step)
            groups = [group for one in optimizers_in(companions) for group in one.param_groups]
            slower = self.cut ** -(NOISE_ANEW if way.name == ANEW else NOISE)
            rates = [group["lr"] * slower for group in groups]
            warmup = min(WARMUP, steps // 4) if way.name == ANEW else 0
            average = Average(model)

            def paced(number: int) -> None:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * min(1.0, (number + 1) / max(1, warmup))

            def taken(number: int) -> None:
                nonlocal average
                nearest = next((look for look in looks if look > number), steps)
                if number >= AVERAGED_FROM * nearest:
                    average.add()
                if number + 1 in looks:
                    with average.standing():
                        found.append((number + 1, tuple(small.losses(model))))
                    average = Average(model)
                    self.spent["evaluation"] += len(judged) * way.look
                paced(number + 1)

            paced(0)
            begin = self.cut * (self.grower.optimizer_steps + 7919 * seed)
            small.train(model, companions, steps, begin, taken)
        self.spent["races"] += steps * way.flops / self.cut
        return tuple(found)


def started(
    anew: Anew | None, old: nn.Module, evidence: Evidence, probe: Any
) -> tuple[nn.Module, tuple[Any, ...], Evidence]:
    """What ``anew()`` builds, checked.

    Raises:
        GrowthError: it raises; it is no network with an optimizer; it shares weights with the old network; its outputs
            have other shapes; or it lacks a step of its own where the evidence has one.
    """
    assert anew is not None
    try:
        made = anew()
    except Exception as error:  # whatever a user's code raises
        raise GrowthError(f"verdict(anew=...): it does not build: {reason(error)}. It is called as anew().") from error
    parts = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    optimizers = optimizers_in(parts[1:])
    if not isinstance(parts[0], nn.Module) or not optimizers:
        told = ", ".join(type(part).__name__ for part in parts)
        raise GrowthError(
            f"verdict(anew=...): it returns ({told}). Return the larger network and its optimizer: "
            "lambda: (model := Net(depth=8), torch.optim.AdamW(model.parameters(), lr=3e-3))."
        )
    model, mine = unwrap(parts[0]), {id(p) for p in old.parameters()}
    shared = next((name for name, p in model.named_parameters() if id(p) in mine), None)
    if shared is not None:
        raise GrowthError(
            f"verdict(anew=...): its {shared!r} is a parameter of the network that is there, and would be trained. "
            "Build a network of its own each time that it is called."
        )
    trained = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    if trained.isdisjoint(map(id, model.parameters())):
        raise GrowthError("verdict(anew=...): its optimizer trains no parameter of its network.")
    step = None
    if evidence.step is not None:
        step = next((part for part in parts[1:] if callable(part) and not hasattr(part, "param_groups")), None)
        if step is None:
            raise GrowthError(
                "verdict(anew=...): Evidence(step=...) steps the old network's optimizer. Return a step too: (model, "
                "optimizer, step), where step(model, batch) takes one step with the new one."
            )
    wanted, got = _shapes(old, probe), _shapes(model, probe)
    if wanted != got:
        raise GrowthError(
            f"verdict(anew=...): on the probe its outputs have the shapes {got}, those of the network that is there "
            f"{wanted}. Build it for the same inputs and outputs."
        )
    return model, parts[1:], Evidence(evidence.loss, evidence.batches, evidence.validation, step)


def _shapes(model: nn.Module, probe: Any) -> list[tuple[int, ...]]:
    try:
        with untouched(model), torch.no_grad():
            return [tuple(t.shape) for t in tensors_in(PlanContext(model, probe).run())]
    except GrowthError:
        raise
    except Exception as error:
        raise GrowthError(
            f"verdict(...): {type(model).__name__} does not run on the probe: {reason(error)}."
        ) from error
