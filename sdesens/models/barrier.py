"""A barrier option: a down-and-out call on geometric Brownian motion.

    dS = r S dt + sigma S dW,    F = e^{-rT} (S_T - K)^+ 1{S stays above B},                     (1)
    E F = C(s0) - (s0 / B)^{1 - 2 r / sigma^2} C(B^2 / s0),    B <= K,  B < s0,                  (2)

with C the Black-Scholes price of the call. (2) is for a barrier that is watched all the time; it is the reflection principle.

The state is log S, whose Euler-Maruyama chain has the right law at any step, beside the integral of the rate. The payoff itself
is watched at the grid points alone, which makes it dearer, by some 0.58 sigma sqrt(h) of the barrier's distance (M. Broadie,
P. Glasserman, S. Kou, Mathematical Finance 7 (1997) 325). Its `bridge` fills in the time between and has the mean (2)
whatever the step.

Reference: R. Merton, Bell Journal of Economics 4 (1973) 141; E. Reiner, M. Rubinstein, Risk 4 (8) (1991) 28.
"""

from functools import partial

import torch
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.functionals import BarrierCall, Discount
from sdesens.models.black_scholes import call, log_diffusion, log_drift, log_initial, rate
from sdesens.models.known import Known, parameters
from sdesens.problem import Problem
from sdesens.rewrite import with_running_integral
from sdesens.sde import SDE, Params


def barrier(
    *,
    r: float = 0.05,
    sigma: float = 0.2,
    s0: float = 100.0,
    strike: float = 100.0,
    barrier: float = 90.0,
    t1: float = 1.0,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Down-and-out call on geometric Brownian motion: a jump all along the path.

    Parameters
    ----------
    r, sigma, s0, strike, t1 : float
        As in `gbm_call`.
    barrier : float
        The call is worth nothing once the price is here or below. A number.

    Raises
    ------
    ArgumentError
        Unless 0 < barrier <= strike and barrier < s0, where equation (2) holds.
    """
    if not 0 < barrier <= strike or not barrier < s0:
        raise ArgumentError(
            f"`barrier` must be positive, at most the strike and below the price today, got {barrier!r} for strike {strike!r} and "
            f"s0 {s0!r}: equation (2) holds there; for another option give BarrierCall to a Problem of your own."
        )
    sde = SDE(log_drift, log_diffusion, parameters(dtype, r=r, sigma=sigma, s0=s0), noise_type="scalar")
    payoff = BarrierCall(strike, barrier, discount=Discount(), log=True)
    every = torch.linspace(0, t1, n_steps + 1, dtype=torch.float64)
    problem = Problem(with_running_integral(sde, rate), payoff, log_initial, every, n_steps)
    notes = (
        "The closed form is for a barrier watched all the time; the payoff's `bridge` attains it exactly. The payoff itself is "
        "watched at grid points only, and jumps: pathwise, forward and adjoint gradients miss the jump."
    )
    return Known.from_formulas(problem, partial(down_and_out, strike=strike, barrier=barrier), notes=notes)


def down_and_out(p: Params, T: Tensor, strike: float, barrier: float) -> Tensor:
    """Equation (2)."""
    reflected = {**p, "s0": barrier**2 / p["s0"]}
    weight = (p["s0"] / barrier) ** (1 - 2 * p["r"] / p["sigma"] ** 2)
    return call(p, T, strike) - weight * call(reflected, T, strike)
