"""NeuralForecast and Darts, each in an environment of its own (`make forecasting`): growing in tiny models."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import auxin as ax

QUIET = dict(
    accelerator="cpu",
    enable_progress_bar=False,
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
)
PAST, AHEAD = 12, 4


def hush() -> None:
    """Only results are of interest."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "darts"):
        logging.getLogger(name).setLevel(logging.ERROR)


def values(length: int = 120) -> np.ndarray:
    """A noisy sine."""
    noise = np.random.RandomState(0).randn(length)
    return (np.sin(np.arange(length) / 3) + 0.1 * noise).astype(np.float32)


def given(net: nn.Module, run: Callable[[], Any]) -> tuple[Any, tuple[Any, ...]]:
    """What ``run`` returns, and what the library hands to the network on the way: a probe."""
    seen: list[tuple[Any, ...]] = []
    handle = net.register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        return run(), seen[0]
    finally:
        handle.remove()


def grow_while_fitting(edit: Any) -> Any:
    """A callback that grows the network after the second step of training, and remembers what came of it."""
    import pytorch_lightning as pl

    class Growing(pl.Callback):
        def __init__(self) -> None:
            self.change: Any = None
            self.before: dict[str, torch.Tensor] = {}
            self.unmoved: list[str] = []  # new tensors that stood still while those that they copy moved

        def __deepcopy__(self, memo: Any) -> Any:  # NeuralForecast copies what it is given
            return self

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.handle = pl_module.register_forward_pre_hook(self.keep)

        def keep(self, module: nn.Module, args: tuple[Any, ...]) -> None:
            self.args = args

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step != 2 or self.change is not None:
                return
            self.handle.remove()
            (optimizer,) = trainer.optimizers
            optimizer.zero_grad()
            self.change = ax.grow(pl_module, edit, optimizer, probe=self.args)
            ax.verify(pl_module, optimizer)
            self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if self.change is None:
                return
            now = dict(pl_module.named_parameters())
            still = {n for n, p in now.items() if p.requires_grad and torch.equal(p, self.before[n])}
            for path, new in self.change.added:
                source = self.change.renamed.get(new.source, new.source)
                names = [n.removeprefix(f"{path}.") for n in still if n.startswith(f"{path}.")]
                self.unmoved += [f"{path}.{n}" for n in names if f"{source}.{n}" not in still]

    return Growing()
