"""Experts of a mixture: copied with the router exactly where the probe shows it, and called changed where not (I11)."""

import copy
import dataclasses
import functools

import pytest
import torch
from test_listed import flops
from test_states import MOMENTS, still, watched
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax
from auxin import GrowthError
from auxin.modules import Mixture

torch.set_num_threads(1)
X = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
TILE = functools.partial(ax.Widen, unit="experts", init="tile")
COPY = functools.partial(ax.Widen, unit="experts", init="copy")


class FeedForward(nn.Module):
    def __init__(self, dim=6, hidden=9):
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Modules(nn.Module):
    """Experts as modules, in a loop. ``weigh``: how logits become weights of the chosen ones."""

    def __init__(self, dim=6, experts=4, top_k=2, weigh="renormalised", bias=False):
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=bias)
        self.experts = nn.ModuleList(FeedForward(dim) for _ in range(experts))
        self.top_k, self.num_experts, self.weigh = top_k, experts, weigh

    def forward(self, x):
        logits = self.router(x)
        probs = logits.sigmoid() if "sigmoid" in self.weigh else logits.softmax(-1)
        if self.weigh == "all":
            return sum(probs[..., n : n + 1] * expert(x) for n, expert in enumerate(self.experts))
        if self.weigh == "logits":  # a softmax over the chosen ones, as in Mixtral's paper
            weights, chosen = torch.topk(logits, k=self.top_k, dim=-1)
            weights = weights.softmax(-1)
        else:
            weights, chosen = probs.topk(self.top_k, dim=-1)
        if "renormalised" in self.weigh:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for n in range(self.num_experts):
            rows, places = torch.where(chosen == n)
            out = out.index_add(0, rows, weights[rows, places, None] * self.experts[n](x[rows]))
        return out


class Fused(nn.Module):
    """Experts as tensors of three dimensions: all of them by einsum, or the chosen ones by a gather."""

    def __init__(self, dim=6, experts=4, top_k=2, hidden=9):
        super().__init__()
        self.gate = nn.Linear(dim, experts)
        self.w1, self.b1 = nn.Parameter(torch.randn(experts, hidden, dim)), nn.Parameter(torch.randn(experts, hidden))
        self.w2 = nn.Parameter(torch.randn(experts, dim, hidden) / 3)
        self.register_buffer("seen", torch.zeros(experts))
        self.top_k = top_k

    def forward(self, x):
        probs = self.gate(x).softmax(-1)
        if self.top_k is None:
            hidden = torch.tanh(torch.einsum("bd,ehd->beh", x, self.w1) + self.b1)
            return torch.einsum("be,beh,edh->bd", probs, hidden, self.w2)
        weights, chosen = probs.topk(self.top_k)
        hidden = torch.tanh((self.w1[chosen] @ x[:, None, :, None]).squeeze(-1) + self.b1[chosen])
        return (weights[..., None] * (self.w2[chosen] @ hidden[..., None]).squeeze(-1)).sum(1)


class Named(nn.Module):
    """Experts under names of their own, and numbers in a configuration."""

    @dataclasses.dataclass
    class Config:
        n_experts: int = 4
        active: int = 1
        layers: int = 4  # as many, and no number of experts

    def __init__(self):
        super().__init__()
        self.config = self.Config()
        self.choose = nn.Linear(6, 4)
        self.experts = nn.ModuleDict({f"expert_{n}": FeedForward() for n in range(4)})

    def forward(self, x):
        weights, chosen = self.choose(x).softmax(-1).topk(self.config.active)
        assert self.config.n_experts == len(self.experts) and self.config.layers == 4
        parts = [((chosen == n) * weights).sum(-1, keepdim=True) * e(x) for n, e in enumerate(self.experts.values())]
        return sum(parts)


