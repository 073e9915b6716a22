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
# # Deriving the pathwise estimator
#
# We want the slope of an expectation whose law moves with a parameter,
#
# $$J(\phi) = E_{z \sim q_\phi}[f(z)].$$
#
# The plan: write the draw as a function of noise, $z = g_\phi(\varepsilon)$; differentiate that function with the noise held fixed; average. Each step is run and
# checked here, and so is what happens where a step cannot be taken.

# %%
import math
import os

import matplotlib.pyplot as plt
import torch

import sdesens as ss
from sdesens import plot
from sdesens.errors import SdesensError
from sdesens.estimators import (
    Bernoulli,
    Normal,
    Sampler,
    compare,
    decompose,
    expectation_gradient,
    sample_tangents,
    variance_study,
)

fast = os.environ.get("SDESENS_FAST") == "1"  # the smaller run that the tests make
f64 = torch.float64
params = {"mean": torch.tensor(1.0, dtype=f64), "scale": torch.tensor(2.0, dtype=f64)}

# %% [markdown]
# ## 1. The derivative of a draw
#
# $z = \mu + \sigma\varepsilon$. Claim: with $\varepsilon$ held fixed, $\partial z/\partial\mu = 1$ and $\partial z/\partial\sigma = \varepsilon$, on every draw, exactly. There is no probability in it.

# %%
draws = sample_tangents(Normal, params, n_samples=1000, seed=1)
for name in ("z", "eps"):
    print(f"{name:12}", getattr(draws, name)[:4].tolist())
for name, values in draws.tangents.items():
    print(f"dz/d{name:8}", values[:4].tolist())
assert torch.equal(draws.tangents["mean"], torch.ones(1000, dtype=f64))
assert torch.equal(draws.tangents["scale"], draws.eps)

# %% [markdown]
# ## 2. Naive sampling has no derivative
#
# The same law as an opaque sampler, "draw from N(mean, scale)". Claim: there is nothing to differentiate, in torch as little as here, and the library says so instead of
# returning a zero. The law alone does not say how a draw moves: two samplers of one law can move differently with $\mu$.

# %%
law = torch.distributions.Normal(params["mean"].clone().requires_grad_(), params["scale"])
print(
    "requires_grad of a sample:", law.sample().requires_grad, "; of a reparameterised one:", law.rsample().requires_grad
)
assert not law.sample().requires_grad
opaque = Sampler(
    lambda n, p: torch.normal(float(p["mean"]), float(p["scale"]), (n,)).double(),
    lambda z, p: torch.distributions.Normal(p["mean"], p["scale"]).log_prob(z),
)
try:
    expectation_gradient(opaque, lambda z, p: z**2, params, n_samples=1000, method="pathwise", seed=1)
    refused = ""
except SdesensError as error:
    refused = str(error)
print(refused)
assert "a draw has no derivative" in refused

# %% [markdown]
# ## 3. Derivative and expectation change places
#
# With $z = g_\phi(\varepsilon)$ the law of the noise is free of $\phi$, so
#
# $$J(\phi) = E_{p(\varepsilon)}[f(g_\phi(\varepsilon))] \quad\Rightarrow\quad \nabla_\phi J = E_{p(\varepsilon)}\big[f'(z)\,\nabla_\phi g_\phi(\varepsilon)\big] \approx \frac1K \sum_k f'(z_k)\, \nabla_\phi g_\phi(\varepsilon_k).$$
#
# The exchange is allowed where $f \circ g$ is continuous in $\phi$ and its slopes have an integrable bound; notebook 04 shows what happens where $f$ jumps. For $f = z^2$ the answer is known: $\partial_\mu E[z^2] = 2\mu = 2$.
# Claim: the estimate is unbiased for every $K$, and its error falls like $K^{-1/2}$.

# %%
K = [10, 100, 1000, 10_000, 100_000]
runs = [expectation_gradient(Normal, lambda z, p: z**2, params, n_samples=k, method="pathwise", seed=2) for k in K]
found = [r.gradient["mean"] for r in runs]
ax = plot.estimates(K, {"pathwise": found}, exact=2.0, xlabel="draws K")
ax.set_xscale("log")
plt.show()

