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
# # Sensitivities of an SDE, with error bars
#
# How does $E[F(X)]$ move with the parameters of $dX = b\,dt + \sigma\,dW$? You write the equation and the functional; the library returns the value and its derivatives,
# each with a standard error, by several independent routes on the same Brownian increments.

# %%
import os

import matplotlib.pyplot as plt
import torch

import sdesens as ss
from sdesens import plot

fast = os.environ.get("SDESENS_FAST") == "1"  # the smaller run that the tests make
f64 = torch.float64

# %% [markdown]
# ## 1. An equation and a question
#
# An Ornstein-Uhlenbeck process, and the second moment at time 1. Every function takes the parameters `p` last; paths lead.

# %%
k, m, s = (torch.tensor(v, dtype=f64) for v in (1.0, 0.5, 0.4))
ou = ss.SDE(
    drift=lambda t, y, p: p["k"] * (p["m"] - y),  # (B, d)
    diffusion=lambda t, y, p: p["s"].expand_as(y),  # (B, d): diagonal noise
    params={"k": k, "m": m, "s": s},
)
problem = ss.Problem(ou, lambda ys, p: ys[-1, :, 0] ** 2, y0=torch.ones(1, dtype=f64), ts=(0.0, 1.0), n_steps=64)
result = ss.sensitivity(problem, n_paths=50_000, seed=1, wrt=("k", "m", "s", "y0", "t1"))
result

# %% [markdown]
# Claim: the intervals hold what they promise. The Euler-Maruyama chain's own moments are known, $E[X_N] = m + (1 - m)q^N$ and $\mathrm{Var} = s^2 h (1 - q^{2N})/(1 - q^2)$ with $q = 1 - kh$, and
# autograd differentiates them: no discretisation bias stands between.


# %%
def chain(k, m, s, y0, N=64):
    h = 1 / N
    q = 1 - k * h
    mean = m + (y0 - m) * q**N
    return mean**2 + s**2 * h * (1 - q ** (2 * N)) / (1 - q**2)


leaves = [v.clone().requires_grad_() for v in (k, m, s, torch.ones((), dtype=f64))]
exact = torch.autograd.grad(chain(*leaves), leaves)
for name, wanted in zip(("k", "m", "s", "y0"), exact, strict=True):
    g = result.gradient[name]
    z = (float(g.mean.sum()) - float(wanted)) / float(g.standard_error.sum())
    print(f"d/d {name:3} {g!r:40} exact {float(wanted):8.4f}   {z:+.1f} standard errors")
    assert abs(z) < 4.5  # false alarm 7e-6 each

# %% [markdown]
# Four numbers on one noise say little about intervals that promise 95 in 100. So: 200 runs of 500 paths, each with its own interval for $\partial/\partial k$.

# %%
inside = 0
for seed in range(200):
    g = ss.sensitivity(problem, n_paths=500, seed=seed, wrt="k", method="forward", check=False).gradient["k"]
    low, high = g.confidence_interval()
    inside += bool(low <= exact[0] <= high)
print(f"{inside} of 200 intervals hold the exact number")
assert (
    176 <= inside <= 199
)  # 190 +- 3.1: at 4 standard deviations 178, a little more for 500 paths that are not quite normal

# %% [markdown]
# The other error, that of the finite step, is estimated from a coupled run with half the step: `bias=True`.

# %%
biased = ss.sensitivity(problem, n_paths=50_000, seed=1, wrt=("k",), bias=True)
print(biased)
second = 0.5**2 * (1 + torch.exp(-k)) ** 2 + 0.4**2 / 2 * (1 - torch.exp(-2 * k))  # E[X_1^2] of the SDE itself
bias = biased.bias["value"]
assert (
    abs(float(bias.mean) - (float(chain(k, m, s, torch.ones(()))) - float(second)))
    < 4 * float(bias.standard_error) + 2e-4
)  # next order

# %% [markdown]
# ## 2. Do the routes agree?
#
# * `pathwise` differentiates the chain in reverse, `forward` solves the sensitivity SDE beside it: **one number**, to rounding; central differences on the same noise agree to $O(h^2)$ of their own step.
#   (Their standard errors differ a little: `forward` has every path's gradient, `pathwise` those of groups of paths.)
# * The `adjoint` solves a continuous equation backwards in time, ours and torchsde's: **another number**, which approaches the first as the step shrinks (for `x0`, in which
#   this model is linear, it is the same).
#
# Geometric Brownian motion, whose noise depends on the state, shows the difference.

# %%
from sdesens.models import gbm

check = ss.crosscheck(gbm(n_steps=32).problem, n_paths=2000 if fast else 10_000, refine_paths=200 if fast else 1000)
print(check)
assert check.ok

# %%
plot.refinement(check.refinement)
plt.show()
for method in ("adjoint", "torchsde_adjoint"):
    print(f"{method}: order {check.refinement.order(method):.2f} against the chain's own derivative")
    assert 0.35 < check.refinement.order(method) < 0.75  # 1/2 a path, in the root mean square

# %% [markdown]
# Left: against the derivative of the SDE's own path all routes are of order 1/2, the order of Euler-Maruyama. Right: how far each is from the chain's own derivative; the routes that
# differentiate the chain are too close to plot (their values are in the legend), the adjoints come closer like the root of the step.
#
# ## 3. What it costs
#
# Seconds and memory of each route on 2,000 paths of 256 steps, in one process, as measured here: the absolute numbers are this machine's.

# %%
costs = ss.crosscheck(gbm(n_steps=256).problem, n_paths=2000, refine=False)
plot.costs(costs)
plt.show()
assert costs.ok

# %% [markdown]
# With three parameters no route is far from the others. They grow differently: the reverse sweep of `pathwise` costs a few solutions whatever the number of parameters, `forward` about one more for each, differences two
# (measured in `docs/speed.md`).
#
# ## 4. Real data: how a bond's price depends on each parameter
#
# The three-month Treasury bill rate, 1959 to 2009, in a Vasicek model fitted by maximum likelihood, and the price of a five-year bond. The price and its sensitivities are known in closed form. Claim: estimates less
# their estimated bias agree with it; what `m` and `x0` are off by before is the step of 1/24 year, not chance.

# %%
from sdesens.models import tbill
from sdesens.models.tbill import treasury_bill_rate

rates = treasury_bill_rate()
fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
ax.plot([1959 + i / 4 for i in range(len(rates))], 100 * rates, "k", linewidth=1)
ax.set(xlabel="year", ylabel="rate, % a year")
plt.show()

# %%
bond = tbill()
priced = ss.sensitivity(bond.problem, n_paths=4000 if fast else 40_000, seed=2, bias=True)
value, gradient = bond.answers(wrt=tuple(priced.gradient))
rows = {"price": (priced.value, priced.bias["value"], value)}
rows |= {f"d/d {k}": (g, priced.bias[k], gradient[k]) for k, g in priced.gradient.items()}
for name, (estimate, bias, closed) in rows.items():
    z = float(estimate.mean - bias.mean - closed) / float(torch.hypot(estimate.standard_error, bias.standard_error))
    print(
        f"{name:10} {estimate!r:42} bias {float(bias.mean):+.4f}   closed form {float(closed):8.4f}   {z:+.1f} standard errors"
    )
    assert abs(z) < 4.5

# %% [markdown]
# ## What to read next
#
# * `04_where_pathwise_fails.ipynb`: payoffs that jump.
# * `06_fit_a_model.ipynb`: the same derivatives, to fit a model to data.
