"""A sampler on its grid as one SDE of the core: what the core can run, it can differentiate.

The SDE's own time counts steps. From 0 to 1 the starting noise is drawn, and from k to k + 1 the sampler steps from grid[k - 1]
to grid[k], so that N steps take times 0 ... N + 1:

    y_1 = y_0 + std Z_0,      y_{k+1} = step(y_k; grid[k-1] -> grid[k], Z_k).                      (1)

With y_0 = 0 and std that of the prior, x_T is part of the noise; with std = 0, y_0 is x_T. Euler-Maruyama is the core's own, on the
reverse SDE with the grid for a clock; other samplers bring their step. Between grid points the clock goes straight, so that half
steps make sense. A step that remembers makes the state (2, *event): x, and what it remembers.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdesens.diffusion.checks import parameter
from sdesens.diffusion.equations import Backwards, check_eta, require_finite
from sdesens.diffusion.grids import check_grid
from sdesens.diffusion.predict import Predictor, check_predictor
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.steps import Span, Step, ddim_step, heun_step
from sdesens.diffusion.values import like
from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.sde import SDE, Params
from sdesens.tensors import concrete

START = 1 - 1e-9  # times below this draw the starting noise


@dataclass(frozen=True, eq=False)
class GridClock:
    """The model's time, and the speed |dt/ds|, on a grid: s = k + 1 is grid[k], straight lines between."""

    grid: Tensor

    def __call__(self, s: Tensor) -> tuple[Tensor, Tensor]:
        at = (s.to("cpu", torch.float64) - 1).clamp(0, len(self.grid) - 1)
        k = (at.detach() + 1e-9).floor().long().clamp_max(len(self.grid) - 2)
        slope = self.grid[k + 1] - self.grid[k]
        return self.grid[k] + (at - k) * slope, -slope


@dataclass(frozen=True, eq=False)
class Beginning:
    """The standard deviation of the starting noise: given, or that of the schedule's prior."""

    schedule: Schedule
    std: Tensor | None

    def __call__(self, p: Params, x: Tensor) -> Tensor:
        std = self.schedule.with_params(p).prior_std if self.std is None else self.std
        return like(std, x).expand_as(x)


@dataclass(frozen=True, eq=False)
class Starting:
    """Coefficients on a grid clock, after a first unit of time in which the starting noise is drawn."""

    after: Backwards
    beginning: Beginning

    def drift(self, t: Tensor, x: Tensor, p: Params) -> Tensor:
        """Nothing, then that of the reverse SDE."""
        return first_or(t, lambda: torch.zeros_like(x), lambda: self.after.drift(t, x, p))

    def diffusion(self, t: Tensor, x: Tensor, p: Params) -> Tensor:
        """The standard deviation of the starting noise, then eta g."""
        return first_or(t, lambda: self.beginning(p, x), lambda: self.after.diffusion(t, x, p))


@dataclass(frozen=True, eq=False)
class Standing:
    """Coefficients of a chain that moves by its step alone: they only say how many Brownian motions there are."""

    beginning: Beginning

    def drift(self, t: Tensor, y: Tensor, p: Params) -> Tensor:
        """Nothing."""
        return torch.zeros_like(y)

    def diffusion(self, t: Tensor, y: Tensor, p: Params) -> Tensor:
        """The standard deviation of the starting noise."""
        return self.beginning(p, y)


@dataclass(frozen=True, eq=False)
class Chain:
    """Equation (1) as the `step` of an SDE."""

    step: Step
    denoiser: Predictor
    clock: GridClock
    beginning: Beginning
    options: tuple[str, ...]
    remembers: bool

    def __call__(self, sde: SDE, p: Params, t: Tensor, dt: Tensor, y: Tensor, dW: Tensor) -> Tensor:
        x, z = unpack(y, self.remembers), unpack(dW.reshape(y.shape), self.remembers)

        def start() -> Tensor:
            return pack(x + self.beginning(p, x) * z, None, self.remembers)

        def move() -> Tensor:
            now = torch.clamp(
                t, min=1.0
            )  # where this branch is not taken it is a step all the same, with finite derivatives
            times = (self.clock(s)[0] for s in (torch.clamp(now - dt, min=1.0), now, now + dt))
            first = concrete(now) and now.item() == 1  # under a transform nobody knows, and the memory is zeros
            memory, options = (
                y[:, 1] if self.remembers and not first else None,
                {name: p[name] for name in self.options},
            )
            found = self.step(self.denoiser.with_params(p), x, Span(*times), z / dt.sqrt(), memory, **options)
            return pack(*check_step(found, x, self.remembers), self.remembers)

        return first_or(t, start, move)


def first_or(t: Tensor, start: Callable[[], Tensor], move: Callable[[], Tensor]) -> Tensor:
    """What holds while the starting noise is drawn, or after."""
    if concrete(t):
        return start() if t.item() < START else move()
    return torch.where(t < START, start(), move())


def remembers(sde: SDE) -> bool:
    """Whether the states of a sampler's SDE hold a memory beside x."""
    return isinstance(sde.step, Chain) and sde.step.remembers


