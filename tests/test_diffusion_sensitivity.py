"""Derivatives of what a sampler brings, by every method of the core, against closed forms; the lean adjoint; adjoint matching."""

import math
import warnings

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

import sdesens as ss
from sdesens.diffusion import (
    VE,
    VP,
    CondOT,
    Denoiser,
    Guided,
    LogSNR,
    affine_moments,
    ddim,
    ddim_step,
    dpmpp_2m_step,
    euler_maruyama,
    guide,
    heun_step,
    log_snr_grid,
    prior,
    sampler_problem,
    sampler_sde,
    uniform_grid,
    walk,
)
from sdesens.diffusion.adjoint_matching import adjoint_matching_loss, lean_adjoint, matching_loss, remembered
from sdesens.diffusion.oracles import Gaussian
from sdesens.diffusion.predict import Predictor
from sdesens.errors import (
    ArgumentError,
    ArgumentTypeError,
    DetachedError,
    GridError,
    JumpError,
    MemoryWarning,
    NonFiniteError,
    ShapeError,
    UnknownParameterError,
)

F64 = torch.float64
ONE = torch.ones(1, dtype=F64)
EXACT = ("pathwise", "forward", "finite_difference")  # of the sampler's own gradient
STEPS = {
    "euler_maruyama": (None, {"eta": 0.7}),
    "ddim": (ddim_step, {"eta": 0.7}),
    "heun": (heun_step, {"gamma": 0.2}),
    "dpmpp_2m": (dpmpp_2m_step, {}),
}


def guided(mean=1.5, var_c=1.0, var_u=1.0, w=2.0, schedule=None):
    """Guidance between two Gaussian laws: N(mean, var_c) against N(0, var_u)."""
    schedule = schedule or VP()
    c, u = Gaussian(mean * ONE, var_c * ONE), Gaussian(0 * ONE, var_u * ONE)
    return Guided(c.denoiser(schedule), u.denoiser(schedule), w)


