"""Likelihood by the probability-flow ODE: against laws whose density is known, against the change of variables, and on the grid."""

import gc
import math
import weakref
from types import MappingProxyType

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from sdesens.diffusion import EDM, VE, VP, Clipped, CondOT, Cosine, Denoiser, Discrete, Guided, SubVP, Table
from sdesens.diffusion.attached import check_derivative
from sdesens.diffusion.dequantise import bits_per_dim, dequantise
from sdesens.diffusion.likelihood import LogProb, log_prob
from sdesens.diffusion.oracles import Gaussian, GaussianMixture
from sdesens.diffusion.predict import Predictor
from sdesens.errors import (
    ArgumentError,
    ArgumentTypeError,
    DetachedError,
    DtypeError,
    GridError,
    MethodError,
    NonFiniteError,
    NotAFunctionError,
    ShapeError,
)

D = torch.float64
SCHEDULES = [VP(), SubVP(), Cosine(), VE(), EDM(), CondOT()]
RING = GaussianMixture.ring()
MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=D)
VARIANCES = torch.tensor([0.3, 1.0, 2.5], dtype=D)


def normal(x, std=1.0):
    """log N(x; 0, std^2 I), (B,)."""
    return Normal(0.0, std).log_prob(x).sum(1)


def pushed(schedule, mean, variances, x, t_min):
    """What equation (1) gives for Gaussian data, in closed form: each axis is stretched by sqrt(V_T / V_t)."""
    t = torch.tensor([t_min, schedule.t_max], dtype=D)
    (a, b), V = schedule.alpha(t), schedule.alpha(t)[:, None] ** 2 * variances + schedule.sigma(t)[:, None] ** 2
    end = b * mean + torch.sqrt(V[1] / V[0]) * (x - a * mean)
    return normal(end, schedule.prior_std) + torch.log(V[1] / V[0]).sum() / 2


def solver_error(law, schedule, x, result, t_min):
    """log_prob - log p at t_min, with the prior replaced by the exact law at t_max: nothing but the solver's error."""
    at_end = law.log_density(result.x_T, schedule, schedule.t_max) - normal(result.x_T, schedule.prior_std)
    return result.log_prob + at_end - law.log_density(x, schedule, t_min)


class Net(nn.Module):
    """A small network with parameters of some size, for events of any shape; `head` acts on its hidden layer."""

    def __init__(self, d=2, head=None, dtype=D):
        super().__init__()
        self.a, self.b = nn.Linear(d + 1, 8, dtype=dtype), nn.Linear(8, d, dtype=dtype)
        self.head = head or nn.Identity()
        g = torch.Generator().manual_seed(4)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5, generator=g)

    def forward(self, x, t):
        return self.b(self.head(torch.tanh(self.a(torch.cat((x.flatten(1), t[:, None]), 1))))).reshape(x.shape)


def draws(n=1000, seed=3):
    return RING.sample(n, seed)


# The eight Gaussians


def test_ring_at_the_default_tolerance():
    x, vp = draws(), VP()
    result = log_prob(RING.denoiser(vp), x)
    error = result.log_prob - RING.log_density(x, vp, 0.0)
    # 2e-6 of the solver, 3e-5 of t_min and 3e-5 of the prior: seen 3.8e-5 and 2.7e-4
    assert error.abs().mean() < 1e-4
    assert error.abs().max() < 5e-3
    assert result.standard_error is None
    assert result.evaluations < 300  # seen 193
    assert result.log_prob.dtype == D
    assert result.x_T.shape == x.shape


def test_ring_at_a_tight_tolerance():
    x, vp = draws(), VP()
    result = log_prob(RING.denoiser(vp), x, rtol=1e-7, atol=1e-7)
    solver = solver_error(RING, vp, x, result, 1e-5)
    # errors of a solver are of the order of its tolerance, a hundredfold in the log-determinant: seen 6e-9 and 1e-6
    assert solver.abs().mean() < 1e-7
    assert solver.abs().max() < 1e-5
    error = result.log_prob - RING.log_density(x, vp, 0.0)
    assert abs(error.mean()) < 5e-6 + 4 * error.std() / len(x) ** 0.5
    assert error.abs().max() < 5e-4
    # what is left is not the solver's: the prior is not the law at t_max, nor t_min zero
    assert error.abs().mean() > 1e-5


