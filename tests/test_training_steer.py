"""What steering maximises, against densities, closed forms and a loop of its own; and what a remembered start leaves of it."""

import math
import warnings

import numpy as np
import pytest
import torch
from diffusion_cases import D
from torch import nn
from torch.distributions import Normal

import sdesens as ss
from sdesens.diffusion import (
    EDM,
    VP,
    Denoiser,
    Gaussian,
    GaussianMixture,
    Guided,
    Predictor,
    affine_moments,
    remembered,
    sampler_sde,
    uniform_grid,
)
from sdesens.errors import ArgumentError, HeavyTailWarning, MemoryWarning
from sdesens.noise import Philox
from sdesens.training.steer import METHODS, Task, gradient, steer
from sdesens.training.steer_objective import (
    LinearReward,
    Sampling,
    log_ratio,
    objective,
    objective_problem,
    steering_grid,
)
from sdesens.training.steer_report import derivatives, moments, predicted, tilted

PAIR = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.16)  # two modes that touch
STD = float(PAIR.cov[0, 0].sqrt())
TILT = LinearReward([0.8])
ZERO, NOTHING = torch.zeros(1, dtype=D), torch.zeros(1, 1, dtype=D)


class Corrected(nn.Module):
    """An exact law's x_0 on EDM, plus a small network that begins at 0."""

    def __init__(self, law, width=24):
        super().__init__()
        self.exact = law.denoiser(EDM())
        self.first, self.last = nn.Linear(2, width, dtype=D), nn.Linear(width, 1, dtype=D)
        with torch.no_grad():
            self.first.weight.copy_(Philox(1).normals(0, width, 0, 1, 2, dtype=D, device=torch.device("cpu"))[0])
            self.first.bias.copy_(self.first.weight[:, 0] - self.first.weight[:, 1])
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x, t, extra=0.0):
        t = t[:, None]
        seen = torch.cat((x / torch.sqrt(1 + t**2), torch.log(t) / 2), 1)
        return self.exact.x0(x, t[:, 0]) + t**2 / (1 + t**2) * (self.last(torch.tanh(self.first(seen))) + extra)


def corrected() -> Denoiser:
    return Denoiser(Corrected(PAIR), EDM(), "x0")


def moved() -> Denoiser:
    """One whose correction is not 0."""
    model = corrected()
    with torch.no_grad():
        model.net.last.weight.copy_(model.net.first.weight[:, :1].mT / 10)
        model.net.last.bias.fill_(0.1)
    return model


def sampling(n=24, **how) -> Sampling:
    return Sampling(steering_grid(EDM(), n, data_std=STD), (1,), **how)


class Shifted(Predictor):
    """A base whose score is moved by a number at each time of a grid: for Gaussian data the best control is among these."""

    def __init__(self, base, grid, shift):
        self.base, self.grid, self.shift, self.schedule = base, grid, shift, base.schedule

    @property
    def params(self):
        return self.base.params

    def with_params(self, p):
        return Shifted(self.base.with_params(p), self.grid, self.shift)

    def pair(self, x, t):
        move = self.shift[(self.grid - t.reshape(-1, 1)).abs().argmin(1)]
        x0, eps = self.base.pair(x, t)
        sigma = self.schedule.sigma(t).reshape(-1)
        return x0 + (sigma**2 / self.schedule.alpha(t).reshape(-1) * move)[:, None], eps - (sigma * move)[:, None]


# the objective


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_log_ratio_is_that_of_the_steps_gaussian_densities(eta):
    model, base, how = moved(), corrected(), sampling(eta=eta)
    xs = how.path(model, 5, Philox(3))
    logs = []
    for judge in (model, base):
        total = torch.zeros(5, dtype=D)
        for k in range(len(how.grid) - 1):
            t, h = how.grid[k], how.grid[k] - how.grid[k + 1]
            drift = (1 + eta**2) * t * judge.score(xs[k], t).detach()  # g^2 = 2 t, f = 0
            total = total + Normal(xs[k] + h * drift, eta * torch.sqrt(2 * t * h)).log_prob(xs[k + 1]).sum(1)
        logs.append(total)
    w, U = objective(model, base, how, TILT).controls(xs, model)
    found = log_ratio(w, U.detach())
    assert torch.allclose(found, logs[0] - logs[1], atol=1e-10)  # rounding: sums of 24 squares of order 10
    assert float(found.abs().max()) > 0.1


