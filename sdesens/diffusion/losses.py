"""Denoising score matching: one loss, weighted once in log-SNR, whatever the network predicts; and the bound it is part of.

    loss = w(lambda) |eps - eps_hat|^2 / d,      x_t = alpha x_0 + sigma eps,   x_0 of d dimensions.              (1)

For a network that returns o = a x_0 + b eps the same loss is

    loss = w (alpha / D)^2 |o - o_hat|^2 / d,    D = alpha b - sigma a,                           (2)

and (2) is what is computed: neither 1/alpha nor 1/sigma is taken of what the network returned. For w see `weights.py`.

The variational bound, for the decoder N(x_t / alpha, r^2 I) at the first time t_0, r = sigma/alpha:

    -log p(x_0) <= KL(q(x_T | x_0) || prior) + (1/2) int E|eps - eps_hat|^2 dlambda + d/2 (log(2 pi r_0^2) + 1).       (3)

References: P. Vincent, Neural Comput. 23 (2011) 1661; J. Ho et al., 2006.11239 (1); D. Kingma et al., 2107.00630 (3).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sdesens.diffusion.conversions import above_zero, combination, combine
from sdesens.diffusion.draws import check_items, check_uniform, first_time
from sdesens.diffusion.predict import Denoiser, Predictor, check_predictor
from sdesens.diffusion.schedule import ZERO_SNR, Schedule, check_schedule
from sdesens.diffusion.summary import divergence
from sdesens.diffusion.weights import Weight, factors, simple_weight
from sdesens.errors import DtypeError, GridError, ShapeError
from sdesens.tensors import concrete, describe


class Loss(NamedTuple):
    """What `dsm_loss` returns, one number an item; take the mean of `loss` over the global batch.

    Attributes
    ----------
    loss : Tensor, shape (B,)
        Weighted, per dimension.
    eps_error : Tensor, shape (B,)
        |eps - eps_hat|^2 / d; the x0-error is exp(-log_snr) times this.
    log_snr : Tensor, shape (B,)
    """

    loss: Tensor
    eps_error: Tensor
    log_snr: Tensor


def dsm_loss(denoiser: Predictor, x0: Tensor, t, eps: Tensor, *, weight: Weight = simple_weight) -> Loss:
    """The denoising loss of each item, equation (2): a pure function of its arguments, for any training loop.

    Parameters
    ----------
    denoiser : Denoiser, or another Predictor
        A `Denoiser` is judged by what its network returns. Others (guided ones, exact laws) by their v, which neither end of
        the schedule amplifies.
    x0 : Tensor, shape (B, *event), floating
    t : number, or Tensor of shape () or (B,)
        Within (0, t_max], such as `uniform_times`.
    eps : Tensor, shape (B, *event), of x0's dtype
        Standard normals, such as `draw_noise`.
    weight : callable (log_snr, rate) -> Tensor
        w, on the eps-error, whatever the network predicts.

    Returns
    -------
    Loss
        Of x0's dtype, float32 at least: what a network returns in half precision is cast up before anything is subtracted.

    Raises
    ------
    ArgumentTypeError, ShapeError, DtypeError, GridError
        For what is no predictor or no tensor; if eps, t, what the network or the weight returns do not fit x0; if t is not within
        the schedule.

    Example
    -------
    >>> from sdesens.diffusion import VP, draw_noise, draw_uniforms, min_snr_weight, uniform_times
    >>> x0, t, eps = torch.ones(4, 2), uniform_times(VP(), draw_uniforms(1, 0, 4)), draw_noise(1, 0, (4, 2))
    >>> dsm_loss(Denoiser(lambda x, t: 0 * x, VP(), "v"), x0, t, eps, weight=min_snr_weight(5.0)).loss.shape
    torch.Size([4])
    """
    _check_inputs(denoiser, x0, eps)
    schedule = denoiser.schedule
    t = above_zero(schedule, schedule.time(t))
    x = schedule.reparameterise(x0, t, eps)
    at: Callable[[Tensor], tuple[Tensor, Tensor]]
    if isinstance(denoiser, Denoiser):
        out, at = denoiser.raw(x, t), denoiser.combination
    else:
        out, at = denoiser.v(x, t), partial(combination, "v", schedule)
    if out.shape != x0.shape:
        raise ShapeError(
            f"`denoiser` must return the shape of x0, {tuple(x0.shape)}, got {describe(out)}: one value an entry."
        )
    wide = torch.promote_types(x0.dtype, torch.float32)
    ab = at(t)
    off = out.to(wide) - combine(x0.to(wide), eps.to(wide), ab)
    error = off.square().reshape(len(x0), -1).mean(1)
    scale, weighted = factors(weight, schedule, t, at, ab)
    return Loss(weighted.to(error) * error, scale.to(error) * error, schedule._log_snr(t).to(error).expand(len(x0)))


def prior_term(schedule: Schedule, x0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, prior_std^2 I)), T = t_max: what is left of each item at the noisy end.

    x0 is (B, *event); returns (B,), nats, of x0's dtype.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> round(float(prior_term(VP(), torch.ones(1, 2))), 7)  # 2 x alpha^2/2, nearly
    4.32e-05
    """
    check_schedule("schedule", schedule)
    check_items("x0", x0, dims=1)
    return divergence(schedule, x0.to(torch.float64)).reshape(len(x0), -1).sum(1).to(x0.dtype)


