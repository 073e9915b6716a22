"""Vibrato: the path method up to the last step, the likelihood ratio of the last step's Gaussian law.

    X_N = m + C Z given X_{N-1},    f(x) = F(X at earlier output times, x),
    dJ/dtheta = E[ dm' E_Z[f C^-T Z] + 1/2 tr(C^-1 dS C^-T E_Z[f (Z Z' - 1)]) ] + E[ F_theta ],   S = C C',   (1)

with dm and dS along the path: F may jump at the end, and only there. The inner expectation over Z is sampled by antithetic
pairs with f(m) taken off, which has no mean in (1):

    dm (Z / 2s) (f(m + s Z) - f(m - s Z)) + ds ((Z^2 - 1) / 2s) (f(m + s Z) - 2 f(m) + f(m - s Z))      (one dimension)   (2)

or, in any dimension, the derivative of 1/2 sum_+- (f(m +- C Z) - f(m)) log N(m +- C Z; m, S) with those points held fixed. The
variance grows like dt^-1/2 at a jump and stays bounded at a kink.

Components without noise in the last step are differentiated through, as is F in earlier states: it must not jump there.

Reference: M. Giles, Vibrato Monte Carlo sensitivities, in Monte Carlo and Quasi-Monte Carlo Methods 2008, 2009.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.integrate.chunk import Dynamics
from sdesens.problem import Problem, Theta
from sdesens.sde import noise_product
from sdesens.sensitivity.pathwise import pathwise
from sdesens.sensitivity.tile import Contributions, Tile
from sdesens.sensitivity.transition import Parts, increments, linear_log_density, reached, strays


def vibrato(tile: Tile, theta: Theta, *, draws: int = 4) -> Contributions:
    """Group means of the gradient by equations (1) and (2).

    Parameters
    ----------
    tile : Tile
    theta : mapping of str to Tensor
    draws : int
        Antithetic pairs of the last step a path, at least 1. They are made beside the path's own noise.

    Raises
    ------
    ArgumentError
        If `draws` is no positive int, or the noise is given and holds no others.
    MethodError
        If the last step's noise does not reach every direction of its noisy components.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ArgumentError(f"`draws` must be a positive int, got {draws!r}: 4 is a fair number of pairs a path.")
    theta = {k: v.detach() for k, v in theta.items()}
    parts = reached(tile.problem, tile.noise_dim, "method='vibrato'")
    return pathwise(replace(tile, measure=Vibrato(tile.problem, parts, draws)), theta)


@dataclass(frozen=True)
class LastStep:
    """The chain without its last step, and that step's law.

    Attributes
    ----------
    problem : Problem
    """

    problem: Problem

    @property
    def outputs(self) -> tuple[int, ...]:
        """The output times but the last, and the step before it."""
        return tuple(dict.fromkeys((*self.problem.outputs[:-1], self.problem.n_steps - 1)))

    def law(self, theta: Theta, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, *event) and spread s of the last step from y (B, *event)."""
        q = self.problem
        dynamics = Dynamics(q.sde, q.params(theta), q.t0, q.step_size(theta))
        drift, s = increments(dynamics, q.n_steps - 1, y)
        return y + drift, s

    def path(self, ys: Tensor, last: Tensor) -> Tensor:
        """States (T, B, *event) at the problem's own output times, with this last one."""
        return torch.cat((ys[: len(self.problem.outputs) - 1], last[None]))


@dataclass(frozen=True)
class Vibrato(LastStep):
    """A number whose value is the inner mean of F and whose derivative is equation (1)."""

    parts: Parts
    draws: int

    def __call__(self, theta: Theta, ys: Tensor, own: Tensor | None) -> Tensor:
        assert own is not None
        q, p, noisy = self.problem, self.problem.params(theta), self.parts.noisy
        mean, s = self.law(theta, ys[-1])

        def f(last: Tensor) -> Tensor:
            return q.functional(self.path(ys, torch.where(noisy, last.detach(), mean)), p)

        middle = f(mean)
        value = score = torch.zeros_like(middle)
        for z in own:
            step = noise_product(q.sde, s, z)
            for x in (mean + step, mean - step):
                here = f(x)
                log_q, alive = linear_log_density(self.parts, x.detach(), mean, s)
                weight = torch.where(alive & ~strays(self.parts, s), (here - middle).detach(), torch.nan)
                value, score = value + here, score + weight * log_q
        n = 2 * len(own)
        return value / n + (score - score.detach()) / n
