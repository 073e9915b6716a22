"""Means over one Gaussian step: what is left of a functional when its last increment is averaged out.

For X ~ N(m, v), s = sqrt(v), and c = 1 for a call, -1 for a put:

    E 1{X > K}         = Phi(D),                                   D = (m - K) / s,              (1)
    E (c (X - K))^+    = s [c D Phi(c D) + phi(D)],                                              (2)
    E (c (e^X - K))^+  = c [e^{m + v/2} Phi(c (D + s)) - K Phi(c D)],   D = (m - log K) / s,     (3)
    E e^{-uX}          = e^{-um + u^2 v / 2},                                                    (4)
    E X^k              = sum_j C(k, 2j) (2j - 1)!! v^j m^(k - 2j),                               (5)
    P(a Brownian bridge from X_n to X_{n+1} stays above 0) = 1 - exp(-2 X_n^+ X_{n+1}^+ / v),    (6)

with v in (6) the variance of the whole step. (3) is the formula of F. Black, Journal of Financial Economics 3 (1976) 167;
(6) is in P. Glasserman, Monte Carlo Methods in Financial Engineering, 2003, section 6.4.

All are smooth where v > 0. Where v is 0 nothing is random, and the result is the function itself at the mean; the square
root and the quotient see harmless numbers there, so that neither forward nor reverse mode meets 0/0. This file knows no
paths and no payoffs; `sdesens.functionals` puts these together.
"""

import math

import torch
from torch import Tensor
from torch.special import ndtr as Phi

CERTAIN = 800.0  # exponents beyond which exp(-x) is 0 in float64


def positive_sqrt(x: Tensor) -> Tensor:
    """sqrt(x) for x > 0, else 0, with derivative 0 there in reverse and in forward mode.

    The root sees 1 where x <= 0: sqrt(clamp(x, 0)) alone gives NaN in forward mode, `where` alone NaN in reverse.
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def normal_digital(mean: Tensor, variance: Tensor, strike: float | Tensor) -> Tensor:
    """Equation (1), element by element; without variance 1 above the strike, 1/2 at it, 0 below.

    Example
    -------
    >>> normal_digital(torch.tensor([1.0, 1.0]), torch.tensor([4.0, 0.0]), 1.0)
    tensor([0.5000, 0.5000])
    """
    random = variance > 0
    gain = mean - strike
    smooth = Phi(gain / torch.where(random, variance, 1.0).sqrt())
    return torch.where(random, smooth, 0.5 + 0.5 * torch.sign(gain))


def lognormal_digital(mean: Tensor, variance: Tensor, strike: float | Tensor) -> Tensor:
    """E 1{e^X > K}: equation (1) at log K, and 1 where K <= 0."""
    K = torch.zeros_like(mean) + strike
    positive = K > 0
    return torch.where(positive, normal_digital(mean, variance, torch.where(positive, K, 1.0).log()), 1.0)


def normal_option(mean: Tensor, variance: Tensor, strike: float | Tensor, sign: float = 1.0) -> Tensor:
    """Equation (2), element by element; sign is c.

    Example
    -------
    >>> normal_option(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 0.0]), 1.0)      # 2 phi(0), and 3 - 1
    tensor([0.7979, 2.0000])
    """
    random = variance > 0
    gain = sign * (mean - strike)
    s = torch.where(random, variance, 1.0).sqrt()
    D = gain / s
    density = torch.exp(-0.5 * D.square()) / math.sqrt(2 * math.pi)
    return torch.where(random, gain * Phi(D) + s * density, gain.clamp(min=0))


def lognormal_option(mean: Tensor, variance: Tensor, strike: float | Tensor, sign: float = 1.0) -> Tensor:
    """Equation (3), element by element; sign is c. Where K <= 0 the price is above it for certain: (c (E e^X - K))^+."""
    K = torch.zeros_like(mean) + strike
    forward = torch.exp(mean + 0.5 * variance)  # at variance 0 too it is the forward that depends on the variance
    random = (variance > 0) & (K > 0)
    s = torch.where(random, variance, 1.0).sqrt()
    D = (mean - torch.where(random, K, 1.0).log()) / s
    smooth = sign * (forward * Phi(sign * (D + s)) - K * Phi(sign * D))
    return torch.where(random, smooth, (sign * (forward - K)).clamp(min=0))


def normal_exponential(mean: Tensor, variance: Tensor, rate: float) -> Tensor:
    """Equation (4); rate is u."""
    return torch.exp(-rate * mean + 0.5 * rate**2 * variance)


def normal_moment(mean: Tensor, variance: Tensor, power: int) -> Tensor:
    """Equation (5), element by element, for a power k = 0, 1, 2, ..."""
    odd = [math.prod(range(1, 2 * j, 2)) for j in range(power // 2 + 1)]  # (2j - 1)!!
    terms = [math.comb(power, 2 * j) * odd[j] * variance**j * mean ** (power - 2 * j) for j in range(len(odd))]
    return torch.stack(terms).sum(0)


def bridge_survival(above: Tensor, variance: Tensor) -> Tensor:
    """Product over steps of equation (6): the chance that a path with these grid points stays above 0 between them too.

    Parameters
    ----------
    above : Tensor, shape (N + 1, *)
        Distance from the barrier at every grid point, positive on the living side.
    variance : Tensor, shape (N, *)
        Of the increment of each step.

    Returns
    -------
    Tensor, shape (*)
        0, with derivative 0, where a grid point is at the barrier or beyond it. Between two points above it a step without
        variance is a straight line, and safe.

    Example
    -------
    >>> bridge_survival(torch.tensor([1.0, 0.5, 2.0]), torch.tensor([2.0, 0.0]))    # 1 - exp(-1/2)
    tensor(0.3935)
    """
    closeness = 2 * above[:-1] * above[1:]
    # where 2 X_n X_{n+1} > 800 v the step is safe, and where it is not positive the path is dead: no quotient is needed
    open_ = (closeness > 0) & (closeness < CERTAIN * variance)
    exponent = torch.where(open_, closeness, 1.0) / torch.where(open_, variance, 1.0)
    alive = (above.amin(0) > 0) & (exponent > torch.finfo(above.dtype).tiny).all(0)
    # logarithms are summed: the derivative of a product divides by factors that may be 0
    stays = -torch.expm1(-torch.where(alive, exponent, 1.0))
    return torch.where(alive, torch.where(open_, stays.log(), 0.0).sum(0).exp(), 0.0)
