"""The same noise while a parameter moves: theta -> X(theta; Z) and theta -> F(theta; Z), a curve for each path.

On n + 1 Chebyshev points of an interval the curve's polynomial of degree n is known to rounding where the curve is analytic near the
interval: its Chebyshev coefficients fall geometrically, and its slope is the curve's. Those of a curve that only has a finite number of
derivatives fall like a power, and those of a jump like 1/k.

Reference: L. N. Trefethen, Approximation Theory and Approximation Practice, 2013, chapters 7 and 8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.polynomial import Chebyshev
from numpy.polynomial.chebyshev import chebpts2
from torch import Tensor

from sdesens.errors import ArgumentError, ShapeError
from sdesens.integrate import sdeint
from sdesens.noise import Noise, Philox
from sdesens.problem import Problem


@dataclass(frozen=True, eq=False)
class Family:
    """Paths of one noise at several values of a parameter.

    Attributes
    ----------
    name : str
    values : Tensor (M,), float64
        Of the parameter, rising.
    ts : Tensor (T,)
    ys : Tensor (M, T, B, *event)
        Every grid point.
    F : Tensor (M, B)
        The functional of each path.
    """

    name: str
    values: Tensor
    ts: Tensor
    ys: Tensor
    F: Tensor

    def polynomials(self) -> list[Chebyshev]:
        """theta -> F of each path, the polynomial through the values; they must be Chebyshev points (`chebyshev_points`)."""
        low, high = float(self.values[0]), float(self.values[-1])
        wanted = chebyshev_points(low, high, len(self.values) - 1)
        if not torch.allclose(self.values, wanted, rtol=0, atol=1e-12 * max(abs(low), abs(high))):
            raise ArgumentError(
                "polynomials go through Chebyshev points: make the family at chebyshev_points(low, high, n)."
            )
        degree = len(self.values) - 1
        return [Chebyshev.fit(self.values.numpy(), f.numpy(), degree, domain=[low, high]) for f in self.F.mT]


def chebyshev_points(low: float, high: float, n: int) -> Tensor:
    """n + 1 points from low to high, densest at the ends, shape (n + 1,), float64.

    Example
    -------
    >>> chebyshev_points(0.0, 2.0, 2)
    tensor([0., 1., 2.], dtype=torch.float64)
    """
    if not -math.inf < low < high < math.inf:
        raise ArgumentError(f"`low` must lie below `high`, both finite, got {low!r} and {high!r}.")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ArgumentError(f"`n` must be a positive int, got {n!r}.")
    return torch.from_numpy(low + (high - low) * (1 + chebpts2(n + 1)) / 2)


def family(
    problem: Problem,
    wrt: str,
    values: Tensor | Sequence[float],
    *,
    n_paths: int = 5,
    seed: int = 0,
    noise: Noise | None = None,
) -> Family:
    """Solve a problem at several values of one parameter, on the same noise.

    Parameters
    ----------
    problem : Problem
    wrt : str
        A 0-dim parameter of its SDE, or "y0" for a state of one number.
    values : (M,), rising
    n_paths, seed : int
        Path i is that of `sensitivity` with the same seed.
    noise : Noise, optional
        Instead of `seed`.

    Raises
    ------
    UnknownParameterError, ShapeError, ArgumentError

    Example
    -------
    >>> from sdesens.models import gbm
    >>> found = family(gbm(n_steps=16).problem, "sigma", chebyshev_points(0.1, 0.3, 8), n_paths=3)
    >>> found.ys.shape, found.F.shape
    (torch.Size([9, 17, 3, 1]), torch.Size([9, 3]))
    """
    if not isinstance(wrt, str) or wrt == "t1":
        raise ArgumentError(f"`wrt` must be the name of one parameter, or 'y0', got {wrt!r:.60}.")
    leaves = problem.leaves(wrt)
    if len(leaves) != 1 or wrt not in leaves or leaves[wrt].numel() != 1:
        shapes = ", ".join(f"{k} of shape {tuple(v.shape)}" for k, v in leaves.items())
        raise ShapeError(f"`wrt` must name one parameter of one number, and {wrt!r} is {shapes}.")
    if isinstance(n_paths, bool) or not isinstance(n_paths, int) or n_paths < 1:
        raise ArgumentError(f"`n_paths` must be a positive int, got {n_paths!r}.")
    leaf = leaves[wrt]
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.dim() != 1 or len(values) < 2 or not bool((values.diff() > 0).all()):
        raise ArgumentError(
            f"`values` must rise, (M,) with M of 2 or more, got {values.tolist() if values.dim() else values!r}."
        )
    ts = torch.linspace(problem.t0, problem.t1, problem.n_steps + 1, dtype=torch.float64)
    noise, ys, F = noise or Philox(seed), [], []
    for value in values:
        sde = problem.sde if wrt == "y0" else problem.sde.with_params(**{wrt: value.reshape(leaf.shape).to(leaf)})
        y0 = value.reshape(leaf.shape).to(leaf) if wrt == "y0" else problem.initial(sde.params)
        with torch.no_grad():
            path = sdeint(sde, y0.expand(n_paths, *y0.shape), ts.tolist(), n_steps=problem.n_steps, bm=noise)
            F.append(problem.functional(path[list(problem.outputs)], sde.params))
            if F[-1].shape != (n_paths,):
                raise ShapeError(f"`functional` must return one number a path, ({n_paths},), got {tuple(F[-1].shape)}.")
        ys.append(path)
    return Family(wrt, values, ts, torch.stack(ys), torch.stack(F).double())
