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
# Claim: the search ends at the same parameters from three starts far apart, with error bars from how sharply the fitted means and variances move with the
# parameters (their expected information).

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
# The noise of the simulation moves the answer less than the length of the series does: another seed changes each parameter by less than half its standard error.

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
# Make series with the fitted model, fit each, and look how much the estimates vary. Claim: by what the standard errors say, up to the 15 per cent that 24 series can tell a spread to, and what
# twenty transitions leave of the theory.

# %%
worlds = 8 if fast else 24
made = simulate(fit, data[0], 20, n_paths=worlds, seed=2)
refits = [fit_pelts(made[:, j], n_paths=100, seed=3) for j in range(worlds)]
spread = {k: float(torch.stack([r.sde.params[k] for r in refits]).std()) for k in fit.names}
ratios = {k: spread[k] / float(fit.standard_errors[k]) for k in fit.names}
print("spread over standard error:", {k: round(v, 2) for k, v in ratios.items()})
assert all((0.3 if fast else 0.5) < v < (2.5 if fast else 1.7) for v in ratios.values())

# %% [markdown]
# ## 4. A neural SDE
#
# Where nobody knows the equation, let small networks be drift and volatility, and fit them the same way. The three-month Treasury bill rate, quarterly from 1959 to 2009. Claim: the volatility rises with the
# level of the rate, and the likelihood is much better for it than that of a Vasicek model, which has one volatility for all levels, by more than the number of weights accounts for. A model of four numbers, volatility
# $\sigma r^\gamma$, is fitted beside it. Error bars of the curves: the same fit to series put together from blocks of twenty quarters of the data.

# %%
import sdesens as ss
from sdesens.examples.neural_sde import curves, fit_neural, resampled
from sdesens.models.tbill import treasury_bill_rate

series = torch.tensor(treasury_bill_rate())[:, None]
how = {"n_paths": 60, "max_iterations": 30} if fast else {"n_paths": 100, "max_iterations": 100}
neural = fit_neural(series, 0.25, **how)
blocks = [resampled(series, 20, j) for j in range(4 if fast else 16)]
resampled_fits = [fit_neural(series, 0.25, blocks=b, **how) for b in blocks]


# %%
def plain(gamma: bool):
    names = {"kappa": 0.2, "m": 0.05, "sigma": 0.02, **({"gamma": 0.1} if gamma else {})}
    noise = (
        (lambda t, r, p: p["sigma"] * (r / 0.05).clamp(min=1e-3) ** p["gamma"])
        if gamma
        else (lambda t, r, p: p["sigma"].expand_as(r))
    )
    sde = ss.SDE(
        lambda t, r, p: p["kappa"] * (p["m"] - r),
        noise,
        {k: torch.tensor(v, dtype=torch.float64) for k, v in names.items()},
    )
    return ss.fit_transitions(sde, series, 0.25, n_steps=2, positive=("sigma",), n_paths=how["n_paths"])


vasicek, elastic = plain(False), plain(True)
print(elastic)
for name, f in (("Vasicek", vasicek), ("elastic", elastic), ("neural", neural)):
    size = sum(v.numel() for v in f.sde.params.values())
    print(
        f"{name:8} {size:2} numbers, log-likelihood {f.log_likelihood:.1f}, AIC {2 * size - 2 * f.log_likelihood:.0f}"
    )

# %%
levels = torch.linspace(0.01, 0.13, 49, dtype=torch.float64)[:, None]
fits = {"Vasicek": ("k--", vasicek), "elastic volatility": ("k:", elastic)}
own, many = curves(neural, levels), [curves(f, levels) for f in resampled_fits]
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for ax, name in zip(axes, ("drift", "volatility"), strict=True):
    all_of = torch.stack([getattr(c, name) for c in many])
    plot.band(
        levels[:, 0],
        getattr(own, name),
        all_of.quantile(0.1, 0),
        all_of.quantile(0.9, 0),
        label="neural (band: 8 of 10 resampled fits)",
        axes=ax,
    )
    for label, (line, f) in fits.items():
        ax.plot(levels, getattr(curves(f, levels), name), line, label=label)
    ax.plot(series[:, 0], torch.full_like(series[:, 0], float(ax.get_ylim()[0])), "|", color="0.4", markersize=8)
    ax.set(xlabel="rate, a year", ylabel=f"{name}, {'a year' if name == 'drift' else 'per root year'}")
axes[1].legend(fontsize="small")
plt.show()

# %%
low, high = (torch.stack([c.volatility for c in many])[:, k] for k in (8, 36))  # at 3 % and at 10 %
ratios = high / low
print(
    f"volatility at 10 % over that at 3 %: {float(own.volatility[36] / own.volatility[8]):.1f}; in resampled fits {float(ratios.min()):.1f} to {float(ratios.max()):.1f}"
)
assert neural.log_likelihood - 26 > vasicek.log_likelihood - 3 + 20  # half the difference of AICs
assert float(ratios.min()) > 1
gamma = elastic.sde.params["gamma"]
assert float(gamma) > 4 * float(elastic.standard_errors["gamma"])

# %% [markdown]
# Marks at the bottom are the rates that were seen. The volatility is known well where there are marks. The drift is not: the ridge, which the networks need, takes it for flat, and the resampled fits disagree about its slope.
#
# ## What to read next
#
# * `03_parameter_sensitivity.ipynb`: the gradients that the fit used, and how certain they are.
# * `05_diffusion.ipynb`: SDEs whose drift is a large network.