class Net(nn.Module):
    """A small conditional network with weights that are functions of their position."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 5, dtype=F64), nn.Linear(5, 2, dtype=F64)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.3 * torch.sin(torch.arange(p.numel(), dtype=F64) * (i + 1.3) + 1).reshape(p.shape))

    def forward(self, x, t, label):
        return self.outer(torch.tanh(self.inner(torch.cat((x, t[:, None]), 1)))) + 0.2 * x + label[:, None]


def network(schedule=None):
    denoiser = Denoiser(Net(), schedule or VP(), "v", null=torch.tensor(0.0, dtype=F64))
    return guide(denoiser, 1.5, torch.tensor(0.3, dtype=F64))


def reward(x):
    return x[:, 0] ** 2 + torch.sin(x).sum(1)


# every sampler, every parameter, every method


@pytest.mark.parametrize("name", STEPS)
def test_all_methods_agree_on_every_parameter_of_a_sampler(name):
    """Pathwise = forward to rounding, central differences on the same noise to 1e-6."""
    step, options = STEPS[name]
    problem = sampler_problem(
        network(),
        log_snr_grid(VP(), 12, t_min=0.02),
        reward,
        step=step,
        x=torch.tensor([0.3, -1.0], dtype=F64),
        **options,
    )
    wrt = ("net.inner.weight", "net.outer.bias", "guidance", "beta_min", "beta_max", "x_T", *options)
    found = {m: ss.sensitivity(problem, n_paths=32, method=m, wrt=wrt, seed=2, audit=False) for m in EXACT}
    for k in wrt:
        reference = found["pathwise"].gradient[k].mean
        scale = float(reference.abs().max())
        assert scale > 0, k
        assert float((found["forward"].gradient[k].mean - reference).abs().max()) < 1e-11 * scale, k
        assert float((found["finite_difference"].gradient[k].mean - reference).abs().max()) < 1e-6 * scale, k


def test_a_sampler_function_and_its_problem_are_one():
    """Path i of the problem is row i of the sampler that starts from the prior, and autograd through it has the same gradient."""
    denoiser, grid = network(), log_snr_grid(VP(), 10, t_min=0.02)
    problem = sampler_problem(denoiser, grid, reward, step=ddim_step, event=(2,), eta=0.5)
    result = ss.sensitivity(problem, n_paths=64, wrt=("net.inner.bias", "guidance"), seed=5, audit=False)
    x = prior(VP(), 64, (2,), seed=5, dtype=F64)
    weights = denoiser.conditional.net.inner.bias
    value = reward(ddim(denoiser, x, grid, eta=0.5, seed=5)).mean()
    (by_autograd,) = torch.autograd.grad(value, weights)
    assert float(result.value.mean) == pytest.approx(value.item(), rel=1e-12)
    assert torch.allclose(result.gradient["net.inner.bias"].mean, by_autograd, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("step", "options"), [(None, {"eta": 0.7}), (ddim_step, {"eta": 0.4})])
def test_the_prior_moves_with_the_schedule(step, options):
    """d/d sigma_max through the starting noise, too: against a schedule made anew, by central differences and autograd."""
    grid, law = [1.0, 0.8, 0.6, 0.4, 0.2, 0.05], Gaussian(ONE, 0.25 * ONE)

    def mean(sigma_max):
        schedule = VE(0.01, sigma_max)
        x = prior(schedule, 32, (1,), seed=3, dtype=F64)
        return walk(law.denoiser(schedule), x, grid, step, options, seed=3)[:, 0].square().mean()

    problem = sampler_problem(
        law.denoiser(VE(0.01, 5.0)), grid, lambda x: x[:, 0] ** 2, step=step, event=(1,), **options
    )
    found = ss.sensitivity(problem, n_paths=32, wrt="sigma_max", seed=3, audit=False)
    leaf = torch.tensor(5.0, dtype=F64, requires_grad=True)
    (by_autograd,) = torch.autograd.grad(mean(leaf), leaf)
    differences = float(mean(5.0 + 1e-5) - mean(5.0 - 1e-5)) / 2e-5
    assert float(found.gradient["sigma_max"].mean) == pytest.approx(float(by_autograd), rel=1e-10)
    assert float(by_autograd) == pytest.approx(differences, rel=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("method", ["adjoint", "torchsde_adjoint"])
def test_adjoints_know_of_the_starting_noise(method, eta):
    """They look at the end of a step, where the coefficients have jumped already: the limit from the left is theirs."""
    schedule, gaps = VE(0.1, 3.0), []
    law = Gaussian(ONE, 0.25 * ONE).denoiser(schedule)
    for n in (32, 128):
        grid = uniform_grid(schedule, n, t_min=0.3)
        problem = sampler_problem(law, grid, lambda x: x[:, 0] ** 2, event=(1,), eta=eta)
        one, two = (
            ss.sensitivity(problem, n_paths=2000, method=m, audit=False, seed=1, wrt="sigma_max")
            .gradient["sigma_max"]
            .mean
            for m in ("pathwise", method)
        )
        gaps.append(abs(float(one - two)) / abs(float(one)))
    # order 1 in the mean: a quarter, and a half more for what differs between the grids
    assert gaps[1] < 0.4 * gaps[0]
    assert gaps[1] < 0.1


def test_the_dtype_is_that_of_the_network():
    net = torch.nn.Linear(2, 2)
    denoiser = Denoiser(Thin(net), VP(), "v")
    problem = sampler_problem(denoiser, uniform_grid(VP(), 4), lambda x: x[:, 0], event=(2,))
    assert problem.y0.dtype == torch.float32
    result = ss.sensitivity(problem, n_paths=100, wrt="net.net.weight", seed=1, audit=False)
    x = prior(VP(), 100, (2,), seed=1)
    value = euler_maruyama(denoiser, x, uniform_grid(VP(), 4), seed=1)[:, 0].mean().item()
    assert float(result.value.mean) == pytest.approx(value, rel=1e-5)  # float32


def test_a_problem_is_refined_in_whole_steps():
    """The starting noise takes one unit of the problem's time, and no step may straddle its end."""
    problem = sampler_problem(guided(), uniform_grid(VP(), 4), lambda x: x[:, 0], step=ddim_step, event=(1,))
    assert problem.with_steps(10).n_steps == 10
    for n in (3, 7, 12):
        with pytest.raises(GridError, match="every time"):
            problem.with_steps(n)


