"""Races: branches of one run that train on the same batches, of which the best one goes on."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.gradients import differentiable, gradients_of
from auxin.anatomy.probe import untouched
from auxin.change import Change, Edit
from auxin.errors import BadMoment, GrowthError
from auxin.evidence import Evidence, in_mode
from auxin.ledger import flops_of
from auxin.run_state import Run
from auxin.statistics.measured import loss_of

NEEDED = "give the Grower evidence=auxin.Evidence(loss, batches)."
ENOUGH = 8  # batches of validation data, of which a standard error can be told


@dataclass(frozen=True)
class Branch:
    """One branch of a race.

    Attributes:
        edit: what it grew by; None: it trained on as it was.
        score: loss on validation data of the weights averaged over the last part of it; lower is better.
        parameters: of its network.
        flops: of one of its training steps.
        why_not: why it could not be run; "" where it was.
        losses: on each batch of the validation data, of which the score is the mean.
    """

    edit: Any
    score: float
    parameters: int
    flops: float
    why_not: str = ""
    losses: tuple[float, ...] = ()

    def beats(self, other: Branch, sure: float) -> bool:
        """Whether it is better, by more than ``sure`` standard errors of the difference, paired over the batches.

        With fewer than ``ENOUGH`` batches there is no telling how large that error is, and it need only be better.
        """
        if not self.score < other.score:
            return self.score == self.score and other.score != other.score
        differences = [b - a for a, b in zip(self.losses, other.losses, strict=True)]
        if not sure or len(differences) < ENOUGH or not all(map(math.isfinite, differences)):
            return True
        return statistics.fmean(differences) > sure * statistics.stdev(differences) / math.sqrt(len(differences))


@dataclass(frozen=True)
class Race:
    """How a race went.

    Attributes:
        branches: the one that did not grow first.
        steps: that each of them took.
        winner: number of the branch that goes on.
        change: the growth of the winner; None where it has not grown.
    """

    branches: tuple[Branch, ...]
    steps: int
    winner: int
    change: Change | None

    def __str__(self) -> str:
        lines = [f"race over {self.steps} steps:"]
        for number, one in enumerate(self.branches):
            name = "as it is" if one.edit is None else shown(one.edit)
            mark = "*" if number == self.winner else " "
            told = one.why_not or f"{one.score:.5g} at {one.parameters:,} parameters, {one.flops:.3g} FLOPs a step"
            lines.append(f"{mark} {name}: {told}")
        return "\n".join(lines)


RESOLVED = ("axes", "assigns", "ratios")  # what ``Widen`` has found out when it was carried out; nobody writes it


def shown(edit: Any) -> str:
    """An edit as one would write it: without the arguments that have their defaults, and without what it has found."""
    parts = getattr(edit, "edits", None)
    if isinstance(parts, (tuple, list)):
        return ", ".join(map(shown, parts))
    if not dataclasses.is_dataclass(edit):
        return repr(edit)
    told = []
    for number, one in enumerate(dataclasses.fields(edit)):
        value = getattr(edit, one.name)
        if number == 0:
            told.append(repr(value))
        elif one.name not in RESOLVED and value != one.default:
            told.append(f"{one.name}={value!r}")
    return f"{type(edit).__name__}({', '.join(told)})"


def check(steps: int, shrink: float, averaged: float, sure: float) -> None:
    """Check the arguments of a race.

    Raises:
        GrowthError: one is out of its range.
    """
    if type(steps) is not int or steps < 1:
        raise GrowthError(f"race(steps={steps!r}): pass a whole number of training steps from 1.")
    if not 0 < shrink <= 1:
        raise GrowthError(f"race(shrink={shrink!r}): pass a factor above 0 and at most 1; 1 leaves the weights.")
    if not 0 < averaged <= 1:
        raise GrowthError(f"race(averaged={averaged!r}): pass the part of the steps to average over, at most 1.")
    if not 0 <= sure < math.inf:
        raise GrowthError(f"race(sure={sure!r}): pass a number of standard errors, 0 for none.")


def shrink_weights(model: nn.Module, factor: float) -> None:
    """Make weights and biases that train smaller, by ``factor`` over all layers together: each of n by its nth root.

    Half of each would leave a sixteenth of what four layers in a row do, and where little is left of a network of tanh
    it is linear, and stays so for long. Each tensor is multiplied once, and norms are left out (Ash and Adams 2020,
    arXiv:1910.08475, without the noise, and with one factor for every layer).

    Units that a network grows late get more of the gradient where the old ones have not settled. Gains and shifts of
    norms stay: they set the scale that what stands behind them is used to. What is frozen would never recover.
    """
    shrunk: dict[int, nn.Parameter] = {}
    layers = 0
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(p.dim() > 1 for p in own):
            new = {id(p): p for p in own if p.requires_grad and id(p) not in shrunk}
            layers += any(p.dim() > 1 for p in new.values())
            shrunk |= new
    each = factor ** (1 / max(1, layers))
    with torch.no_grad():
        for p in shrunk.values():
            p.mul_(each)


class Average:
    """The mean of weights and statistics over steps of training, to be looked at."""

    def __init__(self, model: nn.Module):
        self._tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self._sums: list[Tensor] | None = None
        self._count = 0

    def add(self) -> None:
        """Take the weights of now in."""
        values = [t.detach() for t in self._tensors]
        self._count += 1
        if self._sums is None:
            self._sums = [v.clone() for v in values]
        else:
            for total, value in zip(self._sums, values, strict=True):
                total.add_(value)

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Let the mean stand in the network inside."""
        values = [t.detach().clone() for t in self._tensors]
        try:
            with torch.no_grad():
                for tensor, total in zip(self._tensors, self._sums or values, strict=True):
                    tensor.copy_(total / max(1, self._count))
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(self._tensors, values, strict=True):
                    tensor.copy_(value)


