"""Which estimator varies least? The study of Mohamed et al. 2020: three costs, a normal law, the cost's parameter swept.

    quadratic  (z - k)^2          exp  exp(-k z^2)          cos  cos(k z)                        (1)

Sampled one-draw variances beside the exact ones, and the k where pathwise and score function change places: for cos(k z) near
k = 1 / scale, beyond which the score function wins; for exp(-k z^2) likewise, when the peak becomes sharp.
Reference: S. Mohamed, M. Rosca, M. Figurnov, A. Mnih, JMLR 21 (2020) 132, section 3 and figures 2 and 3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from rich.table import Table
from scipy import optimize
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.estimators.exact import Exact, normal_variances
from sdesens.estimators.gaussian import Normal
from sdesens.estimators.gradient import expectation_gradient
from sdesens.tables import as_text


def quadratic(z: Tensor, k: float) -> Tensor:
    """(z - k)^2."""
    return (z - k).square()


def exponential(z: Tensor, k: float) -> Tensor:
    """exp(-k z^2)."""
    return torch.exp(-k * z.square())


def cosine(z: Tensor, k: float) -> Tensor:
    """cos(k z)."""
    return torch.cos(k * z)


COSTS: dict[str, tuple[Callable[[Tensor, float], Tensor], str, tuple[float, ...]]] = {
    "quadratic": (quadratic, "(z - k)^2", tuple(i / 2 for i in range(-6, 7))),
    "exp": (exponential, "exp(-k z^2)", (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 1.0, 1.4, 2.0, 3.0, 5.0, 8.0)),
    "cos": (cosine, "cos(k z)", (0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.8, 2.2, 2.8, 3.6, 5.0)),
}
METHODS: dict[str, tuple[str, dict]] = {
    "pathwise": ("pathwise", {}),
    "score_function": ("score_function", {}),
    "score_function (baseline=optimal)": ("score_function", {"baseline": "optimal"}),
    "rloo (group=2)": ("rloo", {"group": 2}),
    "measure_valued": ("measure_valued", {}),
}


@dataclass(frozen=True)
class Point:
    """One cost, one k, one parameter: gradient and one-draw variances, sampled and exact, by method."""

    cost: str
    k: float
    parameter: str
    gradient: dict[str, float]
    variance: dict[str, float]
    exact: Exact


@dataclass(frozen=True)
class Study:
    """The answer of `variance_study`.

    Attributes
    ----------
    points : tuple of Point
    crossings : dict (cost, parameter) -> (found, exact)
        Where the variances of pathwise and score function are equal: by interpolating the sampled ones, and by root finding on
        the exact ones. Only where they cross inside the swept range.
    n_samples : int
    """

    points: tuple[Point, ...]
    crossings: dict[tuple[str, str], tuple[float, float]]
    mean: float
    scale: float
    n_samples: int

    def select(self, cost: str, parameter: str) -> list[Point]:
        """The points of one curve, in order of k."""
        return [p for p in self.points if (p.cost, p.parameter) == (cost, parameter)]

    def rows(self) -> list[dict]:
        """One flat record for each point and method: for a file."""
        return [
            {
                "cost": p.cost,
                "k": p.k,
                "parameter": p.parameter,
                "method": m,
                "gradient": p.gradient[m],
                "exact_gradient": p.exact.gradient,
                "variance": v,
                "exact_variance": p.exact.variance[m],
            }
            for p in self.points
            for m, v in p.variance.items()
        ]

    def table(self) -> Table:
        """Sampled and exact variances at every third k; a star marks the least exact one."""
        table = Table(
            "cost", "k", "d/d", "gradient", *METHODS, title=f"one-draw variance, sampled / exact; z ~ N({self.mean:g}, {self.scale:g}^2)"
        )  # fmt: skip
        for p in self.points:
            if COSTS[p.cost][2].index(p.k) % 3:
                continue
            least = min(p.exact.variance.values())
            cells = [
                f"{v:.3g} / {p.exact.variance[m]:.4g}" + (" *" if p.exact.variance[m] == least else "")
                for m, v in p.variance.items()
            ]
            formula = COSTS[p.cost][1]
            table.add_row(formula, f"{p.k:g}", p.parameter, f"{p.exact.gradient:.4g}", *cells)
        return table

    def __repr__(self) -> str:
        return as_text(self.table())


def variance_study(
    *,
    mean: float = 1.0,
    scale: float = 1.0,
    n_samples: int = 100_000,
    seed: int = 0,
    costs: tuple[str, ...] = tuple(COSTS),
) -> Study:
    """Sample the gradient's variance for every cost, k and method, and compute it exactly.

    Parameters
    ----------
    mean, scale : float
        Of the normal law; scale is a standard deviation.
    n_samples : int
        Draws at each point: even, at least 4.
    seed : int
    costs : names among "quadratic", "exp", "cos"

    Raises
    ------
    ArgumentError
    """
    if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 4 or n_samples % 2:
        raise ArgumentError(f"`n_samples` must be even, for pairs of draws, and at least 4, got {n_samples!r}.")
    for cost in costs:
        if cost not in COSTS:
            raise ArgumentError(f"`costs` names {cost!r}, which is none of {', '.join(map(repr, COSTS))}.")
    params = {"mean": torch.tensor(mean, dtype=torch.float64), "scale": torch.tensor(scale, dtype=torch.float64)}
    points = []
    for cost in costs:
        for k in COSTS[cost][2]:
            f = at(cost, k)
            exact = normal_variances(f, mean, scale)
            found = {
                label: expectation_gradient(
                    Normal, lambda z, p, f=f: f(z), params, n_samples=n_samples, method=m, seed=seed, check=False, **options
                )
                for label, (m, options) in METHODS.items()
            }  # fmt: skip
            for name in params:
                by_method = {label: r.gradient[name] for label, r in found.items()}
                points.append(
                    Point(
                        cost,
                        k,
                        name,
                        {m: float(e.mean) for m, e in by_method.items()},
                        {m: float(e.standard_error**2 * e.n) for m, e in by_method.items()},
                        exact[name],
                    )
                )
    study = Study(tuple(points), {}, mean, scale, n_samples)
    for cost in costs:
        for name in params:
            crossing = _crossing(study, cost, name)
            if crossing is not None:
                study.crossings[cost, name] = crossing
    return study


def at(cost: str, k: float) -> Callable[[Tensor], Tensor]:
    """A cost at its parameter, as a function of z alone."""
    f = COSTS[cost][0]
    return lambda z: f(z, k)


def _crossing(study: Study, cost: str, parameter: str) -> tuple[float, float] | None:
    points = study.select(cost, parameter)
    gaps = [math.log(p.variance["pathwise"] / p.variance["score_function"]) for p in points]
    for (p, low), (q, high) in pairwise(zip(points, gaps, strict=True)):
        if low < 0 <= high:
            found = p.k + (q.k - p.k) * low / (low - high)
            return found, crossing(cost, parameter, study.mean, study.scale, p.k / 1.5, q.k * 1.5)
    return None


def crossing(cost: str, parameter: str, mean: float, scale: float, low: float, high: float) -> float:
    """The k between low and high where pathwise and score function have the same exact variance.

    Example
    -------
    >>> round(crossing("cos", "mean", 1.0, 1.0, 0.5, 2.0), 4)
    1.0638
    """

    def gap(k: float) -> float:
        v = normal_variances(at(cost, k), mean, scale)[parameter].variance
        return math.log(v["pathwise"] / v["score_function"])

    return float(optimize.brentq(gap, low, high))
