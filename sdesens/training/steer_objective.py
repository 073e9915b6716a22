"""What steering maximises: the reward of the samples less what the control costs, on the steps of a sampler.

With x' the state after a step from x, m_base the mean that the base's Euler-Maruyama has for it, v = h eta^2 g^2 the step's variance,
and u the control that turns the base's chain into the tuned one,

    w = (x' - m_base)/sqrt(v) = U + z,     U = sqrt(h) u,     u = (1 + eta^2)/(2 eta) g (s - s_base),                       (1)
    L = log dP/dP_base = sum over steps of U.w - |U|^2/2,                                                           (2)
    J = E[r(x_0) - L] = E[r(x_0)] - E[1/2 sum |U|^2].                                                               (3)

J is largest where P ~ P_base e^r, and is then log E_base[e^r]. So x_0 gets the law p* ~ p e^r, if it has forgotten its start.

In L the network is held: its weights theta' = theta are not differentiated, which leaves the gradient of (3) as it is since d log P
has mean 0. Then r - L is the same number on every path at the optimum, and the likelihood ratio's gradient

    dJ/dtheta = E[(r - L - b) sum over steps of z.dU/dtheta],     b any number,                                     (4)

has no variance there. It needs no derivative of the reward, nor of x_0 along the path. That matters where the data have modes far
apart: x_0 is then nearly a jump of the noise, which derivatives along the path see on few paths only, if at all.

References: C. Domingo-Enrich et al., 2409.08861, control of samplers; R. Williams, Machine Learning 8 (1992) 229 for (4);
G. Roeder et al., NeurIPS 2017, arXiv 1703.09194, the held network.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdesens.diffusion.chain import sampler_sde
from sdesens.diffusion.checks import number, shape_of, whole
from sdesens.diffusion.equations import velocity
from sdesens.diffusion.grids import check_grid
from sdesens.diffusion.predict import NET, Predictor, check_predictor
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.values import like
from sdesens.diffusion.walk import Callback, walk
from sdesens.errors import ArgumentError, GridError, ShapeError
from sdesens.noise import Noise
from sdesens.problem import Problem
from sdesens.sde import Params
from sdesens.tensors import describe

Reward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LinearReward:
    """r(x) = a.x, the reward for which p e^r of a Gaussian or a mixture is known: `law.tilt(a)`.

    Parameters
    ----------
    slopes : Tensor or sequence of numbers, of the shape of one sample
        a.

    Example
    -------
    >>> LinearReward([0.5, 0.25])(torch.tensor([[1.0, 2.0]]))
    tensor([1.])
    """

    slopes: Tensor

    def __post_init__(self):
        object.__setattr__(self, "slopes", torch.as_tensor(self.slopes, dtype=torch.float64))

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.slopes.shape:
            raise ShapeError(
                f"`slopes` must have the shape of one sample, {tuple(x.shape[1:])}, got {tuple(self.slopes.shape)}: one an entry."
            )
        return (x * self.slopes.to(x)).flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class Sampling:
    """How samples are made: by Euler-Maruyama on the reverse SDE, from Gaussian noise.

    Parameters
    ----------
    grid : Tensor or sequence, shape (N + 1,)
        Falling times, such as `steering_grid`.
    event : tuple of int
        Shape of one sample.
    eta : float, > 0
        With 1 a sample forgets its start; with less it remembers a part (`remembered`).
    start : float, optional
        Standard deviation of the start; that of the schedule's prior if left out. For a grid that does not start at the schedule's
        end, sqrt(alpha^2 data_std^2 + sigma^2) there.

    Raises
    ------
    ArgumentTypeError, ArgumentError

    Example
    -------
    >>> from sdesens.diffusion import VP, Gaussian, uniform_grid
    >>> from sdesens.noise import Philox
    >>> base = Gaussian(torch.zeros(2), torch.ones(2)).denoiser(VP())
    >>> Sampling(uniform_grid(VP(), 20), (2,)).draw(base, 5, Philox(1)).shape
    torch.Size([5, 2])
    """

    grid: Tensor
    event: tuple[int, ...]
    eta: float = 1.0
    start: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "event", shape_of("event", self.event))
        number("eta", self.eta, 0.0, hint="without noise there is nothing to control, 1 is usual")
        if self.start is not None:
            number("start", self.start, 0.0, hint="it is the standard deviation of the start")

    def begin(self, denoiser: Predictor, n: int, noise: Noise, first_path: int = 0) -> Tensor:
        """Starts (n, *event), step 0 of the noise, in the dtype of the network's weights (float64 if it has none)."""
        beside, dim = weight_of(denoiser), math.prod(self.event)
        z = noise.normals(first_path, n, 0, 1, dim, dtype=beside.dtype, device=beside.device)[0]
        std = denoiser.schedule.prior_std if self.start is None else torch.tensor(self.start, dtype=torch.float64)
        return z.reshape(n, *self.event) * like(std.detach(), z)

    def draw(
        self, denoiser: Predictor, n: int, noise: Noise, first_path: int = 0, callback: Callback | None = None
    ) -> Tensor:
        """Samples (n, *event) without gradients; row i has the noise of path first_path + i."""
        return self.go_on(denoiser, self.begin(denoiser, n, noise, first_path), noise, first_path, callback)

    def go_on(
        self, denoiser: Predictor, x: Tensor, noise: Noise, first_path: int = 0, callback: Callback | None = None
    ) -> Tensor:
        """Samples without gradients, from starts x (n, *event)."""
        with torch.no_grad():
            return walk(
                denoiser,
                x,
                self.grid,
                options={"eta": self.eta},
                noise=noise,
                first_path=first_path,
                callback=callback,
            )

    def path(self, denoiser: Predictor, n: int, noise: Noise, first_path: int = 0) -> Tensor:
        """States (N + 1, n, *event) at all grid points, without gradients."""
        states: list[Tensor] = []
        self.draw(denoiser, n, noise, first_path, lambda k, x: states.append(x))
        return torch.stack(states)


