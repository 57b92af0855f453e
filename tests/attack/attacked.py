"""What the attacks share: a picture of everything that hangs on a run, to the bit, and a run with everything in it."""

from __future__ import annotations

import collections
import functools
import hashlib
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax
from auxin.progress import Standing

CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.CodeType)
PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
KINDS: dict[str, tuple[type, ...]] = {
    "tensor": (Tensor,),
    "module": (nn.Module,),
    "generator": (torch.Generator, random.Random),
    "plain": PLAIN,
    "code": CODE,
    "method": (types.MethodType,),
    "mapping": (Mapping,),
    "items": (list, tuple, set, frozenset, collections.deque),
}
OWN_AFFAIR = (
    "rollback",
    "watch",
    "moments",
    "flow",
    "log",
    "_memory",
)  # of a Grower: a cache, counts of calls


def bits(tensor: Tensor) -> Any:
    """Dtype, shape, memory order, and a hash of the bytes."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return str(tensor.layout), str(tensor.device), tuple(tensor.shape)
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return str(tensor.dtype), tuple(tensor.shape), tensor.stride(), hashlib.blake2b(raw, digest_size=12).digest()


def randomness() -> dict[str, Any]:
    """The global generators."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": bits(torch.get_rng_state()),
        "python": hash(random.getstate()),
        "numpy": (name, keys.tobytes(), *rest),
    }


def picture(*roots: Any) -> dict[str, Any]:
    """Everything that can be reached from ``roots``, by path: values to the bit, identities, orders; and the hooks."""
    facts: dict[str, Any] = {f"random {k}": v for k, v in randomness().items()}
    stack = [(str(number), root) for number, root in reversed(list(enumerate(roots)))]
    seen: dict[int, Any] = {}
    while stack:
        path, value = stack.pop()
        known = id(value) in seen
        facts[path] = _fact(value)
        if known or kind_of(type(value)) in ("plain", "code"):
            continue
        seen[id(value)] = value
        stack += reversed([(f"{path}{name}", item) for name, item in _inside(value)])
    return facts


def assert_same(before: Mapping[str, Any], after: Mapping[str, Any], note: str = "") -> None:
    """Fail with the names of what differs."""
    wrong = differences(before, after)
    assert not wrong, f"{note} {len(wrong)} differ: {wrong[:12]}"


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Paths under which two pictures differ."""
    gone = [f"-{p}" for p in before if p not in after]
    return [
        *(p for p in before if p in after and before[p] != after[p]),
        *gone,
        *(f"+{p}" for p in after if p not in before),
    ]


@functools.cache
def kind_of(cls: type) -> str:
    """Which of ``KINDS`` objects of a class are; asked once for each class, not for each of thousands."""
    return next((kind for kind, classes in KINDS.items() if issubclass(cls, classes)), "object")


def _fact(value: Any) -> Any:
    kind = kind_of(type(value))
    if kind == "tensor":
        hooks = [list(h.items()) if h else None for h in (value._backward_hooks, _after_hooks(value))]
        grad = value.grad if value.is_leaf else None
        held = None if grad is None else (id(grad), bits(grad))
        place = value.data_ptr() if value.layout is torch.strided else 0
        return id(value), place, bits(value), value.requires_grad, held, hooks
    if kind == "generator":
        return bits(value.get_state()) if isinstance(value, torch.Generator) else hash(value.getstate())
    if kind == "plain":
        return type(value).__name__, repr(value)
    if kind == "method":
        return id(value.__self__), id(value.__func__)
    if kind == "mapping":
        return id(value), tuple(id(k) if kind_of(type(k)) in ("tensor", "module") else repr(k) for k in value)
    if kind == "items":
        return None if isinstance(value, tuple) else id(value), len(value)
    return type(value).__name__, id(value)


def _after_hooks(value: Tensor) -> Any:
    return getattr(value, "_post_accumulate_grad_hooks", None)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    kind = kind_of(type(value))
    if kind == "mapping":
        for number, (key, item) in enumerate(value.items()):
            yield f"[{key if isinstance(key, (str, int)) else f'#{number}'}]", item
    elif kind == "items" and not isinstance(value, (set, frozenset)):
        for number, item in enumerate(value):
            yield f"[{number}]", item
    elif kind in ("tensor", "method", "generator"):
        return
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    else:
        for name, item in getattr(value, "__dict__", {}).items():
            if isinstance(value, (ax.Grower, Standing)):
                item = repr(item) if name == "progress" else None if name in OWN_AFFAIR else item
            yield f".{name}", item


class Block(nn.Module):
    """A residual block."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(dim), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(dim, 8), nn.Linear(8, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.relu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Embedding tied to the head, BatchNorm, dropout, a frozen branch, a sleeping one, a plain list of the blocks."""

    def __init__(self, depth: int = 2):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.BatchNorm1d(6)
        self.side = nn.Linear(6, 6).requires_grad_(False)
        self.extra = ax.Dormant(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.order = list(self.blocks)
        self.tail = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.seen: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens).mean(1))
        x = self.extra(x + self.side(x))
        for block in self.order:
            x = block(x)
        return self.head(self.tail(x))


