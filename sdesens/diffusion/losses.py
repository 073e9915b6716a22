"""Denoising score matching: one loss, weighted once in log-SNR, whatever the network predicts.

    loss = w(lambda) |eps - eps_hat|^2 / d,      x_t = alpha x_0 + sigma eps,   x_0 of d dimensions.              (1)

A network's own output o = a x_0 + b eps has |eps - eps_hat| = |alpha / D| |o - o_hat|, D = alpha b - sigma a, so the same loss is

    loss = w (alpha / D)^2 |o - o_hat|^2 / d,                                                     (2)

and (2) is what is computed: neither 1/alpha nor 1/sigma is taken of what the network returned.

    weight        on eps: w              on x0: w SNR                 on v: w SNR/(SNR + 1)  (alpha^2 + sigma^2 = 1)
    simple        1                      SNR                          SNR/(SNR + 1)
    min_snr       min(SNR, g)/SNR        min(SNR, g)                  min(SNR, g)/(SNR + 1)
    likelihood    -lambda'/2             -SNR'/2                      -lambda' alpha^2/2
    edm           (r^2 + sd^2)/sd^2      (r^2 + sd^2)/(r sd)^2        r = sigma/alpha; 1 on a preconditioned network's output

Where no signal is left w may be infinite and alpha / D zero. Their product has a limit, and takes it: it is evaluated no
later than log-SNR -60, where it differs from the limit by rounding.

The variational bound, for the decoder N(x_t / alpha, r^2 I) at the first time t_0 (D. Kingma et al., 2107.00630):

    -log p(x_0) <= KL(q(x_T | x_0) || prior) + (1/2) int E|eps - eps_hat|^2 dlambda + d/2 (log(2 pi r_0^2) + 1).       (3)

References: P. Vincent, Neural Comput. 23 (2011) 1661; J. Ho et al., 2006.11239; T. Hang et al., 2303.09556 (min-SNR); T. Karras
et al., 2206.00364 (EDM).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sdesens.diffusion.conversions import NEEDS_SIGNAL, above_zero, combination, combine, require_signal
from sdesens.diffusion.draws import check_uniform, first_time
from sdesens.diffusion.predict import Denoiser, Predictor, check_predictor
from sdesens.diffusion.schedule import ZERO_SNR, Schedule
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, GridError, ShapeError
from sdesens.tensors import concrete, describe

Weight = Callable[[Tensor, Tensor], Tensor]
"""w(log_snr, rate), element by element: on the eps-error. The rate is -t_max dlambda/dt, the log-SNR lost per unit of t/t_max."""

LIMIT = -60.0  # e^(lambda/2) is 1e-13 here


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


def simple_weight(log_snr: Tensor, rate: Tensor) -> Tensor:
    """w = 1, as in DDPM."""
    return torch.ones_like(log_snr)


def likelihood_weight(log_snr: Tensor, rate: Tensor) -> Tensor:
    """w = -lambda'/2: over times uniform in [0, t_max] the mean loss is the bound's integral (3), in nats a dimension.

    With `uniform_times` from t_min on, multiply by 1 - t_min/t_max. It grows like 1/t towards the data, and the loss varies much.
    """
    return rate / 2


def min_snr_weight(gamma: float = 5.0) -> Weight:
    """w = min(SNR, gamma)/SNR: small noise levels count no more than SNR = gamma on x0. Hang et al. use gamma = 5.

    Example
    -------
    >>> round(float(min_snr_weight(5.0)(torch.tensor(20.0).log(), None)), 6)  # at SNR = 20
    0.25
    """
    _check_positive("gamma", gamma, "5 is usual")
    return partial(_min_snr, gamma=float(gamma))


def edm_weight(sigma_data: float) -> Weight:
    """w = (r^2 + sd^2)/sd^2, r = sigma/alpha: weight 1 on the output of a network preconditioned for data of this deviation."""
    _check_positive("sigma_data", sigma_data, "it is the data's standard deviation")
    return partial(_edm, sigma_data=float(sigma_data))


def _min_snr(log_snr, rate, gamma):
    return torch.exp((math.log(gamma) - log_snr).clamp(max=0.0))


def _edm(log_snr, rate, sigma_data):
    return 1 + torch.exp(-log_snr) / sigma_data**2


def weight_on(weight: Weight, prediction: str, schedule: Schedule, t) -> Tensor:
    """The factor on |o - o_hat|^2 of another prediction that makes it the same loss, w (alpha / D)^2 of equation (2).

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
    t = above_zero(schedule, schedule.time(t))
    at = partial(combination, prediction, schedule)
    at(t)  # a wrong name is the first thing to hear about
    if prediction in NEEDS_SIGNAL and concrete(t):
        require_signal(schedule, t, f"a weight on {prediction!r}")
    return _factors(weight, schedule, t, at)[1]


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
    ShapeError, DtypeError, GridError
        If eps, t, what the network or the weight returns do not fit x0; if t is not within the schedule.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> from sdesens.diffusion.draws import draw_noise, draw_uniforms, uniform_times
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
        raise ShapeError(f"`denoiser` must return the shape of x0, {tuple(x0.shape)}, got {describe(out)}.")
    wide = torch.promote_types(x0.dtype, torch.float32)
    off = out.to(wide) - combine(x0.to(wide), eps.to(wide), at(t))
    error = off.square().reshape(len(x0), -1).mean(1)
    scale, weighted = _factors(weight, schedule, t, at)
    return Loss(weighted.to(error) * error, scale.to(error) * error, schedule.log_snr(t).to(error).expand(len(x0)))


