"""What ``auxin.score`` computes is what the loss does, in float64, at small steps; and what is not exact is not."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxin as ax
from auxin import score
from auxin.statistics import Pair, PairMoments, Proposal, Site, measured

PAIR = Pair("0", "2")


def close(a: Tensor | float, b: Tensor | float, rel: float) -> bool:
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return bool((a - b).norm() <= rel * b.norm())


class Case:
    """A small network ``W2 s(W1 x + b1) + b2`` on data of its own, in float64."""

    def __init__(self, activation: nn.Module, bias: bool = True):
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 5, bias), activation, nn.Linear(5, 4, bias)).double()
        self.x = torch.randn(300, 6).double()
        teacher = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
        self.y = teacher(self.x).detach() + self.x[:, :4] / 2
        self.whole = ax.Evidence(self.loss, [(self.x, self.y)])

    @staticmethod
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum(1).mean() / 2

    def moments(self, proposals: dict[Pair, Proposal] | None = None) -> PairMoments:
        return measured(self.net, self.whole, [PAIR], proposals=proposals, quiet=True)[PAIR]

    @torch.no_grad()
    def at(self, gamma: float, A: Tensor | None, O: Tensor | None, update: Tensor | None = None) -> float:
        """The loss with new units, both factors times the root of gamma, and the old weights moved by gamma."""
        first, s, second = self.net
        z = second(s(first(self.x)))
        if A is not None and O is not None:
            root = math.sqrt(gamma)
            z = z + s(with_one(self.x, first) @ A * root) @ O.T * root
        if update is not None:
            z = z + gamma * with_one(s(first(self.x)), second) @ update.T
        return float((z - self.y).square().sum(1).mean() / 2)

    def fall(self, gamma: float, *change: Tensor | None) -> float:
        return self.at(0.0, None, None) - self.at(gamma, *change)


def with_one(rows: Tensor, layer: nn.Module) -> Tensor:
    return F.pad(rows, (0, 1), value=1.0) if layer.bias is not None else rows


# T1


@pytest.mark.parametrize("bias", [True, False])
def test_tiny_brings_what_it_says(bias: bool) -> None:
    case = Case(nn.Tanh(), bias)
    found = score.tiny(case.moments(), k=3)
    joint = case.fall(1e-5, found.A, found.O, found.update) / (1e-5 * (found.d1 + found.linear))
    alone = case.fall(1e-5, found.A, found.O) / (1e-5 * found.linear)
    old = case.fall(1e-5, None, None, found.update) / (1e-5 * found.d1)
    assert all(0.999 < ratio < 1.001 for ratio in (joint, alone, old)), (joint, alone, old)


def test_the_sum_of_squares_is_not_what_units_bring_where_old_ones_overlap() -> None:
    case = Case(nn.Tanh())
    found = score.tiny(case.moments(), k=3)
    naive = float(found.singular[:3].square().sum())
    assert 0.999 < case.fall(1e-5, found.A, found.O) / (1e-5 * found.linear) < 1.001
    assert abs(naive / found.linear - 1) > 0.01


def test_a_slope_that_is_not_one() -> None:
    class Steep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(-3 * x)

    case = Case(Steep())
    found = score.tiny(case.moments(), k=2, slope=-3.0)
    assert 0.999 < case.fall(1e-6, found.A, found.O) / (1e-6 * found.linear) < 1.001
    assert found.linear > 0


# T2


def rows_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    first, s, second = case.net
    z = second(s(first(case.x)))
    return with_one(case.x, first), with_one(s(first(case.x)), second).detach(), (case.y - z).detach()


def test_the_objective_of_tiny_is_the_lowest() -> None:
    case, k = Case(nn.Tanh()), 2
    found = score.tiny(case.moments(), k)
    X, H, D = rows_of(case)
    update = torch.linalg.lstsq(H, D).solution
    assert close(found.update.T, update, 1e-10)
    D_r = D - H @ update
    objective = float((D_r - X @ found.A @ found.O.T).square().sum() / len(X))
    assert close(objective, float(D_r.square().sum() / len(X) - found.singular[:k].square().sum()), 1e-10)
    best = min(alternating(X, D_r, k, seed) for seed in range(20))
    assert close(objective, best, 1e-8)


def alternating(X: Tensor, D: Tensor, k: int, seed: int) -> float:
    """Reduced-rank regression by alternating least squares."""
    A = torch.randn(X.shape[1], k, generator=torch.Generator().manual_seed(seed), dtype=X.dtype)
    for _ in range(120):
        O = torch.linalg.lstsq(X @ A, D).solution.T
        A = torch.linalg.lstsq(X, D @ torch.linalg.pinv(O.T)).solution
    return float((D - X @ A @ O.T).square().sum() / len(X))


def test_moments_without_full_rank_are_inverted_where_they_can_be() -> None:
    case = Case(nn.Tanh())
    case.x[:, 5] = 2 * case.x[:, 4]
    case.net[0].weight.data[4] = case.net[0].weight.data[3]
    case.net[0].bias.data[4] = case.net[0].bias.data[3]
    found = score.tiny(case.moments(), 2)
    _, H, D = rows_of(case)
    assert close(H @ found.update.T, H @ torch.linalg.lstsq(H, D, driver="gelsd").solution, 1e-8)
    assert found.A.isfinite().all() and found.A.abs().max() < 100
    assert 0.999 < case.fall(1e-5, found.A, found.O, found.update) / (1e-5 * (found.d1 + found.linear)) < 1.001


@pytest.mark.parametrize("shape", [(200, 160), (160, 200)])
@pytest.mark.parametrize("spectrum", ["flat", "steep", "short"])
def test_the_fast_ways_are_the_obvious_ones(shape: tuple[int, int], spectrum: str) -> None:
    torch.manual_seed(0)
    Y = torch.randn(shape).double()
    if spectrum == "steep":
        Y = Y * torch.logspace(0, -9, shape[1]).double()
    if spectrum == "short":
        Y = Y[:, :5] @ torch.randn(5, shape[1]).double()
    k = 5 if spectrum == "short" else 12
    U, sigma, V = score._svd(Y, k)
    U_all, expected, Vh = torch.linalg.svd(Y, full_matrices=False)
    assert close(sigma[:k], expected[:k], 1e-10 if spectrum == "flat" else 1e-7)
    best = U_all[:, :k] * expected[:k] @ Vh[:k]
    assert close(U * sigma[:k] @ V.T, best, 1e-3 if spectrum == "flat" else 1e-7)
    assert (Y - U * sigma[:k] @ V.T).norm() <= (Y - best).norm() * (1 + 1e-9) + 1e-7
    assert (V.T @ V - torch.eye(k)).abs().max() < 1e-6 and (U.T @ U - torch.eye(k)).abs().max() < 1e-6
    S = Y.T @ Y
    white, back = score.whitening(S, 1e-12)
    assert close(S @ back(white(S)), S, 1e-6)


# T3 and S4


def test_gradmax_has_the_largest_gradient_of_all_orthogonal_columns() -> None:
    case, k, c = Case(nn.Tanh()), 3, 0.7
    A, O, sigma = score.gradmax(case.moments(), k)
    expected = c**2 * float(sigma[:k].square().sum())

    def norm(columns: Tensor) -> float:
        return float(gradient_of_incoming(case, c * columns).square().sum())

    assert close(norm(O), expected, 1e-10)
    generator = torch.Generator().manual_seed(0)
    draws = torch.linalg.qr(torch.randn(2000, 4, k, generator=generator, dtype=torch.float64)).Q
    assert max(norm(draw) for draw in draws) <= expected * (1 + 1e-12)
    for columns in (A, O):
        overlaps = columns.T @ columns - torch.eye(k)
        assert overlaps.abs().max() < 1e-6


def gradient_of_incoming(case: Case, O: Tensor) -> Tensor:
    """By autograd: of incoming weights that are zero."""
    first, s, second = case.net
    W = torch.zeros(7, O.shape[1], dtype=torch.float64, requires_grad=True)
    z = second(s(first(case.x))) + s(with_one(case.x, first) @ W) @ O.T
    return torch.autograd.grad((z - case.y).square().sum(1).mean() / 2, W)[0]


def test_gradmax_the_other_way_round() -> None:
    case, k, c = Case(nn.Tanh()), 3, 1e-5
    A, _, sigma = score.gradmax(case.moments(), k)
    O = torch.zeros(4, k, dtype=torch.float64, requires_grad=True)
    first, s, second = case.net
    z = second(s(first(case.x))) + s(with_one(case.x, first) @ (c * A)) @ O.T
    (found,) = torch.autograd.grad((z - case.y).square().sum(1).mean() / 2, O)
    assert close(float(found.square().sum()), c**2 * float(sigma[:k].square().sum()), 1e-6)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradmax_of_convolutions_is_exact_with_zero_padding_too(padding: int, stride: int) -> None:
    net, x, y = convolutions(padding, stride)
    evidence = ax.Evidence(lambda model, batch: F.cross_entropy(model(batch[0]).mean((2, 3)), batch[1]), [(x, y)])
    found = measured(net, evidence, [PAIR], quiet=True)[PAIR]
    _, O, sigma = score.gradmax(found, 2)
    W = torch.zeros(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    kernel = O.view(9, 3, 2).permute(1, 2, 0).reshape(3, 2, 3, 3)
    first, s, second = net
    hidden = torch.tanh(F.conv2d(x, W, padding=padding, stride=stride))
    z = second(s(first(x))) + F.conv2d(hidden, kernel, padding=padding, stride=stride)
    (grad,) = torch.autograd.grad(F.cross_entropy(z.mean((2, 3)), y), W)
    assert close(grad.square().sum(), float((found.M[:-1] @ O).square().sum()), 1e-8)
    assert close(float((found.M @ O).square().sum()), float(sigma[:2].square().sum()), 1e-10)


def convolutions(padding: int, stride: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, stride, padding), nn.Tanh(), nn.Conv2d(4, 3, 3, stride, padding)).double()
    return net, torch.randn(30, 2, 9, 9).double(), torch.randint(3, (30,))


# T4


@pytest.mark.parametrize("name", ["tanh", "softplus"])
def test_a_split_changes_the_loss_as_its_eigenvalue_says(name: str) -> None:
    s = {"tanh": torch.tanh, "softplus": F.softplus}[name]
    second = {
        "tanh": lambda z: -2 * z.tanh() * (1 - z.tanh() ** 2),
        "softplus": lambda z: z.sigmoid() * (1 - z.sigmoid()),
    }[name]
    torch.manual_seed(2)
    X, y = torch.randn(400, 3).double(), torch.randn(400).double()
    theta, out = torch.randn(4, 3).double(), torch.randn(4).double()
    residual = s(X @ theta.T) @ out - y
    values, vectors = score.splitting(X, residual[:, None] * out, second(X @ theta.T))
    assert (values < 0).any()
    for unit in range(4):
        eps, v = 0.01, vectors[unit]
        halves = [s(X @ (theta[unit] + sign * eps * v)) for sign in (1, -1)]
        after = residual + out[unit] * (sum(halves) / 2 - s(X @ theta[unit]))
        change = float((after.square() - residual.square()).mean() / 2)
        assert 0.99 < change / (eps**2 / 2 * float(values[unit])) < 1.01
        assert (change >= 0) == (values[unit] >= 0)
    worst = int(values.argmin())
    v, eps = vectors[worst], 0.01
    halves = [s(X @ (theta[worst] + sign * eps * v)) for sign in (1, -1)]
    after = residual + out[worst] * (sum(halves) / 2 - s(X @ theta[worst]))
    assert 0.999 < float((after.square() - residual.square()).mean() / 2) / (eps**2 / 2 * float(values[worst])) < 1.001


# T5


def test_a_step_after_gradmax_brings_the_square_of_the_gradient() -> None:
    case = Case(nn.Tanh())
    _, O, _ = score.gradmax(case.moments(), 2)
    wide = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    with torch.no_grad():
        for mine, old in zip(wide.parameters(), case.net.parameters(), strict=True):
            mine.zero_()[tuple(slice(size) for size in old.shape)] = old
        wide[2].weight[:, 5:] = 0.5 * O
    before = case.loss(wide, (case.x, case.y))
    grads = torch.autograd.grad(before, list(wide.parameters()))
    with torch.no_grad():
        for p, grad in zip(wide.parameters(), grads, strict=True):
            p -= 1e-6 * grad
        fall = float(before - case.loss(wide, (case.x, case.y)))
    assert 0.99 < fall / (1e-6 * sum(float(grad.square().sum()) for grad in grads)) < 1.01


# T6


def test_the_natural_step_brings_half_of_eta_and_the_empirical_fisher_does_not_say_so() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    x = torch.randn(200, 5).double()
    y = x[:, :3] + 0.5 * torch.randn(200, 3).double()
    evidence = ax.Evidence(Case.loss, [(x, y)])
    pair = Pair(None, "0")
    found = measured(nn.Sequential(layer), evidence, [pair], quiet=True)[pair]
    told = score.natural(-found.M_H.T, found.S_H, torch.eye(3).double())
    with torch.no_grad():
        step = (torch.linalg.inv(found.S_H) @ found.M_H).T
        before = float(Case.loss(layer, (x, y)))
        layer.weight += step[:, :-1]
        layer.bias += step[:, -1]
        fall = before - float(Case.loss(layer, (x, y)))
    assert close(told, fall, 1e-6)
    assert abs(score.natural(-found.M_H.T, found.S_H, found.S_D) / fall - 1) > 0.2


# T7


def test_units_behind_a_relu_are_scored_by_the_relu() -> None:
    case = Case(nn.ReLU())
    linear = score.tiny(case.moments(), 3)
    O, found = linear.O, {}
    for sign in (1, -1):
        M_new = case.moments({PAIR: Proposal(sign * linear.A, torch.relu)}).M_new
        assert M_new is not None
        found[sign] = M_new
        told = float(score.gain(M_new, sign * O).sum())
        ratio = case.fall(1e-6, sign * linear.A, sign * O) / 1e-6
        assert 0.999 < ratio / told < 1.001
        assert not 0.9 < ratio / linear.linear < 1.1
    both = score.gain(found[1], O).sum() + score.gain(found[-1], -O).sum()
    assert close(both, linear.linear, 1e-10)
    best, signs = score.both_signs(found[1], found[-1], O)
    assert (best >= score.gain(found[1], O)).all() and (best >= score.gain(found[-1], -O)).all()
    assert 0.999 < case.fall(1e-6, linear.A * signs, O * signs) / (1e-6 * float(best.sum())) < 1.001


# T8


@pytest.mark.parametrize("whitened", [False, True])
def test_an_inserted_layer_brings_what_its_sensitivity_says(whitened: bool) -> None:
    case = Case(nn.Tanh())
    moments = measured(case.net, case.whole, [Site("1")], quiet=True)[Site("1")]
    P = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        h = case.net[1](case.net[0](case.x))
        return (case.net[2](h + h @ P.T) - case.y).square().sum(1).mean() / 2

    (grad,) = torch.autograd.grad(loss(), P)
    assert close(-moments.M.T, grad, 1e-12)
    found = score.sensitivity(moments, whitened)
    before = float(loss().detach())
    with torch.no_grad():
        P += 1e-6 * found.direction
        fall = before - float(loss())
    assert 0.999 < fall / (1e-6 * found.score) < 1.001


# T9


def test_scores_stay_where_two_layers_are_rescaled() -> None:
    c = 7.3
    case = Case(nn.ReLU())
    A, O = torch.randn(7, 3).double(), torch.randn(4, 3).double()

    def told(A: Tensor, O: Tensor) -> list[Tensor]:
        sites = measured(case.net, case.whole, [Site("1"), Pair(None, "0"), Pair(None, "2")], quiet=True)
        moments = case.moments({PAIR: Proposal(A, torch.relu)})
        assert moments.M is not None and moments.M_new is not None
        first, second = sites[Pair(None, "0")], sites[Pair(None, "2")]
        return [
            score.gain(moments.M_new, O),
            torch.tensor(score.best_update(moments)[1]),
            torch.linalg.svdvals(moments.M),
            torch.tensor(score.tiny(moments, 2).linear),
            torch.tensor(score.natural(-second.M_H.T, second.S_H, second.S_D)),
            torch.tensor(score.natural(-first.M_H.T, first.S_H, first.S_D)),
            torch.tensor(score.sensitivity(sites[Site("1")]).score),
        ]

    before, moments, output = told(A, O), case.moments(), case.net(case.x)
    whitened = score.sensitivity(measured(case.net, case.whole, [Site("1")], quiet=True)[Site("1")], True).score
    with torch.no_grad():
        case.net[0].weight *= c
        case.net[0].bias *= c
        case.net[2].weight /= c
    again = case.moments()
    assert close(case.net(case.x), output, 1e-12)
    scales = torch.tensor([c] * 5 + [1.0], dtype=torch.float64)  # of the hidden units; the one for the bias stays
    assert close(again.S_X, moments.S_X, 1e-12) and close(again.M, moments.M, 1e-10)
    assert close(again.S_H, moments.S_H * torch.outer(scales, scales), 1e-10)
    assert close(again.M_H, moments.M_H * scales[:, None], 1e-10)
    after = told(c * A, O / c)
    for a, b in zip(after[:2] + after[2:], before, strict=True):
        assert close(a, b, 1e-8)
    again = score.sensitivity(measured(case.net, case.whole, [Site("1")], quiet=True)[Site("1")], True).score
    assert close(again, whitened / c**2, 1e-8)  # this one does change


# P1, P3


@pytest.mark.parametrize(
    ("parameters", "tokens", "expected"),
    [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)],
)
def test_when_to_stack(parameters: float, tokens: float, expected: float) -> None:
    assert close(score.base_tokens(parameters, tokens), expected, 1e-3)


def test_effective_rank_counts_directions() -> None:
    N, C = 20_000, 16
    Q = torch.linalg.qr(torch.randn(N, C).double()).Q
    H = math.sqrt(N) * Q
    assert score.effective_rank(H) == 1
    assert score.effective_rank(H.repeat(1, 2)) == 0.5
    assert score.effective_rank(Q, eps=0.01) == 0  # without the root of N
    shifted = torch.cat([torch.zeros(N, C - 1).double(), torch.zeros(N, 1).double()], 1) + 5
    assert score.effective_rank(shifted) == 0
    assert score.effective_rank(shifted, centred=False) == 1 / C  # a mean is no direction


def test_effective_rank_from_moments_is_that_of_the_rows() -> None:
    case = Case(nn.ReLU())
    H = case.net[1](case.net[0](case.x)).detach()
    for eps in (0.05, 0.3, 0.6):
        assert score.effective_rank(case.moments(), eps) == score.effective_rank(H, eps)