def test_at_the_optimum_reward_less_log_ratio_is_one_number():
    """Gaussian base, r = a x: the best control moves each step by a number. r - L is then log E_base[e^r], known from the chain's moments."""
    schedule, a, n = VP(), 0.8, 60
    base, grid = Gaussian([1.0], [0.25]).denoiser(schedule), uniform_grid(schedule, n)
    how, reward = Sampling(grid, (1,)), LinearReward([a])
    mean, cov = affine_moments(sampler_sde(base, grid), ZERO, NOTHING, n + 1)
    slopes = [1.0]  # d x_0 / d x_k: the chain is affine
    for k in reversed(range(1, n)):
        sde = sampler_sde(base, grid[k:], start=0.0)
        one, none = (affine_moments(sde, ZERO + s, NOTHING, n - k + 1)[0] for s in (1.0, 0.0))
        slopes.append(float(one - none))
    best = Shifted(base, grid[:-1], a * torch.tensor(slopes[::-1], dtype=D))
    xs = how.path(best, 50, Philox(2))
    found = reward(xs[-1]) - log_ratio(*objective(best, base, how, reward).controls(xs, best))
    # x_T is not steered: what is remembered of it, a tenth of a per mille of the variance, stays
    kept = a * 0.5 * math.sqrt(remembered(schedule, 1.0, data_std=0.5))
    assert float(found.std()) < 2 * kept
    assert float(found.mean()) == pytest.approx(float(a * mean + a**2 * cov / 2), abs=4 * kept / math.sqrt(50))
    half = Shifted(base, grid[:-1], best.shift / 2)
    assert float((reward(xs[-1]) - log_ratio(*objective(half, base, how, reward).controls(xs, half))).std()) > 0.1


def plain_loop(model, base, how, n, seed, *, held: bool):
    """By a loop of its own, with a graph: r - L of paths, L with weights held or 1/2 sum |U|^2 with them moving; and sum z.U."""
    z = Philox(seed).normals(0, n, 0, len(how.grid), 1, dtype=D, device=torch.device("cpu"))
    x, cost, score = 80.0 * z[0], 0.0, 0.0
    judge = objective(model, base, how, TILT).held if held else model
    for k in range(len(how.grid) - 1):
        t, h = how.grid[k], how.grid[k] - how.grid[k + 1]
        std, pull = how.eta * torch.sqrt(2 * t * h), (1 + how.eta**2) * t * h
        s = model.score(x, t)
        after = x + pull * s + std * z[k + 1]
        U = pull / std * (judge.score(x, t) - base.score(x, t))
        w = (after - x - pull * base.score(x, t)) / std
        cost = cost + ((U * w - U**2 / 2) if held else U**2 / 2).sum(1)
        score = score + z[k + 1][:, 0] * (pull / std * model.score(x.detach(), t))[:, 0]
        x = after
    return TILT(x) - cost, score


@pytest.mark.parametrize("eta", [1.0, 0.7])
def test_gradients_of_the_core_are_those_of_a_plain_loop(eta):
    model, base, how = moved(), corrected(), sampling(10, eta=eta)
    problem, weights = objective_problem(model, base, how, TILT), list(model.net.parameters())
    value, score = plain_loop(model, base, how, 40, 4, held=True)
    along = torch.autograd.grad(value.mean(), weights, retain_graph=True)
    ratio = torch.autograd.grad((value.detach() * score).mean(), weights)
    names = [f"net.{k}" for k, _ in model.net.named_parameters()]
    for method, exact, more in (("pathwise", along, {}), ("likelihood_ratio", ratio, {"control": False})):
        found = ss.sensitivity(problem, n_paths=40, method=method, wrt=("net.*",), seed=4, audit=False, **more)
        assert float(found.value.mean) == pytest.approx(float(value.detach().mean()), abs=1e-11)
        for name, number in zip(names, exact, strict=True):
            # rounding, sums of 10 steps with factors up to 1e2
            assert torch.allclose(found.gradient[name].mean, number, rtol=1e-9, atol=1e-9), (method, name)


