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

from sdesens.diffusion.equations import Backwards, check_eta, require_finite
from sdesens.diffusion.grids import check_grid
from sdesens.diffusion.predict import Predictor, check_predictor
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.steps import Span, Step, ddim_step
from sdesens.diffusion.values import like
from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.sde import SDE, Params, check_parameter
from sdesens.tensors import concrete

START = 1 - 1e-9  # times below this draw the starting noise


@dataclass(frozen=True, eq=False)
class GridClock:
    """The model's time, and the speed |dt/ds|, on a grid: s = k + 1 is grid[k], straight lines between."""

    grid: Tensor

    def __call__(self, s: Tensor) -> tuple[Tensor, Tensor]:
        grid = self.grid.to(s.device)
        at = (s.to(torch.float64) - 1).clamp(0, len(grid) - 1)
        k = (at.detach() + 1e-9).floor().long().clamp_max(len(grid) - 2)
        slope = grid[k + 1] - grid[k]
        return grid[k] + (at - k) * slope, -slope


@dataclass(frozen=True, eq=False)
class Starting:
    """Coefficients on a grid clock, after a first unit of time in which the starting noise is drawn."""

    after: Backwards
    std: Tensor
    remembers: bool = False

    def drift(self, t: Tensor, y: Tensor, p: Params) -> Tensor:
        """Nothing, then that of the reverse SDE."""
        return self._pieces(t, y, p, torch.zeros_like, self.after.drift)

    def diffusion(self, t: Tensor, y: Tensor, p: Params) -> Tensor:
        """The standard deviation of the starting noise, then eta g."""
        return self._pieces(t, y, p, lambda x: like(self.std, x).expand_as(x), self.after.diffusion)

    def _pieces(self, t: Tensor, y: Tensor, p: Params, first: Callable, then: Callable) -> Tensor:
        x = y[:, 0] if self.remembers else y
        if concrete(t):
            out = first(x) if float(t) < START else then(t, x, p)
        else:
            out = torch.where(t < START, first(x), then(t, x, p))
        return torch.stack((out, torch.zeros_like(out)), 1) if self.remembers else out


@dataclass(frozen=True, eq=False)
class Chain:
    """Equation (1) as the `step` of an SDE."""

    step: Step
    denoiser: Predictor
    clock: GridClock
    std: Tensor
    options: tuple[str, ...]
    remembers: bool

    def __call__(self, sde: SDE, p: Params, t: Tensor, dt: Tensor, y: Tensor, dW: Tensor) -> Tensor:
        dW = dW.reshape(y.shape)
        if concrete(t):
            return self._start(y, dW) if float(t) < START else self._move(p, t, dt, y, dW)
        return torch.where(t < START, self._start(y, dW), self._move(p, t, dt, y, dW))

    def _start(self, y: Tensor, dW: Tensor) -> Tensor:
        fresh = y + like(self.std, y) * dW
        return torch.stack((fresh[:, 0], torch.zeros_like(y[:, 1])), 1) if self.remembers else fresh

    def _move(self, p: Params, t: Tensor, dt: Tensor, y: Tensor, dW: Tensor) -> Tensor:
        before, here, there = (self.clock(s)[0] for s in (torch.clamp(t - dt, min=1.0), t, t + dt))
        x, memory = (y[:, 0], y[:, 1]) if self.remembers else (y, None)
        z = (dW[:, 0] if self.remembers else dW) / dt.sqrt()
        options = {name: p[name] for name in self.options}
        x, memory = self.step(self.denoiser.with_params(p), x, Span(before, here, there), z, memory, **options)
        return x if memory is None else torch.stack((x, memory), 1)


