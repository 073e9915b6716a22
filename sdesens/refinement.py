"""How the routes to a gradient behave as dt shrinks, path by path, on one set of Brownian paths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdesens.noise import Coarsened, Noise, Philox
from sdesens.problem import Problem, Theta
from sdesens.sensitivity import METHODS
from sdesens.sensitivity.probe import check_problem, survives_vmap
from sdesens.sensitivity.tile import Tile

FINER = 16  # with order 1/2 the limit's own error is a quarter of the finest grid's


@dataclass(frozen=True)
class Refinement:
    """How the routes behave as dt shrinks, on one set of Brownian paths.

    Attributes
    ----------
    n_steps : tuple of int
    dt : tuple of float
    deviation : dict of tuple
        Method: RMS over paths of its gradient minus the pathwise one on the same grid, relative, for each grid.
    error : dict of tuple
        Method: RMS of its gradient minus the pathwise one on a grid 16 times finer than the finest, which stands for the
        derivative of the SDE's own path.
    """

    n_steps: tuple[int, ...]
    dt: tuple[float, ...]
    deviation: dict[str, tuple[float, ...]]
    error: dict[str, tuple[float, ...]]

    def order(self, method: str, of: str = "deviation") -> float:
        """Fitted slope of log error against log dt; NaN where there is nothing but rounding."""
        rows = {"deviation": self.deviation, "error": self.error}[of][method]
        if min(rows) <= 0:
            return math.nan
        x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (self.dt, rows))
        x = x - x.mean()
        return float((x * y).sum() / (x * x).sum())

    def deviates(self, method: str) -> bool:
        """Whether the method differs from the pathwise gradient by more than rounding."""
        return max(self.deviation[method]) > 1e-6


def refine(problem: Problem, methods: Sequence[str], theta: Theta, n_paths: int, seed: int) -> Refinement:
    """Per-path gradients of every method on coupled grids."""
    n = problem.n_steps
    grids = (n // 4, n // 2, n) if n % 4 == 0 and _fits(problem, n // 4) else (n, 2 * n, 4 * n)
    finest = FINER * grids[-1]
    noise = Philox(seed)
    noise_dim = check_problem(problem, theta)
    vectorised = survives_vmap(problem, theta, noise_dim)
    n_paths = max(min(n_paths, int(2e7 // max(sum(v.numel() for v in theta.values()), 1))), 1)

    def gradients(method: str, steps: int) -> dict[str, Tensor]:
        source: Noise = noise if steps == finest else Coarsened(noise, finest // steps)
        tile = Tile(problem.with_steps(steps), source, 0, n_paths, 1, noise_dim, vectorised)
        return METHODS[method](tile, theta).gradients

    limit = gradients("pathwise", finest)
    deviation: dict[str, list[float]] = {m: [] for m in methods}
    error: dict[str, list[float]] = {m: [] for m in methods}
    for steps in grids:
        scheme = gradients("pathwise", steps)
        for method in methods:
            own = scheme if method == "pathwise" else gradients(method, steps)
            deviation[method].append(_distance(own, scheme))
            error[method].append(_distance(own, limit))
    return Refinement(
        grids,
        tuple((problem.t1 - problem.t0) / k for k in grids),
        {k: tuple(v) for k, v in deviation.items()},
        {k: tuple(v) for k, v in error.items()},
    )


def _fits(problem: Problem, n_steps: int) -> bool:
    """Whether every output time lies on a coarser grid, with a few steps left."""
    factor = problem.n_steps // n_steps
    return n_steps >= 4 and all(k % factor == 0 for k in problem.outputs)


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """RMS over paths of a - b, relative to the RMS of b: the largest over parameters; NaN if any of it is."""
    ratios = []
    for k in b:
        size = b[k].double().square().mean().sqrt()
        gap = (a[k] - b[k]).double().square().mean().sqrt()
        ratios.append(torch.where((size == 0) & (gap == 0), 0.0, gap / size))
    return float(torch.stack(ratios).max())
