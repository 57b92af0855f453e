"""Surgery on a network under FSDP2: what a user's code may put in there, and how all ranks come to hold the same.

New modules are plain. Before they are sharded as those beside them, every rank is given the values of rank 0, and the
old modules are put back, so that the change is carried out as that of an edit is.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from auxin import agreed
from auxin.change import Change
from auxin.errors import GrowthError
from auxin.listing import every_tensor
from auxin.ranks import Ranks
from auxin.record import Record
from auxin.sharded import is_spread, settle
from auxin.structure import Undo, undo

BY_AN_EDIT = "Put a new module in its place inside the block, or let an edit do it: Widen(at), Replace(at, layer)."


def alike_on_ranks(model: nn.Module, tree: Record, ranks: Ranks) -> tuple[str, ...]:
    """Let new tensors hold the same values on every rank. Every rank must call it.

    Args:
        model: as the user's code has left it.
        tree: as it was.
        ranks: of the network.

    Returns:
        What is to be said of sharded tensors that were written to, on whichever rank.

    Raises:
        GrowthError: a tensor that was not there before is sharded, an old one has another shape, or ranks differ.
    """
    settle(model)
    old = {id(t) for t in tree.tensors}
    with ranks.agree("surgery: what is new") as said:
        new = {name: t for name, t in every_tensor(model) if id(t) not in old}
        _check(new, tree)
        said += agreed.structure(model)
    ranks.broadcast(list({id(t): t for t in new.values()}.values()))
    sharded = {name: p for name, p in tree.parameters.items() if is_spread(p)}
    told = ranks.share("surgery: what was written to", lambda: [n for n, p in sharded.items() if not tree.holds(p)])
    written = [name for name in sharded if any(name in names for names in told)]
    return tuple(f"{name} holds other values: its states, and averages, keep theirs" for name in written)


def _check(new: dict[str, Tensor], tree: Record) -> None:
    for name, tensor in new.items():
        if is_spread(tensor):
            raise GrowthError(
                f"surgery: {name} is new, and sharded already (fully_shard inside the block?). Put plain modules in: "
                "they are sharded as those beside them when the block ends."
            )
    for name, tensor in {**tree.parameters, **tree.buffers}.items():
        if tensor.shape != tree.shapes[id(tensor)]:
            raise GrowthError(
                f"surgery: {name} has another shape than before, which is not done under FSDP2 (fully_shard). "
                f"{BY_AN_EDIT}"
            )


def put_before(change: Change, tree: Record) -> None:
    """Give the modules that a change touches the children, parameters and buffers back that they had before it."""
    for path in {part.path for part in (*change.rewires, *change.swaps)}:
        for slot in ("_modules", "_parameters", "_buffers"):
            held = getattr(tree.modules[path], slot)
            before = dict(tree.inner(path, slot))
            held.clear()
            held.update(before)


def followed_by(keep: Callable[[Undo], None], undos: list[Undo]) -> Callable[[Undo], None]:
    """The same ``keep``, given a way back that takes back what the user's code has done as well."""

    def both(way: Undo) -> None:
        def back() -> None:
            way()
            undo(undos)

        keep(back)

    return both
