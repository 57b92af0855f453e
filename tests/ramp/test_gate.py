"""The gate: nothing of the block at 0, all of it at 1, and no trace once it is folded away."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from auxin.gate import NAME, close_gate, gated, open_gate, set_gate


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        return scale * self.inner(x), "something else"


class Named(Pair):
    def forward(self, *, hidden):
        return OrderedDict(states=self.inner(hidden), weights=torch.ones(2))


def batch(dtype=torch.float32):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "block", [nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.GELU())], ids=str
)
def test_i12_bitwise_shut_and_equal_once_folded(block, dtype):
    block, x = copy.deepcopy(block).to(dtype), batch(dtype)
    plain = block(x)
    open_gate(block)
    assert torch.equal(block(x), x)
    set_gate(block, 1.0)
    opened = block(x)
    close_gate(block)
    folded = block(x)
    assert torch.equal(folded, plain)
    opened, folded, x = (t.detach().double() for t in (opened, folded, x))
    error = (opened - folded).norm() / folded.norm()
    print(f"{dtype}: an open gate is {error:.1e} from the folded one")
    rounded_twice = torch.finfo(dtype).eps * ((folded - x).abs() + folded.abs())  # x + (f(x) - x), to half an eps each
    assert ((opened - folded).abs() <= rounded_twice).all()


def test_in_between_it_is_the_mixture():
    block, x = nn.Linear(4, 4), batch()
    y = block(x)
    open_gate(block, 0.25)
    torch.testing.assert_close(block(x), x + 0.25 * (y - x))


def test_only_the_first_tensor_of_an_output_is_mixed():
    x = batch()
    pair, named = Pair(), Named()
    open_gate(pair)
    open_gate(named)
    first, rest = pair(x, scale=2.0)
    assert torch.equal(first, x) and rest == "something else"
    out = named(hidden=x)
    assert type(out) is OrderedDict and torch.equal(out["states"], x) and torch.equal(out["weights"], torch.ones(2))
    lstm = nn.LSTM(4, 4)
    wanted = lstm(x)[1]
    open_gate(lstm)
    out, state = lstm(x)
    assert torch.equal(out, x) and all(torch.equal(a, b) for a, b in zip(state, wanted, strict=True))


def test_a_state_dict_names_it_and_a_plain_network_refuses_it():
    block = nn.Sequential(nn.Linear(4, 4))
    open_gate(block[0], 0.5)
    assert NAME == "auxin_gate" and f"0.{NAME}" in block.state_dict()
    with pytest.raises(RuntimeError, match="0.auxin_gate"):
        nn.Sequential(nn.Linear(4, 4)).load_state_dict(block.state_dict())


def test_nothing_is_left_behind():
    block = nn.Linear(4, 4)
    before = {name: copy.copy(value) for name, value in block.__dict__.items()}
    open_gate(block)
    close_gate(block)
    assert block.__dict__ == before


def test_copies_are_gated_too():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), batch()
    open_gate(net[0], 0.5)
    wanted = net(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), wanted) and [path for path, _ in gated(twin)] == ["0"]
        close_gate(twin[0])
        assert not list(gated(twin)) and list(gated(net))


def test_it_keeps_the_dtype_and_device_of_its_block_and_moves_with_it():
    block = nn.Linear(4, 4, dtype=torch.bfloat16)
    open_gate(block)
    assert block.auxin_gate.dtype is torch.bfloat16
    assert block.double().auxin_gate.dtype is torch.float64
