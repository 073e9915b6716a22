"""Black-Scholes: a call and a digital option on geometric Brownian motion.

    dS = r S dt + sigma S dW,    d1,2 = (log(s0 / K) + (r +- sigma^2 / 2) T) / (sigma sqrt(T)),  (1)
    call     E e^{-rT} (S_T - K)^+  = s0 Phi(d1) - K e^{-rT} Phi(d2),                            (2)
    digital  E e^{-rT} 1{S_T > K}   = e^{-rT} Phi(d2).                                           (3)

The discount is a state, I_t = r t, so that the derivative in the horizon includes it. With `log=True` the state is log S,
whose Euler-Maruyama chain has the right law at any step; with S itself the chain has a bias and no closed form.

Reference: F. Black, M. Scholes, J. Political Economy 81 (1973) 637.
"""

from functools import partial

import torch
from torch import Tensor
from torch.special import ndtr as Phi

from sdesens.functionals import Call, Digital, Discount, Functional
from sdesens.models.known import Known, horizon, parameters
from sdesens.problem import Problem
from sdesens.rewrite import with_running_integral
from sdesens.sde import SDE, Params


def gbm_call(
    *,
    r: float = 0.05,
    sigma: float = 0.2,
    s0: float = 100.0,
    strike: float = 100.0,
    t1: float = 1.0,
    log: bool = False,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Black-Scholes call on geometric Brownian motion: a kink.

    Parameters
    ----------
    r : float
        Continuously compounded rate, per year.
    sigma : float
        Relative volatility, per square root of a year (0.2 is 20 percent).
    s0, strike : float
        Price today, a parameter, and strike, a number.
    t1 : float
        Maturity in years.
    log : bool
        Simulate log S: exact in law at any step.
    """
    payoff = Call(strike, discount=Discount(), log=log)
    return _known(
        payoff, partial(call, strike=strike), log, horizon(t1), n_steps, parameters(dtype, r=r, sigma=sigma, s0=s0)
    )


def gbm_digital(
    *,
    r: float = 0.05,
    sigma: float = 0.2,
    s0: float = 100.0,
    strike: float = 100.0,
    t1: float = 1.0,
    log: bool = False,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Black-Scholes digital option: a jump, where pathwise gradients are wrong.

    Pathwise derivatives in sigma and s0 are 0 on every path, and that in r is the discount's alone. Parameters as in
    `gbm_call`.
    """
    payoff = Digital(strike, discount=Discount(), log=log)
    value = partial(digital, strike=strike)
    notes = "The payoff jumps: pathwise, forward and adjoint gradients miss the jump."
    return _known(payoff, value, log, horizon(t1), n_steps, parameters(dtype, r=r, sigma=sigma, s0=s0), notes)


def _known(payoff: Functional, value, log: bool, ts, n_steps: int, params: Params, notes: str = "") -> Known:
    coefficients = (log_drift, log_diffusion) if log else (drift, diffusion)
    price = SDE(*coefficients, params, noise_type="scalar")
    sde = with_running_integral(price, rate)
    problem = Problem(sde, payoff, log_initial if log else initial, ts, n_steps)
    return Known.from_formulas(problem, value, partial(_exact_in_law, value=value) if log else None, notes)


def drift(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Drift of equation (1), (B, d)."""
    return p["r"] * y


def diffusion(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Diffusion of equation (1)."""
    return (p["sigma"] * y).unsqueeze(-1)  # (B, 1, 1)


def log_drift(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Drift of log S."""
    return (p["r"] - 0.5 * p["sigma"] ** 2).expand_as(y)


def log_diffusion(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Diffusion of log S."""
    return p["sigma"].expand(*y.shape, 1)


def rate(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """The integrand of the discount, shape (B,)."""
    return p["r"].expand(y.shape[0])


def initial(p: Params) -> Tensor:
    """The state (s0, 0): price, and integral of the rate."""
    return torch.stack((p["s0"], torch.zeros_like(p["s0"])))


def log_initial(p: Params) -> Tensor:
    """Initial state in log S."""
    return torch.stack((p["s0"].log(), torch.zeros_like(p["s0"])))


def _d1_d2(p: Params, T: Tensor, strike: float) -> tuple[Tensor, Tensor]:
    spread = p["sigma"] * T.sqrt()
    d1 = (torch.log(p["s0"] / strike) + p["r"] * T) / spread + 0.5 * spread
    return d1, d1 - spread


def call(p: Params, T: Tensor, strike: float) -> Tensor:
    """Equation (2)."""
    d1, d2 = _d1_d2(p, T, strike)
    return p["s0"] * Phi(d1) - strike * torch.exp(-p["r"] * T) * Phi(d2)


def digital(p: Params, T: Tensor, strike: float) -> Tensor:
    """Equation (3)."""
    return torch.exp(-p["r"] * T) * Phi(_d1_d2(p, T, strike)[1])


def _exact_in_law(p: Params, T: Tensor, n: int, value) -> Tensor:
    return value(p, T)
