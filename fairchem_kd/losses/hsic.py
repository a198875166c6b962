"""The unbiased estimator of HSIC for linear kernels, out of sums over samples.

Song et al. (2012, JMLR 13, equation 5): no sample meets itself. With ``K = X X^T`` and
``L = Y Y^T`` stripped of their diagonals it reads

    HSIC = [ tr(KL) + 1'K1 1'L1 / ((N-1)(N-2)) - 2/(N-2) 1'KL1 ] / (N(N-3)).

No N x N matrix is needed for it. With k_i = |x_i|^2, l_i = |y_i|^2, C = X^T Y, s = sum_i x_i and
t = sum_i y_i, and every diagonal taken out by hand,

    tr(KL) = |C|^2 - sum_i k_i l_i          1'K1 = |s|^2 - sum_i k_i
    1'KL1  = s'Ct - s' sum_i l_i x_i - t' sum_i k_i y_i + sum_i k_i l_i

so that sums over samples, added up batch by batch in O(N D E), give the value of the whole sample.
"""

from __future__ import annotations

from torch import Tensor

Sums = dict[str, Tensor]
FEWEST = 4  #: samples of which the estimator is defined


def scalar_sums(x: Tensor, y: Tensor) -> Sums:
    """The sums over the N samples of ``(N, D)`` and ``(N, E)``; they add up over samples."""
    k, l = x.square().sum(1), y.square().sum(1)  # noqa: E741  (the letters of the formula)
    return {
        "count": k.new_tensor(len(k)),
        "C": x.T @ y,
        "s": x.sum(0),
        "t": y.sum(0),
        "k": k.sum(),
        "l": l.sum(),
        "kl": k @ l,
        "lx": l @ x,
        "ky": k @ y,
    }


def scalar_hsic(sums: Sums) -> Tensor:
    """HSIC ``()``; NaN of fewer than four samples."""
    n, s, t = sums["count"], sums["s"], sums["t"]
    if n < FEWEST:
        return n.new_tensor(float("nan"))
    trace = sums["C"].square().sum() - sums["kl"]
    rows = (s.square().sum() - sums["k"]) * (t.square().sum() - sums["l"])
    mixed = s @ sums["C"] @ t - s @ sums["lx"] - t @ sums["ky"] + sums["kl"]
    return (trace + rows / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)) / (n * (n - 3))


def _varies(x: Tensor) -> bool:
    """Whether it is more than a constant with the rounding of float32."""
    spread = (x - x.mean(0)).square().sum()
    return bool(spread > 1e-12 * x.square().sum())


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA ``()`` of ``(N, D)`` and ``(N, E)``, unbiased, in their type.

    ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` (Kornblith et al. 2019, arXiv 1905.00414). Near 0
    for independent features, whatever N, and so below 0 by chance; 1 for equal ones. NaN, without
    a gradient, of fewer than four samples, or where a feature does not vary.
    """
    if len(x) < FEWEST or not (_varies(x) and _varies(y)):
        return x.new_tensor(float("nan"))
    x, y = x - x.mean(0), y - y.mean(0)  # HSIC stays, and what cancels in its sums becomes small
    own = scalar_hsic(scalar_sums(x, x)), scalar_hsic(scalar_sums(y, y))
    if bool(own[0] <= 0) or bool(own[1] <= 0):
        return x.new_tensor(float("nan"))
    return scalar_hsic(scalar_sums(x, y)) / (own[0] * own[1]).sqrt()
