"""A geometric Asian call on geometric Brownian motion.

    dS = r S dt + sigma S dW,    G = (prod_{i=1}^n S_{iT/n})^{1/n},    F = e^{-rT} (G - K)^+,    (1)
    log G ~ N(log s0 + (r - sigma^2 / 2) T A1, sigma^2 T A2),
    A1 = (n + 1) / (2n),    A2 = (n + 1)(2n + 1) / (6 n^2),                                      (2)

so that E F is the price of Black's formula. The state is log S, whose Euler-Maruyama chain has the right law at any step:
the two answers are one formula. The arithmetic mean has no closed form; `functionals.AsianCall` is that payoff.

Reference: A. Kemna, A. Vorst, Journal of Banking and Finance 14 (1990) 113.
"""

from functools import partial

import torch
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.functionals import Discount, GeometricAsianCall
from sdesens.functionals.last_step import lognormal_option
from sdesens.models.black_scholes import log_diffusion, log_drift, log_initial, rate
from sdesens.models.known import Known, parameters
from sdesens.problem import Problem
from sdesens.rewrite import with_running_integral
from sdesens.sde import SDE, Params


def asian(
    *,
    r: float = 0.05,
    sigma: float = 0.2,
    s0: float = 100.0,
    strike: float = 100.0,
    t1: float = 1.0,
    fixings: int = 4,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Geometric Asian call on geometric Brownian motion: a kink, many output times.

    Parameters
    ----------
    r, sigma, s0, strike, t1 : float
        As in `gbm_call`.
    fixings : int
        Dates of the mean, at equal distances, the last at t1. They move with the horizon.

    Raises
    ------
    ArgumentError
        If `n_steps` is no multiple of `fixings`.
    """
    if fixings < 1 or n_steps % fixings:
        raise ArgumentError(
            f"`n_steps` must be a multiple of `fixings`, so that each date lies on the grid, got {n_steps!r} and {fixings!r}: use "
            f"n_steps={max(fixings, 1) * -(-n_steps // max(fixings, 1))}."
        )
    sde = SDE(log_drift, log_diffusion, parameters(dtype, r=r, sigma=sigma, s0=s0), noise_type="scalar")
    payoff = GeometricAsianCall(strike, discount=Discount(), log=True)
    dates = torch.linspace(0, t1, fixings + 1, dtype=torch.float64)
    problem = Problem(with_running_integral(sde, rate), payoff, log_initial, dates, n_steps)
    price = partial(exact, strike=strike, fixings=fixings)
    return Known.from_formulas(problem, price, partial(scheme, strike=strike, fixings=fixings))


def exact(p: Params, T: Tensor, strike: float, fixings: int) -> Tensor:
    """e^{-rT} times Black's formula for equation (2)."""
    n, variance = fixings, p["sigma"] ** 2 * T
    mean = p["s0"].log() + (p["r"] * T - 0.5 * variance) * (n + 1) / (2 * n)
    return torch.exp(-p["r"] * T) * lognormal_option(mean, variance * (n + 1) * (2 * n + 1) / (6 * n**2), strike)


def scheme(p: Params, T: Tensor, n: int, strike: float, fixings: int) -> Tensor:
    """The same: the chain is exact in law."""
    return exact(p, T, strike, fixings)