def step_cost(schedule: Schedule, t, u) -> Tensor:
    """What the step t -> u < t of a discrete-time bound costs in nats: this times |x_0 - x0_hat(x_t, t)|^2, summed over dimensions.

        (SNR_u - SNR_t)/2,   the KL divergence of q(x_u | x_t, x_0) from q(x_u | x_t, x0_hat)       (4)

    t and u are numbers or tensors, 0 < u < t <= t_max; returns float64. Raises GridError for other times.

    Example
    -------
    >>> from sdesens.diffusion import EDM
    >>> step_cost(EDM(), 1.0, 0.5)  # SNR = 1/t^2
    tensor(1.5000, dtype=torch.float64)
    """
    check_schedule("schedule", schedule)
    later, earlier = schedule.log_snr(t), schedule.log_snr(above_zero(schedule, schedule.time(u)))
    if concrete(later) and concrete(earlier) and not bool((earlier > later).all()):
        raise GridError("`u` must be earlier than `t`: the bound's steps go towards the data.")
    return -torch.exp(earlier) * torch.expm1(later - earlier) / 2


def vlb(denoiser: Predictor, x0: Tensor, u: Tensor, eps: Tensor, t_min: float | None = None) -> Tensor:
    """The variational bound (3) on -log p(x_0), one unbiased sample of it an item: average over draws of u and eps.

    The times are uniform in log-SNR, where the integrand is bounded; under times uniform in t it grows like 1/t. One
    sample still varies by 5 to 10 d nats, most of which strata in u take out of a mean over items.

    Parameters
    ----------
    u : Tensor, shape (B,)
        Uniform in (0, 1), such as `draw_uniforms`.
    t_min : float, optional
        The first time t_0, default 1e-5 t_max. The bound is for the data blurred by r_0 = sigma/alpha there.

    Returns
    -------
    Tensor, shape (B,), nats (not a dimension), for densities of x0 as it is: bits a dimension are nats / (d log 2)

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, GridError
        As of `dsm_loss`; if u is not within [0, 1], or t_min not within [0, t_max), or without noise.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> exact = Denoiser(lambda x, t: x * VP().sigma(t)[:, None], VP(), "eps")  # of N(0, I)
    >>> vlb(exact, torch.zeros(8, 2), torch.linspace(0.05, 0.95, 8), torch.ones(8, 2)).shape
    torch.Size([8])
    """
    _check_inputs(denoiser, x0, eps)
    schedule = denoiser.schedule
    start = above_zero(schedule, schedule.time(first_time(schedule, t_min)))
    high, low = (schedule.log_snr(t).clamp_min(ZERO_SNR) for t in (start, schedule.t_max))
    t = schedule.t_of_log_snr(high + check_uniform(u).to(high) * (low - high))
    d = x0[0].numel()
    integral = d / 2 * (high - low) * dsm_loss(denoiser, x0, t, eps).eps_error
    decoder = d / 2 * (math.log(2 * math.pi) + 1 - high)
    return prior_term(schedule, x0) + integral + decoder


def _check_inputs(denoiser, x0, eps) -> None:
    check_predictor("denoiser", denoiser)
    check_items("x0", x0, dims=1)
    if isinstance(eps, Tensor) and eps.dtype != x0.dtype:
        raise DtypeError(f"`eps` must have the dtype of `x0`, {x0.dtype}, got {eps.dtype}: draw it with that dtype.")
