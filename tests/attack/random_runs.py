"""Random small runs from a few words: networks of every kind, optimizers, schedules; rebuilt alike in every process."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax
from auxin.anatomy.blocks import passes
from auxin.gate import gated

DIM = 4


def silent(*_: Any) -> None:
    """A hook that does nothing."""


class Plain(nn.Module):
    """x + W f(V norm(x))."""

    def __init__(self, wrap: Any = None, dropout: float = 0.0, dim: int = DIM):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(dim), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(dim, 6), nn.Linear(6, dim)
        if wrap is not None:
            wrap(self.up)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.relu(self.up(self.norm(x)))))


class Conv(nn.Module):
    """A residual block with BatchNorm."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(dim, DIM, 3, padding=1, bias=False), nn.BatchNorm2d(DIM)
        self.second, self.bn2 = nn.Conv2d(DIM, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.second(torch.relu(self.bn1(self.first(x)))))


class Attention(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mix = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.mix(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Recurrent(nn.Module):
    """A residual LSTM."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(dim, 5, batch_first=True), nn.Linear(5, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.lstm(x)[0])


class Post(nn.Module):
    """norm(x + W f(V x)), which no zeros make the identity: it fades in."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(dim, 6), nn.Linear(6, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Gated(nn.Module):
    """SwiGLU with a fused projection behind an RMSNorm, and a GLU beside it."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(dim), nn.Linear(dim, 12), nn.Linear(6, dim)
        self.wide, self.back = nn.Linear(dim, 8), nn.Linear(4, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        gate, up = self.up(y).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up) + self.back(functional.glu(self.wide(y), -1))


class Joined(nn.Module):
    """Two branches of unequal width, one of them in groups, concatenated, and split in unequal parts."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.left, self.right = 3, 5
        self.up, self.norm, self.other = nn.Linear(dim, 6), nn.GroupNorm(3, 6), nn.Linear(dim, 4)
        self.mix = nn.Linear(10, self.left + self.right)
        self.one, self.two = nn.Linear(self.left, dim), nn.Linear(self.right, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(torch.cat([self.other(x), torch.relu(self.norm(self.up(x)))], -1))
        a, b = y.split([self.left, self.right], -1)
        return x + self.one(torch.relu(a)) + self.two(torch.tanh(b))


class Net(nn.Module):
    """An entry, blocks, a tail of plain layers, an exit; ``kind`` says which."""

    def __init__(self, kind: str, depth: int, tied: bool, frozen: bool, hooked: bool, dropout: float):
        super().__init__()
        self.kind, self.depth = kind, depth
        self.entry: nn.Module = nn.Embedding(7, DIM) if kind == "gpt" else nn.Linear(3, DIM)
        self.side = nn.Linear(DIM, DIM).requires_grad_(not frozen)
        make = {
            "mlp": functools.partial(Plain, None, dropout),
            "shared": functools.partial(Plain, None, dropout),
            "normed": functools.partial(Plain, weight_norm, dropout),
            "cnn": Conv,
            "gpt": Attention,
            "lstm": Recurrent,
            "post": Post,
            "gated": Gated,
            "joined": Joined,
        }[kind]
        self.blocks = nn.ModuleList(make() for _ in range(depth))
        self.tail = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM))
        self.extra: nn.Module = ax.Dormant(nn.Linear(DIM, DIM))
        self.exit = nn.Linear(DIM, 7 if kind == "gpt" else 2, bias=kind != "gpt")
        if kind == "gpt" and tied:
            self.exit.weight = self.entry.weight
        elif tied:
            self.tail[2].weight = self.tail[0].weight
        if kind == "shared":
            self.again = self.blocks
        if hooked:
            self.blocks[0].register_forward_hook(silent)
            self.entry.register_full_backward_hook(silent)
            next(self.blocks[-1].parameters()).register_hook(silent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        x = x + self.side(x)
        if self.kind == "cnn":
            x = x.unflatten(0, (2, -1)).unflatten(1, (2, -1)).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x)
        if self.kind == "shared":
            for block in self.again:
                x = block(x)
        if self.kind == "cnn":
            x = x.mean((2, 3))
        return self.exit(self.extra(self.tail(x)))


BLOCKS = {
    "mlp": Plain,
    "shared": Plain,
    "normed": functools.partial(Plain, weight_norm),
    "cnn": Conv,
    "gpt": Attention,
    "lstm": Recurrent,
    "post": Post,
    "gated": Gated,
    "joined": Joined,
}
UNITS = {"cnn": "first", "gpt": "mlp.0", "lstm": "lstm"}  # what makes the hidden units of a block; elsewhere "up"
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "fused sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "foreach adam": lambda groups: torch.optim.Adam(groups, lr=0.01, foreach=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.01), weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05, initial_accumulator_value=0.1),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=1.0),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.01, t0=2),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
}


