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
# A diffusion model learns to undo noise, $x_t = \alpha_t x_0 + \sigma_t\varepsilon$, one time at a time. The SDE with those marginals, run backwards, turns noise into data. Because
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
# Claim: the schedule's SDE, solved by the core's integrator from data of mean 0.5 and standard deviation 0.3, has the draw's mean $0.5\,\alpha_t$ and variance $0.3^2\alpha_t^2 + \sigma_t^2$.

# %%
vp, n = VP(), 20_000
x0 = 0.5 + 0.3 * ss.Philox(2).normals(0, n, 0, 1, 1, dtype=f64, device=torch.device("cpu"))[0]
ends = ss.sdeint(vp.as_sde(), x0, (0.0, 0.5), n_steps=200, seed=1)[-1]
with torch.no_grad():
    mean, variance = 0.5 * float(vp.alpha(0.5)), float(0.09 * vp.alpha(0.5) ** 2 + vp.sigma(0.5) ** 2)
print(
    f"at t = 0.5: mean {float(ends.mean()):.4f} (draw {mean:.4f}), variance {float(ends.var()):.4f} (draw {variance:.4f})"
)
assert abs(float(ends.mean()) - mean) < 4 * (variance / n) ** 0.5 + 0.01 * mean  # 4 standard errors, and the step
assert abs(float(ends.var()) - variance) < 4 * variance * (2 / n) ** 0.5 + 0.01 * variance

# %% [markdown]
# ## 2. Training, and the least loss there can be
#
# *Denoising score matching*: from $x_t$, estimate the $\varepsilon$ that it was made with. The least squares answer is $E[\varepsilon \mid x_t] = -\sigma_t \nabla\log p_t(x_t)$, the score that the reverse SDE needs. And since
# $x_t = \alpha_t x_0 + \sigma_t\varepsilon$ does not depend on the network, training takes no derivative through any SDE. Claim, for two Gaussians on a line: the mean $\varepsilon$ of draws that fall near some $x$ is what the score says there.

# %%
from sdesens.diffusion import GaussianMixture

two, t = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.1), 0.3
eps = ss.Philox(7).normals(0, 200_000, 0, 1, 1, dtype=f64, device=torch.device("cpu"))[0]
x_t = vp.reparameterise(two.sample(200_000, 6), t, eps).detach()
for x in (-0.8, 0.0, 0.5):
    near = eps[(x_t - x).abs() < 0.02]
    wanted = float(two.denoiser(vp).eps(torch.tensor([[x]], dtype=f64), t).detach())
    print(f"x = {x:4}: mean eps of {len(near)} draws {float(near.mean()):+.3f}, - sigma score {wanted:+.3f}")
    assert abs(float(near.mean()) - wanted) < 4 * float(near.std()) / len(near) ** 0.5 + 0.01  # and the bin's width

# %% [markdown]
# Now a network, on eight Gaussians on a ring. The best denoiser of this law (the *oracle*) is known, and its loss is not 0: noise cannot be told from data exactly. A loss means nothing without that floor, nor without what the best *linear*
# network would have. Claim: after some seconds a small network is at the oracle's loss, up to a few per cent, at every noise level.

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
print(
    f"share of samples within 3 standard deviations of a mode: {report['inliers'].value:.3f}, of real rows {report['inliers'].floor:.3f}"
)
assert max(above) < (0.5 if fast else 0.08)
assert report["inliers"].value > (0.5 if fast else 0.94)

# %% [markdown]
# Negative numbers are sampling: both losses are means over 2,048 draws. The points between the modes (left) are the network's; real rows have none there.
#
# ## 3. Samplers have orders
#
# The probability-flow ODE takes noise to data without noise on the way. Claim: on the exact denoiser, halving the step tends to halve the error of DDIM and to quarter that of Heun and of
# DPM-Solver++(2M); the latter evaluates the network once a step, Heun twice.

# %%
from sdesens.diffusion import ddim, dpmpp_2m, heun, log_snr_grid, prior

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
    assert abs(float(order) - (1 if name == "DDIM" else 2)) < 0.35

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
# Claim: so say all routes, up to the sampler's steps. The derivative is the same on every path, so its interval is rounding; what is missing to 1.5 halves as the steps are doubled.

# %%
from sdesens.diffusion import Gaussian, Guided, sampler_problem, uniform_grid

one = torch.ones(1, dtype=f64)
guided = Guided(Gaussian(1.5 * one, one).denoiser(VP()), Gaussian(0 * one, one).denoiser(VP()), scale=2.0)
gaps = []
for steps in (25, 50, 100):
    problem = sampler_problem(guided, uniform_grid(VP(), steps), lambda x: x[:, 0], event=(1,), eta=1.0)
    found = [
        float(
            ss.sensitivity(problem, n_paths=200, wrt="guidance", method=m, seed=1, audit=False)
            .gradient["guidance"]
            .mean
        )
        for m in ("pathwise", "forward", "finite_difference")
    ]
    gaps.append(found[0] - 1.5)
    print(f"{steps:3} steps: d E[x] / d guidance = {', '.join(f'{v:.6f}' for v in found)}")
    assert max(found) - min(found) < 1e-8
assert 1.7 < gaps[0] / gaps[1] < 2.3
assert 1.7 < gaps[1] / gaps[2] < 2.3

# %% [markdown]
# ## 6. Steering
#
# Tune the sampler so that its samples have the law $p(x)\,e^{r(x)}$, with $r(x) = x_1/2 + x_2/4$. For the ring that law is known: the modes keep their places and change their weights. Each round simulates paths, and moves
# the network by the gradient of $E[r] - E[\log dP/dP_{base}]$ along them. Claim: after some rounds the mean reward is the exact one, up to a sixth of the way.

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
modes = law.means
shares = {k: torch.cdist(x.double(), modes).argmin(1).bincount(minlength=8) / 1000 for k, x in clouds.items()}
apart = {k: float((shares[k] - shares["target"]).abs().sum() / 2) for k in ("before", "steered")}
print("total variation of the modes' shares from the target's:", {k: round(v, 2) for k, v in apart.items()})
assert (0.05 if fast else 0.85) < way < 1.17
assert fast or apart["steered"] < 0.5 * apart["before"]

# %% [markdown]
# ## What to read next
#
# * `docs/diffusion.md` and `docs/training.md`: every method, the trainer, and what was measured.
# * `06_fit_a_model.ipynb`: SDEs fitted to data.
