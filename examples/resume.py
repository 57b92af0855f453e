"""A run that may be killed at any moment; the same command starts it again, and it goes on as if nothing had happened.

python examples/resume.py run/resume
torchrun --standalone --nproc-per-node 2 --max-restarts 100 examples/resume.py run/resume
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import auxin as ax

EPOCHS, BATCH, SAVE_EVERY = 6, 16, 5


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(dim, 2 * dim), nn.Dropout(0.1), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(self.drop(torch.relu(self.up(x))))


rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.manual_seed(0)
x = torch.randn(256, 4)
data = TensorDataset(x, x.sin().sum(1, keepdim=True))
net = model = nn.Sequential(nn.Linear(4, 16), nn.Sequential(Block(16)), nn.Linear(16, 1))
if ranks > 1:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    model = nn.parallel.DistributedDataParallel(net)
opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, EPOCHS * len(data) // BATCH)
ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
grower = ax.Grower(model, opt, sched, ema, edits=ax.Duplicate("1", by=1), when=ax.when.at([20, 45, 70]), probe=x[:8])
torch.manual_seed(rank)  # of dropout, for each process its own


def batches(epoch, first):
    """The batches of an epoch, in an order that only its number decides, from the one with number ``first`` on."""
    order = torch.Generator().manual_seed(epoch)
    shuffled = torch.randperm(len(data), generator=order)[rank::ranks].split(BATCH // ranks)
    return DataLoader(data, batch_sampler=shuffled[first:], generator=order)


folder, at = Path(sys.argv[1]), {"epoch": 0, "batch": 0}
if any(folder.glob("checkpoint-*")):
    at = ax.load(folder, grower)  # network, optimizer, schedule, average, journal, random numbers
    print("resumed at", at, flush=True)

stop = []
if ranks == 1:
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))  # a flag and no more: a step is half-done here

for epoch in range(at["epoch"], EPOCHS):
    for batch, (inputs, wanted) in enumerate(batches(epoch, at["batch"]), start=at["batch"] + 1):
        loss = nn.functional.mse_loss(model(inputs), wanted)
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        ema.update_parameters(net)
        grower.step(loss.item())
        if rank == 0:
            print(epoch, batch, loss.item().hex(), len(net[1]), flush=True)  # in hexadecimal, which hides no bit
        if stop or batch % SAVE_EVERY == 0:
            ax.save(grower, folder, extra={"epoch": epoch, "batch": batch})
        if stop:
            sys.exit(128 + signal.SIGTERM)
    at = {"epoch": epoch + 1, "batch": 0}
if ranks > 1:
    dist.barrier()
    dist.destroy_process_group()
