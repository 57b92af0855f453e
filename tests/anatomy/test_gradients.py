"""Gradients that are taken on a probe: of everything that trains, and nothing is left behind."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import auxin as ax
from auxin.anatomy.gradients import gradients_of
from auxin.flow import sizes


class Block(nn.Module):
    def __init__(self, d: int = 8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Recomputed(Block):
    """A block that is recomputed in the backward pass, in torch's older way."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, self.norm.weight * x, use_reentrant=True)


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block):
        super().__init__()
        self.stem, self.blocks = nn.Linear(4, 8), nn.ModuleList(block() for _ in range(2))
        self.last, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x)[0])


X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[set[int], set[int]]]]:
    """For each time that autograd is asked: the leaves that train in the graph, and those that it was asked for."""
    calls: list[tuple[set[int], set[int]]] = []
    grad = torch.autograd.grad

    def leaves(node: Any, found: dict[Any, None]) -> None:
        if node is not None and node not in found:
            found[node] = None
            for parent, _ in node.next_functions:
                leaves(parent, found)

    def spy(outputs: Tensor, inputs: Any, **options: Any) -> Any:
        found: dict[Any, None] = {}
        leaves(outputs.grad_fn, found)
        calls.append(({id(n.variable) for n in found if hasattr(n, "variable")}, {id(t) for t in inputs}))
        return grad(outputs, inputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    yield calls


EDITS = {
    "a copy": ax.Duplicate("blocks", by=1),
    "a copy that fades in": ax.Duplicate("blocks", by=1, output="keep"),
    "a block": ax.Insert("blocks", Block),
    "a layer that fades in": ax.Insert("blocks", functools.partial(nn.TransformerEncoderLayer, 8, 2)),
    "a layer behind": ax.After("stem"),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("frozen", ["", "last", "head"])
def test_all_that_trains_is_asked_for(name: str, frozen: str, asked: list[tuple[set[int], set[int]]]) -> None:
    net = Net()
    for p in net.get_submodule(frozen).parameters() if frozen else ():
        p.requires_grad_(False)
    ax.grow(net, EDITS[name], torch.optim.AdamW(net.parameters()), probe=X)
    assert asked
    for in_the_graph, inputs in asked:
        assert in_the_graph
        assert in_the_graph <= inputs
    assert asked[-1][1] == {id(p) for p in net.parameters() if p.requires_grad}


def test_all_are_asked_for_in_surgery(asked: list[tuple[set[int], set[int]]]) -> None:
    net = Net()
    with ax.surgery(net, torch.optim.AdamW(net.parameters()), probe=X):
        net.blocks.append(Block())
    assert [inputs for _, inputs in asked] == [{id(p) for p in net.parameters()}]


@pytest.mark.parametrize("block", [Block, Recomputed])
def test_gradients_wait_where_they_were(block: type[nn.Module]) -> None:
    net = Net(block)
    net(X).square().mean().backward()
    held = {p: (p.grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()}
    for p in net.parameters():
        p.grad = None
    net(X).sum().backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    for p, (grad, _) in held.items():
        p.grad = grad
    found = gradients_of(net(X).sum(), net)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad is not None
        torch.testing.assert_close(found[name], grad, rtol=0, atol=0)
    for p, (grad, value) in held.items():
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)


@pytest.mark.parametrize("edit", [ax.Duplicate("blocks", by=1), ax.Duplicate("blocks", by=1, output="keep")])
def test_blocks_that_are_recomputed_are_copied(edit: Any) -> None:
    net = Net(Recomputed)
    change = ax.grow(net, edit, torch.optim.AdamW(net.parameters()), probe=X)
    assert len(net.blocks) == 3
    assert change.gradient_ratio is not None


@pytest.mark.parametrize("block", [Block, Recomputed])
def test_no_hook_of_a_tensor_fires(block: type[nn.Module]) -> None:
    """Not those that log or clip, nor an optimizer in the backward pass."""
    net = Net(block)
    fired: list[Any] = []
    for p in net.parameters():
        p.register_hook(fired.append)
        p.register_post_accumulate_grad_hook(fired.append)
    found = gradients_of(net(X).sum(), net)
    assert not fired
    assert found["blocks.0.up.weight"] is not None
    net(X).sum().backward()
    assert len(fired) >= 2 * len(list(net.parameters()))


def test_a_growth_lets_no_hook_of_a_tensor_fire() -> None:
    net = Net()
    fired: list[Tensor] = []
    for p in net.parameters():
        p.register_hook(fired.append)
    ax.grow(net, ax.Duplicate("blocks", by=1), torch.optim.AdamW(net.parameters()), probe=X)
    with ax.surgery(net, probe=X):
        net.blocks.append(Block())
    assert not fired


def test_a_parameter_on_which_nothing_depends_has_none() -> None:
    net = Net()
    net.idle = nn.Linear(2, 2)
    found = gradients_of(net(X).sum(), net)
    assert found["idle.weight"] is None
    assert found["stem.weight"] is not None


def test_a_gradient_in_one_number_has_its_norm_its_size_and_is_zero_where_it_was() -> None:
    torch.manual_seed(0)
    net = Net()
    torch.nn.init.zeros_(net.blocks[0].down.weight)
    seen: list[Tensor] = []
    net.stem.weight.register_hook(seen.append)
    with torch.no_grad():
        net.head.weight.fill_(1e-30)  # the squares of what reaches the stem vanish

    def taken(**options: Any) -> dict[str, Any]:
        return gradients_of(net(X).sum(), net, **options)

    for scale in (1e30, 1.0):
        with torch.no_grad():
            net.head.weight.mul_(scale)
        whole, short = taken(), taken(whole=["head.weight"])
        assert torch.equal(short["head.weight"], whole["head.weight"])
        assert not any(any(g.stride()) for n, g in short.items() if n != "head.weight" and g.numel() > 1 and g.any())
        told = [{n: size for n, (_, size) in sizes(grads).items()} for grads in (whole, short)]
        assert told[0] == told[1]
        for name, (square, _) in sizes(whole).items():
            assert sizes(short)[name][0] == pytest.approx(square, rel=1e-5)
            assert bool(short[name].any()) is bool(whole[name].any())
            assert short[name].shape == whole[name].shape
    assert not bool(short["blocks.0.up.weight"].any())
    assert not seen and net.head.weight._backward_hooks is None and len(net.stem.weight._backward_hooks or ()) == 1
