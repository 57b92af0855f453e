"""What a run keeps of the entries of a width goes on as if the network had always been as wide: METHODS 4, 6.3, 6.5."""

import sys
from pathlib import Path

import pytest
import torch
from test_layers_that_widen import CASES, IDS, ROWS, Tied, ready
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax
from auxin.anatomy.widths import starts

sys.path.insert(0, str(Path(__file__).parent.parent / "conformance"))
from companions import SIMPLE

torch.set_num_threads(1)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
INITS = ["zero", "split", "pair"]


def watched(net, probes, opt):
    """Let an optimizer that goes nowhere see gradients, of losses that tell all outputs apart."""
    for number, probe in enumerate(probes):
        out = net(probe)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        opt.zero_grad()
        (out * weight).sum().backward()
        opt.step()
    grads = {n: p.grad.clone() for n, p in net.named_parameters()}
    opt.zero_grad()
    return grads


def batches(probe, count=3):
    torch.manual_seed(7)
    if probe.is_floating_point():
        return [torch.randn_like(probe) for _ in range(count)]
    return [torch.randint(0, int(probe.max()) + 1, probe.shape) for _ in range(count)]


def still(net):
    return torch.optim.AdamW(net.parameters(), lr=0.0, amsgrad=True)


def transport(build, edit, probe):
    """Gradients and moments of old entries are those of a network that was as wide all along."""
    net, probe = ready(build, probe)
    net.eval()
    if any(isinstance(m, nn.RNNBase) for m in net.modules()):
        net.train()
    probes, opt = batches(probe), still(net)
    watched(net, probes, opt)
    change = ax.grow(net, edit, opt, probe=probe)
    fresh = still(net)
    grads = watched(net, probes, fresh)
    largest = {key: max(float(one[key].norm()) for one in fresh.state.values()) for key in MOMENTS}
    means = {id(m.new) for c in change.steps for m in c.moves if any(axis.mean for axis in m.axes or ())}
    young, resized = {part.name: part.mask for part in change.parts}, 0
    for move in change.moves:
        state, wanted = opt.state[move.new], fresh.state[move.new]
        mask = ~young.get(move.name, torch.zeros(move.shape, dtype=torch.bool))
        resized += move.reshaped
        for key in MOMENTS:
            if id(move.new) in means:
                continue  # what writes into a LayerNorm's stream: every old entry then depends on several new ones
            floor = 1e-4 * largest[key]  # gradients that are zero but for rounding, as of the bias of keys
            error = (state[key] - wanted[key])[mask].norm() / wanted[key].norm().clamp(min=floor)
            assert error < 1e-12, (move.name, key, float(error))
            assert not state[key][~mask].any(), (move.name, key)
        assert state["step"] == wanted["step"] and grads[move.name].isfinite().all()
    assert resized > 1
    return net, change, grads


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("case", CASES)
def test_moments_are_those_of_a_network_that_was_as_wide_all_along(case, init):
    build, at, by, probe = CASES[case]
    transport(build, ax.Widen(at, by=by, init=init), probe)


class GPT(nn.Module):
    """Learned positions, heads of attention, a feed-forward layer, norms in front, an own head."""

    def __init__(self, norm=nn.LayerNorm, d=16, heads=4, blocks=2):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, d), nn.Parameter(torch.randn(7, d))
        self.blocks = nn.ModuleList([Block(norm, d, heads) for _ in range(blocks)])
        self.norm, self.head = norm(d), nn.Linear(d, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, norm, d, heads):
        super().__init__()
        self.heads, self.size = heads, d // heads
        self.n1, self.n2 = norm(d), norm(d)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        y = self.n1(x)
        q, k, v = (f(y).view(*y.shape[:2], self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.n2(x))))


@pytest.fixture
def equal(monkeypatch):
    """Copies have equal shares in what their original did."""
    monkeypatch.setattr(starts, "_shares", lambda index, n, generator: [1 / index.count(i) for i in index])


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("init", ["split", "zero"])
def test_a_gpt_of_twice_the_size(norm, init, equal):
    edits = [
        ax.Widen("blocks.*.up", by=64, init=init),
        ax.Widen("blocks.*.q", by=4, unit="heads", init=init),
        ax.Widen("embed", by=16, init=init),
    ]
    transport(lambda: GPT(norm), edits, IDS)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_stream(norm):
    def build():
        net = Tied(norm, 24)
        for block in net.blocks:
            block.norm = norm(24)
        return net

    transport(build, ax.Widen("embed", to=37), IDS)


