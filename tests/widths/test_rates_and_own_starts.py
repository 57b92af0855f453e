"""Learning rates that follow the size (``lr="mup"``), copies that share equally, and starts of the user's own."""

import functools

import pytest
import torch
from test_layers_that_widen import ready
from torch import nn

import auxin as ax

torch.set_num_threads(1)


class Mlp(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Normed(nn.Module):
    """A stream under LayerNorm, with two residual blocks."""

    def __init__(self, d=8):
        super().__init__()
        self.embed = nn.Linear(5, d)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(d, 2 * d) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x):
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(self.norm(x))


def trained(net, opt, steps, seed=3, sched=None):
    generator = torch.Generator().manual_seed(seed)
    outs = []
    for _ in range(steps):
        x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (5, 3))
        out = net(x)
        outs.append(out.detach())
        opt.zero_grad()
        (out - y).square().mean().backward()
        opt.step()
        if sched is not None:
            sched.step()
    opt.zero_grad()
    return torch.stack(outs)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd momentum decay": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3, eps=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, eps=1e-4, weight_decay=0.1),
}


@pytest.mark.parametrize("build", [Mlp, Normed], ids=["mlp", "layer norms"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_copies_stay_on_the_way_of_the_small_network(build, name):
    edits = {
        Mlp: [ax.Widen("first", to=12, init="tile", lr="mup"), ax.Widen("second", to=18, init="tile", lr="mup")],
        Normed: [ax.Widen("embed", to=16, init="tile", lr="mup"), ax.Widen("ups.*", to=32, init="tile", lr="mup")],
    }[build]
    x = torch.randn(4, 5, dtype=torch.float64)
    runs = []
    for grows in (False, True):
        net, _ = ready(build, x)
        opt = OPTIMIZERS[name](net.parameters())
        sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step / 50))
        trained(net, opt, 20, sched=sched)
        if grows:
            for edit in edits:
                change = ax.grow(net, edit, opt, sched, probe=x)
                assert change.preserves, change
            assert len(opt.param_groups) > 1
        runs.append(trained(net, opt, 100, seed=4, sched=sched))
    error = float((runs[0] - runs[1]).abs().max() / runs[0].abs().max())
    print(f"{build.__name__}, {name}: the outputs over 100 steps differ by {error:.1e} of the largest")
    assert error < 1e-9


@pytest.mark.parametrize("init", ["tile", "zero"])
def test_without_it_they_leave_it(init):
    """The negative: rates that stay move what reads copies twice as far."""
    runs = []
    for lr in ("keep", "mup"):
        net, x = ready(Mlp, torch.randn(4, 5, dtype=torch.float64))
        opt = torch.optim.Adam(net.parameters(), lr=3e-3)
        ax.grow(net, ax.Widen("first", to=12, init=init, lr=lr), opt, probe=x)
        runs.append(trained(net, opt, 20))
    assert float((runs[0] - runs[1]).abs().max()) > 1e-4


def test_the_groups_say_what_they_are_and_follow_the_schedule():
    net, x = ready(Mlp, torch.randn(4, 5, dtype=torch.float64))
    opt = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    sched = torch.optim.lr_scheduler.StepLR(opt, 5, 0.5)
    change = ax.grow(net, ax.Widen("first", by=6, lr="mup"), opt, sched, probe=x)
    rate = {n: g["lr"] for g in opt.param_groups for n, p in net.named_parameters() for q in g["params"] if p is q}
    assert rate["second.weight"] == 0.005 and rate["first.weight"] == rate["last.weight"] == 0.01
    assert "0.5x the rate of group 0" in str(change)
    decay = next(g["weight_decay"] for g in opt.param_groups if any(p is net.second.weight for p in g["params"]))
    assert decay == 0.2
    trained(net, opt, 10, sched=sched)
    rates = [g["lr"] for g in opt.param_groups]
    assert rates[0] == 0.0025 and 0.00125 in rates
    again = ax.grow(net, ax.Widen("first", to=24, lr="mup"), opt, sched, probe=x)
    assert again.preserves
    rate = {n: g["lr"] for g in opt.param_groups for n, p in net.named_parameters() for q in g["params"] if p is q}
    assert rate["second.weight"] == pytest.approx(0.0025 / 4)


def test_undone_the_groups_are_as_before():
    net, x = ready(Mlp, torch.randn(4, 5, dtype=torch.float64))
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    grower = ax.Grower(net, opt, edits=ax.Widen("first", by=6, lr="mup"), when=ax.when.every(1), probe=x)
    trained(net, opt, 3)
    before = [list(map(id, g["params"])) for g in opt.param_groups]
    state = {id(p): {k: v.clone() for k, v in s.items()} for p, s in opt.state.items()}
    assert grower.step() is not None and len(opt.param_groups) > 1
    grower.undo()
    assert [list(map(id, g["params"])) for g in opt.param_groups] == before
    assert all(torch.equal(v, state[id(p)][k]) for p, s in opt.state.items() for k, v in s.items())


def test_a_run_with_such_groups_is_saved_and_goes_on(tmp_path):
    def begun():
        net, x = ready(Mlp, torch.randn(4, 5, dtype=torch.float64))
        opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        sched = torch.optim.lr_scheduler.StepLR(opt, 7, 0.5)
        edits = ax.Widen("first", by=6, lr="mup")
        return net, opt, sched, ax.Grower(net, opt, sched, edits=edits, when=ax.when.at([2]), probe=x)

    net, opt, sched, grower = begun()
    for _ in range(3):
        trained(net, opt, 2, sched=sched)
        grower.step()
    assert len(grower.journal) == 1
    ax.save(grower, tmp_path / "run")
    expected = trained(net, opt, 10, sched=sched)
    net, opt, sched, grower = begun()
    ax.load(tmp_path / "run", grower)
    assert torch.equal(trained(net, opt, 10, sched=sched), expected)