@pytest.mark.parametrize("step", [None, ddim_step, heun_step, dpmpp_2m_step])
def test_half_steps_of_a_problem_are_those_of_the_refined_grid(step):
    grid = uniform_grid(VP(), 6, t_min=0.05)
    finer = torch.cat((grid.unfold(0, 2, 1).mean(1), grid)).sort(descending=True).values
    denoiser = Gaussian(ONE, 0.25 * ONE).denoiser(VP())
    size = 2 if step is dpmpp_2m_step else 1
    mean, cov = torch.zeros(size, 1, dtype=F64), torch.zeros(size, size, dtype=F64)
    mean = mean if size == 2 else mean[0]
    one = affine_moments(sampler_sde(denoiser, grid, step), mean, cov, 14, dt=0.5)
    two = affine_moments(sampler_sde(denoiser, finer, step), mean, cov, 13)
    # the start is drawn in two halves: the same law; 2M's first step is of first order, and here it is half as long in both
    assert torch.allclose(one[0], two[0], rtol=1e-12, atol=1e-12)
    assert torch.allclose(one[1], two[1], rtol=1e-12, atol=1e-12)


def test_derivatives_that_are_infinite_are_not_zero():
    """d/dgamma of churn is infinite at gamma = 0, and d/deta at 1 from pure noise: an error, not a number that misses it."""
    churned = sampler_problem(guided(), uniform_grid(VP(), 4), reward_of_one, step=heun_step, event=(1,), gamma=0.0)
    with pytest.raises(NonFiniteError):
        ss.sensitivity(churned, n_paths=32, wrt="gamma", audit=False)
    law = Gaussian(ONE, ONE).denoiser(CondOT())
    noise = sampler_problem(law, [1.0, 0.3, 0.1], reward_of_one, step=ddim_step, event=(1,), eta=1.0)
    with pytest.raises(NonFiniteError):
        ss.sensitivity(noise, n_paths=32, wrt="eta", audit=False)
    # to t = 0 nothing of eps is kept, whatever eta: differences around eta = 1 are fine, from where some signal is left
    problem = sampler_problem(guided(), [0.5, 0.3, 0.1, 0.0], reward_of_one, step=ddim_step, event=(1,), eta=1.0)
    one, two = (
        ss.sensitivity(problem, n_paths=64, wrt="eta", method=m, audit=False).gradient["eta"].mean
        for m in ("pathwise", "finite_difference")
    )
    assert float(one) == pytest.approx(float(two), rel=1e-5)


def test_from_no_signal_with_a_log_snr_of_ones_own():
    """Infinite at both ends: DDIM, ancestral too, has derivatives in its parameter, as a function and as a problem."""

    def line(a):
        return LogSNR(lambda t, p: p["a"] * (torch.log1p(-t) - torch.log(t)), {"a": a})

    law, grid, z = Gaussian(ONE, 0.25 * ONE), torch.linspace(1, 0, 9, dtype=F64), torch.ones(8, 4, 1, dtype=F64)
    x = torch.linspace(-1, 1, 4, dtype=F64)[:, None]
    for eta in (0.0, 0.5, 1.0):

        def total(a, eta=eta):
            return ddim(law.denoiser(line(a)), x, grid, eta=eta, noise=z).sum()

        leaf = torch.tensor(2.0, dtype=F64, requires_grad=True)
        (slope,) = torch.autograd.grad(total(leaf), leaf)
        h = 1e-5
        differences = (total(leaf.detach() + h) - total(leaf.detach() - h)) / (2 * h)
        assert float(slope) == pytest.approx(float(differences), rel=1e-6)
        problem = sampler_problem(
            law.denoiser(line(leaf.detach())), grid, reward_of_one, step=ddim_step, x=x[0], eta=eta
        )
        one, two = (
            ss.sensitivity(problem, n_paths=16, wrt="a", method=m, audit=False).gradient["a"].mean
            for m in ("pathwise", "finite_difference")
        )
        assert float(one) == pytest.approx(float(two), rel=1e-5)


def reward_of_one(x):
    return x[:, 0] ** 2


def test_parameters_by_pattern():
    problem = sampler_problem(network(), uniform_grid(VP(), 4), reward, event=(2,))
    found = ss.sensitivity(problem, n_paths=32, wrt=("net.inner.*", "beta_*"), audit=False).gradient
    assert set(found) == {"net.inner.weight", "net.inner.bias", "beta_min", "beta_max"}
    with pytest.raises(UnknownParameterError, match="no parameter"):
        ss.sensitivity(problem, n_paths=32, wrt="layers.*")
    assert len(repr(problem)) < 400  # no weights


class Thin(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x)


