"""Samplers: against formulas written out here, against exact moments without Monte Carlo noise, and as SDEs of the core."""

import math
from itertools import pairwise

import pytest
import torch

import sdesens as ss
from sdesens.diffusion import (
    EDM,
    VE,
    VP,
    CondOT,
    Cosine,
    Denoiser,
    LogSNR,
    SubVP,
    affine_moments,
    ancestral,
    ddim,
    ddim_step,
    dpmpp_2m,
    dpmpp_2m_step,
    edm_grid,
    euler_maruyama,
    guide,
    heun,
    heun_step,
    log_snr_grid,
    prior,
    sampler_sde,
    uniform_grid,
    walk,
)
from sdesens.diffusion.oracles import Gaussian, GaussianMixture
from sdesens.diffusion.steps import ddim_update
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, GridError, NonFiniteError, ShapeError

F64 = torch.float64
LAW = Gaussian(torch.tensor([1.0], dtype=F64), torch.tensor([0.25], dtype=F64))
RING = GaussianMixture.ring()
ROUNDING = 1e-12


def law_at(schedule, t):
    """Mean and standard deviation of x_t for LAW."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return float(alpha), float((0.25 * alpha**2 + sigma**2).sqrt())


def moments(schedule, grid, step, start="law", **options):
    """Mean and standard deviation of a sampler's result for LAW, without noise; started at the law of x_T or at the prior."""
    law = start == "law"
    std = torch.zeros((), dtype=F64) if law else None
    sde = sampler_sde(LAW.denoiser(schedule), grid, step, start=std, **options)
    size = 2 if getattr(sde.step, "remembers", False) else 1
    mean, cov = torch.zeros(size, 1, dtype=F64), torch.zeros(size, size, dtype=F64)
    if law:
        m, s = law_at(schedule, grid[0])
        mean[0, 0], cov[0, 0] = m, s**2
    mean, cov = affine_moments(sde, mean if size == 2 else mean[0], cov, len(grid))
    return float(mean.flatten()[0]), float(cov[0, 0].sqrt())


def slopes(errors):
    return [math.log2(a / b) for a, b in pairwise(errors)]


# orders, with no Monte Carlo noise

ODE = {
    "euler": (None, {"eta": 0.0}, uniform_grid, 1.0),
    "ddim": (ddim_step, {"eta": 0.0}, uniform_grid, 1.0),
    "heun": (heun_step, {}, log_snr_grid, 2.0),
    "dpmpp_2m": (dpmpp_2m_step, {}, log_snr_grid, 2.0),
}


@pytest.mark.parametrize("name", ODE)
@pytest.mark.parametrize("schedule", [VP(), EDM()], ids=["VP", "EDM"])
def test_order_of_ode_samplers(name, schedule):
    """The slope of the affine map x_T -> x_0 is the ratio of standard deviations, sqrt(V_0 / V_T), for the exact flow."""
    step, options, grid, order = ODE[name]
    errors, shifts = [], []
    for n in (64, 128, 256):
        times = edm_grid(schedule, n + 1)[:-1] if isinstance(schedule, EDM) else grid(schedule, n)
        mean, std = moments(schedule, times, step, **options)
        exact_mean, exact_std = law_at(schedule, times[-1])
        errors.append(abs(std - exact_std) / law_at(schedule, times[0])[1])
        shifts.append(abs(mean - exact_mean))
    # the last two halvings; the next order's term is at most N^-1 relative: 2 % of the slope
    assert all(abs(s - order) < 0.1 for s in slopes(errors)), slopes(errors)
    if name != "euler":  # alpha times anything passes through these samplers exactly
        assert max(shifts) < 1e-11
    if isinstance(schedule, EDM) and order == 2:
        assert errors[1] < 6e-6  # of the slope, 128 steps


def test_weak_order_of_reverse_euler_maruyama():
    means, variances = [], []
    for n in (512, 1024, 2048):
        grid = uniform_grid(VP(), n)
        mean, std = moments(VP(), grid, None, eta=1.0)
        exact_mean, exact_std = law_at(VP(), grid[-1])
        means.append(abs(mean - exact_mean))
        variances.append(abs(std**2 - exact_std**2))
    assert all(abs(s - 1) < 0.05 for s in (*slopes(means), *slopes(variances))), (slopes(means), slopes(variances))


