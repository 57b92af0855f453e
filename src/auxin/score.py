"""What an edit is predicted to bring, in one currency: the decrease of the loss per sample.

Plain functions on the second moments that ``auxin.statistics`` takes. A pair of layers ``h = s(W1 x)``, ``z = W2 h``:

- X, of i features, is what the producer reads, H, of n, what the consumer reads; either ends with a one where the
  layer has a bias. N is the number of samples, G = dL/dz, L a mean over samples.
- D = -N G, of o columns, is what the loss of each sample asks of z.
- S_X = X^T X / N, S_H = H^T H / N, S_XH = X^T H / N, M = X^T D / N, M_H = H^T D / N.
- A, (i, k), and O, (o, k): incoming and outgoing weights of k new units: z + s(X A) O^T.

Between convolutions columns of D are ordered (place of the kernel, output), and O has as many rows (K o). The numbers
of ``gain``, ``tiny``, ``natural`` and of the plain ``sensitivity`` do not change when a layer is scaled by c and the
next one by 1 / c (ReLU between them, A and O scaled alike). Divide them by added FLOPs to compare places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from auxin.errors import GrowthError
from auxin.statistics.moments import PairMoments, SiteMoments


def gain(M_new: Tensor, O: Tensor) -> Tensor:
    """The decrease of the loss, per unit of gamma, that each new unit brings to first order: ``diag(M_new O)``.

    Exact for any activation where only the outgoing weights are scaled by gamma, z + gamma s(X A) O^T. Where both
    factors are scaled by the root of gamma it is exact too if s is positively homogeneous (ReLU); if s is
    differentiable at 0 use M_new = s'(0) A^T M. For ReLU that linear form is about twice too large.

    Args:
        M_new: s(X A)^T D / N, (k, o): ``PairMoments.M_new`` for a ``Proposal``, or ``slope * A.T @ M``.
        O: Outgoing weights, (o, k).

    Returns:
        (k,), loss per sample. The sum is the gain of all units together.

    Raises:
        GrowthError: The shapes do not fit.

    Examples:
        >>> X, D = torch.tensor([[1.0], [-2.0]]), torch.tensor([[2.0], [1.0]])
        >>> gain(torch.relu(X @ torch.tensor([[1.0, -1.0]])).T @ D / 2, torch.ones(1, 2))
        tensor([1., 1.])

    Source:
        First order, exact; the projection that gromo reports is that of TINY (Verbockhaven et al. 2024).
    """
    if M_new.dim() != 2 or M_new.shape != O.T.shape:
        raise GrowthError(f"gain: M_new is {tuple(M_new.shape)} and O {tuple(O.shape)}; pass (k, o) and (o, k).")
    return (M_new * O.T).sum(1)


def both_signs(M_plus: Tensor, M_minus: Tensor, O: Tensor) -> tuple[Tensor, Tensor]:
    """Which of (a, o) and (-a, -o) brings more, for each new unit behind a kinked activation such as ReLU.

    To first order of a smooth activation both are the same; of ReLU they see the two halves of the data, and their
    gains sum to that of the linear unit.

    Args:
        M_plus: s(X A)^T D / N, (k, o).
        M_minus: s(-X A)^T D / N, (k, o).
        O: Outgoing weights of the plus sign, (o, k).

    Returns:
        The larger gain, (k,), loss per sample, and the sign, 1 or -1, to multiply A and O with.

    Examples:
        >>> one = torch.eye(1)
        >>> both_signs(one, -3 * one, one)
        (tensor([3.]), tensor([-1.]))
    """
    plus, minus = gain(M_plus, O), gain(M_minus, -O)
    return torch.maximum(plus, minus), torch.where(minus > plus, -1.0, 1.0).to(plus)


@dataclass(frozen=True, eq=False)
class Tiny:
    """What ``tiny`` returns.

    Attributes:
        A: incoming weights of the new units, (i, k).
        O: outgoing weights, (K o, k).
        update: dW*, (o, n): the best change of the consumer's weights (and bias, the last column); None if not joint.
        d1: tr(dW* M_H): what the update brings, loss per sample and unit of gamma.
        singular: all singular values of S_X^{-1/2} N_r, largest first; their squares sum to what no change of the old
            weights can reach, loss per sample and unit of gamma.
        linear: s'(0) tr(A^T M O): what the new units bring if s is differentiable at 0. Their overlap with old units
            is in it; the sum of squares of the first k ``singular`` leaves it out.
    """

    A: Tensor
    O: Tensor
    update: Tensor | None
    d1: float
    singular: Tensor
    linear: float


def tiny(moments: PairMoments, k: int, slope: float = 1.0, joint: bool = True) -> Tiny:
    """The update of the old weights, and then the k new units, that come nearest to what the loss asks for.

    dW* = (S_H^-1 M_H)^T; D_r = D - H dW*^T; N_r = M - S_XH S_H^-1 M_H = X^T D_r / N;
    S_X^{-1/2} N_r = U Sig V^T; A = S_X^{-1/2} U_k Sig_k^{1/2}, O = V_k Sig_k^{1/2}, each over the root of s'(0).
    They minimise ||D_r - s'(0) X A O^T||^2 / N, of value ||D_r||^2 / N - sum_{j<=k} sig_j^2. Between convolutions with
    kernels of several places the minimum is not exact, since places overlap; the first-order gains are.

    Inverses are pseudo-inverses: directions whose second moment is rounding are left out.

    Args:
        moments: Of the pair.
        k: Number of new units.
        slope: s'(0), of the activation between the layers (through norms as they start); 1 for ReLU, whose units are
            scored by ``both_signs``.
        joint: Whether the units complete the update of the old weights; False: N_r = M, for old weights that stay.

    Returns:
        Weights and what they bring.

    Raises:
        GrowthError: There is no producer, units mix on the way, or fewer than k directions are asked for by the data.

    Source:
        TINY, Verbockhaven, Rudkiewicz, Charpiat and Chevallier 2024, arXiv:2405.19816.
    """
    _count("tiny", k)
    S_X, M = moments.whole("tiny")
    _finite("tiny", S_X, M)
    if slope == 0:
        raise GrowthError("tiny: slope=0: the activation is flat at 0, where new units start. Pass its slope there.")
    update, d1, N_r = None, 0.0, M
    if joint:
        update, d1 = best_update(moments)
        assert moments.S_XH is not None
        overlap = moments.S_XH.view(len(S_X), moments.kernel, -1) @ update.T
        N_r = M - overlap.reshape(M.shape)
    white, back = whitening(S_X, moments.tolerance)
    U, sigma, V = _svd(white(N_r), k)
    _enough("tiny", k, rank_of(sigma), moments)
    half = sigma[:k].sqrt() / math.sqrt(abs(slope))
    A, O = back(U * half), V * half * math.copysign(1, slope)
    return Tiny(A, O, update, d1, sigma, slope * float((A.T @ M * O.T).sum()))


def best_update(moments: PairMoments) -> tuple[Tensor, float]:
    """TINY's best update of the old weights alone: dW* = (S_H^-1 M_H)^T, (o, n), and d1 = tr(dW* M_H).

    The loss falls by gamma d1, to first order, for W2 + gamma dW*. It needs no producer.

    Source:
        TINY, arXiv:2405.19816.
    """
    S_H, M_H = moments.hidden("best_update")
    _finite("best_update", S_H, M_H)
    white, back = whitening(S_H, moments.tolerance)
    whitened = white(M_H)
    return back(whitened).T, float(whitened.square().sum())


def gradmax(moments: PairMoments, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k directions in which new units get the largest gradient: the singular vectors of M.

    For units that start silent. With W2_new = 0 and W1_new = c A^T (out0), to first order in c,
    ||dL/dW2_new||^2 = c^2 s'(0)^2 sum_{j<=k} sig_j^2; with W1_new = 0 and W2_new = c O (in0) the same of dL/dW1_new,
    exactly, the most that orthogonal columns of that length can have. in0 needs s'(0) != 0, which torch's ReLU has not.

    Args:
        moments: Of the pair.
        k: Number of new units.

    Returns:
        A, (i, k), O, (K o, k), with orthonormal columns, and all singular values, largest first: loss per unit of both
        weights.

    Raises:
        GrowthError: As ``tiny``.

    Source:
        GradMax, Evci, van Merrienboer, Unterthiner, Vladymyrov and Pedregosa 2022, arXiv:2201.05125, with
        J = -M^T; out0 is its mirror.
    """
    _count("gradmax", k)
    _, M = moments.whole("gradmax")
    _finite("gradmax", M)
    U, sigma, V = _svd(M, k)
    _enough("gradmax", k, rank_of(sigma), moments)
    return U, V, sigma


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What ``sensitivity`` returns.

    Attributes:
        score: decrease of the loss per sample and unit of eta, to first order.
        direction: of the step P = eta direction, (c, c).
    """

    score: float
    direction: Tensor


def sensitivity(moments: SiteMoments, whitened: bool = False) -> Sensitivity:
    """What a layer x + P x, with P = 0, inserted behind a module would bring: the first-order sensitivity to P.

    G_P = dL/dP = G^T X = -M^T. Plain: ||G_P||^2, the decrease for P = -eta G_P. Whitened: tr(G_P S^-1 G_P^T), for
    P = -eta G_P S^-1. The plain score is the same for sites whose values differ by a scale that their readers make
    good; the whitened one handles correlated channels, but goes as 1 / c^2 (``natural`` does both).

    Args:
        moments: Of the site.
        whitened: By the second moment of what comes out there.

    Returns:
        The score and the step.

    Source:
        Kreis, Herberg, Köhne, Schiela and Herzog 2023, arXiv:2311.15995.
    """
    _finite("sensitivity", moments.S, moments.M)
    direction = moments.M.T
    if whitened:
        white, back = whitening(moments.S, moments.tolerance)
        direction = back(white(moments.M)).T
    return Sensitivity(float((direction * moments.M.T).sum()), direction)


def natural(gradient: Tensor, A: Tensor, G: Tensor, tolerance: float = 1e-6) -> float:
    """What the natural-gradient step of one layer brings: eta / 2, eta = tr(A^-1 Gw^T G^-1 Gw), K-FAC.

    The loss falls by eta / 2 for W - G^-1 Gw A^-1, exactly where the loss is quadratic in the layer's outputs with
    curvature G. With the empirical Fisher, of gradients at the true targets, the number is not a decrease.

    Args:
        gradient: Gw = dL/dW, (o, i): ``-moments.M_H.T`` of a ``Pair(None, layer)``, or ``-moments.M.T`` of a ``Site``.
        A: E[x x^T], (i, i): ``moments.S_H``, or ``S``.
        G: E[g g^T], (o, o), of the model's Fisher: ``S_D`` of a pass with targets drawn from the model's own
            predictions; the identity for a squared error 1/2 ||z - y||^2.
        tolerance: Relative to the largest eigenvalue; below it is rounding.

    Returns:
        Loss per sample.

    Raises:
        GrowthError: The shapes do not fit.

    Source:
        SENN, Mitchell, Mundt and Kersting 2023, arXiv:2307.04526; K-FAC, Martens and Grosse 2015, arXiv:1503.05671.

    Examples:
        >>> natural(torch.ones(1, 2), torch.eye(2), torch.eye(1))
        1.0
    """
    if gradient.shape != (len(G), len(A)):
        raise GrowthError(f"natural: the gradient is {tuple(gradient.shape)}, A and G say {(len(G), len(A))}.")
    _finite("natural", gradient, A, G)
    (white_G, _), (white_A, _) = whitening(G, tolerance), whitening(A.to(G), tolerance)
    return float(white_A(white_G(gradient.to(G)).T).square().sum()) / 2


def effective_rank(H: Tensor | PairMoments, eps: float = 0.01, centred: bool = True) -> float:
    """The part of the hidden units that say something of their own: #{singular values of H / sqrt(N) > eps} / C.

    Needs no labels. Grow where it stays high: T = max(0, floor(C (phi_t - gamma phi_0))) units, gamma just below 1.

    Args:
        H: (N, C) with N > C, or moments of a pair whose consumer has a bias (without one they cannot be centred).
        eps: Threshold; in the units of H.
        centred: Subtract the mean of each unit first. ReLU and norms shift it, which would count as a direction.

    Returns:
        phi, from 0 to 1.

    Raises:
        GrowthError: There are not more rows than units, or no means.

    Source:
        NORTH*, Maile, Rachelson, Luga and Wilson 2022, arXiv:2202.08539.

    Examples:
        >>> effective_rank(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]]))
        0.5
    """
    if isinstance(H, PairMoments):
        rows, (S, _) = H.rank[1], H.hidden("effective_rank")
        if centred and not H.biased[1]:
            raise GrowthError(
                f"effective_rank: {H.pair.consumer} has no bias, so the means were not taken; pass centred=False."
            )
        S = S * (H.samples / max(1, rows))
        mean = S[-1, :-1]
        S = S[:-1, :-1] if H.biased[1] else S
        S = S - torch.outer(mean, mean) if centred else S
        spectrum = torch.linalg.eigvalsh(S).clamp(min=0).sqrt()
    else:
        rows = len(H)
        H = H.double() - H.double().mean(0) if centred else H.double()
        spectrum = torch.linalg.svdvals(H / math.sqrt(max(1, rows)))
        S = H.T
    if rows <= len(S):
        raise GrowthError(f"effective_rank: {rows} rows of {len(S)} units; take more samples than there are units.")
    return int((spectrum > eps).sum()) / len(S)


def splitting(X: Tensor, gradient: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Which units a split helps: the smallest eigenvalue of S = E[g_h s''(theta x) x x^T], for each.

    A unit with lambda_min < 0 is replaced by two, theta + eps v and theta - eps v, each with half its outgoing
    weights; the loss changes by eps^2 / 2 lambda_min + O(eps^3). Where all are positive no split helps. Of ReLU s'' is
    zero almost everywhere: pass that of a smooth stand-in.

    Args:
        X: What the units read, (N, i), with the column of ones.
        gradient: g_h, (N, n): the gradient of each sample's own loss by each unit.
        curvature: s'' at theta x, (N, n).

    Returns:
        lambda_min, (n,), loss per sample and eps^2, and v, (n, i), of length 1.

    Source:
        Liu, Wu and Wang 2019, arXiv:1910.02366.
    """
    if not len(X) == len(gradient) == len(curvature) or gradient.shape != curvature.shape:
        raise GrowthError(
            f"splitting: X is {tuple(X.shape)}, the gradient {tuple(gradient.shape)}, the curvature "
            f"{tuple(curvature.shape)}; pass (N, i), (N, n) and (N, n)."
        )
    _finite("splitting", X, gradient, curvature)
    S = torch.einsum("an,ai,aj->nij", (gradient * curvature).double(), X.double(), X.double()) / len(X)
    values, vectors = torch.linalg.eigh(S)
    return values[:, 0], vectors[:, :, 0]