def steering_grid(
    schedule: Schedule, n_steps: int = 64, *, data_std: float = 1.0, r_min: float = 0.02, r_max: float = 80.0
) -> Tensor:
    """Times for steering, shape (n_steps + 1,), float64; the last one is 0.

    r = sigma/alpha = data_std e^(sinh(y)/sqrt 2), y at equal distances: steps in log r are smallest where noise and data are of one size.
    There samples decide where to go and the control varies most within a step, for which Euler-Maruyama has one number.

    Parameters
    ----------
    schedule : Schedule
    n_steps : int
    data_std : float
        Standard deviation of the data.
    r_min, r_max : float
        r of the last time above 0, and of the first; the schedule's own end if that comes sooner.

    Raises
    ------
    ArgumentTypeError, ArgumentError, GridError

    Example
    -------
    >>> from sdesens.diffusion import EDM
    >>> steering_grid(EDM(), 4)
    tensor([8.0000e+01, 2.0223e+00, 5.5057e-01, 2.0000e-02, 0.0000e+00],
           dtype=torch.float64)
    """
    whole("n_steps", n_steps, 2, hint="the last step goes to 0")
    data_std = number("data_std", data_std, 0.0, hint="it is the data's standard deviation")
    with torch.no_grad():
        first = schedule.t_of_log_snr(-2 * torch.tensor(math.log(r_max), dtype=torch.float64))
        first = first.clamp(max=schedule.t_max)
        ends = [-float(schedule.log_snr(first)) / 2, math.log(r_min)]
        if not ends[1] < ends[0]:
            raise GridError(f"`r_min` must lie below {math.exp(ends[0]):.6g}, got {r_min!r}: 0.02 is usual.")
        low, high = (math.asinh(math.sqrt(2) * (e - math.log(data_std))) for e in ends)
        y = torch.linspace(low, high, n_steps, dtype=torch.float64)
        t = schedule.t_of_log_snr(-2 * (math.log(data_std) + torch.sinh(y) / math.sqrt(2)))
    return torch.cat((first.reshape(1), t[1:], t.new_zeros(1)))


