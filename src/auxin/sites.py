"""``sites``: where a network can take a layer, and by which edit; found by one forward on one batch."""

from __future__ import annotations

import functools
import html
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.activations import not_one_tensor, probing
from auxin.anatomy.blocks import CONTAINERS, Container, passes
from auxin.anatomy.gradients import nodes_behind
from auxin.anatomy.placed import takes_another
from auxin.anatomy.probe import Call, PlanContext, Probe, tensors_in
from auxin.anatomy.tree import unwrap
from auxin.anatomy.zero_init import arriving, first_tensor
from auxin.edits.after import channel_axis
from auxin.edits.zeroing import kind_of
from auxin.errors import GrowthError, reason
from auxin.listing import join, listing, unnumbered
from auxin.modules import Dormant
from auxin.output_hook import NAME, has_grown
from auxin.verify import without_values
from auxin.widths import Widths, widths_of


@dataclass(frozen=True)
class Site:
    """One module of a network, as a place to grow.

    Attributes:
        at: its path.
        shape: of its output on the probe; None where that is not one floating tensor.
        dtype: of that output.
        calls: how often it ran.
        parameters: scalars that it holds, its children's included.
        flops: of its forwards, per sample (a multiply-add is two).
        fits: the edits that fit, as one would write them.
        why_not: why ``After`` does not; "" where it does.
    """

    at: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    calls: int
    parameters: int
    flops: float
    fits: tuple[str, ...]
    why_not: str


