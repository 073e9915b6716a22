"""One step of a sampler, from time t to an earlier u.

With estimates x_0 and eps of a predictor at (x, t), rho = (alpha_t sigma_u) / (sigma_t alpha_u) and q = 1 - rho^2,

    DDIM(eta)       x_u = alpha_u x_0 + sigma_u sqrt(1 - eta^2 q) eps + eta sigma_u sqrt(q) z                 (1)
    Heun            in y = x/alpha against r = sigma/alpha, where dy/dr = eps: Euler, then the trapezium      (2)
    churn           first up to r^ = (1 + gamma) r with fresh noise, sqrt(r^^2 - r^2) z                       (3)
    DPM-Solver++2M  x_u = (sigma_u/sigma_t) x + alpha_u (1 - rho) [x_0 + h/(2 h') (x_0 - x_0')]               (4)

with h = log(1/rho), and h', x_0' those of the step before; its first step, and one to sigma = 0, use x_0 alone. (1) with eta = 1 is
ancestral sampling, q(x_u | x_t, x_0); with eta = 0 it is Euler's method in the coordinates of (2). Each step is a pure function

    step(denoiser, x, span, z, memory, **options) -> (x_u, memory)

of x (B, *event), standard normals z of its shape, and what it remembers of the step before: None at first (zeros under transforms of
torch.func, where span.before equals span.t), then what it returned, a tensor like x. One that remembers says so: `step.remembers = True`. Options are numbers or 0-dim tensors, and gradients flow to them.

References: J. Song et al., 2010.02502 (1); T. Karras et al., 2206.00364 (2, 3); C. Lu et al., 2211.01095 (4).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sdesens.diffusion.conversions import require_signal
from sdesens.diffusion.predict import Predictor
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.values import like, root
from sdesens.tensors import concrete

Step = Callable[..., tuple[Tensor, Tensor | None]]


class Span(NamedTuple):
    """Where a step goes: from `t` to `u` < t, after `before` (t itself at the first step). 0-dim float64 tensors."""

    before: Tensor
    t: Tensor
    u: Tensor


def ddim_step(denoiser: Predictor, x: Tensor, span: Span, z: Tensor, memory=None, *, eta=0.0):
    """DDIM, equation (1).

    Parameters
    ----------
    x, z : Tensor, shape (B, *event)
    span : Span
    eta : number or 0-dim Tensor in [0, 1]

    Example
    -------
    >>> from sdesens.diffusion import VP, Denoiser
    >>> zero = Denoiser(lambda x, t: 0 * x, VP(), "x0")  # all data are 0
    >>> times = Span(*torch.tensor([0.5, 0.5, 0.4], dtype=torch.float64))
    >>> x = torch.ones(1, 2, dtype=torch.float64)
    >>> bool(torch.allclose(ddim_step(zero, x, times, 0 * x)[0], VP().sigma(0.4) / VP().sigma(0.5) * x))
    True
    """
    x0, eps = denoiser.pair(x, span.t)
    return ddim_update(denoiser.schedule, x0, eps, span.t, span.u, z, eta), None


def ddim_update(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor, u: Tensor, z: Tensor, eta=1.0) -> Tensor:
    """x_u of equation (1), (B, *event), from estimates of x_0 and eps at t and standard normals z.

    With eta = 1 a draw of q(x_u | x_t, x_0).
    """
    alpha_u, sigma_u = schedule.alpha(u), schedule.sigma(u)
    rho = schedule.alpha(t) * sigma_u / (schedule.sigma(t) * alpha_u)
    eta = torch.as_tensor(eta, dtype=torch.float64)
    # to sigma = 0 nothing of eps is kept, whatever eta; elsewhere sqrt' may be infinite and has to say so
    left = torch.where(sigma_u == 0, 1.0, (1 - eta**2) + (eta * rho) ** 2)
    ancestral = (
        concrete(eta) and not eta.requires_grad and eta.item() == 1
    )  # then left is rho^2, whose root has no derivative at 0
    keep = torch.where(sigma_u == 0, 1.0, rho) if ancestral else left.sqrt()
    fresh = eta * root(1 - rho**2)  # rho = 1 is no step at all
    return like(alpha_u, x0) * x0 + like(sigma_u * keep, x0) * eps + like(sigma_u * fresh, x0) * z


def heun_step(denoiser: Predictor, x: Tensor, span: Span, z: Tensor, memory=None, *, gamma=0.0, noise_scale=1.0):
    """Heun's method, equation (2), after (3) if gamma > 0; a step to sigma = 0 is Euler's.

    Parameters
    ----------
    x, z : Tensor, shape (B, *event)
    span : Span
        Some signal must be left at t.
    gamma, noise_scale : number or 0-dim Tensor, >= 0
        Of (3), noise_scale multiplying z. Noise never goes beyond the schedule's end. d/dgamma is infinite at gamma = 0.

    Example
    -------
    >>> from sdesens.diffusion import EDM, Denoiser
    >>> zero = Denoiser(lambda x, t: 0 * x, EDM(), "x0")
    >>> times = Span(*torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    >>> heun_step(zero, torch.ones(1, 2), times, torch.zeros(1, 2))[0]  # x / sigma stays
    tensor([[0.5000, 0.5000]])
    """
    schedule, t = denoiser.schedule, span.t
    require_signal(schedule, t, "Heun's method")
    r, r_u, alpha_u = schedule.ratio(t), schedule.ratio(span.u), schedule.alpha(span.u)
    y = x / like(schedule.alpha(t), x)
    if isinstance(gamma, Tensor) or gamma:
        end = schedule.ratio(torch.full_like(t, schedule.t_max))
        higher = torch.minimum(r * (1 + gamma), end)
        room = torch.where(r < end, higher**2 - r**2, 1.0).sqrt()
        y = y + like(torch.where(r < end, room, 0.0) * noise_scale, x) * z
        r, t = higher, schedule.t_of_log_snr(-2 * torch.log(higher))
        x = like(schedule.alpha(t), x) * y
    eps = denoiser.eps(x, t)
    euler = y + like(r_u - r, x) * eps
    last = r_u == 0
    if concrete(last) and bool(last):
        return like(alpha_u, x) * euler, None
    safe = torch.where(last, span.t, span.u)
    again = denoiser.eps(like(schedule.alpha(safe), x) * euler, safe)
    y = torch.where(last, euler, y + like(r_u - r, x) * (eps + again) / 2)
    return like(alpha_u, x) * y, None


def dpmpp_2m_step(denoiser: Predictor, x: Tensor, span: Span, z: Tensor, memory=None):
    """DPM-Solver++(2M), equation (4); remembers x_0.

    Parameters
    ----------
    x, z : Tensor, shape (B, *event)
        z is not used.
    span : Span
    memory : Tensor, shape (B, *event), or None
        x_0 of the step before.

    Example
    -------
    >>> from sdesens.diffusion import EDM, Denoiser
    >>> zero = Denoiser(lambda x, t: 0 * x, EDM(), "x0")
    >>> times = Span(*torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    >>> x, memory = dpmpp_2m_step(zero, torch.ones(1, 2), times, torch.zeros(1, 2))
    >>> x
    tensor([[0.5000, 0.5000]])
    """
    schedule = denoiser.schedule
    x0 = denoiser.x0(x, span.t)
    alpha_u, sigma_u, sigma_t = schedule.alpha(span.u), schedule.sigma(span.u), schedule.sigma(span.t)
    rho = schedule.alpha(span.t) * sigma_u / (sigma_t * alpha_u)
    rho_before = schedule.alpha(span.before) * sigma_t / (schedule.sigma(span.before) * schedule.alpha(span.t))
    single = (span.before == span.t) | (sigma_u == 0) | (rho == 0) | (rho_before == 0)
    h, h_before = (-torch.log(torch.where(single, 0.5, r)) for r in (rho, rho_before))
    slope = torch.where(single, 0.0, h / (2 * h_before))
    ahead = x0 if memory is None else x0 + like(slope, x) * (x0 - memory)
    return like(sigma_u / sigma_t, x) * x + like(alpha_u * (1 - rho), x) * ahead, x0


dpmpp_2m_step.remembers = True  # type: ignore[attr-defined]