def base_tokens(parameters: float, tokens: float) -> float:
    """How many tokens a small model is trained on before it is stacked to a large one: d of G_stack.

    log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74, C = 6 N D. Fitted to language models of up to 7e9 parameters
    that are stacked four times; elsewhere it is an extrapolation.

    Args:
        parameters: N, of the large model.
        tokens: D, that the large model would be trained on.

    Returns:
        Tokens.

    Source:
        Du et al. 2024, arXiv:2405.15319.

    Examples:
        >>> f"{base_tokens(7e9, 2e12):.3g}"
        '1.11e+10'
    """
    if not (parameters > 0 and tokens > 0):
        raise GrowthError(f"base_tokens({parameters!r}, {tokens!r}): pass a number of parameters and one of tokens.")
    compute = math.log10(6 * parameters * tokens)
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / compute - 5.74)


Rows = Callable[[Tensor], Tensor]


def whitening(S: Tensor, tolerance: float) -> tuple[Rows, Rows]:
    """M -> W M and U -> W^T U, where W^T W is the pseudo-inverse of a second moment.

    Args:
        S: Symmetric, without negative eigenvalues but for rounding.
        tolerance: Eigenvalues below it, relative to the largest, count as zero.
    """
    factor, failed = torch.linalg.cholesky_ex(S)  # many times faster than eigenvalues
    if not failed:

        def white(M: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(factor, M, upper=False)

        def back(U: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(factor.T, U, upper=True)

        if _smallest(white, back, S) > 10 * tolerance * float(S.diagonal().sum()):
            return white, back
    values, vectors = torch.linalg.eigh(S)
    kept = values > tolerance * values[-1:].clamp(min=0)
    W = vectors[:, kept].T / values[kept].sqrt().unsqueeze(1)
    return lambda M: W @ M, lambda U: W.T @ U


def _smallest(white: Rows, back: Rows, S: Tensor) -> float:
    """The smallest eigenvalue of S, by inverse iteration; a little too large."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(S), 1, generator=generator, dtype=torch.float64).to(S)
    for _ in range(8):
        v = back(white(v / v.norm()))
    return 1 / float(v.norm())


def _svd(Y: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first k columns of U and V, and all singular values.

    Where it is large by the smaller Gram matrix, whose eigenvectors come in float32 if k are few, and are refined.
    """
    if min(Y.shape) < LARGE:
        U, sigma, Vh = torch.linalg.svd(Y, full_matrices=False)
        return U[:, :k], sigma, Vh[:k].T
    tall = Y.shape[0] >= Y.shape[1]
    values, vectors = _leading(Y.T @ Y if tall else Y @ Y.T, k)
    sigma = values.clamp(min=0).sqrt()
    safe = sigma[:k].clamp(min=torch.finfo(sigma.dtype).tiny)
    return (Y @ vectors / safe, sigma, vectors) if tall else (vectors, sigma, Y.T @ vectors / safe)


def _leading(S: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues, largest first, and the first k eigenvectors.

    With few of them a step of subspace iteration makes float32 ones right: values to the square of their error. Where
    the k-th is so small that rounding of float32 could matter, everything is computed in float64.
    """
    if 2 * (k + SPARE) < len(S):
        rough, vectors = torch.linalg.eigh(S.float())
        basis = torch.linalg.qr(S @ vectors[:, -k - SPARE :].to(S)).Q
        values, inside = torch.linalg.eigh(basis.T @ S @ basis)
        if values[-k] > 1e-3 * values[-1]:
            every = torch.cat([values.flip(0)[:k], rough.flip(0)[k:].to(S)])
            return every, basis @ inside.flip(1)[:, :k]
    values, vectors = torch.linalg.eigh(S)
    return values.flip(0), vectors.flip(1)[:, :k]


LARGE = 128  # below it everything is fast
SPARE = 16  # directions more than are wanted


def rank_of(singular: Tensor) -> int:
    """How many singular values are more than rounding."""
    return int((singular > 1e-6 * singular[:1]).sum())


def _count(call: str, k: int) -> None:
    if type(k) is not int or k < 1:
        raise GrowthError(f"{call}: k={k!r}: pass how many new units, a whole number from 1.")


def _enough(call: str, k: int, rank: int, moments: PairMoments) -> None:
    if k > rank:
        raise GrowthError(
            f"{call}: k={k} new units between {moments.pair.producer} and {moments.pair.consumer}, but the data ask "
            f"for {rank} directions only ({moments.samples} samples). Pass k={rank} at most, or more samples if there "
            "are fewer than outputs."
        )


def _finite(call: str, *tensors: Tensor) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise GrowthError(f"{call}: the moments hold numbers that are not finite; leave out batches with such values.")
