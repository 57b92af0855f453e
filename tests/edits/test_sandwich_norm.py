"""A norm behind a zeroed tensor: how much too large its gradient starts, and the gain that is closed instead."""

import warnings

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.anatomy.probe import Call, PlanContext
from auxin.anatomy.zero_init import amplification, amplified_by_a_norm, last_writers

torch.set_num_threads(1)
DIM = 16


class PlusOne(nn.Module):
    """An RMS norm whose gain is stored as 1 + w."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Sandwich(nn.Module):
    """Two branches, each between two norms."""

    def __init__(self, norm, bias=False):
        super().__init__()
        self.before, self.behind = norm(DIM), norm(DIM)
        self.mix = nn.Linear(DIM, DIM, bias=bias)
        self.before_mlp, self.behind_mlp = norm(DIM), norm(DIM)
        self.up, self.down = nn.Linear(DIM, 2 * DIM, bias=bias), nn.Linear(2 * DIM, DIM, bias=bias)

    def forward(self, x):
        x = x + self.behind(self.mix(self.before(x)))
        return x + self.behind_mlp(self.down(torch.nn.functional.gelu(self.up(self.before_mlp(x)))))


class Standardised(nn.Module):
    """A layer whose weights are standardised on use, as in BiT: no gain that could be closed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x):
        w = self.weight
        return x + x @ ((w - w.mean(1, keepdim=True)) * torch.rsqrt(w.var(1, keepdim=True) + 1e-5)).T / DIM


def ungained(dim):
    return nn.LayerNorm(dim, elementwise_affine=False)


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(DIM, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def trained(block, steps=20):
    """A network with weights and gains off their start."""
    torch.manual_seed(0)
    model = Net(block)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(32, DIM)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, x


@pytest.mark.parametrize(
    ("norm", "bias", "constant"),
    [(PlusOne, False, -1.0), (PlusOne, True, -1.0), (nn.RMSNorm, False, 0.0), (nn.LayerNorm, True, 0.0)],
    ids=["1 + w", "1 + w, biases", "RMSNorm", "LayerNorm"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_gain_is_closed_where_zeroing_the_writer_would_amplify_its_gradient(norm, bias, constant, dtype):
    model, _, x = trained(lambda: Sandwich(norm, bias))
    model, x = model.to(dtype), x.to(dtype)
    optimizer, ema = torch.optim.AdamW(model.parameters()), torch.optim.swa_utils.AveragedModel(model)
    block, call = model.blocks[1], Call((x,), {}, None)
    writers = [n for n, _ in block.named_parameters() if n.partition(".")[0] in ("mix", "down")]
    before = max(amplification(block, call, dict.fromkeys(writers, 0.0)).values())
    solved = last_writers(block, call)
    after = max(amplification(block, call, solved).values())
    print(f"{norm.__name__} {dtype}: gradient {before:.1f}x with the writer zeroed, {after:.2f}x with {solved}")
    assert before > 5 and after < 5
    assert {n.partition(".")[0] for n in solved} == {"behind", "behind_mlp"} and set(solved.values()) == {constant}
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change = ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, ema, probe=x)
    assert torch.equal(model(x), expected) and change.max_difference == 0 and change.gradient_ratio < 5
    for net in (model, ema.module):  # the average has closed the same gains
        closed = dict(net.blocks[2].named_parameters())
        assert all(bool((closed[name] == constant).all()) for name in solved)


def test_gemma_2_closes_its_gains_at_minus_one():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0}
    config = transformers.Gemma2Config(**sizes, initializer_range=0.2)  # at 0.02 eps drowns what a branch writes
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    tokens = {"input_ids": torch.randint(1, 64, (2, 12)), "use_cache": False}
    layer = model.model.layers[1]
    call = PlanContext(model, tokens).calls({"layer": layer})[0]["layer"]
    zeroed = dict.fromkeys(["self_attn.o_proj.weight", "mlp.down_proj.weight"], 0.0)
    before, solved = amplification(layer, call, zeroed), last_writers(layer, call)
    after = amplification(layer, call, solved)
    print(f"Gemma 2: with the writers zeroed {before}, with {solved} {after}")
    assert min(before.values()) > 5 and max(after.values()) < 5
    assert solved == {"post_attention_layernorm.weight": -1.0, "post_feedforward_layernorm.weight": -1.0}


def test_a_closed_gain_opens_and_the_rest_learns_one_step_later():
    model, optimizer, x = trained(lambda: Sandwich(PlusOne))
    change = ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=x)
    ((path, new),) = change.added
    reached = []
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        reached.append({n for n, p in new.module.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert reached[0] == set(new.zeroed) and set(change.writers) == {f"{path}.{n}" for n in new.zeroed}
    assert reached[1] == {n for n, _ in new.module.named_parameters()}


def test_a_grown_block_whose_gain_is_still_closed_can_be_copied_again():
    model, optimizer, x = trained(lambda: Sandwich(PlusOne))
    ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=x)
    change = ax.grow(model, ax.Duplicate("blocks", order=[0, 1, 2, 2]), optimizer, probe=x)
    assert set(change.added[0][1].zeroed) == {"behind.weight", "behind_mlp.weight"} and change.max_difference == 0


def test_one_branch_of_two_has_a_norm_behind_it():
    class Half(Sandwich):
        def forward(self, x):
            x = x + self.behind(self.mix(self.before(x)))
            return x + self.down(torch.nn.functional.gelu(self.up(self.before_mlp(x))))

    model, optimizer, x = trained(lambda: Half(PlusOne))
    change = ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=x)
    assert change.added[0][1].zeroed == {"behind.weight": -1.0, "down.weight": 0.0} and change.max_difference == 0


@pytest.mark.parametrize(
    ("block", "name"),
    [(lambda: Sandwich(ungained), "mix.weight"), (Standardised, "weight")],
    ids=["no gain", "standardised weights"],
)
def test_what_cannot_be_switched_is_warned_of_by_name(block, name):
    model, optimizer, x = trained(block)
    writers = last_writers(model.blocks[1], Call((x,), {}, None))
    print({n: f"{r:.0f}x" for n, r in amplification(model.blocks[1], Call((x,), {}, None), writers).items()})
    grower = ax.Grower(model, optimizer, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(1), probe=x)
    with pytest.warns(UserWarning, match=rf"in front of a norm.* {name} \(\d+ times\).*gain of that norm"):
        change = grower.step()
    assert change.max_difference == 0 and change.gradient_ratio > 5
    optimizer.zero_grad()
    with warnings.catch_warnings():  # said once for each kind of block
        warnings.simplefilter("error")
        assert grower.step() is not None


def test_an_inserted_block_closes_its_gain_too():
    model, optimizer, x = trained(lambda: Sandwich(PlusOne))
    change = ax.grow(model, ax.Insert("blocks", fresh), optimizer, probe=x)
    assert set(change.writers) == {"blocks.2.behind.weight", "blocks.2.behind_mlp.weight"}
    assert change.max_difference == 0
    assert bool((model.blocks[2].behind.weight == -1).all())


def fresh():
    return Sandwich(PlusOne)


def test_a_block_without_a_norm_behind_its_writers_is_left_alone():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(self.norm(x))))

    model, _, x = trained(Plain)
    with torch.no_grad():
        model.blocks[1].up.weight.mul_(1e-3)  # its gradients are small, for no fault of a norm
    call = Call((x,), {}, None)
    assert last_writers(model.blocks[1], call) == {"down.weight": 0.0, "down.bias": 0.0}
    assert amplified_by_a_norm(model.blocks[1], call, {"up.weight": 0.0, "up.bias": 0.0}) == {}
