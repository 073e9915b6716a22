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
# # Two meanings of "path"
#
# *Pathwise gradient* and *sample path* use one word for two things. Write the solution of a stochastic differential equation as
# what it is, an ordinary function of a parameter, of time and of noise:
#
# $$X_t = X(t, \theta; Z), \qquad Z \text{ standard normals that do not depend on } \theta.$$
#
# * Hold $\theta$ and $Z$ fixed and let $t$ run: a **sample path**, continuous and nowhere differentiable.
# * Hold $t$ and $Z$ fixed and let $\theta$ move: the **path through the computation**, as smooth as the coefficients are.
#
# One noise, two directions of differentiation. This notebook measures both with the same ruler.

# %%
import os

import matplotlib.pyplot as plt
import torch

import sdesens as ss
from sdesens import plot
from sdesens.family import chebyshev_points, family
from sdesens.models import gbm
from sdesens.roughness import roughness, roughness_table

fast = os.environ.get("SDESENS_FAST") == "1"  # the smaller run that the tests make
f64 = torch.float64

# %% [markdown]
# ## 1. In time: a Brownian path has no derivative
#
# Claims, for a path on $2^{20}$ steps of $[0, 1]$: the sum of squared increments over $[0, t]$ is $t$ (the *quadratic variation*, which is 0 for
# anything continuously differentiable); increments over a lag $h$ are of size $h^{1/2}$; so difference quotients grow like $h^{-1/2}$, down to the finest lag there is.

# %%
n = 2**20
Z = ss.Philox(seed=1).normals(0, 1, 0, n, 1, dtype=f64, device=torch.device("cpu"))[:, 0, 0]
W = torch.cat((torch.zeros(1, dtype=f64), Z.cumsum(0) / n**0.5))
in_time = roughness(W, 1 / n, n_lags=10)
print("quadratic variation of [0, 1]:", round(float(in_time.variation[0]), 4))
print("exponent of the increments:   ", in_time.exponent)