def test_a_later_start_is_worse():
    """Negative control: why t_min is 1e-5. Modes of variance v widen by sigma^2, so that log p moves by
    sigma^2 / v |1 - r^2/2| with r^2/2 exponential: a mean of 2/e sigma^2 / v."""
    x, vp = draws(), VP()
    error = (log_prob(RING.denoiser(vp), x, t_min=1e-3).log_prob - RING.log_density(x, vp, 0.0)).abs()
    assert error.mean() > 1.5e-4
    # E|1 - Exp| = 2/e with sd .68, so 4 s.e. of 1000 draws are 12 %
    assert error.mean() == pytest.approx(2 / math.e * float(vp.sigma(1e-3)) ** 2 / 0.15**2, rel=0.12)


def test_methods_agree():
    x, den = draws(20), RING.denoiser(Cosine())
    fine = log_prob(den, x, rtol=1e-10, atol=1e-10, method="dopri8")
    assert solver_error(RING, Cosine(), x, fine, 1e-5 * Cosine().t_max).abs().max() < 1e-8
    for method in ("dopri5", "dopri8", "bosh3"):
        error = log_prob(den, x, rtol=1e-6, atol=1e-6, method=method).log_prob - fine.log_prob
        assert error.abs().max() < 1e-4, method  # a hundred tolerances


# Gaussian data: all schedules, exactly


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_gaussian_data_in_three_dimensions(schedule):
    Q = torch.linalg.qr(torch.tensor([[1.0, 2.0, 0.0], [0.5, -1.0, 1.0], [0.3, 0.1, 2.0]], dtype=D)).Q
    law = Gaussian(MEAN, Q @ torch.diag(VARIANCES) @ Q.T)
    x, t_min = law.sample(50, 8), 1e-5 * schedule.t_max
    result = log_prob(law.denoiser(schedule), x, rtol=1e-8, atol=1e-8)
    # in the axes of the covariance the closed form holds; a hundred tolerances
    expected = pushed(schedule, MEAN @ Q, VARIANCES, x @ Q, t_min)
    torch.testing.assert_close(result.log_prob, expected, rtol=0, atol=1e-6)
    # and the prior is the law at t_max but for a KL of at most 2e-3 (VE, EDM), point by point some ten sqrt(KL)
    alpha, sigma = schedule.alpha(t_min), schedule.sigma(t_min)
    exact = MultivariateNormal(alpha * MEAN, alpha**2 * law.cov + sigma**2 * torch.eye(3, dtype=D)).log_prob(x)
    gap = 3 * float(schedule.prior_gap(mean=MEAN, cov=law.cov))
    torch.testing.assert_close(result.log_prob, exact, rtol=0, atol=1e-6 + 10 * math.sqrt(2 * gap))
    torch.testing.assert_close(result.x_T, law.flow(x, schedule, t_min, schedule.t_max), rtol=1e-6, atol=1e-6)


def test_no_signal_at_the_end():
    """CondOT ends at alpha = 0, where a velocity, v or x_0 still tells everything."""
    x, schedule = draws(50), CondOT()
    oracle = RING.denoiser(schedule)
    exact = RING.log_density(x, schedule, 1e-5)
    for kind in ("velocity", "v", "x0"):
        denoiser = Denoiser(lambda x, t, kind=kind: getattr(oracle, kind)(x, t), schedule, kind)
        # there is no prior gap, and the rest is the solver's
        torch.testing.assert_close(log_prob(denoiser, x, rtol=1e-7, atol=1e-7).log_prob, exact, rtol=0, atol=1e-5)


def test_density_of_an_untrained_network_is_a_density():
    """Equation (1) is a change of variables whatever the network: exp(log_prob) integrates to 1."""
    x = torch.linspace(-8, 8, 401, dtype=D)[:, None]
    denoiser = Denoiser(Net(1), VP(), "v")  # so that x is about normal
    with torch.no_grad():
        p = log_prob(denoiser, x, rtol=1e-7, atol=1e-7).log_prob.exp()
    assert (p - normal(x).exp()).abs().max() > 0.05
    # the trapezium rule is exact to rounding for smooth functions that vanish at the ends (1e-8), so this is the solver's
    assert float(torch.trapezoid(p, x[:, 0])) == pytest.approx(1, abs=1e-6)


# Derivatives


