"""The Vasicek model: the price of a zero-coupon bond.

    dr = kappa (m - r) dt + sigma dW,    P = E exp(-int_0^T r dt) = exp(A - B x0),               (1)
    B = (1 - exp(-kappa T)) / kappa,     A = (B - T)(m - sigma^2 / (2 kappa^2)) - sigma^2 B^2 / (4 kappa).

The Euler-Maruyama chain sums the rate at left points, I = h sum_{n<N} r_n, which is Gaussian: with q = 1 - kappa h,

    E I = m T + (x0 - m)(1 - q^N) / kappa,
    Var I = (sigma^2 h / kappa^2) [N - 2 (1 - q^N) / (1 - q) + (1 - q^2N) / (1 - q^2)],          (2)
    E exp(-I) = exp(-E I + Var I / 2).

Reference: O. Vasicek, J. Financial Economics 5 (1977) 177. Needs kappa > 0.
"""

import torch
from torch import Tensor

from sdesens.functionals import Discount
from sdesens.models.known import Known, horizon, parameters
from sdesens.models.ou import drift
from sdesens.problem import Problem
from sdesens.rewrite import with_running_integral
from sdesens.sde import SDE, Params


def vasicek(
    *,
    kappa: float = 0.3,
    m: float = 0.05,
    sigma: float = 0.02,
    x0: float = 0.03,
    t1: float = 5.0,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Vasicek short rate, F = exp(-int r dt): a zero-coupon bond.

    Parameters
    ----------
    kappa : float
        Rate of mean reversion, per year.
    m, x0 : float
        Long-run mean of the rate and the rate today, per year (0.05 is 5 percent).
    sigma : float
        Absolute volatility of the rate, per year and square root of a year.
    t1 : float
        Maturity in years.
    """
    rate = SDE(drift, diffusion, parameters(dtype, kappa=kappa, m=m, sigma=sigma, x0=x0), noise_type="scalar")
    problem = Problem(with_running_integral(rate, short_rate), Discount(), initial, horizon(t1), n_steps)
    return Known.from_formulas(problem, exact, scheme)


def diffusion(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Diffusion of equation (1)."""
    return p["sigma"].expand(*y.shape, 1)  # (B, 1, 1)


def short_rate(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """The integrand, shape (B,)."""
    return y[:, 0]


def initial(p: Params) -> Tensor:
    """The state (x0, 0): rate, and its integral."""
    return torch.stack((p["x0"], torch.zeros_like(p["x0"])))


def exact(p: Params, T: Tensor) -> Tensor:
    """Equation (1)."""
    kappa, m, sigma = p["kappa"], p["m"], p["sigma"]
    B = -torch.expm1(-kappa * T) / kappa
    A = (B - T) * (m - sigma**2 / (2 * kappa**2)) - sigma**2 * B**2 / (4 * kappa)
    return torch.exp(A - B * p["x0"])


def scheme(p: Params, T: Tensor, n: int) -> Tensor:
    """Equation (2)."""
    kappa, m, h = p["kappa"], p["m"], T / n
    q = 1 - kappa * h
    mean = m * T + (p["x0"] - m) * (1 - q**n) / kappa
    sums = n - 2 * (1 - q**n) / (1 - q) + (1 - q ** (2 * n)) / (1 - q**2)
    return torch.exp(-mean + 0.5 * p["sigma"] ** 2 * h / kappa**2 * sums)