def test_crosscheck_of_the_reverse_sde():
    """All routes beside each other on the core's own Euler-Maruyama, the adjoints converging to it at their order."""
    problem = sampler_problem(guided(), uniform_grid(VP(), 32, t_min=0.05), lambda x: x[:, 0] ** 2, event=(1,))
    check = ss.crosscheck(problem, n_paths=1000, wrt=("guidance", "beta_max"), seed=1)
    assert check.ok, check


@pytest.mark.parametrize("method", ["likelihood_ratio", "malliavin", "vibrato"])
def test_methods_for_jumps_agree_with_pathwise(method):
    """On a smooth reward all estimate the same number: 4 standard errors of the difference, at least; 6e-5 each."""
    problem = sampler_problem(guided(), uniform_grid(VP(), 24, t_min=0.05), lambda x: x[:, 0] ** 2, event=(1,))
    one, other = (
        ss.sensitivity(problem, n_paths=4000, method=m, wrt="guidance", seed=s).gradient["guidance"]
        for m, s in (("pathwise", 3), (method, 4))
    )
    assert abs(float(one.mean - other.mean)) < 4 * math.hypot(float(one.standard_error), float(other.standard_error))


def test_a_reward_that_jumps_is_refused_and_has_its_methods():
    """P(x_0 > 1) in the guidance scale: pathwise would be zero; the likelihood ratio has the normal density."""
    problem = sampler_problem(
        guided(), uniform_grid(VP(), 48, t_min=0.02), lambda x: (x[:, 0] > 1.0).to(F64), event=(1,)
    )
    with pytest.raises((JumpError, DetachedError)):
        ss.sensitivity(problem, n_paths=1000, wrt="guidance")
    sde = problem.sde

    def chance(w):
        mean, cov = affine_moments(
            sde.with_params(guidance=w), torch.zeros(1, dtype=F64), torch.zeros(1, 1, dtype=F64), 49
        )
        return torch.special.ndtr((mean[0] - 1.0) / cov[0, 0].sqrt())

    w = torch.tensor(2.0, dtype=F64, requires_grad=True)
    (exact,) = torch.autograd.grad(chance(w), w)
    found = ss.sensitivity(problem, n_paths=20_000, method="vibrato", wrt="guidance", seed=1).gradient["guidance"]
    assert abs(float(found.mean - exact)) < 4 * float(found.standard_error)  # the chain's own number: no bias


# closed forms


@pytest.mark.parametrize("method", EXACT)
def test_guidance_of_the_flow_with_unit_variances(method):
    """PF-ODE: d E[x_0] / dw = mu (alpha_0 - alpha_T), path by path. Heun with 2,000 steps leaves 2e-7."""
    grid = log_snr_grid(VP(), 2000, t_min=1e-4)
    problem = sampler_problem(guided(), grid, lambda x: x[:, 0], step=heun_step, x=0.3 * ONE)
    found = ss.sensitivity(problem, n_paths=2, method=method, wrt="guidance", audit=False, check=False).gradient[
        "guidance"
    ]
    exact = 1.5 * float(VP().alpha(grid[-1]) - VP().alpha(1.0))
    assert float(found.mean) == pytest.approx(exact, abs=1e-6)
    assert float(found.standard_error) < 1e-12  # deterministic


def tilted_mean(w, mu, v_c, v_u, schedule, grid, eta):
    """m and n = dm/dw at the end of a grid, by an independent solver: the scalar linear ODE of guided sampling between Gaussians."""

    def rhs(t, y):
        m, n = y
        f, g2, alpha, sigma = (float(x) for x in (schedule.f(t), schedule.g2(t), schedule.alpha(t), schedule.sigma(t)))
        c, V_u, V_c = (1 + eta**2) * g2 / 2, alpha**2 * v_u + sigma**2, alpha**2 * v_c + sigma**2
        drift = f * m + c * ((1 - w) * m / V_u + w * (m - alpha * mu) / V_c)
        return [drift, (f + c * ((1 - w) / V_u + w / V_c)) * n + c * ((m - alpha * mu) / V_c - m / V_u)]

    found = solve_ivp(rhs, (float(grid[0]), float(grid[-1])), [0.0, 0.0], rtol=1e-11, atol=1e-12, method="DOP853")
    return found.y[:, -1]