def test_ancestral_mean_is_exact_and_its_variance_of_order_one():
    variances = []
    for n in (16, 512, 1024, 2048, 4096):
        grid = uniform_grid(VP(), n)
        mean, std = moments(VP(), grid, ddim_step, eta=1.0)
        exact_mean, exact_std = law_at(VP(), grid[-1])
        assert abs(mean - exact_mean) < 1e-10  # every step keeps E x_t = alpha_t m, to rounding
        variances.append(abs(std**2 - exact_std**2))
    assert all(0.95 <= s <= 1.0 for s in slopes(variances[1:])), slopes(variances[1:])


@pytest.mark.parametrize(("n", "mean", "std"), [(18, 0.99340, 0.52762), (36, 0.99367, 0.50610)])
def test_heun_of_karras_et_al_from_the_prior(n, mean, std):
    """Figures of an independent affine recursion; the excess of the standard deviation is the last step, Euler's to sigma = 0."""
    found = moments(EDM(), edm_grid(EDM(), n), heun_step, start="prior")
    assert found == pytest.approx((mean, std), abs=1e-5)  # the figures have five decimals


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_eta_keeps_the_marginals(eta):
    """DDIM and Euler-Maruyama with any eta have the law of x_t at the end, to their order: 4096 steps leave O(h)."""
    grid = uniform_grid(VP(), 4096)
    exact = law_at(VP(), grid[-1])
    for step in (None, ddim_step):
        assert moments(VP(), grid, step, eta=eta) == pytest.approx(exact, abs=2e-3)


def test_churn_keeps_the_marginals():
    for n, tolerance in (
        (64, 0.02),
        (256, 0.002),
    ):  # second order away from the last steps: sixteen times less, ten is asked
        grid = log_snr_grid(VP(), n)
        mean, std = moments(VP(), grid, heun_step, gamma=20.0 / n)
        assert (mean, std) == pytest.approx(law_at(VP(), grid[-1]), abs=tolerance)


def test_start_is_remembered_as_predicted():
    """corr^2(x_T, x_0) = (alpha_T^2 s^2 / V_T)^(eta^2), by the response of the mean to the start; VP cut short at t = 0.4."""
    grid = uniform_grid(VP(), 4096, t_start=0.4, t_min=1e-4)
    for eta in (0.25, 0.5, 1.0):
        sde = sampler_sde(LAW.denoiser(VP()), grid, None, start=0.0, eta=eta)
        v_T = law_at(VP(), grid[0])[1] ** 2
        zero = torch.zeros(1, 1, dtype=F64)
        ends = [affine_moments(sde, torch.tensor([x], dtype=F64), zero, len(grid)) for x in (0.0, 1.0)]
        slope = float(ends[1][0] - ends[0][0])
        var_0 = slope**2 * v_T + float(ends[0][1])
        predicted = (float(VP().alpha(0.4)) ** 2 * 0.25 / v_T) ** (eta**2)
        assert slope**2 * v_T / var_0 == pytest.approx(predicted, rel=5e-3)  # O(h), h = 1e-4 and beta = 8


# formulas written out once more


def given(shape, seed=3):
    return (
        ss.Philox(seed)
        .normals(0, shape[0], 7, 1, math.prod(shape[1:]), dtype=F64, device=torch.device("cpu"))[0]
        .reshape(shape)
    )


@pytest.mark.parametrize("schedule", [VP(), SubVP(), Cosine(), VE(), EDM(), CondOT()], ids=lambda s: type(s).__name__)
def test_ancestral_step_is_the_posterior(schedule):
    """q(x_u | x_t, x_0) for x_0 given, by conditioning the joint Gaussian of (x_u, x_t): Cov = alpha_t sigma_u^2 / alpha_u."""
    t, u = torch.tensor([0.6, 0.35], dtype=F64) * schedule.t_max
    at, st, au, su = (float(x) for x in (schedule.alpha(t), schedule.sigma(t), schedule.alpha(u), schedule.sigma(u)))
    x0, x = given((5, 2)), given((5, 2), 4)
    gain = at * su**2 / au / st**2
    mean, var = au * x0 + gain * (x - at * x0), su**2 - gain * at * su**2 / au
    eps = (x - at * x0) / st
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    found = ddim_update(schedule, x0, eps, t, u, zero, 1.0)
    assert torch.allclose(found, mean, rtol=ROUNDING, atol=ROUNDING * su)
    assert torch.allclose(ddim_update(schedule, x0, eps, t, u, one, 1.0) - found, one * math.sqrt(var), rtol=1e-10)


