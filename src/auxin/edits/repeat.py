"""``Repeat`` lets blocks of a list run again with the same weights; ``Untie`` gives each weights of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from auxin.anatomy.blocks import Container, in_full, number, passes
from auxin.anatomy.depth import followed, numbered, numbers
from auxin.anatomy.probe import Call, PlanContext
from auxin.change import Change, New, Rewire
from auxin.edits.duplicate import shared_hooks, twin_of
from auxin.edits.start import fade_in, finish
from auxin.errors import GrowthError
from auxin.gate import close_gates, gated, open_gate
from auxin.listing import join, named_parameters

ORDERS = ("stack", "interleave")
STATES = ("copy", "fresh")


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Lets blocks of the list at ``at`` run again with the same weights: deeper, and no new parameters (tied depth).

    Each further pass is a module of its own that holds the very Parameters of the block that it repeats, so optimizers
    and averages stay as they are. Buffers (the statistics of a BatchNorm), the position in the list (``layer_idx``, by
    which caches are kept), modes and hooks are each pass's own. The function changes, unless the passes fade in.

    Args:
        at: path of a ModuleList, a Sequential or a ModuleDict with numeric keys.
        blocks: (i, j): the blocks i, ..., j - 1, as in a slice; None: all.
        times: how often they run in all, from 2.
        order: "stack" (ABAB: the whole range again) or "interleave" (AABB: each block again behind itself).
        fade: optimizer steps over which the further passes fade in, ``x + a (f(x) - x)``; 0: they run at once.

    Sources: Universal Transformers (Dehghani et al., arXiv:1807.03819); ALBERT (Lan et al., arXiv:1909.11942).

    Examples:
        >>> Repeat("blocks", blocks=(1, 3)).sources(4)
        [0, 1, 2, 1, 2, 3]
    """

    at: str
    blocks: Sequence[int] | None = None
    times: int = 2
    order: str = "stack"
    fade: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.blocks, list):
            object.__setattr__(self, "blocks", tuple(self.blocks))
        where = f"Repeat(at={self.at!r}, blocks={self.blocks!r}, times={self.times!r}, order={self.order!r})"
        if type(self.times) is not int or self.times < 2:
            raise GrowthError(f"{where}: times is how often the blocks run in all, a whole number from 2.")
        if self.order not in ORDERS:
            raise GrowthError(f"{where}: order is 'stack' (ABAB) or 'interleave' (AABB).")
        if type(self.fade) is not int or self.fade < 0:
            raise GrowthError(f"Repeat(at={self.at!r}, fade={self.fade!r}): fade is a number of optimizer steps.")

    def check(self, model: nn.Module) -> None:
        """Check that the list at ``at`` has these blocks.

        Raises:
            GrowthError: there is no list, or it is too short.
        """
        self._range(len(Container.list_at(model, self.at, "Repeat").names))

    @property
    def needs_probe(self) -> str:
        """Why it cannot be planned without a batch; empty where it can."""
        said = f"Repeat(at={self.at!r}, fade={self.fade}) needs one batch: pass probe=batch; or fade=0."
        return said if self.fade else ""

    def sources(self, length: int) -> list[int]:
        """The index of the block that runs at each position of the new depth, for a list of ``length`` blocks."""
        first, end = self._range(length)
        again = [*range(first, end)] * self.times
        return [*range(first), *(sorted(again) if self.order == "interleave" else again), *range(end, length)]

    def _range(self, length: int) -> tuple[int, int]:
        found = (0, length) if self.blocks is None else self.blocks
        pair = isinstance(found, tuple) and len(found) == 2 and all(type(i) is int for i in found)
        if not pair or not 0 <= found[0] < found[1] <= length:
            where = f"Repeat(at={self.at!r}, blocks={self.blocks!r}, times={self.times!r}, order={self.order!r})"
            raise GrowthError(
                f"{where}: {self.at!r} holds {length} blocks; blocks=(i, j) names those from i to j - 1, with "
                f"0 <= i < j <= {length}, and None all of them."
            )
        return found[0], found[1]

    def plan(self, model: nn.Module, context: PlanContext) -> Change:
        """Build the further passes and say where they stand. Writes to nothing."""
        container = Container.list_at(model, self.at, "Repeat")
        sources, known = self.sources(len(container.names)), numbers(container)
        homes = {source: position for position, source in reversed(list(enumerate(sources)))}
        again = {position: source for position, source in enumerate(sources) if homes[source] != position}
        assigns = followed(model, container, sources, homes, known)
        fades = bool(self.fade) and not context.structural
        calls = self._calls(container, context) if fades else {}
        items: list[str | New] = [container.names[source] for source in sources]
        for position, source in again.items():
            path = join(container.path, container.names[source])
            twin = twin_of(model, container.child(source), f"Repeat(at={self.at!r}): {path}", tied=True)
            close_gates(twin)  # of a block that is fading in itself
            if fades and not (source in calls and _fades_in(model, container, source, twin, calls[source])):
                raise GrowthError(
                    f"Repeat(at={self.at!r}, fade={self.fade}): a further pass of {path} cannot fade in: for that it "
                    "must return one tensor of the shape of its input, which the network hands on as it is, and hold "
                    "weights that train. fade=0 runs it again at once, which changes the function."
                )
            items[position] = New(twin, path, numbers=numbered(twin, known, position), gated=fades, tied=True)
            number(twin, numbered(twin, known, position))
        return finish(
            model,
            dataclasses.replace(self, blocks=self._range(len(container.names))),
            context,
            container,
            container.renumbered(items),
            assigns=assigns,
            preserves=fades,
            how="fade-in" if fades else "the same weights",
            gates=tuple(join(container.path, str(position)) for position in again) if fades else (),
            fade=self.fade,
            remarks=tuple(shared_hooks(container, list(again.values()))),
        )

    def _calls(self, container: Container, context: PlanContext) -> dict[int, Call]:
        """What arrives at each block, for a pass that fades in."""
        if not context.has_probe:
            raise GrowthError(self.needs_probe)
        seen, _ = context.calls({name: container.child(i) for i, name in enumerate(container.names)})
        return {i: seen[name] for i, name in enumerate(container.names) if name in seen}


