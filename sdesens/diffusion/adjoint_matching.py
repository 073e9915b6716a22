"""Tuning a sampler to a reward without differentiating through it: the lean adjoint and adjoint matching.

The law to aim at is p*(x) ~ p(x) e^r(x), p being that of a base model's samples. Along a path of the current model, held fixed,

    d a/dt = -(grad b)^T a,    a_0 = -grad r(x_0),    b = f x - (1 + eta^2)/2 g^2 s_base                          (1)
    u      = (1 + eta^2)/(2 eta) g (s - s_base),      loss = 1/2 int |u + eta g a|^2 dt                           (2)

(C. Domingo-Enrich et al., 2409.08861). Only the base model's Jacobian enters (1): it is the adjoint without the terms that vanish
in the mean at the optimum. On a grid (1) is the transpose of the base's Euler-Maruyama steps, and the u of a step meets the a at its
end, which is exact for the chain.

(2) aims at p* only if the sample has forgotten its start. What it remembers of Gaussian data of standard deviation s is

    corr^2(x_T, x_0) = (alpha_T^2 s^2 / (alpha_T^2 s^2 + sigma_T^2))^(eta^2)                                     (3)

and that share of the shift is missing. eta = 1 forgets by construction; a score tuned at eta = 1 may be sampled with any other.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from sdesens.diffusion.chain import GridClock
from sdesens.diffusion.checks import number
from sdesens.diffusion.equations import Backwards, check_denoiser, check_eta, require_finite
from sdesens.diffusion.grids import check_grid
from sdesens.diffusion.predict import Predictor, check_predictor
from sdesens.diffusion.schedule import Schedule, check_schedule
from sdesens.diffusion.sensitivity import Reward
from sdesens.diffusion.values import like
from sdesens.diffusion.walk import walk
from sdesens.errors import ArgumentError, MemoryWarning, NonFiniteError, ShapeError
from sdesens.noise import Noise
from sdesens.sde import check_function
from sdesens.tensors import concrete, describe

REMEMBERED = 1e-2


def remembered(schedule: Schedule, eta: float, *, data_std: float = 1.0, t: float | None = None) -> float:
    """The share of its start that a sample remembers, equation (3).

    Parameters
    ----------
    schedule : Schedule
    eta : float, >= 0
    data_std : float, > 0
        Standard deviation of the data.
    t : float, optional
        Where sampling starts; t_max if left out.

    Example
    -------
    >>> from sdesens.diffusion import VP
    >>> [round(remembered(VP(), eta), 5) for eta in (0.0, 0.5, 1.0)]
    [1.0, 0.08107, 4e-05]
    """
    check_schedule("schedule", schedule)
    eta = number("eta", eta, 0.0, ends=True, hint="0 is the ODE, 1 the reverse SDE")
    data_std = number("data_std", data_std, 0.0, hint="it is the data's standard deviation")
    with torch.no_grad():
        t = schedule.t_max if t is None else t
        signal, noise = (schedule.alpha(t) * data_std) ** 2, schedule.sigma(t) ** 2
        return float((signal / (signal + noise)) ** (eta**2))


def lean_adjoint(base: Predictor, xs: Tensor, grid, reward: Reward, *, eta: float = 1.0) -> Tensor:
    """Equation (1) along paths, by the transposed steps of the base's Euler-Maruyama chain.

    Parameters
    ----------
    base : Predictor
        The model before tuning. For guided sampling the adjoint through the guidance may blow up: give the unguided base.
    xs : Tensor, shape (N + 1, B, *event)
        States on the grid (`walk`'s callback); treated as constants.
    grid : Tensor or sequence, shape (N + 1,)
    reward : callable x (B, *event) -> (B,)
    eta : float, > 0

    Returns
    -------
    Tensor, shape (N + 1, B, *event)
        a at every grid point, detached; the last is -grad r.

    Example
    -------
    >>> from sdesens.diffusion import VP, Denoiser, uniform_grid
    >>> base = Denoiser(lambda x, t: x * VP().sigma(t)[:, None], VP(), "eps")  # N(0, 1)
    >>> a = lean_adjoint(base, torch.zeros(101, 2, 1, dtype=torch.float64), uniform_grid(VP(), 100), lambda x: x[:, 0])
    >>> a.shape, a[-1, 0].item()
    (torch.Size([101, 2, 1]), -1.0)
    """
    check_predictor("base", base)
    check_function("reward", reward, ("x",))
    grid = check_grid(base.schedule, grid)
    if not isinstance(xs, Tensor) or xs.dim() < 3 or len(xs) != len(grid):
        raise ShapeError(
            f"`xs` must hold the states at all {len(grid)} grid points, shape (N + 1, B, *event), got {describe(xs)}."
        )
    require_finite(base.schedule, float(grid[0]), check_eta(eta))
    p = {**{k: v.detach() for k, v in base.params.items()}, "eta": check_eta(_positive(eta))}
    backwards = Backwards(base, GridClock(grid))
    xs = xs.detach()
    adjoint = [-_gradient(reward, xs[-1])]
    for k in reversed(range(len(grid) - 1)):
        t = torch.tensor(k + 1.0, dtype=torch.float64)
        pull_back = torch.func.vjp(lambda x, t=t: backwards.drift(t, x, p), xs[k])[1]
        adjoint.append(adjoint[-1] + pull_back(adjoint[-1])[0].detach())
    return torch.stack(adjoint[::-1])


def matching_loss(
    denoiser: Predictor,
    base: Predictor,
    xs: Tensor,
    adjoint: Tensor,
    grid,
    *,
    eta: float = 1.0,
    at: Sequence[int] | None = None,
) -> Tensor:
    """Equation (2) on given paths and adjoints: one loss a path, shape (B,), differentiable in the denoiser's parameters.

    Parameters
    ----------
    denoiser, base : Predictor
        The model that is tuned, and the model before.
    xs, adjoint : Tensor, shape (N + 1, B, *event)
        As in `lean_adjoint`, and what it returns.
    grid : Tensor or sequence, shape (N + 1,)
    eta : float, > 0
    at : sequence of int, optional
        The steps k = 0 ... N - 1 that are summed, scaled up to all of them; all if left out.

    Example
    -------
    >>> from sdesens.diffusion import VP, Gaussian, prior, uniform_grid, walk
    >>> base, grid, states = Gaussian(torch.zeros(1), torch.ones(1)).denoiser(VP()), uniform_grid(VP(), 10), []
    >>> x = walk(base, prior(VP(), 3, (1,), seed=1), grid, seed=1, callback=lambda k, x: states.append(x))
    >>> xs = torch.stack(states)
    >>> matching_loss(base, base, xs, lean_adjoint(base, xs, grid, lambda x: x[:, 0]), grid).shape
    torch.Size([3])
    """
    schedule = base.schedule
    check_denoiser(schedule, denoiser)
    grid, strength = check_grid(schedule, grid), _positive(eta)
    require_finite(schedule, float(grid[0]), check_eta(eta))
    n = len(grid) - 1
    if adjoint.shape != xs.shape or len(xs) != n + 1:
        raise ShapeError(
            f"`xs` and `adjoint` must have one shape (N + 1, B, *event), N = {n}, got {tuple(xs.shape)} and {tuple(adjoint.shape)}."
        )
    steps = range(n) if at is None else at
    if not len(steps) or min(steps) < 0 or max(steps) >= n:
        raise ArgumentError(f"`at` must name steps among 0 ... {n - 1}, got {list(steps)!r:.60}.")
    total = xs.new_zeros(xs.shape[1])
    for k in steps:
        t, x, h = grid[k], xs[k].detach(), grid[k] - grid[k + 1]
        with torch.no_grad():
            score = base.score(x, t)
        g = like(schedule.g(t).detach(), x)
        u = (1 + strength**2) / (2 * strength) * g * (denoiser.score(x, t) - score)
        total = total + 0.5 * float(h) * (u + strength * g * adjoint[k + 1]).square().flatten(1).sum(1)
    return total * (n / len(steps))


def adjoint_matching_loss(
    denoiser: Predictor,
    base: Predictor,
    x: Tensor,
    grid,
    reward: Reward,
    *,
    eta: float = 1.0,
    data_std: float = 1.0,
    at: Sequence[int] | None = None,
    seed: int | None = None,
    noise: Noise | Tensor | None = None,
    first_path: int = 0,
) -> Tensor:
    """One round of adjoint matching: sample, solve the lean adjoint, and return the losses (B,) to step an optimiser on.

    Parameters
    ----------
    denoiser : Predictor
        The model that is tuned; its parameters get the gradient.
    base : Predictor
        A frozen copy of it from before.
    x : Tensor, shape (B, *event)
        Starting states: `prior(...)`.
    grid : Tensor or sequence, shape (N + 1,)
        It must end above t = 0, or in a last step to it, and start where some signal is left.
    reward : callable x (B, *event) -> (B,)
    eta, data_std : float
        Noise of the sampler, and the data's standard deviation, for the check that the start is forgotten.
    at
        See `matching_loss`.
    seed, noise, first_path
        See `walk`.

    Raises
    ------
    ArgumentError
        If eta is 0: there is no noise to control.

    Warns
    -----
    MemoryWarning
        If more than a hundredth of the start is remembered, equation (3): the tuned law is not p*.

    Example
    -------
    >>> from sdesens.diffusion import VP, Denoiser, prior, uniform_grid
    >>> w = torch.tensor(0.5, requires_grad=True)
    >>> model, base = (Denoiser(lambda x, t, p: p["w"] * x, VP(), "x0", parameters={"w": v}) for v in (w, w.detach()))
    >>> x = prior(VP(), 8, (1,), seed=1)
    >>> adjoint_matching_loss(model, base, x, uniform_grid(VP(), 20), lambda x: x[:, 0], seed=1).mean().backward()
    >>> bool(w.grad.abs() > 0)
    True
    """
    check_predictor("base", base)
    check_denoiser(base.schedule, denoiser)
    strength, grid = _positive(eta), check_grid(base.schedule, grid)
    kept = remembered(base.schedule, strength, data_std=data_std, t=float(grid[0]))
    if kept > REMEMBERED:
        warnings.warn(
            f"with eta = {strength:g} samples remember {kept:.2g} of their start, so that tuning falls short of the law p e^r by that share of "
            "the shift: tune with eta = 1 on a schedule that ends in noise; the tuned score may then be sampled with any eta.",
            MemoryWarning,
            stacklevel=2,
        )
    states: list[Tensor] = []
    with torch.no_grad():
        walk(
            denoiser,
            x,
            grid,
            options={"eta": strength},
            seed=seed,
            noise=noise,
            first_path=first_path,
            callback=lambda k, x: states.append(x),
        )
    xs = torch.stack(states)
    return matching_loss(
        denoiser, base, xs, lean_adjoint(base, xs, grid, reward, eta=strength), grid, eta=strength, at=at
    )


def _gradient(reward: Reward, x: Tensor) -> Tensor:
    """grad r(x), row by row."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = reward(x)
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            raise ShapeError(f"`reward` must return one number a sample, shape ({len(x)},), got {describe(value)}.")
        if not value.requires_grad:
            raise ArgumentError(
                "`reward` does not depend on x as autograd sees it: write it in torch, without detach()."
            )
        found = torch.autograd.grad(value.sum(), x)[0]
        if concrete(found) and not bool(torch.isfinite(found).all()):
            raise NonFiniteError("the gradient of `reward` is infinite or NaN at some samples: look at it there.")
        return found


def _positive(eta) -> float:
    strength = check_eta(eta).item()
    if strength == 0:
        raise ArgumentError("`eta` must be positive, got 0: without noise there is nothing to control; use eta = 1.")
    return strength
