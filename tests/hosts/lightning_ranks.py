"""Run by `test_lightning_long.py`: two processes train together as Lightning starts them, grow, resume and test."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lit
import torch
from lightning.pytorch.strategies import DDPStrategy
from lit import Lit, batches, built, growing, saving, trainer
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)
lit.BATCHES = 4


def doubles(share: slice) -> DataLoader[Any]:
    x, y = batches().dataset.tensors  # pyright: ignore[reportAttributeAccessIssue]
    whole = len(x[share])
    return DataLoader(TensorDataset(x[share].double(), y[share].double()), batch_size=whole // lit.BATCHES)


def halves() -> DataLoader[Any]:
    """Each process takes every other sample, so that both together see the batches of one."""
    return doubles(slice(int(os.environ.get("LOCAL_RANK", "0")), None, 2))


def together(path: Path, *callbacks: Any) -> Any:
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    return trainer(path, *callbacks, devices=2, strategy=strategy, use_distributed_sampler=False)


def spread(strategy: Any, module: Lit) -> float:
    """The largest difference between the processes."""
    whole = torch.cat([p.detach().flatten() for p in module.parameters()])
    both = strategy.all_gather(whole)
    return float((both[0] - both[1]).abs().max())


def main(path: Path) -> None:
    module, callback = built(schedule="onecycle").double(), growing()
    made = together(path, callback, saving(path / "run"))
    made.fit(module, halves(), halves())
    found: dict[str, Any] = {"blocks": len(module.blocks), "spread": spread(made.strategy, module)}
    assert callback.grower is not None
    found["wrapped"] = [type(c).__name__ for c in callback.grower.companions]
    kept = torch.cat([p.detach().flatten() for p in module.parameters()]).clone()

    again = built(schedule="onecycle").double()
    resumed = together(path, growing())
    resumed.fit(again, halves(), halves(), ckpt_path=path / "run" / "epoch=2.ckpt")
    found["resumed"] = float((torch.cat([p.detach().flatten() for p in again.parameters()]) - kept).abs().max())
    found["resumed spread"] = spread(resumed.strategy, again)

    made.test(module, halves(), ckpt_path=path / "run" / "epoch=1.ckpt", verbose=False)
    found["before"] = len(module.blocks)
    if made.global_rank == 0:
        alone = built(schedule="onecycle").double()
        trainer(path, growing()).fit(alone, doubles(slice(None)), doubles(slice(None)))
        found["alone"] = float((torch.cat([p.detach().flatten() for p in alone.parameters()]) - kept).abs().max())
        found["steps"] = made.global_step / lit.BATCHES
        (path / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
