"""New entries of old tensors under Adam move as under a fresh optimizer, though their tensor counts on."""

import pytest
import torch
from torch import nn

import auxin as ax
from auxin import newborn
from auxin.ramp import ramps_on, saved

torch.set_num_threads(1)
KINDS = {
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "AMSGrad": (torch.optim.Adam, {"amsgrad": True}),
    "AMSGradW": (torch.optim.AdamW, {"amsgrad": True}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "Adamax": (torch.optim.Adamax, {}),
}


class Rows(nn.Module):
    """A table whose every entry gets the gradient that a test gives it."""

    def __init__(self, rows=4, columns=3):
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, columns, dtype=torch.float64))

    def forward(self, x):
        return x @ self.table.sum(0)


def aged(kind, options, t0, columns=3, build=Rows):
    """A network whose optimizer has stepped, and says that it did so ``t0`` times."""
    net = build()
    opt = kind(net.parameters(), **{"lr": 1e-3, "eps": 1e-15, **options})
    for _ in range(3):
        step(net, opt, {n: torch.randn_like(p) for n, p in net.named_parameters()})
    for state in opt.state.values():
        state["step"] = torch.tensor(float(t0))
    return net, opt


def step(net, opt, grads):
    for name, p in net.named_parameters():
        p.grad = grads[name].to(p.dtype)
    opt.step()
    opt.zero_grad()


def more_rows(net, opt, count, at=None, grower=None):
    """``count`` rows more, in front of row ``at`` or at the end."""
    with ax.surgery(net, opt) if grower is None else grower.surgery():
        old = net.table.data
        cut = len(old) if at is None else at
        net.table.data = torch.cat([old[:cut], torch.randn(count, old.shape[1], dtype=old.dtype), old[cut:]])


CASES = [(name, t0, decay) for name in list(KINDS)[:3] for t0 in (200, 100_000) for decay in (0.0, 0.1)]


@pytest.mark.parametrize(("name", "t0", "decay"), [*CASES, *((name, 200, 0.1) for name in list(KINDS)[3:])])
def test_they_move_as_under_a_fresh_optimizer(name, t0, decay):
    torch.manual_seed(0)
    kind, options = KINDS[name]
    net, opt = aged(kind, {**options, "weight_decay": decay}, t0)
    more_rows(net, opt, 2, at=1)
    new = slice(1, 3)
    twin = Rows(2)
    twin.table.data = net.table.data[new].clone()
    fresh = kind(twin.parameters(), **{"lr": 1e-3, "eps": 1e-15, **options, "weight_decay": decay})
    for k in range(300):
        grad = torch.randn(6, 3, dtype=torch.float64) + 0.3
        before, theirs = net.table.detach().clone(), twin.table.detach().clone()
        step(net, opt, {"table": grad})
        step(twin, fresh, {"table": grad[new]})
        moved, wanted = net.table.detach()[new] - before[new], twin.table.detach() - theirs
        assert (moved - wanted).norm() < 1e-10 * wanted.norm(), k
    assert (net.table[new] - twin.table).norm() < 1e-10 * twin.table.norm()
    assert len(opt._optimizer_step_pre_hooks) == 1 or name == "Adamax"


def test_a_step_with_a_closure_is_corrected_from_the_first_on():
    """As Lightning steps: the gradients come into being inside."""
    moved = []
    for by_closure in (False, True):
        torch.manual_seed(0)
        net, opt = aged(torch.optim.Adam, {"lr": 1e-3, "eps": 1e-15, "betas": (0.9, 0.999)}, 200)
        more_rows(net, opt, 2)
        before = net.table.detach().clone()

        def gradients(net=net, opt=opt):
            opt.zero_grad()
            (net.table * torch.arange(1.0, 4.0)).sum().backward()

        if by_closure:
            opt.step(gradients)
        else:
            gradients()
            opt.step()
        moved.append(net.table.detach() - before)
    assert torch.equal(*moved) and bool(moved[0].any())


def test_without_the_correction_the_overshoot_is_6_57_times():
    torch.manual_seed(0)
    worst = {}
    for corrected in (True, False):
        net, opt = aged(torch.optim.Adam, {}, 1_000_000)
        more_rows(net, opt, 1)
        if not corrected:
            ramps_on(opt).forget()
        moved = []
        for _ in range(40):
            before = net.table.detach().clone()
            step(net, opt, {"table": torch.full((5, 3), 0.5)})
            moved.append(float((before - net.table.detach())[-1, 0]) / 1e-3)
        worst[corrected] = max(moved), 1 + moved.index(max(moved))
    assert worst[False] == (pytest.approx(6.569, abs=1e-3), 12)
    assert worst[True][0] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam])