def _fades_in(model: nn.Module, container: Container, source: int, twin: nn.Module, call: Call) -> bool:
    """Whether a further pass of a block can fade in; then it gets its gate."""
    block, name = container.child(source), container.names[source]
    others = next((again.values() for again in passes(container.module) if name in again), ())
    tried = in_full(model, block, others)
    if tried is block:  # not spread over ranks
        return fade_in(twin, call)
    close_gates(tried)
    fades = fade_in(tried, call)
    if fades:
        open_gate(twin)
    return fades


@dataclasses.dataclass(frozen=True)
class Untie:
    """Gives every block of the list at ``at`` that runs the weights of another weights of its own; the function stays.

    It does not matter whether ``Repeat`` or the network's own code let them share. The first of them keeps the weights,
    the others get copies. What something else holds as well stays shared.

    Args:
        at: path of a ModuleList, a Sequential or a ModuleDict.
        state: optimizer state of the copies: "copy", that of the shared weight, or "fresh".

    Examples:
        >>> Untie("blocks").state
        'copy'
    """

    at: str
    state: str = "copy"

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise GrowthError(f"Untie(at={self.at!r}, state={self.state!r}): state is one of 'copy', 'fresh'.")

    def check(self, model: nn.Module) -> None:
        """Check that there is a container at ``at``.

        Raises:
            GrowthError: there is none.
        """
        Container.at(model, self.at, "Untie")

    def plan(self, model: nn.Module, context: PlanContext) -> Change:
        """Copy what is shared. Writes to nothing."""
        container = Container.at(model, self.at, "Untie")
        new: dict[str, New] = {}
        sources: dict[int, nn.Parameter] = {}
        for together in passes(container.module):
            for name, block in [*together.items()][1:]:
                path, own = join(container.path, name), named_parameters(block)
                if next(gated(block), None) is not None:
                    raise GrowthError(f"Untie(at={self.at!r}): {path} is still fading in. Untie it once it is whole.")
                twin = twin_of(model, block, f"Untie(at={self.at!r}): {path}", apart=together.values())
                sources |= {id(p): own[n] for n, p in named_parameters(twin).items() if p is not own[n]}
                new[name] = New(twin, path, tied=False)
        if not sources:
            raise GrowthError(
                f"Untie(at={self.at!r}): no two blocks of {self.at!r} run the same weights, so there is nothing to "
                f"untie. Repeat({self.at!r}) lets blocks run again with the same ones."
            )
        rewire = Rewire(container.path, tuple((name, new.get(name, name)) for name in container.names))
        return finish(
            model,
            self,
            context,
            container,
            rewire,
            sources=sources if self.state == "copy" else {},
            preserves=True,
            how="weights of their own",
        )
