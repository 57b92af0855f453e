"""On a GPU: captured graphs, capturable and fused optimizers, autocast."""

import gc

import pytest
import torch
from compiling import Net, batch, step
from torch._dynamo.utils import counters

import auxin as ax

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GROWTHS = 4
EQUAL = 1e-4  # losses: float32 sums on a GPU, in another order
STEP = 2e-3  # parameters: where a gradient is nearly zero, Adam may step the other way once

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=1e-3, capturable=True),
    "capturable, tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3, device="cuda"), capturable=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
}


@pytest.fixture(autouse=True)
def counts():
    counters.clear()


def whole(model, **options):
    return torch.compile(model, **options)


def blocks(model, **options):
    for block in model.blocks:
        block.compile(**options)
    return model


def trained(make, compile_it, steps=3, **options):
    """Losses of a run that grows, and its network."""
    torch.manual_seed(1)
    model = Net().cuda()
    call = compile_it(model, **options) if compile_it is not None else model
    optimizer = OPTIMIZERS[make](model.parameters())
    x = batch().cuda()
    losses = []
    for growth in range(GROWTHS + 1):
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            losses.append(step(call, optimizer, x))
        optimizer.zero_grad()
        if growth < GROWTHS:
            ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=x)
    return losses, model


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("compile_it", [whole, blocks])
def test_grown_as_a_network_that_is_not_compiled(compile_it, mode, make):
    expected, twin = trained(make, None)
    losses, model = trained(make, compile_it, mode=mode)
    assert losses == pytest.approx(expected, abs=EQUAL)
    assert all(torch.allclose(a, b, atol=STEP) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert counters["stats"]["unique_graphs"] == (1 if compile_it is blocks else 1 + GROWTHS)


@pytest.mark.parametrize("compile_it", [whole, blocks])
def test_bf16_autocast(compile_it):
    torch.manual_seed(1)
    model = Net().cuda()
    call = compile_it(model)
    optimizer = OPTIMIZERS["fused"](model.parameters())
    x = batch().cuda()
    for _ in range(GROWTHS):
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = (call(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
        assert loss.isfinite()
        optimizer.zero_grad()
        change = ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=x)
        assert change.max_difference == 0
    assert len(model.blocks) == 2 + GROWTHS


def test_a_compiled_capturable_step():
    torch.manual_seed(1)
    model = Net().cuda()
    optimizer = OPTIMIZERS["capturable, tensor lr"](model.parameters())
    run = torch.compile(optimizer.step, mode="reduce-overhead")
    x = batch().cuda()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(GROWTHS):
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad(set_to_none=False)
            (model(x) - 1).square().mean().backward()
            run()
        optimizer.zero_grad()
        change = ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=x)
        news = [p.detach().clone() for p in change.parameters]
        (model(x) - 1).square().mean().backward()
        run()
        assert any(not torch.equal(a, b) for a, b in zip(change.parameters, news, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=False))


def test_a_hand_captured_graph_keeps_what_it_captured():
    """What torch.cuda.graph has captured holds addresses: it runs the network from before; capture it again."""
    torch.manual_seed(1)
    model, x = Net().cuda(), batch().cuda()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            out = model(x)
    graph.replay()
    before = out.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ax.grow(model, ax.Duplicate("blocks", by=1, output="keep"), optimizer, probe=x)
    graph.replay()
    assert torch.equal(out, before) and not torch.allclose(model(x), before)


def test_memory_is_flat_over_fifty_growths_that_are_undone():
    torch.manual_seed(1)
    model = Net(dim=256).cuda()
    call = torch.compile(model)
    optimizer = OPTIMIZERS["fused"](model.parameters())
    edit = ax.Duplicate("blocks", by=1)
    x = batch(64).cuda()
    grower = ax.Grower(call, optimizer, edits=edit, when=ax.when.at([]), probe=x)
    used = []
    for _ in range(50):
        step(call, optimizer, x)
        optimizer.zero_grad()
        grower.grow(edit)
        call(x)
        grower.undo()
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert max(used[5:]) <= 1.01 * used[5]
    assert counters["stats"]["unique_graphs"] == 2
