"""One more block in a list of a real model: what came of it, and whether it trains as the ungrown model does."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from block_lists import BlockList
from models import Built
from torch import Tensor, nn

import auxin as ax
from auxin.anatomy.probe import tensors_in

STEPS = 20
RATES = (1e-3, 1e-4, 1e-5, 1e-6)
CALM = 2.0  # times the loss at the start: what the ungrown model may reach at the rate at which it is trained
FADE = 100  # steps at the first of the rates; as many more as the rate is smaller
TOLERANCE = 1e-5  # of the outputs before and after
ROUNDING = 1e-6  # times the largest output of a model that was saved and loaded: its tensors lie elsewhere in memory


@dataclass
class Outcome:
    """What came of Duplicate on one list.

    Attributes:
        verdict: "zeroed" or "gate" (it grew, with equal outputs), "refused", or "wrong".
        difference: of the outputs before and after, absolute.
        why: why it was refused, with ``stock=True`` or at all, or what is wrong.
        stock: of a model with a configuration: "same" (saved and loaded by its own library it gives the same outputs),
            "refused" (it grew with ``stock=False`` only), or what differs.
        generates: of a language model: "same" (with and without a cache), or what differs.
        still: new tensors that training left where they were, though it moved those that they were copied from.
        peak: largest loss of the training over that of the ungrown model trained alike; 0 where that bears no rate.
        rate: the learning rate of both.
    """

    at: str
    verdict: str
    difference: float = 0.0
    why: str = ""
    stock: str = ""
    generates: str = ""
    still: tuple[str, ...] = ()
    peak: float = 1.0
    rate: float = RATES[0]


@dataclass(frozen=True)
class Ungrown:
    """How the model trains that does not grow: towards what, at which rate, and its largest loss (infinite: it bears
    none of the rates).
    """

    targets: list[Tensor]
    rate: float
    peak: float


def ungrown(build: Callable[[], Built]) -> Ungrown:
    """Train a freshly built model: at a learning rate of 1e-3, or at a tenth, a hundredth where it does not bear that.

    Full-size models with random weights and noise may blow up a million times at the first step, and a comparison with
    that says nothing.
    """
    model, args, kwargs = build()
    with torch.no_grad():
        targets = _targets(floats(model, args, kwargs))
    for rate in RATES:
        model, args, kwargs = build()
        losses = _losses(model, _adamw(model, rate), args, kwargs, targets)
        if max(losses) <= CALM * losses[0]:
            return Ungrown(targets, rate, max(losses))
    return Ungrown(targets, RATES[-1], math.inf)


def duplicate(build: Callable[[], Built], blocks: BlockList, beside: Ungrown | None = None) -> Outcome:
    """Grow a freshly built model by one block, look at it from all sides, and train it for some steps as ``beside``."""
    model, args, kwargs = build()
    with torch.no_grad():
        before = [t.clone() for t in floats(model, args, kwargs)]
    outcome = Outcome(blocks.at, "refused", rate=beside.rate if beside is not None else RATES[0])
    optimizer = _adamw(model, outcome.rate)
    change = _grown(model, blocks, optimizer, kwargs or args, outcome)
    if change is None:
        return outcome
    with torch.no_grad():
        after = [t.clone() for t in floats(model, args, kwargs)]
    outcome.difference = max((float((a - b).abs().max()) for a, b in zip(before, after, strict=True)), default=0.0)
    outcome.verdict = "gate" if change.gates else "zeroed"
    if not outcome.difference <= TOLERANCE:
        outcome.verdict, outcome.why = "wrong", f"the outputs differ by {outcome.difference:.2g}"
    if hasattr(model, "save_pretrained") and not outcome.stock:
        outcome.stock = _saved_and_loaded(model, args, kwargs, after)
    if getattr(model, "can_generate", bool)() and "input_ids" in kwargs and "decoder_input_ids" not in kwargs:
        outcome.generates = _generates(model, kwargs["input_ids"], build)
    if beside is not None:
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        outcome.peak = max(_losses(model, optimizer, args, kwargs, beside.targets)) / beside.peak
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
        outcome.still = tuple(sorted(_left_behind(change, moved)))
    return outcome


def floats(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """The floating outputs of a model."""
    return [t for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point()]


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A digest of all that a refusal must leave: tensors, modules, attributes, configurations, the optimizer."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {id(tensor)} {tensor.requires_grad} {tensor.grad is None}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for path, module in model.named_modules(remove_duplicate=False):
        digest.update(f"{path} {id(module)} {type(module)} {module.training} {list(module._modules)}".encode())
        plain = {n: v for n, v in module.__dict__.items() if isinstance(v, (int, float, str, list, tuple))}
        digest.update(repr(plain).encode())
        if hasattr(getattr(module, "config", None), "to_dict"):
            digest.update(repr(sorted(module.config.to_dict().items(), key=str)).encode())
    digest.update(repr([[id(p) for p in group["params"]] for group in optimizer.param_groups]).encode())
    digest.update(repr([(id(p), sorted(state)) for p, state in optimizer.state.items()]).encode())
    return digest.hexdigest()


def _grown(model: nn.Module, blocks: BlockList, optimizer: Any, probe: Any, outcome: Outcome) -> ax.Change | None:
    """Grow with ``stock=True``, or else without; each refusal must leave all as it was."""
    for stock in (True, False):
        was = fingerprint(model, optimizer)
        try:
            edit = ax.Duplicate(blocks.at, order=blocks.order, fade=round(FADE * RATES[0] / outcome.rate))
            return ax.grow(model, edit, optimizer, probe=probe, stock=stock)
        except ax.GrowthError as error:
            outcome.why, outcome.stock = str(error), "refused"
            if fingerprint(model, optimizer) != was:
                outcome.verdict, outcome.why = "wrong", f"the refusal left something changed: {error}"
                return None
    return None


def _saved_and_loaded(model: Any, args: Any, kwargs: Any, after: list[Tensor]) -> str:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        flags = {"attn_implementation": "eager", "output_loading_info": True}
        other, info = type(model).from_pretrained(directory, **flags)
    if any(info.values()):
        return f"differs: {info}"
    with torch.no_grad():
        loaded = floats(other.eval(), args, kwargs)
    if [t.shape for t in loaded] != [t.shape for t in after]:
        return "differs in shape"
    difference = max(float((a - b).abs().max()) for a, b in zip(after, loaded, strict=True))
    size = max(1.0, *(float(t.abs().max()) for t in after))
    return "same" if difference <= ROUNDING * size else f"differs by {difference:.2g}"


def _generates(model: Any, ids: Tensor, build: Callable[[], Built]) -> str:
    """Greedy tokens with a cache and without; where those differ, whether they do before the growth."""
    grown, ungrown = _cache_holds(model, ids), _cache_holds(build()[0], ids)
    return "same" if grown else "differs" if ungrown else "differs, as before the growth"


def _cache_holds(model: Any, ids: Tensor) -> bool:
    """Whether generating with a cache gives what it gives without."""
    try:
        return torch.equal(_tokens(model, ids, True), _tokens(model, ids, False))
    except ValueError:  # of the model's own cache
        return False


@torch.no_grad()
def _tokens(model: Any, ids: Tensor, cache: bool) -> Tensor:
    flags = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1}
    return model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cache, **flags)


def _targets(outputs: list[Tensor]) -> list[Tensor]:
    """The outputs with as much noise again: something that random weights can come nearer to."""
    generator = torch.Generator().manual_seed(5)
    return [t + t.std() * torch.randn(t.shape, generator=generator) if t.numel() > 1 else t for t in outputs]


def _adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)


def _losses(model: nn.Module, optimizer: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[float]:
    """Train for some steps, each output weighted alike."""
    losses = []
    for _ in range(STEPS):
        made = floats(model, args, kwargs)
        pairs = [(a, b) for a, b in zip(made, targets, strict=True) if a.requires_grad and b.numel() > 1]
        loss = torch.stack([((a - b) ** 2).mean() / b.var().clamp_min(1e-12) for a, b in pairs]).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def _left_behind(change: ax.Change, moved: set[str]) -> Iterator[str]:
    for path, new in change.added:
        source = change.renamed.get(new.source or "", new.source)
        for name, _ in new.module.named_parameters():
            if f"{path}.{name}" not in moved and f"{source}.{name}" in moved:
                yield f"{path}.{name}"