def check_companions(companions: Sequence[Any]) -> None:
    """Check that a plain training step takes all companions along.

    Raises:
        GrowthError: there is an average of another package, which would stand still while the network trains.
    """
    for one in companions:
        steps = hasattr(one, "param_groups") or hasattr(one, "update_parameters") or hasattr(one, "step")
        if callable(getattr(one, "update", None)) and not steps and not hasattr(one, "_per_optimizer_states"):
            raise GrowthError(
                f"race(...) trains by itself, and how {type(one).__name__} takes part in a step is not known: it would "
                "stand still. Pass Evidence(loss, batches, step=f), where f(model, batch) takes one step of your loop."
            )


def check_evidence(run: Run, words: str, backward: bool = True) -> Evidence:
    """The run's evidence, if its loss is a finite number on the first batch to train on and to judge on.

    Raises:
        GrowthError: there is none, or its loss is not, or has no gradient (``backward``), or is of another device.
    """
    if run.evidence is None:
        raise GrowthError(f"{words}: {NEEDED}")
    with run.ranks.agree("the evidence"), untouched(run.model), torch.no_grad():
        with torch.set_grad_enabled(backward):
            loss = loss_of(run.model, run.evidence, 0, run.evidence.batches[0])
            if backward:
                differentiable(loss)
        if run.evidence.validation is not None:
            loss_of(run.model, run.evidence, 0, run.evidence.validation[0])
    return run.evidence


def raced(
    run: Run,
    edits: Sequence[Edit],
    steps: int,
    shrink: float,
    averaged: float,
    sure: float,
    keep: Callable[[], None],
) -> Race:
    """Run the branches, each from the state of now, which is put back.

    Args:
        run: the run.
        edits: the rivals of the network as it is.
        steps: of each branch.
        shrink: factor of the weights of all layers together as a branch begins.
        averaged: part of the steps over which weights are averaged.
        sure: by how many standard errors a branch has to be better than the network as it is.
        keep: called at the end of a branch that is the best so far.

    Raises:
        GrowthError: there is no evidence, or a companion that a plain step leaves out; or a bad moment.
    """
    evidence = check_evidence(run, "race(...) trains by itself")
    if evidence.step is None:
        check_companions(run.companions)
    branches, spent, best, change = list[Branch](), list[float](), 0, None
    for edit in (None, *edits):
        try:
            with run.trial(edit) as grown, run.ledger.timed("races"):
                too_large = None if edit is None else run.limit.exceeded(run.model, run.probe)
                if too_large is not None:
                    raise GrowthError(f"the network would have {too_large}.")
                cost = step_flops(run)
                losses = _trained_and_scored(run, evidence, steps, shrink, averaged)
                size = sum(p.numel() for p in run.model.parameters())
                branch = Branch(edit, statistics.fmean(losses), size, cost, "", tuple(losses))
                branches.append(branch)
                if edit is None or (branch.beats(branches[0], sure) and (not best or branch.beats(branches[best], 0))):
                    best, change = len(branches) - 1, grown
                    keep()
        except BadMoment:
            raise
        except GrowthError as error:
            if edit is None:
                raise
            branches.append(Branch(edit, math.nan, 0, 0.0, str(error)))
        spent.append(steps * branches[-1].flops)
    if not math.isfinite(branches[best].score):
        run.ledger.spend("races", sum(spent))
        raise GrowthError(
            f"race(...): after {steps} steps the loss of every branch is not finite, so none is gone on with and the "
            "run is as before. Lower the learning rate, or leave out the batch with such values."
        )
    run.ledger.spend("training", spent[best])
    run.ledger.spend("races", sum(spent) - spent[best])
    return Race(tuple(branches), steps, best, change)


def _trained_and_scored(run: Run, evidence: Evidence, steps: int, shrink: float, averaged: float) -> list[float]:
    """Train a branch; the losses on validation data of its weights, averaged over the last part of its steps."""
    if shrink < 1:
        shrink_weights(run.model, shrink)
    average, first = Average(run.model), steps - max(1, round(steps * averaged))

    def taken(number: int) -> None:
        if number >= first:
            average.add()

    evidence.train(run.model, run.companions, steps, run.optimizer_steps, taken)
    with average.standing():
        run.ledger.spend("evaluation", validation_flops(run))
        each = run.ranks.share("race: the losses", lambda: evidence.losses(run.model))
    return [loss for losses in each for loss in losses]


