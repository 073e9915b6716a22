"""A small neural SDE fitted to one series: drift and volatility as functions that nobody wrote down.

    dr = f(r) dt + g(r) dW,     f and log g networks with one hidden layer of a few tanh units,                          (1)

fitted by the moments of its transitions (`sdesens.fit`): a loss without noise of its own, and so by L-BFGS. Error bars come from the same
fit to series that are put together from blocks of the observed one. For the Treasury bill rate it is known what should come out: a
volatility that rises with the level (K. Chan, A. Karolyi, F. Longstaff, A. Sanders, J. Finance 47 (1992) 1209).

Reference: H. Kuensch, Ann. Statist. 17 (1989) 1217, the bootstrap by blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdesens.fit import Fit, fit_transitions
from sdesens.noise import Philox

UNITS = 4
STEPS = 2  # an interval
RIDGE = 1.0  # weights of order 1


class NeuralSDE(nn.Module):
    """Equation (1) for one number, in the form that torchsde has.

    Parameters
    ----------
    series : Tensor (K + 1, 1)
        Its mean and standard deviation are the networks' units of r.
    dt : float
        Time between its values; their changes give the units of f and g.
    seed : int
        Of the initial weights.
    """

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, series: Tensor, dt: float, seed: int = 0):
        super().__init__()
        change = float(series.diff(dim=0).std())
        self.centre, self.width = float(series.mean()), float(series.std())
        self.drift_unit, self.noise_unit = self.width, change / dt**0.5
        self.drift, self.log_noise = (
            nn.Sequential(nn.Linear(1, UNITS), nn.Tanh(), nn.Linear(UNITS, 1)).double() for _ in range(2)
        )
        z = Philox(seed).normals(0, 1, 0, 1, 6 * UNITS + 2, dtype=torch.float64, device=torch.device("cpu")).flatten()
        weights = z.split([w.numel() for w in self.parameters()])
        with torch.no_grad():
            for w, value in zip(self.parameters(), weights, strict=True):
                w.copy_((0.5 * value).reshape(w.shape))
            for net in (self.drift, self.log_noise):  # at first no drift, and one volatility
                for w in list(net.parameters())[2:]:
                    w.zero_()

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Drift, (B, 1)."""
        return self.drift_unit * self.drift((y - self.centre) / self.width)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """Volatility, (B, 1)."""
        return self.noise_unit * self.log_noise((y - self.centre) / self.width).exp()


class Curves(NamedTuple):
    """Drift and volatility at some levels, each (L,)."""

    drift: Tensor
    volatility: Tensor


def fit_neural(
    series: Tensor, dt: float, *, blocks: list[Tensor] | None = None, n_paths: int = 200, max_iterations: int = 150
) -> Fit:
    """Equation (1) fitted to a series (K + 1, 1), or to blocks of it in the series' units.

    Example
    -------
    >>> from sdesens.models.tbill import treasury_bill_rate
    >>> rate = torch.tensor(treasury_bill_rate())[:, None]
    >>> fit = fit_neural(rate, 0.25, n_paths=40, max_iterations=3)
    >>> curves(fit, rate[:2]).volatility.shape
    torch.Size([2])
    """
    model = NeuralSDE(series, dt)
    data = series if blocks is None else blocks
    return fit_transitions(
        model, data, dt, n_steps=STEPS, n_paths=n_paths, ridge=RIDGE, errors=False, max_iterations=max_iterations
    )


def curves(fit: Fit, levels: Tensor) -> Curves:
    """What a fit says at levels (L, 1)."""
    with torch.no_grad():
        t = torch.zeros((), dtype=torch.float64)
        return Curves(*(c(t, levels, fit.sde.params)[:, 0] for c in (fit.sde.drift, fit.sde.diffusion)))


def resampled(series: Tensor, length: int, seed: int) -> list[Tensor]:
    """Blocks of `length` transitions from random places of a series, as many transitions as it has."""
    count = -(-(len(series) - 1) // length)
    z = Philox(seed, 1).normals(0, count, 0, 1, 1, dtype=torch.float64, device=torch.device("cpu")).flatten()
    starts = (torch.special.ndtr(z) * (len(series) - length)).long().tolist()
    return [series[i : i + length + 1] for i in starts]