def sampler_sde(
    denoiser: Predictor, grid, step: Step | None = None, *, start: Tensor | None = None, event=(1,), **options
) -> SDE:
    """A sampler as an SDE of the core, equation (1); solve it on times 0 ... N + 1 with unit steps.

    Parameters
    ----------
    denoiser : Predictor
    grid : Tensor or sequence, shape (N + 1,)
        Falling times, from noise to data.
    step : callable, optional
        `ddim_step`, `heun_step`, `dpmpp_2m_step` or your own (`sdesens.diffusion.steps`). Euler-Maruyama if left out.
    start : 0-dim Tensor, optional
        Standard deviation of the starting noise; that of the schedule's prior if left out.
    event : tuple of int
        Shape of one sample: a step is tried on one, with a predictor that sees nothing, to learn whether it remembers.
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
    """
    check_predictor("denoiser", denoiser)
    schedule = denoiser.schedule
    grid = check_grid(schedule, grid)
    std = schedule.prior_std.detach() if start is None else start
    if step is None:
        options = {"eta": 1.0, **options}
    tensors = {name: check_option(name, value) for name, value in options.items()}
    eta = tensors.get("eta", torch.zeros((), dtype=torch.float64))
    check_eta(eta)
    if step is None and set(tensors) != {"eta"}:
        raise ArgumentError(f"Euler-Maruyama has no option {sorted(set(tensors) - {'eta'})}: its only one is `eta`.")
    if step is ddim_step and concrete(eta) and eta.item() > 1:
        raise ArgumentError(
            f"`eta` must lie in [0, 1] for DDIM, got {eta.item():g}: 1 is ancestral sampling, 0 deterministic."
        )
    if step is None and not (concrete(eta) and eta.item() == 0):
        require_finite(schedule, float(grid[0]), eta)
    clock = GridClock(grid)
    params = {**denoiser.params, **tensors}
    if step is None:
        plain = Starting(Backwards(denoiser, clock), std)
        return SDE(plain.drift, plain.diffusion, params)
    check_options(step, tensors)
    remembers = _remembers(step, schedule, grid, event, options)
    stated = Starting(Backwards(denoiser, clock), std, remembers)
    chain = Chain(step, denoiser, clock, std, tuple(tensors), remembers)
    return SDE(stated.drift, stated.diffusion, params, step=chain)


def check_option(name: str, value) -> Tensor:
    """A number or 0-dim tensor as a parameter."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise ArgumentTypeError(f"`{name}` must be a number or a 0-dim tensor, got {value!r}.")
    value = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    check_parameter(name, value)
    if value.dim():
        raise ShapeError(f"`{name}` must be one number, got shape {tuple(value.shape)}.")
    return value


def check_options(step: Step, options: dict[str, Tensor]) -> None:
    """Raise ArgumentTypeError unless the step takes these options."""
    try:
        inspect.signature(step).bind("denoiser", "x", "span", "z", "memory", **options)
    except TypeError as error:
        raise ArgumentTypeError(
            f"`step` must be a function of (denoiser, x, span, z, memory, **options) that takes {', '.join(options) or 'no options'}: {error}."
        ) from error


@dataclass(frozen=True, eq=False)
class _Blank(Predictor):
    """A predictor that sees nothing, and costs nothing."""

    schedule: Schedule

    @property
    def params(self):
        return {}

    def with_params(self, p):
        return self

    def pair(self, x, t):
        return torch.zeros_like(x), torch.zeros_like(x)


def _remembers(
    step: Step, schedule: Schedule, grid: Tensor, event: tuple[int, ...], options: dict[str, Tensor]
) -> bool:
    """Whether a step carries something over to the next, tried on one blank sample; no network is called."""
    x = torch.zeros(1, *event, dtype=torch.float64)
    with torch.no_grad():
        x_u, memory = step(_Blank(schedule), x, Span(grid[0], grid[0], grid[1]), x, None, **options)
    for name, found in (("x_u", x_u), ("memory", memory)):
        if not (found is None and name == "memory") and getattr(found, "shape", None) != x.shape:
            raise ShapeError(
                f"`step` must return (x_u, memory), each of the shape of x, {tuple(x.shape)}, memory perhaps None, got {name} "
                f"{found!r:.60}."
            )
    return memory is not None
