"""Triggers from outside of the training loop: another thread, or a file that somebody puts down."""

import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auxin.errors import GrowthError
from auxin.when.checks import as_built, check_state
from auxin.when.reading import Reading


def signal() -> "_Signal":
    """Fires at the next call of `grower.step` after its `set()` was called, from any thread.

    Several `set()` before one `grower.step` are one firing. What was set and has not fired yet is saved, and
    fires after the resume. Going back in a run (`undo`, a `trial`, a load) does not unsay a `set()` that no
    step has seen.

    Returns:
        A trigger with `set()`, and `waiting`, which says whether it will fire at the next step.

    Examples:
        >>> trigger = signal()
        >>> trigger.set()
        >>> [trigger(Reading(None, {}, call, 0, 0, call)) for call in (1, 2)]
        [True, False]
    """
    return _Signal()


def file(path: "str | os.PathLike[str]") -> "_File":
    """Fires when a file appears at `path`, e.g. by `touch run/grow` in a shell.

    The file is moved aside to `path` + ".taken" (over an earlier one) before it fires, so that it fires once,
    and once only where several processes look for it. Nobody reads it, so it may be empty, unreadable or half
    written. A file that is there at the first step fires at the first step. What cannot be moved, such as a
    directory of that name, does not fire; a warning says so once. It costs one call of the file system per
    step. A file that was taken after the last checkpoint does not fire again in the resumed run.

    Args:
        path: Where to look; relative to the working directory of this moment. Its directory must exist.

    Returns:
        A trigger.

    Raises:
        GrowthError: If there is no such directory, or `path` is a directory itself.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> trigger = file(folder / "grow")
        >>> (folder / "grow").touch()
        >>> [trigger(Reading(None, {}, call, 0, 0, call)) for call in (1, 2)]
        [True, False]
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise GrowthError(f"file({path!r}): pass the path of a file, file('run/grow').")
    return _File(os.fspath(path))


class _Signal:
    def __init__(self) -> None:
        self._set = threading.Event()
        self._restored = False

    def set(self) -> None:
        """Fire at the next step."""
        self._set.set()

    @property
    def waiting(self) -> bool:
        """Whether it fires at the next step."""
        return self._restored or self._set.is_set()

    def __call__(self, reading: Reading) -> bool:
        fires = self.waiting
        if fires:
            self._set.clear()
            self._restored = False
        return fires

    def state_dict(self) -> dict[str, bool]:
        return {"waiting": self.waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(self, state, ("waiting",))
        self._restored = bool(state["waiting"])

    def __repr__(self) -> str:
        return "signal()"


@dataclass(eq=False, repr=False)
class _File:
    path: str
    place: Path = field(init=False)
    warned: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.place = Path(self.path).absolute()
        if self.place.is_dir():
            raise GrowthError(f"{self!r}: this is a directory. Name a file in it, file({self.path + '/grow'!r}).")
        if not self.place.parent.is_dir():
            raise GrowthError(
                f"{self!r}: there is no directory {str(self.place.parent)!r} where the file could appear. "
                f"Create it first: os.makedirs({str(self.place.parent)!r})."
            )

    def __call__(self, reading: Reading) -> bool:
        if not os.path.lexists(self.place):
            return False
        try:
            if self.place.is_dir():
                raise IsADirectoryError("it is a directory")
            os.replace(self.place, f"{self.place}.taken")
        except FileNotFoundError:  # another process was faster
            return False
        except OSError as error:
            self._warn(error)
            return False
        return True

    def _warn(self, error: OSError) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{self!r} does not fire: what is at {str(self.place)!r} cannot be moved to "
                f"{self.place.name + '.taken'!r} ({error.strerror or error}). Remove what is in the way.",
                stacklevel=5,
            )

    def state_dict(self) -> dict[str, bool]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(self, state, ())

    def __repr__(self) -> str:
        return as_built("file", self)
