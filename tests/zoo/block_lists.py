"""Which lists of a network hold blocks that repeat: each is called once, and keeps the shape of what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.probe import tensors_in, untouched


@dataclass(frozen=True)
class BlockList:
    """A ModuleList or Sequential at ``at`` of ``length`` children, those at ``blocks`` being blocks that repeat."""

    at: str
    length: int
    blocks: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The last block that repeats once more, behind itself."""
        last = self.blocks[-1]
        return tuple(range(last + 1)) + tuple(range(last, self.length))


def block_lists(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inner: bool = False
) -> list[BlockList]:
    """The lists of a network that Duplicate may be asked for.

    Args:
        model: the network.
        args: its positional arguments.
        kwargs: its keyword arguments.
        inner: the lists inside a block of another list, which are left out otherwise.
    """
    lists = {p: m for p, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1}
    seen: dict[int, list[bool]] = {}
    children = {id(c): c for m in lists.values() for c in m}
    with untouched(model), torch.no_grad():
        for child in children.values():
            child.register_forward_hook(
                lambda m, a, k, o: seen.setdefault(id(m), []).append(_keeps(a, k, o)), with_kwargs=True
            )
        model(*args, **kwargs)
    found: list[BlockList] = []
    for path, module in lists.items():
        blocks = tuple(i for i, c in enumerate(module) if seen.get(id(c)) == [True] and _is_block(c))
        if blocks:
            found.append(BlockList(path, len(module), blocks))
    nested = [any(one.at.startswith(f"{other.at}.") for other in found) for one in found]
    return [one for one, within in zip(found, nested, strict=True) if within == inner]


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _keeps(args: Any, kwargs: dict[str, Any], output: Any) -> bool:
    given = next((v for v in args if isinstance(v, Tensor)), None)
    if given is None:
        named = [v for v in kwargs.values() if isinstance(v, Tensor)]
        given = kwargs.get("hidden_states", named[0] if named else None)
    made = next(tensors_in(output), None)
    return isinstance(given, Tensor) and given.is_floating_point() and made is not None and made.shape == given.shape
