"""How rough a curve is: the same three questions asked of a path in time and of a random number in a parameter.

From values x_0, ..., x_N at equal distances, over the lags h = 2^k of them,

    a(h) = mean |x_{i+h} - x_i|,      a(h)/h,      Q(h) = sum (x_{i+h} - x_i)^2,                  (1)

increments that do not overlap. A curve with a(h) ~ h^H has the exponent H: 1 for a smooth one, whose difference quotients a(h)/h settle
and whose sum of squares vanishes as h does; 1/2 for a Brownian path, whose quotients grow like h^-1/2 and whose sum of squares settles at
its quadratic variation, t for a standard Brownian motion.

Reference: I. Karatzas, S. Shreve, Brownian Motion and Stochastic Calculus, 1991, theorems 1.5.8 and 2.9.18.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.estimate import Estimate
from sdesens.tensors import describe

PARTS = 16  # of a curve, each with an exponent of its own
FEWEST = 16  # increments of a part at the longest lag
LARGEST = 1e140


@dataclass(frozen=True, eq=False)
class Roughness:
    """Equation (1) at lags of 1, 2, 4, ... values.

    Attributes
    ----------
    lags : Tensor (L,), float64
        h, in the unit of the curve's argument.
    increments : Tensor (L,)
        a(h).
    variation : Tensor (L,)
        Q(h), over the whole curve.
    exponent : Estimate, 0-dim
        H, the slope of log a in log h by least squares; its standard error from sixteen stretches of the curve.
    """

    lags: Tensor
    increments: Tensor
    variation: Tensor
    exponent: Estimate

    @property
    def quotients(self) -> Tensor:
        """a(h)/h, (L,)."""
        return self.increments / self.lags


def roughness(x: Tensor, distance: float, *, n_lags: int = 8) -> Roughness:
    """Measure the roughness of a curve, equation (1).

    Parameters
    ----------
    x : Tensor, shape (N + 1,)
        Values at equal distances of the argument; N a multiple of 2^(n_lags - 1), and at least 256 times that.
    distance : float
        Between neighbouring values, in the unit of the argument.
    n_lags : int
        Lags 1, 2, ..., 2^(n_lags - 1).

    Raises
    ------
    ArgumentTypeError, ShapeError, ArgumentError

    Example
    -------
    >>> t = torch.linspace(0, 1, 2**12 + 1, dtype=torch.float64)
    >>> round(float(roughness(torch.sin(t), 2.0**-12, n_lags=4).exponent.mean), 6)
    1.0
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ArgumentTypeError(f"`x` must be a floating tensor (N + 1,), got {describe(x)}.")
    if isinstance(n_lags, bool) or not isinstance(n_lags, int) or not 2 <= n_lags <= 40:
        raise ArgumentError(f"`n_lags` must be an int from 2 to 40, got {n_lags!r}.")
    longest = 2 ** (n_lags - 1)
    n = len(x) - 1 if x.dim() == 1 else 0
    if n < PARTS * FEWEST * longest or n % (PARTS * longest):
        raise ShapeError(
            f"`x` must have shape (N + 1,), N a multiple of {PARTS * longest} and at least {PARTS * FEWEST * longest} for `n_lags` = {n_lags}, got "
            f"{tuple(x.shape)}."
        )
    if isinstance(distance, bool) or not isinstance(distance, int | float) or not 0 < distance < math.inf:
        raise ArgumentError(f"`distance` must be a finite number above 0, got {distance!r}.")
    if not bool(torch.isfinite(x).all()) or float(x.detach().double().abs().max()) > LARGEST:
        raise ArgumentError(f"`x` holds NaN or infinite values, or some beyond {LARGEST:g}, whose squares overflow.")
    x = x.detach().double()
    sizes = [2**k for k in range(n_lags)]
    increments = [x[::h].diff().abs() for h in sizes]
    lags = distance * torch.tensor(sizes, dtype=torch.float64)
    a = torch.stack([d.unflatten(0, (PARTS, -1)).mean(1) for d in increments])  # (L, PARTS)
    if not bool((a > 0).all()):
        raise ArgumentError(
            "`x` does not change over a stretch at some lag, where no exponent is defined: it is constant or repeats itself."
        )
    off = (lags.log() - lags.log().mean())[:, None]
    slopes = (off * a.log()).sum(0) / off.square().sum()
    whole = a.mean(1)
    exponent = Estimate.from_samples(slopes)
    return Roughness(lags, whole, torch.stack([d.square().sum() for d in increments]), exponent)


def roughness_table(found: Mapping[str, Roughness]) -> Table:
    """What varies, and whether the curve is differentiable in it: exponents, quotients and sums of squares at the longest and the shortest lag.

    Parameters
    ----------
    found : mapping of str to Roughness
        By what varies (and what is fixed).
    """
    table = Table()
    for head in (
        "what varies",
        "exponent",
        "mean |quotient|, longest to shortest lag",
        "sum of squares, longest to shortest",
        "differentiable",
    ):
        table.add_column(head)
    for name, r in found.items():
        ends = [(f"{float(v[-1]):.3g}", f"{float(v[0]):.3g}") for v in (r.quotients, r.variation)]
        smooth = float(r.exponent.mean) > 0.9
        table.add_row(
            name,
            f"{float(r.exponent.mean):.3f} +/- {1.96 * float(r.exponent.standard_error):.3f}",
            *(f"{a} to {b}" for a, b in ends),
            "yes: quotients settle" if smooth else "no: quotients grow",
        )
    return table