def test_what_writes_into_the_stream_of_a_layer_norm():
    """An old entry had the gradient of the new one in its place, and a part of that of the means."""
    net, _ = ready(GPT, IDS)
    probes = batches(IDS, 1)
    old = watched(net, probes, still(net))
    ax.grow(net, ax.Widen("embed", by=5), probe=IDS)
    new = watched(net, probes, still(net))
    for name in ("place", "embed.weight"):
        wanted = new[name][:, :16] + new[name][:, 16:].sum(1, keepdim=True) / 16
        assert (wanted - old[name]).norm() < 1e-12 * old[name].norm()


def test_larger_heads():
    """Queries are scaled, so that attention divides by the root of the new size."""
    net, _, _ = transport(lambda: GPT(d=12, heads=2), ax.Widen("blocks.*.q", by=4), IDS)
    assert net.blocks[0].size == 8


def test_unequal_shares_in_a_stream_sum_to_the_old_gradient():
    """A norm looks at all copies, so that not each, but their sum, has the gradient that the old entry had."""
    net, _ = ready(lambda: GPT(blocks=1), IDS)
    probes = batches(IDS, 1)
    old = watched(net, probes, still(net))["embed.weight"]
    change = ax.grow(net, ax.Widen("embed", by=16, init="split"), probe=IDS)
    new = watched(net, probes, still(net))["embed.weight"]
    index = next(m.axes[1].index for m in change.moves if m.name == "embed.weight")
    summed = torch.zeros_like(old).index_add_(1, index, new)
    assert (summed - old).norm() < 1e-12 * old.norm()
    assert not torch.allclose(new, old[:, index] / 2, rtol=1e-3)


def test_with_noise_copies_share_equally():
    """Then each copy has half the gradient, up to what the noise does."""
    net, _ = ready(lambda: GPT(blocks=1), IDS)
    probes, opt = batches(IDS, 1), still(net)
    watched(net, probes, opt)
    change = ax.grow(net, ax.Widen("embed", by=16, init="split", noise=1e-9), opt, probe=IDS)
    fresh = still(net)
    watched(net, probes, fresh)
    assert not change.preserves
    for move in change.moves:
        if "k.bias" not in move.name:
            one, other = opt.state[move.new]["exp_avg"], fresh.state[move.new]["exp_avg"]
            assert (one - other).norm() < 1e-6 * other.norm(), move.name


def trained(net, opt, probe, steps, target=0.3):
    for _ in range(steps):
        opt.zero_grad()
        (net(probe) - target).square().mean().backward()
        opt.step()
    opt.zero_grad()


def plain():
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def halves(net, tensor, axis, change):
    """The old entries that were copied, and their copies."""
    move = next(m for m in change.moves if m.name == tensor)
    index = move.axes[axis].index
    return [net.get_parameter(tensor).detach().index_select(axis, part) for part in (index[6:], torch.arange(6, 12))]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_exact_copies_with_equal_shares_never_part(kind, equal):
    """S1: the detector works."""
    net, probe = ready(plain, ROWS)
    opt = kind(net.parameters(), lr=0.01)
    trained(net, opt, probe, 5)
    change = ax.grow(net, ax.Widen("0", by=6, init="split"), opt, probe=probe)
    trained(net, opt, probe, 200)
    for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        one, other = halves(net, name, axis, change)
        assert (one - other).norm() < 1e-6 * one.norm(), name


@pytest.mark.parametrize("options", [{}, {"noise": 0.05}, {"state": "reset"}], ids=str)
def test_copies_part(options):
    """S2: by unequal shares, by noise, by a state that starts anew."""
    net, probe = ready(plain, ROWS)
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    trained(net, opt, probe, 20)
    change = ax.grow(net, ax.Widen("0", by=6, init="split", **options), opt, probe=probe)
    trained(net, opt, probe, 20)
    one, other = halves(net, "0.weight", 0, change)
    assert (one - other).norm() > 1e-3 * one.norm()


def test_a_state_that_starts_anew_parts_equal_copies(equal):
    net, probe = ready(plain, ROWS)
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    trained(net, opt, probe, 20)
    change = ax.grow(net, ax.Widen("0", by=6, init="split", state="reset"), opt, probe=probe)
    state = opt.state[net[0].weight]
    assert not state["exp_avg"][6:].any() and not state["exp_avg_sq"][6:].any() and state["exp_avg_sq"][:6].all()
    before = net[0].weight.detach().clone()
    trained(net, opt, probe, 1)
    assert (net[0].weight.detach() - before)[6:].abs().max() < 0.0101  # as the first step of a fresh AdamW
    trained(net, opt, probe, 20)
    one, other = halves(net, "0.weight", 0, change)
    assert (one - other).norm() > 1e-3 * one.norm()