# %%
widths = [float(e.standard_error) for e in found]
slope = math.log(widths[-1] / widths[1]) / math.log(K[-1] / K[1])
print(f"standard error falls like K^{slope:.2f}; at K = {K[-1]:,}: {found[-1]}")
assert abs(slope + 0.5) < 0.05  # widths are known to 7 per cent at K = 100
assert abs(float(found[-1].mean) - 2) < 4 * float(found[-1].standard_error)
repeats = torch.tensor(
    [
        float(
            expectation_gradient(
                Normal, lambda z, p: z**2, params, n_samples=10, method="pathwise", seed=s, check=False
            )
            .gradient["mean"]
            .mean
        )
        for s in range(200)
    ]
)
print("mean of 200 estimates with K = 10:", ss.Estimate.from_samples(repeats))
assert abs(float(repeats.mean()) - 2) < 4 * float(repeats.std()) / 200**0.5

# %% [markdown]
# ## 4. Without a function of noise: the score function, and its price
#
# The law itself can be differentiated instead of the draw, $\nabla J = \int f\,\nabla q = E[f(z)\,\nabla\log q_\phi(z)]$ (REINFORCE). It asks nothing of $f$, and it knows nothing of $f$ either: each draw says
# only "this value was good". Claim: same mean, larger variance. For $f = z^2$, $\mu = \sigma = 1$, one draw's variance is 4 by the pathwise estimator and 30 by the score function. (RLOO subtracts the mean of a group's other draws; the measure-valued derivative
# is the difference of two draws from the halves of $\nabla q$.)

# %%
unit = {k: torch.ones((), dtype=f64) for k in ("mean", "scale")}
table = compare(
    Normal, lambda z, p: z**2, unit, n_samples=20_000 if fast else 200_000, seed=3, exact={"mean": 2.0, "scale": 2.0}
)
plot.comparison(table, "mean")
plt.show()
variances = {r["method"]: r["variance"] for r in table.rows() if r["parameter"] == "mean"}
print({k: round(v, 2) for k, v in variances.items()})

# %%
assert abs(variances["pathwise"] - 4) < 0.3
assert abs(variances["score_function"] - 30) < 6  # heavy tails: a relative standard error of some 3 per cent
assert all(abs(r["bias"]) < 5 * r["standard_error"] + 1e-12 for r in table.rows())

# %% [markdown]
# It is not always so. Where $f$ wiggles faster than the draw is wide, the derivative of $f$ is large while $f$ itself is not, and the two change places: for $\cos kz$ at $k = 1.064$
# in the mean, 1.297 in the scale (exact, $\sigma = 1$).

# %%
study = variance_study(n_samples=4000 if fast else 50_000, costs=("cos",), seed=1)
axes = plot.variance_study(study)
axes[0, 0].figure.set_size_inches(6.5, 8)
plt.show()
print({k: tuple(round(v, 3) for v in pair) for k, pair in study.crossings.items()})
assert abs(study.crossings["cos", "mean"][1] - 1.064) < 5e-4
assert abs(study.crossings["cos", "scale"][1] - 1.297) < 5e-4

# %% [markdown]
# ## 5. Discrete draws
#
# A coin $z \sim$ Bernoulli$(p)$ has no path: as $p$ moves, $z$ stays and then jumps. Gumbel-Softmax replaces it by a soft coin of some temperature and differentiates that. Claim: it is
# **biased**, less so as the temperature falls, and never for free: the variance rises. Exact enumeration is beside it, and ARM, an unbiased
# estimator for coins by two evaluations that share a uniform.

# %%
coin, f = {"probs": torch.tensor(0.5, dtype=f64)}, lambda z, p: (z - 0.45) ** 2
exact = float(expectation_gradient(Bernoulli, f, coin, n_samples=2, method="enumerate").gradient["probs"].mean)
temperatures = [0.1, 0.25, 0.5, 1.0]
n = 20_000 if fast else 200_000
soft = [
    expectation_gradient(Bernoulli, f, coin, n_samples=n, method="gumbel_softmax", temperature=t, seed=4)
    for t in temperatures
]
arm = expectation_gradient(Bernoulli, f, coin, n_samples=n, method="arm", seed=4).gradient["probs"]
rows = [r.gradient["probs"] for r in soft]
ax = plot.estimates(temperatures, {"Gumbel-Softmax": rows}, exact=exact, xlabel="temperature")
ax.axhspan(*map(float, arm.confidence_interval()), color="0.8", label="ARM, 95 % interval (it has no temperature)")
ax.legend(fontsize="small")
plt.show()

