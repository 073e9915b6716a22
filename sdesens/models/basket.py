"""A geometric basket call on correlated geometric Brownian motions.

    dS_i = r S_i dt + sigma_i S_i dW^i,    d<W^i, W^j> = rho_ij dt,    F = e^{-rT} (prod_i S_i^{w_i} - K)^+,   (1)
    log prod_i S_i^{w_i} ~ N(sum_i w_i [log s0_i + (r - sigma_i^2 / 2) T], v T),    v = sum_ij w_i w_j sigma_i sigma_j rho_ij,   (2)

so that E F is the price of Black's formula. The state is (log S_i), whose Euler-Maruyama chain has the right law at any step,
beside the integral of the rate: the two answers are one formula. The arithmetic basket has no closed form.

Reference: P. Glasserman, Monte Carlo Methods in Financial Engineering, 2003, section 3.2.3.
"""

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from sdesens.functionals import BasketCall, Discount
from sdesens.functionals.last_step import lognormal_option
from sdesens.models.black_scholes import rate
from sdesens.models.known import Known, horizon, parameters
from sdesens.problem import Problem
from sdesens.rewrite import correlated_noise, with_running_integral
from sdesens.sde import SDE, Params


def basket(
    *,
    r: float = 0.05,
    sigma=(0.2, 0.3, 0.25),
    rho=(0.5, 0.2, 0.3),
    s0=(100.0, 90.0, 110.0),
    weights=(1 / 3, 1 / 3, 1 / 3),
    strike: float = 100.0,
    t1: float = 1.0,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Geometric basket call on three correlated assets: general noise, vector parameters, a kink.

    Parameters
    ----------
    r, strike, t1 : float
        As in `gbm_call`.
    sigma, s0 : (d,) numbers
        Relative volatilities, per square root of a year, and prices today.
    rho : (d (d - 1) / 2,) numbers
        Correlations of the pairs (1, 2), (1, 3), ..., (2, 3), ...
    weights : (d,) numbers
        Exponents in the basket; no parameter.

    Raises
    ------
    ArgumentError
        If `rho` makes no correlation matrix.
    """
    params = parameters(dtype, r=r, sigma=sigma, rho=rho, s0=s0)
    prices = SDE(drift, correlated_noise(volatility, correlation), params, noise_type="general")
    payoff = BasketCall(strike, weights, discount=Discount(), log=True, geometric=True)
    problem = Problem(with_running_integral(prices, rate), payoff, initial, horizon(t1), n_steps)
    price = partial(exact, weights=payoff.weights, strike=strike)
    return Known.from_formulas(problem, price, partial(scheme, weights=payoff.weights, strike=strike))


def drift(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Drift of log S, (B, d)."""
    return (p["r"] - 0.5 * p["sigma"] ** 2).expand_as(y)


def volatility(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Volatilities of log S, (B, d)."""
    return p["sigma"].expand_as(y)


def correlation(p: Params) -> Tensor:
    """The matrix of the pairs' correlations, (d, d)."""
    d, one = len(p["sigma"]), torch.ones_like(p["rho"][0])
    pair = {ij: p["rho"][k] for k, ij in enumerate(combinations(range(d), 2))}
    rows = [[one if i == j else pair[min(i, j), max(i, j)] for j in range(d)] for i in range(d)]
    return torch.stack([torch.stack(row) for row in rows])


def initial(p: Params) -> Tensor:
    """The state: log prices, and integral of the rate."""
    return torch.cat((p["s0"].log(), torch.zeros_like(p["s0"][:1])))


def exact(p: Params, T: Tensor, weights: Sequence[float], strike: float) -> Tensor:
    """e^{-rT} times Black's formula for equation (2)."""
    w = torch.tensor(weights, dtype=torch.float64)
    mean = w @ (p["s0"].log() + (p["r"] - 0.5 * p["sigma"] ** 2) * T)
    spread = w * p["sigma"]
    return torch.exp(-p["r"] * T) * lognormal_option(mean, spread @ correlation(p) @ spread * T, strike)


def scheme(p: Params, T: Tensor, n: int, weights: Sequence[float], strike: float) -> Tensor:
    """The same: the chain is exact in law."""
    return exact(p, T, weights, strike)