def test_gradient_in_x_is_the_score():
    x, vp = draws(100), VP()
    x.requires_grad_()
    result = log_prob(RING.denoiser(vp), x, rtol=1e-7, atol=1e-7)
    exact = RING.score(x.detach(), vp, 1e-5)
    found = torch.autograd.grad(solver_error(RING, vp, x.detach(), result, 1e-5).sum(), x, retain_graph=True)[0]
    # seen 2e-7 of the largest score, 20; derivatives of a solver's steps are as exact as its steps
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()
    plain = torch.autograd.grad(result.log_prob.sum(), x)[0]
    # without replacing the prior, its gap of 3e-5 nats shows as well
    assert (plain - exact).abs().max() < 1e-4 * exact.abs().max()
    assert (plain - RING.score(x.detach(), vp, 1e-3)).abs().max() > 1e-3 * exact.abs().max()  # negative control


def test_a_part_that_autograd_does_not_see():
    """A predictor of one's own, or a network, half of whose result is cut off from x: the rest would pass for its derivative."""

    class Own(Predictor):
        schedule = VP()
        params = MappingProxyType({})

        def with_params(self, p):
            return self

        def pair(self, x, t):
            eps = 0.5 * torch.tanh(x.detach()) + 0.1 * x
            return (x - VP().sigma(t) * eps) / VP().alpha(t), eps

    x = 0.3 * draws(4)
    for predictor in (Own(), Denoiser(lambda x, t: torch.tanh(2 * x.detach()) + 0 * x, VP(), "eps")):
        with pytest.raises(DetachedError):
            log_prob(predictor, x)


def test_the_look_at_derivatives_has_no_false_alarms():
    """Kinks, steepness and float32 are not parts that are cut off; one row, many networks."""

    def features(x, t, n):
        k = torch.pi * 2.0 ** torch.arange(n)
        return torch.cat((torch.sin(x[..., None] * k), torch.cos(x[..., None] * k)), -1).flatten(1)

    for seed in range(60):
        torch.manual_seed(seed)
        relu = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        steep = nn.Linear(24, 2)
        with torch.no_grad():
            for p in relu.parameters():
                p.mul_(1 + 2 * (seed % 2))
        for x in (torch.randn(1, 2), torch.randn(8, 2), torch.zeros(4, 2)):
            for schedule, prediction in ((VP(), "v"), (VE(), "eps"), (EDM(), "x0")):
                check_derivative(Denoiser(lambda x, t, net=relu: net(x), schedule, prediction), x)
            check_derivative(Denoiser(lambda x, t, net=steep: net(features(x, t, 6)), VP(), "v"), x)
    check_derivative(Clipped(RING.denoiser(VP()), -1.0, 1.0), draws(4))


@pytest.mark.parametrize("T", [8, 100, 1000])
def test_tables_whose_rates_jump(T):
    """Data N(0, 0.3 I): the density of the model is in closed form, its prior N(0, I) moved back by the exact flow."""
    table = Table(Discrete(VP(), T).alphas_cumprod)
    leaf = table.alphas_cumprod.clone().requires_grad_()
    law, x = (
        Gaussian(torch.zeros(2, dtype=D), torch.full((2,), 0.3, dtype=D)),
        torch.tensor([[2.0, 2.0], [0.3, -0.1]], dtype=D),
    )

    def exact(abar):
        schedule = Table(abar)
        t0, v = 1e-5, lambda t: 0.3 * schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
        scale = torch.sqrt(v(1.0) / v(t0))
        return -((x * scale) ** 2).sum(1) / 2 - math.log(2 * math.pi) + 2 * torch.log(scale)

    found = log_prob(law.denoiser(Table(leaf)), x, rtol=1e-7, atol=1e-7)
    # a solver's tolerance of 1e-7 a step, over a hundred steps or so
    assert (found.log_prob - exact(leaf)).abs().max() < 2e-5
    assert found.evaluations < 1000
    if T == 8:
        (got,) = torch.autograd.grad(found.log_prob.sum(), leaf)
        (wanted,) = torch.autograd.grad(exact(leaf).sum(), leaf)
        assert (got - wanted).norm() < 1e-3 * wanted.norm()  # seen 1e-5 at 1e-9