# %%
bias = [float(e.mean) - exact for e in rows]
spread = [float(e.standard_error) * n**0.5 for e in rows]
print("bias:  ", [round(b, 4) for b in bias])
print("spread:", [round(v, 2) for v in spread])
assert abs(bias[3]) > 10 * float(rows[3].standard_error)  # the bias at temperature 1 is no noise
assert abs(bias[3]) > abs(bias[1])
assert spread[0] > spread[3]
assert abs(float(arm.mean) - exact) < 4 * float(arm.standard_error)

# %% [markdown]
# ## 6. The unified form
#
# If $f$ depends on the parameter too,
#
# $$\nabla_\phi E[f_\phi(z)] = \int f_\phi\,\nabla q_\phi\,dz + E[\nabla f_\phi(z)],$$
#
# and the first term is not an expectation as it stands; the reparameterisation makes one of it. The second, explicit term is easily forgotten. Claim: for $f = a z^2$ and $z \sim N(a, 1)$ the two terms are $2a^2$ and $a^2 + 1$; at
# $a = 1.5$ whoever drops the explicit one is 3.25 short of 7.75. (A VAE's $f$ holds $\phi$ too, in its Kullback-Leibler term.)

# %%
a = {"a": torch.tensor(1.5, dtype=f64)}
parts = decompose(
    lambda p: Normal(p["a"], torch.ones((), dtype=f64)), lambda z, p: p["a"] * z**2, a, n_samples=100_000, seed=5
)
print(parts)
assert abs(float(parts.terms["a"].density) - 4.5) < 1e-6
assert abs(float(parts.terms["a"].explicit) - 3.25) < 1e-6

# %% [markdown]
# ## 7. A variational autoencoder on digits
#
# The estimator's best-known use: $\phi$ are the weights of an encoder, $z$ sixteen numbers that describe an image. The library's example trains one by the pathwise estimator, in a
# loop like any other. Claim: it learns more than the mean image, which needs no $z$,
# and a pathwise gradient of its encoder is many times less noisy than the score function's.

# %%
from sdesens.examples.digits_vae import batch_gradient, digits, held_out_elbo, train

images = digits()
epochs = 12 if fast else 150
models = {0: train(epochs=0), epochs: train(epochs=epochs)}
elbo = {k: round(held_out_elbo(m), 2) for k, m in models.items()}
pixels = images.train.mean(0).clamp(1e-3, 1 - 1e-3)
flat = float((images.test * pixels.log() + (1 - images.test) * (1 - pixels).log()).sum(1).mean())
print(f"ELBO of test images, nats, by epochs of training: {elbo}; the mean image: {flat:.2f}")

# %%
vae = list(models.values())[-1]
with torch.no_grad():
    mean, scale = vae.posterior(images.test[:10])
    again = torch.sigmoid(vae.decoder(mean))
fig, axes = plt.subplots(2, 10, figsize=(10, 2.3), layout="constrained")
for column, pair in enumerate(zip(images.test[:10], again, strict=True)):
    for ax, x in zip(axes[:, column], pair, strict=True):
        ax.imshow(x.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("data")
axes[1, 0].set_ylabel("again")
plt.show()

# %%
noise = {}
for method in ("pathwise", "score_function"):
    g = batch_gradient(vae, images.test[:32], method, 8, seed=6).gradient
    noise[method] = sum(float(v.standard_error.square().sum()) for k, v in g.items() if k.startswith("encoder")) ** 0.5
print(
    f"standard error of the encoder's gradient: score function / pathwise = {noise['score_function'] / noise['pathwise']:.0f}"
)
assert elbo[epochs] > flat + (0.1 if fast else 2.5)
assert noise["score_function"] > 10 * noise["pathwise"]

# %% [markdown]
# Top row: test images; bottom row: what their sixteen numbers make of them.
#
# ## What to read next
#
# * `03_parameter_sensitivity.ipynb`: the same move, repeated at every step of an SDE.
# * `04_where_pathwise_fails.ipynb`: functions that jump.
