"""The forward process as the core's SDE, its exact paths and draws, the reverse SDE and the probability-flow ODE.

The SDE is linear, so that moments of Euler-Maruyama's chain are exact numbers: with a_k = 1 + f(t_k) h,

    mean <- a_k mean,    variance <- a_k^2 variance + g(t_k)^2 h,                                  (1)

and tangents Z = dx/dtheta are jointly Gaussian with x, by the derivative of the same recursion. No Monte Carlo is needed to
see an order of convergence.
"""

import math
import pickle

import numpy as np
import pytest
import torch
from diffusion_cases import D, call, identity, scalar
from problems import slope
from scipy.integrate import quad
from torch import nn
from torch.func import jvp

from sdesens import Estimate, GivenNoise, Philox, Problem, sdeint, sensitivity, tangent_paths
from sdesens.diffusion import (
    EDM,
    VE,
    VP,
    Clipped,
    CondOT,
    Cosine,
    Denoiser,
    Guided,
    LogSNR,
    Schedule,
    SubVP,
    Table,
    guide,
)
from sdesens.errors import ArgumentError, ArgumentTypeError, GridError, NonFiniteError


def straight(t, p):
    return p["top"] - 20 * t


SCHEDULES = {
    "VP": VP(),
    "SubVP": SubVP(),
    "Cosine": Cosine(),
    "VE": VE(),
    "EDM": EDM(2.0),
    "CondOT": CondOT(),
    "LogSNR": LogSNR(straight, {"top": scalar(10.0)}),
    "Table": Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=D)),
}
EVERY = pytest.mark.parametrize("schedule", list(SCHEDULES.values()), ids=list(SCHEDULES))
STEPS = [64, 128, 256, 512, 1024]


def end(ys, p):
    return ys[-1, :, 0]


def cosine_of_end(ys, p):
    return torch.cos(2 * ys[-1, :, 0])


def gentle(ys, p):
    """For states up to 140, which a network that knows nothing makes of noise."""
    return torch.sin(ys[-1, :, 0] / 20)


# Euler-Maruyama on as_sde() against alpha and sigma


