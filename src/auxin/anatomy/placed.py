"""Blocks that forward takes apart: ``for attention, feedforward in self.layers``. It calls their parts, never them.

No call of such a block can be looked at. What a new one does to the network is seen on the whole network: it is run on
the probe with the block in its place, and what arrives at every other layer is compared with what arrives there now.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.probe import Call, PlanContext, tensors_in, untouched
from auxin.anatomy.tree import is_scripted, parts, registrations
from auxin.change import Alias, Assign, Change, New, Rewire
from auxin.randomness import random_state
from auxin.structure import Undo, apply, undo

PLACED = "its parts called by the network"
TOLERANCE = 1e-6


class Placed(Call):
    """The whole network on the probe with one more module in a container. Run it inside ``guarded``.

    Args:
        context: the network on the probe.
        rewire: how the container gets the module; its ``New`` says where.
        aliases: plain lists that follow.
        assigns: counters that follow.
    """

    def __init__(self, context: PlanContext, rewire: Rewire, aliases: Sequence[Alias], assigns: Sequence[Assign]):
        super().__init__((), {}, None)
        self.context, self.rewire, self.aliases, self.assigns = context, rewire, aliases, assigns
        self._before: list[tuple[int, Tensor]] | None = None

    def run(self, module: nn.Module) -> Any:
        """The network's output with ``module`` in the new place."""
        children = ((name, New(module) if isinstance(child, New) else child) for name, child in self.rewire.children)
        rewire = Rewire(self.rewire.path, tuple(children))
        with spliced(self.context.model, rewire, self.aliases, self.assigns), random_state(seed=0):
            return self.context.run()

    def rests(self, module: nn.Module) -> bool:
        """Whether the network computes with ``module`` what it computes without."""
        if self._before is None:
            with self._watched() as self._before, random_state(seed=0):
                self._see(None, self.context.run())
        with self._watched() as after:
            self._see(None, self.run(module))
        shared = {id(part) for part in module.modules()}  # with the rest of the network: these run once more
        old, new = ([pair for pair in seen if pair[0] not in shared] for seen in (self._before, after))
        return len(old) == len(new) and all(a[0] == b[0] and _close(a[1], b[1]) for a, b in zip(old, new, strict=True))

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[tuple[int, Tensor]]]:
        """What arrives at each layer of the network, in order."""
        self._seen: list[tuple[int, Tensor]] = []
        leaves = [m for m in self.context.model.modules() if not m._modules and not is_scripted(m)]
        handles = [m.register_forward_pre_hook(lambda m, *given: self._see(m, given), with_kwargs=True) for m in leaves]
        try:
            with torch.no_grad():
                yield self._seen
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, module: nn.Module | None, values: Any) -> None:
        self._seen += [(id(module), t.detach().clone()) for t in tensors_in(values)]


def guarded(call: Call | None) -> contextlib.AbstractContextManager[Any]:
    """Where a ``Placed`` may be run: everything that the network writes as it runs is put back afterwards."""
    return untouched(call.context.model) if isinstance(call, Placed) else contextlib.nullcontext()


@contextlib.contextmanager
def spliced(model: nn.Module, rewire: Rewire, aliases: Sequence[Alias], assigns: Sequence[Assign]) -> Iterator[None]:
    """Let new modules stand in a container inside, with the plain lists and the counters that follow."""
    undos: list[Undo] = []
    followed = tuple(dataclasses.replace(alias, rewire=rewire) for alias in aliases)
    try:
        apply(model, Change(None, rewires=(rewire,), aliases=followed, assigns=tuple(assigns)), undos=undos)
        yield
    finally:
        undo(undos)


def taken_apart(context: PlanContext, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the blocks of which the network calls parts on the probe."""
    run: set[int] = set()
    times, found = registrations(context.model.modules()), []
    with untouched(context.model), torch.no_grad():
        for block in blocks:
            found.append(block)
            for part in parts(block, times):
                part.register_forward_hook(lambda *_, block=block: run.add(id(block)))
        context.run()
    return [block for block in found if id(block) in run]


def takes_another(context: PlanContext, path: str) -> bool:
    """Whether a container's forward would call one more entry at its end (one forward)."""
    witness = Witness()
    entries = context.model.get_submodule(path)._modules
    key = str(len(entries)) if "0" in entries else "another"
    rewire = Rewire(path, (*((name, name) for name in entries), (key, New(witness))))
    try:
        with untouched(context.model), torch.no_grad(), spliced(context.model, rewire, (), ()):
            context.run()
    except Exception:  # too many values to unpack, or whatever a user's forward raises
        return False
    return witness.called


class Witness(nn.Identity):
    """Says whether it was called."""

    called = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what it is given first."""
        self.called = True
        return args[0]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    size = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE * max(1.0, size), equal_nan=True)