def test_ancestral_sampling_of_ddpm_in_its_own_names():
    """[sqrt(abar') beta x0 + sqrt(1-beta) (1-abar') x] / (1-abar), variance beta (1-abar') / (1-abar)."""
    t, u = torch.tensor([0.5, 0.49], dtype=F64)
    bar, before = float(VP().alpha(t)) ** 2, float(VP().alpha(u)) ** 2
    beta = 1 - bar / before
    x0, x = given((4, 3)), given((4, 3), 9)
    mean = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - bar)
    eps = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
    z = given((4, 3), 11)
    found = ddim_update(VP(), x0, eps, t, u, z, 1.0)
    assert torch.allclose(found, mean + z * math.sqrt(beta * (1 - before) / (1 - bar)), rtol=1e-11, atol=1e-11)


def edm_denoise(schedule, x, r):
    """D(x; r) of Karras et al. for the ring: in their coordinates x_0 + r eps."""
    t = schedule.t_of_log_snr(-2 * torch.log(r))
    return RING.denoiser(schedule).x0(x * schedule.alpha(t), t)


@pytest.mark.parametrize("schedule", [EDM(), VP(), Cosine()], ids=lambda s: type(s).__name__)
def test_heun_and_2m_against_their_papers_on_a_mixture(schedule):
    """The two algorithms in (x, sigma) of Karras et al., as their papers state them, on the same noise levels."""
    grid = edm_grid(schedule, 12, r_min=0.05, r_max=30.0)
    r = [schedule.sigma(t) / schedule.alpha(t) for t in grid]
    y = 30.0 * given((6, 2))
    x = y * schedule.alpha(grid[0])
    by_heun, by_2m, old = y, y, None
    for i in range(12):
        d = (by_heun - edm_denoise(schedule, by_heun, r[i])) / r[i]
        euler = by_heun + (r[i + 1] - r[i]) * d
        if r[i + 1] > 0:
            again = (euler - edm_denoise(schedule, euler, r[i + 1])) / r[i + 1]
            euler = by_heun + (r[i + 1] - r[i]) * (d + again) / 2
        by_heun = euler
        clean = edm_denoise(schedule, by_2m, r[i])
        t, u = -torch.log(r[i]), -torch.log(r[i + 1])
        h = u - t
        if old is None or r[i + 1] == 0:
            ahead = clean
        else:
            ratio = (t + torch.log(r[i - 1])) / h
            ahead = (1 + 1 / (2 * ratio)) * clean - old / (2 * ratio)
        by_2m = (r[i + 1] / r[i]) * by_2m - torch.expm1(-h) * ahead
        old = clean
    denoiser = RING.denoiser(schedule)
    # eps is recovered from x_0 at r = 0.05 to 30 with at most 30 / 0.05 roundings
    assert torch.allclose(heun(denoiser, x, grid), by_heun, rtol=1e-9, atol=1e-9)
    assert torch.allclose(dpmpp_2m(denoiser, x, grid), by_2m, rtol=1e-9, atol=1e-9)


def test_heun_and_2m_are_second_order_on_a_mixture():
    x = given((8, 2))
    denoiser = RING.denoiser(VP())
    fine = heun(denoiser, x, log_snr_grid(VP(), 1600, t_min=0.02))
    for sampler in (heun, dpmpp_2m):
        errors = [
            float((sampler(denoiser, x, log_snr_grid(VP(), n, t_min=0.02)) - fine).norm()) for n in (100, 200, 400)
        ]
        # one sample of a curved flow: the asymptote is reached from afar, so a quarter of an order of grace
        assert all(abs(s - 2) < 0.25 for s in slopes(errors)), slopes(errors)


def test_churn_adds_noise_and_goes_back():
    """One step of the stochastic sampler, by hand: up to r(1 + gamma) with noise, then Euler and trapezium from there."""
    schedule = EDM()
    y, z = 2 * given((5, 2)), given((5, 2), 8)
    r, to, gamma = torch.tensor(2.0, dtype=F64), torch.tensor(1.2, dtype=F64), 0.3
    high = r * (1 + gamma)
    up = y + torch.sqrt(high**2 - r**2) * 1.003 * z
    d = (up - edm_denoise(schedule, up, high)) / high
    euler = up + (to - high) * d
    wanted = up + (to - high) * (d + (euler - edm_denoise(schedule, euler, to)) / to) / 2
    options = {"gamma": gamma, "noise_scale": 1.003}
    found = walk(RING.denoiser(schedule), y, torch.stack((r, to)), heun_step, options=options, noise=z[None])
    assert torch.allclose(found, wanted, rtol=1e-11, atol=1e-11)


