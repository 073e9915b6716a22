"""Weights of the denoising loss, functions of the log-SNR on the eps-error, and what they are on other predictions.

A network's output o = a x_0 + b eps has |eps - eps_hat| = |alpha / D| |o - o_hat|, D = alpha b - sigma a, so that one loss is

    w |eps - eps_hat|^2 = w (alpha / D)^2 |o - o_hat|^2.                                          (1)

    weight        on eps: w              on x0: w SNR                 on v: w SNR/(SNR + 1)  (alpha^2 + sigma^2 = 1)
    simple        1                      SNR                          SNR/(SNR + 1)
    min_snr       min(SNR, g)/SNR        min(SNR, g)                  min(SNR, g)/(SNR + 1)
    likelihood    -t_max lambda'/2       -t_max SNR'/2                -t_max lambda' alpha^2/2
    edm           (r^2 + sd^2)/sd^2      (r^2 + sd^2)/(r sd)^2        r = sigma/alpha; 1 on a preconditioned network's output

Where no signal is left w may be infinite and alpha / D zero. Their product has a limit, and takes it: it is evaluated no
later than log-SNR -60, where it differs from the limit by rounding.

References: J. Ho et al., 2006.11239 (simple); D. Kingma et al., 2107.00630 (likelihood); T. Hang et al., 2303.09556 (min-SNR);
T. Karras et al., 2206.00364 (EDM).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sdesens.diffusion.checks import number
from sdesens.diffusion.conversions import NEEDS_SIGNAL, above_zero, combination, require_signal
from sdesens.diffusion.schedule import Schedule, check_schedule
from sdesens.errors import ShapeError
from sdesens.tensors import concrete, describe

Weight = Callable[[Tensor, Tensor], Tensor]
"""w(log_snr, rate), element by element: on the eps-error. The rate is -t_max dlambda/dt, the log-SNR lost per unit of t/t_max."""

LIMIT = -60.0  # e^(lambda/2) is 1e-13 here


def simple_weight(log_snr: Tensor, rate: Tensor) -> Tensor:
    """w = 1, as in DDPM.

    Example
    -------
    >>> simple_weight(torch.zeros(2), None)
    tensor([1., 1.])
    """
    return torch.ones_like(log_snr)


def likelihood_weight(log_snr: Tensor, rate: Tensor) -> Tensor:
    """w = -t_max lambda'/2: over times uniform in [0, t_max] the mean loss is the integral of the variational bound, nats a dimension.

    With `uniform_times` from t_min on, multiply by 1 - t_min/t_max. It grows like 1/t towards the data, and the loss varies much.

    Example
    -------
    >>> likelihood_weight(torch.zeros(1), torch.tensor([6.0]))
    tensor([3.])
    """
    return rate / 2


def min_snr_weight(gamma: float = 5.0) -> Weight:
    """w = min(SNR, gamma)/SNR: small noise levels count no more than SNR = gamma on x0. Hang et al. use gamma = 5.

    Example
    -------
    >>> round(float(min_snr_weight(5.0)(torch.tensor(20.0).log(), None)), 6)  # at SNR = 20
    0.25
    """
    return partial(_min_snr, gamma=number("gamma", gamma, 0.0, hint="5 is usual"))


def edm_weight(sigma_data: float) -> Weight:
    """w = (r^2 + sd^2)/sd^2, r = sigma/alpha: weight 1 on the output of a network preconditioned for data of this deviation.

    Example
    -------
    >>> edm_weight(0.5)(torch.zeros(1), None)  # at r = 1
    tensor([5.])
    """
    return partial(_edm, sigma_data=number("sigma_data", sigma_data, 0.0, hint="it is the data's standard deviation"))


def _min_snr(log_snr, rate, gamma):
    return torch.exp((math.log(gamma) - log_snr).clamp(max=0.0))


def _edm(log_snr, rate, sigma_data):
    return 1 + torch.exp(-log_snr) / sigma_data**2


def weight_at(weight: Weight, schedule: Schedule, t: Tensor) -> Tensor:
    """w at times t of a schedule, float64; raise ShapeError unless the weight is one number a time.

    Example
    -------
    >>> from sdesens.diffusion import EDM
    >>> weight_at(likelihood_weight, EDM(), torch.tensor([2.0]))  # lambda = -2 log t, up to t_max = 80
    tensor([40.], dtype=torch.float64)
    """
    t = schedule.time(t)
    log_snr = schedule._log_snr(t)
    w = weight(log_snr, -schedule.t_max * schedule._log_snr_rate(t))
    if not isinstance(w, Tensor) or w.shape != log_snr.shape:
        raise ShapeError(
            f"`weight(log_snr, rate)` must return a tensor of the shape of log_snr, {tuple(log_snr.shape)}, got {describe(w)}: one weight "
            "an item, computed element by element."
        )
    return w


def weight_on(weight: Weight, prediction: str, schedule: Schedule, t) -> Tensor:
    """The factor on |o - o_hat|^2 of another prediction that makes it the same loss, w (alpha / D)^2 of equation (1).

    Parameters
    ----------
    weight : callable (log_snr, rate) -> Tensor
        `simple_weight`, `likelihood_weight`, `min_snr_weight(5)`, `edm_weight(0.5)`, or your own.
    prediction : {"eps", "x0", "v", "score", "velocity"}
    schedule : Schedule
    t : number, or Tensor of any shape

    Returns
    -------
    Tensor, shape of t, float64

    Raises
    ------
    ArgumentError, GridError
        For an unknown prediction; for "eps" and "score" where no signal is left; for times outside the schedule or without noise.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> t = VP().t_of_log_snr(0.0)
    >>> [round(float(weight_on(simple_weight, o, VP(), t)), 12) for o in ("eps", "x0", "v")]  # SNR = 1
    [1.0, 1.0, 0.5]
    """
    check_schedule("schedule", schedule)
    t = above_zero(schedule, schedule.time(t))
    at = partial(combination, prediction, schedule)
    ab = at(t)  # a wrong name is the first thing to hear about
    if prediction in NEEDS_SIGNAL and concrete(t):
        require_signal(schedule, t, f"a weight on {prediction!r}")
    return factors(weight, schedule, t, at, ab)[1]


def factors(weight: Weight, schedule: Schedule, t: Tensor, at, ab: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(alpha / D)^2 and w (alpha / D)^2 at t, for an output with the coefficients a, b = ab = at(t); see the head of this file."""
    if schedule.zero_terminal_snr:
        t = torch.minimum(t, schedule.t_of_log_snr(LIMIT).to(t))
        ab = at(t)
    a, b = ab
    alpha, sigma = schedule._alpha(t), schedule._sigma(t)
    scale = (alpha / (alpha * b - sigma * a)) ** 2
    return scale, weight_at(weight, schedule, t) * scale