@dataclass(frozen=True, eq=False)
class Objective:
    """r(x_0) - L of a path, equations (2) and (3), as a functional of the states at all grid points.

    `held` is the tuned model with weights that are not differentiated; they are the same memory, and move with it.
    """

    reward: Reward
    held: Predictor
    base: Predictor
    grid: Tensor
    eta: float

    def __call__(self, ys: Tensor, p: Params) -> Tensor:
        xs = ys[1:]  # ys[0] is before the start's noise
        w, U = self.controls(xs, self.held)
        return rewarded(self.reward, xs[-1]).to(xs.dtype) - log_ratio(w, U)

    def controls(self, xs: Tensor, tuned: Predictor) -> tuple[Tensor, Tensor]:
        """w and U of equation (1), each (N, B, *event), of states xs (N + 1, B, *event); all steps are one batch."""
        shape, n = xs[1:].shape, xs.shape[1]
        t, h = (a.repeat_interleave(n) for a in (self.grid[:-1], -self.grid.diff()))
        x, after = xs[:-1].flatten(0, 1), xs[1:].flatten(0, 1)
        std = self.eta * torch.sqrt(h * self.base.schedule.g2(t).detach())
        eta2 = torch.tensor(-(self.eta**2), dtype=torch.float64)
        before, now = (like(h / std, x) * velocity(model, x, t, eta2) for model in (self.base, tuned))
        return ((after - x) / like(std, x) + before).reshape(shape), (before - now).reshape(shape)


def log_ratio(w: Tensor, U: Tensor) -> Tensor:
    """L of equation (2), (B,)."""
    return (U * w - U.square() / 2).sum(0).flatten(1).sum(1)


def objective(denoiser: Predictor, base: Predictor, sampling: Sampling, reward: Reward) -> Objective:
    """r - L of a tuned model against its base; raise unless they have one schedule and the grid lies in it."""
    check_predictor("denoiser", denoiser)
    check_predictor("base", base)
    if not denoiser.schedule.same_as(base.schedule):
        raise ArgumentError("`denoiser` and `base` are made for two schedules: tune a copy of the base.")
    return Objective(reward, held(denoiser), held(base), check_grid(base.schedule, sampling.grid), sampling.eta)


def held(denoiser: Predictor) -> Predictor:
    """The same model with weights that are the same memory, but not differentiated."""
    return denoiser.with_params({k: v.detach() for k, v in denoiser.params.items() if NET in k and v.requires_grad})


def objective_problem(denoiser: Predictor, base: Predictor, sampling: Sampling, reward: Reward) -> Problem:
    """J of equation (3) as a `Problem` of the core.

    Parameters
    ----------
    denoiser, base : Predictor
        The model that is tuned, and the model before.
    sampling : Sampling
    reward : callable x (B, *event) -> (B,)

    Returns
    -------
    Problem
        "net.*" are among its parameters. Likelihood ratios, and pathwise derivatives if the reward is smooth, have the mean dJ/d"net.*".

    Raises
    ------
    ArgumentTypeError, ArgumentError, GridError

    Example
    -------
    >>> from sdesens import sensitivity
    >>> from sdesens.diffusion import VP, Denoiser, uniform_grid
    >>> base = Denoiser(lambda x, t, p: p["w"] * x, VP(), "x0", parameters={"w": torch.tensor(0.5, dtype=torch.float64)})
    >>> problem = objective_problem(base, base, Sampling(uniform_grid(VP(), 10), (1,)), LinearReward([1.0]))
    >>> result = sensitivity(problem, n_paths=100, wrt="net.w", method="likelihood_ratio")
    >>> float(result.value.mean - result.gradient["net.w"].mean) != 0
    True
    """
    functional, beside = objective(denoiser, base, sampling, reward), weight_of(denoiser)
    sde = sampler_sde(denoiser, functional.grid, start=sampling.start, eta=sampling.eta)
    n = len(functional.grid)
    y0 = torch.zeros(sampling.event, dtype=beside.dtype, device=beside.device)
    return Problem(sde, functional, y0, torch.arange(n + 1, dtype=torch.float64), n)


def weight_of(denoiser: Predictor) -> Tensor:
    """A weight of the network, for its dtype and device; a float64 number if there is none."""
    return next((v for k, v in denoiser.params.items() if k.startswith(NET)), torch.zeros((), dtype=torch.float64))


def rewarded(reward: Reward, x: Tensor) -> Tensor:
    """r(x), (B,), float64 on the device of x; raise ShapeError for anything else than one number a sample."""
    value = reward(x.clone())  # one that writes into its argument does not change the path
    if not isinstance(value, Tensor) or value.shape != x.shape[:1] or value.is_complex():
        raise ShapeError(f"`reward` must return one real number a sample, shape ({len(x)},), got {describe(value)}.")
    return value.to(x.device, torch.float64)