def test_euler_maruyama_by_hand_and_by_sdeint():
    """x - h [f x - (1 + eta^2)/2 g^2 s] + eta g sqrt(h) z on an uneven grid; on an even one the core's sdeint of as_sde."""
    schedule, denoiser, eta = VP(), RING.denoiser(VP()), 0.7
    grid = log_snr_grid(schedule, 9, t_min=0.05)
    x, z = given((4, 2)), given((9, 4, 2))
    by_hand = x
    for k in range(9):
        t, h = grid[k], grid[k] - grid[k + 1]
        f, g2 = schedule.f(t), schedule.g2(t)
        by_hand = (
            by_hand
            - h * (f * by_hand - (1 + eta**2) / 2 * g2 * denoiser.score(by_hand, t))
            + eta * torch.sqrt(g2 * h) * z[k]
        )
    assert torch.allclose(euler_maruyama(denoiser, x, grid, eta=eta, noise=z), by_hand, rtol=1e-11, atol=1e-11)

    even = uniform_grid(schedule, 9, t_min=0.1)
    sde = schedule.as_sde(denoiser, eta=eta, reverse=True)
    ys = ss.sdeint(sde, x, (0.0, 0.9), n_steps=9, bm=z * math.sqrt(0.1))
    # the core's times are k h, the grid's 1 - k h: equal to rounding, times the stiffness (beta = 20)
    assert torch.allclose(euler_maruyama(denoiser, x, even, eta=eta, noise=z), ys[-1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("step", "options"),
    [(None, {"eta": 0.7}), (ddim_step, {"eta": 0.7}), (heun_step, {"gamma": 0.2}), (dpmpp_2m_step, {})],
)
def test_a_sampler_is_an_sde_of_the_core(step, options):
    """`walk` and the core's sdeint on `sampler_sde`, on the same noise: the same numbers to the bit."""
    denoiser, grid, event = RING.denoiser(VP()), uniform_grid(VP(), 7, t_min=0.05), (2,)
    noise = ss.Philox(5)
    x = prior(VP(), 6, event, noise=noise, dtype=F64)
    walked = walk(denoiser, x, grid, step, options=options, noise=noise)
    sde = sampler_sde(denoiser, grid, step, **options)
    remembers = getattr(sde.step, "remembers", False)
    if remembers:  # its noise has more components: hand it in
        z = noise.normals(0, 6, 0, 8, 2, dtype=F64, device=torch.device("cpu"))
        noise = ss.GivenNoise(torch.cat((z, torch.zeros_like(z)), 2))
    zeros = torch.zeros(6, *((2, 2) if remembers else (2,)), dtype=F64)
    ys = ss.sdeint(sde, zeros, (0.0, 1.0, 8.0), n_steps=8, bm=noise)
    states = ys[:, :, 0] if remembers else ys
    assert torch.equal(states[1], x)
    assert torch.allclose(states[-1], walked, rtol=1e-13, atol=1e-13)


# the contract


class Counting:
    """eps of N(0, I), counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, t):
        self.calls += 1
        return x * VP().sigma(t).to(x).reshape(-1, *[1] * (x.dim() - 1))


def test_evaluations_of_the_network():
    n, x = 6, torch.ones(2, 3, dtype=F64)
    down = torch.cat((log_snr_grid(VP(), n - 1), torch.zeros(1, dtype=F64)))
    for sampler, wanted in ((heun, 2 * n - 1), (ddim, n), (dpmpp_2m, n), (ancestral, n), (euler_maruyama, n)):
        net = Counting()
        denoiser = Denoiser(net, VP(), "eps")
        sampler(denoiser, x, down, **({"seed": 1} if sampler in (ancestral, euler_maruyama) else {}))
        assert net.calls == wanted, sampler


@pytest.mark.parametrize("sampler", [ancestral, euler_maruyama, heun])
def test_noise_belongs_to_the_sample(sampler):
    """A row's noise does not depend on the batch, the dtype or the order of calls."""
    how = {"churn": 3.0} if sampler is heun else {}
    denoiser, grid = RING.denoiser(VP()), uniform_grid(VP(), 10, t_min=0.05)
    x = prior(VP(), 6, (2,), seed=4, dtype=F64)
    whole = sampler(denoiser, x, grid, seed=4, **how)
    parts = [sampler(denoiser, x[i : i + 2], grid, seed=4, first_path=i, **how) for i in (0, 2, 4)]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-13, atol=1e-13)  # products of matrices round by shape
    assert torch.equal(prior(VP(), 2, (2,), seed=4, first_path=3, dtype=F64), x[3:5])
    z = ss.Philox(4).normals(0, 6, 1, 10, 2, dtype=F64, device=torch.device("cpu"))
    assert torch.equal(sampler(denoiser, x, grid, noise=z, **how), whole)
    assert not torch.equal(sampler(denoiser, x, grid, seed=5, **how), whole)
    single = sampler(denoiser, x.float(), grid, seed=4, **how)
    assert single.dtype == torch.float32
    # rounding of 10 steps, grown by the flow between modes: e^(Lipschitz constant) stays below 1e3
    assert torch.allclose(single.double(), whole, atol=1e-3)