def test_gradient_in_x_is_the_score_where_the_schedule_ends_in_noise():
    """Nothing replaced: log-SNR -20 at the end leaves a prior gap of 1e-9 nats, and 2e-7 of the score by the solver."""
    x = draws(64).requires_grad_()
    for schedule in (Cosine(), VP(0.1, 40.0)):
        value = log_prob(RING.denoiser(schedule), x, rtol=1e-7, atol=1e-7).log_prob
        (found,) = torch.autograd.grad(value.sum(), x)
        exact = RING.score(x.detach(), schedule, 1e-5 * schedule.t_max)
        assert (found - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("make", [lambda p: VP(beta_max=p), lambda p: VE(sigma_max=p)], ids=["VP", "VE"])
def test_gradients_in_data_law_and_schedule(make):
    """All of them against the derivative of the closed form; sigma_max is in the prior, too."""
    leaves = [torch.tensor(20.0, dtype=D), MEAN.clone(), VARIANCES.clone(), torch.ones(4, 3, dtype=D).cumsum(0) / 2]
    end, mean, variances, x = (leaf.requires_grad_() for leaf in leaves)
    schedule = make(end)
    found = log_prob(Gaussian(mean, variances).denoiser(schedule), x, rtol=1e-8, atol=1e-8).log_prob
    exact = pushed(schedule, mean, variances, x, 1e-5)
    weights = torch.tensor([1.0, -2.0, 0.5, 1.0], dtype=D)
    for g, e in zip(*(torch.autograd.grad(weights @ value, leaves) for value in (found, exact)), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)  # a hundred tolerances


@pytest.mark.parametrize(("probes", "vectorise"), [(None, True), (3, False)])
def test_gradient_in_parameters_against_finite_differences(probes, vectorise):
    net, x = Net(), draws(3)
    options = {"rtol": 1e-9, "atol": 1e-9, "probes": probes, "vectorise": vectorise}

    def value():
        return log_prob(Denoiser(net, VP(), "eps"), x, **options).log_prob.sum()

    def move(h):
        with torch.no_grad():
            for p, v in zip(net.parameters(), directions, strict=True):
                p += h * v

    generator, h = torch.Generator().manual_seed(5), 1e-4
    directions = [torch.randn(p.shape, dtype=D, generator=generator) for p in net.parameters()]
    slope = sum(
        (g * v).sum() for g, v in zip(torch.autograd.grad(value(), list(net.parameters())), directions, strict=True)
    )
    with torch.no_grad():
        move(h)
        up = value()
        move(-2 * h)
        down = value()
    # h^2 times the third derivative, 1e-8, and 1e-10 of the solver over h
    assert float(up - down) / (2 * h) == pytest.approx(float(slope), rel=1e-5)


def test_parameters_of_a_function():
    w = {"w": torch.tensor(0.7, dtype=D, requires_grad=True)}
    denoiser = Denoiser(lambda x, t, p: p["w"] * x, VP(), "x0", parameters=w)

    def value():
        return log_prob(denoiser, draws(3), rtol=1e-9, atol=1e-9).log_prob.sum()

    g, h = torch.autograd.grad(value(), w["w"])[0], 1e-4
    with torch.no_grad():
        w["w"] += h
        up = value()
        w["w"] -= 2 * h
        down = value()
    # as above
    assert float((up - down) / (2 * h)) == pytest.approx(float(g), rel=1e-5)


# What is kept


class Live:
    """How many tensors autograd holds at a time."""

    def __init__(self):
        self.held, self.peak = weakref.WeakSet(), 0

    def pack(self, tensor):
        box = Box(tensor)
        self.held.add(box)
        self.peak = max(self.peak, len(self.held))
        return box

    def peak_of(self, run):
        gc.collect()
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor):
            run()
        return self.peak


class Box:
    def __init__(self, tensor):
        self.tensor = tensor


def test_without_gradients_no_graph_is_kept():
    denoiser, x = Denoiser(Net(), VP(), "eps"), draws(5)

    def run(rtol, x=x):
        return log_prob(denoiser, x, rtol=rtol, atol=rtol)

    with torch.no_grad():
        a, b = run(1e-3), run(1e-8)
        assert b.evaluations > 3 * a.evaluations
        assert not any(v.requires_grad for v in (b.log_prob, b.x_T))
        assert Live().peak_of(lambda: run(1e-8)) == Live().peak_of(lambda: run(1e-3))
        leaf = x.clone().requires_grad_()
        assert not run(1e-3, leaf).log_prob.requires_grad
        assert leaf.grad is None
    # negative control: with them it grows with the evaluations
    assert run(1e-3).log_prob.requires_grad
    assert Live().peak_of(lambda: run(1e-8)) > 2 * Live().peak_of(lambda: run(1e-3))
    # nothing that requires a gradient, nothing to keep
    assert not log_prob(RING.denoiser(VP()), x).log_prob.requires_grad


