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
# # Where the pathwise derivative fails
#
# A digital option pays 1 if the price ends above the strike. Hold the noise, move today's price $S_0$ or the volatility, and on almost every path the payoff stays what it is: the derivative along the path is
# **exactly zero**, with no spread to warn of anything. The price does move. This notebook shows the hole, how the library notices it, and what goes around it.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import torch

import sdesens as ss
from sdesens import plot
from sdesens.family import family
from sdesens.models import barrier, gbm_call, gbm_digital

fast = os.environ.get("SDESENS_FAST") == "1"  # the smaller run that the tests make
n_paths = 20_000 if fast else 100_000

# %% [markdown]
# ## 1. The curves in the parameter
#
# The payoff of eight noises against today's price $S_0$, and the mean of many. Claim: each curve is a staircase, of slope 0 wherever it has one; the mean is not flat.

# %%
digital = gbm_digital()
problem = digital.problem
values = torch.linspace(80, 120, 201, dtype=torch.float64)
curves = family(problem, "s0", values, n_paths=2000, seed=1).F
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
for i in range(8):
    left.step(values, curves[:, i] + 0.02 * i, where="post", linestyle=("-", "--", "-.", ":")[i % 4], linewidth=1)
left.set(xlabel="$S_0$", ylabel="discounted payoff (shifted a little)", title="eight noises: stairs")
plot.band(
    values,
    curves.mean(1),
    *ss.Estimate.from_samples(curves.mT).confidence_interval(),
    label="mean of 2,000, 95 %",
    axes=right,
)
right.plot(values, [float(digital.exact({"s0": v})) for v in values], "k--", label="closed form")
right.legend()
right.set(xlabel="$S_0$", ylabel="mean payoff", title="their mean: a slope everywhere")
plt.show()

# %%
steps = curves.diff(dim=0)
flat = float((steps == 0).double().mean())
slope = float((curves[105].mean() - curves[95].mean()) / (values[105] - values[95]))
print(f"{100 * flat:.2f} % of all steps along the curves are exactly 0; slope of the mean at 100: {slope:.4f}")
assert flat > 0.99
assert slope > 0.01

# %% [markdown]
# ## 2. The library looks before it differentiates
#
# The audit uses values alone. Claim: it finds the jump, refuses the pathwise method, and names those that apply. Told to go on all the same, it returns the zero, with a warning.

# %%
print(ss.audit(problem))
try:
    ss.sensitivity(problem, n_paths=10_000)
    refused = None
except ss.JumpError as error:
    refused = str(error)
print(refused)
assert "jumps along" in refused
assert "conditional" in refused

# %%
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    silent = ss.sensitivity(problem, n_paths=10_000, audit="allow")
print(silent.gradient["s0"], "with", [w.category.__name__ for w in told])
assert float(silent.gradient["s0"].mean) == 0.0
assert told

# %% [markdown]
# ## 3. What works
#
# * `conditional`: replace the payoff by its expectation over the last step, which is smooth.
# * `vibrato` and `likelihood_ratio`: hold the path and differentiate its law, of the last step or of all. `malliavin`: integrate by parts in the noise.
# * `finite_difference` with a wide step: biased a little.
#
# Claim: all agree with the closed form, and their errors differ by a factor of ten: the likelihood
# ratio has the largest, malliavin the smallest.

# %%
methods = {
    "conditional": {},
    "vibrato": {},
    "malliavin": {},
    "likelihood_ratio": {},
    "finite_difference": {"relative_step": 0.02},
}
runs = {
    m: ss.sensitivity(problem, n_paths=n_paths, method=m, wrt="s0", seed=2, audit=False, **o)
    for m, o in methods.items()
}
delta = float(digital.answers(wrt=("s0",))[1]["s0"])
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
names = list(runs)
for place, name in enumerate(names):
    g = runs[name].gradient["s0"]
    half = float(g.confidence_interval().high - g.mean)
    ax.errorbar([float(g.mean)], [place], xerr=[half], fmt="ko", capsize=4, markerfacecolor="none")
