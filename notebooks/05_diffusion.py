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
# # Diffusion models as SDEs
#
# A diffusion model learns to undo noise, $x_t = \alpha_t x_0 + \sigma_t\varepsilon$, one time at a time. The SDE with those marginals, run backwards, makes data of noise. Because
# that sampler is an SDE, all that the library knows of SDEs applies to it: orders, likelihoods, sensitivities with error bars, and steering towards a reward.

# %%
import os
import tempfile

import matplotlib.pyplot as plt
import torch

import sdesens as ss
from sdesens import plot
from sdesens.diffusion import EDM, VP, CondOT, Cosine

fast = os.environ.get("SDESENS_FAST") == "1"  # the smaller run that the tests make
f64 = torch.float64

# %% [markdown]
# ## 1. Schedules
#
# How much signal and how much noise is left at time $t$. The log signal-to-noise ratio (right) is the coordinate that all of them share.

# %%
plot.schedules({"VP": VP(), "cosine": Cosine(), "EDM": EDM(), "flow matching": CondOT()})
plt.show()

# %% [markdown]
# Claim: the schedule's SDE, solved by the core's integrator, has the draw's variance $\alpha_t^2\,\mathrm{Var}(x_0) + \sigma_t^2$.

# %%
vp, n = VP(), 20_000
ends = ss.sdeint(vp.as_sde(), 0.5 * torch.ones(n, 1, dtype=f64), (0.0, 0.5), n_steps=200, seed=1)[-1]
with torch.no_grad():
    wanted = float(vp.sigma(0.5)) ** 2
print(f"variance at t = 0.5 from x_0 = 0.5: {float(ends.var()):.4f}, of the draw: {wanted:.4f}")
assert abs(float(ends.var()) - wanted) < 4 * wanted * (2 / n) ** 0.5 + 0.01 * wanted  # 4 standard errors, and the step

# %% [markdown]
# ## 2. Training, and the least loss there can be
#
# Eight Gaussians on a ring. The best denoiser of this law is known, and its loss is not 0: noise cannot be told from data exactly. A loss means nothing without that floor. Claim: after some
# seconds a small network is within a few per cent of it, at every noise level.

# %%
from sdesens.training import make_report, read_log, recipe, train, training_floors
from sdesens.training.data import load_data
from sdesens.training.pictures import show_levels, show_log, show_samples

folder = tempfile.mkdtemp()
config = recipe("gmm8", steps=300 if fast else 2000, picture_every=0)
run = train(config, folder, device="cpu", tensorboard=False, progress=False)
report, data = make_report(run, likelihood=False), load_data("gmm8")
fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
show_samples(axes[0], report.samples.x, data.form, like=data.train).set_title("samples over data")
show_levels(axes[1], report)
show_log(axes[2], read_log(run.path), training_floors(config, data))
plt.show()

# %%
above = [level.test / level.floors["oracle"] - 1 for level in report.levels]
print(
    "loss above the floor, by log-SNR:",
    {level.log_snr: f"{100 * a:.1f} %" for level, a in zip(report.levels, above, strict=True)},
)
print("share of samples within 3 standard deviations of a mode:", round(report["inliers"].value, 3))
assert max(above) < (0.5 if fast else 0.08)
assert report["inliers"].value > (0.5 if fast else 0.94)

# %% [markdown]
# ## 3. Samplers have orders
#
# The probability-flow ODE takes noise to data without noise on the way. Claim: on the exact denoiser, halving the step halves the error of DDIM and quarters that of Heun and of
# DPM-Solver++(2M); the latter needs half of Heun's evaluations.

# %%
from sdesens.diffusion import GaussianMixture, ddim, dpmpp_2m, heun, log_snr_grid, prior

ring = GaussianMixture.ring().denoiser(VP())
start = prior(VP(), 500, (2,), seed=2).double()
with torch.no_grad():
    truth = heun(ring, start, log_snr_grid(VP(), 400))
    steps = (20, 40, 80, 160)
    errors = {
        name: [(a * k, float((walk(ring, start, log_snr_grid(VP(), k)) - truth).square().mean().sqrt())) for k in steps]
        for name, walk, a in (("DDIM", ddim, 1), ("DPM-Solver++(2M)", dpmpp_2m, 1), ("Heun", heun, 2))
    }
