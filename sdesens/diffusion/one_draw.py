"""The training draw and the SDE's path as two problems of the core, with the same law at one time.

    path   dx = f x dt + g dW, from x_0 over (0, t) in n steps           noise: the increments
    draw   x_t = alpha_t x_0 + sigma_t eps, one step over (0, 1)         noise: eps

A function of x_t has the same mean under both, and so have its derivatives in the schedule. The draw's derivative is the conditional
expectation of the path's given x_t, and never varies more (`docs/diffusion.md`).
"""

from collections.abc import Callable

from torch import Tensor

from sdesens.diffusion.schedule import Schedule
from sdesens.errors import ArgumentError
from sdesens.problem import Problem
from sdesens.sde import SDE, Params


def path_problem(schedule: Schedule, f: Callable[[Tensor], Tensor], x0: Tensor, t: float, n_steps: int) -> Problem:
    """E[f(x_t)] along the forward SDE.

    Parameters
    ----------
    schedule : Schedule
        Its parameters are those of the problem.
    f : callable x (B, *event) -> (B,)
    x0 : Tensor, shape `event`
    t : float, within (0, t_max]
    n_steps : int

    Example
    -------
    >>> import torch
    >>> from sdesens import sensitivity
    >>> from sdesens.diffusion import VP
    >>> problem = path_problem(VP(), lambda x: x[:, 0], torch.ones(1, dtype=torch.float64), 0.3, 50)
    >>> sorted(sensitivity(problem, n_paths=100).gradient)
    ['beta_max', 'beta_min']
    """
    return Problem(schedule.as_sde(), lambda ys, p: f(ys[-1]), x0, (0.0, _within(schedule, t)), n_steps)


def draw_problem(schedule: Schedule, f: Callable[[Tensor], Tensor], x0: Tensor, t: float) -> Problem:
    """E[f(x_t)] by the draw: an SDE that makes one step.

    Parameters
    ----------
    schedule, f, x0, t
        As of `path_problem`.

    Example
    -------
    >>> import torch
    >>> from sdesens import sensitivity
    >>> from sdesens.diffusion import VP
    >>> problem = draw_problem(VP(), lambda x: x[:, 0], torch.ones(1, dtype=torch.float64), 0.3)
    >>> found = sensitivity(problem, n_paths=100, wrt="y0", method="forward")
    >>> bool(torch.isclose(found.gradient["y0"].mean, VP().alpha(0.3)))  # dx_t/dx_0 = alpha_t on every path
    True
    """
    at = _within(schedule, t)

    def drift(s: Tensor, x: Tensor, p: Params) -> Tensor:
        return (schedule.with_params(p).alpha(at) - 1).to(x) * x

    def diffusion(s: Tensor, x: Tensor, p: Params) -> Tensor:
        return schedule.with_params(p).sigma(at).to(x).expand_as(x)

    sde = SDE(drift, diffusion, {k: v.detach() for k, v in schedule.params.items()})
    return Problem(sde, lambda ys, p: f(ys[-1]), x0, (0.0, 1.0), 1)


def _within(schedule: Schedule, t: float) -> float:
    if not 0 < t <= schedule.t_max:
        raise ArgumentError(f"`t` must lie in (0, {schedule.t_max:g}], got {t!r}.")
    return float(t)
