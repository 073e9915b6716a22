"""How the routes to a gradient behave as dt shrinks, path by path, on one set of Brownian paths."""

import math
from collections.abc import Iterable, Sequence
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
    by_parameter : dict of dict of tuple
        The deviation in one parameter: method, name, grids. `deviation` is the largest of them.
    error : dict of tuple
        Method: RMS of its gradient minus the pathwise one on a grid 16 times finer than the finest, which stands for the
        derivative of the SDE's own path.
    """

    n_steps: tuple[int, ...]
    dt: tuple[float, ...]
    deviation: dict[str, tuple[float, ...]]
    by_parameter: dict[str, dict[str, tuple[float, ...]]]
    error: dict[str, tuple[float, ...]]

    def order(self, method: str, of: str = "deviation") -> float:
        """Fitted slope of log error against log dt; NaN where there is nothing but rounding."""
        return self._slope({"deviation": self.deviation, "error": self.error}[of][method])

    def order_in(self, method: str, name: str) -> float:
        """The order at which a method's gradient in one parameter approaches the pathwise one."""
        return self._slope(self.by_parameter[method][name])

    def _slope(self, errors: tuple[float, ...]) -> float:
        if min(errors) <= 0:
            return math.nan
        x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (self.dt, errors))
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
    y0 = problem.initial({})
    numbers = max(sum(v.numel() for v in theta.values()), y0.numel() * len(problem.outputs), noise_dim)
    n_paths = max(min(n_paths, int(2e6 // numbers)), 20)

    def gradients(method: str, steps: int) -> dict[str, Tensor]:
        source: Noise = noise if steps == finest else Coarsened(noise, finest // steps)
        tile = Tile(problem.with_steps(steps), source, 0, n_paths, 1, noise_dim, vectorised)
        return METHODS[method](tile, theta).gradients

    limit = gradients("pathwise", finest)
    deviation: dict[str, dict[str, list[float]]] = {m: {k: [] for k in theta} for m in methods}
    error: dict[str, list[float]] = {m: [] for m in methods}
    for steps in grids:
        scheme = gradients("pathwise", steps)
        for method in methods:
            own = scheme if method == "pathwise" else gradients(method, steps)
            for name, gap in _distances(own, scheme).items():
                deviation[method][name].append(gap)
            error[method].append(_largest(_distances(own, limit).values()))
    return Refinement(
        grids,
        tuple((problem.t1 - problem.t0) / k for k in grids),
        {m: tuple(map(_largest, zip(*rows.values(), strict=True))) for m, rows in deviation.items()},
        {m: {k: tuple(v) for k, v in rows.items()} for m, rows in deviation.items()},
        {k: tuple(v) for k, v in error.items()},
    )


def _fits(problem: Problem, n_steps: int) -> bool:
    """Whether every output time lies on a coarser grid, with enough steps left to show an order."""
    factor = problem.n_steps // n_steps
    return n_steps >= 16 and all(k % factor == 0 for k in problem.outputs)


def _distances(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """RMS over paths of a - b, relative to the RMS of b, by parameter; NaN if any of it is."""
    ratios = {}
    for name in b:
        size = b[name].double().square().mean().sqrt()
        gap = (a[name] - b[name]).double().square().mean().sqrt()
        ratios[name] = float(torch.where((size == 0) & (gap == 0), 0.0, gap / size))
    return ratios


def _largest(values: Iterable[float]) -> float:
    """The maximum, or NaN if one is: unlike max(0.0, nan)."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())