def step_flops(run: Run) -> float:
    """FLOPs of one training step of the network as it is; the mean over the ranks, so that all of them spend alike."""
    evidence = run.evidence
    assert evidence is not None
    return run.ranks.mean("the FLOPs of a step", lambda: flops_of(run.model, evidence.loss, evidence.batches[0]))


def validation_flops(run: Run) -> float:
    """FLOPs of ``evidence.validate``, its batches taken to be as large as the first; the mean over the ranks."""
    evidence = run.evidence
    assert evidence is not None
    batches = evidence.batches if evidence.validation is None else evidence.validation

    def counted() -> float:
        return len(batches) * flops_of(run.model, evidence.loss, batches[0], backward=False)

    return run.ranks.mean("the FLOPs of an evaluation", counted)


@dataclass(frozen=True)
class Probed:
    """What one look at an edit has told.

    Attributes:
        edit: which.
        flops: of one training step of the network that has grown by it.
        parameters: of that network.
        gain: what the first optimizer step on the new entries alone takes off the loss on unseen data, to first order;
            NaN where nobody asked for it.
        why_not: why it could not be carried out; "" where it could.
    """

    edit: Any
    flops: float
    parameters: int
    gain: float
    why_not: str = ""


def probed(run: Run, edit: Edit, looks: int) -> Probed:
    """Grow for a look: what a training step then costs, and, on ``looks`` batches, what the new entries promise.

    Raises:
        GrowthError: a bad moment.
    """
    assert run.evidence is not None  # the chooser has checked it
    evidence = run.evidence
    try:
        with run.trial(edit) as change, run.ledger.timed("probing"):
            too_large = run.limit.exceeded(run.model, run.probe)
            if change is None or too_large is not None:
                raise GrowthError(f"the network would have {too_large}.")
            flops = step_flops(run)
            size = sum(p.numel() for p in run.model.parameters())
            run.ledger.spend("probing", flops)
            return Probed(edit, flops, size, _gain(run, change, evidence, looks) if looks else math.nan)
    except BadMoment:
        raise
    except GrowthError as error:
        return Probed(edit, math.nan, 0, math.nan, str(error))


def _gain(run: Run, change: Change, evidence: Evidence, looks: int) -> float:
    """The first-order decrease of the loss by one step on the entries that are new, seen on validation data.

    An optimizer that divides by the root of second moments moves each entry by its rate against the sign of the
    gradient g, any other one by rate x g. On unseen data, of gradient g', that takes off the product of step and g'; on
    the same data noise counts as gain too. As the step is taken in train mode and the loss judged in eval mode, so are
    g and g'.
    """
    masks: dict[str, Tensor | None] = {part.name: part.mask for part in change.parts}
    masks |= dict.fromkeys(change.starting)
    if not masks:  # nothing is new, as where blocks run again: a step on nothing tells nothing
        return math.nan
    rates = {id(p): (o, float(g["lr"])) for o in run.optimizers for g in o.param_groups for p in g["params"]}
    parts = _looked_at(evidence, looks)
    spent = run.ranks.mean(
        "the FLOPs of a look", lambda: sum(len(p) * flops_of(run.model, evidence.loss, p[0]) for p in parts)
    )
    run.ledger.spend("probing", spent)
    with in_mode(run.model, training=False):
        for module in run.model.modules():
            module.training = isinstance(module, nn.RNNBase)  # cuDNN goes backward in train mode only
        unseen = _mean_gradients(run.model, evidence.loss, parts[1])
    seen = _mean_gradients(run.model, evidence.loss, parts[0])  # moves running statistics, so it comes last
    gain = 0.0
    for name, parameter in run.model.named_parameters():
        if name in masks and name in seen and name in unseen and id(parameter) in rates:
            mask, (optimizer, rate) = masks[name], rates[id(parameter)]
            step = seen[name].sign() if isinstance(optimizer, SCALE_FREE) else seen[name]
            product = step * unseen[name]
            gain += rate * float((product if mask is None else product[mask.to(product.device)]).sum())
    return run.ranks.mean("the gain of an edit", lambda: gain)


def _looked_at(evidence: Evidence, looks: int) -> tuple[list[Any], list[Any]]:
    """Batches for the step, and those on which it is to take something off: others, where there are validation data.

    Halves of the training data will not do: in a network that fits them their gradients are opposite.
    """
    first = [evidence.batches[n] for n in range(min(looks, len(evidence.batches)))]
    if evidence.validation is not None:
        return first, [evidence.validation[n] for n in range(min(looks, len(evidence.validation)))]
    return first, first


def _mean_gradients(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: list[Any]
) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for batch in batches:
        for name, gradient in gradients_of(loss(model, batch) / len(batches), model).items():
            if gradient is not None:
                total[name] = total[name] + gradient if name in total else gradient
    return total


SCALE_FREE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop)
