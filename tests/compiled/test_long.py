"""With the compiler that people use: inductor writes and builds C++, so these take minutes."""

import shutil

import pytest
import torch
from compiling import Net, as_written, batch, grow, step
from torch._dynamo.utils import counters

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
]
GROWTHS = 12
EQUAL = 1e-5  # of inductor's sums, in another order than those of PyTorch
STEP = 1e-4  # of parameters: a hundredth of a step of Adam, which makes rounding larger where gradients are small


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()


def trained(compile_it):
    """Losses, and graphs after each growth."""
    torch.manual_seed(1)
    model = Net()
    call = compile_it(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, counts = [step(call, optimizer)], [graphs()]
    for _ in range(GROWTHS):
        optimizer.zero_grad()
        change = grow(model, optimizer)
        losses += [step(call, optimizer) for _ in range(3)]
        counts.append(graphs())
        print(change)
    assert torch.allclose(call(batch()), as_written(model, batch()), atol=EQUAL)
    return losses, counts


def block_wise(model):
    for block in model.blocks:
        block.compile(fullgraph=True)
    return model


def in_place(model):
    model.compile(fullgraph=True)
    return model


@pytest.mark.parametrize(
    "compile_it, each", [(block_wise, 0), (lambda model: torch.compile(model, fullgraph=True), 1), (in_place, 1)]
)
def test_twelve_growths(compile_it, each, warned):
    expected, none = trained(lambda model: model)
    assert none == [0] * (GROWTHS + 1)
    losses, counts = trained(compile_it)
    assert counts == [1 + each * i for i in range(GROWTHS + 1)]
    assert losses == pytest.approx(expected, abs=EQUAL)
    assert not any("limit" in line for line in warned)


def test_a_compiled_adam_step():
    torch.manual_seed(0)
    models = Net(depth=1), Net(depth=1)
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-3) for model in models]
    run = torch.compile(optimizers[1].step)
    for i in range(20):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (model(batch()) - 1).square().mean().backward()
            optimizer.step() if model is models[0] else run()
            optimizer.zero_grad()
            if i % 2:
                grow(model, optimizer, seed=i)
        assert all(torch.allclose(a, b, atol=STEP) for a, b in zip(*(m.parameters() for m in models), strict=True))
    assert graphs() == 10
