"""An equation rewritten: other calculus, one more component, correlated noise.

    drift of the Ito form = drift of the Stratonovich form + 1/2 sum_j (ds_j/dx) s_j             (1)
    dI = integrand(t, X) dt                                                                      (2)
    s = diag(volatility) L,   L L' = correlation                                                 (3)

(1) is Kloeden & Platen, Numerical Solution of Stochastic Differential Equations, 1992, section 4.9. Each function takes an
`SDE` or its parts and returns another; nothing is solved here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import vjp, vmap

from sdesens.errors import ArgumentError, ArgumentTypeError, CalculusError, ShapeError
from sdesens.sde import SDE, Coefficient, Params, Step, check_function
from sdesens.tensors import concrete, describe, jvp


def ito_correction(sde: SDE, t: Tensor, y: Tensor, p: Params) -> Tensor:
    """sum_j (ds_j/dx) s_j at (t, y), equation (1) without its 1/2; shape (B, *event)."""
    if sde.noise_type == "additive":
        return torch.zeros_like(y)
    g = sde.diffusion(t, y, p)
    return diffusion_derivative(sde, t, y, p, g)


def diffusion_derivative(sde: SDE, t: Tensor, y: Tensor, p: Params, v: Tensor) -> Tensor:
    """sum_j (ds_j/dx) v_j for directions v shaped like the diffusion; shape (B, *event)."""

    def g(x: Tensor) -> Tensor:
        return sde.diffusion(t, x, p)

    if sde.noise_type == "diagonal":  # the Jacobian is symmetric, and reverse mode is the cheaper way through it
        return vjp(g, y)[1](v)[0]

    def column(j: Tensor, v_j: Tensor) -> Tensor:
        return jvp(g, (y,), (v_j,))[1].index_select(-1, j[None]).squeeze(-1)

    columns = torch.arange(v.shape[-1], device=v.device)
    return vmap(column, in_dims=(0, -1))(columns, v).sum(0)


def to_ito(sde: SDE) -> SDE:
    """The Ito equation with the same solutions: drift plus 1/2 sum_j (ds_j/dx) s_j, equation (1).

    The diffusion must be differentiable; its derivative is taken by torch.func at each evaluation. Where it has a kink
    (ReLU, abs) the correction jumps, and so does the drift.

    Raises
    ------
    CalculusError
        If the equation is to change but brings a `step` of its own.
    """
    return sde if sde.sde_type == "ito" else _rewritten(sde, 0.5, "ito")


def to_stratonovich(sde: SDE) -> SDE:
    """The Stratonovich equation with the same solutions: drift minus 1/2 sum_j (ds_j/dx) s_j, equation (1). Errors as above."""
    return sde if sde.sde_type == "stratonovich" else _rewritten(sde, -0.5, "stratonovich")


def _rewritten(sde: SDE, factor: float, sde_type: str) -> SDE:
    if sde.step is not None:
        raise CalculusError(
            f"this SDE, declared {sde.sde_type!r}, brings a `step` of its own, which would not follow a change of its drift: "
            f"rewrite it with dataclasses.replace(sde, step=None), and give the {sde_type!r} equation a step made for it."
        )
    return replace(sde, drift=_Corrected(sde, factor), sde_type=sde_type)


@dataclass(frozen=True)
class _Corrected:
    sde: SDE
    factor: float

    def __call__(self, t, y, p):
        return self.sde.drift(t, y, p) + self.factor * ito_correction(self.sde, t, y, p)


def with_running_integral(sde: SDE, integrand: Coefficient) -> SDE:
    """Append I_t = int_0^t integrand(s, y_s, p) ds to the state as its last component.

    Parameters
    ----------
    sde : SDE
        With states of shape (B, d).
    integrand : callable (t, y, p) -> (B,)
        Sees the original d components.

    Returns
    -------
    SDE
        With d + 1 components; start the last one at 0. Diagonal noise gains a noise-free component and stays diagonal.
        The integrand is summed at left points, by Euler-Maruyama and by a `step` of the equation's own, which moves the
        original components alike.
    """
    if not isinstance(sde, SDE):
        raise ArgumentTypeError(f"`sde` must be an SDE, got {type(sde).__name__}: use as_sde(module).")
    check_function("integrand", integrand, ("t", "y", "p"))
    step = None if sde.step is None else _IntegralStep(sde, sde.step, integrand)
    drift, diffusion = _IntegralDrift(sde, integrand), _IntegralDiffusion(sde)
    return replace(sde, drift=drift, diffusion=diffusion, noise_dim=None, step=step)


@dataclass(frozen=True)
class _IntegralDrift:
    sde: SDE
    integrand: Coefficient

    def __call__(self, t, y, p):
        if y.dim() != 2 or y.shape[1] < 2:
            raise ShapeError(
                f"with_running_integral needs states (B, d + 1), got shape {tuple(y.shape)}: append a 0 to `y0`."
            )
        x = y[:, :-1]
        return torch.cat((self.sde.drift(t, x, p), _rate(self.integrand, t, x, p)), dim=1)


def _rate(integrand: Coefficient, t: Tensor, x: Tensor, p: Params) -> Tensor:
    """The integrand as a column, (B, 1)."""
    rate = integrand(t, x, p)
    if not isinstance(rate, Tensor) or rate.shape != x.shape[:1]:
        raise ShapeError(
            f"`integrand(t, y, p)` must return shape (B,) = ({x.shape[0]},), got {describe(rate)}: one number a path, "
            "such as y[:, 0]."
        )
    return rate[:, None]


@dataclass(frozen=True)
class _IntegralStep:
    sde: SDE
    step: Step
    integrand: Coefficient

    def __call__(self, sde, p, t, dt, y, dW):
        x = y[:, :-1]
        if self.sde.noise_type == "diagonal":  # the integral has a Brownian motion too, which moves nothing
            dW = dW[:, :-1]
        moved = self.step(self.sde, p, t, dt, x, dW)
        return torch.cat((moved, y[:, -1:] + _rate(self.integrand, t, x, p) * dt), dim=1)


@dataclass(frozen=True)
class _IntegralDiffusion:
    sde: SDE

    def __call__(self, t, y, p):
        g = self.sde.diffusion(t, y[:, :-1], p)
        axis = 1 if self.sde.noise_type == "diagonal" else -2
        return torch.cat((g, torch.zeros_like(g.narrow(axis, 0, 1))), dim=axis)


def correlated_noise(volatility: Coefficient, correlation: Callable[[Params], Tensor]) -> Coefficient:
    """Diffusion for `noise_type="general"` with correlated Brownian motions.

        s = diag(volatility) L,   L L' = correlation(p)   (L: Cholesky factor).

    Parameters
    ----------
    volatility : callable (t, y, p) -> (B, d)
        Entry i may depend on the whole state; the i-th component moves by volatility_i times Brownian motion i.
    correlation : callable p -> (d, d)
        Symmetric, ones on the diagonal, positive definite. Built from parameters, it is differentiable in them.

    Raises
    ------
    ArgumentError
        On evaluation, if the matrix is not a correlation matrix.

    Example
    -------
    >>> p = {"rho": torch.tensor(0.6)}
    >>> def correlation(p):
    ...     one = torch.ones_like(p["rho"])
    ...     return torch.stack((torch.stack((one, p["rho"])), torch.stack((p["rho"], one))))
    >>> g = correlated_noise(lambda t, y, p: torch.ones_like(y), correlation)
    >>> g(torch.tensor(0.0), torch.zeros(1, 2), p)
    tensor([[[1.0000, 0.0000],
             [0.6000, 0.8000]]])
    """
    return _Correlated(volatility, correlation)


@dataclass(frozen=True)
class _Correlated:
    volatility: Coefficient
    correlation: Callable[[Params], Tensor]

    def __call__(self, t, y, p):
        volatility, rho = self.volatility(t, y, p), self.correlation(p)
        if volatility.shape != y.shape or rho.shape != y.shape[1:] * 2:
            raise ShapeError(
                f"`volatility(t, y, p)` must have the shape of y, {tuple(y.shape)}, and `correlation(p)` must be (d, d); got "
                f"{tuple(volatility.shape)} and {tuple(rho.shape)}: write constants as torch.ones_like(y) times a number."
            )
        factor, info = torch.linalg.cholesky_ex(rho)
        if concrete(rho):
            known = rho.detach()
            off = max(float((known.diagonal() - 1).abs().max()), float((known - known.mT).abs().max()))
            if int(info) != 0 or not off <= 1e-6:
                raise ArgumentError(
                    "`correlation(p)` must be symmetric and positive definite with ones on the diagonal, got "
                    f"{rho.detach().tolist()}: keep each |rho| < 1, for instance as tanh of a free parameter."
                )
        return volatility.unsqueeze(-1) * factor
