"""A run grows, is killed in the middle, and goes on in a new process as if nothing had happened, to the last bit.

    python examples/resume.py

The run is a process of its own and saves every few steps. A growth comes after the last checkpoint, so the resumed run
has to repeat it. `whole` is the same run without the kill: the losses of both are compared bit by bit.
"""

import os
import signal
import subprocess
import sys
import tempfile

import torch
from torch import nn

import auxin as ax

STEPS, SAVE_EVERY, KILL_AT = 60, 8, 45


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.inp, self.out = nn.Linear(4, dim), nn.Linear(dim, 1)
        self.blocks = nn.ModuleList([Block(dim)])

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def build():
    """Everything as it was at the start; both the first run and the resumed one begin here."""
    torch.manual_seed(0)
    model = Net()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    growing = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.at([15, 30, 42]), "probe": torch.ones(8, 4)}
    return model, opt, sched, ema, ax.Grower(model, opt, sched, ema, **growing)


def train(folder, first=0, kill=False, resume=False):
    """Print step, loss and number of blocks of every step; the loss in hexadecimal, which hides no bit."""
    model, opt, sched, ema, grower = build()
    if resume:
        first = ax.load(folder, grower)["step"]
    for step in range(first + 1, STEPS + 1):
        x = torch.randn(64, 4)  # `load` has put the random generators back, so the data go on too
        loss = nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True))
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        ema.update_parameters(model)
        grower.step(loss.item())
        print(step, loss.item().hex(), len(model.blocks), flush=True)
        if step % SAVE_EVERY == 0:
            ax.save(grower, folder, extra={"step": step})
        if kill and step == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def in_new_process(what, folder):
    run = subprocess.run([sys.executable, __file__, what, folder], stdout=subprocess.PIPE, text=True)
    lines = (line.split() for line in run.stdout.splitlines())
    return run.returncode, {int(step): (loss, int(blocks)) for step, loss, blocks in lines}


def main():
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        code, killed = in_new_process("killed", one)
        print(f"killed:  exit code {code} after step {max(killed)}, with {killed[max(killed)][1]} blocks")
        _, resumed = in_new_process("resumed", one)
        print(f"resumed: steps {min(resumed)} to {max(resumed)}, from {resumed[min(resumed)][1]} blocks")
        _, whole = in_new_process("whole", other)
    assert code == -signal.SIGKILL and min(resumed) <= KILL_AT < max(resumed) == STEPS
    assert whole == killed | resumed, "the resumed run is another one"
    print(f"equal to the run that was not killed, to the last bit: {len(resumed)} losses, {whole[STEPS][1]} blocks")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        train(sys.argv[2], kill=sys.argv[1] == "killed", resume=sys.argv[1] == "resumed")
    else:
        main()
