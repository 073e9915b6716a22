"""Hares and lynxes: the pelts that the Hudson's Bay Company counted from 1900 to 1920, and stochastic Lotka-Volterra fitted to them.

Thousands of pelts a year, in which the numbers of the animals are assumed to be mirrored: hares grow and are eaten, lynxes live on them,
and both meet with luck, equation (1) of `sdesens.models.lotka_volterra`. Data: C. G. Hewitt, The Conservation of the Wild Life of Canada,
1921, as given by P. Howard, Modeling Basics, Texas A&M, 2009.
"""

from collections.abc import Mapping

import torch
from scipy.signal import periodogram
from torch import Tensor

from sdesens.fit import Fit, fit_transitions
from sdesens.integrate import sdeint
from sdesens.models.lotka_volterra import diffusion, drift
from sdesens.sde import SDE

YEARS = tuple(range(1900, 1921))
HARES = (
    30.0,
    47.2,
    70.2,
    77.4,
    36.3,
    20.6,
    18.1,
    21.4,
    22.0,
    25.4,
    27.1,
    40.3,
    57.0,
    76.6,
    52.3,
    19.5,
    11.2,
    7.6,
    14.6,
    16.2,
    24.7,
)
LYNXES = (
    4.0,
    6.1,
    9.8,
    35.2,
    59.4,
    41.7,
    19.0,
    13.0,
    8.3,
    9.1,
    7.4,
    8.0,
    12.3,
    19.5,
    45.7,
    51.1,
    29.7,
    15.8,
    9.7,
    10.1,
    8.6,
)
START = {"alpha": 0.5, "beta": 0.03, "gamma": 0.8, "delta": 0.03, "sigma1": 0.3, "sigma2": 0.3}
STEPS_A_YEAR = 24
PERIODS = (4.0, 21.0)  # years, of cycles that are looked for
PADDED = 1024


def pelts() -> Tensor:
    """Hares and lynxes, thousands a year, (21, 2), float64."""
    return torch.tensor([HARES, LYNXES], dtype=torch.float64).mT.contiguous()


def fit_pelts(series: Tensor, start: Mapping[str, float] = START, *, n_paths: int = 1000, seed: int = 0) -> Fit:
    """Lotka-Volterra fitted to a series (K + 1, 2) of yearly numbers by the moments of the logarithms, from a start of the search.

    Example
    -------
    >>> fit = fit_pelts(pelts(), n_paths=60)
    >>> fit.converged, 0.3 < float(fit.sde.params["alpha"]) < 0.8
    (True, True)
    """
    sde = SDE(drift, diffusion, {k: torch.tensor(v, dtype=torch.float64) for k, v in start.items()})
    return fit_transitions(sde, series, 1.0, n_steps=STEPS_A_YEAR, positive=tuple(start), transform=torch.log, n_paths=n_paths, seed=seed)  # fmt: skip


def simulate(fit: Fit, first: Tensor, n_years: int, *, n_paths: int, seed: int = 0) -> Tensor:
    """Yearly numbers of the fitted model from `first` (2,): (n_years + 1, n_paths, 2)."""
    ts = [float(k) for k in range(n_years + 1)]
    with torch.no_grad():
        return sdeint(fit.sde, first.expand(n_paths, 2), ts, n_steps=STEPS_A_YEAR * n_years, seed=seed)


def period(series: Tensor) -> Tensor:
    """Years of the strongest cycle between 4 and 21 years in the logarithms of yearly numbers (T, ...): the remaining shape.

    The peak of the periodogram, zero-padded to read it off to a tenth of a year. Of two cycles' length it is itself off by a few per cent.

    Example
    -------
    >>> t = torch.arange(21, dtype=torch.float64)
    >>> round(float(period(torch.exp(torch.sin(2 * torch.pi * t / 10)))), 1)
    10.3
    """
    frequency, power = periodogram(series.log().numpy(), nfft=PADDED, axis=0)
    keep = (frequency > 1 / PERIODS[1]) & (frequency < 1 / PERIODS[0])
    return 1 / torch.as_tensor(frequency[keep])[torch.as_tensor(power[keep].argmax(0))]
