# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fitting an SDE to data
#
# Pathwise gradients turn simulation into something an optimiser can use. With the noise held fixed, the mean and the variance of where the model goes in one interval are smooth functions of the parameters; match
# them to what the data did, transition by transition, and a standard optimiser finds the parameters to its last digits.

# %%
import os

import matplotlib.pyplot as plt
import torch

from sdesens import plot
from sdesens.examples.lynx_hare import YEARS, fit_pelts, pelts, period, simulate

fast = os.environ.get("SDESENS_FAST") == "1"  # the smaller run that the tests make
data = pelts()

# %% [markdown]
# ## 1. Hares and lynxes
#
# The pelts that the Hudson's Bay Company counted, 1900 to 1920, in thousands. The model: hares $H$ grow and are eaten, lynxes $L$ live on them, and both meet with luck,
#
# $$dH = H(\alpha - \beta L)\,dt + \sigma_1 H\,dW^1, \qquad dL = L(\delta H - \gamma)\,dt + \sigma_2 L\,dW^2.$$
#
# Claim: the search ends at the same parameters from three starts far apart, with error bars from the information of the fitted moments.

# %%
starts = [
    {"alpha": 0.5, "beta": 0.03, "gamma": 0.8, "delta": 0.03, "sigma1": 0.3, "sigma2": 0.3},
    {"alpha": 1.0, "beta": 0.05, "gamma": 0.5, "delta": 0.01, "sigma1": 0.5, "sigma2": 0.5},
    {"alpha": 0.2, "beta": 0.01, "gamma": 1.2, "delta": 0.05, "sigma1": 0.2, "sigma2": 0.2},
]
fits = [fit_pelts(data, start) for start in starts]
fit = fits[0]
print(fit)
for other in fits[1:]:
    apart = max(float((other.sde.params[k] / v - 1).abs()) for k, v in fit.sde.params.items())
    print(f"from another start: log-likelihood {other.log_likelihood:.6f}, parameters apart by {apart:.0e}")
    assert other.converged
    assert apart < 1e-3
assert fit.converged

# %% [markdown]
# The noise of the simulation moves the answer far less than the length of the series does: another seed changes each parameter by a fraction of its standard error.

# %%
again = fit_pelts(data, seed=1)
moved = {k: float((again.sde.params[k] - v) / fit.standard_errors[k]) for k, v in fit.sde.params.items()}
print({k: round(v, 2) for k, v in moved.items()}, "standard errors")
assert max(abs(v) for v in moved.values()) < 0.5

# %% [markdown]
# ## 2. Does the model do what the animals did?
#
# 21 years from the numbers of 1900, many times over. Claim: the data's mean numbers and the length of their cycle lie within the model's own spread.

# %%
paths = simulate(fit, data[0], 20, n_paths=2000, seed=1)
axes = plot.fitted_series(YEARS, data, paths, names=("hares", "lynxes"), unit="thousand pelts", xlabel="year")
plt.show()

# %%
cycles = period(paths)
for i, name in enumerate(("hares", "lynxes")):
    rows = {"mean number": (paths[:, :, i].mean(0), data[:, i].mean()), "cycle, years": (cycles[:, i], period(data)[i])}
    for what, (model, seen) in rows.items():
        off = float((seen - model.mean()) / model.std())
        print(
            f"{name:7} {what:13} data {float(seen):5.1f}, model {float(model.mean()):5.1f} +/- {float(model.std()):4.1f} (one path's spread): {off:+.1f}"
        )
        assert abs(off) < 2

# %% [markdown]
# Single paths lose step with the data after a cycle, as they must: luck is part of the model. Their rhythm and their size stay.
#
# ## 3. Are the error bars right?
#
# Make series with the fitted model, fit each, and look how much the estimates vary. Claim: by what the standard errors say, up to what so few series can tell.