def test_where_no_rule_is_known_it_is_refused_and_nothing_changed():
    net, x = ready(Mlp, torch.randn(4, 5, dtype=torch.float64))
    opt = torch.optim.Rprop(net.parameters())
    before = {n: p.clone() for n, p in net.named_parameters()}
    with pytest.raises(ax.GrowthError, match='lr="mup".*Rprop.*Leave lr="keep"'):
        ax.grow(net, ax.Widen("first", by=6, lr="mup"), opt, probe=x)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    with pytest.raises(ax.GrowthError, match="lr='half'.*'keep' or 'mup'"):
        ax.grow(net, ax.Widen("first", by=6, lr="half"), opt, probe=x)


def test_muon_follows_the_shape_by_itself():
    net, x = ready(Mlp, torch.randn(4, 5, dtype=torch.float64))
    matrices = [p for p in net.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(matrices, lr=0.01)
    adam = torch.optim.AdamW([p for p in net.parameters() if p.dim() == 1], lr=0.01)
    ax.grow(net, ax.Widen("first", by=6, lr="mup"), muon, adam, probe=x)
    assert len(muon.param_groups) == 1


def test_tiled_doubling_is_exact_under_norms_and_odd_sizes_are_refused_or_exact():
    net, x = ready(Normed, torch.randn(4, 5, dtype=torch.float64))
    before = net(x)
    ax.grow(net, ax.Widen("embed", to=16, init="tile"), probe=x)
    error = float((net(x) - before).norm() / before.norm())
    print(f"a stream under LayerNorm, tiled: {error:.1e}")
    assert error < 1e-13
    with pytest.raises(ax.GrowthError, match="would change"):
        ax.grow(net, ax.Widen("embed", to=21, init="tile"), probe=x)


# ---- starts of one's own


def threes(module, site):
    """New units look at the first input only; what reads them stays zero."""
    with torch.no_grad():
        module.first.weight[6:] = 3.0
    return True


def loud(module, site):
    with torch.no_grad():
        module.second.weight[:, 6:] = 1.0


def overwrites(module, site):
    with torch.no_grad():
        module.first.weight[:7] = 0.0


def cuts(module, site):
    module.first.weight = nn.Parameter(module.first.weight[:7].detach())


def against_the_gradient(module, site):
    """New units along the direction that the loss wants most (the mirrored GradMax)."""
    gradient, value = site.output_gradients[0], site.evidence.batches[0][0]
    _, _, rows = torch.linalg.svd(gradient.T @ value, full_matrices=False)
    with torch.no_grad():
        module.first.weight[6:8] = rows[:2]
    return "preserves"


def test_a_start_of_ones_own_writes_new_entries():
    net, x = ready(Mlp, torch.randn(4, 5, dtype=torch.float64))
    before, old = net(x), net.first.weight.clone()
    change = ax.grow(net, ax.Widen("first", by=2, init=threes), probe=x)
    assert torch.equal(net.first.weight[:6], old) and bool((net.first.weight[6:] == 3).all())
    assert torch.allclose(net(x), before, atol=1e-14) and change.preserves and "threes" in change.how


def test_it_sees_gradients_and_evidence():
    net, x = ready(Mlp, torch.randn(4, 5, dtype=torch.float64))
    batches = [(torch.randn(32, 5, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64))]
    evidence = ax.Evidence(lambda m, b: (m(b[0]) - b[1]).square().mean(), batches)
    change = ax.grow(net, ax.Widen("first", by=2, init=against_the_gradient), probe=x, evidence=evidence)
    rows = net.first.weight[6:8]
    assert torch.allclose(rows @ rows.T, torch.eye(2, dtype=torch.float64), atol=1e-12) and change.preserves


def test_where_it_promises_nothing_the_function_may_change():
    net, x = ready(Mlp, torch.randn(4, 5, dtype=torch.float64))
    change = ax.grow(net, ax.Widen("first", by=2, init=loud), probe=x)
    assert not change.preserves and bool((net.second.weight[:, 6:] == 1).all())


@pytest.mark.parametrize(
    ("init", "match"),
    [
        (overwrites, "wrote into old entries of first.weight"),
        (cuts, r"left first.weight as \(7, 5\); it has to keep the shape \(8, 5\)"),
        (functools.partial(threes), "init"),
        ("threes", "init='threes' is not known"),
    ],
)
def test_what_it_may_not_do(init, match):
    net, x = ready(Mlp, torch.randn(4, 5, dtype=torch.float64))
    before = {n: p.clone() for n, p in net.named_parameters()}
    if isinstance(init, functools.partial):
        init = 5
    with pytest.raises(ax.GrowthError, match=match):
        ax.grow(net, ax.Widen("first", by=2, init=init), probe=x)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


CALLS = []


def noted(module, site):
    CALLS.append((site.path, type(module).__name__))
    return True


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def test_a_pattern_asks_it_once_for_each_block():
    net, x = ready(lambda: nn.Sequential(Block(), Block(), Block()), torch.randn(4, 5, dtype=torch.float64))
    CALLS.clear()
    ax.grow(net, ax.Widen("*.up", by=2, init=noted), probe=x)
    assert CALLS == [("0", "Block"), ("1", "Block"), ("2", "Block")]
