"""What the scenarios, traps, surgery and bad-input tests share: two small networks and a bit-for-bit comparison."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Block(nn.Module):
    """A residual block whose second layer writes into the stream."""

    def __init__(self, dim: int = 8, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.relu(self.up(self.norm(x)))))


class Net(nn.Module):
    """A residual MLP, as a user would write it."""

    def __init__(self, dim: int = 8, depth: int = 2, features: int = 5, dropout: float = 0.0):
        super().__init__()
        self.stem = nn.Linear(features, dim)
        self.blocks = nn.ModuleList(Block(dim, dropout) for _ in range(depth))
        self.head = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(seed: int = 0, size: int = 16, features: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a regression; does not touch the global generator."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, features, generator=generator)
    return x, x.sin().sum(1, keepdim=True)


def train(model: nn.Module, optimizer: Any, steps: int = 1, seed: int = 0, clear: bool = True) -> list[float]:
    """Some steps of a plain loop; returns the losses. ``clear``: gradients are None afterwards."""
    losses = []
    for step in range(steps):
        x, y = batch(seed + step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    if clear:
        optimizer.zero_grad()
    return losses


def ema_of(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """An exponential moving average with torch's own rule."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def picture(*objects: Any) -> dict[str, Any]:
    """Everything about networks, their companions and the random generators, down to the bits and the identities."""
    seen: dict[str, Any] = {
        "rng torch": torch.get_rng_state().numpy().tobytes(),
        "rng python": random.getstate(),
        "rng numpy": repr(np.random.get_state()),
    }
    for number, thing in enumerate(objects):
        name = f"{number} {type(thing).__name__}"
        if isinstance(thing, nn.Module):
            seen |= {f"{name} {key}": value for key, value in _of_module(thing)}
        elif isinstance(getattr(thing, "param_groups", None), list):
            seen |= {f"{name} {key}": value for key, value in _of_optimizer(thing)}
        elif hasattr(thing, "state_dict"):
            seen[name] = _plain(thing.state_dict())
        else:
            seen[name] = _plain(vars(thing))
    return seen


def assert_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Fail with the name of the first thing that differs between two pictures."""
    assert list(before) == list(after), f"appeared or vanished: {sorted(set(before) ^ set(after))}, or moved"
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, f"changed: {changed}"


def _of_module(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules(remove_duplicate=False):
        yield f"{path or '(root)'} is", (id(module), type(module))
        for name, value in module.__dict__.items():
            if name in ("_parameters", "_buffers"):
                for leaf, tensor in value.items():
                    yield f"{path}.{leaf}", _of_tensor(tensor)
            elif name == "_modules":
                yield f"{path} children", [(key, id(child)) for key, child in value.items()]
            elif name.endswith("hooks") or "hooks_" in name:
                yield f"{path} {name}", [(key, id(hook)) for key, hook in value.items()]
            else:
                yield f"{path} {name}", _plain(value)


def _of_optimizer(optimizer: Any) -> Iterator[tuple[str, Any]]:
    for number, group in enumerate(optimizer.param_groups):
        yield f"group {number}", (id(group), id(group["params"]), [id(p) for p in group["params"]])
        yield f"group {number} options", {key: _plain(v) for key, v in group.items() if key != "params"}
    for p, state in optimizer.state.items():
        yield f"state {id(p)}", dict(_plain(state)) if isinstance(state, dict) else _plain(state)
    for name, value in vars(optimizer).items():
        if name.endswith("hooks"):
            yield name, list(value)


def _of_tensor(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    grad = tensor.grad if tensor.is_leaf else None
    hooks = list(tensor._backward_hooks or ())
    return (id(tensor), bits(tensor), tensor.requires_grad, None if grad is None else bits(grad), hooks)


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """Dtype, shape and bytes; of the tensors inside, where one is made of others."""
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        return tuple(bits(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    raw = tensor.detach().cpu().contiguous()
    return (str(raw.dtype), tuple(raw.shape), raw.reshape(-1).view(torch.uint8).numpy().tobytes())


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, Mapping):
        return [(_plain(key), _plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, set)):
        return [type(value).__name__, *(_plain(item) for item in value)]
    if isinstance(value, nn.Module) or callable(value):
        return id(value)
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return [type(value).__name__, id(value), _plain({k: v for k, v in vars(value).items()})]
    return repr(value)