def test_guidance_of_the_flow_with_unequal_variances():
    grid = log_snr_grid(VP(), 3000, t_min=1e-3)  # order 2: 1.5e-6 with 2,000
    problem = sampler_problem(guided(var_c=0.3), grid, lambda x: x[:, 0], step=dpmpp_2m_step, x=0 * ONE)
    result = ss.sensitivity(problem, n_paths=2, wrt="guidance", audit=False, check=False)
    mean, slope = tilted_mean(2.0, 1.5, 0.3, 1.0, VP(), grid, 0.0)
    assert float(result.value.mean) == pytest.approx(mean, abs=1e-6)
    assert float(result.gradient["guidance"].mean) == pytest.approx(slope, abs=1e-6)


def test_guidance_of_the_reverse_sde_with_unit_variances():
    """eta = 1: mu (1 - alpha_T^2), path by path, at order 1 of the steps."""
    errors = []
    for n in (200, 400):
        grid = uniform_grid(VP(), n, t_min=1e-6)
        problem = sampler_problem(guided(), grid, lambda x: x[:, 0], event=(1,))
        found = ss.sensitivity(problem, n_paths=64, wrt="guidance", audit=False).gradient["guidance"]
        assert float(found.standard_error) < 1e-12  # deterministic
        errors.append(float(found.mean) - 1.5 * (1 - float(VP().alpha(1.0)) ** 2))
    assert abs(errors[1]) < 0.01
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


def test_guidance_of_the_reverse_sde_with_unequal_variances():
    """Here it differs from path to path: 4 standard errors (6e-5), the bias of the steps estimated and removed."""
    grid = uniform_grid(VP(), 200, t_min=1e-3)
    problem = sampler_problem(guided(var_c=0.3), grid, lambda x: x[:, 0], event=(1,))
    result = ss.sensitivity(problem, n_paths=4000, wrt="guidance", bias=True, seed=4, audit=False)
    found, bias = result.gradient["guidance"], result.bias["guidance"]
    exact = tilted_mean(2.0, 1.5, 0.3, 1.0, VP(), grid, 1.0)[1]
    error = math.hypot(float(found.standard_error), float(bias.standard_error))
    assert abs(float(found.mean - bias.mean) - exact) < 4 * error
    assert error < 0.03 * abs(exact)


def test_a_quadratic_reward_within_four_standard_errors():
    """d E[x_0^2] / dw = 2 m dm/dw for unit variances, by the reverse SDE with its bias estimated and removed; 6e-5 each."""
    grid = uniform_grid(VP(), 200, t_min=1e-4)
    problem = sampler_problem(guided(), grid, lambda x: x[:, 0] ** 2, event=(1,))
    result = ss.sensitivity(problem, n_paths=4000, wrt="guidance", bias=True, seed=6, audit=False)
    mean, slope = tilted_mean(2.0, 1.5, 1.0, 1.0, VP(), grid, 1.0)
    found, bias = result.gradient["guidance"], result.bias["guidance"]
    error = math.hypot(float(found.standard_error), float(bias.standard_error))
    assert abs(float(found.mean - bias.mean) - 2 * mean * slope) < 4 * error
    assert error < 0.01 * abs(2 * mean * slope)  # and that says something


def test_the_start_of_the_flow():
    """d x_0 / d x_T = sqrt(V_0 / V_T) for Gaussian data."""
    grid, law = log_snr_grid(VP(), 1000, t_min=1e-3), Gaussian(ONE, 0.25 * ONE)
    problem = sampler_problem(law.denoiser(VP()), grid, lambda x: x[:, 0], step=heun_step, x=0.4 * ONE)
    found = ss.sensitivity(problem, n_paths=2, wrt="x_T", audit=False, check=False).gradient["x_T"].mean
    var = [float(VP().alpha(t) ** 2 * 0.25 + VP().sigma(t) ** 2) for t in (grid[0], grid[-1])]
    assert float(found[0]) == pytest.approx(math.sqrt(var[1] / var[0]), abs=1e-6 * 10)  # order 2: 5.8e-6 at 1,000 steps