def factors(schedule: Schedule, t: float, n: int, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """1 + f h and g^2 h at the left points of n steps to t; at the right points with shift = 1."""
    at = (torch.arange(n, dtype=D) + shift) * t / n
    return 1 + schedule.f(at).numpy() * t / n, schedule.g2(at).numpy() * t / n


def chain(schedule: Schedule, t: float, n: int) -> tuple[float, float]:
    """Equation (1) from x_0 = 1: mean and variance."""
    mean, variance = 1.0, 0.0
    for a, noise in zip(*factors(schedule, t, n), strict=True):
        mean, variance = a * mean, a**2 * variance + noise
    return mean, variance


def transition(schedule: Schedule, t: float) -> tuple[float, float]:
    """The SDE's own mean and variance from x_0 = 1: schedules that begin with noise have less of it here."""
    mean = (schedule.alpha(t) / schedule.alpha(0.0)).item()
    return mean, (schedule.sigma(t) ** 2).item() - mean**2 * (schedule.sigma(0.0) ** 2).item()


@EVERY
@pytest.mark.parametrize("part", [0.25, 0.8])
def test_euler_reproduces_alpha_and_sigma_at_order_one(schedule, part):
    t = part * schedule.t_max
    errors = np.array([np.abs(np.subtract(chain(schedule, t, n), transition(schedule, t))) for n in STEPS])
    if not isinstance(
        schedule, VE | EDM | CondOT
    ):  # there the chain's mean is exact: f = 0, or a product that telescopes
        assert slope(STEPS, errors[:, 0]) == pytest.approx(1, abs=0.05)
    else:
        assert errors[:, 0].max() < 1e-13  # 1,024 roundings
    assert slope(STEPS, errors[:, 1]) == pytest.approx(1, abs=0.05)
    if schedule is SCHEDULES["VP"] and part == 0.25:
        assert errors[-1].max() < 2e-4
        assert errors[-1] == pytest.approx([1.7e-4, 1.4e-4], abs=5e-6)  # as published


@EVERY
def test_the_core_solves_the_chain(schedule):
    """On given noise: without noise the mean, with one unit impulse a path the terms whose squares are the variance."""
    n, t = 64, 0.8 * schedule.t_max
    z = torch.cat((torch.zeros(n, 1, dtype=D), torch.eye(n, dtype=D)), 1)[..., None]
    x0 = torch.ones(n + 1, 1, dtype=D)
    ys = sdeint(schedule.as_sde(), x0, (0.0, t), n_steps=n, bm=GivenNoise(z))[-1, :, 0]
    mean, variance = chain(schedule, t, n)
    # n roundings of numbers of order 1; two ways to compute f and g at a time that is itself rounded
    assert ys[0].item() == pytest.approx(mean, rel=1e-12)
    assert (ys[1:] - ys[0]).square().sum().item() == pytest.approx(variance, rel=1e-12)


def test_the_right_point_is_another_chain():
    """Negative control: coefficients at the end of each step miss the core's chain by a percent."""
    a, _ = factors(VP(), 0.8, 64, shift=1)
    assert abs(a.prod() / chain(VP(), 0.8, 64)[0] - 1) > 1e-2


@pytest.mark.parametrize("method", ["pathwise", "forward", "adjoint"])
@pytest.mark.parametrize("name", ["VP", "SubVP", "Cosine", "LogSNR", "Table"])
def test_the_derivative_in_x0_is_alpha(name, method):
    """Every path's, for the noise is additive: a product over left points, over right ones for the continuous adjoint."""
    schedule, t, steps = SCHEDULES[name], 0.3, (32, 64, 128)
    errors = []
    for n in steps:
        problem = Problem(schedule.as_sde(), end, torch.ones(1, dtype=D), (0.0, t), n)
        found = sensitivity(problem, n_paths=100, method=method, wrt="y0", seed=1).gradient["y0"]
        exact = factors(schedule, t, n, shift=method == "adjoint")[0].prod()
        assert found.mean.item() == pytest.approx(exact, rel=1e-12)  # 128 roundings
        assert found.standard_error.item() < 1e-15
        errors.append(abs(found.mean.item() - transition(schedule, t)[0]))
    assert slope(steps, errors) == pytest.approx(1, abs=0.05)


# Exact paths


PATHS = 200_000


def within(found: torch.Tensor, exact, error) -> bool:
    """Four standard errors: false alarm 6e-5."""
    return bool((np.abs(np.asarray(found) - np.asarray(exact)) < 4 * np.asarray(error)).all())


@EVERY
def test_exact_paths_have_the_right_law(schedule):
    """Mean, variance and Cov(x_s, x_t) = alpha_t sigma_s^2 / alpha_s at three times; nine comparisons a schedule."""
    t = scalar([0.2, 0.5, 0.9]) * schedule.t_max
    x = schedule.sample_path(torch.full((PATHS, 1), 1.5, dtype=D), t, Philox(5))[..., 0]
    alpha, V = schedule.alpha(t).numpy(), schedule.sigma(t).numpy() ** 2
    covariance = np.array([[alpha[max(i, j)] * V[min(i, j)] / alpha[min(i, j)] for j in range(3)] for i in range(3)])
    assert within(x.mean(1), 1.5 * alpha, np.sqrt(V / PATHS))
    # of normal variables, Var of a sample covariance is (C_ij^2 + V_i V_j) / n
    assert within(torch.cov(x), covariance, np.sqrt((covariance**2 + np.outer(V, V)) / PATHS))


def test_three_couplings_of_the_same_marginals():
    """VP, s = .2, t = .5: path .118, shared eps .561, independent draws 0, as published."""
    vp, x0 = VP(), torch.zeros(PATHS, 1, dtype=D)
    a, v = vp.alpha([0.2, 0.5]).numpy(), vp.sigma([0.2, 0.5]).numpy() ** 2
    eps, other = Philox(6).normals(0, PATHS, 0, 2, 1, dtype=D, device=torch.device("cpu"))
    draws = {
        "path": (vp.sample_path(x0, (0.2, 0.5), Philox(7)), a[1] * v[0] / a[0], 0.118),
        "shared": ([vp.reparameterise(x0, t, eps) for t in (0.2, 0.5)], math.sqrt(v[0] * v[1]), 0.561),
        "independent": ([vp.reparameterise(x0, 0.2, eps), vp.reparameterise(x0, 0.5, other)], 0.0, 0.0),
    }
    for (s, t), exact, published in draws.values():
        assert exact == pytest.approx(published, abs=5e-4)
        found = torch.cov(torch.stack((s[:, 0], t[:, 0])))[0, 1].item()
        assert within(found, exact, math.sqrt((exact**2 + v[0] * v[1]) / PATHS))
    # negative control: the error bars tell the couplings apart, a hundred of them
    assert not within(draws["path"][1], draws["shared"][1], 25 * math.sqrt(2 * v[0] * v[1] / PATHS))


def test_the_chain_has_the_paths_covariance():
    """Cov(x_s, x_t) of Euler's chain, v_s prod a_k, converges to the path's at order 1."""
    vp, errors = VP(), []
    exact = (vp.alpha(0.5) * vp.sigma(0.2) ** 2 / vp.alpha(0.2)).item()
    steps = [80, 160, 320, 640]  # with 0.2 and 0.5 on the grid
    for n in steps:
        a, _ = factors(vp, 0.5, n)
        errors.append(abs(chain(vp, 0.2, 2 * n // 5)[1] * a[2 * n // 5 :].prod() - exact))
    assert slope(steps, errors) == pytest.approx(1, abs=0.05)


@EVERY
def test_a_row_has_its_own_noise(schedule):
    t = scalar([0.1, 0.4, 0.7]) * schedule.t_max
    x0 = torch.linspace(-1, 1, 7 * 6, dtype=D).reshape(7, 2, 3)
    whole = schedule.sample_path(x0, t, Philox(1, 3))
    assert whole.shape == (3, 7, 2, 3)
    assert torch.equal(schedule.sample_path(x0[2:5], t, Philox(1, 3), first_path=2), whole[:, 2:5])
    assert torch.equal(
        schedule.sample_path(x0, t[:2], Philox(1, 3)), whole[:2]
    )  # and its past does not know its future
    narrow = schedule.sample_path(x0.float(), t, Philox(1, 3))
    assert narrow.dtype == torch.float32
    # single rounding of numbers up to |x|, and normals good to 3e-7
    torch.testing.assert_close(narrow.double(), whole, rtol=2e-6, atol=2e-6 * float(whole.abs().max()))
    assert not torch.equal(schedule.sample_path(x0, t, Philox(1, 4)), whole)


def test_the_path_at_time_zero_is_the_data():
    x0 = torch.linspace(-1, 1, 5, dtype=D)[:, None]
    assert torch.equal(VP().sample_path(x0, (0.0, 0.5), Philox(1))[0], x0)


def test_paths_are_not_tracked_in_the_schedule():
    """W has no derivative in its time, so that no gradient may flow; in x0 it is alpha, in all three couplings."""
    rates = scalar([0.1, 20.0]).requires_grad_()
    vp = VP(rates[0], rates[1])
    x0 = torch.linspace(-1, 1, 5, dtype=D)[:, None]
    assert not vp.sample_path(x0, (0.2, 0.5), Philox(1)).requires_grad
    made = LogSNR(straight, {"top": scalar(10.0).requires_grad_()})
    assert not made.sample_path(x0, (0.2, 0.5), Philox(1)).requires_grad
    leaf = x0.clone().requires_grad_()
    path = vp.sample_path(leaf, (0.2, 0.5), Philox(1))
    by_x0, by_rates = torch.autograd.grad(path[1].sum(), (leaf, rates), allow_unused=True)
    assert by_rates is None
    torch.testing.assert_close(by_x0, vp.alpha(0.5).detach().expand(5, 1), rtol=1e-15, atol=0)
    draw = vp.reparameterise(leaf, 0.5, x0 + 1)
    by_x0, by_rates = torch.autograd.grad(draw.sum(), (leaf, rates))
    torch.testing.assert_close(by_x0, vp.alpha(0.5).detach().expand(5, 1), rtol=1e-15, atol=0)
    assert by_rates.abs().min().item() > 0


@EVERY
def test_draws(schedule):
    t = scalar([0.2, 0.5, 0.9]) * schedule.t_max
    x0, eps = torch.linspace(-2, 2, 12, dtype=D).reshape(3, 4), torch.linspace(-1, 3, 12, dtype=D).reshape(3, 4)
    x = schedule.reparameterise(x0, t, eps)
    torch.testing.assert_close(
        x, schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * eps, rtol=1e-15, atol=0
    )
    assert torch.equal(schedule.reparameterise(x0[1:2], t[1], eps[1:2]), x[1:2])
    for dtype in (torch.float32, torch.bfloat16):
        found = schedule.reparameterise(x0.to(dtype), t, eps)
        assert found.dtype == dtype
        bar = 4 * torch.finfo(dtype).eps  # of the two terms, three roundings each
        torch.testing.assert_close(
            found.double(), x, rtol=0, atol=bar * float(x0.abs().max() + eps.abs().max() * schedule.sigma(t).max())
        )


# Rao-Blackwell: the draw's gradient is the conditional expectation of the path's


B0, B1, T, X0 = 0.1, 20.0, 0.3, 1.0
LOSSES = {  # f, f' and the published ratio of variances
    "x^2": (lambda x: x**2, lambda x: 2 * x, 1.16),
    "cos 2x": (lambda x: torch.cos(2 * x), lambda x: -2 * np.sin(2 * x), 1.09),
    "sigmoid 4x": (lambda x: torch.sigmoid(4 * x), lambda x: 1 / np.cosh(2 * x) ** 2, 1.10),
}


def sde_law() -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (x_t, Z = dx_t/dbeta_max) of VP's SDE from x_0: integrals over s of k(s)^2 and so on,

    k(s) = sqrt(beta_s) exp(-(B_t - B_s)/2),    dk/dbeta_max = k [s/(2 beta_s) - (t^2 - s^2)/4].
    """

    def B(s):
        return B0 * s + (B1 - B0) * s * s / 2

    def kernels(s):
        beta = B0 + (B1 - B0) * s
        k = math.sqrt(beta) * math.exp(-(B(T) - B(s)) / 2)
        return np.array([k, k * (s / (2 * beta) - (T * T - s * s) / 4)])

    C = np.array(
        [
            [quad(lambda s, i=i, j=j: kernels(s)[i] * kernels(s)[j], 0, T, epsabs=1e-14)[0] for j in (0, 1)]
            for i in (0, 1)
        ]
    )
    alpha = math.exp(-B(T) / 2)
    return np.array([alpha, -T * T / 4 * alpha]) * X0, C


def chain_law(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of Euler's chain: the derivative of equation (1) in beta_max, f = -beta/2, g = sqrt(beta), dbeta = s."""
    h = T / n
    mean, C = np.array([X0, 0.0]), np.zeros((2, 2))
    for s in np.arange(n) * h:
        beta = B0 + (B1 - B0) * s
        L = np.array([[1 - beta * h / 2, 0.0], [-s * h / 2, 1 - beta * h / 2]])
        noise = math.sqrt(h) * np.array([math.sqrt(beta), s / (2 * math.sqrt(beta))])
        mean, C = L @ mean, L @ C @ L.T + np.outer(noise, noise)
    return mean, C


def gradient_moments(slope_of_f, mean: np.ndarray, C: np.ndarray) -> dict[str, float]:
    """Of G = f'(x) Z for normal (x, Z): its mean and variance, that of f'(x) E[Z|x], and the variance of G's square.

    Gauss-Hermite with 200 nodes in x: to rounding, for these f.
    """
    z, w = np.polynomial.hermite_e.hermegauss(200)
    w = w / w.sum()
    d, m = slope_of_f(mean[0] + math.sqrt(C[0, 0]) * z), mean[1] + C[0, 1] / math.sqrt(C[0, 0]) * z
    r = C[1, 1] - C[0, 1] ** 2 / C[0, 0]  # Var(Z | x)
    first, second = w @ (d * m), w @ (d**2 * (m**2 + r))
    third, fourth = w @ (d**3 * (m**3 + 3 * m * r)), w @ (d**4 * (m**4 + 6 * m**2 * r + 3 * r**2))
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return {"mean": first, "variance": variance, "draw": w @ (d * m) ** 2 - first**2, "spread": central - variance**2}


def draw_gradients(f, eps: torch.Tensor) -> torch.Tensor:
    """df(x_t)/dbeta_max of each draw, through `reparameterise`."""

    def of(beta_max):
        return f(VP(B0, beta_max).reparameterise(torch.full_like(eps, X0), T, eps))

    return jvp(of, (scalar(B1),), (scalar(1.0),))[1]


def test_the_draw_is_the_conditional_expectation():
    """E[Z | x_t] = alpha_theta x_0 + sigma_theta eps, from the SDE's integrals; figures as published."""
    mean, C = sde_law()
    vp = VP()
    alpha, sigma = vp.alpha(T).item(), vp.sigma(T).item()
    theta = scalar(B1).requires_grad_()
    by_alpha, by_sigma = (
        torch.autograd.grad(getattr(VP(B0, theta), k)(T), theta)[0].item() for k in ("alpha", "sigma")
    )
    # quadrature to 1e-14
    assert mean == pytest.approx([alpha, by_alpha], rel=1e-13)
    assert C[0] == pytest.approx([sigma**2, sigma * by_sigma], rel=1e-12)
    assert C[0, 1] / C[0, 0] == pytest.approx(0.01477, abs=5e-6)
    assert C[0, 1] ** 2 / C[0, 0] / C[1, 1] == pytest.approx(0.825, abs=5e-4)


@pytest.mark.parametrize("name", list(LOSSES))
def test_variance_of_path_and_draw_by_quadrature(name):
    _, slope_of_f, published = LOSSES[name]
    exact = gradient_moments(slope_of_f, *sde_law())
    assert exact["variance"] / exact["draw"] == pytest.approx(published, abs=6e-3)
    errors = []
    for n in (128, 256, 512):
        found = gradient_moments(slope_of_f, *chain_law(n))
        errors.append([abs(found[k] - exact[k]) for k in ("mean", "variance")])
        assert found["variance"] > found["draw"]
    for column in np.array(errors).T:  # the chain's law tends to the SDE's
        assert slope((128, 256, 512), column) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", list(LOSSES))
def test_variance_of_path_and_draw_by_sampling(name):
    """400,000 draws, and the SDE's exact pairs (x, Z) that go with them: means and the ratio of variances."""
    f, slope_of_f, _ = LOSSES[name]
    mean, C = sde_law()
    exact = gradient_moments(slope_of_f, mean, C)
    eps, other = Philox(8).normals(0, 400_000, 0, 2, 1, dtype=D, device=torch.device("cpu"))[..., 0]
    draw = draw_gradients(f, eps).numpy()
    x, given = mean[0] + math.sqrt(C[0, 0]) * eps.numpy(), mean[1] + C[0, 1] / math.sqrt(C[0, 0]) * eps.numpy()
    path = slope_of_f(x) * (given + math.sqrt(C[1, 1] - C[0, 1] ** 2 / C[0, 0]) * other.numpy())
    # the draw is f'(x) times the regression of Z on x: rounding of a few functions
    np.testing.assert_allclose(draw, slope_of_f(x) * given, rtol=1e-9, atol=1e-12)
    for sample in (path, draw):
        estimate = Estimate.from_samples(torch.from_numpy(sample))
        assert within(estimate.mean, exact["mean"], estimate.standard_error)
    squares = [(s - s.mean()) ** 2 for s in (path, draw)]
    ratio = squares[0].mean() / squares[1].mean()
    error = (squares[0] - ratio * squares[1]).std() / squares[1].mean() / math.sqrt(len(path))  # of a ratio of means
    assert within(ratio, exact["variance"] / exact["draw"], error)
    assert ratio - 1 > 10 * error  # the path's variance is larger, and the test can tell


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_cores_path_gradients(name):
    """`sensitivity` through the SDE: mean and variance of the chain's pathwise gradient, against quadrature."""
    f, slope_of_f, _ = LOSSES[name]
    n_steps, n_paths = 64, 400_000 if name == "cos 2x" else 100_000
    exact = gradient_moments(slope_of_f, *chain_law(n_steps))
    problem = Problem(VP().as_sde(), lambda ys, p: f(ys[-1, :, 0]), torch.full((1,), X0, dtype=D), (0.0, T), n_steps)
    result = sensitivity(problem, n_paths=n_paths, method="forward", wrt="beta_max", seed=9, compile=False, audit=False)
    found = result.gradient["beta_max"]
    assert within(found.mean, exact["mean"], found.standard_error)
    variance = found.standard_error.item() ** 2 * n_paths
    assert within(variance, exact["variance"], math.sqrt(exact["spread"] / n_paths))
    # negative control: it is not the draw's variance, 9 % less
    assert not within(variance, exact["draw"], math.sqrt(exact["spread"] / n_paths))


def test_the_tangent_process_and_its_regression():
    """Each path's (x_t, dx_t/dbeta_max): the chain's joint law."""
    n_paths, n_steps = 100_000, 32
    problem = Problem(VP().as_sde(), end, torch.full((1,), X0, dtype=D), (0.0, T), n_steps)
    found = tangent_paths(problem, n_paths=n_paths, wrt="beta_max", seed=10)
    pair = torch.stack((found.ys[-1, :, 0], found.tangents["beta_max"][-1, :, 0]))
    mean, C = chain_law(n_steps)
    assert within(pair.mean(1), mean, np.sqrt(np.diag(C) / n_paths))
    assert within(torch.cov(pair), C, np.sqrt((C**2 + np.outer(np.diag(C), np.diag(C))) / n_paths))


# Coefficients of the SDEs that know the score


M, S = 0.7, 0.5


def exact_v(schedule: Schedule):
    """A network that is exact for data N(M, S^2): v = (alpha eps - sigma x0)/n with their posterior means."""

    def net(x, t):
        a, s = (c(t).reshape(-1, *[1] * (x.dim() - 1)) for c in (schedule.alpha, schedule.sigma))
        y = (x - a * M) / (a**2 * S**2 + s**2)
        return (a * s * y - s * (M + a * S**2 * y)) / torch.sqrt(a**2 + s**2)

    return Denoiser(net, schedule, "v")


@EVERY
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 1.7])
def test_coefficients_of_every_eta(schedule, eta):
    """f x -+ (1 -+ eta^2)/2 g^2 s and eta g, from the schedule's f and g and the score of Gaussian data."""
    denoiser = exact_v(schedule)
    x = torch.linspace(-2, 2, 6, dtype=D).reshape(3, 2)
    forward, reverse = schedule.as_sde(denoiser, eta), (CondOT(0.9) if isinstance(schedule, CondOT) else schedule)
    back = exact_v(reverse)
    backward = reverse.as_sde(back, eta, reverse=True)
    assert set(forward.params) == {*schedule.params, "eta"}
    for part in (0.05, 0.3, 0.7, 0.95):
        for sde, its, sign, t in (
            (forward, schedule, 1, part * schedule.t_max),
            (backward, reverse, -1, part * reverse.t_max),
        ):
            own = scalar(t if sign == 1 else its.t_max - t)
            alpha, V = its.alpha(t), its.alpha(t) ** 2 * S**2 + its.sigma(t) ** 2
            score, g2 = -(x - alpha * M) / V, its.g2(t)
            terms = its.f(t) * x, (1 - sign * eta**2) / 2 * g2 * score
            exact = sign * (terms[0] - terms[1])
            size = max(float(term.abs().max()) for term in terms) + float(g2 * x.abs().max() / its.sigma(t))
            # rounding relative to the terms; the clock's t_max - s is off by 1e-16 / 0.05 relative
            torch.testing.assert_close(sde.drift(own, x, sde.params), exact, rtol=0, atol=1e-12 * size)
            torch.testing.assert_close(
                sde.diffusion(own, x, sde.params), (eta * its.g(t)).expand(3, 2), rtol=1e-12, atol=0
            )


@pytest.mark.parametrize("name", ["VP", "VE", "CondOT", "Cosine"])
def test_the_probability_flow_there_and_back(name):
    """Reverse from t_max, also where no signal is left there, and forwards again: the map of Gaussian data, at order 1."""
    schedule = SCHEDULES[name]
    denoiser, low = exact_v(schedule), 0.05 * schedule.t_max
    x = torch.linspace(-2, 2, 5, dtype=D)[:, None] * schedule.prior_std
    a, V = (
        schedule.alpha([low, schedule.t_max]),
        schedule.alpha([low, schedule.t_max]) ** 2 * S**2 + schedule.sigma([low, schedule.t_max]) ** 2,
    )
    image = a[0] * M + (V[0] / V[1]).sqrt() * (x - a[1] * M)
    backward, forward = schedule.as_sde(denoiser, 0.0, reverse=True), schedule.as_sde(denoiser, 0.0)
    steps, errors = (128, 256, 512), []
    for n in steps:
        down = sdeint(backward, x, (0.0, schedule.t_max - low), n_steps=n, seed=1)[-1]
        up = sdeint(forward, image, (low, schedule.t_max), n_steps=n, seed=1)[-1]
        errors.append([float((down - image).abs().max()), float((up - x).abs().max())])
    for column in np.array(errors).T:
        assert slope(steps, column) == pytest.approx(1, abs=0.1)


def test_the_derivative_in_eta_where_noise_is_infinite_does_not_exist():
    """eta = 0 starts at zero signal; other parameters have gradients there, eta itself does not, and says so."""
    flow = CondOT()
    denoiser = Denoiser(shift_net, flow, "velocity", parameters={"shift": scalar(0.3)})
    problem = Problem(flow.as_sde(denoiser, 0.0, reverse=True), end, torch.ones(1, dtype=D), (0.0, 0.9), 16)
    found = sensitivity(problem, n_paths=4, wrt="net.shift", seed=1, audit=False).gradient["net.shift"]
    # dx/ds = -(shift + x t), Euler: t_k = 1 - k h
    h, total = 0.9 / 16, 0.0
    for k in range(16):
        total = total * (1 - h * (1 - k * h)) - h
    assert found.mean.item() == pytest.approx(total, rel=1e-13)
    with pytest.raises(NonFiniteError):
        sensitivity(problem, n_paths=4, wrt="eta", seed=1, audit=False)


def shift_net(x, t, p):
    return p["shift"] + x * t[:, None]


class Net(nn.Module):
    """A small network with fixed weights."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 3).double(), nn.Linear(3, 1).double()
        for k, p in enumerate(self.parameters()):
            p.data = torch.linspace(-1, 1, p.numel(), dtype=D).cos().reshape(p.shape) * (0.4 + 0.1 * k)

    def forward(self, x, t, cond=None):
        x = x if cond is None else x + cond[:, None]
        return self.outer(torch.tanh(self.inner(torch.cat((x, t[:, None]), 1))))


def reverse_cases():
    net = Net()
    yield "eps", Denoiser(net, VP(), "eps"), {"net.inner.weight", "net.outer.bias", "eta", "beta_max", "beta_min"}
    yield "F", Denoiser(net, SubVP(), sigma_data=0.5), {"net.outer.weight", "eta", "beta_max"}
    yield "v, VE", Denoiser(net, VE(0.01, 5.0), "v"), {"net.outer.weight", "eta", "sigma_max", "sigma_min"}
    yield "v, LogSNR", Denoiser(net, SCHEDULES["LogSNR"], "v"), {"net.outer.weight", "eta", "top"}
    short = Table(scalar([0.9, 0.6, 0.3, 0.05]))
    yield "x0, Table", Denoiser(net, short, "x0"), {"net.outer.weight", "eta", "alphas_cumprod"}
    base = Denoiser(net, VP(), "v", null=scalar(0.0))
    yield "guided", guide(base, 1.5, scalar(0.4)), {"net.outer.weight", "eta", "guidance", "beta_max"}
    two = Guided(Denoiser(net, VP(), "v"), Denoiser(shift_net, VP(), "eps", parameters={"shift": scalar(0.2)}), 2.0)
    yield "two networks", two, {"net.outer.weight", "net.shift", "guidance"}
    yield "clipped", Clipped(Denoiser(net, VP(), "v"), -3.0, 3.0), {"net.outer.weight", "beta_max"}


@pytest.mark.parametrize(("denoiser", "wrt"), [pytest.param(d, w, id=n) for n, d, w in reverse_cases()])
def test_gradients_through_the_reverse_sde(denoiser, wrt):
    """Pathwise = forward to rounding and = central differences on the same noise, for every kind of parameter."""
    sde = denoiser.schedule.as_sde(denoiser, 0.8, reverse=True)
    problem = Problem(sde, gentle, 0.7 * torch.ones(1, dtype=D), (0.0, 0.95), 24)
    methods = ("pathwise", "forward", "finite_difference")
    found = {m: sensitivity(problem, n_paths=64, method=m, wrt=tuple(wrt), seed=3, audit=False) for m in methods}
    for name in wrt:
        pathwise, forward, differences = (found[m].gradient[name].mean for m in methods)
        size = float(pathwise.abs().max())
        assert size > 1e-5, name
        torch.testing.assert_close(forward, pathwise, rtol=1e-10, atol=1e-10 * size)
        torch.testing.assert_close(
            differences, pathwise, rtol=1e-6, atol=1e-6 * size
        )  # h^2 = 4e-11 of third derivatives
    ys = sdeint(sde, 0.7 * torch.ones(64, 1, dtype=D), (0.0, 0.95), n_steps=24, bm=Philox(3))
    torch.testing.assert_close(gentle(ys, {}).mean().detach(), found["forward"].value.mean, rtol=1e-12, atol=0)


def test_gradients_reach_the_module_through_sdeint():
    net = Net()
    denoiser = Denoiser(net, VP(), "eps")
    sde = VP().as_sde(denoiser, reverse=True)
    y0 = torch.ones(32, 1, dtype=D)
    cosine_of_end(sdeint(sde, y0, (0.0, 0.95), n_steps=16, bm=Philox(3)), {}).mean().backward()
    problem = Problem(sde, cosine_of_end, y0[0], (0.0, 0.95), 16)
    exact = sensitivity(
        problem, n_paths=32, seed=3, wrt=tuple("net." + k for k, _ in net.named_parameters()), audit=False
    )
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, exact.gradient["net." + name].mean, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "LogSNR", "Table"])
def test_gradients_through_the_forward_process_from_time_zero(name):
    """Schedule parameters, and the horizon: no NaN from square roots at t = 0."""
    schedule = Table(scalar([0.9, 0.6, 0.3, 0.05])) if name == "Table" else SCHEDULES[name]
    problem = Problem(schedule.as_sde(), gentle, torch.ones(1, dtype=D), (0.0, 1.0), 24)
    wrt = (*schedule.params, "t1") if name != "Table" else tuple(schedule.params)  # its rates jump in time
    methods = ("pathwise", "forward", "finite_difference")
    found = {m: sensitivity(problem, n_paths=64, method=m, wrt=wrt, seed=3, audit=False) for m in methods}
    for k in wrt:
        pathwise, forward, differences = (found[m].gradient[k].mean for m in methods)
        size = float(pathwise.abs().max())
        assert size > 1e-5
        torch.testing.assert_close(forward, pathwise, rtol=1e-10, atol=1e-10 * size)
        torch.testing.assert_close(differences, pathwise, rtol=1e-6, atol=1e-6 * size)


def test_the_horizon_of_edm():
    """g = sqrt(2 t) has an infinite slope at 0, where the first step starts; x_t = x_0 + sum sqrt(2 t_k h) Z_k, so
    dx/dt1 = (x - x_0)/t1."""
    problem = Problem(EDM(2.0).as_sde(), end, torch.ones(1, dtype=D), (0.0, 1.5), 16)
    found = tangent_paths(problem, n_paths=8, wrt="t1", seed=1)
    torch.testing.assert_close(found.tangents["t1"][-1, :, 0], (found.ys[-1, :, 0] - 1) / 1.5, rtol=1e-13, atol=0)


def test_states_of_any_shape_and_dtype():
    vp = VP()
    denoiser = exact_v(vp)
    y0 = torch.linspace(-1, 1, 24, dtype=D).reshape(2, 3, 4)
    for sde in (vp.as_sde(), vp.as_sde(denoiser, 0.5, reverse=True)):
        wide = sdeint(sde, y0, (0.0, 0.9), n_steps=32, seed=1)[-1]
        narrow = sdeint(sde, y0.float(), (0.0, 0.9), n_steps=32, seed=1)[-1]
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-5)  # 32 steps of rounding 6e-8, |x| <= 3


def test_equations_pickle():
    denoiser = guide(Denoiser(Net(), VP(), "eps", null=scalar(0.0)), 2.0, scalar(1.0))
    for sde in (
        VP().as_sde(),
        Table(scalar([0.9, 0.5])).as_sde(),
        SCHEDULES["LogSNR"].as_sde(),
        VP().as_sde(denoiser, 0.5),
        VP().as_sde(denoiser, reverse=True),
    ):
        again = pickle.loads(pickle.dumps(sde))
        assert set(again.params) == set(sde.params)
        y0 = torch.ones(3, 1, dtype=D)
        args = {"n_steps": 8, "seed": 1}
        assert torch.equal(sdeint(again, y0, (0.1, 0.9), **args), sdeint(sde, y0, (0.1, 0.9), **args))


# Bad input


MADE = Denoiser(identity, VP(), "v")
FLOW = Denoiser(identity, CondOT(), "velocity")
COSINE = Denoiser(identity, Cosine(-math.inf), "v")
Y0 = torch.ones(2, 1, dtype=D)
BAD = {
    "reverse without score": (call(VP().as_sde, reverse=True), ArgumentError, "give `denoiser`"),
    "flow without score": (call(VP().as_sde, eta=0.0), ArgumentError, "give `denoiser`"),
    "eta 0.5 without score": (call(VP().as_sde, eta=scalar(0.5)), ArgumentError, "only eta = 1 is known"),
    "negative eta": (call(VP().as_sde, MADE, -0.1), ArgumentError, "0 is the ODE, 1 the reverse SDE"),
    "negative eta backwards": (call(VP().as_sde, MADE, -0.1, True), ArgumentError, "0 is the ODE"),
    "NaN eta": (call(VP().as_sde, MADE, math.nan), ArgumentError, "finite"),
    "two etas": (call(VP().as_sde, MADE, scalar([0.1, 0.2])), ArgumentError, "one number"),
    "eta True": (call(VP().as_sde, MADE, True), ArgumentTypeError, "0-dim tensor"),
    "eta as text": (call(VP().as_sde, MADE, "1"), ArgumentTypeError, "0-dim tensor"),
    "a function": (call(VP().as_sde, identity, 1.0), ArgumentTypeError, r"Denoiser\(net, schedule, prediction\)"),
    "a function backwards": (call(VP().as_sde, identity, 1.0, True), ArgumentTypeError, r"Denoiser\(net"),
    "another schedule": (call(VP(0.1, 10.0).as_sde, MADE), ArgumentError, "use its own schedule"),
    "another kind backwards": (call(SubVP().as_sde, MADE, reverse=True), ArgumentError, "use its own schedule"),
    "from zero signal": (call(CondOT().as_sde, FLOW, reverse=True), ArgumentError, r"CondOT\(end=0.999\)"),
    "from a cosine's end": (call(COSINE.schedule.as_sde, COSINE, 0.1, True), ArgumentError, "min_log_snr=-20"),
    "forwards from the data": (
        call(sdeint, VP().as_sde(MADE, 0.5), Y0, (0.0, 1.0), n_steps=4, seed=1), GridError, "use t > 0",
    ),
    "past the end": (call(sdeint, VP().as_sde(), Y0, (0.0, 2.0), n_steps=4, seed=1), GridError, "outside"),
    "from an infinite log-SNR": (
        call(sdeint, LogSNR(lambda t, p: -2 * torch.log(t)).as_sde(), Y0, (0.0, 1.0), n_steps=4, seed=1), GridError, "1e-5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", list(BAD))
def test_bad_input(bad):
    act, error, words = BAD[bad]
    with pytest.raises(error, match=words):
        act()