def test_inference_mode():
    denoiser, x = Denoiser(Net(), VP(), "eps"), draws(5)
    expected = log_prob(denoiser, x)
    with torch.inference_mode():
        found = log_prob(denoiser, x.clone())
    torch.testing.assert_close(found.log_prob, expected.log_prob.detach(), rtol=0, atol=0)
    assert not found.log_prob.requires_grad


# Estimated divergence


def test_one_probe_against_the_two_that_there_are():
    """In two dimensions v.Jv = tr J +- 2 J_12 for signs v: a probe is off by +- c, c = int 2 J_12 dt, found by scipy."""
    x, vp = draws(4), VP()
    oracle = RING.denoiser(vp)

    def rhs(t, y):
        x = torch.tensor(y[None, :2])
        J = torch.func.jacrev(lambda x: oracle.velocity(x, t)[0])(x)[:, 0]
        return np.append(oracle.velocity(x, t)[0].numpy(), float(J[0, 1] + J[1, 0]))

    c = [solve_ivp(rhs, (1e-5, 1), [*row, 0.0], rtol=1e-7, atol=1e-7).y[2, -1] for row in x.tolist()]
    options = {"rtol": 1e-8, "atol": 1e-8}
    exact = log_prob(oracle, x, **options).log_prob
    estimates = [log_prob(oracle, x, probes=1, seed=s, **options) for s in range(3)]
    for e in estimates:
        torch.testing.assert_close((e.log_prob - exact).abs(), torch.tensor(c).abs(), rtol=0, atol=1e-5)
        assert e.standard_error.isnan().all()
    assert len({tuple((e.log_prob > exact).tolist()) for e in estimates}) > 1


def test_probes_are_unbiased_and_know_their_error():
    x, den = draws(1000), RING.denoiser(VP())
    exact = log_prob(den, x).log_prob
    one = log_prob(den, x, probes=1).log_prob - exact
    assert 0.9 < one.square().mean().sqrt() < 1.15  # nats a point: why the divergence is exact by default
    many = log_prob(den, x, probes=8)
    error = many.log_prob - exact
    for e in (one, error):
        assert abs(e.mean()) < 4 * e.std() / len(x) ** 0.5 + 1e-5  # false alarm 6e-5 each, + the solver's
    # squares of errors and of standard errors have one mean; false alarm 6e-5
    gap = error.square() - many.standard_error.square()
    assert abs(gap.mean()) < 4 * gap.std() / len(x) ** 0.5
    # negative control: a standard error that forgot one probe of the eight would pass, one that is half does not
    gap = error.square() - many.standard_error.square() / 4
    assert abs(gap.mean()) > 4 * gap.std() / len(x) ** 0.5


def test_signs_are_exact_where_the_divergence_is_diagonal():
    """And above 64 dimensions they are the default."""
    d, vp = 65, VP()
    law = Gaussian(torch.zeros(d, dtype=D), torch.linspace(0.2, 2, d, dtype=D))
    x = law.sample(3, 1)
    estimate, exact = log_prob(law.denoiser(vp), x), log_prob(law.denoiser(vp), x, exact_up_to=d)
    assert exact.standard_error is None
    assert estimate.standard_error.max() < 1e-12  # rounding
    torch.testing.assert_close(estimate.log_prob, exact.log_prob, rtol=1e-12, atol=0)
    assert log_prob(law.denoiser(vp), x, probes=2).standard_error.shape == (3,)


def test_probes_belong_to_rows_and_leave_the_global_generator_alone():
    x, den = draws(12), RING.denoiser(VP())
    before = torch.get_rng_state()
    whole = log_prob(den, x, probes=2)
    assert torch.equal(before, torch.get_rng_state())
    part = log_prob(den, x[5:], probes=2, first_item=5)
    # the steps of two batches differ, by up to a hundred tolerances each: see below
    torch.testing.assert_close(part.log_prob, whole.log_prob[5:], rtol=0, atol=2e-3)
    torch.testing.assert_close(part.standard_error, whole.standard_error[5:], rtol=0, atol=2e-3)
    assert (log_prob(den, x[5:], probes=2).log_prob - whole.log_prob[5:]).abs().max() > 0.1  # negative control
    assert (log_prob(den, x, probes=2, seed=1).log_prob - whole.log_prob).abs().max() > 0.1


# Batches, shapes and precisions


