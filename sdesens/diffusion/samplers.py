"""Samplers: from noise to data along an explicit grid of times.

Each is one step (`steps.py`; Euler-Maruyama is the core's), folded over the grid. They are ordinary functions of the predictor's
parameters, their options, the start and the noise: differentiable, and nothing is clipped. Hidden `no_grad` there is none: put
the call under torch.no_grad() to sample only. For derivatives of expectations with error bars, `sampler_problem`.

Noise is an argument. Row i has the noise of path `first_path + i` of the source, whatever the batch; step k of the source is used
from grid[k-1] to grid[k], and its step 0 is the starting noise (`prior`).
"""

import torch
from torch import Tensor

from sdesens.diffusion.checks import number, shape_of, whole
from sdesens.diffusion.grids import check_grid
from sdesens.diffusion.predict import Predictor, check_predictor
from sdesens.diffusion.schedule import Schedule, check_schedule
from sdesens.diffusion.steps import ddim_step, dpmpp_2m_step, heun_step
from sdesens.diffusion.values import like
from sdesens.diffusion.walk import Callback, fresh_source, walk
from sdesens.noise import Noise


def prior(
    schedule: Schedule,
    n: int,
    event: tuple[int, ...],
    *,
    seed: int | None = None,
    noise: Noise | None = None,
    first_path: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """x_T ~ N(0, prior_std^2 I), shape (n, *event): step 0 of the noise.

    Parameters
    ----------
    n : int
    event : tuple of int
        Shape of one sample.
    seed, noise : int or Noise
        Give one: the source of the sampler that goes on from here. A fresh seed if both are left out.
    first_path : int
        Index of the first row's path.
    dtype, device
        Of the result; float32, as networks are.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> prior(VP(), 4, (3,), seed=1).shape
    torch.Size([4, 3])
    """
    check_schedule("schedule", schedule)
    event, source = shape_of("event", event), fresh_source(seed, noise)
    whole("first_path", first_path, 0, hint="it is the index of the first row")
    n, dim = whole("n", n, hint="it is a number of samples"), torch.Size(event).numel()
    z = source.normals(first_path, n, 0, 1, dim, dtype=dtype, device=torch.device(device))[0]
    return z.reshape(n, *event) * like(schedule.prior_std, z)


def ddim(
    denoiser: Predictor,
    x: Tensor,
    grid,
    *,
    eta: float | Tensor = 0.0,
    seed: int | None = None,
    noise: Noise | Tensor | None = None,
    first_path: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM, from eta = 0, deterministic, to eta = 1, ancestral sampling: equation (1) of `steps.py`. Order 1.

    Parameters
    ----------
    denoiser : Predictor
    x : Tensor, shape (B, *event)
        The state at grid[0]: `prior(...)`.
    grid : Tensor or sequence, shape (N + 1,)
        Falling times (`grids.py`); it may end at 0.
    eta : number or 0-dim Tensor in [0, 1]
    seed, noise, first_path, callback
        As of `walk`.

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
    return walk(
        denoiser,
        x,
        grid,
        ddim_step,
        {"eta": eta},
        _draws(eta),
        seed=seed,
        noise=noise,
        first_path=first_path,
        callback=callback,
    )


def ancestral(
    denoiser: Predictor,
    x: Tensor,
    grid,
    *,
    seed: int | None = None,
    noise: Noise | Tensor | None = None,
    first_path: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling of DDPM (J. Ho et al., 2006.11239), x_u ~ q(x_u | x_t, x_0 estimate): `ddim` with eta = 1.

    Example
    -------
    >>> from sdesens.diffusion import VP, GaussianMixture, uniform_grid
    >>> ring = GaussianMixture.ring().denoiser(VP())
    >>> x = ancestral(ring, prior(VP(), 4, (2,), seed=1), uniform_grid(VP(), 100), seed=1)
    >>> bool(((x.norm(dim=1) - 2).abs() < 1).all())
    True
    """
    options = {"eta": 1.0}
    return walk(denoiser, x, grid, ddim_step, options, seed=seed, noise=noise, first_path=first_path, callback=callback)


def euler_maruyama(
    denoiser: Predictor,
    x: Tensor,
    grid,
    *,
    eta: float | Tensor = 1.0,
    seed: int | None = None,
    noise: Noise | Tensor | None = None,
    first_path: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """The core's Euler-Maruyama on `as_sde(denoiser, eta, reverse=True)`. Weak order 1.

    eta = 0 is Euler's method for the probability-flow ODE, 1 the reverse SDE; more is allowed. With noise, some signal must be left
    at grid[0]. Other arguments as of `ddim`.

    Example
    -------
    >>> from sdesens.diffusion import VP, GaussianMixture, uniform_grid
    >>> ring = GaussianMixture.ring().denoiser(VP())
    >>> x = euler_maruyama(ring, prior(VP(), 4, (2,), seed=1), uniform_grid(VP(), 100), seed=1)
    >>> x.shape
    torch.Size([4, 2])
    """
    return walk(
        denoiser,
        x,
        grid,
        None,
        {"eta": eta},
        _draws(eta),
        seed=seed,
        noise=noise,
        first_path=first_path,
        callback=callback,
    )


def heun(
    denoiser: Predictor,
    x: Tensor,
    grid,
    *,
    churn: float = 0.0,
    noise_scale: float = 1.0,
    seed: int | None = None,
    noise: Noise | Tensor | None = None,
    first_path: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method of T. Karras et al. (2206.00364), with churn: equations (2) and (3) of `steps.py`. Order 2.

    2N - 1 evaluations for N steps to t = 0, the last of which is Euler's.

    Parameters
    ----------
    churn : float, >= 0
        Their S_churn: gamma = min(churn / N, sqrt(2) - 1) at every step. 0 is deterministic.
    noise_scale : float, >= 0
        Their S_noise.

    Other arguments as of `ddim`. The schedule must have some signal at grid[0].

    Example
    -------
    >>> from sdesens.diffusion import EDM, GaussianMixture, edm_grid
    >>> ring = GaussianMixture.ring().denoiser(EDM())
    >>> x = heun(ring, prior(EDM(), 4, (2,), seed=1), edm_grid(EDM(), 18))
    >>> bool(((x.norm(dim=1) - 2).abs() < 1).all())
    True
    """
    churn = number("churn", churn, 0.0, ends=True, hint="0 adds no noise")
    noise_scale = number("noise_scale", noise_scale, 0.0, ends=True, hint="1 is usual")
    check_predictor("denoiser", denoiser)
    grid = check_grid(denoiser.schedule, grid)
    gamma = min(churn / (len(grid) - 1), 2**0.5 - 1)
    options = {"gamma": gamma, "noise_scale": noise_scale} if churn else {}
    return walk(
        denoiser,
        x,
        grid,
        heun_step,
        options,
        churn > 0,
        seed=seed,
        noise=noise,
        first_path=first_path,
        callback=callback,
    )


def dpmpp_2m(
    denoiser: Predictor,
    x: Tensor,
    grid,
    *,
    seed: int | None = None,
    noise: Noise | Tensor | None = None,
    first_path: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) of C. Lu et al. (2211.01095): equation (4) of `steps.py`. Order 2, one evaluation a step; best on a log-SNR grid.

    Arguments as of `ddim`; noise is taken, as by the others, and not used.

    Example
    -------
    >>> from sdesens.diffusion import VP, GaussianMixture, log_snr_grid
    >>> ring = GaussianMixture.ring().denoiser(VP())
    >>> x = dpmpp_2m(ring, prior(VP(), 4, (2,), seed=1), log_snr_grid(VP(), 20))
    >>> bool(((x.norm(dim=1) - 2).abs() < 1).all())
    True
    """
    return walk(
        denoiser, x, grid, dpmpp_2m_step, {}, False, seed=seed, noise=noise, first_path=first_path, callback=callback
    )


def _draws(eta) -> bool:
    """Whether a sampler with this eta uses noise."""
    return isinstance(eta, Tensor) or eta != 0
