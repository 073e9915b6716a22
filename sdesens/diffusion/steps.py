"""One step of a sampler, from time t to an earlier u.

With estimates x_0 and eps of a predictor at (x, t), rho = (alpha_t sigma_u) / (sigma_t alpha_u) and q = 1 - rho^2,

    DDIM(eta)       x_u = alpha_u x_0 + sigma_u sqrt(1 - eta^2 q) eps + eta sigma_u sqrt(q) z                 (1)
    Heun            in y = x/alpha against r = sigma/alpha, where dy/dr = eps: Euler, then the trapezium      (2)
    churn           first up to r^ = (1 + gamma) r with fresh noise, sqrt(r^^2 - r^2) z                       (3)
    DPM-Solver++2M  x_u = (sigma_u/sigma_t) x + alpha_u (1 - rho) [x_0 + h/(2 h') (x_0 - x_0')]               (4)

with h = log(1/rho), and h', x_0' those of the step before; its first step, and one to sigma = 0, use x_0 alone. (1) with eta = 1 is
ancestral sampling, q(x_u | x_t, x_0); with eta = 0 it is Euler's method in the coordinates of (2). Each step is a pure function

    step(denoiser, x, span, z, memory, **options) -> (x_u, memory)

of x (B, *event), standard normals z of its shape, and what it remembers of the step before: None, or a tensor like x. Options are
numbers or 0-dim tensors, and gradients flow to them.

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
    """Equation (1), 0 <= eta <= 1."""
    x0, eps = denoiser.pair(x, span.t)
    return ddim_update(denoiser.schedule, x0, eps, span.t, span.u, z, eta), None


def ddim_update(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor, u: Tensor, z: Tensor, eta=1.0) -> Tensor:
    """x_u of equation (1), (B, *event), from estimates of x_0 and eps at t and standard normals z."""
    alpha_u, sigma_u = schedule.alpha(u), schedule.sigma(u)
    rho = schedule.alpha(t) * sigma_u / (schedule.sigma(t) * alpha_u)
    eta = torch.as_tensor(eta, dtype=torch.float64)
    keep, fresh = root((1 - eta**2) + (eta * rho) ** 2), eta * root(1 - rho**2)
    return like(alpha_u, x0) * x0 + like(sigma_u * keep, x0) * eps + like(sigma_u * fresh, x0) * z


def heun_step(denoiser: Predictor, x: Tensor, span: Span, z: Tensor, memory=None, *, gamma=0.0, noise_scale=1.0):
    """Equation (2), after (3) if gamma > 0; the last step, to sigma = 0, is Euler's.

    `noise_scale` multiplies z in (3). Noise never goes beyond the schedule's end.
    """
    schedule, t = denoiser.schedule, span.t
    require_signal(schedule, t, "Heun's method")
    r, r_u, alpha_u = ratio(schedule, t), ratio(schedule, span.u), schedule.alpha(span.u)
    y = x / like(schedule.alpha(t), x)
    if isinstance(gamma, Tensor) or gamma:
        higher = torch.minimum(r * (1 + gamma), ratio(schedule, torch.full_like(t, schedule.t_max)))
        y = y + like(root(higher**2 - r**2) * noise_scale, x) * z
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
    """Equation (4); remembers x_0."""
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


def ratio(schedule: Schedule, t: Tensor) -> Tensor:
    """r = sigma / alpha at t, the noise level of Karras et al."""
    return schedule.sigma(t) / schedule.alpha(t)