class Sites(list[Site]):
    """A list of sites that prints as a table; places that differ only in their numbers share a row, ``blocks.*.fc``."""

    def __init__(self, sites: Iterable[Site] = (), context: PlanContext | None = None):
        super().__init__(sites)
        self._context = context

    @functools.cached_property
    def widths(self) -> Widths:
        """The widths of the network: what of it grows together, and by which ``Widen``; a list of ``Width``.

        One more forward, when it is first asked for (or printed).
        """
        return Widths() if self._context is None else widths_of(self._context)

    def __str__(self) -> str:
        return "\n\n".join(filter(None, [self._table(), str(self.widths)]))

    def _table(self) -> str:
        rows = [HEADER, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        lines = []
        for row in rows:
            padded = zip(HEADER, row, widths, strict=True)
            cells = [f"{cell:>{width}}" if name in NUMBERS else f"{cell:<{width}}" for name, cell, width in padded]
            lines.append("  ".join(cells).rstrip())
        fit = sum(not site.why_not for site in self)
        return "\n".join([*lines, f"{fit} of {len(self)} modules take a layer behind them (After)"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self._rows()]
        head = "".join(f"<th>{name}</th>" for name in HEADER)
        table = f"<table>{''.join(f'<tr>{row}</tr>' for row in (head, *rows))}</table>"
        return table + self.widths._repr_html_()

    def _rows(self) -> Iterator[tuple[str, ...]]:
        groups: dict[tuple[Any, ...], list[Site]] = {}
        for site in self:
            kinds = tuple(text.partition("(")[0] for text in site.fits)
            facts = site.shape, site.dtype, site.calls, site.parameters, site.flops, kinds, site.why_not
            groups.setdefault((unnumbered(site.at), *facts), []).append(site)
        for (pattern, shape, dtype, calls, parameters, flops, kinds, why), alike in groups.items():
            yield (
                alike[0].at if len(alike) == 1 else f"{pattern} ({len(alike)})",
                "-" if shape is None else " x ".join(map(str, shape)),
                "-" if dtype is None else str(dtype).removeprefix("torch."),
                f"{calls:,}",
                f"{parameters:,}",
                f"{flops:,.0f}",
                "; ".join(filter(None, [", ".join(kinds), f"no After: {why}" if why else ""])),
            )


HEADER = ("at", "output", "dtype", "calls", "parameters", "FLOPs", "what fits")
NUMBERS = HEADER[3:6]


def sites(model: nn.Module, probe: Probe) -> Sites:
    """Every module of a network as a place to grow: what comes out of it, what it costs, which edits fit.

    One forward in eval mode, with gradients on, as a training step would do it: a module whose output no gradient comes
    back to is no place for a layer. Whatever the forward writes is put back. What is listed fits by shape and by use;
    an edit itself proves more before it is kept.

    Args:
        model: the network.
        probe: one batch, as for ``grow``.

    Returns:
        A list of ``Site`` in the order of ``model.named_modules()``, without the model itself; ``print`` shows a table.

    Raises:
        GrowthError: there is no probe, the network does not run on it, or some of its weights have values and others
            are on the meta device.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [site.fits for site in sites(net, torch.randn(3, 4))][0]
        ("After('0')",)
    """
    model = unwrap(model)
    if probe is None:
        raise GrowthError("sites(model, probe): it needs one batch to see what runs; pass one, as to the model.")
    network = listing(model)
    for problem in without_values(network.parameters, network.modules):
        raise GrowthError(f"sites: {problem}.")
    context = PlanContext(model, probe)
    seen = _seen(context)
    batch = next((t.shape[0] for t in tensors_in(context.batch) if t.dim()), 1) or 1
    running = {above for path, own in seen.items() if own.count for above in _above(path)}
    fixed = _fixed_blocks(context, seen, running)
    lists = _block_lists(model, seen, fixed)
    found = Sites(context=context)
    for path, module in model.named_modules():
        if module is model:
            continue
        own, why = seen[path], _why_not(model, path, module, seen[path])
        fits = (*(() if why else (f"After({path!r})",)), *_others(path, module, running, lists, fixed))
        shapes = () if own.odd else own.shapes
        shape, dtype = next(iter(shapes), (None, None))
        size = sum(p.numel() for p in module.parameters())
        found.append(
            Site(path, None if shape is None else tuple(shape), dtype, own.count, size, own.flops / batch, fits, why)
        )
    return found


@dataclass
class _Seen:
    """What one module did in the forward."""

    count: int = 0
    odd: str = ""
    shapes: dict[tuple[torch.Size, torch.dtype], None] = field(default_factory=dict)
    nodes: list[Any] = field(default_factory=list)
    flops: float = 0.0
    unused: bool = False
    keeps_shape: bool = False


def _seen(context: PlanContext) -> dict[str, _Seen]:
    """One forward with hooks on everything."""
    from torch.utils.flop_counter import FlopCounterMode  # only where it is asked for

    seen = {path: _Seen() for path, _ in context.model.named_modules()}
    try:
        with probing(context), torch.enable_grad(), FlopCounterMode(display=False) as counter:
            watched = [
                pair for pair in context.model.named_modules() if not isinstance(pair[1], torch.jit.ScriptModule)
            ]
            for path, module in watched:
                _watch(module, seen[path], counter)
            outputs = list(tensors_in(context.run()))
    except GrowthError:
        raise
    except Exception as error:  # whatever a user's forward raises
        raise GrowthError(
            f"sites: {type(context.model).__name__} does not run on the probe: {reason(error)}. Pass the batch as the "
            "training loop calls the model: a tensor, a tuple of positional arguments, or a dict of keywords."
        ) from error
    used = nodes_behind(outputs)
    for one in seen.values():
        one.unused = bool(used and one.nodes) and not any(node in used for node in one.nodes)
        one.nodes = []
    return seen


def _watch(module: nn.Module, own: _Seen, counter: Any) -> None:
    started: list[int] = []

    def before(*_: Any) -> None:
        started.append(counter.get_total_flops())

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        own.count += 1
        own.flops += counter.get_total_flops() - started.pop()
        given, made = arriving(Call(args, kwargs, None)), first_tensor(output)
        own.keeps_shape = given is not None and made is not None and given[0].shape == made.shape
        own.odd = own.odd or not_one_tensor(output)
        if isinstance(output, Tensor):
            own.shapes[output.shape, output.dtype] = None
            own.nodes += [output.grad_fn] if output.grad_fn is not None else []

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, with_kwargs=True)


def _why_not(model: nn.Module, path: str, module: nn.Module, own: _Seen) -> str:
    """Why ``After`` does not fit, or ""."""
    inside = [".".join(path.split(".")[:i]) for i in range(path.count(".") + 2)]
    if any(isinstance(model.get_submodule(known), torch.jit.ScriptModule) for known in inside):
        return "part of a ScriptModule"
    if not own.count:
        return "not called on this probe"
    if own.odd:
        return f"returns {own.odd}"
    if own.unused:
        return "the network's output does not depend on what it returns"
    if not has_grown(module) and hasattr(module, NAME):
        return f"has an attribute {NAME!r} of its own"
    shapes = [shape for shape, _ in own.shapes]
    if any(len(shape) < 2 for shape in shapes):
        return "its output has no channels"
    axis = channel_axis(model, path, module, shapes[0])
    sizes = sorted({shape[axis] for shape in shapes})
    return f"called with several widths: {', '.join(map(str, sizes))}" if len(sizes) > 1 else ""


def _above(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _fixed_blocks(context: PlanContext, seen: Mapping[str, _Seen], running: set[str]) -> set[str]:
    """Blocks whose parts forward calls, and never them: it unpacks them, or names their entries.

    Not those that take one more entry, as stages do: of each list one is tried, with a layer more that returns what it
    is given.
    """
    found: set[str] = set()
    for path, module in context.model.named_modules():
        inner = {join(path, name): child for name, child in module._modules.items() if child is not None}
        inner = {known: child for known, child in inner.items() if known in running and not seen[known].count}
        if not isinstance(module, CONTAINERS) or len({kind_of(child) for child in inner.values()}) != 1:
            continue
        at, first = next(iter(inner.items()))
        if not isinstance(first, CONTAINERS) or not takes_another(context, at):
            found |= set(inner)
    return found


def _block_lists(model: nn.Module, seen: Mapping[str, _Seen], fixed: set[str]) -> set[str]:
    """Paths of the lists of repeated blocks.

    Of two lists within each other it is the outer one if all of its entries are blocks (a block may hold a list of its
    own), else the inner one (stages, of which one or the other happens to keep the shape).
    """
    found: dict[str, bool] = {}
    for path, module in model.named_modules():
        if (
            not isinstance(module, CONTAINERS)
            or path in fixed
            or any(path.startswith(f"{p}.") and whole for p, whole in found.items())
        ):
            continue
        container = Container(path, module, tuple(module._modules))
        children = {join(path, name): child for name, child in module._modules.items()}
        blocks = [known in fixed or _is_block(known, child, seen) for known, child in children.items()]
        if container.numbered and not passes(module) and any(blocks):
            found[path] = all(blocks)
    return {path for path, whole in found.items() if whole or not any(p.startswith(f"{path}.") for p in found)}


def _is_block(path: str, module: nn.Module | None, seen: Mapping[str, _Seen]) -> bool:
    """Whether a child of a list runs once, returns what it is given in shape, and has parts and parameters."""
    own = seen.get(path)
    if module is None or own is None or own.count != 1 or not own.keeps_shape:
        return False
    return bool(module._modules) and next(module.parameters(), None) is not None


def _others(path: str, module: nn.Module, running: set[str], lists: set[str], fixed: set[str]) -> Iterator[str]:
    """The edits other than ``After`` that fit, as one would write them."""
    if path in lists:
        yield f"Duplicate({path!r})"
    if isinstance(module, CONTAINERS) and path not in fixed:
        if running & ({join(path, name) for name in module._modules} or {path}):
            numbered = Container(path, module, tuple(module._modules)).numbered
            yield f"Insert({path!r}, layer)" if numbered else f"Insert({path!r}, layer, key=...)"
    if isinstance(module, Dormant):
        yield f"Wake({path!r})"
