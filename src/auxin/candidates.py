"""Every way in which a network could get larger, as edits: each list of blocks deeper, its widths wider."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from auxin.anatomy.blocks import passes
from auxin.anatomy.probe import Probe
from auxin.edits.duplicate import Duplicate
from auxin.edits.several import as_edit
from auxin.edits.widen import Widen
from auxin.errors import GrowthError
from auxin.listing import named_modules
from auxin.sites import sites
from auxin.widths import Width


def candidates(probe: Probe, depth: bool = True, width: bool = True) -> Candidates:
    """The edits that double a network in one way each, for ``Grower(edits=...)``; asked anew at each decision.

    Wider: all inner widths (units, channels, heads) at once; each residual stream. Deeper: each list of blocks that are
    alike. Factors of two, since larger steps overgrow. What is frozen is left alone: a width of which nothing that
    makes it trains, or nothing that reads it, and a list without a parameter that trains. A forward in which widths
    cannot be followed is told of in a warning.

    Args:
        probe: one batch, or a callable that returns one; widths are read off a forward on it.
        depth: whether to offer longer lists of blocks.
        width: whether to offer larger widths.

    Returns:
        ``f(model) -> list of edits``.

    Raises:
        GrowthError: neither of them, or no probe.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(edit.at, edit.by) for edit in candidates(torch.randn(5, 4))(net)]
        [('0', 8)]
    """
    if probe is None:
        raise GrowthError(
            "candidates(probe): pass one batch; where a network can get wider is seen in a forward on it."
        )
    if not (depth or width):
        raise GrowthError("candidates(depth=False, width=False) has nothing to offer; let one be True.")
    return Candidates(probe, depth, width)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What ``candidates`` returns; see there."""

    probe: Any = dataclasses.field(repr=False)
    depth: bool
    width: bool

    def __call__(self, model: nn.Module) -> list[Any]:
        """The edits that fit the network as it is now."""
        found: list[Any] = []
        if self.width:
            found += self._wider(model)
        if self.depth:
            found += [Duplicate(path) for path in _lists(model)]
        return found

    def _wider(self, model: nn.Module) -> Iterator[Any]:
        inner, streams = list[Widen](), list[Widen]()
        widths = sites(model, self.probe).widths
        if widths.why_not:
            warnings.warn(f"candidates(...) offers no width of {type(model).__name__}: {widths.why_not}", stacklevel=2)
        frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        for width, _ in widths.having(lambda width: not _rests(width, frozen)).patterns():
            edit = width.edit
            if (
                edit is None
                or edit.outputs
                or edit.unit in ("rows", "head_dim", "experts")
                or width.start.startswith("head size")
            ):
                continue
            assert edit.by is not None
            doubled = dataclasses.replace(edit, by=edit.by * (width.size // width.step))
            (streams if width.start.startswith("residual stream") else inner).append(doubled)
        if inner:
            yield inner[0] if len(inner) == 1 else as_edit(_apart(inner))
        yield from streams


def _rests(width: Width, frozen: set[str]) -> bool:
    """Whether new entries would never learn: all that makes them, or all that reads them, is frozen."""
    return any(names and frozen.issuperset(names) for names in (width.makes, width.reads))


def _apart(edits: Sequence[Widen]) -> list[Widen]:
    """Edits of which none grows what another one has grown: of one module's output only one number is asked for."""
    return list({edit.at: edit for edit in reversed(edits)}.values())[::-1]


def _lists(model: nn.Module) -> Iterator[str]:
    """Paths of containers whose children are alike: same class, same tensors."""
    for path, module in named_modules(model).items():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0:
            kinds = {_kind(child) for child in module}
            if len(kinds) == 1 and not passes(module) and any(p.requires_grad for p in module.parameters()):
                yield path


def _kind(module: nn.Module) -> tuple[Any, ...]:
    return type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