def directions(net, x):
    """How many directions the hidden units span."""
    with torch.no_grad():
        hidden = net[:2](x)
    return round(ax.score.effective_rank(hidden) * hidden.shape[1])


@pytest.mark.parametrize("init", INITS)
def test_new_units_say_something_of_their_own_fifty_steps_later(init):
    """S3."""
    net, x = ready(plain, (256, 8))
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    target = torch.sin(2 * x[:, :3]) + x[:, 3:6] * x[:, :3]
    trained(net, opt, x, 100, target)
    before = directions(net, x)
    ax.grow(net, ax.Widen("0", by=6, init=init), opt, probe=x[:4])
    at_once = directions(net, x)
    trained(net, opt, x, 50, target)
    print(f"{init}: {before}, {at_once} right after, {directions(net, x)} fifty steps later")
    assert directions(net, x) == 12 > before == 6


def test_equal_copies_say_nothing_of_their_own(equal):
    """S3, the other way round."""
    net, x = ready(plain, (256, 8))
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    trained(net, opt, x, 100)
    ax.grow(net, ax.Widen("0", by=6, init="split"), opt, probe=x[:4])
    trained(net, opt, x, 50)
    assert directions(net, x) <= 6


def test_pairs_get_opposite_and_equal_gradients_and_part():
    """S5."""
    net, probe = ready(plain, ROWS)
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    trained(net, opt, probe, 5)
    ax.grow(net, ax.Widen("0", by=4, init="pair"), opt, probe=probe)
    (net(probe) - 0.3).square().mean().backward()
    for grad, sign in ((net[0].weight.grad, 1), (net[0].bias.grad, 1), (net[2].weight.grad.T, -1)):
        one, other = grad[[6, 8]], grad[[7, 9]]
        assert one.norm() > 0 and (one + sign * other).norm() < 1e-12 * one.norm()
    opt.step()
    rows = net[0].weight.detach()
    assert (rows[6] - rows[7]).norm() > 1e-3 * rows[6].norm()


@pytest.mark.parametrize("kind", ["SGD", "momentum", "AdamW"])
def test_split_in_equal_shares_it_stays_on_the_trajectory_of_the_small_network(kind, equal):
    """100 steps, to 1e-9. Copies of rows have half the gradient, and columns count twice: rates make up for both.

    Under SGD rows learn at twice the rate, columns at half; under Adam, which no scale of a gradient changes, columns
    learn at half the rate, and the eps of rows halves with their gradient. The halved columns ask for twice the decay
    rate per learning rate to decay alike.
    """
    from copy import deepcopy

    net, probe = ready(plain, ROWS)
    groups = [{"params": [p], "name": n} for n, p in net.named_parameters()]
    adam = kind == "AdamW"
    options = {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1} if adam else {"lr": 0.1}
    options |= {"momentum": 0.9} if kind == "momentum" else {}
    opt = (torch.optim.AdamW if adam else torch.optim.SGD)(groups, **options)
    trained(net, opt, probe, 20)
    small = deepcopy(net)
    theirs = type(opt)([{"params": [p]} for p in small.parameters()], **options)
    theirs.load_state_dict(deepcopy(opt.state_dict()))
    ax.grow(net, ax.Widen("0", by=6, init="split"), opt, probe=probe)
    for group in opt.param_groups:
        if group["name"].startswith("0."):
            group["eps" if adam else "lr"] *= 0.5 if adam else 2
        elif group["name"] == "2.weight":
            group["lr"] /= 2
            if adam:
                group["weight_decay"] *= 2
    for _ in range(100):
        trained(net, opt, probe, 1)
        trained(small, theirs, probe, 1)
        assert (net(probe) - small(probe)).norm() < 1e-9 * small(probe).norm()
    before = small(probe)
    trained(small, theirs, probe, 50)
    assert (small(probe) - before).norm() > 1e-4 * before.norm()


# ---- every optimizer


