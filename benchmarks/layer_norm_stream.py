"""What the optimizer's state of a residual stream under LayerNorm is off by after it has got wider.

New entries of the stream are the mean of the old ones, so that each old entry of what writes to it gets another
gradient than before: less its part of the gradients of the new entries. Moments are carried over as they are. Here
they are compared with those that a network would have that was as wide all along, and both are trained on.

    python benchmarks/layer_norm_stream.py
"""

import copy
import statistics

import torch
from torch import nn
from torch.nn import functional as F

import auxin as ax

SEEDS, BEFORE, SETTLE, AFTER, RATE = 5, 400, 300, 300, 3e-3


class Block(nn.Module):
    def __init__(self, dim, heads=4):
        super().__init__()
        self.heads, self.n1, self.n2 = heads, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out, self.up, self.down = (
            nn.Linear(a, b) for a, b in ((dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim))
        )

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Gpt(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, dim), nn.Parameter(torch.randn(7, dim))
        self.blocks, self.norm, self.head = (
            nn.Sequential(Block(dim), Block(dim)),
            nn.LayerNorm(dim),
            nn.Linear(dim, 11, bias=False),
        )

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embed(ids) + self.place)))


def loss_of(net, draw, rows=16):
    ids = torch.randint(0, 11, (rows, 7), generator=draw)
    return F.cross_entropy(net(ids).flatten(0, 1), (ids.cumsum(1) % 11).flatten())


def train(net, optimizer, steps, seed):
    draw, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(net, draw)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad()
    return losses


def settled(net):
    """The moments at these weights, of an optimizer that goes nowhere."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0)
    train(net, optimizer, SETTLE, seed=999)
    return optimizer


def gradients(net):
    loss_of(net, torch.Generator().manual_seed(77), rows=320).backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    return found


def off(mine, true):
    return float((mine - true).norm() / true.norm())


def one(seed):
    """How far gradients and moments of what writes to the stream are off, and losses with carried, true, no moments."""
    torch.manual_seed(seed)
    net = Gpt()
    train(net, torch.optim.AdamW(net.parameters(), lr=RATE), BEFORE, seed)
    optimizer, before = settled(net), gradients(net)
    change = ax.grow(net, ax.Widen("embed", to=40), optimizer, probe=torch.randint(0, 11, (16, 7)))
    after, wide = gradients(net), copy.deepcopy(net)
    true = settled(wide)
    moments = {name: (optimizer.state[p], true.state[wide.get_parameter(name)]) for name, p in net.named_parameters()}
    found = []
    for move in change.moves:
        number = next((n for n, axis in enumerate(move.axes or ()) if axis.mean), None)
        if number is not None:
            old = (slice(None),) * number + (slice(32),)
            mine, right = moments[move.name]
            pairs = ((mine[key][old], right[key][old]) for key in ("exp_avg", "exp_avg_sq"))
            found.append((off(after[move.name][old], before[move.name]), *(off(*pair) for pair in pairs)))
    losses = {}
    for kind, place in (("carried", 0), ("as wide all along", 1), ("none", None)):
        again = copy.deepcopy(net)
        adam = torch.optim.AdamW(again.parameters(), lr=RATE)
        for name, p in again.named_parameters() if place is not None else ():
            adam.state[p] = {key: value.clone() for key, value in moments[name][place].items()}
        losses[kind] = train(again, adam, AFTER, seed + 50)
    return found, losses


def main():
    """Print medians and maxima over the tensors, and mean losses."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    runs = [one(seed) for seed in range(SEEDS)]
    for name, column in zip(
        ("gradient", "exp_avg", "exp_avg_sq"), zip(*sum((r[0] for r in runs), []), strict=True), strict=True
    ):
        print(f"{name:10} median {statistics.median(column):.3f} max {max(column):.3f}")
    for kind in runs[0][1]:
        spans = [statistics.mean(sum((r[1][kind][a:b] for r in runs), [])) for a, b in ((0, 20), (20, 100), (200, 300))]
        print(f"{kind:18}", *(f"{value:.4f}" for value in spans))


if __name__ == "__main__":
    main()
