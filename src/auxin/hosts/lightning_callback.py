"""A Callback of whichever Lightning package is in use, and what it refuses in a Trainer."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

from auxin.anatomy.wrappers import networks_of
from auxin.errors import GrowthError
from auxin.hosts.common import warn_untested

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
TESTED = ("2.5", "2.6")
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")


class _Plain:
    """What stands between a class and ``object``: without it ``__bases__`` cannot be assigned."""


class AnyCallback(_Plain):
    """A Callback of whichever Lightning package is in use; a program may import that one after auxin."""

    def __new__(cls, *args: Any, **kwargs: Any) -> AnyCallback:
        """Take the Callback of what is loaded now for a base class: Lightning asks for it."""
        loaded = [sys.modules[name] for name in PACKAGES if hasattr(sys.modules.get(name), "Callback")]
        AnyCallback.__bases__ = tuple(package.Callback for package in loaded or [_installed()])
        return super().__new__(cls)


def _installed() -> Any:
    for name in PACKAGES:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise GrowthError("GrowthCallback needs Lightning: pip install lightning.")


def check(trainer: Any, pl_module: Any, callback: Any) -> None:
    """Refuse what could not be kept in step.

    Raises:
        GrowthError: says what, and the way round.
    """
    package = type(trainer).__module__.partition(".")[0]
    warn_untested(package, sys.modules[package].__version__, *TESTED)
    if any(isinstance(other, AnyCallback) and other is not callback for other in trainer.callbacks):
        raise GrowthError("two GrowthCallbacks in one Trainer: pass one, with edits=[...]; it may choose among many.")
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__ if kind.__name__ in SHARDED]
    if kinds:
        raise GrowthError(
            f"strategy={kinds[0]} splits the network over processes, under which it cannot grow. Use strategy='ddp'; "
            "or grow between two runs: auxin.hosts.lightning.load_from_checkpoint, auxin.grow, and a new fit."
        )
    if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
        raise GrowthError(
            "this strategy (ddp_spawn, ddp_fork, ddp_notebook) trains in processes from which only weights come back, "
            "into a module that has not grown. Use strategy='ddp' in a script; in a notebook, one device."
        )
    modules = pl_module.named_modules()
    inside = [name for name, module in modules if any(copy is not module for copy in networks_of(module))]
    if inside:
        raise GrowthError(
            f"{type(pl_module).__name__}.{inside[0]} is an average inside the module, which would not follow. Use the "
            "callback EMAWeightAveraging or WeightAveraging of Lightning, which does."
        )
    own = type(pl_module).forward
    if (getattr(own, "__module__", None) or "").startswith(("lightning.", "pytorch_lightning.")):
        name = type(pl_module).__name__
        raise GrowthError(
            f"{name} has no forward, and every growth is proved by running it on a batch. Write "
            "one that takes the inputs and returns what the network says: def forward(self, x): return self.net(x)"
        )