class ManyGates(nn.Module):
    """Two routers share the experts, as of two tasks."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))
        self.experts = nn.ModuleList(FeedForward() for _ in range(4))
        self.top_k = 2  # of something else

    def forward(self, x):
        each = torch.stack([expert(x) for expert in self.experts], -1)
        return sum((gate(x).softmax(-1)[:, None] * each).sum(-1) for gate in self.gates)


class Net(nn.Module):
    def __init__(self, mixture):
        super().__init__()
        self.first, self.moe, self.last = nn.Linear(3, 6), mixture, nn.Linear(6, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.moe(x))


def net_of(mixture=Modules, **options):
    torch.manual_seed(0)
    net = Net(mixture(**options)).double()
    with torch.no_grad():
        for name, p in net.moe.named_parameters():
            p.mul_(3 if "router" in name or "gate" in name else 1)
    return net


def adam(net):
    return torch.optim.AdamW(net.parameters(), lr=0.01)


def trained(net, opt, steps=3, average=None):
    for number in range(steps):
        x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        opt.zero_grad()
        (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
        opt.step()
        if average is not None:
            average.update_parameters(net)
    opt.zero_grad()
    return net


def apart(a, b):
    return float(((a - b).norm() / b.norm()).detach())


EXACT = {
    "renormalised": (Modules, {}, TILE("moe.router", to=8), 4),
    "three times, renormalised": (Modules, {}, TILE("moe.router", by=8), 6),
    "not renormalised": (Modules, {"weigh": "plain"}, TILE("moe.router", to=8), 4),
    "sigmoids, renormalised": (Modules, {"weigh": "sigmoid, renormalised"}, TILE("moe.router", to=8), 4),
    "softmax of the chosen": (Modules, {"weigh": "logits"}, TILE("moe.router", to=8), 4),
    "one chosen": (Modules, {"weigh": "plain", "top_k": 1}, TILE("moe.router", to=8), 2),
    "all": (Modules, {"weigh": "all"}, TILE("moe.router", to=8), 2),
    "all, with a bias, not evenly": (Modules, {"weigh": "all", "bias": True}, TILE("moe.router", to=11), 2),
    "fused, gathered": (Fused, {}, TILE("moe.gate", to=8), 4),
    "fused, one chosen": (Fused, {"top_k": 1}, TILE("moe.gate", to=12), 3),
    "fused, einsum": (Fused, {"top_k": None}, TILE("moe.gate", to=8), None),
    "fused, einsum, not evenly": (Fused, {"top_k": None}, TILE("moe.gate", to=5), None),
    "two routers, not evenly": (ManyGates, {}, TILE("moe.gates.*", to=6), 2),
    "of ours": (functools.partial(Mixture, FeedForward, 6, 4), {}, TILE("moe.router", to=8), 4),
}


@pytest.mark.parametrize("case", EXACT)
def test_copies_of_experts_keep_the_function(case):
    build, options, edit, top_k = EXACT[case]
    net = net_of(build, **options)
    opt = adam(net)
    trained(net, opt)
    before, held = net(X), {id(p) for p in net.parameters()}
    change = ax.grow(net, edit, opt, probe=X)
    error = apart(net(X), before)
    print(f"\n{case}: {error:.1e}; {change}")
    assert change.preserves and error < 1e-13 and held <= {id(p) for p in net.parameters()}
    assert net.moe.top_k == top_k
    trained(net, opt)
    ax.verify(net, opt)


@pytest.mark.parametrize(
    ("options", "edit", "says"),
    [
        (
            {},
            TILE("moe.router", by=4),
            ("moe.router.out_features 4 -> 8", "moe.top_k 2 -> 4", "moe.num_experts 4 -> 8"),
        ),
        ({"mixture": Fused}, TILE("moe.gate", by=4), ("moe.gate.out_features 4 -> 8", "moe.top_k 2 -> 4")),
        ({"weigh": "all", "bias": True}, TILE("moe.router", by=1), ("moe.router.out_features 4 -> 5",)),
        ({"weigh": "sigmoid"}, None, ()),
    ],
    ids=["modules", "fused", "soft", "not divided by their sum"],
)
def test_experts_are_listed_where_copies_keep_the_function(options, edit, says):
    """By the fewest that do; what the row says is what happens."""
    net = net_of(**options)
    found = [w for w in ax.sites(net, X).widths if w.edit is not None and w.edit.unit == "experts"]
    assert [w.edit for w in found] == ([edit] if edit else [])
    for width in found:
        assert f"{width.fits[0]}  " in str(ax.sites(net, X).widths) and "init='tile'" in width.fits[0]
        names, before, spent = dict(net.state_dict()), net(X).detach(), flops(net, X)
        shapes = {name: t.shape for name, t in names.items()}
        change = ax.grow(net, eval(width.fits[0], {"Widen": ax.Widen}), probe=X)
        assert change.preserves and apart(net(X).detach(), before) < 1e-13
        assert change.added_parameters == width.parameters and set(says) <= set(width.attributes)
        assert flops(net, X) - spent == pytest.approx(width.flops)
        resized = {name for name, t in net.state_dict().items() if name in shapes and t.shape != shapes[name]}
        assert resized <= {*width.makes, *width.along}


def test_numbers_in_a_configuration_and_names_of_a_dictionary_follow():
    net = net_of(Named)
    before = net(X)
    change = ax.grow(net, TILE("moe.choose", to=8), adam(net), probe=X)
    assert change.preserves and apart(net(X), before) < 1e-13
    assert net.moe.config == Named.Config(n_experts=8, active=2)
    assert list(net.moe.experts)[-2:] == ["expert_6", "expert_7"]


def test_what_does_not_keep_the_function_is_not_called_so():
    """As many chosen as before, more copies of some without a bias, sigmoids that are not divided by their sum."""
    found = {}
    for name, options, edit in (
        ("as many chosen as before", {}, COPY("moe.router", to=8)),
        ("as many chosen as before, fused", {}, COPY("moe.gate", to=8)),
        ("not evenly, without a bias", {"weigh": "all"}, COPY("moe.router", to=6)),
        ("sigmoids", {"weigh": "sigmoid"}, COPY("moe.router", to=8)),
    ):
        net = net_of(Fused if "fused" in name else Modules, **options)
        before = net(X)
        change = ax.grow(net, edit, adam(net), probe=X)
        found[name] = apart(net(X), before)
        assert not change.preserves and "function changed" in str(change), name
    print("\n" + "\n".join(f"{name}: {error:.2f}" for name, error in found.items()))
    assert min(found.values()) > 0.02


def test_as_many_chosen_as_before_changes_the_mixture_by_more_than_a_third():
    net = net_of()
    x = net.first(X)
    before = net.moe(x)
    ax.grow(net, COPY("moe.router", to=8), adam(net), probe=X)
    error = apart(net.moe(x), before)
    print(f"\nthe mixture's own outputs: {error:.2f}")
    assert net.moe.top_k == 2 and error > 0.34


REFUSED = {
    "a sigmoid": (Modules, {"weigh": "sigmoid"}, TILE("moe.router", to=8), r"would change .* 4 of 8.*init='copy'"),
    "uneven, chosen": (Modules, {}, TILE("moe.router", to=6), r"chooses 2 of 4 experts.*no multiple of 4; use to=8"),
    "uneven, no bias": (Modules, {"weigh": "all"}, TILE("moe.router", to=6), r"-log\(copies\).*auxin\.Replace\('moe"),
    "zero": (Modules, {}, ax.Widen("moe.router", to=8, unit="experts"), r"init='zero' cannot keep.*init='tile'"),
    "no experts": (Modules, {}, TILE("first", to=12), r"around first \(Linear\) there is no list.*Name the layer"),
    "no more": (Modules, {}, TILE("moe.router", to=4), r"moe\.router chooses among 4 experts already"),
    "no unit": (Modules, {}, ax.Widen("moe.router", by=4), r"If it chooses.*Widen\('moe.router', by=4, unit='experts'"),
    "experts alone": (Modules, {}, ax.Duplicate("moe.experts"), r"Widen\('moe.router', to=8, unit='experts', init='t"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leads_to_a_call_that_works(case):
    build, options, edit, words = REFUSED[case]
    net = net_of(build, **options)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(GrowthError, match=words) as error:
        ax.grow(net, edit, adam(net), probe=X)
    print(error.value)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()) and net.moe.top_k == 2


def test_words_that_mean_nothing_are_refused_where_they_are_written():
    with pytest.raises(GrowthError, match=r"lr='mup' follows sizes of layers"):
        TILE("moe.router", to=8, lr="mup")
    with pytest.raises(GrowthError, match=r"init='copy' is not known"):
        ax.Widen("first", by=2, init="copy")


def test_a_router_gets_a_bias_as_the_message_says():
    net = net_of(weigh="all")
    before, opt = net(X), adam(net)
    edits = [ax.Replace("moe.router", functools.partial(nn.Linear, 6, 4), init="zero"), TILE("moe.router", to=6)]
    ax.grow(net, edits, opt, probe=X)
    assert apart(net(X), before) < 1e-13 and len(net.moe.experts) == 6


class Literal(Modules):
    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        return sum(((chosen == n) * weights).sum(-1, keepdim=True) * e(x) for n, e in enumerate(self.experts))


def test_a_number_in_the_code_is_refused_and_reported():
    net = net_of(Literal)
    net.moe.top_k = 3  # says something else
    with pytest.raises(GrowthError, match=r"by a number that no attribute holds; of 8 it has to choose 4\. Make it"):
        ax.grow(net, TILE("moe.router", to=8), adam(net), probe=X)
    assert not ax.grow(net, COPY("moe.router", to=8), adam(net), probe=X).preserves


@pytest.mark.parametrize("case", [name for name in EXACT if name != "one chosen"])
def test_moments_are_those_of_a_network_that_had_the_copies_all_along(case):
    build, options, edit, _ = EXACT[case]
    net = net_of(build, **options).eval()
    probes = [torch.randn_like(X) for _ in range(3)]
    opt = still(net)
    watched(net, probes, opt)
    ax.grow(net, edit, opt, probe=X)
    fresh = still(net)
    watched(net, probes, fresh)
    for name, p in net.named_parameters():
        state, wanted = opt.state.get(p), fresh.state.get(p)
        if wanted is None:  # no row was given to this expert
            continue
        for key in MOMENTS:
            size = max(float(one[key].norm()) for one in fresh.state.values())
            assert (state[key] - wanted[key]).norm() <= 1e-12 * wanted[key].norm() + 1e-15 * size, (name, key)
        assert state["step"] == wanted["step"], name


def test_without_their_share_moments_would_be_twice_as_large():
    """The negative of the test above: what a plain copy of the state would hold."""
    net = net_of()
    opt = adam(net)
    trained(net, opt)
    old = net.moe.experts[1].up.weight
    before = opt.state[old]["exp_avg"].clone(), opt.state[old]["exp_avg_sq"].clone()
    ax.grow(net, TILE("moe.router", to=8), opt, probe=X)
    for one in (old, net.moe.experts[5].up.weight):
        assert torch.equal(2 * opt.state[one]["exp_avg"], before[0])
        assert torch.equal(4 * opt.state[one]["exp_avg_sq"], before[1])


def test_states_of_copies_may_start_fresh():
    for build, at in ((Modules, "moe.router"), (Fused, "moe.gate")):
        net = net_of(build)
        opt = adam(net)
        trained(net, opt)
        ax.grow(net, TILE(at, to=8, state="reset"), opt, probe=X)
        weight = net.get_submodule(at).weight
        assert not opt.state[weight]["exp_avg"][4:].any() and opt.state[weight]["exp_avg"][:4].any()
        if build is Modules:
            assert net.moe.experts[6].up.weight not in opt.state
        trained(net, opt)


@pytest.mark.parametrize("case", ["renormalised", "all, with a bias, not evenly", "fused, gathered"])
def test_averages_keep_their_own_function(case):
    build, options, edit, _ = EXACT[case]
    net = net_of(build, **options)
    opt, average = adam(net), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    trained(net, opt, 4, average)
    before = average(X)
    assert apart(before, net(X)) > 1e-4
    ax.grow(net, edit, opt, average, probe=X)
    assert apart(average(X), before) < 1e-13
    trained(net, opt, 4, average)


@pytest.mark.parametrize("case", ["renormalised", "all, with a bias, not evenly", "fused, gathered"])
def test_it_is_undone_saved_loaded_and_replayed(case, tmp_path):
    build, options, edit, _ = EXACT[case]

    def begun():
        net = net_of(build, **options)
        opt = adam(net)
        return net, opt, ax.Grower(net, opt, edits=edit, when=ax.when.every(10**6), probe=X)

    net, opt, grower = begun()
    trained(net, opt)
    before, numbers, state = net(X), net.moe.top_k, copy.deepcopy(opt.state_dict())
    with grower.trial(edit):
        pass
    grower.grow(edit)
    grower.undo()
    assert torch.equal(net(X), before) and net.moe.top_k == numbers
    assert all(torch.equal(v, opt.state_dict()["state"][i][k]) for i, s in state["state"].items() for k, v in s.items())
    grower.grow(edit)
    trained(net, opt)
    ax.save(grower, tmp_path / "run")
    expected = trained(net, opt)(X)
    other, opt, loaded = begun()
    ax.load(tmp_path / "run", loaded)
    assert torch.equal(trained(other, opt)(X), expected) and other.moe.top_k == net.moe.top_k
    with torch.device("meta"):
        twin = Net(build(**options))
    ax.replay(twin, grower.journal)
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in net.named_parameters()}


def test_noise_parts_copies_and_gives_up_the_promise():
    for build, at in ((Modules, "moe.router"), (Fused, "moe.gate")):
        net = net_of(build)
        before = net(X)
        change = ax.grow(net, TILE(at, to=8, noise=0.01), adam(net), probe=X)
        assert not change.preserves and 0 < apart(net(X), before) < 0.1
        weight = net.get_submodule(at).weight
        assert not torch.equal(weight[4:], weight[:4])


# ---- sparse upcycling


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mlp, self.last = nn.Linear(3, 6), FeedForward(), nn.Linear(6, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.mlp(x))


def upcycle(**options):
    return ax.Replace("mlp", functools.partial(Mixture, FeedForward, width=6, experts=8, **options), init="copies")


def dense():
    torch.manual_seed(0)
    net = Dense().double()
    return net, adam(net)


def test_a_dense_layer_becomes_a_mixture_of_its_copies(tmp_path):
    net, opt = dense()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    trained(net, opt, 4, average)
    before, mean, weight = net(X), average(X), net.mlp.up.weight
    moment = opt.state[weight]["exp_avg"].clone()
    edit = upcycle()
    grower = ax.Grower(net, opt, average, edits=edit, when=ax.when.every(10**6), probe=X)
    change = grower.grow(edit)
    error = apart(net(X), before)
    print(f"\n{error:.1e}; {change}")
    assert change.preserves and error < 1e-13 and apart(average(X), mean) < 1e-13
    assert net.mlp.experts[0].up.weight is weight and net.mlp.router.weight.std() < 0.03
    for expert in net.mlp.experts:
        assert torch.equal(opt.state[expert.up.weight]["exp_avg"] * 8, moment)
    grower.undo()
    assert torch.equal(net(X), before) and torch.equal(opt.state[weight]["exp_avg"], moment)
    grower.grow(edit)
    trained(net, opt, 3, average)
    ax.save(grower, tmp_path / "run")
    expected = trained(net, opt, 3, average)(X)
    other, opt = dense()
    average = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    ax.load(tmp_path / "run", ax.Grower(other, opt, average, edits=edit, when=ax.when.every(10**6), probe=X))
    assert torch.equal(trained(other, opt, 3, average)(X), expected)


def test_weights_that_do_not_sum_to_one_are_not_called_preserving():
    net, opt = dense()
    x = net.first(X)
    before = net.mlp(x)
    change = ax.grow(net, upcycle(renormalise=False), opt, probe=X)
    error = apart(net.mlp(x), before)
    print(f"\nnot renormalised: {error:.2f}; {change}")
    assert not change.preserves and "copies do not keep the function" in str(change)
    assert error == pytest.approx(0.74, abs=0.03)


def test_an_upcycled_mixture_gets_more_experts():
    net, opt = dense()
    before = net(X)
    ax.grow(net, [upcycle(), TILE("mlp.router", to=16)], opt, probe=X)
    assert apart(net(X), before) < 1e-13 and len(net.mlp.experts) == 16 and net.mlp.top_k == 4


def fused():
    return Fused()


def test_a_mixture_without_a_copy_of_the_layer_is_refused():
    net, opt = dense()
    with pytest.raises(GrowthError, match=r"no module inside the new Fused has the tensors of the old Fe.*, up\."):
        ax.grow(net, ax.Replace("mlp", fused, init="copies"), opt, probe=X)


def test_a_mixture_chooses_no_more_than_it_has():
    with pytest.raises(GrowthError, match=r"experts=2, top_k=3\): choose from 1 to all"):
        Mixture(FeedForward, 6, experts=2, top_k=3)


# ---- models of transformers


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64)
    return MixtralForCausalLM(MixtralConfig(vocab_size=50, **sizes, **more))


def qwen(renormalise=False):
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64)
    inner = dict(moe_intermediate_size=12, shared_expert_intermediate_size=12, norm_topk_prob=renormalise)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=50, **sizes, **more, **inner))


@pytest.mark.parametrize("make", [mixtral, qwen, functools.partial(qwen, True)], ids=["mixtral", "qwen", "qwen_sum"])
def test_models_of_transformers_grow_experts_and_are_loaded_by_plain_transformers(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    for name, p in model.named_parameters():
        if name.endswith("gate.weight"):
            nn.init.normal_(p, std=0.5)
    ids = torch.randint(50, (2, 9))
    opt = torch.optim.AdamW(model.parameters())
    model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
    opt.step()
    opt.zero_grad()
    before = model(ids).logits
    change = ax.grow(model, TILE("model.layers.*.mlp.gate", to=8), opt, probe={"input_ids": ids})
    assert change.preserves and apart(model(ids).logits, before) < 1e-6
    config = model.config
    assert config.num_experts_per_tok == 4 == model.num_experts_per_tok and model.num_experts == 8
    assert getattr(config, "num_local_experts", None) == 8 or config.num_experts == 8
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert plain.model.layers[0].mlp.gate.top_k == 4 and apart(plain(ids).logits, before) < 1e-6
    model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
    opt.step()


def test_a_configuration_says_one_number_for_all_layers():
    torch.manual_seed(0)
    model, ids = mixtral().eval(), torch.randint(50, (2, 9))
    edit = TILE("model.layers.0.mlp.gate", to=8)
    with pytest.raises(GrowthError, match=r"its configuration cannot express the grown model .*stock=False"):
        ax.grow(model, edit, probe={"input_ids": ids})
    assert ax.grow(model, edit, probe={"input_ids": ids}, stock=False).preserves
