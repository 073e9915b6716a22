"""Steer a trained model to a reward: tune a copy of its network so that samples have the law p* ~ p e^r.

    gradient            equation (4) of `steer_objective.py`: likelihood ratios of the sampler's steps
    pathwise            the gradient of its equation (3) by the core, through the sampler, reward and all
    adjoint_matching    regression of the control on the lean adjoint (`sdesens.diffusion.adjoint_matching`)

All three stand still at the same network. What they need differs: "gradient" takes any reward, the other two a smooth one, and data
whose modes are not far apart. Derivatives of x_0 along a path are heavy-tailed where it decides between modes: rare paths carry their
mean, and what is tuned without having seen them falls short.

Round k has the noise of the paths BLOCK (k + 1) onwards, so that it is a function of (seed, k).
"""

import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sdesens.blocks import BLOCK
from sdesens.diffusion.adjoint_matching import REMEMBERED, lean_adjoint, matching_loss, remembered
from sdesens.diffusion.checks import number, whole
from sdesens.diffusion.predict import NET, Denoiser
from sdesens.errors import (
    ArgumentError,
    ArgumentTypeError,
    HeavyTailWarning,
    MemoryWarning,
    NonFiniteError,
    ZeroGradientWarning,
)
from sdesens.montecarlo import sensitivity
from sdesens.noise import Noise, Philox
from sdesens.tails import Largest, tail
from sdesens.training.steer_objective import (
    Objective,
    Reward,
    Sampling,
    log_ratio,
    objective,
    objective_problem,
    rewarded,
)

STEERING = 0x64736DE0  # the stream of this file's noise, away from those of `sdesens.diffusion.streams`
WATCHED = 8_000  # paths whose tail is looked at
PILOT = 64  # paths of the first block, which no round has


@dataclass(frozen=True)
class Round:
    """What a round of steering saw, for a callback.

    Attributes
    ----------
    step : int
    reward : float
        Mean reward of the round's samples, before its update.
    objective : float
        Equation (3) of `steer_objective.py`; NaN for adjoint matching, which does not use it.
    """

    step: int
    reward: float
    objective: float


@dataclass(frozen=True)
class Centred:
    """A reward less a number near its mean, in the dtype of the samples: an offset would cost them their digits."""

    reward: Reward
    centre: float

    def __call__(self, x: Tensor) -> Tensor:
        return (rewarded(self.reward, x) - self.centre).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Task:
    """What a method is given: the model that is tuned, its base, and how samples are made and rewarded."""

    tuned: Denoiser
    base: Denoiser
    sampling: Sampling
    reward: Centred
    noise: Noise

    @property
    def objective(self) -> Objective:
        """r - L of the model as it is."""
        return objective(self.tuned, self.base, self.sampling, self.reward)


Found = tuple[Tensor, Tensor | None, Tensor | None]  # rewards (n,), r - L (n,), what tells the adjoint's tail (n,)
Method = Callable[[Task, int, int], Found]
"""(task, n, first_path) -> Found; adds n times the gradient of minus the objective to the network's weights."""


def gradient(task: Task, n: int, first_path: int) -> Found:
    """Equation (4) of `steer_objective.py`, b being the mean of the other paths."""
    xs = task.sampling.path(task.tuned, n, task.noise, first_path)
    with torch.no_grad():
        rewards = task.reward(xs[-1])
    w, U = task.objective.controls(xs, task.tuned)
    seen = U.detach()
    value = rewards - log_ratio(w, seen)
    score = ((w - seen) * U).sum(0).flatten(1).sum(1)
    above = (value - value.mean()) * (n / (n - 1))
    (-(above * score).sum()).backward()
    return rewards, value, None


