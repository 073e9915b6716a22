"""One prediction from another: what a network may predict is a combination of the clean data and the noise,

    o = a x_0 + b eps,      x = alpha x_0 + sigma eps,                                            (1)

so with D = alpha b - sigma a

    x_0 = (b x - sigma o) / D,     eps = (alpha o - a x) / D,     |d eps| = |alpha / D| |d o|.    (2)

    prediction   a                         b                       where
    eps          0                         1
    x0           1                         0
    v            -sigma/n                  alpha/n                 n^2 = alpha^2 + sigma^2 (1 for VP)
    score        0                         -1/sigma                s = grad log p_t
    velocity     alpha'                    sigma'                  dx/dt of the probability-flow ODE

References: J. Ho et al., 2006.11239 (eps); T. Salimans, J. Ho, 2202.00512 (v).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sdesens.diffusion.schedule import ZERO_SNR, Schedule
from sdesens.diffusion.values import like
from sdesens.errors import ArgumentError, GridError, ShapeError
from sdesens.tensors import concrete, describe


def _of_v(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    n = torch.sqrt(alpha**2 + sigma**2)
    return -sigma / n, alpha / n


PREDICTIONS: dict[str, Callable[[Schedule, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda schedule, t: (torch.zeros_like(t), torch.ones_like(t)),
    "x0": lambda schedule, t: (torch.ones_like(t), torch.zeros_like(t)),
    "v": _of_v,
    "score": lambda schedule, t: (torch.zeros_like(t), -1 / schedule.sigma(t)),
    "velocity": lambda schedule, t: schedule.rates(t),
}
NEEDS_SIGNAL = ("eps", "score")  # they are silent about x0 where alpha = 0
SILENT = 1e-6  # |a sigma| below which a prediction does not tell x0 there
OTHER_NAMES = {
    "epsilon": "eps",
    "noise": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow": "velocity",
    "F": "sigma_data=",
}


def combination(prediction: str, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of equation (1) at times t, float64."""
    check_prediction(prediction)
    return PREDICTIONS[prediction](schedule, schedule.time(t))


def split(out: Tensor, x: Tensor, t: Tensor, schedule: Schedule, ab: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """x_0 and eps, equation (2), from a prediction with the coefficients ab."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a, b = ab
    D = alpha * b - sigma * a

    def over(c: Tensor) -> Tensor:
        return like(c / D, x)

    return over(b) * x - over(sigma) * out, over(alpha) * out - over(a) * x


def convert(out: Tensor, x: Tensor, t, schedule: Schedule, have: str, want: str) -> Tensor:
    """One prediction from another, by equation (2).

    Parameters
    ----------
    out, x : Tensor, shape (B, *event)
        The prediction, and where it was made.
    t : number, or Tensor of shape () or (B,)
    have, want : {"eps", "x0", "v", "score", "velocity"}

    Returns
    -------
    Tensor, shape (B, *event)

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> x, v = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    >>> bool(torch.allclose(convert(v, x, 0.5, VP(), "v", "x0"), VP().alpha(0.5) * x))
    True
    """
    if not isinstance(out, Tensor) or out.shape != x.shape:
        raise ShapeError(f"`out` must have the shape of `x`, {tuple(x.shape)}, got {describe(out)}.")
    t = above_zero(schedule, schedule.time(t))
    a, b = combination(have, schedule, t)
    if concrete(t):
        silent = (a * schedule.sigma(t)).abs() < SILENT
        require_signal(schedule, t[silent], f"converting from {have!r}")
    x0, eps = split(out, x, t, schedule, (a, b))
    return combine(x0, eps, combination(want, schedule, t))


def combine(x0: Tensor, eps: Tensor, ab: tuple[Tensor, Tensor]) -> Tensor:
    """a x_0 + b eps, equation (1)."""
    a, b = ab
    return like(a, x0) * x0 + like(b, x0) * eps


def check_prediction(prediction) -> None:
    """Raise ArgumentError unless this names a prediction."""
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        hint = OTHER_NAMES.get(prediction) if isinstance(prediction, str) else None
        remedy = f": here it is called {hint!r}." if hint else "."
        raise ArgumentError(
            f"`prediction` must be one of {', '.join(map(repr, PREDICTIONS))}, got {prediction!r}{remedy}"
        )


def above_zero(schedule: Schedule, t: Tensor) -> Tensor:
    """t, if there is noise at t: without noise there is no eps and no score."""
    sigma = schedule._sigma(t)
    if concrete(sigma) and not bool((sigma > 0).all()):
        raise GridError(
            "`t` holds a time without noise, where eps and the score do not exist: use t > 0, 1e-5 t_max for a likelihood. A sampler's "
            "grid may end there, but not for the adjoint methods, which evaluate the score at the end of a step."
        )
    return t


def require_signal(schedule: Schedule, t: Tensor, what: str) -> None:
    """Raise ArgumentError if some t has no signal left."""
    log_snr = schedule.log_snr(t)
    if concrete(log_snr) and bool((log_snr < ZERO_SNR).any()):
        raise ArgumentError(
            f"{what} at t = {float(t.max()):g} of {schedule!r} needs some signal, and none is left there: use "
            "schedule.t_of_log_snr(-20) for the last time."
        )