class Vocabulary(nn.Module):
    """Sparse gradients."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6, sparse=True), nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(self.embed(ids))


def matrices(net):
    return [p for p in net.parameters() if p.dim() == 2]


def rest(net):
    return [p for p in net.parameters() if p.dim() != 2]


def run_of(name):
    """A network, what trains it and a batch."""
    torch.manual_seed(0)
    if name == "SparseAdam":
        net = Vocabulary()
        return net, [torch.optim.SparseAdam([net.embed.weight]), torch.optim.Adam(net.head.parameters())], IDS, "embed"
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    if name == "LBFGS":
        return net, [torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)], torch.randn(ROWS), "0"
    if name == "Muon":
        return net, [torch.optim.Muon(matrices(net), lr=0.01), torch.optim.AdamW(rest(net))], torch.randn(ROWS), "0"
    kind, options = SIMPLE[name]
    options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return net, [kind(net.parameters(), **options)], torch.randn(ROWS), "0"


def steps(net, opts, probe, count):
    for _ in range(count):
        for opt in opts:

            def closure():
                net.zero_grad()
                loss = (net(probe) - 0.3).square().mean()
                loss.backward()
                return loss

            opt.step(closure)
    net.zero_grad()


ALL = [*SIMPLE, "LBFGS", "Muon", "SparseAdam"]


@pytest.mark.parametrize("init", ["zero", "split"])
@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_goes_on(name, init):
    """O4."""
    net, opts, probe, at = run_of(name)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0) for opt in opts]
    steps(net, opts, probe, 3)
    ax.grow(net, ax.Widen(at, by=2, init=init), *opts, *schedulers, probe=probe)
    check_states(opts, name)
    steps(net, opts, probe, 2)
    [scheduler.step() for scheduler in schedulers]
    for opt, scheduler in zip(opts, schedulers, strict=True):
        assert len(scheduler.get_last_lr()) == len(opt.param_groups)
        state = opt.state_dict()
        opt.load_state_dict(state)
    check_states(opts, name)
    steps(net, opts, probe, 2)
    assert all(p.isfinite().all() for p in net.parameters())


def check_states(opts, name):
    for opt in opts:
        for p, state in opt.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    if isinstance(opt, torch.optim.Adafactor) and key in ("row_var", "col_var"):
                        shape = (p.shape[0], 1) if key == "row_var" else (1, p.shape[1])
                    elif isinstance(opt, torch.optim.LBFGS):
                        shape = (sum(q.numel() for q in opt.param_groups[0]["params"]),)
                    else:
                        shape = p.shape
                    assert tuple(value.shape) == tuple(shape), (name, key)
                    assert value.shape != p.shape or value.stride() == p.stride(), (name, key)


ELEMENTWISE = [name for name in SIMPLE if not name.startswith("Adafactor")]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_old_entries_take_the_step_that_they_would_have_taken(name):
    """O3: with zeros for readers, the next update of what was there is that of the network that has not grown."""
    after = []
    for grows in (True, False):
        net, opts, probe, at = run_of(name)
        steps(net, opts, probe, 5)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        if grows:
            ax.grow(net, ax.Widen(at, by=2), *opts, probe=probe)
        steps(net, opts, probe, 1)
        corner = {n: p.detach()[tuple(map(slice, before[n].shape))] for n, p in net.named_parameters()}
        after.append({n: p - before[n] for n, p in corner.items()})
    for n, moved in after[1].items():
        assert torch.allclose(after[0][n], moved, rtol=1e-5, atol=1e-6 * float(moved.abs().max()) + 1e-7), n


@pytest.mark.parametrize("name", [n for n in SIMPLE if n.endswith(("-foreach", "-fused"))])
def test_all_modes_take_the_same_steps(name):
    """O5."""
    kind, mode = name.rsplit("-", 1)
    ends = []
    for one in (f"{kind}-loop", f"{kind}-{mode}"):
        net, opts, probe, at = run_of(one)
        steps(net, opts, probe, 5)
        ax.grow(net, ax.Widen(at, by=2, init="split"), *opts, probe=probe, seed=3)
        steps(net, opts, probe, 10)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert (ends[0] - ends[1]).norm() < 1e-5 * ends[0].norm()


def test_an_average_keeps_its_function_with_its_own_weights():
    """O6: an average that is far from the network."""
    net, probe = ready(lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(6, 3)), ROWS)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    ema.update_parameters(net)
    opt = torch.optim.AdamW(net.parameters(), lr=0.05)
    trained(net, opt, probe, 30)
    ema.update_parameters(net)
    net.eval(), ema.eval()
    for init in INITS:
        before, live = ema(probe).detach(), net(probe).detach()
        assert (before - live).norm() > 1e-2 * live.norm()
        ax.grow(net, ax.Widen("0", by=2, init=init), opt, ema, probe=probe)
        assert (ema(probe) - before).norm() < 1e-13 * before.norm()
        assert (net(probe) - live).norm() < 1e-13 * live.norm()


def test_counts_go_on_and_states_are_nobody_elses():
    """O7."""
    net, opts, probe, at = run_of("AdamW-loop")
    steps(net, opts, probe, 5)
    for _ in range(2):
        ax.grow(net, ax.Widen(at, by=2, init="split"), *opts, probe=probe)
    states = list(opts[0].state.values())
    assert all(state["step"] == 5 for state in states)
    tensors = [value for state in states for value in state.values()]
    assert len({value.untyped_storage().data_ptr() for value in tensors}) == len(tensors)


def two_hundred(name, count=200):
    net, opts, probe, at = run_of(name)
    steps(net, opts, probe, 2)
    for number in range(count):
        olds = {n: (p, p.detach().clone()) for n, p in net.named_parameters()}
        ax.grow(net, ax.Widen(at, by=1), *opts, probe=probe)
        for n, (p, old) in olds.items():
            assert net.get_parameter(n) is p and torch.equal(p[tuple(map(slice, old.shape))], old), (number, n)
        steps(net, opts, probe, 1)
    assert net[0].weight.shape[0] == 6 + count and all(p.isfinite().all() for p in net.parameters())
    check_states(opts, name)


def test_forty_widenings_in_a_row():
    two_hundred("AdamW-fused", 40)


@pytest.mark.long
@pytest.mark.parametrize("name", [*SIMPLE, "LBFGS", "Muon"])
def test_two_hundred_widenings_with_every_optimizer(name):
    two_hundred(name)


def as_by_hand(net):
    """In memory orders that loops choose: channels_last, and a weight that lies transposed."""
    net.to(memory_format=torch.channels_last)
    net[4].weight.data = net[4].weight.data.t().contiguous().t()
    return net


def test_the_memory_order_of_every_tensor_stays():
    """A layer in channels_last would else be converted at every step; and fused steps need moments in that order."""
    torch.manual_seed(0)

    def build(width):
        layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, width, 1), nn.Flatten(2)
        return as_by_hand(nn.Sequential(*layers, nn.Linear(36, 5), nn.Flatten(), nn.Linear(5 * width, 2)))

    net, twin, x = build(8), build(12), torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    net(x).square().mean().backward()
    opt.step()
    opt.zero_grad()
    for path in ("0", "2"):
        ax.grow(net, ax.Widen(path, to=12), opt, average, probe=x)
    names = [name for name, _ in net.named_parameters()]
    for name in names:
        p, own = net.get_parameter(name), twin.get_parameter(name)
        held = opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"], average.module.get_parameter(name)
        assert {t.stride() for t in (p, *held)} == {own.stride()}, name
    assert net[0].weight.stride()[1] == 1 and net[4].weight.stride() == (1, 5)


class Words(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.words(tokens)))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("init", ["tile", "split"])
@pytest.mark.parametrize(
    ("tied", "at", "words"),
    [(False, "head", {"outputs": True}), (False, "words", {"unit": "rows"}), (True, "words", {"unit": "rows"})],
)
def test_copies_of_classes_and_of_words_share_nothing(tied, at, words, init, reset):
    """Nothing sums over them, so an old one goes on as before, and a copy begins as its original: METHODS 4.1."""
    torch.manual_seed(0)
    net = Words(tied)
    words = {**words, "outputs": words.get("outputs", tied), "state": "reset" if reset else "map"}
    opt, tokens = still(net), torch.tensor([[0, 1], [3, 4]])
    watched(net, [tokens], opt)
    names = [name for name, p in net.named_parameters() if name.startswith(at) or (tied and p.shape[0] == 5)]
    before = {name: opt.state[net.get_parameter(name)]["exp_avg_sq"].clone() for name in names}
    change = ax.grow(net, ax.Widen(at, by=3, init=init, **words), opt, probe=tokens)
    assert {move.name for move in change.moves if move.reshaped} == set(names)
    for name, old in before.items():
        state, axis = opt.state[net.get_parameter(name)], next(m for m in change.moves if m.name == name).axes[0]
        assert torch.equal(state["exp_avg_sq"][:5], old) and old.any()
        assert torch.equal(state["exp_avg_sq"][5:], torch.zeros_like(old[:3]) if reset else old[axis.index[5:]])