def test_what_a_batch_does_to_its_rows():
    """Rows share their steps, and the worst of them is held to the tolerance."""
    x, vp = draws(300), VP()
    den = RING.denoiser(vp)
    t_min = 1e-5
    whole = log_prob(den, x)
    errors = solver_error(RING, vp, x, whole, t_min)
    single = [log_prob(den, x[i : i + 1]) for i in range(5)]
    # a hundred tolerances: what a step of 1e-5 may be off by, times the derivative of the log-determinant; seen 1e-4
    for i, alone in enumerate(single):
        assert alone.log_prob.shape == (1,)
        assert abs(float(solver_error(RING, vp, x[i : i + 1], alone, t_min))) < 1e-3
        assert abs(float(alone.log_prob - whole.log_prob[i])) < 1e-3
    # company, be it one far away, makes nobody worse, seen 1e-4: a mean over the batch would leave a row 40 times this
    assert errors.abs().max() < 1e-3
    far = torch.cat((x[:50], torch.tensor([[40.0, -40.0]], dtype=D)))
    assert solver_error(RING, vp, far, log_prob(den, far), t_min)[:50].abs().max() < 1e-3


def test_image_shaped_events():
    net, x = Net(4), torch.linspace(-1, 1, 24, dtype=D).sin().reshape(6, 1, 2, 2)
    with torch.no_grad():
        for options in ({}, {"probes": 2}, {"vectorise": False}, {"probes": 2, "vectorise": False}):
            image = log_prob(Denoiser(net, VP(), "v"), x, **options)
            flat = log_prob(Denoiser(net, VP(), "v"), x.flatten(1), **options)
            assert image.x_T.shape == x.shape
            # the same numbers but for the order of sums
            torch.testing.assert_close(image.log_prob, flat.log_prob, rtol=1e-10, atol=0)
            torch.testing.assert_close(image.x_T.flatten(1), flat.x_T, rtol=1e-10, atol=1e-10)


def test_float32_network():
    x, den = draws(200), RING.denoiser(VP())
    single, double = log_prob(den, x.float()), log_prob(den, x)
    assert single.log_prob.dtype == D
    assert single.x_T.dtype == torch.float32
    # 1e-7 of rounding in x, times a score of 20; the ODE itself is solved in float64
    torch.testing.assert_close(single.log_prob, double.log_prob, rtol=0, atol=1e-4)
    leaf = x.float().requires_grad_()
    g = torch.autograd.grad(log_prob(den, leaf).log_prob.sum(), leaf)[0]
    assert g.dtype == torch.float32
    # rounding of x, 1e-7, times the slope of the score, up to (1/0.15)^4, and of its sums: seen 5e-3 of up to 20
    assert (g - RING.score(x, VP(), 1e-5)).abs().max() < 1e-2


# Data on a grid


def test_bits_per_dim():
    assert bits_per_dim(-3072 * math.log(2) * 2.5, 3072) == pytest.approx(2.5, rel=1e-15)  # four roundings of 2^-53
    found = bits_per_dim(torch.tensor([-math.log(4), 0.0], dtype=D), 2).tolist()
    assert found == pytest.approx([1.0, 0.0], rel=1e-15, abs=0)


def test_dequantised_data_are_uniform_in_their_cells():
    k = torch.arange(16).repeat(500).reshape(1000, 8)
    y, log_volume = dequantise(k, 16, -1.0, 3.0, seed=2, dtype=D)
    U = ((y + 1) / 4 * 16 - k).flatten()
    assert log_volume == pytest.approx(8 * math.log(0.25), rel=1e-15)  # one formula
    assert stats.kstest(U.numpy(), "uniform").pvalue > 6e-5  # false alarm
    # a row's place is its own, whatever the batch, and the generator of torch is not touched
    before = torch.get_rng_state()
    torch.testing.assert_close(
        dequantise(k[10:], 16, -1.0, 3.0, seed=2, first_item=10, dtype=D)[0], y[10:], rtol=0, atol=0
    )
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(dequantise(k, 16, -1.0, 3.0, seed=3, dtype=D)[0], y)
    for kind in (torch.uint8, torch.int64, torch.float16):
        assert dequantise(k.to(kind), 16, 0.0, 1.0)[0].dtype == (torch.float32 if kind != torch.float16 else kind)


