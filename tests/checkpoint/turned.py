"""A run whose parameters, buffers and optimizer state lie in memory by columns, or channels last."""

import torch
from torch import Tensor, nn

import auxin as ax


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.register_buffer("mask", torch.ones(4, 5).t())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.norm(x)))


class Turned(torch.optim.Optimizer):
    """Steps in eigenvectors, which it keeps by columns, as ``torch.linalg.eigh`` returns them."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            grad, state = p.grad.reshape(len(p), -1), self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
                state["basis"] = torch.linalg.eigh(grad @ grad.T + torch.eye(len(p)))[1]
            state["momentum"].mul_(0.9).add_((state["basis"] @ grad).reshape(p.shape))
            p.sub_(state["momentum"], alpha=0.01)


ax.follow(Turned, like=torch.optim.SGD)


def built() -> nn.Module:
    """A small network of convolutions."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Block(), Block()), nn.Conv2d(4, 1, 1))
    return model.to(memory_format=torch.channels_last)


class Run:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = built()
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.optimizer = Turned(self.model.parameters())
        words = {"when": ax.when.every(1000), "edits": ax.Duplicate("1", by=1), "probe": torch.zeros(2, 3, 8, 8)}
        self.grower = ax.Grower(self.model, self.optimizer, self.average, **words)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            self.optimizer.zero_grad()
            self.model(torch.randn(2, 3, 8, 8)).square().mean().backward()
            self.optimizer.step()
            self.average.update_parameters(self.model)
            self.grower.step()

    def seen(self) -> dict[str, Tensor]:
        """All tensors of the run."""
        held = {**self.model.state_dict(), **{f"average.{n}": t for n, t in self.average.state_dict().items()}}
        for name, p in self.model.named_parameters():
            held |= {f"{name} {key}": tensor for key, tensor in self.optimizer.state[p].items()}
        return held


def go_on(path: str, out: str) -> None:
    """In a new process: load the run, train on, and write what it has become."""
    run = Run()
    ax.load(path, run.grower)
    run.steps(6, 9)
    torch.save(run.seen(), out)