def pathwise(task: Task, n: int, first_path: int) -> Found:
    """The core's gradient of equation (3)."""
    problem = objective_problem(task.tuned, task.base, task.sampling, task.reward)
    how: dict[str, Any] = {"check": False, "audit": False, "compile": False, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZeroGradientWarning)  # weights before a layer that is still zero
        warnings.simplefilter("ignore", HeavyTailWarning)  # of one weight in one round: see the head of this file
        found = sensitivity(problem, n_paths=n, wrt=(NET + "*",), noise=task.noise, first_path=first_path, **how)
    for name, weight in task.tuned.weights.items():
        slope = -n * found.gradient[NET + name].mean.to(weight)
        weight.grad = slope if weight.grad is None else weight.grad + slope
    value = found.value.mean.expand(n)
    rewards = task.reward(task.sampling.draw(task.tuned, n, task.noise, first_path))
    return rewards, value, None


def adjoint_matching(task: Task, n: int, first_path: int) -> Found:
    """The lean adjoint along the tuned model's paths, and the slope of the matching loss."""
    grid, eta = task.sampling.grid, task.sampling.eta
    xs = task.sampling.path(task.tuned, n, task.noise, first_path)
    adjoint = lean_adjoint(task.base, xs, grid, task.reward, eta=eta)
    losses = matching_loss(task.tuned, task.base, xs, adjoint, grid, eta=eta)
    losses.sum().backward()
    with torch.no_grad():
        return task.reward(xs[-1]), None, losses.detach().sqrt()


METHODS: dict[str, Method] = {"gradient": gradient, "pathwise": pathwise, "adjoint_matching": adjoint_matching}


def steer(
    denoiser: Denoiser,
    sampling: Sampling,
    reward: Reward,
    *,
    method: str = "gradient",
    steps: int = 200,
    batch: int = 400,
    lr: float = 2e-3,
    seed: int = 0,
    data_std: float = 1.0,
    accumulate: int = 1,
    callback: Callable[[Round], None] | None = None,
) -> Denoiser:
    """A copy of a trained model, tuned so that its samples have the law p e^r.

    Parameters
    ----------
    denoiser : Denoiser
        The base, around an nn.Module in eval mode; it is not changed. A condition must be one that all samples share.
    sampling : Sampling
        How samples are made, for tuning and after it.
    reward : callable x (B, *event) -> (B,)
        Any function for "gradient"; one with derivatives for the others.
    method : {"gradient", "pathwise", "adjoint_matching"}
        See the head of this file.
    steps, batch : int
        Adam's steps, and paths a step.
    lr : float
        Learning rate at the first step, from where it falls to 0 by a cosine.
    seed : int
    data_std : float
        Standard deviation of the data, for the check that the start is forgotten.
    accumulate : int
        Pieces in which a batch is gone through, to need less memory.
    callback : callable (Round), optional

    Returns
    -------
    Denoiser
        In eval mode, without gradients.

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError, GridError
    NonFiniteError
        If samples, rewards or gradients become infinite or NaN.

    Warns
    -----
    MemoryWarning
        If more than a hundredth of the start is remembered: the law is not p e^r then, but what `predicted` computes.
    HeavyTailWarning
        If the lean adjoint seems to have no finite variance: adjoint matching does not reach p e^r then.

    Example
    -------
    >>> from sdesens.diffusion import EDM
    >>> from sdesens.training.networks import make_network
    >>> base = Denoiser(make_network("mlp", (2,), 8, 1), EDM(), sigma_data=1.0)  # samples of N(0, 1)
    >>> from sdesens.training.steer_objective import LinearReward, steering_grid
    >>> tuned = steer(base, Sampling(steering_grid(EDM(), 16), (2,)), LinearReward([1.0, 0.0]), steps=2, batch=8)
    >>> tuned
    Denoiser(ResidualMLP of ... parameters, EDM(sigma_max=80), sigma_data=1)
    """
    check_steering(denoiser, reward, method, steps, batch, lr, accumulate)
    _warn_of_memory(denoiser, sampling, data_std)
    net, frozen = deepcopy(denoiser.net), deepcopy(denoiser.net)
    assert isinstance(net, nn.Module)  # `_check` has seen to it
    assert isinstance(frozen, nn.Module)
    net.requires_grad_(True)
    base = replace(denoiser, net=frozen.requires_grad_(False))
    noise = Philox(seed, STEERING)
    centre = float(rewarded(reward, sampling.draw(base, PILOT, noise)).mean())
    task = Task(
        replace(denoiser, net=net), base, sampling, Centred(reward, centre if math.isfinite(centre) else 0.0), noise
    )
    optimiser = torch.optim.Adam(net.parameters(), lr=lr)
    watched: list[Tensor] = []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        seen = _round(task, METHODS[method], step, batch, accumulate, watched)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if callback is not None:
            callback(seen)
    _warn_of_tail(watched)
    net.requires_grad_(False)
    return task.tuned


