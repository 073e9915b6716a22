"""The Cox-Ingersoll-Ross process by its square root: a scheme that stays positive, and has tangents with moments.

    dX = kappa (theta - X) dt + sigma sqrt(X) dW,    Y = sqrt(X),
    dY = [(4 kappa theta - sigma^2) / (8 Y) - kappa Y / 2] dt + sigma / 2 dW                     (1)

(J. Lamperti's transform) has additive noise and a drift that pushes away from 0. Implicit in the drift, a step from Y is

    b = Y + sigma dW / 2,    c = 1 + kappa h / 2,    q = c h (4 kappa theta - sigma^2) / 2,
    Y' = [b + sqrt(b^2 + q)] / (2c),                                                             (2)

positive for any b. It needs 4 kappa theta > sigma^2: at equality Y' = b^+ / c reaches 0, where the tangents in kappa, theta and
sigma have a tail like 1/x and no mean, and below it the root has no real value. The closer to equality, the larger the bias and
the lower its order in h: with kappa = T = 1, theta = x0 = .04 and 64 steps that of d E X_T / d sigma, which is 0, is by quadrature
-.00120 for 2 kappa theta / sigma^2 = 1.2, -.00338 for .8, -.00861 for .6, -.01245 for .55, and falls between 64 and 256 steps at
orders .83, .60, .44, .39: `sensitivity(..., bias=0.44)` extrapolates with such an order, bias=True with 1.

The answers are those of `cir`. Reference: A. Alfonsi, Monte Carlo Methods and Applications 11 (2005) 355.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, MethodError
from sdesens.functionals import Discount, Functional, Moment
from sdesens.models.cir import bond as cir_bond
from sdesens.models.cir import laplace, mean_of
from sdesens.models.known import Known, horizon, parameters
from sdesens.problem import Problem
from sdesens.rewrite import with_running_integral
from sdesens.sde import SDE, Params


def cir_lamperti(
    *,
    kappa: float = 1.5,
    theta: float = 0.06,
    sigma: float = 0.2,
    x0: float = 0.04,
    t1: float = 1.0,
    u: float | None = None,
    bond: bool = False,
    n_steps: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Known:
    """Cox-Ingersoll-Ross process by its square root, drift-implicit, F = X_T: a scheme of its own.

    Parameters
    ----------
    kappa, theta, sigma, x0, t1 : float
        As in `cir`, with 4 kappa theta > sigma^2 and x0 > 0.
    u : float, optional
        F = exp(-u X_T) instead of X_T.
    bond : bool
        F = exp(-int X dt) instead of X_T, the integral summed at left points.

    Raises
    ------
    ArgumentError
        If x0 is not positive, or both `u` and `bond` are given.
    MethodError
        If 4 kappa theta <= sigma^2.
    """
    if u is not None and bond:
        raise ArgumentError(f"give `u` or `bond`, not both (got u={u!r}): each says what is averaged.")
    if not x0 > 0:
        raise ArgumentError(f"`x0` must be positive, for its square root is to be differentiated, got {x0!r}.")
    if not 4 * kappa * theta > sigma**2:
        raise MethodError(
            f"the drift-implicit scheme needs 4 kappa theta > sigma^2, got {4 * kappa * theta:.6g} and {sigma**2:.6g}: at or below "
            "that the path reaches 0, where its tangents have no mean. Use exact sampling of the non-central chi-square law with "
            "its likelihood ratio, or method='likelihood_ratio' on an Euler-Maruyama chain."
        )
    params = parameters(dtype, kappa=kappa, theta=theta, sigma=sigma, x0=x0)
    root = SDE(drift, diffusion, params, noise_type="scalar", step=step)
    notes = "Drift-implicit steps of sqrt(X): the continuous adjoints, which reverse Euler-Maruyama, do not apply."
    if bond:
        problem = Problem(with_running_integral(root, square), Discount(), initial_with_integral, horizon(t1), n_steps)
        return Known.from_formulas(problem, cir_bond, notes=notes)
    functional: Functional
    functional, formula = (Moment(2), mean_of) if u is None else (LaplaceOfSquare(u), partial(laplace, u=u))
    return Known.from_formulas(Problem(root, functional, initial, horizon(t1), n_steps), formula, notes=notes)


@dataclass(frozen=True)
class LaplaceOfSquare:
    """exp(-u Y_T^2) of the first component."""

    u: float
    kind: ClassVar[str] = "smooth"

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        return torch.exp(-self.u * ys[-1, :, 0].square())


def drift(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Drift of equation (1), (B, d)."""
    return (4 * p["kappa"] * p["theta"] - p["sigma"] ** 2) / (8 * y) - 0.5 * p["kappa"] * y


def diffusion(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """Diffusion of equation (1)."""
    return (0.5 * p["sigma"]).expand(*y.shape, 1)  # (B, 1, 1)


def step(sde: SDE, p: Params, t: Tensor, dt: Tensor, y: Tensor, dW: Tensor) -> Tensor:
    """Equation (2), (B, 1)."""
    b = y + 0.5 * p["sigma"] * dW
    c = 1 + 0.5 * p["kappa"] * dt
    q = 0.5 * c * dt * (4 * p["kappa"] * p["theta"] - p["sigma"] ** 2)
    larger = (b.square() + q).sqrt() + torch.where(b > 0, b, -b)
    return torch.where(b > 0, larger, q / larger) / (2 * c)  # below 0, b + root would cancel: (root - b)(root + b) = q


def square(t: Tensor, y: Tensor, p: Params) -> Tensor:
    """The integrand X, shape (B,)."""
    return y[:, 0].square()


def initial(p: Params) -> Tensor:
    """The state (sqrt x0,)."""
    return p["x0"].sqrt().reshape(1)


def initial_with_integral(p: Params) -> Tensor:
    """The state (sqrt x0, 0): root, and integral of X."""
    return torch.stack((p["x0"].sqrt(), torch.zeros_like(p["x0"])))