def test_holding_the_network_leaves_the_mean_gradient():
    """d/d bias of E[r] - E[1/2 sum |U|^2], every path's own, beside both gradients with the network held: one mean."""
    model, base, how, n = moved(), corrected(), sampling(10), 20_000
    rows = torch.zeros(n, 1, dtype=D, requires_grad=True)  # a copy of the bias for each path
    each = Denoiser(lambda x, t: model.net(x, t, rows), EDM(), "x0")
    value, _ = plain_loop(each, base, how, n, 5, held=False)
    exact = ss.Estimate.from_samples(torch.autograd.grad(value.sum(), rows)[0][:, 0])
    problem = objective_problem(model, base, how, TILT)
    for method in ("pathwise", "likelihood_ratio"):
        found = ss.sensitivity(problem, n_paths=n, method=method, wrt=("net.last.bias",), seed=6, audit=False)
        other = found.gradient["net.last.bias"]
        noise = math.hypot(float(exact.standard_error), float(other.standard_error))
        assert abs(float(exact.mean - other.mean)) < 4 * noise, method  # 6e-5
        assert noise < 0.15 * abs(float(exact.mean)), method


def test_a_rounds_gradient_is_the_cores_with_the_other_paths_for_a_baseline():
    """g = n/(n-1) (g_F - mean(F) g_1): both by likelihood ratios of the core, of F and of the constant 1."""
    model, base, how, n, first = moved(), corrected(), sampling(10), 30, 20_000
    value = gradient(Task(model, base, how, TILT, Philox(8)), n, first)[1]
    problem = objective_problem(model, base, how, TILT)
    one = ss.Problem(problem.sde, lambda ys, p: 1 + 0 * ys[-1, :, 0], problem.y0, problem.ts, problem.n_steps)
    how = {"method": "likelihood_ratio", "wrt": ("net.*",), "seed": 8, "check": False, "control": False}
    g, g1 = (ss.sensitivity(q, n_paths=n, first_path=first, **how).gradient for q in (problem, one))
    for name, weight in model.net.named_parameters():
        exact = n / (n - 1) * (g[f"net.{name}"].mean - value.mean() * g1[f"net.{name}"].mean)
        assert torch.allclose(-weight.grad / n, exact, rtol=1e-9, atol=1e-10), name  # rounding


# steering


def test_a_reward_that_jumps():
    """r = log 2 where x > 0: p* has two thirds there. Only the likelihood ratio can do it; the lean adjoint has nothing to start from."""

    def reward(x):
        return math.log(2) * (x[:, 0] > 0).to(x)

    tuned = steer(corrected(), sampling(24), reward, steps=80, batch=250, lr=0.02, data_std=STD)
    found = moments(tuned, sampling(64), reward, n=20_000).reward
    share, noise = float(found.mean) / math.log(2), float(found.standard_error) / math.log(2)
    assert (
        abs(share - 2 / 3) < 0.05 * 2 / 3 + 4 * noise
    )  # tuned on 24 steps of order 1, 3 % short; the base is 25 % short
    with pytest.raises(ArgumentError, match="does not depend on x"):
        steer(corrected(), sampling(16), reward, method="adjoint_matching", steps=1, batch=4)