def test_bits_of_a_discrete_law():
    """A law on six levels, each as often in the data as it is likely."""
    P = torch.tensor([1.0, 3, 5, 6, 4, 1], dtype=D) / 20
    entropy = float(-(P * P.log()).sum()) / math.log(2)
    k = torch.repeat_interleave(torch.arange(6), (P * 2000).round().long())[:, None]
    y, log_volume = dequantise(k, 6, -1.5, 1.5, dtype=D)
    w = 0.5
    # a model with the histogram for density reaches the entropy: log p(y) + log_volume = log P(k) point by point
    histogram = torch.log(P / w)[((y[:, 0] + 1.5) / w).floor().long()]
    assert bits_per_dim(float(histogram.mean()) + log_volume, 1) == pytest.approx(entropy, rel=1e-12)
    # a Gaussian model: its expected bits are those of E (y - m)^2 = (c - m)^2 + w^2/12 in a cell with centre c
    m, v = 0.1, 0.4
    centre = -1.25 + w * torch.arange(6, dtype=D)
    mean = float((P * (-((centre - m) ** 2 + w**2 / 12) / (2 * v))).sum()) - math.log(2 * math.pi * v) / 2
    law = Gaussian(torch.tensor([m], dtype=D), torch.tensor([v], dtype=D))
    bits = bits_per_dim(log_prob(law.denoiser(Cosine()), y).log_prob + log_volume, 1)
    exact = bits_per_dim(mean + log_volume, 1)
    assert exact > entropy
    assert float(bits.mean()) == pytest.approx(exact, abs=4 * float(bits.std()) / len(y) ** 0.5)  # false alarm 6e-5
    assert float(bits.mean()) > entropy
    assert float(bits.mean()) + log_volume / math.log(2) < entropy  # negative control: without the volume


# Bad input


def broken(x, t):
    return torch.where(t[:, None] > 0.5, math.nan, 1.0) * x


GOOD = Denoiser(Net(), VP(), "eps")
X = torch.zeros(3, 2, dtype=D)
BAD_INPUT = {
    "no predictor": (lambda: log_prob(Net(), X), ArgumentTypeError, "Denoiser(net, schedule, prediction)"),
    "no tensor": (
        lambda: log_prob(GOOD, [[0.0, 0.0]]),
        ArgumentTypeError,
        "`x` must be a tensor (B, *event), got list",
    ),
    "integers": (lambda: log_prob(GOOD, X.long()), DtypeError, "dequantise"),
    "complex": (lambda: log_prob(GOOD, X.to(torch.complex128)), DtypeError, "`x` must be floating"),
    "complex levels": (lambda: dequantise(X.to(torch.complex128), 2, 0.0, 1.0), DtypeError, "`x` must be real"),
    "no event": (lambda: log_prob(GOOD, X[:, 0]), ShapeError, "(B, *event)"),
    "no rows": (lambda: log_prob(GOOD, X[:0]), ShapeError, "not empty, got (0, 2)"),
    "NaN": (lambda: log_prob(GOOD, X.index_fill(0, torch.tensor(1), math.nan)), NonFiniteError, "in 1 of 3 rows"),
    "infinite": (lambda: log_prob(GOOD, X + math.inf), NonFiniteError, "`x` holds infinite"),
    "t_min = 0": (lambda: log_prob(GOOD, X, t_min=0.0), GridError, "`t_min` must lie in (0, 1), got 0.0"),
    "t_min = t_max": (lambda: log_prob(GOOD, X, t_min=1.0), GridError, "`t_min` must lie"),
    "t_min NaN": (lambda: log_prob(GOOD, X, t_min=math.nan), ArgumentError, "`t_min`"),
    "t_min a string": (lambda: log_prob(GOOD, X, t_min="0"), ArgumentTypeError, "got '0'"),
    "rtol 0": (lambda: log_prob(GOOD, X, rtol=0), ArgumentError, "`rtol` must lie in (0, inf), got 0"),
    "atol negative": (lambda: log_prob(GOOD, X, atol=-1e-5), ArgumentError, "`atol`"),
    "rtol text": (lambda: log_prob(GOOD, X, rtol="1e-5"), ArgumentTypeError, "`rtol` must be a number"),
    "fixed steps": (lambda: log_prob(GOOD, X, method="rk4"), ArgumentError, "which choose their steps, got 'rk4'"),
    "no probes": (lambda: log_prob(GOOD, X, probes=0), ArgumentError, "`probes` must be at least 1, got 0"),
    "half a probe": (lambda: log_prob(GOOD, X, probes=1.5), ArgumentTypeError, "exact divergence"),
    "first": (lambda: log_prob(GOOD, X, probes=1, first_item=-1), ArgumentError, "`first_item`"),
    "seed": (lambda: log_prob(GOOD, X, probes=1, seed=0.5), ArgumentTypeError, "`seed`"),
    "no evaluations": (lambda: log_prob(GOOD, X, max_evaluations=0), ArgumentError, "`max_evaluations`"),
    "few evaluations": (lambda: log_prob(GOOD, X, max_evaluations=20), ArgumentError, "are used up at t = "),
    "underflow": (lambda: log_prob(GOOD, X + 1, rtol=1e-40, atol=1e-40), ArgumentError, "steps fell to rounding: use"),
    "velocity": (lambda: log_prob(Denoiser(broken, VP(), "eps"), X), NonFiniteError, "raise `t_min`"),
    "bits": (lambda: bits_per_dim(1.0, 0), ArgumentError, "`d` must be at least 1, got 0"),
    "one level": (lambda: dequantise(X, 1, 0.0, 1.0), ArgumentError, "`levels` must be at least 2"),
    "half a level": (lambda: dequantise(X, 2.5, 0.0, 1.0), ArgumentTypeError, "`levels` must be an int"),
    "text for an edge": (lambda: dequantise(X, 2, "0", 1.0), ArgumentTypeError, "`low` must be a number"),
    "no width": (lambda: dequantise(X, 2, 1.0, 1.0), ArgumentError, "`low` must be below `high`"),
    "between levels": (lambda: dequantise(X + 0.5, 2, 0.0, 1.0), ArgumentError, "before they were scaled"),
    "a level too many": (
        lambda: dequantise(X + 2, 2, 0.0, 1.0),
        ArgumentError,
        "whole numbers 0 ... 1, got values in [2, 2]",
    ),
    "levels NaN": (lambda: dequantise(X + math.nan, 2, 0.0, 1.0), ArgumentError, "whole numbers"),
    "levels of numbers": (lambda: dequantise(X[:, 0], 2, 0.0, 1.0), ShapeError, "(B, *event)"),
}


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_bad_input(case):
    run, error, message = BAD_INPUT[case]
    with torch.no_grad(), pytest.raises(error) as caught:
        run()
    assert message in str(caught.value)