plot.sampler_errors(errors)
plt.show()

# %%
for name, rows in errors.items():
    order = torch.tensor([rows[1][1] / rows[3][1]]).log2() / 2
    print(f"{name}: order {float(order):.2f}")
    assert abs(float(order) - (1 if name == "DDIM" else 2)) < 0.45

# %% [markdown]
# ## 4. Likelihood
#
# The same ODE carries the density. Claim: on the exact denoiser it returns the law's own log-density.

# %%
from sdesens.diffusion import log_prob

law = GaussianMixture.ring()
x = law.sample(64, 3)
found = log_prob(ring, x).log_prob
exact = law.log_density(x, VP(), 1e-5)
print(f"largest difference of 64 log-densities: {float((found - exact).abs().max()):.1e} nats")
assert float((found - exact).abs().max()) < 2e-3

# %% [markdown]
# ## 5. How a sampler's mean moves with its guidance
#
# Guidance extrapolates from an unconditional to a conditional model. For two Gaussians of means 1.5 and 0 the mean of guided samples moves by 1.5 for each unit of guidance, in continuous time.
# Claim: so say all routes, with an error bar, up to the sampler's 50 steps.

# %%
from sdesens.diffusion import Gaussian, Guided, sampler_problem, uniform_grid

one = torch.ones(1, dtype=f64)
guided = Guided(Gaussian(1.5 * one, one).denoiser(VP()), Gaussian(0 * one, one).denoiser(VP()), scale=2.0)
problem = sampler_problem(guided, uniform_grid(VP(), 50), lambda x: x[:, 0], event=(1,), eta=1.0)
for method in ("pathwise", "forward", "finite_difference"):
    g = ss.sensitivity(problem, n_paths=2000, wrt=("guidance", "eta"), method=method, seed=1, audit=False).gradient
    print(f"{method:18} d/d guidance {g['guidance']!r:40} d/d eta {g['eta']!r}")
    assert abs(float(g["guidance"].mean) - 1.5) < 0.03

# %% [markdown]
# ## 6. Steering
#
# Tune the sampler so that its samples have the law $p(x)\,e^{r(x)}$, with $r(x) = x_1/2 + x_2/4$. For the ring that law is known: the modes keep their places and change their weights. Claim: after
# some rounds the mean reward has gone most of the way to the exact one.

# %%
from sdesens.training import LinearReward, Sampling, moments, steer, steering_grid, tilted
from sdesens.training.steer_report import many

reward, denoiser = LinearReward([0.5, 0.25]), run.denoiser()
coarse, fine = (Sampling(steering_grid(denoiser.schedule, k, data_std=1.43), event=(2,)) for k in (24, 64))
tuned = steer(denoiser, coarse, reward, steps=10 if fast else 100, batch=100 if fast else 300, lr=5e-3, data_std=1.43)
target = tilted(law, reward)
before, after = (moments(model, fine, reward, n=1000 if fast else 5000, seed=4).reward for model in (denoiser, tuned))
print("mean reward before", before, "after", after, "target", target.reward)

# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", sharex=True, sharey=True)
clouds = {
    "before": many(denoiser, fine, 1000),
    "steered": many(tuned, fine, 1000),
    "target": law.tilt(reward.slopes).sample(1000, seed=5),
}
for ax, (name, points) in zip(axes, clouds.items(), strict=True):
    show_samples(ax, points, run.form).set(title=name, adjustable="box")
plt.show()
way = float((after.mean - before.mean) / (target.reward.mean - before.mean))
print(f"share of the way gone: {way:.2f}")
assert way > (0.05 if fast else 0.85)

# %% [markdown]
# ## What to read next
#
# * `docs/diffusion.md` and `docs/training.md`: every method, the trainer, and what was measured.
# * `06_fit_a_model.ipynb`: SDEs fitted to data.