@pytest.mark.parametrize("sampler", [ddim, ancestral, euler_maruyama, heun, dpmpp_2m])
def test_float32_networks_and_a_condition_for_every_row(sampler):
    """A module's weights are float32, labels are one a row: the result is float32, and that of the rows by themselves."""
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.labels = torch.nn.Linear(3, 2), torch.nn.Embedding(3, 2)

        def forward(self, x, t, label):
            return self.layer(torch.cat((x, t[:, None]), 1)) + self.labels(label)

    denoiser = Denoiser(Net(), VP(), "v", null=torch.tensor(2))
    x, labels, grid = prior(VP(), 4, (2,), seed=1), torch.tensor([0, 1, 1, 0]), uniform_grid(VP(), 5)
    with torch.no_grad():
        out = sampler(guide(denoiser, 2.0, labels), x, grid, seed=1)
        alone = sampler(guide(denoiser, 2.0, labels[2]), x[2:3], grid, seed=1, first_path=2)
    assert out.dtype == torch.float32
    assert torch.allclose(out[2:3], alone, atol=1e-4)  # rounding of 5 float32 steps
    with pytest.raises(ShapeError, match="4 rows for a batch of 3"):
        sampler(guide(denoiser, 2.0, labels), x[:3], grid, seed=1)


def test_images_and_callback():
    net = Counting()
    x = prior(VP(), 3, (2, 4, 4), seed=1, dtype=F64)
    seen = []
    out = ddim(Denoiser(net, VP(), "eps"), x, uniform_grid(VP(), 5), callback=lambda k, y: seen.append((k, y)))
    assert out.shape == x.shape
    assert [k for k, _ in seen] == list(range(6))
    assert torch.equal(seen[0][1], x)
    assert torch.equal(seen[-1][1], out)


@pytest.mark.parametrize("sampler", [ddim, ancestral, euler_maruyama, heun, dpmpp_2m])
def test_samplers_are_differentiable(sampler):
    """d x_0 / d x_T and d x_0 / d beta_max by autograd, against central differences on the same noise: O(1e-12 / 1e-6) + O(h^2)."""
    grid = log_snr_grid(VP(), 6, t_min=0.05)
    z = given((6, 1, 2))

    def run(x, beta_max):
        schedule = VP(beta_max=beta_max)
        return sampler(RING.denoiser(schedule), x, grid, noise=z)[0, 0]

    x, beta = given((1, 2)).requires_grad_(), torch.tensor(20.0, dtype=F64, requires_grad=True)
    found = torch.autograd.grad(run(x, beta), (x, beta))
    with torch.no_grad():
        h = 1e-5
        unit = torch.tensor([[1.0, 0.0]], dtype=F64)
        by_x = (run(x + h * unit, beta) - run(x - h * unit, beta)) / (2 * h)
        by_beta = (run(x, beta + h) - run(x, beta - h)) / (2 * h)
    assert float(found[0][0, 0]) == pytest.approx(float(by_x), rel=1e-6, abs=1e-7)
    assert float(found[1]) == pytest.approx(float(by_beta), rel=1e-6, abs=1e-7)