def _factors(weight: Weight, schedule: Schedule, t: Tensor, at) -> tuple[Tensor, Tensor]:
    """(alpha / D)^2 and w (alpha / D)^2 at t, for an output with the coefficients a, b = at(t); see the head of this file."""
    if schedule.zero_terminal_snr:
        t = torch.minimum(t, schedule.t_of_log_snr(LIMIT).to(t))
    a, b = at(t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    scale = (alpha / (alpha * b - sigma * a)) ** 2
    w = weight(schedule.log_snr(t), -schedule.t_max * schedule.log_snr_rate(t))
    if not isinstance(w, Tensor) or w.shape != t.shape:
        raise ShapeError(
            f"`weight(log_snr, rate)` must return a tensor of the shape of log_snr, {tuple(t.shape)}, got {describe(w)}: one weight an "
            "item, computed element by element."
        )
    return scale, w * scale


def prior_term(schedule: Schedule, x0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, prior_std^2 I)), T = t_max: what is left of each item at the noisy end.

    x0 is (B, *event); returns (B,), nats, of x0's dtype.
    """
    _check_data(x0)
    end = torch.tensor(schedule.t_max, dtype=torch.float64, device=x0.device)
    prior = schedule.prior_std.to(end)
    alpha, sigma = schedule.alpha(end), schedule.sigma(end)
    excess = (sigma - prior) * (sigma + prior) / prior**2  # sigma^2 / prior^2 - 1, and log1p: the two nearly cancel
    each = (alpha / prior * x0.to(torch.float64)).square() + excess - torch.log1p(excess)
    return 0.5 * each.reshape(len(x0), -1).sum(1).to(x0.dtype)


def step_cost(schedule: Schedule, t, u) -> Tensor:
    """What the step t -> u < t of a discrete-time bound costs in nats: this times |x_0 - x0_hat(x_t, t)|^2, summed over dimensions.

        (SNR_u - SNR_t)/2,   the KL divergence of q(x_u | x_t, x_0) from q(x_u | x_t, x0_hat)       (4)

    t and u are numbers or tensors, 0 < u < t <= t_max; returns float64.
    """
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

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> exact = Denoiser(lambda x, t: x * VP().sigma(t)[:, None], VP(), "eps")  # of N(0, I)
    >>> vlb(exact, torch.zeros(8, 2), torch.linspace(0.05, 0.95, 8), torch.ones(8, 2)).shape
    torch.Size([8])
    """
    _check_inputs(denoiser, x0, eps)
    schedule = denoiser.schedule
    ends = torch.tensor([first_time(schedule, t_min), schedule.t_max], dtype=torch.float64, device=x0.device)
    high, low = schedule.log_snr(above_zero(schedule, ends)).clamp_min(ZERO_SNR)
    t = schedule.t_of_log_snr(high + check_uniform(u).to(ends) * (low - high))
    d = x0[0].numel()
    integral = d / 2 * (high - low) * dsm_loss(denoiser, x0, t, eps).eps_error
    decoder = d / 2 * (math.log(2 * math.pi) + 1 - high)
    return prior_term(schedule, x0) + integral + decoder


def _check_data(x0) -> None:
    if not isinstance(x0, Tensor):
        raise ArgumentTypeError(f"`x0` must be a tensor (B, *event), got {type(x0).__name__}: use torch.tensor(x0).")
    if not x0.is_floating_point():
        raise DtypeError(f"`x0` must be floating, got {x0.dtype}: scale the data, say to [-1, 1], and convert it.")
    if not x0.dim() or not x0.numel():
        raise ShapeError(f"`x0` must have shape (B, *event) with at least one number, got {tuple(x0.shape)}.")


def _check_inputs(denoiser, x0, eps) -> None:
    check_predictor("denoiser", denoiser)
    _check_data(x0)
    if isinstance(eps, Tensor) and eps.dtype != x0.dtype:
        raise DtypeError(f"`eps` must have the dtype of `x0`, {x0.dtype}, got {eps.dtype}: draw it with that dtype.")


def _check_positive(name: str, value, hint: str) -> None:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ArgumentError(f"`{name}` must be a positive, finite number, got {value!r}: {hint}.")
