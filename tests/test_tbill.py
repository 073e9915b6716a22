"""The Treasury bill example: the fit against an independent optimiser, and the data as published."""

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from sdesens.errors import ArgumentError
from sdesens.models.tbill import QUARTER, fit_vasicek, tbill, treasury_bill_rate


def minus_log_likelihood(p, x):
    kappa, m, sigma = p
    e = np.exp(-kappa * QUARTER)
    sd = sigma * np.sqrt((1 - e**2) / (2 * kappa))
    return -stats.norm.logpdf(x[1:], m + (x[:-1] - m) * e, sd).sum()


def test_data_are_the_published_series():
    rates = treasury_bill_rate()
    assert rates.shape == (203,)
    # 1959Q1 was 2.82 percent, the peak 15.33 percent in 1981Q3's series, 2009Q3 0.12 percent
    assert rates[0] == pytest.approx(0.0282)
    assert rates[-1] == pytest.approx(0.0012)
    assert 0.14 < rates.max() < 0.16


def test_fit_is_the_maximum_of_the_likelihood():
    rates = treasury_bill_rate()
    fit = fit_vasicek(rates, QUARTER)
    best = np.array([fit.kappa, fit.m, fit.sigma])
    found = optimize.minimize(
        minus_log_likelihood,
        [0.3, 0.04, 0.02],
        args=(rates,),
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-11},
    ).x
    # a simplex finds a smooth maximum to about the square root of rounding
    np.testing.assert_allclose(best, found, rtol=1e-5)
    for step in np.eye(3) * 1e-3 * best:
        assert minus_log_likelihood(best + step, rates) > minus_log_likelihood(best, rates)
        assert minus_log_likelihood(best - step, rates) > minus_log_likelihood(best, rates)


def test_standard_errors_are_those_of_the_observed_information():
    rates = treasury_bill_rate()
    fit = fit_vasicek(rates, QUARTER)
    best, h = np.array([fit.kappa, fit.m, fit.sigma]), 1e-4
    hessian = np.empty((3, 3))
    for i, a in enumerate(np.diag(best) * h):
        for j, b in enumerate(np.diag(best) * h):
            four = [minus_log_likelihood(best + s * a + r * b, rates) * s * r for s in (1, -1) for r in (1, -1)]
            hessian[i, j] = sum(four) / (4 * a[i] * b[j])
    # central second differences at 1e-4: truncation 1e-8, rounding 1e-13 / 1e-8 = 1e-5
    np.testing.assert_allclose(fit.covariance.numpy(), np.linalg.inv(hessian), rtol=1e-3)


def test_fit_recovers_a_simulated_model():
    # 20,000 quarters; 4 standard errors on each of three parameters: false alarm 2e-4
    kappa, m, sigma = 0.8, 0.05, 0.02
    e = np.exp(-kappa * QUARTER)
    noise = np.random.default_rng(7).standard_normal(20_000) * sigma * np.sqrt((1 - e**2) / (2 * kappa))
    x = np.empty(noise.size + 1)
    x[0] = m
    for k, z in enumerate(noise):
        x[k + 1] = m + (x[k] - m) * e + z
    fit = fit_vasicek(x, QUARTER)
    errors = fit.covariance.diagonal().sqrt().numpy()
    assert (np.abs(np.array([fit.kappa - kappa, fit.m - m, fit.sigma - sigma])) < 4 * errors).all()


@pytest.mark.parametrize("rates", [[0.1, 0.2, 0.3], [0.1, np.nan, 0.1, 0.2], np.linspace(0, 1, 20) ** 2, [[0.1] * 9]])
def test_bad_rates(rates):
    with pytest.raises(ArgumentError, match="`rates`"):
        fit_vasicek(np.array(rates), QUARTER)


def test_problem_prices_a_bond():
    known = tbill(t1=5.0, n_steps=20)
    price, gradient = known.answers("exact")
    assert set(gradient) == {"kappa", "m", "sigma", "x0"}
    assert 0.9 < float(price) < 0.95
    assert float(gradient["x0"]) < 0 < float(gradient["sigma"])
    assert "kappa" in known.notes
    assert known.problem.initial({}).dtype == torch.float64