def test_derivatives_are_finite_where_the_grid_ends_at_zero():
    """sigma = 0 has infinite derivatives of its root and logarithm; a parameter has no influence there."""
    grid = torch.cat((log_snr_grid(VP(), 4, t_min=0.05), torch.zeros(1, dtype=F64)))
    for sampler in (ddim, ancestral, heun, dpmpp_2m, euler_maruyama):
        beta = torch.tensor(20.0, dtype=F64, requires_grad=True)
        out = sampler(RING.denoiser(VP(beta_max=beta)), given((3, 2)), grid, noise=given((5, 3, 2)))
        (grad,) = torch.autograd.grad(out.sum(), beta)
        assert torch.isfinite(grad), sampler


def test_from_pure_noise():
    """Where no signal is left, DDIM, 2M and the velocity's Euler work, and agree with a start just before."""
    x = given((5, 2))
    flow, almost = CondOT(), CondOT(end=1 - 1e-7)
    for sampler, how in ((ddim, {}), (dpmpp_2m, {}), (euler_maruyama, {"eta": 0.0})):
        found = sampler(RING.denoiser(flow), x, uniform_grid(flow, 40, t_min=0.05), **how)
        near = sampler(RING.denoiser(almost), x, uniform_grid(almost, 40, t_min=0.05), **how)
        assert torch.allclose(found, near, atol=1e-4), (
            sampler
        )  # the first step differs by 1e-7, through O(1e2) derivatives
    grid = uniform_grid(flow, 40, t_min=0.05)
    with pytest.raises(ArgumentError, match="t_of_log_snr"):
        heun(RING.denoiser(flow), x, grid)
    with pytest.raises(ArgumentError, match="ddim"):
        euler_maruyama(RING.denoiser(flow), x, grid, seed=1)


# grids


def test_grids():
    assert edm_grid(EDM(), 18)[:3].tolist() == pytest.approx([80.0, 57.586, 40.786], rel=1e-4)  # rho = 7, 80 to 0.002
    assert edm_grid(EDM(), 18)[-2:].tolist() == pytest.approx([0.002, 0.0])
    grid = log_snr_grid(Cosine(), 10, t_min=1e-3)
    steps = Cosine().log_snr(grid).diff()
    assert torch.allclose(steps, steps.mean().expand(10), rtol=1e-8)
    assert uniform_grid(VE(), 5, t_min=0.5).tolist() == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    # float32 times are taken for what they stand for, plain numbers exactly
    denoiser, x = RING.denoiser(VP()), given((2, 2))
    exact = ddim(denoiser, x, [1.0, 0.7, 0.3, 0.1])
    assert torch.equal(ddim(denoiser, x, torch.tensor([1.0, 0.7, 0.3, 0.1], dtype=F64)), exact)


