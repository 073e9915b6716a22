"""The Heston model: a call under stochastic variance.

    d log S = (r - v/2) dt + sqrt(v) dW^1,    dv = kappa (theta - v) dt + xi sqrt(v) dW^2,    d<W^1, W^2> = rho dt.   (1)

With b = kappa - i rho xi u, d = sqrt(b^2 + xi^2 (iu + u^2)), g = (b - d) / (b + d) and forward F = s0 e^{rT},

    phi(u) = E e^{iu log(S_T / F)} = exp(C theta + D v0),
    C = kappa xi^-2 [(b - d) T - 2 log((1 - g e^{-dT}) / (1 - g))],
    D = (b - d) xi^-2 (1 - e^{-dT}) / (1 - g e^{-dT}),                                           (2)
    call = e^{-rT} [F - sqrt(F K) / pi int_0^oo Re(e^{iux} phi(u - i/2)) / (u^2 + 1/4) du],    x = log(F / K).        (3)

This way of writing (2) keeps the logarithm on one branch (H. Albrecher, P. Mayer, W. Schoutens, J. Tistaert, Wilmott,
January 2007, 83). In (3) u = sinh(s) / 2 turns du / (u^2 + 1/4) into 2 ds / cosh(s) and the integrand into an even analytic
function that falls faster than exponentially: the trapezoidal rule on fixed nodes is exact to rounding, and differentiable.

Paths are those of log S and of v by full truncation, as in `cir`; the discount is a state. The tangent has no finite
variance, see there. Reference: S. Heston, Review of Financial Studies 6 (1993) 327; A. Lewis, Option Valuation under
Stochastic Volatility, 2000.
"""

import math
from functools import partial

import torch
from torch import Tensor

from sdesens.functionals import Call, Discount
from sdesens.functionals.last_step import positive_sqrt
from sdesens.models.black_scholes import rate
from sdesens.models.known import Known, horizon, parameters
from sdesens.problem import Problem
from sdesens.rewrite import correlated_noise, with_running_integral
from sdesens.sde import SDE, Params

SPACING, NODES = 1 / 32, 320  # s up to 10, u up to 5500: past the reach of phi for total variances above 1e-5


def heston(
    *,
    r: float = 0.05,
    kappa: float = 2.0,
    theta: float = 0.04,
    xi: float = 0.3,
    rho: float = -0.5,
    s0: float = 100.0,
    v0: float = 0.04,
    strike: float = 100.0,
    t1: float = 1.0,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Heston call: correlated general noise, a square root and a kink.

    Parameters
    ----------
    r : float
        Continuously compounded rate, per year.
    kappa : float
        Rate of mean reversion of the variance, per year.
    theta, v0 : float
        Long-run and initial variance, per year: 0.04 is a volatility of 20 percent.
    xi : float
        Volatility of variance: xi sqrt(v) is the absolute one.
    rho : float
        Correlation of price and variance, in (-1, 1).
    s0, strike : float
        Price today, a parameter, and strike, a number.
    t1 : float
        Maturity in years.
    """
    params = parameters(dtype, r=r, kappa=kappa, theta=theta, xi=xi, rho=rho, s0=s0, v0=v0)
    model = SDE(drift, correlated_noise(volatility, correlation), params, noise_type="general")
    payoff = Call(strike, discount=Discount(), log=True)
    problem = Problem(with_running_integral(model, rate), payoff, initial, horizon(t1), n_steps)
    notes = (
        "Full truncation: the tangent has no finite variance, and the adjoints, which reconstruct the state backwards, break "
        "down where the variance comes near zero. Expect them to fail."
    )
    return Known.from_formulas(problem, partial(call, strike=strike), notes=notes)


def drift(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Drift of equation (1), (B, d)."""
    v = y[:, 1].clamp(min=0)
    return torch.stack((p["r"] - 0.5 * v, p["kappa"] * (p["theta"] - v)), dim=1)


def volatility(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Volatilities of equation (1), (B, d)."""
    root = positive_sqrt(y[:, 1])
    return torch.stack((root, p["xi"] * root), dim=1)


def correlation(p: Params) -> Tensor:
    """[[1, rho], [rho, 1]]."""
    rho = p["rho"]
    one = torch.ones_like(rho)
    return torch.stack((torch.stack((one, rho)), torch.stack((rho, one))))


def initial(p: Params) -> Tensor:
    """The state (log s0, v0, 0): log price, variance, integral of the rate."""
    return torch.stack((p["s0"].log(), p["v0"], torch.zeros_like(p["v0"])))


def characteristic_function(p: Params, T: Tensor, u: Tensor) -> Tensor:
    """phi(u) of equation (2), complex128."""
    kappa, xi = p["kappa"], p["xi"]
    b = kappa - 1j * p["rho"] * xi * u
    d = torch.sqrt(b**2 + xi**2 * (1j * u + u**2))
    g = (b - d) / (b + d)
    decay = torch.exp(-d * T)
    C = kappa / xi**2 * ((b - d) * T - 2 * torch.log((1 - g * decay) / (1 - g)))
    D = (b - d) / xi**2 * (1 - decay) / (1 - g * decay)
    return torch.exp(C * p["theta"] + D * p["v0"])


def call(p: Params, T: Tensor, strike: float) -> Tensor:
    """Equation (3)."""
    s = SPACING * torch.arange(NODES, dtype=torch.float64)
    u = 0.5 * s.sinh()
    weights = torch.where(s == 0, 0.5, 1.0) * SPACING * 2 / s.cosh()
    forward = p["s0"] * torch.exp(p["r"] * T)
    x = torch.log(forward / strike)
    integrand = (torch.exp(1j * u * x) * characteristic_function(p, T, u - 0.5j)).real
    integral = (weights * integrand).sum()
    return torch.exp(-p["r"] * T) * (forward - torch.sqrt(forward * strike) / math.pi * integral)
