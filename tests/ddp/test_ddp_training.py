"""Training goes on in step on all ranks, with growths in between; as one process on the whole batch would train."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from processes import on_ranks
from ranked import Net, assert_ranks_equal, batch, share, train_step, values, wrapped

import auxin as ax

OPTIONS = [
    {},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"broadcast_buffers": False},
    {"bucket_cap_mb": 0.001},
]


@contextlib.contextmanager
def double() -> Iterator[None]:
    """In float64: a hundred steps make more than 1e-6 of the order in which a processor adds up in float32."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@double()
def grown_run(rank: int, size: int, options: dict[str, Any], steps: int, every: int, edits: list[Any]) -> Any:
    """Train and grow; every rank checks after each step that all are alike."""
    warnings.simplefilter("ignore")
    model = wrapped(rank, **options)
    inner, hooked = model.module, []
    model.register_forward_hook(lambda *_: hooked.append(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    probe = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    grower = ax.Grower(model, optimizer, edits=edits, choose=ax.choose.cycle(), when=ax.when.every(every), probe=probe)
    for step in range(steps):
        train_step(model, optimizer, *share(step, rank, size))
        grower.step()
        assert_ranks_equal(model, f"step {step}")
    assert grower.model is inner is model.module and len(hooked) == steps
    return len(grower.journal), values(*model.parameters())


@double()
def alone(steps: int, every: int, edits: list[Any]) -> Any:
    """The same run in one process, on the global batch."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    probe = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    grower = ax.Grower(model, optimizer, edits=edits, choose=ax.choose.cycle(), when=ax.when.every(every), probe=probe)
    for step in range(steps):
        train_step(model, optimizer, *batch(step))
        grower.step()
    return len(grower.journal), values(*model.parameters())


@pytest.mark.parametrize("options", OPTIONS[:3], ids=lambda o: next(iter(o), "default"))
def test_two_ranks_train_as_one_process_does(options: dict[str, Any]) -> None:
    compare(2, options, 30, 10)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "default"))
def test_a_hundred_steps_as_one_process_takes_them(options: dict[str, Any], size: int) -> None:
    compare(size, options, 100, 20)


def test_two_ranks_share_weights_over_the_depth_as_one_process_does() -> None:
    compare(2, {}, 40, 10, [ax.Repeat("blocks"), ax.Untie("blocks"), ax.Repeat("blocks", times=3, order="interleave")])


def compare(size: int, options: dict[str, Any], steps: int, every: int, edits: list[Any] | None = None) -> None:
    """Every rank ends as one process on the global batch does."""
    edits = [ax.Duplicate("blocks", by=1)] if edits is None else edits
    growths, expected = alone(steps, every, edits)
    for found, weights in on_ranks(size, grown_run, size, options, steps, every, edits, timeout=300):
        assert found == growths == steps // every
        assert float((weights - expected).abs().max()) <= 1e-10