BAD = {
    "rising": (lambda d, x: ddim(d, x, [0.1, 0.5, 1.0]), GridError, "flip"),
    "repeated": (lambda d, x: ddim(d, x, [1.0, 0.5, 0.5]), GridError, "repeats"),
    "one time": (lambda d, x: ddim(d, x, [1.0]), ShapeError, "two times"),
    "indices": (lambda d, x: ddim(d, x, [999, 500, 0]), GridError, "i \\+ 1"),
    "NaN": (lambda d, x: ddim(d, x, [1.0, math.nan]), GridError, "nan"),
    "eta above 1": (lambda d, x: ddim(d, x, [1.0, 0.5], eta=1.5), ArgumentError, "ancestral"),
    "eta below 0": (lambda d, x: euler_maruyama(d, x, [1.0, 0.5], eta=-1.0), ArgumentError, ">= 0"),
    "eta a word": (lambda d, x: ddim(d, x, [1.0, 0.5], eta="ddpm"), ArgumentTypeError, "number"),
    "option": (lambda d, x: walk(d, x, [1.0, 0.5], ddim_step, options={"churn": 1.0}), ArgumentTypeError, "churn"),
    "EM option": (lambda d, x: walk(d, x, [1.0, 0.5], options={"gamma": 1.0}), ArgumentError, "eta"),
    "churn": (lambda d, x: heun(d, x, [1.0, 0.5], churn=-1.0), ArgumentError, "churn"),
    "noise shape": (lambda d, x: ancestral(d, x, [1.0, 0.5], noise=torch.zeros(3, 2, 2)), ShapeError, "N, B"),
    "seed and noise": (lambda d, x: ancestral(d, x, [1.0, 0.5], seed=1, noise=ss.Philox(1)), ArgumentError, "not both"),
    "noise no source": (lambda d, x: ancestral(d, x, [1.0, 0.5], noise=3), ArgumentTypeError, "Philox"),
    "integers": (lambda d, x: ddim(d, x.long(), [1.0, 0.5]), DtypeError, "float"),
    "one sample": (lambda d, x: ddim(d, x[0, 0], [1.0, 0.5]), ShapeError, "row"),
    "no predictor": (lambda d, x: ddim(lambda x, t: x, x, [1.0, 0.5]), ArgumentTypeError, "Denoiser"),
    "NaN start": (lambda d, x: ddim(d, x * math.nan, [1.0, 0.5]), NonFiniteError, "finite"),
    "prior count": (lambda d, x: prior(VP(), 0, (2,), seed=1), ArgumentError, "at least 1"),
    "steps": (lambda d, x: uniform_grid(VP(), 0), ArgumentError, "at least 1"),
    "event": (lambda d, x: prior(VP(), 2, 3, seed=1), ArgumentTypeError, "tuple"),
    "prior of no schedule": (lambda d, x: prior(d, 2, (3,), seed=1), ArgumentTypeError, "Schedule"),
    "churn a bool": (lambda d, x: heun(d, x, [1.0, 0.5], churn=True), ArgumentTypeError, "churn"),
    "first path": (lambda d, x: ancestral(d, x, [1.0, 0.5], seed=1, first_path=1.5), ArgumentTypeError, "first_path"),
    "noise for no use": (lambda d, x: ddim(d, x, [1.0, 0.5], noise="white"), ArgumentTypeError, "Philox"),
    "grid of no schedule": (lambda d, x: uniform_grid(3, 3), ArgumentTypeError, "Schedule"),
    "one number for a grid": (lambda d, x: heun(d, x, 0.5), ShapeError, "two times"),
    "t_min": (lambda d, x: uniform_grid(VP(), 3, t_min=2.0), GridError, "t_min"),
    "infinite log-SNR": (lambda d, x: log_snr_grid(CondOT(), 3), GridError, "t_start"),
    "noise levels": (lambda d, x: edm_grid(VP(), 10, r_max=1e6), ArgumentError, "r_max"),
    "one EDM step": (lambda d, x: edm_grid(EDM(), 1), ArgumentError, "at least 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call(RING.denoiser(VP()), given((2, 2)))


def test_a_network_that_blows_up_is_reported_with_its_step():
    denoiser = Denoiser(lambda x, t: x / (t[:, None] > 0.5), VP(), "eps")
    with pytest.raises(NonFiniteError, match="step 3 of 4") as caught:
        ddim(denoiser, given((2, 2)), [1.0, 0.75, 0.5, 0.25, 0.0])
    assert caught.value.step == 3


def test_moments_refuse_what_is_not_affine():
    sde = sampler_sde(RING.denoiser(VP()), [1.0, 0.5])
    with pytest.raises(ArgumentError, match="affine"):
        affine_moments(sde, torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), 2)


def test_an_option_with_the_name_of_a_parameter_is_refused():
    schedule = LogSNR(lambda t, p: p["gamma"] * (1 - 2 * t), {"gamma": torch.tensor(10.0, dtype=F64)})
    with pytest.raises(ArgumentError, match="rename"):
        heun(RING.denoiser(schedule), given((2, 2)), [0.9, 0.5], churn=2.0, seed=1)


def test_what_a_step_remembers():
    """None at first, then what it returned."""
    seen = []

    def step(denoiser, x, span, z, memory):
        seen.append(memory)
        return x, x + 1

    step.remembers = True
    walk(RING.denoiser(VP()), given((2, 2)), [1.0, 0.7, 0.5], step, draws=False)
    assert seen[0] is None
    assert torch.equal(seen[1], given((2, 2)) + 1)


def test_a_step_that_remembers_says_so():
    with pytest.raises(ShapeError, match="remembers"):
        walk(RING.denoiser(VP()), given((2, 2)), [1.0, 0.5], lambda d, x, span, z, memory: (x, x), seed=1)


def test_a_step_that_returns_something_else_is_refused():
    with pytest.raises(ShapeError, match="memory"):
        walk(RING.denoiser(VP()), given((2, 2)), [1.0, 0.5], lambda d, x, span, z, memory: (x[:, :1], None))
