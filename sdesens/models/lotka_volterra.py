"""Stochastic Lotka-Volterra: predator and prey, each growing at a rate with noise.

    dX = X (alpha - beta Y) dt + sigma1 X dW^1     prey,
    dY = Y (delta X - gamma) dt + sigma2 Y dW^2    predators,    F = X_T.                        (1)

The moments of (1) do not close and no answer is known: a problem for comparing methods with each other.
"""

import torch
from torch import Tensor

from sdesens.functionals import Moment
from sdesens.models.known import Known, horizon, parameters
from sdesens.problem import Problem
from sdesens.sde import SDE, Params


def lotka_volterra(
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    gamma: float = 0.8,
    delta: float = 0.4,
    sigma1: float = 0.15,
    sigma2: float = 0.15,
    prey0: float = 2.0,
    predator0: float = 1.0,
    t1: float = 3.0,
    n_steps: int = 128,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Stochastic predator and prey, F = prey at the end: nonlinear, no known answer.

    Parameters
    ----------
    alpha, gamma : float
        Growth rate of the prey and death rate of the predators, per time.
    beta, delta : float
        Per time and head: what a predator takes, and what a prey gives.
    sigma1, sigma2 : float
        Relative volatilities of prey and predators, per square root of time.
    prey0, predator0 : float
        Initial numbers, parameters.
    t1 : float
    """
    params = parameters(
        dtype,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        delta=delta,
        sigma1=sigma1,
        sigma2=sigma2,
        prey0=prey0,
        predator0=predator0,
    )
    problem = Problem(SDE(drift, diffusion, params), Moment(), initial, horizon(t1), n_steps)
    return Known.from_formulas(problem, notes="Its moments do not close.")


def drift(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Drift of equation (1), (B, d)."""
    prey, predator = y[:, 0], y[:, 1]
    return torch.stack((prey * (p["alpha"] - p["beta"] * predator), predator * (p["delta"] * prey - p["gamma"])), dim=1)


def diffusion(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Diffusion of equation (1)."""
    return y * torch.stack((p["sigma1"], p["sigma2"]))


def initial(p: Params) -> Tensor:
    """The state (prey0, predator0)."""
    return torch.stack((p["prey0"], p["predator0"]))
