"""A small LightningModule, its data, and a Trainer that writes only where it is told."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from auxin import Duplicate, when
from auxin.hosts.lightning import GrowthCallback

BATCHES = 2
EPOCHS = 6
SCHEDULERS: dict[str, Callable[[Any], Any] | None] = {
    "none": None,
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=EPOCHS * BATCHES),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS * BATCHES),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 10)),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}

WITH_AVERAGES = pytest.mark.skipif(
    not hasattr(L.pytorch.callbacks, "WeightAveraging"), reason="Lightning 2.6 brought WeightAveraging"
)

for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|litlogger|logging interval|exists and is not empty).*")


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Lit(L.LightningModule):
    """A user's module, with nothing of auxin in it."""

    def __init__(self, depth: int = 2, schedule: str = "none", lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block(8) for _ in range(depth))
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        hparams: Any = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), lr=hparams.lr)
        make = SCHEDULERS[hparams.schedule]
        if make is None:
            return optimizer
        by = {"interval": "epoch", "monitor": "val_loss"} if hparams.schedule == "plateau" else {"interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **by}}


def built(**options: Any) -> Lit:
    torch.manual_seed(0)
    return Lit(**options)


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16 * BATCHES, 4, generator=generator)
    return DataLoader(TensorDataset(x, torch.sin(3 * x).sum(1, keepdim=True)), batch_size=16)


def growing(counts: Any = (2, 4), **options: Any) -> GrowthCallback:
    words = {"monitor": "val_loss", "edits": Duplicate("blocks", by=1), "when": when.at(counts)}
    return GrowthCallback(**{**words, **options})


def saving(path: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path, monitor="val_loss", save_top_k=-1, filename="{epoch}", **options)


def trainer(path: Path, *callbacks: Any, epochs: int = EPOCHS, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    if not any(isinstance(c, ModelCheckpoint) for c in callbacks):
        quiet["enable_checkpointing"] = False
    words = {"max_epochs": epochs, "accelerator": "cpu", "default_root_dir": path, **quiet, **options}
    return L.Trainer(callbacks=list(callbacks), **words)


def fit(module: Lit, path: Path, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    made = trainer(path, *callbacks, **options)
    made.fit(module, batches(), batches(), ckpt_path=ckpt_path)
    return made