def pack(x: Tensor, memory: Tensor | None, remembering: bool) -> Tensor:
    """The chain's state: x, or x and what is remembered, (B, 2, *event)."""
    return torch.stack((x, torch.zeros_like(x) if memory is None else memory), 1) if remembering else x


def unpack(y: Tensor, remembering: bool) -> Tensor:
    """x of the chain's state."""
    return y[:, 0] if remembering else y


def check_step(found, x: Tensor, remembering: bool) -> tuple[Tensor, Tensor | None]:
    """What a step returned; raise ShapeError unless it is (x_u, memory) as promised."""
    fits = isinstance(found, tuple) and len(found) == 2 and getattr(found[0], "shape", None) == x.shape
    if not fits or getattr(found[1], "shape", None) != (x.shape if remembering else None):
        raise ShapeError(
            f"`step` must return (x_u, memory), x_u of the shape of x, {tuple(x.shape)}, and memory None, or like x if step.remembers "
            f"is True; got {found!r:.80}."
        )
    return found


def sampler_sde(
    denoiser: Predictor, grid, step: Step | None = None, *, start: float | Tensor | None = None, **options
) -> SDE:
    """A sampler as an SDE of the core, equation (1); solve it on times 0 ... N + 1 with unit steps.

    Parameters
    ----------
    denoiser : Predictor
    grid : Tensor or sequence, shape (N + 1,)
        Falling times, from noise to data.
    step : callable, optional
        `ddim_step`, `heun_step`, `dpmpp_2m_step` or your own (`sdesens.diffusion.steps`). Euler-Maruyama if left out.
    start : number or 0-dim Tensor, optional
        Standard deviation of the starting noise; that of the schedule's prior if left out, and then it moves with the
        schedule's parameters.
    **options
        Of the step, "eta" (1) of Euler-Maruyama: numbers or 0-dim tensors. They are parameters of the SDE, beside those
        of the denoiser.

    Returns
    -------
    SDE
        For states (B, *event), or (B, 2, *event) if the step remembers.

    Raises
    ------
    GridError, ShapeError, ArgumentError, ArgumentTypeError

    Example
    -------
    >>> from sdesens import sdeint
    >>> from sdesens.diffusion import VP, Denoiser, ddim_step
    >>> denoiser = Denoiser(lambda x, t: 0 * x, VP(), "x0")
    >>> sde = sampler_sde(denoiser, (1.0, 0.5, 0.1), ddim_step, eta=0.5)
    >>> sdeint(sde, torch.zeros(4, 2), (0.0, 3.0), n_steps=3, seed=1).shape
    torch.Size([2, 4, 2])
    """
    check_predictor("denoiser", denoiser)
    schedule = denoiser.schedule
    grid = check_grid(schedule, grid)
    if step is None:
        options = {"eta": 1.0, **options}
    tensors = {name: parameter(name, value) for name, value in options.items()}
    check_options(denoiser, step, tensors)
    clock = GridClock(grid)
    beginning = Beginning(schedule, None if start is None else parameter("start", start))
    params = {**denoiser.params, **tensors}
    if step is None:
        require_finite(schedule, float(grid[0]), tensors["eta"])
        plain = Starting(Backwards(denoiser, clock), beginning)
        return SDE(plain.drift, plain.diffusion, params, piecewise=True)
    standing = Standing(beginning)
    chain = Chain(step, denoiser, clock, beginning, tuple(tensors), bool(getattr(step, "remembers", False)))
    return SDE(standing.drift, standing.diffusion, params, step=chain)


def check_options(denoiser: Predictor, step: Step | None, options: dict[str, Tensor]) -> None:
    """Raise unless the step takes these options, with values that make sense, and no parameter has one's name."""
    if clash := denoiser.params.keys() & options.keys():
        raise ArgumentError(
            f"the sampler and the denoiser both have a parameter called {min(clash)!r}: rename the denoiser's, or its schedule's."
        )
    if "eta" in options:
        eta = check_eta(options["eta"])
        if step is ddim_step and concrete(eta) and eta.item() > 1:
            raise ArgumentError(
                f"`eta` must lie in [0, 1] for DDIM, got {eta.item():g}: 1 is ancestral sampling, 0 deterministic."
            )
    for name in {"gamma", "noise_scale"} & options.keys() if step is heun_step else ():
        if concrete(options[name]) and options[name].item() < 0:
            raise ArgumentError(f"`{name}` must be >= 0, got {options[name].item():g}: 0 adds no noise.")
    if step is None:
        if unknown := options.keys() - {"eta"}:
            raise ArgumentError(f"Euler-Maruyama has no option {min(unknown)!r}: its only one is `eta`.")
        return
    try:
        inspect.signature(step).bind("denoiser", "x", "span", "z", "memory", **options)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(
            f"`step` must be a function of (denoiser, x, span, z, memory) and of its options, {', '.join(options) or 'none here'}: {error}. A "
            "sampler such as ddim is no step; its step is ddim_step."
        ) from error