# %%
worlds = 8 if fast else 24
made = simulate(fit, data[0], 20, n_paths=worlds, seed=2)
refits = [fit_pelts(made[:, j], n_paths=100, seed=3) for j in range(worlds)]
spread = {k: float(torch.stack([r.sde.params[k] for r in refits]).std()) for k in fit.names}
ratios = {k: spread[k] / float(fit.standard_errors[k]) for k in fit.names}
print("spread over standard error:", {k: round(v, 2) for k, v in ratios.items()})
middle = sorted(ratios.values())[len(ratios) // 2]
assert 0.5 < middle < 2

# %% [markdown]
# ## 4. A neural SDE
#
# Where nobody knows the equation, let small networks be drift and volatility, and fit them the same way. The three-month Treasury bill rate, quarterly from 1959 to 2009. Claim: the volatility rises with the
# level of the rate, which a Vasicek model (one number for all levels) cannot say, and the likelihood is much better for it.

# %%
from sdesens.examples.neural_sde import curves, fit_neural, resampled
from sdesens.models.tbill import fit_vasicek, treasury_bill_rate

rates = treasury_bill_rate()
series = torch.tensor(rates)[:, None]
neural = fit_neural(series, 0.25, n_paths=60 if fast else 200, max_iterations=40 if fast else 150)
vasicek = fit_vasicek(rates, 0.25)
levels = torch.linspace(0.01, 0.11, 41, dtype=torch.float64)[:, None]
worlds = [
    fit_neural(series, 0.25, blocks=resampled(series, 20, j), n_paths=60, max_iterations=30 if fast else 60)
    for j in range(4 if fast else 16)
]

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
own, many = curves(neural, levels), [curves(w, levels) for w in worlds]
for ax, name in zip(axes, ("drift", "volatility"), strict=True):
    all_of = torch.stack([getattr(c, name) for c in many])
    plot.band(
        levels[:, 0],
        getattr(own, name),
        all_of.quantile(0.1, 0),
        all_of.quantile(0.9, 0),
        label="neural, 8 of 10 resampled fits",
        axes=ax,
    )
    line = vasicek.kappa * (vasicek.m - levels) if name == "drift" else torch.full_like(levels, vasicek.sigma)
    ax.plot(levels, line, "k--", label="Vasicek")
    ax.plot(series[:, 0], torch.full_like(series[:, 0], float(ax.get_ylim()[0])), "|", color="0.4", markersize=8)
    ax.set(xlabel="rate, a year", ylabel=f"{name}, {'a year' if name == 'drift' else 'per root year'}")
    ax.legend(fontsize="small")
plt.show()

# %%
e, v = torch.exp(torch.tensor(-0.25 * vasicek.kappa)), vasicek.sigma**2 / (2 * vasicek.kappa)
step = torch.distributions.Normal(vasicek.m + (series[:-1] - vasicek.m) * e, (v * (1 - e**2)).sqrt())
plain = float(step.log_prob(series[1:]).sum())
print(
    f"log-likelihood: Vasicek {plain:.1f} (3 numbers), neural {neural.log_likelihood:.1f} ({sum(p.numel() for p in neural.sde.params.values())} numbers)"
)
low, high = (torch.stack([c.volatility for c in many])[:, k] for k in (8, 36))  # at 3 % and at 10 %
print(
    f"volatility at 10 % over that at 3 %: {float(own.volatility[36] / own.volatility[8]):.1f}; in resampled fits {float((high / low).min()):.1f} to {float((high / low).max()):.1f}"
)
assert neural.log_likelihood > plain + 40
assert float((high / low).min()) > 1

# %% [markdown]
# Marks at the bottom are the rates that were seen. The drift is as good as unknown, as fifty years of any rate leave it; the volatility is not.
#
# ## What to read next
#
# * `03_parameter_sensitivity.ipynb`: the gradients that the fit used, and how certain they are.
# * `05_diffusion.ipynb`: SDEs whose drift is a large network.
