"""``auxin doctor``: what will work on a network of your own, tried out, and what to write."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.hugging_face.stock import is_stock
from auxin.anatomy.probe import Probe
from auxin.anatomy.tree import unwrap
from auxin.anatomy.widths.tried import CHANGES
from auxin.change import Edit
from auxin.companion import registered, registration_of
from auxin.edits.after import After
from auxin.edits.duplicate import Duplicate
from auxin.edits.widen import Widen
from auxin.engine import grow
from auxin.errors import GrowthError
from auxin.factory import made_by
from auxin.follow.own_groups import optimizers_in
from auxin.grower import Grower
from auxin.listing import unnumbered
from auxin.race import shown
from auxin.sites import Sites, sites
from auxin.verify import verify
from auxin.widths import Width

MOST = 6  # edits of a kind that are tried


@dataclass(frozen=True)
class Finding:
    """What was found about one thing.

    Attributes:
        subject: an edit as one writes it, or the class of a companion.
        works: whether it was tried and worked.
        words: what it does, or why it does not work.
        edit: the edit; None for a companion.
        stock: whether it works, or would have to, without ``stock=False``.
    """

    subject: str
    works: bool
    words: str
    edit: Any = None
    stock: bool = True


@dataclass(frozen=True)
class Examination:
    """What was found about a network and what hangs on it; prints itself in a dozen lines.

    Attributes:
        network: its class.
        parameters: how many it has.
        edits: those that were tried, each by a growth that was proved and taken back.
        companions: whether each would be followed.
        widths: those that cannot grow, with the reason.
        trains: whether there was an optimizer.
    """

    network: str
    parameters: int
    edits: tuple[Finding, ...]
    companions: tuple[Finding, ...]
    widths: tuple[Finding, ...]
    trains: bool = True

    @property
    def works(self) -> bool:
        """Whether something can grow, and all companions follow."""
        return any(one.works for one in self.edits) and all(one.works for one in self.companions)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        found = {name: [asdict(one) for one in getattr(self, name)] for name in ("edits", "companions", "widths")}
        for one in (one for rows in found.values() for one in rows):
            del one["edit"]
        return {"network": self.network, "parameters": self.parameters, "works": self.works, **found}

    def __str__(self) -> str:
        lines = [f"{self.network}, {self.parameters:,} parameters"]
        rows = [*self.companions, *self.edits, *self.widths]
        lines += [f"  {'works' if one.works else 'does not':<9} {one.subject}: {one.words}" for one in rows]
        if not self.trains:
            lines.append("  (no optimizer was returned, so what becomes of its state was not tried)")
        first = min((one for one in self.edits if one.works), key=lambda one: not one.stock, default=None)
        if not self.works:
            lines.append("Nothing can grow as it stands." if first is None else "Mend what does not work, then write:")
        if first is not None:
            lines.append(f"  grower = auxin.Grower(model, ..., edits=auxin.{first.subject},")
            stock = "" if first.stock else ", stock=False"
            lines.append(f"                        when=auxin.when.plateau(patience=3), rewarm=50, probe=batch{stock})")
        return "\n".join(lines)


def examine(
    model: nn.Module, *companions: Any, probe: Probe, show: Callable[[str], object] | None = None
) -> Examination:
    """Try on a network what could grow in it, and take all of it back.

    Each list of blocks is made longer, each width wider by a quarter, and, where there is neither, a layer put behind a
    module: growths as ``grow`` carries them out, proved on the probe with every companion, and undone. Of many places
    of a kind the first few are tried.

    Args:
        model: the network.
        companions: what hangs on it, as for ``Grower``.
        probe: one batch, as for ``grow``.
        show: called with each growth before it is tried, as one writes it; a large network takes its time.

    Raises:
        GrowthError: there is no probe, or the network does not run on it.
    """
    with _as_in_training(unwrap(model)) as inner:
        return _examined(model, inner, companions, probe, show)


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[nn.Module]:
    """For a while without the gradients that a factory has left, and with gains that are not all alike.

    A norm whose gains are the same everywhere hides that a stream which it is part of (BERT) cannot grow once it has
    been trained.
    """
    grads = [(p, p.grad) for p in model.parameters()]
    gains = [p for p in model.parameters() if type(p) is nn.Parameter and _alike(p)]
    values = [p.detach().clone() for p in gains]
    draw = torch.Generator().manual_seed(0)
    try:
        for p, _ in grads:
            p.grad = None
        for p in gains:
            p.data.mul_(1 + 0.01 * torch.rand(p.shape, generator=draw).to(p))
        yield model
    finally:
        for p, value in zip(gains, values, strict=True):
            p.data.copy_(value)
        for p, grad in grads:
            p.grad = grad


def _alike(p: Tensor) -> bool:
    """Whether it is a vector that holds one number, not zero, and would train."""
    vector = p.requires_grad and p.numel() == max(p.shape, default=0) > 1 and p.is_floating_point() and not p.is_meta
    return vector and bool((p == p.flatten()[0]).all()) and bool(p.flatten()[0] != 0)


def _examined(
    model: nn.Module,
    inner: nn.Module,
    companions: Sequence[Any],
    probe: Probe,
    show: Callable[[str], object] | None,
) -> Examination:
    found = sites(inner, probe)
    following = tuple(_companion(one) for one in companions)
    able = [one for one, told in zip(companions, following, strict=True) if told.works]
    try:
        verify(model, *able)
    except GrowthError as error:  # said once, where it belongs: every growth would be refused for it
        following, able = (*following, Finding("together", False, str(error))), []
    tried: list[Finding] = []
    for edit in _edits(found):
        if show is not None:
            show(shown(edit))
        tried.append(_tried(model, edit, able, probe, is_stock(inner)))
    able_to = [width for width in found.widths if width.edit is not None]
    growing = {unnumbered(at) for w in able_to for at in (w.at, *(name.rpartition(".")[0] for name in w.makes))}
    alike = {unnumbered(width.at): width for width in reversed(found.widths) if width.why_not}
    stuck: list[Finding] = []
    for width in [width for at, width in alike.items() if at not in growing][::-1][:MOST]:
        told = Finding(f"width of {width.at!r}", False, width.why_not)
        if CHANGES in width.why_not:  # copies may keep what other new entries would change
            edit = Widen(width.at, to=2 * width.size, init="tile")
            if show is not None:
                show(shown(edit))
            tiled = _tried(model, edit, able, probe, is_stock(inner))
            told = tiled if tiled.works else told
        (tried if told.works else stuck).append(told)
    if found.widths.why_not:
        stuck = [Finding("widths", False, found.widths.why_not)]
    size = sum(p.numel() for p in inner.parameters())
    return Examination(
        type(inner).__name__, size, tuple(tried), following, tuple(stuck), bool(optimizers_in(companions))
    )


def _companion(companion: Any) -> Finding:
    name = type(companion).__name__
    try:
        registration_of(companion)
    except GrowthError as error:
        return Finding(name, False, str(error))
    return Finding(name, True, "is followed")


def _edits(found: Sites) -> Iterator[Edit]:
    lists = [site.at for site in found if any(text.startswith("Duplicate(") for text in site.fits)]
    yield from (Duplicate(at, by=1) for at in lists[:MOST])
    wider = [_by_a_quarter(width) for width, _ in found.widths.patterns() if width.edit and not width.edit.outputs]
    yield from list(dict.fromkeys(wider))[:MOST]  # a quarter more heads, or heads a quarter longer: one edit
    behind = next((site.at for site in found if not site.why_not), None)
    if behind is not None and not lists and not wider:
        yield After(behind)


def _by_a_quarter(width: Width) -> Widen:
    assert width.edit is not None and width.edit.by is not None
    return replace(width.edit, by=width.edit.by * max(1, width.size // width.step // 4))


def _tried(model: nn.Module, edit: Edit, companions: Sequence[Any], probe: Probe, stock: bool) -> Finding:
    """Grow and take it back; where ``stock``, once more without, if that is what is in the way."""
    name, refusal = shown(edit), ""
    for held in (True, False) if stock else (True,):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                change = grow(model, edit, *companions, probe=probe, stock=held, dry_run=True)
        except GrowthError as error:
            refusal = refusal or str(error)
        else:
            words = _outcome(str(change))
            return Finding(name, True, words if held else f"with stock=False, {words}", edit, held)
    return Finding(name, False, refusal, edit)


def _outcome(line: str) -> str:
    """Of a change's line, what it adds and whether the function stays."""
    parts = [part for part in line.split(" · ") if "parameters" in part or "function" in part or "output" in part]
    return ", ".join(parts) or line


def summoned(place: str) -> tuple[nn.Module, tuple[Any, ...], Any]:
    """The network, its companions and a batch that ``module:factory`` returns.

    Args:
        place: ``module:factory``; the module is looked for from the working directory on. The factory takes no argument
            and returns ``(model, optimizer, ..., batch)``: the batch last, as the model is called; or a Grower last.

    Raises:
        GrowthError: it cannot be imported, raises, or returns something else.
    """
    parts = made_by(place, "doctor")
    if parts and isinstance(parts[-1], Grower):
        return parts[-1].model, parts[-1].companions, parts[-1].probe
    if len(parts) < 2 or not isinstance(parts[0], nn.Module) or not _is_batch(parts[-1]):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise GrowthError(
            f"doctor {place}: it returns ({kinds}). Return the model, what hangs on it, and one batch at the end, as "
            "the model is called: (model, optimizer, x); a tuple of arguments or a dict of keywords will do for x."
        )
    return parts[0], parts[1:-1], parts[-1]


def _is_batch(value: Any) -> bool:
    return isinstance(value, (Tensor, tuple, list, Mapping)) or (callable(value) and registered(value) is None)
