"""A step folded over a grid of times: what all samplers are.

It runs `sampler_sde` by the core's own step, without an integrator of its own.
"""

from collections.abc import Callable
from functools import lru_cache
from secrets import randbits

import torch
from torch import Tensor

from sdesens.diffusion.chain import pack, remembers, sampler_sde, unpack
from sdesens.diffusion.checks import whole
from sdesens.diffusion.predict import Predictor
from sdesens.diffusion.steps import Step
from sdesens.diffusion.values import bad_rows
from sdesens.errors import ArgumentError, NonFiniteError, ShapeError
from sdesens.integrate import scheme
from sdesens.noise import Noise, Philox, settle
from sdesens.problem import check_state
from sdesens.tensors import concrete, describe

Callback = Callable[[int, Tensor], None]
BLOCK, NUMBERS = 16, 2**22  # how many steps' noise is made at once, and how many numbers at most


def walk(
    denoiser: Predictor,
    x: Tensor,
    grid,
    step: Step | None = None,
    options: dict | None = None,
    draws: bool = True,
    *,
    seed: int | None = None,
    noise: Noise | Tensor | None = None,
    first_path: int = 0,
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
    draws : bool
        Whether the step uses noise; if not, none is made.
    seed : int, optional
        Of the Philox noise; a fresh one if `noise` is left out too.
    noise : Noise, or Tensor of shape (N, B, *event)
        A source such as Philox(seed), or the standard normals of the N steps.
    first_path : int
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
        With the step after which a sample is no longer finite, and the samples.

    Example
    -------
    >>> from sdesens.diffusion import VP, GaussianMixture, prior, uniform_grid
    >>> ring = GaussianMixture.ring().denoiser(VP())
    >>> seen = []
    >>> x = walk(ring, prior(VP(), 4, (2,), seed=1), uniform_grid(VP(), 9), seed=1, callback=lambda k, x: seen.append(x))
    >>> torch.stack(seen).shape
    torch.Size([10, 4, 2])
    """
    check_state("x", x, batched=True)
    sde = sampler_sde(denoiser, grid, step, **(options or {}))
    n, remembering = len(grid) - 1, remembers(sde)
    normals = _normals(noise, seed, first_path, n, x, draws)
    y = pack(x, None, remembering)
    one = torch.ones((), dtype=torch.float64)  # time is told on the CPU, see Schedule.time
    failed = torch.zeros((), dtype=torch.int64, device=x.device)
    for k in range(1, n + 1):
        if callback is not None:
            callback(k - 1, unpack(y, remembering))
        dW = pack(normals(k), None, remembering).flatten(1)
        y = scheme.step(sde, sde.params, one * k, one, y, dW).to(x.dtype)
        failed = torch.where((failed == 0) & ~torch.isfinite(y.detach()).all(), k, failed)
    x = unpack(y, remembering)
    if concrete(failed) and failed.item():
        bad = bad_rows(x)
        raise NonFiniteError(
            f"{len(bad)} of {len(x)} samples become infinite or NaN, the first in step {failed.item()} of {n}: look at the network's output "
            "there, or take more steps.",
            paths=tuple(bad[:5]),
            n_bad=len(bad),
            step=int(failed),
        )
    if callback is not None:
        callback(n, x)
    return x


def _normals(noise, seed: int | None, first_path: int, n: int, x: Tensor, draws: bool) -> Callable[[int], Tensor]:
    """The normals (B, *event) of step k = 1 ... n."""
    if isinstance(noise, Tensor):
        if seed is not None:
            raise ArgumentError("give `seed` or `noise`, not both: the noise is either one.")
        if noise.shape != (n, *x.shape):
            raise ShapeError(
                f"`noise` must hold normals of shape (N, B, *event) = {(n, *x.shape)}, got {describe(noise)}: one for each step and entry."
            )
        return lambda k: noise[k - 1].to(x)
    source, dim = fresh_source(seed, noise), x[0].numel()
    whole("first_path", first_path, 0, hint="it is the index of the first row")
    if not draws:
        return lambda k: torch.zeros_like(x)
    size = max(1, min(BLOCK, NUMBERS // max(1, x.numel())))

    @lru_cache(maxsize=1)
    def block(b: int) -> Tensor:
        count = min(size, n - b * size)
        return source.normals(first_path, len(x), 1 + b * size, count, dim, dtype=x.dtype, device=x.device)

    return lambda k: block((k - 1) // size)[(k - 1) % size].reshape(x.shape)


def fresh_source(seed: int | None, noise: Noise | None) -> Noise:
    """The source given, or Philox of the seed, or of a fresh one."""
    return Philox(randbits(63)) if seed is None and noise is None else settle(seed, noise)
