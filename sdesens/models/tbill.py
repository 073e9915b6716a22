"""Real data: the US three-month Treasury bill rate, 1959 to 2009, and the price of a bond under a Vasicek model of it.

The model dr = kappa (m - r) dt + sigma dW has the exact transition, over a quarter delta,

    r_{k+1} = m + (r_k - m) e + sqrt(v) Z,    e = exp(-kappa delta),   v = sigma^2 (1 - e^2) / (2 kappa),   (1)

an autoregression: its conditional maximum likelihood estimate is least squares, in closed form. Standard errors come from
the inverse of the observed information (second derivatives of the log-likelihood of (1)), and the delta method carries
them to the bond price.

Data: `tbilrate` of statsmodels' `macrodata` (Federal Reserve Bank of St. Louis), quarterly, percent a year.
Reference: O. Vasicek, J. Financial Economics 5 (1977) 177.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sdesens.errors import ArgumentError, SdesensError
from sdesens.models.known import Known
from sdesens.models.vasicek import vasicek

QUARTER = 0.25  # years


@dataclass(frozen=True)
class VasicekFit:
    """Maximum likelihood estimate of a Vasicek model.

    Attributes
    ----------
    kappa, m, sigma : float
        Per year; per year; per year and square root of a year.
    covariance : Tensor, shape (3, 3)
        Of (kappa, m, sigma), from the observed information.
    n : int
        Transitions.
    """

    kappa: float
    m: float
    sigma: float
    covariance: Tensor
    n: int


def treasury_bill_rate() -> np.ndarray:
    """The quarterly rate 1959Q1 to 2009Q3 as fractions a year, shape (203,).

    Raises
    ------
    SdesensError
        If statsmodels is not installed.
    """
    try:
        from statsmodels.datasets import macrodata
    except ImportError as error:
        raise SdesensError("the Treasury bill data come with statsmodels: pip install 'sdesens[examples]'.") from error
    return macrodata.load_pandas().data["tbilrate"].to_numpy(dtype=np.float64) / 100


def fit_vasicek(rates: np.ndarray, delta: float) -> VasicekFit:
    """Fit equation (1) to rates observed every `delta` years by maximum likelihood.

    Raises
    ------
    ArgumentError
        If there are fewer than 4 rates, or they do not revert to a mean (least-squares slope not in (0, 1)).

    Example
    -------
    >>> fit = fit_vasicek(np.array([0.05, 0.04, 0.05, 0.03, 0.04, 0.05, 0.03]), 0.25)
    Traceback (most recent call last):
    sdesens.errors.ArgumentError: `rates` do not revert to a mean: least-squares slope -0.6, wanted in (0, 1).
    """
    rates = np.asarray(rates, dtype=np.float64)
    if rates.ndim != 1 or rates.size < 4 or not np.isfinite(rates).all():
        raise ArgumentError(f"`rates` must be at least 4 finite numbers, got shape {rates.shape}.")
    now, later = rates[:-1], rates[1:]
    slope = float(np.cov(now, later, bias=True)[0, 1] / now.var())
    if not 0 < slope < 1:
        raise ArgumentError(f"`rates` do not revert to a mean: least-squares slope {slope:.6g}, wanted in (0, 1).")
    kappa = -math.log(slope) / delta
    m = float((later.mean() - slope * now.mean()) / (1 - slope))
    v = float(np.mean((later - m - slope * (now - m)) ** 2))
    sigma = math.sqrt(2 * kappa * v / (1 - slope**2))
    x, x1 = torch.from_numpy(now), torch.from_numpy(later)

    def minus_log_likelihood(p: Tensor) -> Tensor:
        e = torch.exp(-p[0] * delta)
        variance = p[2] ** 2 * (1 - e**2) / (2 * p[0])
        return 0.5 * (torch.log(variance) + (x1 - p[1] - e * (x - p[1])).square() / variance).sum()

    at = torch.tensor([kappa, m, sigma], dtype=torch.float64)
    information = torch.autograd.functional.hessian(minus_log_likelihood, at)
    return VasicekFit(kappa, m, sigma, torch.linalg.inv(information), now.size)


def tbill(*, t1: float = 5.0, n_steps: int = 120, dtype: torch.dtype = torch.float64) -> Known:
    """US Treasury bill rate 1959-2009: a Vasicek model fitted to it, and the price of a zero-coupon bond.

    Parameters
    ----------
    t1 : float
        Maturity of the bond in years.
    """
    rates = treasury_bill_rate()
    fit = fit_vasicek(rates, QUARTER)
    known = vasicek(kappa=fit.kappa, m=fit.m, sigma=fit.sigma, x0=float(rates[-1]), t1=t1, n_steps=n_steps, dtype=dtype)
    price, gradient = known.answers("exact", ("kappa", "m", "sigma"))
    slope = torch.stack([gradient[k] for k in ("kappa", "m", "sigma")])
    from_fit = float((slope @ fit.covariance @ slope).sqrt())
    errors = fit.covariance.diagonal().sqrt().tolist()
    notes = (
        f"Vasicek model dr = kappa (m - r) dt + sigma dW, fitted to {fit.n + 1} quarters of the 3-month Treasury bill rate:\n"
        f"  kappa {fit.kappa:.4f} +/- {errors[0]:.4f} a year, m {fit.m:.4f} +/- {errors[1]:.4f}, "
        f"sigma {fit.sigma:.5f} +/- {errors[2]:.5f} (standard errors of the fit), x0 {rates[-1]:.4f} today\n"
        f"Price of {t1:g}-year zero-coupon bond E[exp(-int r dt)] = {float(price):.6f} in closed form; "
        f"the uncertain fit moves it by +/- {from_fit:.4f} (delta method: that is what the sensitivities are for)"
    )
    return replace(known, notes=notes)
