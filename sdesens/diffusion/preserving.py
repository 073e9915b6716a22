"""Schedules that keep the variance, alpha^2 + sigma^2 = 1, or nearly; equations (1)-(3) of `schedule.py`.

Those that do are one function B:

    alpha = exp(-B/2),   sigma^2 = 1 - exp(-B),   f = -B'/2,   g^2 = B',   lambda = -log(exp(B) - 1).            (1)

    schedule   alpha        sigma                 f             g^2                       B
    VP         e^(-B/2)     sqrt(1 - e^-B)        -B'/2         B'                        b0 t + (b1 - b0) t^2/2
    Cosine     cos(pi t/2)  sin(pi t/2)           -pi/2 tan     pi tan                    -2 log cos(pi t/2)
    SubVP      e^(-B/2)     1 - e^-B              -B'/2         B' (1 - e^-2B)            as VP

References: VP, SubVP: Y. Song et al., 2011.13456; cosine: A. Nichol, P. Dhariwal, 2102.09672 (without their offset).
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sdesens.diffusion.checks import number
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.values import double, require_increasing, root

HALF_PI = math.pi / 2
TINY = 1e-300  # so that 0 / 0 is 0


@dataclass(frozen=True, eq=False, repr=False)
class ByRate(Schedule):
    """Equation (1), by B, its derivative and its inverse."""

    @abstractmethod
    def B(self, t: Tensor) -> Tensor:
        """-log alpha_t^2."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """B'_t."""

    @abstractmethod
    def t_of_B(self, B: Tensor) -> Tensor:
        """The time at which B is this."""

    def _alpha(self, t):
        return torch.exp(-self.B(t) / 2)

    def _sigma(self, t):
        return root(-torch.expm1(-self.B(t)))

    def _log_snr(self, t):
        B = self.B(t)
        return -B - torch.log(-torch.expm1(-B))

    def _t_of_log_snr(self, log_snr):
        return self.t_of_B(softplus(-log_snr, threshold=700.0))  # B = log(1 + e^-lambda)

    def _f(self, t):
        return -self.beta(t) / 2

    def _g2(self, t):
        return self.beta(t)


@dataclass(frozen=True, eq=False, repr=False)
class VP(ByRate):
    """Variance preserving with a linear rate beta, that of DDPM in continuous time.

    Parameters
    ----------
    beta_min, beta_max : number or 0-dim Tensor, per time
        The rate at t = 0 and at t = 1.

    Example
    -------
    >>> VP()
    VP(beta_min=0.1, beta_max=20)
    >>> float(VP().alpha(1.0)), float(VP().sigma(0.0))
    (0.00657..., 0.0)
    """

    beta_min: float | Tensor = 0.1
    beta_max: float | Tensor = 20.0
    learnable: ClassVar[tuple[str, ...]] = ("beta_min", "beta_max")

    def __post_init__(self):
        super().__post_init__()
        require_increasing("beta_min", double(self.beta_min), "beta_max", double(self.beta_max), strict=False)

    def B(self, t):
        return t * (self.beta_min + 0.5 * self.dB * t)

    def beta(self, t):
        return self.beta_min + self.dB * t

    def t_of_B(self, B):
        low = double(self.beta_min)
        return 2 * B / (low + torch.sqrt(low**2 + 2 * self.dB * B)).clamp_min(TINY)

    @property
    def dB(self) -> Tensor:
        """Slope of the rate."""
        return double(self.beta_max) - double(self.beta_min)


@dataclass(frozen=True, eq=False, repr=False)
class SubVP(VP):
    """VP with less noise on the way, sigma = 1 - e^-B. Parameters as of VP.

    Example
    -------
    >>> bool(SubVP().sigma(0.2) < VP().sigma(0.2))
    True
    """

    def _sigma(self, t):
        return -torch.expm1(-self.B(t))

    def _log_snr(self, t):
        B = self.B(t)
        return -B - 2 * torch.log(-torch.expm1(-B))

    def _t_of_log_snr(self, log_snr):
        return self.t_of_B(2 * torch.asinh(torch.exp(-log_snr / 2) / 2))

    def _g2(self, t):
        return self.beta(t) * -torch.expm1(-2 * self.B(t))

    def _rates(self, t):  # finite at t = 0, too
        alpha = self._alpha(t)
        return self._f(t) * alpha, self.beta(t) * alpha**2


@dataclass(frozen=True, eq=False, repr=False)
class Cosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Parameters
    ----------
    min_log_snr : float
        Where it ends: the coefficients are infinite at t = 1, so that t_max is the time of this log-SNR, just before. With
        -math.inf the end is t = 1, where no signal is left.

    Example
    -------
    >>> 1 - Cosine().t_max < 3e-5
    True
    """

    min_log_snr: float = -20.0

    def __post_init__(self):
        super().__post_init__()
        if self.min_log_snr != -math.inf:
            number("min_log_snr", self.min_log_snr, -math.inf, 0.0, hint="-20 leaves pure noise")

    @property
    def t_max(self):
        return math.atan(math.exp(-self.min_log_snr / 2)) / HALF_PI if self.min_log_snr > -700 else 1.0

    def _alpha(self, t):
        return torch.cos(HALF_PI * t)

    def _sigma(self, t):
        return torch.sin(HALF_PI * t)

    def _log_snr(self, t):
        return -2 * torch.log(torch.tan(HALF_PI * t))

    def _t_of_log_snr(self, log_snr):
        return torch.atan(torch.exp(-log_snr / 2)) / HALF_PI

    def _f(self, t):
        return -HALF_PI * torch.tan(HALF_PI * t)

    def _g2(self, t):
        return math.pi * torch.tan(HALF_PI * t)

    def _rates(self, t):
        return -HALF_PI * self._sigma(t), HALF_PI * self._alpha(t)