def silent(*_: Any) -> None:
    """A hook that does nothing."""


class Slow:
    """A schedule with state of its own."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, epoch: int) -> float:
        self.calls.append(epoch)
        return 0.99 ** len(self.calls)


class Run:
    """A loop with everything in it that a growth could leave half-done."""

    def __init__(self, **options: Any):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = model = Net()
        self.first = list(model.parameters())
        model.blocks[0].register_forward_hook(silent)
        model.blocks[1].up.register_full_backward_hook(silent)
        model.blocks[1].up.weight.register_hook(silent)
        model.blocks[0].down.bias.register_post_accumulate_grad_hook(silent)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and not n.startswith("tail")]
        groups = [
            {"params": [(n, p) for n, p in named if p.dim() > 1], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in named if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=1e-2)
        self.sgd = torch.optim.SGD(model.tail.parameters(), lr=1e-2, momentum=0.9)
        self.cycle = lr_scheduler.OneCycleLR(self.adam, 1e-2, total_steps=400)
        parts = [lr_scheduler.LinearLR(self.sgd), lr_scheduler.LambdaLR(self.sgd, Slow())]
        self.sequence = lr_scheduler.SequentialLR(self.sgd, parts, milestones=[8])
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4)
        self.companions = (self.adam, self.sgd, self.cycle, self.sequence, self.ema, self.scaler)
        self.probe = torch.arange(12).reshape(4, 3) % 7
        words = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.every(10**6), "probe": self.probe, **options}
        self.grower = ax.Grower(model, *self.companions, **words)
        self.grower.when.load_state_dict(self.grower.when.state_dict())

    def steps(self, count: int = 10) -> list[str]:
        """Train on data from all generators; what was seen, to the bit."""
        seen = []
        for _ in range(count):
            tokens = torch.randint(0, 7, (8, 3)) * random.choice([1]) % 7
            target = (tokens.sum(1) + int(np.random.randint(0, 2))) % 7
            for optimizer in (self.adam, self.sgd):
                optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(tokens), target)
            self.scaler.scale(loss).backward()
            for optimizer in (self.adam, self.sgd):
                self.scaler.step(optimizer)
            self.scaler.update()
            self.cycle.step()
            self.sequence.step()
            self.ema.update_parameters(self.model)
            with torch.no_grad():
                averaged = self.ema.module.eval()(self.probe).sum()
            seen.append(f"{loss.item().hex()} {averaged.item().hex()} {self.scaler.get_scale()}")
        return seen

    def picture(self) -> dict[str, Any]:
        """Of all of it, and of what the grower knows about the moment."""
        used = [self.grower.watch.used(p) for p in self.first]
        return {**picture(self.model, *self.companions, self.grower), "used": used}
