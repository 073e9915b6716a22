"""Derivatives of what a sampler brings: d E[r(x_0)] / d theta, as a problem of the core.

    x_0 = sampler(theta, Z),      J(theta) = E[r(x_0)],                                           (1)

theta being any of: parameters of the network ("net.*"), the guidance scale ("guidance"), options of the sampler ("eta", "gamma"),
parameters of the schedule ("beta_max", ...), and x_T ("x_T") where it is given. The problem goes to `sdesens.sensitivity`,
`crosscheck`, `hessian` like any other: pathwise, forward and finite differences for every sampler; the adjoints too for
Euler-Maruyama, whose step is that of an SDE.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdesens.diffusion.attached import networks
from sdesens.diffusion.chain import pack, remembers, sampler_sde, unpack
from sdesens.diffusion.checks import shape_of
from sdesens.diffusion.predict import NET, Predictor
from sdesens.diffusion.steps import Step
from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.problem import Problem, check_state
from sdesens.sde import Params, check_function

Reward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Final:
    """The reward of the last state, as a functional of the path."""

    reward: Reward
    remembers: bool

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        value = self.reward(unpack(ys[-1], self.remembers))
        return value.to(ys.dtype) if isinstance(value, Tensor) and value.dtype == torch.bool else value


@dataclass(frozen=True, eq=False)
class Start:
    """The first state, from the parameter x_T."""

    remembers: bool

    def __call__(self, p: Params) -> Tensor:
        return pack(p["x_T"][None], None, self.remembers)[0]


def check_shared(denoiser: Predictor) -> None:
    """Raise ShapeError for a condition of one row each: paths are many, and share it."""
    for cond in (network.cond for network in networks(denoiser)):
        if cond is not None and cond.dim():
            raise ShapeError(
                f"`denoiser` has a condition of shape {tuple(cond.shape)}: all samples of a problem share one, give a 0-dim tensor."
            )


def sampler_problem(
    denoiser: Predictor,
    grid,
    reward: Reward,
    *,
    step: Step | None = None,
    x: Tensor | None = None,
    event: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options,
) -> Problem:
    """E[r(x_0)] of a sampler, equation (1), as a `Problem`.

    Parameters
    ----------
    denoiser : Predictor
        A condition must be one that all samples share.
    grid : Tensor or sequence, shape (N + 1,)
        Falling times. For the adjoint methods it must end above t = 0.
    reward : callable x (B, *event) -> (B,)
    step : callable, optional
        `ddim_step`, `heun_step`, `dpmpp_2m_step` or your own; Euler-Maruyama if left out.
    x : Tensor, shape `event`, optional
        x_T, the same for all paths; a parameter, called "x_T". If left out x_T is drawn from the prior, as step 0 of
        the noise, and `event` is needed.
    event : tuple of int, optional
        Shape of one sample.
    dtype, device : optional
        Of the samples, if x is left out. Those of the network's weights by default; float64 on the CPU if it has none.
    **options
        Of the step: eta=..., gamma=...; parameters too.

    Returns
    -------
    Problem
        Its functional sees the state; its own time counts steps ("t1" has no meaning). With the same seed and dtype, path i is
        row i of the sampler function that starts from `prior(...)`.

    Raises
    ------
    GridError, ShapeError, ArgumentError, ArgumentTypeError

    Example
    -------
    >>> from sdesens import sensitivity
    >>> from sdesens.diffusion import VP, Denoiser, uniform_grid
    >>> denoiser = Denoiser(lambda x, t, p: p["w"] * x, VP(), "x0", parameters={"w": torch.tensor(0.5, dtype=torch.float64)})
    >>> problem = sampler_problem(denoiser, uniform_grid(VP(), 10), lambda x: x[:, 0] ** 2, event=(1,))
    >>> result = sensitivity(problem, n_paths=100, wrt=("net.w", "eta", "beta_max"))
    >>> sorted(result.gradient)
    ['beta_max', 'eta', 'net.w']
    """
    check_function("reward", reward, ("x",))
    check_shared(denoiser)
    if (x is None) == (event is None):
        raise ArgumentError(
            "give `x`, the state at grid[0], or `event`, the shape of a sample, to start from the prior."
        )
    if x is not None:
        check_state("x", x)
    if "start" in options:
        raise ArgumentTypeError(
            "`start` is no option of a step: give `x`, or make the problem of `sampler_sde` yourself."
        )
    sde = sampler_sde(denoiser, grid, step, start=None if x is None else 0.0, **options)
    remembering = remembers(sde)
    y0: Tensor | Callable
    if x is None:
        weights = (v for k, v in denoiser.params.items() if k.startswith(NET))
        beside = next(weights, torch.zeros((), dtype=torch.float64))
        zeros = torch.zeros(1, *shape_of("event", event), dtype=dtype or beside.dtype, device=device or beside.device)
        y0 = pack(zeros, None, remembering)[0]
    else:
        if "x_T" in sde.params:
            raise ArgumentError("the denoiser has a parameter called 'x_T', the name of the start: rename it.")
        sde, y0 = replace(sde, params={**sde.params, "x_T": x}), Start(remembering)
    # the time 1 must lie on any grid that the problem is refined to: the starting noise is drawn in whole steps
    return Problem(sde, Final(reward, remembering), y0, (0.0, 1.0, float(len(grid))), len(grid))
