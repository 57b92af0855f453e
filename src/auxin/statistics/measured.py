"""Second moments by a pass over evidence, which leaves no trace in the network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.gradients import gradients_of
from auxin.anatomy.probe import tensors_in, untouched
from auxin.anatomy.tree import unwrap
from auxin.errors import GrowthError, reason
from auxin.evidence import Evidence
from auxin.statistics.places import Pair, Proposal
from auxin.statistics.watch import Place, Watch


def measured(
    model: nn.Module,
    evidence: Evidence,
    places: Iterable[Place],
    *,
    proposals: Mapping[Pair, Proposal] | None = None,
    limit: int = 2**30,
    quiet: bool = False,
    guarded: bool = True,
) -> dict[Place, Any]:
    """Second moments at some places, over all batches of the evidence, in eval mode.

    Gradients, buffers, modes and random generators are afterwards what they were.

    Args:
        model: The network.
        evidence: A loss that is a mean over samples, and batches.
        places: Pairs and sites.
        proposals: By pair, new units whose exact first-order gain is wanted: their M_new is taken.
        limit: Bytes that the sums may take.
        quiet: Do not print what will be taken.
        guarded: Put back whatever the pass writes; False inside a guard of the caller's.

    Returns:
        By place, ``PairMoments`` and ``SiteMoments``.

    Raises:
        GrowthError: The loss is not a finite number with a gradient, a batch is on another device, or what
            ``watch`` raises.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> evidence = Evidence(lambda model, x: model(x).square().sum(1).mean(), [torch.randn(16, 4)])
        >>> measured(net, evidence, [Pair("0", "2")], quiet=True)[Pair("0", "2")].samples
        16
    """
    model = unwrap(model)
    places = list(places)
    unknown = set(proposals or {}) - set(places)
    if unknown:
        raise GrowthError(f"statistics: {next(iter(unknown))} has a proposal and is not among the places.")
    with untouched(model) if guarded else nullcontext(), _frozen(model):
        seen = Watch(model, places, proposals=proposals, limit=limit, quiet=quiet, eager=True)
        with seen:
            for number, batch in enumerate(evidence.batches):
                with torch.enable_grad():
                    loss = loss_of(model, evidence, number, batch)
                    if loss.requires_grad:
                        gradients_of(loss, model)
                    elif seen.called:
                        raise GrowthError(
                            f"Evidence, batch {number}: the loss has no gradient. Compute it from the network's "
                            "outputs, without detach or no_grad."
                        )
        if seen.skipped:
            raise GrowthError(f"statistics: {seen.skipped} of the gradients were not finite. Leave such batches out.")
        return {place: seen.moments(place) for place in places}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter take a gradient inside: the backward pass then is that of what is watched alone."""
    training = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in training:
            p.requires_grad_(False)
        yield
    finally:
        for p in training:
            p.requires_grad_(True)


def loss_of(model: nn.Module, evidence: Evidence, number: int, batch: Any) -> Tensor:
    """The loss of one batch of the evidence.

    Raises:
        GrowthError: it is no finite scalar, or the batch is on another device.
    """
    where = f"Evidence, batch {number}"
    device = next((p.device for p in model.parameters()), None)
    elsewhere = {t.device for t in tensors_in(batch)} - {device}
    try:
        loss = evidence.loss(model, batch)
    except Exception as error:  # whatever a user's loss raises
        hint = "Pass batches as loss(model, batch) takes them."
        if device is not None and elsewhere:
            hint = f"It holds tensors on {', '.join(map(str, elsewhere))}, the network is on {device}: move it there."
        raise GrowthError(f"{where}: the loss failed: {reason(error)}. {hint}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        told = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise GrowthError(f"{where}: the loss is {told}; return a scalar tensor, a mean over samples.")
    if not bool(loss.isfinite()):
        raise GrowthError(f"{where}: the loss is {loss.item()}. Leave that batch out, or has the run diverged?")
    return loss.reshape(())