def test_where_it_is_not_known_second_moments_start_from_those_of_old_entries(kind):
    torch.manual_seed(0)
    net = Rows()
    opt = kind(net.parameters(), lr=1e-3)
    for _ in range(300):
        step(net, opt, {"table": torch.randn(4, 3)})
    more_rows(net, opt, 2)
    assert ramps_on(opt) is None and (opt.state[net.table]["exp_avg_sq"][4:] > 0).all()
    for _ in range(40):
        before = net.table.detach().clone()
        step(net, opt, {"table": torch.ones(6, 3)})
        moved = (net.table.detach() - before).abs()
        assert moved[4:].max() < 1.2e-3


def reference(grads, born, decay=0.1):
    """Rows that each have an optimizer of their own from the step on at which they were born."""
    rows, opts = {}, {}
    for k in range(len(grads)):
        for row, (at, value) in born.items():
            if at == k:
                rows[row] = nn.Parameter(value.clone())
                opts[row] = torch.optim.AdamW([rows[row]], lr=1e-3, eps=1e-15, weight_decay=decay)
            if at <= k:
                rows[row].grad = grads[k][row].clone()
                opts[row].step()
    return rows


def test_rows_and_columns_that_are_born_at_different_times():
    """Each entry is as young as its row or its column, whichever came later."""
    torch.manual_seed(0)
    net = Rows(2, 2)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3, eps=1e-15, weight_decay=0.1)
    grads = [torch.randn(5, 4, dtype=torch.float64) for _ in range(90)]
    born = {(i, j): (0, net.table.detach()[i, j].clone()) for i in range(2) for j in range(2)}
    for k, grad in enumerate(grads):
        if k in (20, 21, 50):
            with ax.surgery(net, opt):
                rows, columns = {20: (3, 2), 21: (3, 4), 50: (5, 4)}[k]
                old, wide = net.table.data, torch.randn(rows, columns, dtype=torch.float64)
                wide[: old.shape[0], : old.shape[1]] = old
                net.table.data = wide
            for i in range(rows):
                for j in range(columns):
                    born.setdefault((i, j), (k, net.table.detach()[i, j].clone()))
        step(net, opt, {"table": grad[: net.table.shape[0], : net.table.shape[1]]})
    assert len({at for at, _ in born.values()}) == 4
    for (i, j), value in reference(grads, born).items():
        assert abs(float(net.table.detach()[i, j] - value.detach())) < 1e-11, (i, j, born[i, j][0])


@pytest.mark.parametrize("lr", [1e-3, "tensor"])
@pytest.mark.parametrize("at", [None, 1])
def test_counts_that_lie_on_a_device_are_not_waited_for(monkeypatch, at, lr):
    """Those of capturable and fused steps; with them everything stays in tensors, and gives the same."""
    ends = []
    for on_device in (False, True):
        if on_device:
            monkeypatch.setattr(newborn, "_count", lambda opt, p: opt.state[p]["step"].clone())
        torch.manual_seed(0)
        rate = torch.tensor(1e-3, dtype=torch.float64) if lr == "tensor" else lr
        net, opt = aged(torch.optim.AdamW, {"weight_decay": 0.1, "lr": rate, "foreach": False}, 300)
        for _ in range(2):
            more_rows(net, opt, 2, at=at)
            for _ in range(20):
                step(net, opt, {"table": torch.randn(len(net.table), 3)})
        opt.step()
        ends.append(net.table.detach().clone())
    assert torch.allclose(*ends, rtol=1e-12, atol=0)


def test_half_precision():
    torch.manual_seed(0)
    net, opt = aged(
        torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-8, "lr": 0.1}, 5000, build=lambda: Rows().bfloat16()
    )
    more_rows(net, opt, 2)
    for _ in range(12):
        before = net.table.detach().clone()
        step(net, opt, {"table": torch.ones(6, 3)})
        assert (net.table.detach() - before)[4:].abs().max() < 0.16


def test_rewarm_counts_beside_it():
    torch.manual_seed(0)
    net, opt = aged(torch.optim.AdamW, {"weight_decay": 0.1}, 5000)
    grower = ax.Grower(net, opt, edits=lambda model: [], when=ax.when.every(10**9), rewarm=8)
    more_rows(net, opt, 2)
    plain = Rows()
    plain.table.data = net.table.data[4:].clone()
    fresh = torch.optim.AdamW(plain.parameters(), lr=1e-3, eps=1e-15, weight_decay=0.1)
    from auxin.axes import Part
    from auxin.ramp import Rewarm

    part = Part("table", (torch.arange(6) > 3, torch.zeros(3, dtype=torch.bool)))
    ramps_on(opt).ramps.insert(0, Rewarm([net.table], 8, parts={id(net.table): part}))
    for k in range(1, 12):
        grad = torch.randn(6, 3, dtype=torch.float64)
        before = net.table.detach()[4:].clone()
        plain.table.data.copy_(before)
        step(net, opt, {"table": grad})
        step(plain, fresh, {"table": grad[4:]})
        wanted = torch.lerp(before, plain.table.detach(), min(1.0, k / 8))
        assert torch.allclose(net.table.detach()[4:], wanted, rtol=0, atol=1e-13), k
    assert grower.model is net


