"""How certain a Monte Carlo number is.

A sum over independent units is kept as moments that can be added: for units of n_i paths with means m_i,

    n = sum n_i,   mean = sum n_i m_i / n,   M2 = sum n_i (m_i - mean)^2,                        (1)
    (a) + (b):  n = n_a + n_b,   M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / n              (2)

(T. Chan, G. Golub, R. LeVeque, Am. Stat. 37 (1983) 242). With U units, M2 / (U - 1) estimates the variance of one path
and the standard error is sqrt(M2 / (U - 1) / n), with U - 1 degrees of freedom.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError


class Interval(NamedTuple):
    """A confidence interval, tensors of the estimate's shape."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False)
class Estimate:
    """A Monte Carlo mean and its standard error.

    Attributes
    ----------
    mean, standard_error : Tensor, float64, one shape
        The standard error covers sampling only, not the bias of a finite step. NaN where it cannot be known (one unit, or
        weighted paths).
    n : int
        Paths; 0 for a number that is known exactly.
    dof : int
        Degrees of freedom of the standard error.

    Example
    -------
    >>> Estimate.from_samples(torch.tensor([1.0, 2.0, 3.0, 2.0]))
    2.0 +/- 1.3 (95% CI, n=4)
    """

    mean: Tensor
    standard_error: Tensor
    n: int
    dof: int

    @classmethod
    def from_samples(cls, samples: Tensor) -> "Estimate":
        """From independent samples, shape (n, ...), n >= 2."""
        if not isinstance(samples, Tensor):
            raise ArgumentTypeError(
                f"`samples` must be a tensor, got {type(samples).__name__}: use torch.as_tensor(...)."
            )
        if samples.is_complex():
            raise ArgumentTypeError(f"`samples` must be real, got {samples.dtype}: estimate real and imaginary part.")
        if samples.dim() < 1 or samples.shape[0] < 2:
            raise ShapeError(
                f"`samples` must hold at least two rows, got shape {tuple(samples.shape)}: one has no standard error."
            )
        return Moments.of_units(samples, 1).estimate()

    def confidence_interval(self, level: float = 0.95) -> Interval:
        """Student's t interval: mean -+ quantile x standard error."""
        if not 0 < level < 1:
            raise ArgumentError(f"`level` must lie strictly between 0 and 1, got {level}: 0.95 is usual.")
        half = self._half_width(level)
        return Interval(self.mean - half, self.mean + half)

    def _half_width(self, level: float) -> Tensor:
        return self.standard_error * (stats.t.ppf(0.5 + level / 2, self.dof) if self.dof > 0 else math.nan)

    def to_dict(self) -> dict:
        """Plain numbers (nested lists for tensors)."""
        return {
            "mean": self.mean.tolist(),
            "standard_error": self.standard_error.tolist(),
            "n": self.n,
            "dof": self.dof,
        }

    def __repr__(self) -> str:
        if self.mean.numel() > 6:
            mean, error = (float(x.norm()) for x in (self.mean, self.standard_error))
            return f"Estimate(shape={tuple(self.mean.shape)}, n={self.n}), norm {mean:.4g}, norm of standard errors {error:.2g}"
        if self.n == 0:
            return f"{_listed(self.mean, [f'{m:.6g}' for m in self.mean.flatten().tolist()])} (exact)"
        pairs = zip(self.mean.flatten().tolist(), self._half_width(0.95).flatten().tolist(), strict=True)
        text = [_with_error(m, h) for m, h in pairs]
        return f"{_listed(self.mean, text)} (95% CI, n={self.n})"


def _listed(x: Tensor, text: list[str]) -> str:
    return text[0] if x.dim() == 0 else "[" + ", ".join(text) + "]"


def _with_error(mean: float, half: float) -> str:
    """`mean +/- half`, the half-width to two digits and the mean to the same decimal place."""
    if not (math.isfinite(half) and half > 1e-13 * abs(mean)):  # no spread but rounding
        return f"{mean:.10g} +/- {half:.2g}"
    decimals = 1 - math.floor(math.log10(half))
    if -4 < decimals < 12:
        return f"{mean:.{max(decimals, 0)}f} +/- {half:.{max(decimals, 0)}f}"
    digits = math.floor(math.log10(abs(mean) or half)) + decimals
    return f"{mean:.{min(max(digits, 1), 16)}e} +/- {half:.1e}"


@dataclass(frozen=True, eq=False)
class Moments:
    """Equation (1) for one block of paths."""

    n: int
    units: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of_units(cls, means: Tensor, size: int) -> "Moments":
        """From the means (U, ...) of U units of `size` paths each."""
        means = means.detach().to(torch.float64)
        mean = means.mean(0)
        return cls(size * means.shape[0], means.shape[0], mean, size * (means - mean).square().sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        n = self.n + other.n
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.n / n)
        return Moments(n, self.units + other.units, mean, self.m2 + other.m2 + shift.square() * (self.n * other.n / n))

    def estimate(self, *, weighted: bool = False) -> Estimate:
        """The mean with its standard error."""
        dof = self.units - 1
        if dof < 1 or weighted:
            return Estimate(self.mean, torch.full_like(self.mean, math.nan), self.n, 0)
        return Estimate(self.mean, (self.m2 / dof / self.n).sqrt(), self.n, dof)


def total(moments: Iterable[Moments]) -> Moments:
    """Sum by equation (2), in the given order."""
    return reduce(Moments.__add__, moments)