def test_eta_and_schedule_of_the_reverse_sde_against_exact_moments():
    """The chain for Gaussian data is affine: its exact moments, differentiated by autograd, are the expectation's own derivative."""
    schedule = VP()
    denoiser = Gaussian(ONE, 0.25 * ONE).denoiser(schedule)
    grid = uniform_grid(schedule, 40, t_start=0.4, t_min=1e-3)
    problem = sampler_problem(denoiser, grid, lambda x: x[:, 0] ** 2, event=(1,), eta=0.6)
    result = ss.sensitivity(problem, n_paths=20_000, wrt=("eta", "beta_max"), seed=7, audit=False)
    leaves = {"eta": torch.tensor(0.6, dtype=F64), "beta_max": torch.tensor(20.0, dtype=F64)}
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    mean, cov = affine_moments(problem.sde.with_params(**leaves), 0 * ONE, torch.zeros(1, 1, dtype=F64), 41)
    exact = torch.autograd.grad(mean[0] ** 2 + cov[0, 0], list(leaves.values()))
    for (k, found), number in zip(result.gradient.items(), exact, strict=True):
        assert abs(float(found.mean - number)) < 4 * float(found.standard_error), k  # 6e-5 each
        assert float(found.standard_error) < 0.2 * abs(float(number)), k


def test_eta_changes_what_is_remembered_of_a_wrong_start():
    """From N(0, 1) at t = 0.4: E[x_0] = m (1 - alpha_T k), k = sqrt(V_0/V_T) kappa^(eta^2/2), kappa = alpha_T^2 s^2 / V_T."""
    schedule, law = VP(), Gaussian(ONE, 0.25 * ONE)
    alpha = float(schedule.alpha(0.4))
    v_T = 0.25 * alpha**2 + float(schedule.sigma(0.4)) ** 2
    kappa, eta = alpha**2 * 0.25 / v_T, 0.8
    exact = -alpha * math.sqrt(0.25 / v_T) * kappa ** (eta**2 / 2) * eta * math.log(kappa)
    errors = []
    for n in (400, 800):
        grid = uniform_grid(schedule, n, t_start=0.4, t_min=1e-6)
        problem = sampler_problem(law.denoiser(schedule), grid, lambda x: x[:, 0], event=(1,), eta=eta)
        leaf = torch.tensor(eta, dtype=F64, requires_grad=True)
        mean, _ = affine_moments(problem.sde.with_params(eta=leaf), 0 * ONE, torch.zeros(1, 1, dtype=F64), n + 1)
        errors.append(float(torch.autograd.grad(mean[0], leaf)[0]) - exact)
    assert abs(errors[1]) < 0.02
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.15)


# the lean adjoint and adjoint matching


def paths(denoiser, x, grid, eta, seed):
    states = []
    walk(denoiser, x, grid, options={"eta": eta}, seed=seed, callback=lambda k, x: states.append(x))
    return torch.stack(states)


