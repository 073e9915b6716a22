"""The Ornstein-Uhlenbeck process: moments.

    dX = kappa (m - X) dt + sigma dW                                                             (1)
    X_T ~ N(m + (x0 - m) e, sigma^2 (1 - e^2) / (2 kappa)),          e = exp(-kappa T),          (2)
    X_N ~ N(m + (x0 - m) q^N, sigma^2 h (1 - q^2N) / (1 - q^2)),     q = 1 - kappa h.            (3)

(3) is the Euler-Maruyama chain: Gaussian too, with other moments. Needs kappa > 0, and kappa h < 2 for (3).
"""

from functools import partial

import torch
from torch import Tensor

from sdesens.functionals import Moment
from sdesens.functionals.last_step import normal_moment
from sdesens.models.brownian import initial
from sdesens.models.known import Known, horizon, parameters
from sdesens.problem import Problem
from sdesens.sde import SDE, Params


def ou(
    *,
    kappa: float = 1.3,
    m: float = 0.4,
    sigma: float = 0.5,
    x0: float = 1.2,
    t1: float = 1.0,
    power: int = 2,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Ornstein-Uhlenbeck process, F = X_T^2: mean reversion with additive noise.

    Parameters
    ----------
    kappa : float
        Rate of mean reversion, per time.
    m : float
        Long-run mean.
    sigma : float
        Volatility, units of X per square root of time.
    x0, t1 : float
        Initial state, a parameter, and horizon.
    power : int
        F = X_T^power.
    """
    sde = SDE(drift, diffusion, parameters(dtype, kappa=kappa, m=m, sigma=sigma, x0=x0))
    problem = Problem(sde, Moment(power), initial, horizon(t1), n_steps)
    return Known.from_formulas(problem, partial(exact, power=power), partial(scheme, power=power))


def drift(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Drift of equation (1), (B, d)."""
    return p["kappa"] * (p["m"] - y)


def diffusion(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Diffusion of equation (1)."""
    return p["sigma"].expand_as(y)


def exact(p: Params, T: Tensor, power: int) -> Tensor:
    """Equation (2)."""
    kappa = p["kappa"]
    mean = p["m"] + (p["x0"] - p["m"]) * torch.exp(-kappa * T)
    variance = -(p["sigma"] ** 2) * torch.expm1(-2 * kappa * T) / (2 * kappa)
    return normal_moment(mean, variance, power)


def scheme(p: Params, T: Tensor, n: int, power: int) -> Tensor:
    """Equation (3)."""
    h = T / n
    q = 1 - p["kappa"] * h
    mean = p["m"] + (p["x0"] - p["m"]) * q**n
    variance = p["sigma"] ** 2 * h * (1 - q ** (2 * n)) / (1 - q**2)
    return normal_moment(mean, variance, power)
