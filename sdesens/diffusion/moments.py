"""Mean and covariance of a chain whose step is affine, without noise.

Where a step is y' = A y + b + C z, as that of any sampler is for Gaussian data,

    mean' = A mean + b,      cov' = A cov A^T + C C^T,                                            (1)

and A, b, C are read off the step itself, at zero and at unit vectors: the error of a sampler with no Monte Carlo noise in it.
"""

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ShapeError
from sdesens.integrate import scheme
from sdesens.sde import SDE

LINEAR = 1e-9  # relative departure from a straight line that rounding explains


def affine_moments(sde: SDE, mean: Tensor, cov: Tensor, n_steps: int, *, t0: float = 0.0, dt: float = 1.0):
    """Mean (d,) and covariance (d, d) after n_steps steps of an SDE whose scheme is affine, equation (1), float64.

    Parameters
    ----------
    sde : SDE
        `sampler_sde(...)`, whose steps are of length 1 from time 0, or any equation with affine drift and additive noise.
        Diagonal noise; the state may have any shape, d is its number of entries.
    mean : Tensor, shape `event`
    cov : Tensor, shape (d, d)
    n_steps : int
    t0, dt : float

    Raises
    ------
    ArgumentError
        If a step is not affine.

    Example
    -------
    >>> decay = SDE(lambda t, y, p: -y, lambda t, y, p: torch.ones_like(y))
    >>> mean, cov = affine_moments(decay, torch.ones(1), torch.zeros(1, 1), 2, dt=0.5)
    >>> mean.item(), round(cov.item(), 12)                     # (1 - h)^2 and h (1 + (1 - h)^2)
    (0.25, 0.625)
    """
    event, d = tuple(mean.shape), mean.numel()
    if cov.shape != (d, d):
        raise ShapeError(f"`cov` must have shape ({d}, {d}) for a mean of shape {event}, got {tuple(cov.shape)}.")
    mean, cov = mean.to(torch.float64).reshape(d), cov.to(torch.float64)
    eye = torch.eye(d, dtype=torch.float64, device=mean.device)
    y = torch.cat((0 * eye[:1], eye, 0 * eye, 2 * eye[:1] - 3 * eye[-1:])).reshape(-1, *event)
    z = torch.cat((0 * eye[:1], 0 * eye, eye, 5 * eye[:1]))
    step = torch.tensor(dt, dtype=torch.float64, device=mean.device)
    for k in range(n_steps):
        out = scheme.step(sde, sde.params, t0 + k * step, step, y, z * step.sqrt()).reshape(-1, d)
        b = out[0]
        A, C = (out[1 : d + 1] - b).mT, (out[d + 1 : 2 * d + 1] - b).mT
        line = b + A @ (2 * eye[0] - 3 * eye[-1]) + 5 * C[:, 0]
        if not bool(((out[-1] - line).abs() <= LINEAR * (1 + out.abs().amax())).all()):
            raise ArgumentError(
                f"step {k} of `sde` is not affine in the state and the noise, so that moments do not close: use a Gaussian law's denoiser."
            )
        mean, cov = A @ mean + b, A @ cov @ A.mT + C @ C.mT
    return mean.reshape(event), cov