def _round(task: Task, method: Method, step: int, batch: int, accumulate: int, watched: list[Tensor]) -> Round:
    """Leave the batch's mean gradient in the weights; append what tells the adjoint's tail."""
    n = batch // accumulate
    found = [method(task, n, (step + 1) * BLOCK + a * n) for a in range(accumulate)]
    slopes = [w.grad.div_(batch) for w in task.tuned.weights.values() if w.grad is not None]
    rewards = torch.cat([f[0] for f in found])
    values = [f[1] for f in found if f[1] is not None]
    if len(watched) * n < WATCHED:
        watched += [f[2] for f in found if f[2] is not None]
    if not bool(torch.isfinite(torch.stack([s.abs().max() for s in slopes] + [rewards.abs().max()])).all()):
        raise NonFiniteError(
            f"a reward, or the gradient, is infinite or NaN in round {step}: look at `reward` there, or lower `lr`.",
            step=step,
        )
    centre = task.reward.centre
    mean = float(torch.cat(values).mean()) + centre if values else math.nan
    return Round(step, float(rewards.mean()) + centre, mean)


def check_steering(denoiser, reward, method, steps, batch, lr, accumulate=1) -> None:
    """Raise unless `steer` can do it."""
    if not callable(reward):
        raise ArgumentTypeError(f"`reward` must be a function x (B, *event) -> (B,), got {type(reward).__name__}.")
    if not isinstance(denoiser, Denoiser) or not isinstance(denoiser.net, nn.Module):
        raise ArgumentTypeError(
            f"`denoiser` must be a Denoiser around an nn.Module, whose weights are tuned, got {denoiser!r:.60}: a function has none."
        )
    if method not in METHODS:
        raise ArgumentError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    whole("steps", steps)
    number("lr", lr, 0.0, hint="2e-3 is usual")
    whole("accumulate", accumulate)
    whole("batch", batch, 2 * accumulate, BLOCK, hint="each piece takes two paths or more")
    if batch % accumulate:
        raise ArgumentError(f"`batch` = {batch} must be a multiple of `accumulate` = {accumulate}.")


def _warn_of_memory(denoiser: Denoiser, sampling: Sampling, data_std: float) -> None:
    kept = remembered(denoiser.schedule, sampling.eta, data_std=data_std, t=float(sampling.grid[0]))
    if kept > REMEMBERED:
        warnings.warn(
            f"samples remember {kept:.2g} of their start with eta = {sampling.eta:g} from t = {float(sampling.grid[0]):g}: they will not get "
            "the law p e^r, but one that leaves the start as it is (see `predicted`). Take eta = 1 and start in noise.",
            MemoryWarning,
            stacklevel=3,
        )


def _warn_of_tail(watched: list[Tensor]) -> None:
    if not watched:
        return
    sizes = torch.cat(watched)
    found = tail([Largest.of(sizes, 1)], float(sizes.median()))  # their standard deviation may be that of a few
    if found is not None and found.heavy:
        warnings.warn(
            f"the lean adjoint looks as if it had no finite variance ({found!r}; above 2 it has one), as where modes lie far apart: few "
            "paths carry its mean then, and tuning falls short of p e^r. Use method='gradient', or a coarser grid and many more paths.",
            HeavyTailWarning,
            stacklevel=3,
        )
