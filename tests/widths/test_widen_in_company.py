"""A wider network among what a training loop has around it: processes, compiled code, averages, scalers, hooks."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_layers_that_widen import off
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.nn.utils import weight_norm as weight_norm_by_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import auxin as ax

sys.path.insert(0, str(Path(__file__).parent.parent / "ddp"))
sys.path.insert(0, str(Path(__file__).parent.parent / "compiled"))
from compiling import Graphs
from compiling import Net as Compiled
from compiling import batch as rows
from processes import on_ranks
from ranked import Net, assert_ranks_equal, batch, share, train_step, values, wrapped

torch.set_num_threads(1)
PROBE = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
EDITS = (
    ax.Widen("blocks.*.up", by=6),
    ax.Widen("inp", by=2),
    ax.Widen("blocks.0.up", by=4, init="split"),
    ax.Duplicate("blocks", by=1),
    ax.Widen("blocks.*.up", by=2, init="pair"),
)
EPS = 1e-3  # gradients that are zero but for rounding then move nothing

# ---- several processes


def steps_of_a_rank(rank, size):
    """Train, widen and go on; after each step all ranks are alike, gradients included."""
    warnings.simplefilter("ignore")
    model = wrapped(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    for number, edit in enumerate(EDITS):
        for step in range(3 * number, 3 * number + 3):
            train_step(model, optimizer, *share(step, rank, size))
            assert_ranks_equal(model, f"step {step}")
        optimizer.zero_grad()
        ax.grow(model, edit, optimizer, probe=PROBE, seed=number)
        assert_ranks_equal(model, str(edit))
        ax.verify(model, optimizer)
    train_step(model, optimizer, *share(90, rank, size))
    grads = values(*(p.grad for p in model.parameters()))
    train_step(model, optimizer, *share(91, rank, size))
    return values(*model.parameters()), grads


def steps_alone():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    for number, edit in enumerate(EDITS):
        for step in range(3 * number, 3 * number + 3):
            train_step(model, optimizer, *batch(step))
        optimizer.zero_grad()
        ax.grow(model, edit, optimizer, probe=PROBE, seed=number)
    train_step(model, optimizer, *batch(90))
    grads = values(*(p.grad for p in model.parameters()))
    train_step(model, optimizer, *batch(91))
    return values(*model.parameters()), grads


def test_two_ranks_widen_as_one_process_does():
    expected, gradients = steps_alone()
    first, second = on_ranks(2, steps_of_a_rank, 2, timeout=110)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (first[1] - gradients).abs().max() < 1e-5 and (first[0] - expected).abs().max() < 1e-5


# ---- compiled code


def test_compiled_code_is_compiled_again_and_equals_the_network_as_it_is():
    torch.compiler.reset()
    torch.manual_seed(1)
    model, graphs = Compiled(), Graphs()
    call = torch.compile(model, backend=graphs)
    optimizer, counts = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for edit in (None, ax.Widen("blocks.*.up", by=4), ax.Widen("inp", by=8), ax.Widen("blocks.1.up", by=4)):
        if edit is not None:
            optimizer.zero_grad()
            ax.grow(call, edit, optimizer, probe=rows())
        for _ in range(2):
            optimizer.zero_grad()
            out = call(rows())
            with torch.compiler.set_stance("force_eager"):
                assert torch.equal(out, model(rows()))
            (out - 1).square().mean().backward()
            optimizer.step()
        counts.append(len(graphs))
    print(f"graphs after each of three widenings: {counts}")
    assert counts == [1, 2, 3, 4]
    torch.compiler.reset()


# ---- averages, scalers, hooks, flags


class Small(nn.Module):
    def __init__(self, wrap=None, at=("up",)):
        super().__init__()
        self.inp, self.up, self.down, self.out = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 1)
        for name in at if wrap is not None else ():
            wrap(getattr(self, name))

    def forward(self, x):
        x = self.inp(x)
        return self.out(x + self.down(torch.tanh(self.up(x))))


X = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def trained(net, *optimizers, count=3):
    for _ in range(count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (net(X) - 1).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    net.zero_grad()


@pytest.mark.parametrize("init", ["zero", "split", "tile", "pair"])
def test_every_kind_of_average_keeps_its_function(init):
    torch.manual_seed(0)
    net = Small().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    rate = SWALR(optimizer, swa_lr=0.02)
    averages = [AveragedModel(net), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)]
    for _ in range(4):
        trained(net, optimizer, count=1)
        rate.step()
        for average in averages:
            average.update_parameters(net)
    before = [average(X).detach() for average in averages]
    ax.grow(net, ax.Widen("up", by=4, init=init), optimizer, rate, *averages, probe=X)
    for average, old in zip(averages, before, strict=True):
        assert off(average(X).detach(), old) < 1e-13 and average.n_averaged == 4
        average.update_parameters(net)
    trained(net, optimizer)
    ax.verify(net, optimizer, rate, *averages)


def test_a_scaler_goes_on():
    torch.manual_seed(0)
    net, scaler = Small(), torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    optimizer, x = torch.optim.AdamW(net.parameters(), lr=1e-2), X.float()
    for number in range(6):
        optimizer.zero_grad()
        scaler.scale((net(x) - 1).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if number % 2:
            ax.grow(net, ax.Widen("up", by=2, init="split"), optimizer, scaler, probe=x)
    assert scaler.get_scale() == 256.0 * 2**3 and net.up.out_features == 14
    scaler.scale((net(x) - 1).square().mean()).backward()
    with pytest.raises(ax.GrowthError, match="not now"):
        ax.grow(net, ax.Widen("up", by=2), optimizer, scaler, probe=x)


def test_hooks_stay_and_run_and_frozen_tensors_stay_frozen():
    torch.manual_seed(0)
    net, seen = Small().double(), []
    net.up.register_forward_hook(lambda module, args, out: seen.append(("forward", out.shape[-1])))
    net.up.register_full_backward_hook(lambda module, grads, outs: seen.append(("backward", outs[0].shape[-1])))
    net.up.weight.register_hook(lambda grad: seen.append(("gradient", grad.shape[0])))
    net.down.weight.register_post_accumulate_grad_hook(lambda p: seen.append(("done", p.shape[1])))
    net.up.bias.requires_grad_(False)
    frozen = net.up.bias.detach().clone()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    trained(net, optimizer, count=1)
    seen.clear()
    ax.grow(net, ax.Widen("up", by=4, init="split"), optimizer, probe=X)
    seen.clear()
    trained(net, optimizer, count=1)
    assert sorted(seen) == [("backward", 12), ("done", 12), ("forward", 12), ("gradient", 12)]
    assert not net.up.bias.requires_grad and torch.equal(net.up.bias[:8], frozen)
    assert net.up.bias not in optimizer.state


# ---- weights that are computed from others


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.3)


def doubled(module):
    parametrize.register_parametrization(module, "weight", Twice())


WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm by hook": weight_norm_by_hook,
    "own": doubled,
    "pruned": pruned,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("at", [("up",), ("down",), ("up", "down")], ids="+".join)
@pytest.mark.parametrize("init", ["zero", "split", "pair"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_computes_a_weight_stays(wrap, init, at):
    torch.manual_seed(0)
    net = Small(WRAPS[wrap], at).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    trained(net, optimizer)
    before, names = net(X).detach(), list(net.state_dict())
    edit = ax.Widen("up", by=2, init=init)
    if wrap.startswith("weight_norm") and "down" in at and init != "zero":
        with pytest.raises(ax.GrowthError, match="down.* is divided by its norm along it"):
            ax.grow(net, edit, optimizer, probe=X)
        return
    change = ax.grow(net, edit, optimizer, probe=X)
    assert change.preserves and off(net(X).detach(), before) < 1e-13 and list(net.state_dict()) == names
    assert (net.up.out_features, net.down.in_features) == (10, 10)
    trained(net, optimizer)
    net(X)  # hooks compute weights in front of a forward
    weight = net.up.weight.detach()[8:]
    assert net.up.weight.shape == (10, 6) and (init == "pair" or (weight[0] - weight[1]).abs().max() > 0)
    for name in at:  # it is computed still: a norm of 1 in direction, a factor of 2, zeros where it was pruned
        module = getattr(net, name)
        if wrap == "own":
            assert torch.equal(module.weight, 2 * module.parametrizations.weight.original)
        elif wrap == "pruned":
            assert torch.equal(module.weight == 0, module.weight_mask == 0) or init == "zero"
            assert (module.weight_mask == 0).sum() >= 14
        else:
            gain = module.weight_g if hasattr(module, "weight_g") else module.parametrizations.weight.original0
            assert torch.allclose(module.weight.norm(dim=1), gain[:, 0].abs(), rtol=1e-12)


@pytest.mark.parametrize("at", ["up", "down"])
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (parametrizations.spectral_norm, "spectral_norm"),
        (spectral_norm, "spectral_norm"),
        (parametrizations.orthogonal, "orthogonal"),
    ],
    ids=["spectral", "spectral by hook", "orthogonal"],
)
@pytest.mark.parametrize("init", ["zero", "split", "pair"])
def test_what_keeps_a_whole_matrix_in_bounds_is_refused_by_name(wrap, name, at, init):
    torch.manual_seed(0)
    net = Small(wrap, (at,)).double()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ax.GrowthError, match=f"{at} is under {name} of torch.*take it off, widen, and put it on again"):
        ax.grow(net, ax.Widen("up", by=2, init=init), probe=X)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
