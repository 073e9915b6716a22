"""Schedules whose variance grows, and the straight line; equations (1)-(3) of `schedule.py`.

    schedule   alpha        sigma                 f             g^2
    VE         1            s0 (s1/s0)^t          0             2 sigma^2 log(s1/s0)
    EDM        1            t                     0             2 t
    CondOT     1 - t        t                     -1/(1 - t)    2 t/(1 - t)

References: VE: Y. Song et al., 2011.13456; EDM: T. Karras et al., 2206.00364; CondOT, the rectified flow: Y. Lipman et al.,
2210.02747, X. Liu et al., 2209.03003 (their clock is 1 - t).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdesens.diffusion.checks import number
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.values import double, require_increasing


@dataclass(frozen=True, eq=False, repr=False)
class VE(Schedule):
    """Variance exploding: the data stay, noise is added.

    Parameters
    ----------
    sigma_min, sigma_max : number or 0-dim Tensor, in units of the data
        Noise at t = 0 and at t = 1. The marginal has sigma_min at t = 0; the SDE, started at x_0, has none there.

    Example
    -------
    >>> float(VE(0.01, 50.0).sigma(0.0)), round(float(VE(0.01, 50.0).prior_std), 9)
    (0.01, 50.0)
    """

    sigma_min: float | Tensor = 0.01
    sigma_max: float | Tensor = 50.0
    learnable: ClassVar[tuple[str, ...]] = ("sigma_min", "sigma_max")

    def __post_init__(self):
        super().__post_init__()
        require_increasing("sigma_min", double(self.sigma_min), "sigma_max", double(self.sigma_max))

    @property
    def prior_std(self):
        return double(self.sigma_max)

    def _alpha(self, t):
        return torch.ones_like(t)

    def _sigma(self, t):
        return self.sigma_min * torch.exp(t * self._log_ratio())

    def _log_snr(self, t):
        return -2 * (torch.log(double(self.sigma_min)) + t * self._log_ratio())

    def _t_of_log_snr(self, log_snr):
        return (-log_snr / 2 - torch.log(double(self.sigma_min))) / self._log_ratio()

    def _f(self, t):
        return torch.zeros_like(t)

    def _g2(self, t):
        return 2 * self._sigma(t) ** 2 * self._log_ratio()

    def _log_ratio(self) -> Tensor:
        return torch.log(double(self.sigma_max) / double(self.sigma_min))


@dataclass(frozen=True, eq=False, repr=False)
class EDM(Schedule):
    """Time is the noise level itself, sigma = t, from 0 to sigma_max.

    Parameters
    ----------
    sigma_max : float, in units of the data

    Example
    -------
    >>> EDM().t_max
    80.0
    """

    sigma_max: float = 80.0

    def __post_init__(self):
        super().__post_init__()
        number("sigma_max", self.sigma_max, 0.0, hint="80 is usual")

    @property
    def t_max(self):
        return float(self.sigma_max)

    @property
    def prior_std(self):
        return torch.tensor(self.t_max, dtype=torch.float64)

    def _alpha(self, t):
        return torch.ones_like(t)

    def _sigma(self, t):
        return t

    def _log_snr(self, t):
        return -2 * torch.log(t)

    def _t_of_log_snr(self, log_snr):
        return torch.exp(-log_snr / 2)

    def _f(self, t):
        return torch.zeros_like(t)

    def _g2(self, t):
        return 2 * t

    def _rates(self, t):
        return torch.zeros_like(t), torch.ones_like(t)


@dataclass(frozen=True, eq=False, repr=False)
class CondOT(Schedule):
    """The straight line from data to noise of flow matching and rectified flows: alpha = 1 - t, sigma = t.

    Parameters
    ----------
    end : float, at most 1
        The last time, t_max. At 1, the default, no signal is left: a network there must predict "velocity", "v" or "x0", and sampling with noise
        (eta > 0) must start before it.

    Example
    -------
    >>> float(CondOT().alpha(0.25)), CondOT().zero_terminal_snr, CondOT(end=0.999).zero_terminal_snr
    (0.75, True, False)
    """

    end: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.end != 1:
            number("end", self.end, 0.0, 1.0, hint="1 is pure noise")

    @property
    def t_max(self):
        return float(self.end)

    def _alpha(self, t):
        return 1 - t

    def _sigma(self, t):
        return t

    def _log_snr(self, t):
        return 2 * (torch.log1p(-t) - torch.log(t))

    def _t_of_log_snr(self, log_snr):
        return torch.sigmoid(-log_snr / 2)

    def _f(self, t):
        return -1 / (1 - t)

    def _g2(self, t):
        return 2 * t / (1 - t)

    def _rates(self, t):
        return -torch.ones_like(t), torch.ones_like(t)