def _sequence(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.MultiStepLR(optimizer, [5, 9])]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])


def falling(epoch: int) -> float:
    """A schedule as a function."""
    return 0.98**epoch


SCHEDULES: dict[str, Any] = {
    "none": None,
    "step": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, falling),
    "cycle": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 4, cycle_momentum=False),
    "sequence": _sequence,
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.7),
}


class Run:
    """One run, as ``words`` say."""

    def __init__(self, words: dict[str, Any]):
        torch.manual_seed(words["seed"])
        self.words, self.kind = words, words["kind"]
        network = {name: words[name] for name in ("kind", "depth", "tied", "frozen", "hooked", "dropout")}
        self.model = Net(**network)
        self.optimizer = OPTIMIZERS[words["optimizer"]](self._groups(words["groups"]))
        schedule = SCHEDULES[words["schedule"]]
        self.schedule = None if schedule is None else schedule(self.optimizer)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=words["buffers"])
        self.companions = [c for c in (self.optimizer, self.schedule, self.average) if c is not None]
        self.probe = self._batch(torch.Generator().manual_seed(5))
        self.grower = ax.Grower(
            self.model,
            *self.companions,
            edits=[*self.edits(), *self.widenings()],
            when=ax.when.every(10**6),
            probe=self.probe,
            keep=words["keep"],
            group={"lr": 0.004} if words["own"] else None,
            rewarm=words["rewarm"],
        )
        self.grower.when.load_state_dict(self.grower.when.state_dict())

    def _groups(self, kind: str) -> list[Any]:
        """All in one group, by decay, the exit first, or with names."""
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        if kind == "named":
            return named
        if kind == "one":
            return [p for _, p in named]
        first = [p for n, p in named if (p.dim() > 1 if kind == "decay" else n.startswith("exit"))]
        rest = [p for _, p in named if not any(p is q for q in first)]
        return [{"params": first, "lr": 0.02}, {"params": rest}] if first and rest else [*first, *rest]

    @property
    def dim(self) -> int:
        """Of the residual stream."""
        return self.model.tail[0].in_features

    def block(self) -> Any:
        """What makes one more block that fits."""
        return BLOCKS[self.kind] if self.dim == DIM else functools.partial(BLOCKS[self.kind], dim=self.dim)

    def edits(self) -> list[Any]:
        """What may be grown in depth."""
        inner, last = self.model.tail[0].out_features, self.model.exit.in_features
        wakes = isinstance(self.model.extra, ax.Dormant) and self.model.extra.layer.in_features == last
        copies = [
            ax.Duplicate("blocks", by=1, fade=5),
            ax.Duplicate("blocks", by=1, order="last", state="copy", fade=2),
            ax.Duplicate("blocks", by=2, order="stack", output="keep"),
        ]
        again = [ax.Repeat("blocks", blocks=(0, 1), fade=2), ax.Repeat("blocks", order="interleave")]
        if passes(self.model.blocks):
            fading = any(True for _ in gated(self.model.blocks))
            copies = [again[0]] if fading else [ax.Untie("blocks"), ax.Untie("blocks", state="fresh")]
        return [
            *copies,
            *again,
            ax.Insert("blocks", self.block(), index=0, fade=3),
            ax.Insert("tail", functools.partial(nn.Linear, inner, inner), index=1, init="identity"),
            ax.Insert("tail", functools.partial(nn.Linear, last, last), init="kaiming"),
            ax.Replace("tail.1", nn.Sigmoid),
            *([ax.Wake("extra", fade=4 * self.words["rewarm"])] if wakes else []),
        ]

    def widenings(self) -> list[Any]:
        """What may be grown in width."""
        units = UNITS.get(self.kind, "up")
        step = {"gated": 2, "joined": 2}.get(self.kind, 1)
        others = {
            "gated": ax.Widen("blocks.*.wide", by=4, init="split"),
            "joined": ax.Widen("blocks.*.other", by=2, init="pair"),
            "gpt": ax.Widen("blocks.0.mix", by=2, unit="heads"),
        }
        rows = ax.Widen("entry", by=2, unit="rows", outputs=True)
        return [
            ax.Widen(f"blocks.*.{units}", by=2 * step),
            ax.Widen(f"blocks.*.{units}", by=2 * step, init="split"),
            ax.Widen("blocks.0." + units, by=2 * step, init="pair"),
            ax.Widen(f"blocks.*.{units}", by=step, init="split", noise=0.1, state="reset"),
            ax.Widen("entry", by=2),
            ax.Widen("entry", by=2, init="split"),
            ax.Widen("tail.0", by=1),
            ax.Widen("tail.2", by=2, init="pair"),
            ax.Widen("tail.0", by=3, init="tile", lr="mup"),
            rows if self.kind == "gpt" else ax.Widen("exit", by=1, outputs=True),
            others.get(self.kind, ax.Widen("entry", by=1, init="random")),
        ]

    def _batch(self, generator: torch.Generator | None = None) -> Tensor:
        if self.kind == "gpt":
            return torch.randint(0, 7, (2, 5), generator=generator)
        return torch.randn((3, 4, 3) if self.kind == "lstm" else (8, 3), generator=generator)

    def train(self, count: int) -> list[str]:
        """Steps on data from the global generator; the losses to the bit."""
        losses = []
        for _ in range(count):
            out = self.model(self._batch())
            loss = (out - out.detach().roll(1, 0) * 0.5 - 0.1).square().mean()
            loss.backward()
            self.optimizer.step()
            if isinstance(self.schedule, lr_scheduler.ReduceLROnPlateau):
                self.schedule.step(loss.item())
            elif self.schedule is not None:
                self.schedule.step()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.model)
            losses.append(loss.item().hex())
        return losses

    def operate(self, deed: str) -> None:
        """By hand, as a user would."""
        model = self.model
        if deed == "block" and self.kind != "normed":  # what a parametrization is made of has no plain form
            model.blocks.append(self.block()())
        elif deed == "tail":
            model.tail.append(nn.Linear(model.exit.in_features, model.exit.in_features))
        elif deed == "thaw":
            model.side.requires_grad_(not model.side.weight.requires_grad)
        elif deed == "rows" and self.kind != "gpt":
            exit_ = model.exit
            exit_.weight.data = torch.cat([exit_.weight.data, torch.zeros(1, exit_.in_features)])
            exit_.bias.data = torch.cat([exit_.bias.data, torch.zeros(1)])
            exit_.out_features += 1
        elif deed in ("units", "order", "fewer") and self.kind in ("mlp", "shared", "post", "lstm"):
            self._reshape(deed)
        else:
            model.tail[0] = nn.Linear(model.tail[0].in_features, model.tail[0].out_features)

    def _reshape(self, deed: str) -> None:
        """Hidden units of the first block are added, reordered or taken out, drawn by the numbers of its size."""
        block = self.model.blocks[0]
        size = block.lstm.hidden_size if self.kind == "lstm" else block.up.out_features
        places = torch.arange(size)
        if deed == "order":
            places = places.roll(1 + size // 3)
        elif deed == "fewer":
            places = places[1:] if size > 2 else places
        else:
            at = size // 2
            places = torch.cat([places[:at], torch.tensor([-1]), places[at:]])
        rows = torch.cat([torch.where(places < 0, -1, places + gate * size) for gate in range(4)])
        if self.kind == "lstm":
            for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0", "weight_hh_l0"):
                _put(getattr(block.lstm, name), rows, 0, 0.1)
            _put(block.lstm.weight_hh_l0, places, 1, 0.0)
            _put(block.out.weight, places, 1, 0.0)
            block.lstm.hidden_size = block.out.in_features = len(places)
        else:
            _put(block.up.weight, places, 0, 0.3)
            _put(block.up.bias, places, 0, 0.1)
            _put(block.down.weight, places, 1, 0.0)
            block.up.out_features = block.down.in_features = len(places)


def _put(parameter: nn.Parameter, places: Tensor, axis: int, born: float) -> None:
    """Entries of a parameter by their old places along an axis; -1 is a new one."""
    old = parameter.data
    new = old.index_select(axis, places.clamp(min=0))
    new.index_fill_(axis, (places < 0).nonzero().flatten(), born)
    parameter.data = new


def resumed(words: dict[str, Any], folder: str, steps: int) -> dict[str, Any]:
    """Load a saved run into one that is built afresh, and go on."""
    run = Run(words)
    extra = ax.load(folder, run.grower)
    run.grower.verify()
    return {"extra": extra, "losses": run.train(steps)}


def serve(theirs: Any) -> None:
    """Answer requests, each a line of JSON, for as long as there are any."""
    torch.set_num_threads(1)
    while True:
        try:
            words = json.loads(theirs.recv_bytes())
        except EOFError:
            return
        try:
            answer = resumed(*words)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        theirs.send_bytes(json.dumps(answer).encode())
