"""Samplers: from noise to data along an explicit grid of times.

Each is one step (`steps.py`; Euler-Maruyama is the core's), folded over the grid. They are ordinary functions of the predictor's
parameters, their options, the start and the noise: differentiable, and nothing is clipped. Hidden `no_grad` there is none: put
the call under torch.no_grad() to sample only. For derivatives of expectations with error bars, `sampler_problem`.

Noise is an argument. Row i has the noise of path `first + i` of the source, whatever the batch; step k of the source is used
from grid[k-1] to grid[k], and its step 0 is the starting noise (`prior`).
"""

from collections.abc import Callable
from secrets import randbits

import torch
from torch import Tensor

from sdesens.diffusion.chain import sampler_sde
from sdesens.diffusion.predict import Predictor
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.steps import Step, ddim_step, dpmpp_2m_step, heun_step
from sdesens.diffusion.values import like
from sdesens.errors import ArgumentError, ArgumentTypeError, NonFiniteError, ShapeError
from sdesens.integrate import scheme
from sdesens.noise import Noise, Philox, settle
from sdesens.problem import check_state
from sdesens.tensors import concrete, describe

Callback = Callable[[int, Tensor], None]


def prior(
    schedule: Schedule,
    n: int,
    event: tuple[int, ...],
    *,
    seed: int | None = None,
    noise: Noise | None = None,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """x_T ~ N(0, prior_std^2 I), shape (n, *event): step 0 of the noise.

    Parameters
    ----------
    n : int
    event : tuple of int
        Shape of one sample.
    seed, noise
        Give one: the source of the sampler that goes on from here. A fresh seed if both are left out.
    first : int
        Index of the first row's path.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> prior(VP(), 4, (3,), seed=1).shape
    torch.Size([4, 3])
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ArgumentTypeError(f"`n` must be a positive int, got {n!r}.")
    dim = torch.Size(event).numel()
    z = _source(seed, noise).normals(first, n, 0, 1, dim, dtype=dtype, device=torch.device(device))
    return z[0].reshape(n, *event) * like(schedule.prior_std, z)


def ddim(denoiser: Predictor, x: Tensor, grid, *, eta: float | Tensor = 0.0, **how) -> Tensor:
    """DDIM, from eta = 0, deterministic, to eta = 1, ancestral sampling: equation (1) of `steps.py`. Order 1.

    Parameters
    ----------
    denoiser : Predictor
    x : Tensor, shape (B, *event)
        The state at grid[0]: `prior(...)`.
    grid : Tensor or sequence, shape (N + 1,)
        Falling times (`grids.py`); it may end at 0.
    eta : number or 0-dim Tensor in [0, 1]
    **how
        As of `walk`: seed, noise, first, callback.

    Returns
    -------
    Tensor, shape (B, *event)
        The state at grid[-1].

    Example
    -------
    >>> from sdesens.diffusion import VP, Denoiser, uniform_grid
    >>> denoiser = Denoiser(lambda x, t: x * VP().sigma(t)[:, None].to(x), VP(), "eps")  # exact for N(0, I)
    >>> x = prior(denoiser.schedule, 4, (3,), seed=1)
    >>> bool((ddim(denoiser, x, uniform_grid(VP(), 500, t_min=0.0)) - x).abs().max() < 0.01)
    True
    """
    if not isinstance(eta, Tensor) and eta == 0:
        how = quiet(x, grid, how)
    return walk(denoiser, x, grid, ddim_step, options={"eta": eta}, **how)


def ancestral(denoiser: Predictor, x: Tensor, grid, **how) -> Tensor:
    """Ancestral sampling of DDPM (J. Ho et al., 2006.11239), x_u ~ q(x_u | x_t, x_0 estimate): `ddim` with eta = 1."""
    return walk(denoiser, x, grid, ddim_step, options={"eta": 1.0}, **how)


def euler_maruyama(denoiser: Predictor, x: Tensor, grid, *, eta: float | Tensor = 1.0, **how) -> Tensor:
    """The core's Euler-Maruyama on `as_sde(denoiser, eta, reverse=True)`. Weak order 1. The grid must end above t = 0 or in a step to it.

    eta = 0 is Euler's method for the probability-flow ODE, 1 the reverse SDE; more is allowed. Other arguments as of `ddim`.
    """
    return walk(denoiser, x, grid, None, options={"eta": eta}, **how)


def heun(denoiser: Predictor, x: Tensor, grid, *, churn: float = 0.0, noise_scale: float = 1.0, **how) -> Tensor:
    """Heun's method of T. Karras et al. (2206.00364), with churn: equations (2) and (3) of `steps.py`. Order 2.

    2N - 1 evaluations for N steps to t = 0, the last of which is Euler's.

    Parameters
    ----------
    churn : float, >= 0
        Their S_churn: gamma = min(churn / N, sqrt(2) - 1) at every step. 0 is deterministic.
    noise_scale : float
        Their S_noise.

    Other arguments as of `ddim`. The schedule must have some signal at grid[0].
    """
    if not (isinstance(churn, int | float) and churn >= 0):
        raise ArgumentError(f"`churn` must be a number >= 0, got {churn!r}: 0 adds no noise.")
    options = {}
    if not churn:
        how = quiet(x, grid, how)
    else:
        options = {"gamma": min(churn / (len(grid) - 1), 2**0.5 - 1), "noise_scale": noise_scale}
    return walk(denoiser, x, grid, heun_step, options=options, **how)


def dpmpp_2m(denoiser: Predictor, x: Tensor, grid, **how) -> Tensor:
    """DPM-Solver++(2M) of C. Lu et al. (2211.01095): equation (4) of `steps.py`. Order 2, one evaluation a step; best on a log-SNR grid."""
    return walk(denoiser, x, grid, dpmpp_2m_step, **quiet(x, grid, how))


def walk(
    denoiser: Predictor,
    x: Tensor,
    grid,
    step: Step | None = None,
    *,
    options: dict | None = None,
    seed: int | None = None,
    noise: Noise | Tensor | None = None,
    first: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """Fold a step over a grid: what all samplers are.

    Parameters
    ----------
    denoiser, x, grid
        As of `ddim`.
    step : callable, optional
        See `steps.py`; Euler-Maruyama if left out.
    options : dict, optional
        Of the step.
    seed : int, optional
        Of the Philox noise; a fresh one if `noise` is left out too.
    noise : Noise, or Tensor of shape (N, B, *event)
        A source such as Philox(seed), or the standard normals of the N steps.
    first : int
        Index of the first row's path.
    callback : callable (k, x), optional
        Called with the number of the grid point and the state (B, *event) there, k = 0 ... N.

    Returns
    -------
    Tensor, shape (B, *event)

    Raises
    ------
    GridError, ShapeError, ArgumentError, ArgumentTypeError
    NonFiniteError
        With the step after which a sample is no longer finite.
    """
    check_state("x", x, batched=True)
    sde = sampler_sde(denoiser, grid, step, event=tuple(x.shape[1:]), **(options or {}))
    n = len(grid) - 1
    normals = _normals(noise, seed, first, n, x)
    remembers = getattr(sde.step, "remembers", False)
    y = torch.stack((x, torch.zeros_like(x)), 1) if remembers else x
    one = torch.ones((), dtype=torch.float64, device=x.device)
    for k in range(1, n + 1):
        if callback is not None:
            callback(k - 1, y[:, 0] if remembers else y)
        z = normals(k)
        dW = torch.stack((z, torch.zeros_like(z)), 1) if remembers else z
        y = scheme.step(sde, sde.params, one * k, one, y, dW.flatten(1)).to(x.dtype)
        if concrete(y) and not bool(torch.isfinite(y.detach()).all()):
            raise NonFiniteError(
                f"samples become infinite or NaN in step {k} of {n}: look at the network's output there, or take more steps.",
                step=k,
            )
    x = y[:, 0] if remembers else y
    if callback is not None:
        callback(n, x)
    return x


def quiet(x: Tensor, grid, how: dict) -> dict:
    """Arguments of `walk` for a sampler that uses no noise: none is made."""
    if isinstance(x, Tensor):
        how = {**how, "seed": None, "noise": torch.zeros((), dtype=torch.float64).expand(len(grid) - 1, *x.shape)}
    return how


def _normals(noise, seed: int | None, first: int, n: int, x: Tensor) -> Callable[[int], Tensor]:
    """The normals (B, *event) of step k = 1 ... n."""
    if isinstance(noise, Tensor):
        if seed is not None:
            raise ArgumentError("give `seed` or `noise`, not both: the noise is either one.")
        if noise.shape != (n, *x.shape):
            raise ShapeError(
                f"`noise` must hold normals of shape (N, B, *event) = {(n, *x.shape)}, got {describe(noise)}."
            )
        return lambda k: noise[k - 1].to(x)
    source = _source(seed, noise)
    dim = x[0].numel()
    return lambda k: source.normals(first, len(x), k, 1, dim, dtype=x.dtype, device=x.device)[0].reshape(x.shape)


def _source(seed: int | None, noise: Noise | None) -> Noise:
    return Philox(randbits(63)) if seed is None and noise is None else settle(seed, noise)
