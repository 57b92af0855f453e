"""Networks that any code resizes, and by hand: where each entry of each tensor comes from."""

import torch
from torch import nn

SAME = object()


class Pair(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(self.rnn(x[:, None].repeat(1, 3, 1))[0][:, -1])


class Attention(nn.Module):
    """Single head with a fused projection; the head dimension is what grows."""

    def __init__(self, dim=4, inner=3):
        super().__init__()
        self.inner, self.qkv, self.out = inner, nn.Linear(dim, 3 * inner), nn.Linear(inner, dim)

    def forward(self, x):
        q, k, v = self.qkv(x.view(-1, 4, 4)).split(self.inner, -1)
        return self.out((q @ k.transpose(1, 2) * 0.5).softmax(-1) @ v).mean(1)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x.view(-1, 1, 4, 4))))).flatten(1)


def put(module, name, index, axis, fresh=0.0, value=None, new=False):
    """Rewrite a tensor along one axis, as a person would: entry by entry; -1 is ``fresh``."""
    old = getattr(module, name).data
    rows = []
    for number, place in enumerate(index):
        row = torch.full_like(old.select(axis, 0), fresh) if place < 0 else old.select(axis, place)
        rows.append(row if value is None else row * value[number])
    made = torch.stack(rows, axis)
    if new:
        setattr(module, name, nn.Parameter(made))
    elif isinstance(getattr(module, name), nn.Parameter):
        getattr(module, name).data = made
    else:
        setattr(module, name, made)


def pair(index, incoming=None, outgoing=None, new=False):
    """Widen, prune or reorder the hidden units of a Pair; born rows are random, born columns zero."""

    def change(net):
        put(net.up, "weight", index, 0, fresh=0.3, new=new)
        put(net.up, "bias", index, 0, fresh=0.1, new=new)
        for name, fresh in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            put(net.norm, name, index, 0, fresh=fresh, new=new and name in ("weight", "bias"))
        put(net.down, "weight", index, 1, value=outgoing, new=new)
        net.up.out_features = net.norm.num_features = net.down.in_features = len(index)

    come = (index, None, incoming)
    spec = {name: {0: come} for name in ("up.weight", "up.bias", "norm.weight", "norm.bias")}
    return Pair, change, {**spec, "down.weight": {1: (index, outgoing, None)}}


def gates(kind, count):
    """One more hidden unit: its row goes in behind those of its gate."""
    per_gate = [place for gate in range(count) for place in (*range(3 * gate, 3 * gate + 3), -1)]
    hidden = [0, 1, 2, -1]

    def change(net):
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0", "weight_hh_l0"):
            put(net.rnn, name, per_gate, 0, fresh=0.2)
        put(net.rnn, "weight_hh_l0", hidden, 1)
        put(net.out, "weight", hidden, 1)
        net.rnn.hidden_size = net.out.in_features = 4

    spec = {f"rnn.{name}": {0: (per_gate, None, None)} for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0")}
    spec["rnn.weight_hh_l0"] = {0: (per_gate, None, None), 1: (hidden, None, None)}
    return (lambda: Recurrent(kind)), change, {**spec, "out.weight": {1: (hidden, None, None)}}


def runs():
    """Fused q, k, v: one more entry at the end of each run."""
    index = [0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1]

    def change(net):
        put(net.qkv, "weight", index, 0)
        put(net.qkv, "bias", index, 0)
        with torch.no_grad():
            net.qkv.weight[11] = 0.4  # the new values are read by a zero column
        put(net.out, "weight", [0, 1, 2, -1], 1)
        net.inner, net.qkv.out_features, net.out.in_features = 4, 12, 4

    spec = {"qkv.weight": {0: (index, None, None)}, "qkv.bias": {0: (index, None, None)}}
    return Attention, change, {**spec, "out.weight": {1: ([0, 1, 2, -1], None, None)}}


def channels():
    index = [0, 1, -1, -1, 2, 3]

    def change(net):
        put(net.first, "weight", index, 0, fresh=0.2)
        put(net.first, "bias", index, 0)
        for name, fresh in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            put(net.norm, name, index, 0, fresh=fresh)
        put(net.second, "weight", index, 1)
        net.first.out_channels = net.norm.num_features = net.second.in_channels = 6

    names = ("first.weight", "first.bias", "norm.weight", "norm.bias")
    return Images, change, {**{n: {0: (index, None, None)} for n in names}, "second.weight": {1: (index, None, None)}}


def head():
    """Classes are added: a new module takes over the old rows."""

    def change(net):
        wider = nn.Linear(6, 5)
        with torch.no_grad():
            wider.weight[:3], wider.bias[:3] = net.down.weight, net.down.bias
        net.down = wider

    index = [0, 1, 2, -1, -1]
    return Pair, change, {"down.weight": {0: (index, None, None)}, "down.bias": {0: (index, None, None)}}


TILED = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
COPIED = [0, 1, 2, 3, 4, 5, 1, 4, 4]
COUNTS = [1, 2, 1, 1, 3, 1, 2, 3, 3]

RESIZES = {
    "front": pair([-1, -1, 0, 1, 2, 3, 4, 5]),
    "middle": pair([0, 1, 2, -1, 3, 4, 5]),
    "end": pair([0, 1, 2, 3, 4, 5, -1]),
    "pruned": pair([1, 2, 4]),
    "pruned-new-parameters": pair([0, 3, 5], new=True),
    "permuted": pair([3, 5, 0, 1, 4, 2]),
    "tiled-halved": pair(TILED, incoming=[0.5] * 12, outgoing=[0.5] * 12),
    "net2wider": pair(COPIED, incoming=[1 / c for c in COUNTS], outgoing=[1 / c for c in COUNTS]),
    "pruned-and-widened": pair([-1, 5, 0, 2]),
    "gru-per-gate": gates(nn.GRU, 3),
    "lstm-per-gate": gates(nn.LSTM, 4),
    "per-run": runs(),
    "channels": channels(),
    "head": head(),
}
PRESERVED = set(RESIZES) - {"pruned", "pruned-new-parameters", "pruned-and-widened", "head"}


def by_hand(old, spec, fresh, power):
    """Entry by entry what a tensor holds: ``power`` of the gradient scale, or None for the value scale."""
    shape = [len(spec[a][0]) if a in spec else size for a, size in enumerate(old.shape)]
    result = fresh.expand(shape).clone()
    for axis_places in torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape)).tolist():
        come = [spec[a][0][i] if a in spec else i for a, i in enumerate(axis_places)]
        if min(come) < 0:
            continue
        value = old[tuple(come)]
        for a, i in enumerate(axis_places):
            scales = spec[a][1 if power is None else 2] if a in spec else None
            if scales is not None and power != 0:
                scale = torch.tensor(scales[i], dtype=torch.float64)
                value = (value * (scale if power is None else scale**power)).to(old.dtype)
        result[tuple(axis_places)] = value
    return result
