"""Exact gradients and one-draw variances for a normal z = mean + scale eps, by quadrature.

For smooth f every moment below is a one-dimensional integral (two for the coupled scale), taken with Gauss-Legendre nodes over the
12 standard deviations that matter: about 12 digits for the costs of the variance study.

    pathwise        f'(z) {1, eps}                       score    (f - c) s,   s = {eps, eps^2 - 1} / scale,   c = 0 or c*
    measure-valued  [f(mean + scale R) - f(mean - scale R)] / (scale sqrt(2 pi)),    [f(mean + scale D) - f(mean + scale D U)] / scale
    leave-one-out   K draws: (V_b + (C^2 + I Var f) / (K - 1)) / K,  V_b = Var((f - E f) s),  C gradient,  I = E s^2

The variance of leave-one-out is that of the K-draw estimate times K, so that all are per draw.
Reference: S. Mohamed, M. Rosca, M. Figurnov, A. Mnih, JMLR 21 (2020) 132.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdesens.errors import ArgumentError

REACH = 12.0
NODES = (400, 800, 1600)


class Exact(NamedTuple):
    """A gradient and, by method, the variance of one draw's contribution to it."""

    gradient: float
    variance: dict[str, float]


def normal_variances(f: Callable[[Tensor], Tensor], mean: float, scale: float, group: int = 2) -> dict[str, Exact]:
    """By parameter, "mean" and "scale", for a smooth f of one number.

    Raises
    ------
    ArgumentError
        If f is too rough for 1,600 nodes.

    Example
    -------
    >>> found = normal_variances(lambda z: z**2, 1.0, 1.0)["mean"]
    >>> round(found.gradient, 9), round(found.variance["pathwise"], 9), round(found.variance["score_function"], 9)
    (2.0, 4.0, 30.0)
    """
    n = next((n for n in NODES if _enough(f, mean, scale, n)), None)
    if n is None:
        raise ArgumentError(
            "`f` is too rough for the quadrature: it must be smooth, on a scale not far below that of the law."
        )
    eps, w, value, slope = _on_nodes(f, mean, scale, n)

    def expect(h: Tensor) -> float:
        return float((w * h).sum())

    spread = expect(value.square()) - expect(value) ** 2
    answers = {}
    for name, tangent, score in (
        ("mean", torch.ones_like(eps), eps / scale),
        ("scale", eps, (eps.square() - 1) / scale),
    ):
        g = expect(slope * tangent)
        information = expect(score.square())
        best = expect(value * score.square()) / information
        around = expect(((value - expect(value)) * score).square()) - g**2
        variances = {
            "pathwise": expect((slope * tangent).square()) - g**2,
            "score_function": expect((value * score).square()) - g**2,
            "score_function (baseline=optimal)": expect(((value - best) * score).square()) - g**2,
            f"rloo (group={group})": around + (g**2 + information * spread) / (group - 1),
            "measure_valued": (_by_rayleigh if name == "mean" else _by_maxwell)(f, mean, scale, n) - g**2,
        }
        answers[name] = Exact(g, {m: max(v, 0.0) for m, v in variances.items()})  # 0 is met to rounding
    return answers


def _on_nodes(
    f: Callable[[Tensor], Tensor], mean: float, scale: float, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """eps, weights of the normal law, f and f' there."""
    eps, w = _legendre(-REACH, REACH, n)
    with torch.enable_grad():
        z = (mean + scale * eps).requires_grad_()
        f_z = f(z)
        slope = torch.autograd.grad(f_z.sum(), z)[0]
    return eps, w * torch.exp(-0.5 * eps.square()) / math.sqrt(2 * math.pi), f_z.detach(), slope


def _enough(f: Callable[[Tensor], Tensor], mean: float, scale: float, n: int) -> bool:
    """Whether the moments with n nodes are those with some more."""
    found = []
    for nodes in (n, n + 37):
        _, w, value, slope = _on_nodes(f, mean, scale, nodes)
        found.append(torch.stack([(w * g).sum() for g in (value, value.square(), slope, slope.square())]))
    size = found[0].abs().max()
    return bool(((found[0] - found[1]).abs() <= 1e-10 * size).all())


def _by_rayleigh(f: Callable[[Tensor], Tensor], mean: float, scale: float, n: int) -> float:
    """Second moment of the coupled estimate for the mean."""
    r, w = _legendre(0.0, REACH, n)
    difference = (f(mean + scale * r) - f(mean - scale * r)) / (scale * math.sqrt(2 * math.pi))
    return float((w * r * torch.exp(-0.5 * r.square()) * difference.square()).sum())


def _by_maxwell(f: Callable[[Tensor], Tensor], mean: float, scale: float, n: int) -> float:
    """Second moment of the coupled estimate for the scale."""
    (d, w), (u, v) = _legendre(-REACH, REACH, n), _legendre(0.0, 1.0, n)
    density = d.square() * torch.exp(-0.5 * d.square()) / math.sqrt(2 * math.pi)
    difference = (f(mean + scale * d)[:, None] - f(mean + scale * d[:, None] * u)) / scale
    return float(((w * density)[:, None] * v * difference.square()).sum())


_gauss = cache(np.polynomial.legendre.leggauss)


def _legendre(low: float, high: float, n: int) -> tuple[Tensor, Tensor]:
    nodes, weights = _gauss(n)
    half = (high - low) / 2
    return torch.from_numpy(low + half * (nodes + 1)), torch.from_numpy(half * weights)