def test_where_the_velocity_breaks():
    def net(x, t):
        return torch.where((t[:, None] > 0.5) & (x[:, :1] > 0), math.nan, 1.0) * x

    with pytest.raises(NonFiniteError) as caught:
        log_prob(Denoiser(net, CondOT(), "velocity"), torch.tensor([[-1.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=D))
    assert caught.value.paths == (1, 2)
    assert caught.value.n_bad == 2
    assert 0.5 < caught.value.time < 1


def cut_off(x, t):
    with torch.no_grad():
        return x.sin()


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Guided(GOOD, d, 2.0), lambda d: Clipped(d, -1, 1)])
def test_networks_that_are_no_functions_of_their_row(wrap):
    """Each would give a number without a word: the divergence of half the model, or no solution at all."""
    for net in (cut_off, lambda x, t: x.detach() * t[:, None]):
        with pytest.raises(DetachedError, match="its part of the divergence would be missing"):
            log_prob(wrap(Denoiser(net, VP(), "eps")), X)
    for head in (nn.Dropout(0.5), nn.BatchNorm1d(8, dtype=D)):
        net = Net(head=head)
        with pytest.raises(NotAFunctionError, match=r"net.eval\(\)"):
            log_prob(wrap(Denoiser(net, VP(), "eps")), draws(3))
        assert isinstance(log_prob(wrap(Denoiser(net.eval(), VP(), "eps")), draws(3)), LogProb)


class Looks(torch.autograd.Function):
    """Its derivative looks at numbers, which torch cannot do for many directions at once."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad if float(grad.abs().sum()) >= 0 else grad


def test_networks_that_torch_cannot_vectorise():
    denoiser = Denoiser(lambda x, t: Looks.apply(x) / 2, VP(), "x0")
    with pytest.raises(MethodError, match="vectorise=False"):
        log_prob(denoiser, X)
    plain = log_prob(Denoiser(lambda x, t: x, VP(), "x0"), X).log_prob
    torch.testing.assert_close(log_prob(denoiser, X, vectorise=False).log_prob, plain, rtol=1e-12, atol=0)