def test_lean_adjoint_of_a_gaussian_is_deterministic():
    """eta = 1, r = a x: a~ = -a alpha s^2 / V_t on every path, up to the order of the steps."""
    schedule, a, errors = VP(), 0.7, []
    base = Gaussian(ONE, 0.25 * ONE).denoiser(schedule)
    for n in (400, 800):
        grid = uniform_grid(schedule, n, t_min=1e-5)
        xs = paths(base, prior(schedule, 16, (1,), seed=1, dtype=F64), grid, 1.0, 1)
        found = lean_adjoint(base, xs, grid, lambda x: a * x[:, 0])[..., 0]
        assert float(found.var(1).max()) < 1e-24  # zero: the Jacobian does not depend on x
        alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
        exact = -a * alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        errors.append(float((found[:, 0] - exact).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)
    assert errors[1] < 5e-3


def test_lean_adjoint_is_the_gradient_of_the_base_chain():
    """Along paths of the base itself nothing is left out: a at grid[0] is -d r(x_0) / d x_T, by autograd through the sampler."""
    base, grid = network(), uniform_grid(VP(), 15, t_min=0.05)
    x = prior(VP(), 3, (2,), seed=2, dtype=F64).requires_grad_()
    xs = paths(base, x, grid, 1.0, 2)
    (through,) = torch.autograd.grad(reward(xs[-1]).sum(), x)
    assert torch.allclose(lean_adjoint(base, xs, grid, reward)[0], -through, rtol=1e-10, atol=1e-12)


class Shifted(Predictor):
    """A base whose score is shifted by c at each of N times: the class that contains the optimum for Gaussian data."""

    def __init__(self, base, grid, shift):
        self.base, self.grid, self.shift, self.schedule = base, grid, shift, base.schedule

    @property
    def params(self):
        return {**self.base.params, "shift": self.shift}

    def with_params(self, p):
        return Shifted(self.base.with_params(p), self.grid, p.get("shift", self.shift))

    def pair(self, x, t):
        k = int((self.grid - float(t)).abs().argmin())
        x0, eps = self.base.pair(x, t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return x0 + sigma**2 / alpha * self.shift[k], eps - sigma * self.shift[k]


@pytest.mark.parametrize("eta", [1.0, 0.7, 0.5])
def test_adjoint_matching_reaches_the_tilted_law_or_the_predicted_part_of_it(eta):
    """Base N(1, 1/4), r = a x: p* = N(1 + a/4, 1/4). With the start remembered, the shift is 1 - kappa^(eta^2) of that."""
    schedule, a, n = VP(), 0.8, 1000
    base = Gaussian(ONE, 0.25 * ONE).denoiser(schedule)
    grid = uniform_grid(schedule, n, t_start=0.5 if eta < 1 else None, t_min=1e-5)
    alpha, sigma = float(schedule.alpha(grid[0])), float(schedule.sigma(grid[0]))
    std = math.sqrt(0.25 * alpha**2 + sigma**2)
    x = alpha + std * torch.linspace(-2, 2, 8, dtype=F64)[:, None]

    shift = torch.zeros(n, 1, dtype=F64, requires_grad=True)
    model = Shifted(base, grid[:-1], shift)
    xs = paths(base, x, grid, eta, 3)
    adjoint = lean_adjoint(base, xs, grid, lambda x: a * x[:, 0], eta=eta)
    loss = matching_loss(model, base, xs, adjoint, grid, eta=eta)
    (slope,) = torch.autograd.grad(loss.sum(), shift)
    # the loss is quadratic in each c_k: its minimum from value and slope at 0, curvature h ((1+eta^2) g / (2 eta))^2 a path
    h, g2 = (grid[:-1] - grid[1:])[:, None], schedule.g2(grid[:-1])[:, None]
    best = -slope / (8 * h * g2 * ((1 + eta**2) / (2 * eta)) ** 2)
    tuned = Shifted(base, grid[:-1], best)
    at_best = matching_loss(tuned, base, xs, adjoint, grid, eta=eta)
    assert float(at_best.max()) < 1e-20  # every path's target is met: zero variance
    assert torch.allclose(best, -2 * eta**2 / (1 + eta**2) * adjoint[1:, 0], rtol=1e-9, atol=1e-12)

    ends = []
    for denoiser in (base, tuned):
        sde = sampler_sde(denoiser, grid, start=0.0, eta=eta)
        ends.append(affine_moments(sde, alpha * ONE, std**2 * torch.ones(1, 1, dtype=F64), n + 1))
    moved = float(ends[1][0] - ends[0][0])
    share = 1 - remembered(schedule, eta, data_std=0.5, t=float(grid[0]))
    # order 1 in h = 1e-3 with beta up to 20: a few per cent at most
    assert moved / (0.25 * a) == pytest.approx(share, abs=0.01)
    assert float(ends[1][1]) == pytest.approx(0.25, rel=0.01)  # the variance is kept
    if eta == 1.0:
        assert share > 0.9999  # memoryless: the whole shift
    if eta == 0.5:
        assert share < 0.75  # a control: at t = 0.5 a good part is missing


def test_memory():
    """Equation (3): all of the start at eta = 0, (4.3e-5)^(eta^2) for unit data and VP."""
    alpha = float(VP().alpha(1.0))
    for eta in (0.0, 0.3, 1.0):
        assert remembered(VP(), eta) == pytest.approx(alpha ** (2 * eta**2), rel=1e-12)


def test_a_round_of_adjoint_matching_trains():
    """The gradient reaches the network, a step along it lowers the loss on its paths, and short of memorylessness it warns."""
    base = network()
    model = network()
    grid, x = uniform_grid(VP(), 20, t_min=0.01), prior(VP(), 32, (2,), seed=8, dtype=F64)
    weights = list(model.conditional.net.parameters())

    def round_(**how):
        return adjoint_matching_loss(model, base, x, grid, reward, seed=8, **how).mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = round_()
    slopes = torch.autograd.grad(before, weights)
    assert all(float(s.abs().max()) > 0 for s in slopes)
    with torch.no_grad():
        for w, s in zip(weights, slopes, strict=True):
            w -= 1e-6 * s / max(1.0, float(s.abs().max()))
    xs = paths(base, x, grid, 1.0, 8).detach()  # the model was its base when these were sampled
    after = matching_loss(model, base, xs, lean_adjoint(base, xs, grid, reward), grid).mean()
    assert after.item() < before.item()
    adjoint = lean_adjoint(base, xs, grid, reward)
    each = [matching_loss(model, base, xs, adjoint, grid, at=[k]) / 20 for k in range(20)]  # one step, scaled up to all
    some = matching_loss(model, base, xs, adjoint, grid, at=[0, 7, 19])
    assert torch.allclose(some, 20 / 3 * (each[0] + each[7] + each[19]), rtol=1e-12)
    assert torch.allclose(matching_loss(model, base, xs, adjoint, grid), sum(each[1:], each[0]), rtol=1e-12)
    with pytest.warns(MemoryWarning, match="eta = 1"):
        round_(eta=0.5)


BAD = {
    "no start": (lambda d, g: sampler_problem(d, g, reward), ArgumentError, "event"),
    "two starts": (lambda d, g: sampler_problem(d, g, reward, x=ONE, event=(1,)), ArgumentError, "event"),
    "reward": (lambda d, g: sampler_problem(d, g, "best", event=(1,)), ArgumentTypeError, "reward"),
    "option": (
        lambda d, g: sampler_problem(d, g, reward, step=heun_step, event=(1,), eta=1.0),
        ArgumentTypeError,
        "eta",
    ),
    "no predictor": (lambda d, g: sampler_problem(reward, g, reward, event=(1,)), ArgumentTypeError, "Denoiser"),
    "xs": (lambda d, g: lean_adjoint(d, torch.zeros(3, 2, 1), g, reward), ShapeError, "all 5 grid points"),
    "eta 0": (
        lambda d, g: adjoint_matching_loss(d, d, torch.zeros(2, 1, dtype=F64), g, reward, eta=0.0),
        ArgumentError,
        "nothing to control",
    ),
    "detached": (
        lambda d, g: lean_adjoint(d, torch.zeros(5, 2, 1, dtype=F64), g, lambda x: x.detach()[:, 0]),
        ArgumentError,
        "autograd",
    ),
    "reward shape": (
        lambda d, g: lean_adjoint(d, torch.zeros(5, 2, 1, dtype=F64), g, lambda x: x),
        ShapeError,
        "one number a sample",
    ),
    "other schedule": (
        lambda d, g: adjoint_matching_loss(
            Gaussian(ONE, ONE).denoiser(CondOT(end=0.9)), d, torch.zeros(2, 1, dtype=F64), g, reward, seed=1
        ),
        ArgumentError,
        "made for",
    ),
    "labels": (
        lambda d, g: sampler_problem(
            Denoiser(lambda x, t, c: x, VP(), "v", null=torch.zeros(())).given(torch.zeros(100)), g, reward, event=(1,)
        ),
        ShapeError,
        "share one",
    ),
    "start": (lambda d, g: sampler_problem(d, g, reward, event=(1,), start=2.0), ArgumentTypeError, "start"),
    "a sampler for a step": (
        lambda d, g: sampler_problem(d, g, reward, step=ddim, event=(1,)),
        ArgumentTypeError,
        "ddim_step",
    ),
    "lean, eta 0": (
        lambda d, g: lean_adjoint(d, torch.zeros(5, 2, 1, dtype=F64), g, reward, eta=0.0),
        ArgumentError,
        "nothing to control",
    ),
    "remembered": (lambda d, g: remembered(VP(), -1.0), ArgumentError, "eta"),
    "x_T taken": (
        lambda d, g: sampler_problem(
            Denoiser(lambda x, t, p: x, LogSNR(lambda t, p: p["x_T"] * (1 - 2 * t), {"x_T": ONE[0]}), "v"),
            g,
            reward,
            x=ONE,
        ),
        ArgumentError,
        "x_T",
    ),
    "at": (
        lambda d, g: matching_loss(d, d, torch.zeros(5, 2, 1, dtype=F64), torch.zeros(5, 2, 1, dtype=F64), g, at=[7]),
        ArgumentError,
        "0 ... 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call(Gaussian(ONE, ONE).denoiser(VP()), uniform_grid(VP(), 4))
