"""Ornstein-Uhlenbeck in several dimensions: a linear SDE whose components are coupled, with fewer noises than components.

    dX = A (X - mu) dt + G dW,    A (d, d),  G (d, m),    F = |X_T|^2                            (1)
    E F = |E X_T|^2 + tr S_T,    E X_T = mu + e^{AT} (x0 - mu),
    vec S' = (A (+) A) vec S + vec G G',    A (+) A = A x I + I x A   (Kronecker sum).           (2)

S_T is read off the exponential of [[A (+) A, vec G G'], [0, 0]] T, of size d^2 + 1: meant for small d. The
Euler-Maruyama chain is Gaussian too, with H = I + h A and

    m <- mu + H (m - mu),    S <- H S H' + h G G'.                                               (3)

The diffusion is handed over as general noise, though it is additive, so that a check takes the general code path.
"""

import torch
from torch import Tensor

from sdesens.functionals import SumOfSquares
from sdesens.models.known import Known, horizon, parameters
from sdesens.problem import Problem
from sdesens.sde import SDE, Params

DRIFT = ((-1.0, 0.5, 0.0), (-0.4, -0.8, 0.3), (0.2, 0.0, -1.2))
NOISE = ((0.5, 0.0), (0.2, 0.4), (-0.3, 0.1))


def ou_nd(
    *,
    A=DRIFT,
    mu=(0.3, -0.2, 0.5),
    G=NOISE,
    x0=(1.0, 0.5, -0.5),
    t1: float = 1.0,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Three coupled Ornstein-Uhlenbeck components, two noises, F = |X_T|^2: matrix parameters.

    Parameters
    ----------
    A : (d, d) numbers
        Drift matrix, per time; any, stable or not.
    mu, x0 : (d,) numbers
        Fixed point of the drift, and initial state.
    G : (d, m) numbers
        Volatilities, units of X per square root of time.
    t1 : float
    """
    sde = SDE(drift, diffusion, parameters(dtype, A=A, mu=mu, G=G, x0=x0), noise_type="general")
    problem = Problem(sde, SumOfSquares(), initial, horizon(t1), n_steps)
    return Known.from_formulas(problem, exact, scheme)


def drift(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Drift of equation (1), (B, d)."""
    return (y - p["mu"]) @ p["A"].mT


def diffusion(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Diffusion of equation (1)."""
    return p["G"].expand(y.shape[0], -1, -1)


def initial(p: Params) -> Tensor:
    """Initial state, (d,)."""
    return p["x0"]


def exact(p: Params, T: Tensor) -> Tensor:
    """Equation (2)."""
    A, G, mu = p["A"], p["G"], p["mu"]
    one = torch.eye(A.shape[0], dtype=A.dtype)
    mean = mu + torch.linalg.matrix_exp(A * T) @ (p["x0"] - mu)
    kronecker_sum = torch.kron(A, one) + torch.kron(one, A)
    generator = torch.cat((kronecker_sum, (G @ G.mT).reshape(-1, 1)), dim=1)  # (d^2, d^2 + 1)
    generator = torch.cat((generator, torch.zeros_like(generator[:1])))
    S = torch.linalg.matrix_exp(generator * T)[:-1, -1].reshape(A.shape)
    return mean.square().sum() + S.trace()


def scheme(p: Params, T: Tensor, n: int) -> Tensor:
    """Equation (3)."""
    A, G, mu, h = p["A"], p["G"], p["mu"], T / n
    H = torch.eye(A.shape[0], dtype=A.dtype) + h * A
    gap, S = p["x0"] - mu, torch.zeros_like(A)
    for _ in range(n):
        gap, S = H @ gap, H @ S @ H.mT + h * G @ G.mT
    return (mu + gap).square().sum() + S.trace()
