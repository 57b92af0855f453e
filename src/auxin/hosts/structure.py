"""The way back to the structure that a network began with: a checkpoint may be older than a growth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from auxin.errors import GrowthError
from auxin.journal import fingerprint, replay
from auxin.ramp import resumed
from auxin.record import contents_of, refill


class Structure:
    """Notes what growths change in a network, by reference, and undoes it. Values are left to a checkpoint.

    Args:
        model: the network as it was first built.

    Example:
        >>> from auxin import Duplicate, grow
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> structure = Structure(net)
        >>> with structure.noting():
        ...     _ = grow(net, Duplicate("", by=1, output="keep"))
        >>> structure.back()
        >>> len(net)
        2
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._origin = fingerprint(model)
        self._changed: list[tuple[Any, list[Any]]] = []

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """What is changed inside can be taken back."""
        before = contents_of([self.model])
        try:
            yield
        finally:
            self._changed += [(held, content) for held, content in before if _differs(held, content)]

    def back(self) -> None:
        """Return to the structure of the beginning.

        Raises:
            GrowthError: something else has changed it.
        """
        while self._changed:
            refill(*self._changed.pop())
        if fingerprint(self.model) != self._origin:
            raise GrowthError(
                f"{type(self.model).__name__} was changed by other code too, so the way back to the structure that it "
                "began with is not known. Build it afresh, and load the checkpoint into that."
            )

    def take_to(self, saved: Mapping[str, Any] | None, allow: Iterable[Any]) -> bool:
        """Go to the structure that ``saved`` (with the state of a Grower) tells of; None: to that of the beginning.

        Returns:
            Whether anything is another object now, or may be.

        Raises:
            GrowthError: it was another network.
        """
        before = fingerprint(self.model)
        if not has_grown(self.model, saved):
            self.back()
        if saved is not None:
            with self.noting():
                replay(self.model, saved["grower"]["journal"], allow=allow)
                resumed(saved["grower"]["ramps"], self.model, (), (self.model,))
        return before != fingerprint(self.model) or (saved is not None and bool(saved["grower"]["ramps"]))


def has_grown(model: nn.Module, saved: Mapping[str, Any] | None) -> bool:
    """Whether a network has the structure that ``saved`` (with the state of a Grower) tells of, and has grown to it."""
    journal = saved["grower"]["journal"] if saved is not None else []
    return bool(journal) and journal[-1]["fingerprint"] == fingerprint(model)


def _differs(held: Any, content: list[Any]) -> bool:
    now = list(held.items()) if isinstance(held, dict) else list(held)
    if len(now) != len(content):
        return True
    pairs = zip(now, content, strict=True)
    if isinstance(held, dict):
        return any(key is not old_key or value is not old for (key, value), (old_key, old) in pairs)
    return any(item is not old for item, old in pairs)