ax.axvline(delta, color="0.4", linewidth=0.8)
ax.set_yticks(range(len(names)), names)
ax.set(xlabel="d price / d $S_0$ of the digital, 95 % intervals; line: closed form")
plt.show()

# %%
for name, run in runs.items():
    g = run.gradient["s0"]
    print(f"{name:18} {g!r:45} {(float(g.mean) - delta) / float(g.standard_error):+.1f} standard errors")
    bias = 0.02 * delta  # of the step dt, and of the wide difference
    assert abs(float(g.mean) - delta) < 4.5 * float(g.standard_error) + bias
errors = {k: float(r.gradient["s0"].standard_error) for k, r in runs.items()}
print(f"largest error over smallest: {max(errors.values()) / min(errors.values()):.0f}")
assert max(errors, key=errors.get) == "likelihood_ratio"
assert min(errors, key=errors.get) == "malliavin"
assert max(errors.values()) > 8 * min(errors.values())

# %% [markdown]
# `method="auto"` tries those that apply on other noise and takes the one with the least variance times seconds (printed
# relative to the best): `malliavin` varies less than `conditional`, and takes longer.

# %%
print(ss.sensitivity(problem, n_paths=n_paths, method="auto", wrt="s0", seed=3))

# %% [markdown]
# ## 4. A barrier
#
# A call that dies when the price has touched a barrier jumps *along* the way. Claim: the pathwise method is refused, and the conditional method, which multiplies the probabilities of not having
# crossed between grid points, gives the closed form of continuous watching.

# %%
knock = barrier()
try:
    ss.sensitivity(knock.problem, n_paths=5000)
    refused = None
except ss.JumpError as error:
    refused = str(error).split(". ")[0]
print(refused)
found = ss.sensitivity(knock.problem, n_paths=n_paths, method="conditional", seed=4)
value, gradient = knock.answers(wrt=tuple(found.gradient))
for name, g in found.gradient.items():
    print(f"d/d {name:6} {g!r:48} closed form {float(gradient[name]):.4f}")
    assert abs(float(g.mean) - float(gradient[name])) < 4.5 * float(g.standard_error) + 0.01 * abs(
        float(gradient[name])
    )
assert refused

# %% [markdown]
# ## 5. Gamma: the second derivative of a kink
#
# A call is continuous, and its pathwise delta is right. That delta is itself a step function of $S_0$ on each path, so differentiating along the path once more gives almost 0 in place of the kink. Claim: the library refuses that too, and one
# method for the first derivative with another for the second gives the closed form, up to the step.

# %%
call = gbm_call(n_steps=64)
try:
    ss.hessian(call.problem, n_paths=5000, wrt=("s0",), method="pathwise")
    refused = None
except ss.KinkError as error:
    refused = str(error)
print(refused)
assert "kink" in refused

# %%
s0 = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
(delta,) = torch.autograd.grad(call.exact({"s0": s0}), s0, create_graph=True)
gamma = float(torch.autograd.grad(delta, s0)[0])
first = ss.sensitivity(call.problem, n_paths=n_paths, wrt="s0", seed=5).gradient["s0"]
print(f"pathwise delta {first}, Black-Scholes {float(delta.detach()):.4f}")
assert abs(float(first.mean - delta.detach())) < 4.5 * float(first.standard_error) + 0.005  # the step dt

# %%
for method in ("conditional", "pathwise_likelihood_ratio", "likelihood_ratio_pathwise"):
    g = ss.hessian(call.problem, n_paths=n_paths, wrt=("s0",), method=method, seed=5)["s0", "s0"]
    print(f"gamma by {method:26} {g!r:44} Black-Scholes {gamma:.5f}")
    assert abs(float(g.mean) - gamma) < 4.5 * float(g.standard_error) + 0.01 * gamma  # the step dt

# %% [markdown]
# ## What to read next
#
# * `05_diffusion.ipynb`: samplers as SDEs, and their sensitivities.
# * `docs/jumps.md`: the audit and every method in detail.