def test_steering_touches_nothing_else():
    base, seen = corrected(), []
    before, state = [p.clone() for p in base.net.parameters()], torch.get_rng_state()
    how = {"steps": 3, "batch": 20, "data_std": STD}
    for method in METHODS:
        tuned = steer(base, sampling(12), TILT, method=method, callback=seen.append, **how)
        assert not any(p.requires_grad for p in tuned.net.parameters())
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(base.net.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [s.step for s in seen[:3]] == [0, 1, 2]
    halves = [steer(base, sampling(12), TILT, method="adjoint_matching", accumulate=k, **how) for k in (1, 2)]
    assert torch.allclose(*(h.net.last.weight for h in halves), rtol=1e-9)  # sums in another order


def test_adjoint_matching_says_where_few_paths_carry_it():
    """Modes that lie far apart, whose lean adjoint has a tail index near 1; and modes that touch, where nothing is said."""
    far = Denoiser(Corrected(GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.01)), EDM(), "x0")
    how = {"method": "adjoint_matching", "steps": 4, "batch": 2000, "lr": 1e-9}
    with pytest.warns(HeavyTailWarning, match="gradient"):
        steer(far, sampling(40), TILT, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steer(corrected(), sampling(40), TILT, **how)


# what is remembered


def test_predicted_for_gaussian_data_against_the_chains_own_moments():
    """The chain is affine: what is tilted is the variance of x_0 given x_T, its moments from a fixed start; `remembered` up to the steps."""
    schedule, a, t = VP(), 0.8, 0.3
    base, grid = Gaussian([1.0], [0.25]).denoiser(schedule), uniform_grid(VP(), 200, t_start=t, t_min=1e-3)
    std = math.sqrt(0.25 * float(schedule.alpha(t)) ** 2 + float(schedule.sigma(t)) ** 2)
    found = predicted(base, Sampling(grid, (1,), start=std), LinearReward([a]), n_starts=2000, n_each=32)
    (mean, given), (_, cov) = (affine_moments(sampler_sde(base, grid, start=s), ZERO, NOTHING, 201) for s in (0.0, std))
    assert abs(float(found.mean.mean - mean - a * given[0])) < 4 * float(found.mean.standard_error)  # 6e-5 each
    assert abs(float(found.cov.mean - cov)) < 4 * float(found.cov.standard_error)
    assert float(found.mean.standard_error) < 0.02 * float(a * given)
    share = 1 - remembered(schedule, 1.0, data_std=0.5, t=t)
    assert float(given) == pytest.approx(0.25 * share, rel=0.03)  # order 1 in h = 1.5e-3 with beta up to 6
    assert share < 0.9


def posterior_tilt(t: float, std: float, a: float) -> tuple[float, float]:
    """Mean and variance where only x_0 given x_T ~ N(0, std^2) is tilted, by Gauss-Hermite quadrature: given x_T it is a mixture again."""
    z, weight = np.polynomial.hermite_e.hermegauss(60)
    first = second = 0.0
    for x, w in zip(std * z, weight / weight.sum(), strict=True):
        V, off = PAIR.covs + t**2, x - PAIR.means[:, 0]
        shares, means = torch.softmax(-(off**2) / (2 * V), 0), PAIR.means[:, 0] + PAIR.covs / V * off
        given = GaussianMixture(shares, means[:, None], PAIR.covs * t**2 / V).tilt([a])
        first += w * float(given.mean[0])
        second += w * float(given.cov[0, 0] + given.mean[0] ** 2)
    return first, second - first**2


def test_a_start_that_is_remembered_leaves_the_predicted_part_of_the_tilt():
    """Two modes from t = 1.5, where a third of the start is remembered: the base's samples, quadrature and what is tuned agree."""
    t, std, base = 1.5, math.hypot(STD, 1.5), corrected()
    coarse, fine = (Sampling(steering_grid(EDM(), n, data_std=STD, r_max=t), (1,), start=std) for n in (16, 64))
    aim = predicted(base, fine, TILT, n_starts=1000, n_each=32)
    for found, exact in zip((aim.mean, aim.cov), posterior_tilt(t, std, 0.8), strict=True):
        # 4 standard errors, 6e-5 each, and 64 steps of order 1: 2 %
        assert abs(float(found.mean) - exact) < 4 * float(found.standard_error) + 0.02 * exact
    with pytest.warns(MemoryWarning, match="predicted"):
        tuned = steer(base, coarse, TILT, steps=80, batch=250, lr=0.02, data_std=STD)
    after = moments(tuned, fine, TILT, n=20_000, seed=2)
    near, far = after.deviation(aim), after.deviation(tilted(PAIR, TILT))
    for name in ("mean", "cov", "reward"):
        assert float(near[name].mean) < 0.03 + 4 * float(near[name].standard_error), (name, near)
    assert float(far["mean"].mean) > 0.15
    assert float(far["mean"].standard_error) < 0.015


# moments and derivatives


def test_moments_and_their_standard_errors_against_the_chain():
    grid, reward, n = uniform_grid(VP(), 40), LinearReward([1.0, 2.0]), 20_000
    base = Gaussian([1.0, -1.0], [[0.5, 0.2], [0.2, 0.3]]).denoiser(VP())
    mean, cov = affine_moments(sampler_sde(base, grid), torch.zeros(2, dtype=D), torch.zeros(2, 2, dtype=D), 41)
    found = moments(base, Sampling(grid, (2,)), reward, n=n, seed=3)
    assert bool(((found.mean.mean - mean).abs() < 4 * found.mean.standard_error).all())  # 6e-5 each
    assert bool(((found.cov.mean - cov).abs() < 4 * found.cov.standard_error).all())
    assert abs(float(found.reward.mean - mean[0] - 2 * mean[1])) < 4 * float(found.reward.standard_error)
    # of normals: C_ii / n, and (C_ii C_jj + C_ij^2)/n; known to 1/sqrt(2 n) = 0.5 %, the latter to some 2 %
    assert torch.allclose(found.mean.standard_error, (cov.diagonal() / n).sqrt(), rtol=0.02)
    spread = torch.outer(cov.diagonal(), cov.diagonal()) + cov**2
    assert torch.allclose(found.cov.standard_error, (spread / n).sqrt(), rtol=0.08)


def test_derivatives_against_exact_moments_of_a_guided_chain():
    """E[x] of a guided Gaussian chain in guidance, eta and beta_max, by autograd through its exact moments."""
    grid, values = uniform_grid(VP(), 30, t_min=1e-2), {"guidance": 2.0, "eta": 0.8, "beta_max": 20.0}
    c, u = (Gaussian([m], [0.5]).denoiser(VP()) for m in (1.5, 0.0))
    model = Guided(c, u, values["guidance"])
    found = derivatives(model, Sampling(grid, (1,), eta=0.8), LinearReward([1.0]), wrt=tuple(values), n_paths=4000)
    leaves = {k: torch.tensor(v, dtype=D, requires_grad=True) for k, v in values.items()}
    sde = sampler_sde(model, grid, eta=0.8).with_params(**leaves)
    exact = torch.autograd.grad(affine_moments(sde, ZERO, NOTHING, 31)[0][0], list(leaves.values()))
    for result in found.results.values():
        for name, number in zip(values, exact, strict=True):
            g = result.gradient[name]
            # 6e-5 each; the guidance moves every path alike, up to rounding (differences: 1e-7)
            assert abs(float(g.mean - number)) < 4 * float(g.standard_error) + 1e-6 * abs(float(number)), name
            assert float(g.standard_error) < 0.02, name  # of numbers up to 1.5


def test_steering_grid_is_even_in_its_coordinate():
    grid = steering_grid(EDM(), 30, data_std=1.4, r_min=0.05)
    y = torch.asinh(math.sqrt(2) * torch.log(grid[:-1] / 1.4))
    assert torch.allclose(y.diff(), y.diff()[:1], rtol=1e-9)
    assert grid[[0, -2, -1]].tolist() == pytest.approx([80.0, 0.05, 0.0], rel=1e-12)
    closest = int((-torch.log(grid[:-1]).diff()).argmin())
    assert abs(float(torch.log(grid[closest] / 1.4))) < 0.2  # where noise is as large as the data
    assert float(steering_grid(VP(), 10)[0]) <= 1.0
