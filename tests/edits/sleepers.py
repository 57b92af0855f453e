"""Networks with a sleeping layer in every kind of place, and one loop to train them."""

import torch
from torch import nn

import auxin as ax


class Plain(nn.Module):
    """As a plain attribute."""

    def __init__(self, width=20, out=20):
        super().__init__()
        self.first = nn.Linear(10, width)
        self.extra = ax.Dormant(nn.Linear(width, out))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.extra(torch.tanh(self.first(x)))))


class InSequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), ax.Dormant(nn.Linear(20, 20)), nn.Linear(20, 4))

    def forward(self, x):
        return self.net(x)


class InList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(10, 20), ax.Dormant(nn.Linear(20, 20)), nn.Linear(20, 4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class InDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict(
            {"a": nn.Linear(10, 20), "more": ax.Dormant(nn.Linear(20, 20)), "z": nn.Linear(20, 4)}
        )

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


PLACES = {Plain: "extra", InSequential: "net.2", InList: "layers.1", InDict: "layers.more"}


def awake_twin(model, at):
    """The network that a person would have written with the layer awake, with the same weights."""
    import copy

    twin = copy.deepcopy(model)
    parent, _, name = at.rpartition(".")
    holder = twin.get_submodule(parent)
    holder._modules[name] = holder._modules[name].layer
    for p in twin.parameters():
        p.requires_grad_(True)
    return twin


def inputs(seed=0, width=10):
    return torch.randn(8, width, generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, steps=3, average=None, x=None):
    """Steps of any optimizer, LBFGS too."""
    for seed in range(steps):
        batch = inputs(seed) if x is None else x

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else (closure(), optimizer.step())
        if average is not None:
            average.update_parameters(model)
    optimizer.zero_grad()


def bits(tensor):
    return tensor.detach().numpy().tobytes()


def whole(model, *companions):
    """Everything of a run, to the bit and by identity, to compare with later."""
    run = [[(n, id(p), bits(p), p.requires_grad) for n, p in model.named_parameters()]]
    run.append([(n, id(m), m.training) for n, m in model.named_modules()])
    for c in companions:
        if isinstance(c, torch.optim.Optimizer):
            run.append([[id(p) for p in g["params"]] for g in c.param_groups])
            run.append({id(p): {k: repr(v) for k, v in s.items()} for p, s in c.state.items()})
        else:
            run.append([(n, id(p), bits(p)) for n, p in c.named_parameters()])
    return run