# %%
fig, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
for ax, zoom in zip(axes, (1, 32, 1024), strict=True):
    part = W[: n // zoom + 1 : max(1, n // zoom // 1024)]
    ax.plot(torch.linspace(0, 1 / zoom, len(part)), part, "k", linewidth=0.6)
    ax.set(xlabel="t", ylabel="$W_t$", title=f"the first 1/{zoom} of it" if zoom > 1 else "a Brownian path")
plt.show()

# %% [markdown]
# It looks equally rough at every magnification (the heights shrink like the root of the widths): no piece becomes a line. The three measurements of the claim, and the same three of a smooth curve, $\sin t$:

# %%
sine = roughness(torch.sin(torch.linspace(0, 1, n + 1, dtype=f64)), 1 / n, n_lags=10)
axes = plot.roughness({"W, a path in t": in_time, "sin t": sine})
plt.show()

# %%
assert abs(float(in_time.variation[0]) - 1) < 0.01  # 7 standard errors: sqrt(2/n) = 0.0014
assert abs(float(in_time.exponent.mean) - 0.5) < 0.02
assert abs(float(sine.exponent.mean) - 1) < 1e-3

# %% [markdown]
# Left: both curves have increments that shrink with the lag, the path's only like its root. Middle: the quotients of $\sin t$ settle at its slope, those of
# the path grow without end. Right: the squares of the path add up to 1 at every lag, those of $\sin t$ vanish.
#
# ## 2. In the parameter: the same noise, and a curve as smooth as any
#
# Geometric Brownian motion, $dX = \mu X\,dt + \sigma X\,dW$. Now $\sigma$ moves, and the noise stays.

# %%
problem = gbm(power=1, sigma=0.3, n_steps=64).problem
sigma = float(problem.sde.params["sigma"])
moving = family(problem, "sigma", chebyshev_points(0.1, 0.5, 24), n_paths=5, seed=3)
curves = moving.polynomials()
slopes = [float(c.deriv()(sigma)) for c in curves]
plot.family(moving, at=sigma, slopes=slopes)
plt.show()

# %% [markdown]
# Left: one noise; every line is rough in $t$, and neighbouring values of $\sigma$ give neighbouring lines. Right: the last value of five noises against
# $\sigma$, with tangents.
#
# Claim: these curves are analytic. The polynomial through 25 of their values has coefficients that fall geometrically, to rounding; that of the
# Brownian path through as many of its values does not.

# %%
from numpy.polynomial import Chebyshev

points = chebyshev_points(0.0, 1.0, 24)
rough = Chebyshev.fit(points.numpy(), W[(points * n).round().long()].numpy(), 24, domain=[0, 1])
ax = plot.coefficients({r"$\sigma \mapsto X_1(\sigma; Z)$": curves[0].coef, r"$t \mapsto W_t$": rough.coef})
plt.show()
print(
    "largest of the last five coefficients:",
    f"{abs(curves[0].coef[-5:]).max():.0e} in sigma,",
    f"{abs(rough.coef[-5:]).max():.0e} in t",
)

# %%
assert abs(curves[0].coef[-5:]).max() < 1e-13
assert abs(rough.coef[-5:]).max() > 1e-4

# %% [markdown]
# So the curve has a derivative in the plainest sense. Claim: it is the number that `sensitivity` returns, by every route that differentiates
# the integrator, to rounding. Here is the mean over 1,000 noises of the polynomials' slopes beside two of them on the same noise.

# %%
many = family(problem, "sigma", chebyshev_points(0.1, 0.5, 24), n_paths=1000, seed=3)
by_curve = sum(float(c.deriv()(sigma)) for c in many.polynomials()) / 1000
found = {
    m: float(ss.sensitivity(problem, n_paths=1000, wrt="sigma", seed=3, method=m, audit=False).gradient["sigma"].mean)
    for m in ("pathwise", "forward")
}
print(f"slope of the curves: {by_curve:.12f}; sensitivity less that:")
print({k: f"{v - by_curve:+.1e}" for k, v in found.items()})
assert all(abs(v - by_curve) < 1e-10 for v in found.values())

# %% [markdown]
# ## 3. The same ruler in both directions
#
# What varies, what is fixed, what is differentiable: the answer can be measured. The path $t \mapsto X_t$ of one noise, and the curve $\sigma \mapsto X_1$ of the same noise,
# at as many points. The quotients and the sums of squares are at the longest and at the shortest lag: those of a differentiable curve settle and vanish.

# %%
size, n_lags = (512, 2) if fast else (1024, 3)
fine = gbm(power=1, sigma=0.3, n_steps=size).problem
path = family(fine, "sigma", [0.3, 0.31], n_paths=1, seed=3).ys[0, :, 0, 0]
curve = family(fine, "sigma", torch.linspace(0.1, 0.5, size + 1, dtype=f64), n_paths=1, seed=3).F[:, 0]
assert abs(float(path[-1] - curve[size // 2])) < 1e-12  # one noise: they meet at t = 1, sigma = 0.3
both = {
    "t (parameter and noise fixed)": roughness(path, 1 / size, n_lags=n_lags),
    "sigma (time and noise fixed)": roughness(curve, 0.4 / size, n_lags=n_lags),
}
roughness_table(both)

# %%
in_t, in_sigma = (r.exponent for r in both.values())
assert abs(float(in_t.mean) - 0.5) < 4 * float(in_t.standard_error)
assert abs(float(in_sigma.mean) - 1) < 1e-2

# %% [markdown]
# ## 4. The tangent process
#
# The derivative $S_t = \partial X_t/\partial\theta$ is itself a process, and solves an SDE of its own on the same Brownian motion, beside the state:
#
# $$dS = (b_x S + b_\theta)\,dt + (\sigma_x S + \sigma_\theta)\,dW, \qquad \text{here } dS = \mu S\,dt + (X + \sigma S)\,dW.$$
#
# Its solution for geometric Brownian motion is $S_t = X_t (W_t - \sigma t)$. Claim: smooth in $\sigma$, rough in $t$, and equal to that formula up to the step.

# %%
plot.sample_paths(problem, "sigma", n_paths=4, seed=3)
plt.show()

# %%
paths = ss.tangent_paths(fine, n_paths=200, wrt="sigma", seed=3)
X, S = paths.ys[-1, :, 0], paths.tangents["sigma"][-1, :, 0]
W1 = ss.Philox(3).normals(0, 200, 0, size, 1, dtype=f64, device=torch.device("cpu"))[..., 0].sum(0) / size**0.5
off = float((S - X * (W1 - 0.3)).square().mean().sqrt() / S.square().mean().sqrt())
along = ss.tangent_paths(fine, n_paths=1, wrt="sigma", seed=3, every_step=True).tangents["sigma"][:, 0, 0]
rough_S = roughness(along, 1 / size, n_lags=n_lags).exponent
print(f"S beside its formula, 200 paths: {100 * off:.1f} % off; exponent of t -> S_t: {rough_S}")
assert off < 4 * size**-0.5  # Euler-Maruyama is of order 1/2 a path
assert abs(float(rough_S.mean) - 0.5) < 4 * float(rough_S.standard_error)

# %% [markdown]
# ## 5. Diffusion models: one time is enough
#
# A diffusion model is trained on draws $x_t = \alpha_t x_0 + \sigma_t \varepsilon$, one $\varepsilon$ for each time, and is sampled along an SDE. The draw is not the SDE's path; it has
# the path's law at each single time. Three ways to put two times together, each with the same two marginals:

# %%
from sdesens.diffusion import VP, draw_problem, path_problem

vp, s, t = VP(), 0.4, 0.5
axes = plot.couplings(vp, s, t, n=600 if fast else 1500)
plt.show()

# %%
with torch.no_grad():
    exact = {
        "path": float(vp.alpha(t) * vp.sigma(s) ** 2 / vp.alpha(s)),
        "one eps": float(vp.sigma(s) * vp.sigma(t)),
        "two": 0.0,
    }
    spread = float(vp.sigma(s) * vp.sigma(t))
pairs = [ax.lines[0].get_xydata() for ax in axes]
for (name, wanted), xy in zip(exact.items(), pairs, strict=True):
    measured = float(torch.cov(torch.tensor(xy.T))[0, 1])
    print(f"{name:8} covariance {measured:.3f}, exact {wanted:.3f}")
    for column, at in enumerate((s, t)):  # the same two marginals in all three
        assert abs(xy[:, column].std() / float(vp.sigma(at)) - 1) < 4 / (2 * len(xy)) ** 0.5
    assert abs(measured - wanted) < 4 * ((wanted**2 + spread**2) / len(xy)) ** 0.5  # 4 standard errors

# %% [markdown]
# Here $x_0 = 0$. Whatever looks at one time only, such as the training loss, may take the cheapest coupling, and loses nothing: for a function of one $x_t$ the draw's
# derivative in the schedule is the conditional expectation of the path's, so it has the same mean and never more variance. Claim: for $f = \cos 2x$ at $t = 0.3$, $x_0 = 1$, the path's varies 1.09 times as
# much (so says quadrature).

# %%
one, n_paths = torch.ones(1, dtype=f64), 50_000 if fast else 200_000
problems = {
    "draw": draw_problem(vp, lambda x: torch.cos(2 * x[:, 0]), one, 0.3),
    "path": path_problem(vp, lambda x: torch.cos(2 * x[:, 0]), one, 0.3, 200),
}
g = {
    k: ss.sensitivity(p, n_paths=n_paths, wrt="beta_max", method="forward", seed=5, audit=False).gradient["beta_max"]
    for k, p in problems.items()
}
for name, estimate in g.items():
    print(f"{name}: d/d beta_max = {estimate}")
ratio = float(g["path"].standard_error / g["draw"].standard_error) ** 2
print(f"variance of the path's gradient over the draw's: {ratio:.3f}")

# %%
noise = 4 * float(torch.hypot(g["path"].standard_error, g["draw"].standard_error))
assert abs(float(g["path"].mean - g["draw"].mean)) < noise + 0.01 * abs(
    float(g["draw"].mean)
)  # and the path's 200 steps
assert 1.03 < ratio < 1.15  # sampling moves it by 0.01

# %% [markdown]
# ## What to read next
#
# * `02_deriving_the_pathwise_estimator.ipynb`: the same idea without time, step by step.
# * `03_parameter_sensitivity.ipynb`: the routes to $\partial/\partial\theta\,E[F(X)]$, and where they differ.
# * `04_where_pathwise_fails.ipynb`: curves in $\theta$ that are not smooth, and what to do.
