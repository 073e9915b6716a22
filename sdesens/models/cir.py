"""The Cox-Ingersoll-Ross process: bond price, Laplace transform, mean.

    dX = kappa (theta - X) dt + sigma sqrt(X) dW                                                 (1)
    bond     E exp(-int_0^T X dt) = A exp(-B x0),    g = sqrt(kappa^2 + 2 sigma^2),
             D = (g + kappa)(e^{gT} - 1) + 2g,  B = 2 (e^{gT} - 1) / D,
             A = (2 g e^{(kappa + g) T / 2} / D)^{2 kappa theta / sigma^2},                      (2)
    Laplace  E exp(-u X_T) = (1 + 2uc)^{-2 kappa theta / sigma^2} exp(-u e x0 / (1 + 2uc)),
             e = exp(-kappa T),  c = sigma^2 (1 - e) / (4 kappa),                                (3)
    mean     E X_T = theta + (x0 - theta) e.                                                     (4)

The Euler step can leave x >= 0. Full truncation puts x^+ for x in drift and diffusion (R. Lord, R. Koekkoek, D. van Dijk,
Quantitative Finance 10 (2010) 177). Its tangent goes like 1 / sqrt(x^+) and its second moment is infinite at any
parameters; the smaller 2 kappa theta / sigma^2, the sooner a finite sample shows it. The default has 4.5. No closed form is
known for the truncated chain. `cir_lamperti` moves the same process by a scheme whose tangent has moments.

Reference: J. Cox, J. Ingersoll, S. Ross, Econometrica 53 (1985) 385.
"""

from functools import partial

import torch
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.functionals import Discount, Functional, Laplace, Moment
from sdesens.functionals.last_step import positive_sqrt
from sdesens.models.known import Known, horizon, parameters
from sdesens.models.vasicek import initial
from sdesens.problem import Problem
from sdesens.rewrite import with_running_integral
from sdesens.sde import SDE, Params


def cir(
    *,
    kappa: float = 1.5,
    theta: float = 0.06,
    sigma: float = 0.2,
    x0: float = 0.04,
    t1: float = 1.0,
    u: float | None = None,
    mean: bool = False,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Cox-Ingersoll-Ross short rate, full truncation, F = exp(-int X dt): a square root.

    Parameters
    ----------
    kappa : float
        Rate of mean reversion, per year.
    theta, x0 : float
        Long-run mean and initial value of the rate, per year.
    sigma : float
        Volatility: sigma sqrt(X) is the absolute one.
    t1 : float
        Maturity in years.
    u : float, optional
        F = exp(-u X_T) instead of the bond.
    mean : bool
        F = X_T instead of the bond. Its mean does not depend on sigma.

    Raises
    ------
    ArgumentError
        If both `u` and `mean` are given.
    """
    if u is not None and mean:
        raise ArgumentError(f"give `u` or `mean`, not both (got u={u!r}): each says what is averaged.")
    rate = SDE(drift, diffusion, parameters(dtype, kappa=kappa, theta=theta, sigma=sigma, x0=x0), noise_type="scalar")
    sde = with_running_integral(rate, positive_rate)
    functional: Functional
    functional, formula = (Moment(), mean_of) if mean else (Discount(), bond)
    if u is not None:
        functional, formula = Laplace(u), partial(laplace, u=u)
    problem = Problem(sde, functional, initial, horizon(t1), n_steps)
    return Known.from_formulas(problem, formula, notes="Full truncation: the tangent has no finite variance.")


def drift(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Drift of equation (1), (B, d)."""
    return p["kappa"] * (p["theta"] - y.clamp(min=0))


def diffusion(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Diffusion of equation (1)."""
    return (p["sigma"] * positive_sqrt(y)).unsqueeze(-1)  # (B, 1, 1)


def positive_rate(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """The integrand, shape (B,)."""
    return y[:, 0].clamp(min=0)


def bond(p: Params, T: Tensor) -> Tensor:
    """Equation (2)."""
    kappa, sigma = p["kappa"], p["sigma"]
    g = torch.sqrt(kappa**2 + 2 * sigma**2)
    grown = torch.expm1(g * T)
    D = (g + kappa) * grown + 2 * g
    log_A = 2 * kappa * p["theta"] / sigma**2 * (torch.log(2 * g / D) + 0.5 * (kappa + g) * T)
    return torch.exp(log_A - 2 * grown / D * p["x0"])


def laplace(p: Params, T: Tensor, u: float) -> Tensor:
    """Equation (3)."""
    kappa, sigma = p["kappa"], p["sigma"]
    e = torch.exp(-kappa * T)
    c = -(sigma**2) * torch.expm1(-kappa * T) / (4 * kappa)
    power = 2 * kappa * p["theta"] / sigma**2
    return torch.exp(-power * torch.log1p(2 * u * c) - u * e * p["x0"] / (1 + 2 * u * c))


def mean_of(p: Params, T: Tensor) -> Tensor:
    """Equation (4)."""
    return p["theta"] + (p["x0"] - p["theta"]) * torch.exp(-p["kappa"] * T)
