"""Geometric Brownian motion: moments.

    dX = mu X dt + sigma X dW,    E X_T^k = x0^k exp(k mu T + k (k - 1) sigma^2 T / 2),          (1)
    Euler-Maruyama:  X_N = x0 prod_n (1 + mu h + sigma sqrt(h) Z_n),
                     E X_N^k = x0^k (E (1 + mu h + sigma sqrt(h) Z)^k)^N.                        (2)

Black-Scholes prices on the same equation are in `black_scholes`.
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


def gbm(
    *,
    mu: float = 0.1,
    sigma: float = 0.5,
    x0: float = 1.0,
    t1: float = 1.0,
    power: int = 2,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Geometric Brownian motion, F = X_T^2.

    Parameters
    ----------
    mu : float
        Growth rate, per time.
    sigma : float
        Relative volatility, per square root of time.
    x0, t1 : float
        Initial state, a parameter, and horizon.
    power : int
        F = X_T^power. With power 1 the derivative in sigma is 0.
    """
    sde = SDE(drift, diffusion, parameters(dtype, mu=mu, sigma=sigma, x0=x0))
    problem = Problem(sde, Moment(power), initial, horizon(t1), n_steps)
    return Known.from_formulas(problem, partial(exact, power=power), partial(scheme, power=power))


def drift(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Drift of equation (1), (B, d)."""
    return p["mu"] * y


def diffusion(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Diffusion of equation (1)."""
    return p["sigma"] * y


def exact(p: Params, T: Tensor, power: int) -> Tensor:
    """Equation (1)."""
    return p["x0"] ** power * torch.exp(power * T * (p["mu"] + 0.5 * (power - 1) * p["sigma"] ** 2))


def scheme(p: Params, T: Tensor, n: int, power: int) -> Tensor:
    """Equation (2)."""
    h = T / n
    return p["x0"] ** power * normal_moment(1 + p["mu"] * h, p["sigma"] ** 2 * h, power) ** n