def test_skipped_and_missing_steps_count_nothing():
    torch.manual_seed(0)
    net, opt = aged(torch.optim.AdamW, {"weight_decay": 0.1}, 1000)
    more_rows(net, opt, 1)
    before = net.table.detach().clone()
    opt.step()  # no gradient: no update, no decay
    assert torch.equal(net.table, before)
    step(net, opt, {"table": torch.ones(5, 3)})
    moved = net.table.detach() - before * (1 - 1e-4)
    assert torch.allclose(moved[-1], torch.full((3,), -1e-3, dtype=torch.float64), rtol=1e-9)


def test_it_ends_and_leaves_no_hook():
    torch.manual_seed(0)
    net, opt = aged(torch.optim.Adam, {"betas": (0.9, 0.95)}, 1000)
    more_rows(net, opt, 1)
    for k in range(1, 140):
        assert k > 121 or len(opt._optimizer_step_pre_hooks) == 1, k
        step(net, opt, {"table": torch.randn(5, 3)})
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks


def test_before_the_first_step_there_is_nothing_to_correct():
    net = Rows()
    opt = torch.optim.Adam(net.parameters())
    more_rows(net, opt, 1)
    assert ramps_on(opt) is None


def test_an_optimizer_that_starts_over_is_left_alone():
    torch.manual_seed(0)
    net, opt = aged(torch.optim.Adam, {}, 1000)
    more_rows(net, opt, 1)
    opt.state.clear()
    before = net.table.detach().clone()
    step(net, opt, {"table": torch.ones(5, 3)})
    assert torch.allclose(net.table.detach() - before, torch.tensor(-1e-3, dtype=torch.float64), rtol=1e-6)
    assert ramps_on(opt) is None


def test_sparse_rows():
    torch.manual_seed(0)
    results = []
    for late in (True, False):
        torch.manual_seed(1)
        net = nn.Embedding(4, 3, sparse=True).double()
        opt = torch.optim.SparseAdam(net.parameters(), lr=1e-3, eps=1e-15)
        for _ in range(50 if late else 0):
            net(torch.tensor([0, 2])).square().sum().backward()
            opt.step()
            opt.zero_grad()
        torch.manual_seed(2)
        with ax.surgery(net, opt):
            net.weight.data = torch.cat([net.weight.data, torch.randn(2, 3, dtype=torch.float64)])
            net.num_embeddings = 6
        for k in range(30):
            net(torch.tensor([1, 4] if k % 2 else [4, 5])).exp().sum().backward()
            opt.step()
            opt.zero_grad()
        results.append(net.weight.detach()[4:])
    assert torch.allclose(*results, rtol=1e-10, atol=0)


def run_of():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
    x = torch.randn(8, 3, dtype=torch.float64)
    return net, opt, x, ax.Grower(net, opt, edits=lambda model: [], when=ax.when.every(10**9), probe=x, keep=True)


def train(net, opt, x, steps):
    for _ in range(steps):
        opt.zero_grad()
        (net(x) - 1).square().mean().backward()
        opt.step()
    opt.zero_grad()


def test_saved_loaded_tried_and_undone(tmp_path):
    net, opt, x, grower = run_of()
    train(net, opt, x, 30)
    with grower.trial(ax.Widen("0", by=2)):
        train(net, opt, x, 5)
        assert ramps_on(opt) is not None
    assert ramps_on(opt) is None
    grower.grow(ax.Widen("0", by=2))
    assert ramps_on(opt) is not None
    grower.undo()
    assert ramps_on(opt) is None
    grower.grow(ax.Widen("0", by=2))
    train(net, opt, x, 5)
    first = saved(net, [opt])
    grower.grow(ax.Widen("0", by=2))
    assert saved(net, [opt]) != first
    train(net, opt, x, 1)
    grower.undo()
    assert saved(net, [opt]) == first
    train(net, opt, x, 4)
    with grower.trial(ax.Widen("0", by=1)):
        train(net, opt, x, 3)
    assert saved(net, [opt]) == first
    grower.grow(ax.Widen("0", by=2))
    train(net, opt, x, 2)
    ax.save(grower, tmp_path / "run")
    twin, topt, _, again = run_of()
    ax.load(tmp_path / "run", again)
    assert saved(twin, [topt]) == saved(net, [opt])
    for one, other in ((net, opt), (twin, topt)):
        train(one, other, x, 5)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_a_copy_of_a_young_block_is_as_young():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            return x + self.down(torch.tanh(self.up(x)))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(Block()), nn.Linear(3, 2))
    opt, x = torch.optim.AdamW(net.parameters(), lr=1e-2), torch.randn(8, 3)
    train(net, opt, x, 30)
    ax.grow(net, ax.Widen("0.0.up", by=2), opt, probe=x)
    train(net, opt, x, 2)
    ax.grow(net, ax.Duplicate("0", by=1, state="copy", output="keep"), opt, probe=x)
    names = saved(net, [opt])[0]["names"]
    assert {"0.0.up.weight", "0.1.up.weight", "0.1.up.bias"} <= set(names)
