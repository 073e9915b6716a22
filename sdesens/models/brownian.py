"""Brownian motion with drift.

    dX = mu dt + sigma dW,    X_T ~ N(x0 + mu T, sigma^2 T),    F = X_T^power.                   (1)

Euler-Maruyama has the law of X_T for any number of steps, so the two answers are one formula.
"""

from functools import partial

import torch
from torch import Tensor

from sdesens.functionals import Moment
from sdesens.functionals.last_step import normal_moment
from sdesens.models.known import Known, horizon, parameters
from sdesens.problem import Problem
from sdesens.sde import SDE, Params


def brownian(
    *,
    mu: float = 0.3,
    sigma: float = 0.5,
    x0: float = 1.0,
    t1: float = 1.0,
    power: int = 2,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Brownian motion with drift, F = X_T^2: exact in law at any step.

    Parameters
    ----------
    mu : float
        Drift, units of X per time.
    sigma : float
        Volatility, units of X per square root of time.
    x0, t1 : float
        Initial state, a parameter, and horizon.
    power : int
        F = X_T^power.
    """
    sde = SDE(drift, diffusion, parameters(dtype, mu=mu, sigma=sigma, x0=x0))
    problem = Problem(sde, Moment(power), initial, horizon(t1), n_steps)
    return Known.from_formulas(
        problem, partial(exact, power=power), partial(scheme, power=power), "Euler-Maruyama is exact in law."
    )


def drift(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Drift of equation (1), (B, d)."""
    return p["mu"].expand_as(y)


def diffusion(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Diffusion of equation (1)."""
    return p["sigma"].expand_as(y)


def initial(p: Params) -> Tensor:
    """The state (x0,)."""
    return p["x0"].reshape(1)


def exact(p: Params, T: Tensor, power: int) -> Tensor:
    """E X_T^power from the law in equation (1)."""
    return normal_moment(p["x0"] + p["mu"] * T, p["sigma"] ** 2 * T, power)


def scheme(p: Params, T: Tensor, n: int, power: int) -> Tensor:
    """The same: the chain is exact in law."""
    return exact(p, T, power)
