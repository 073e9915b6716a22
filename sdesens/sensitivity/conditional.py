"""Conditional expectation: F is averaged where that can be done exactly, and what is left is smooth.

Two ways, each declared by the functional itself.

    last step   G = E[ F | X_0, ..., X_{N-1} ] = functional.conditional(ys, covariance, p),       (1)
                the last step being Gaussian: a digital becomes Phi((m - K) / s), a call a Black formula;
    bridge      G = E[ F | X_0, ..., X_N ] = functional.bridge(ys, covariance, p),                (2)
                the path between grid points being a Brownian bridge: a barrier is passed in a step with
                probability p_n = exp(-2 (x_n - b)^+ (x_{n+1} - b)^+ / s_n^2), and F becomes payoff x prod (1 - p_n).

G has the mean of F, varies less, and is Lipschitz: its pathwise derivative is unbiased. For a jump its variance grows like
dt^-1/2, with a smaller constant than `vibrato`. Equation (2) watches the barrier in continuous time, F itself at output times
alone: their means differ by O(dt^1/2), and (2) is exact for a log-price of constant coefficients at any dt.

Reference: P. Glasserman, Monte Carlo Methods in Financial Engineering, 2003, sections 7.2.3 and 6.4.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sdesens.errors import MethodError, ShapeError
from sdesens.integrate.chunk import Dynamics
from sdesens.problem import Problem, Theta
from sdesens.sensitivity.pathwise import pathwise
from sdesens.sensitivity.probe import probe_states
from sdesens.sensitivity.tile import Contributions, Measure, Tile
from sdesens.sensitivity.transition import increments, parts_of
from sdesens.sensitivity.vibrato import LastStep
from sdesens.tensors import describe

DOUBT = 8.0  # standard errors that the mean of a declared expectation may be off by


def conditional(tile: Tile, theta: Theta) -> Contributions:
    """Group means of the pathwise gradient of equation (1) or (2).

    Raises
    ------
    MethodError
        If the functional declares neither, the state is no vector, or the last step has no noise on some paths.
    """
    return pathwise(replace(tile, measure=smoothed(tile.problem, theta, tile.noise_dim)), theta)


def smoothed(problem: Problem, theta: Theta, noise_dim: int, *, twice: bool = False) -> Measure:
    """What takes the functional's place, if it declares something.

    Where the last step has no noise there is nothing to average over, and F is what it is: a jump, or a kink. A number that is
    NaN there keeps a jump from being missed, and a kink if the number is to be differentiated twice.

    Raises
    ------
    MethodError
    """
    functional = problem.functional
    if problem.initial({}).dim() != 1:
        raise MethodError("method='conditional' needs states of shape (d,): flatten them, or use method='vibrato'.")
    if callable(getattr(functional, "bridge", None)):
        parts_of(problem, noise_dim, "method='conditional'")
        return Bridge(problem)
    if callable(getattr(functional, "conditional", None)):
        parts = parts_of(problem, noise_dim, "method='conditional'")
        strict = twice or getattr(functional, "kind", "jump") == "jump"
        measure = Conditional(problem, parts.noisy if strict else None)
        y = probe_states(problem, theta, noise_dim)[-1][1]
        with torch.no_grad():  # under vmap the functional cannot look at values, and so not complain
            _check_number(problem, measure, theta, y)
        return measure
    raise MethodError(
        "method='conditional' needs a functional that knows its expectation over a Gaussian step, a method conditional(ys, "
        f"covariance, p) such as `functionals.Digital` has; {type(functional).__name__} has none. Use method='vibrato' for a jump "
        "at the last time, 'likelihood_ratio' or 'malliavin' for any other."
    )


def _check_number(problem: Problem, measure: "Conditional", theta: Theta, y: Tensor) -> None:
    found = measure.expected(theta, y.expand(len(measure.outputs), *y.shape))[0]
    if not isinstance(found, Tensor) or found.shape != y.shape[:1] or found.dtype != y.dtype:
        raise ShapeError(
            f"`functional.conditional(ys, covariance, p)` must return one number a path, {y.dtype} of shape ({len(y)},), got "
            f"{describe(found)}: ys[-1] is (B, d), so index the component, ys[-1, :, 0], and keep the axis of paths."
        )


def check_declared(tile: Tile, theta: Theta, measure: Measure) -> None:
    """Raise MethodError if what the functional declares has not its mean, on the paths of a pilot tile."""
    if not isinstance(measure, Conditional):
        return
    with torch.no_grad():
        whole = replace(tile, measure=None)
        ys = whole.paths(theta)
        own, declared = whole.values(theta, ys), replace(tile, measure=measure)
        gap = own - declared.values(theta, declared.paths(theta))
    error = float(gap.std()) / math.sqrt(len(gap))
    if abs(float(gap.mean())) > DOUBT * error + 1e-6 * float(own.abs().mean()):
        raise MethodError(
            f"`functional.conditional(ys, covariance, p)` is not the functional's expectation over the last step: its mean over "
            f"{len(gap)} paths is off by {abs(float(gap.mean())) / max(error, 1e-300):.3g} standard errors. Mend it, or use another method."
        )


@dataclass(frozen=True)
class Conditional(LastStep):
    """Equation (1); NaN where one of the components `moving`, if given, has no noise in the last step."""

    moving: Tensor | None
    draws: ClassVar[int] = 0

    def __call__(self, theta: Theta, ys: Tensor, own: Tensor | None) -> Tensor:
        value, spread = self.expected(theta, ys)
        if self.moving is None:
            return value
        still = (spread.diagonal(dim1=-2, dim2=-1) == 0) & self.moving
        return torch.where(still.any(-1), torch.nan, value)

    def expected(self, theta: Theta, ys: Tensor) -> tuple[Tensor, Tensor]:
        """What the functional declares, and the covariance of the last step."""
        q = self.problem
        mean, s = self.law(theta, ys[-1])
        spread = covariance(s)
        return q.functional.conditional(self.path(ys, mean), spread, q.params(theta)), spread  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Bridge:
    """Equation (2)."""

    problem: Problem
    draws: ClassVar[int] = 0

    @property
    def outputs(self) -> tuple[int, ...]:
        """Every grid point."""
        return tuple(range(self.problem.n_steps + 1))

    def __call__(self, theta: Theta, ys: Tensor, own: Tensor | None) -> Tensor:
        q = self.problem
        dynamics = Dynamics(q.sde, q.params(theta), q.t0, q.step_size(theta))
        steps = [covariance(increments(dynamics, n, y)[1]) for n, y in enumerate(ys[:-1])]
        return q.functional.bridge(ys, torch.stack(steps), q.params(theta))  # type: ignore[attr-defined]


def covariance(s: Tensor) -> Tensor:
    """That of one step, (B, d, d), from its spread (B, d) or (B, d, m)."""
    return torch.diag_embed(s.square()) if s.dim() == 2 else s @ s.mT
