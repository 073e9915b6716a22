"""Gradients of what jumps: likelihood ratio, Malliavin weights, vibrato, conditional expectation, and second derivatives.

Authorities: Black-Scholes in one exact step, means and deviations of every estimator by quadrature (tests/black_scholes.py); the
exact mean and variance of the Ornstein-Uhlenbeck chain's score; one method against another on the same noise; closed forms.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from measure_jumps import FELLER, exactly, first_order, fitted, lamperti_bias, second_moments, second_order
from problems import F64, GBM, OU, scalar, smooth, terminal

from sdesens import (
    SDE,
    Antithetic,
    GivenNoise,
    HeavyTailWarning,
    JumpError,
    KinkError,
    Philox,
    Problem,
    hessian,
    merge,
    sensitivity,
    with_running_integral,
)
from sdesens.errors import ArgumentError, MethodError, NonFiniteError
from sdesens.functionals import BarrierCall, Call, Digital, Moment
from sdesens.models import cir, cir_lamperti, gbm_call, gbm_digital, heston, vasicek
from sdesens.sensitivity import METHODS, likelihood_ratio, malliavin, vibrato
from sdesens.sensitivity.tile import Tile

SMOOTHED = ("likelihood_ratio", "malliavin", "vibrato")


def z_scores(found, exact):
    return {k: float(((found[k].mean - v).abs() / found[k].standard_error).max()) for k, v in exact.items()}


# One exact step of Black-Scholes: 24 means, 24 deviations. z below 4.5: false alarm 1.6e-4 for the table. At 2e5 paths the deviation
# of the fourth-power tails (vega squared) is known to 1 %, of group means (1000 groups) to 2.2 %: four of those are 9 %.


@pytest.mark.parametrize("rows", [first_order, second_order])
def test_means_and_deviations_in_one_exact_step(rows):
    for what, z, ratio in rows(200_000, 11):
        assert abs(z) < 4.5, what
        assert abs(ratio - 1) < 0.09, what


def test_one_exact_step_leaves_nothing_to_sample():
    for what, error in exactly(100):
        assert error < 1e-12, what  # rounding


def test_second_moment_of_the_digital_delta_against_the_step():
    """The exponents of theory are -1, -1/2, -1/2, 0; fitted over 8 to 64 steps they are met to 0.05, and 2e5 paths add 0.03."""
    steps = (8, 16, 32, 64)
    found = {k: fitted(steps, v) for k, v in second_moments(steps, 40_000, 3).items()}
    assert found["likelihood_ratio"] == pytest.approx(-1.0, abs=0.1)
    assert found["vibrato"] == pytest.approx(-0.5, abs=0.1)
    assert found["conditional"] == pytest.approx(-0.5, abs=0.1)
    assert found["malliavin"] == pytest.approx(0.0, abs=0.1)


# Against the chain's own gradient


@pytest.mark.parametrize("method", SMOOTHED)
@pytest.mark.parametrize("noise_type", ["diagonal", "additive", "general"])
def test_unbiased_for_the_gradient_of_the_chain(method, noise_type):
    """Coupled, non-commuting, time-dependent: against the pathwise gradient of other noise. About 150 z's, below 5: 1e-4."""
    problem = smooth(noise_type, 1, n_steps=6, outputs=(0, 3, 6))
    if noise_type in ("additive", "general"):  # five Brownian motions for three components
        problem = replace(problem, sde=_square(problem.sde))
    wrt = ("A", "c", "s", "y0")
    exact = sensitivity(problem, n_paths=100_000, method="pathwise", wrt=wrt, seed=1).gradient
    found = sensitivity(problem, n_paths=100_000, method=method, wrt=wrt, seed=2).gradient
    for name in wrt:
        error = (exact[name].standard_error ** 2 + found[name].standard_error ** 2).sqrt()
        assert float(((exact[name].mean - found[name].mean).abs() / error).max()) < 5, name


def _square(sde):
    """The same SDE with a Brownian motion of its own for each component, so that noise reaches every direction."""

    def diffusion(t, y, p):
        g = sde.diffusion(t, y, p)
        own = p["s"] * torch.eye(3, dtype=y.dtype) * (0.6 + 0.1 * torch.sin(t))
        return torch.cat((g, own.expand(*g.shape[:-1], 3)), -1)

    return SDE(sde.drift, diffusion, sde.params, noise_type=sde.noise_type)


def test_weights_of_one_step_are_the_likelihood_ratio():
    problem = smooth("diagonal", 2, n_steps=5, outputs=(0, 2, 5))
    theta = problem.leaves(("A", "c", "s", "y0", "t1"))
    tile = Tile(problem, Philox(4), 0, 60, 20, 3)
    one, two = likelihood_ratio(tile, theta), malliavin(tile, theta, window=1)
    torch.testing.assert_close(one.values, two.values, rtol=1e-12, atol=0)
    for name, g in one.gradients.items():  # path by path: rounding of scores of size 1e3
        torch.testing.assert_close(g, two.gradients[name], rtol=1e-9, atol=1e-9)


def test_score_has_its_exact_mean_and_variance():
    """F = X_N on the Ornstein-Uhlenbeck chain: with a = E X_N, v = Var X_N, q = 1 - kappa h,

    m: (a^2 + v) kappa^2 T / sigma^2 + (1 - q^N)^2;   y0: (a^2 + v) q^2 / (sigma^2 h) + q^2N;   sigma: (a^2 + v) 2N / sigma^2 + 8v / sigma^2.
    """
    model = OU()
    n, h = 200_000, model.t1 / model.n_steps
    q = 1 - model.kappa * h
    (a, v), exact = model.exact(1)["value"], model.exact(1)
    variances = {
        "m": (a * a + v) * model.kappa**2 * model.t1 / model.sigma**2 + (1 - q**model.n_steps) ** 2,
        "y0": (a * a + v) * q * q / (model.sigma**2 * h) + q ** (2 * model.n_steps),
        "sigma": (a * a + v) * 2 * model.n_steps / model.sigma**2 + 8 * v / model.sigma**2,
    }
    result = sensitivity(
        model.problem(1), n_paths=n, method="likelihood_ratio", wrt=tuple(variances), control=False, seed=5
    )
    for name, variance in variances.items():
        g = result.gradient[name]
        assert abs(float(g.mean.squeeze()) - exact[name][0]) < 4.5 * float(g.standard_error.squeeze())
        # a fourth moment of products of four normals: the variance is known to about 1 %
        assert float(g.standard_error.squeeze()) == pytest.approx(math.sqrt(variance / n), rel=0.03)


def test_the_control_variate_takes_variance_off_and_no_bias():
    model = GBM(n_steps=8)
    for method in ("likelihood_ratio", "malliavin"):
        bare, with_c = (
            sensitivity(model.problem(1), n_paths=100_000, method=method, control=c, seed=6).gradient
            for c in (False, True)
        )
        for name, exact in model.scheme(1).items():
            if name not in bare:
                continue
            assert abs(float(with_c[name].mean) - exact) < 4.5 * float(with_c[name].standard_error)
            assert float(with_c[name].standard_error) < 0.6 * float(bare[name].standard_error)


@pytest.mark.parametrize("method", ["likelihood_ratio", "vibrato"])
def test_many_parameters_are_summed_by_group(method):
    """More components of theta than are scored path by path: group means, the same estimate. (Malliavin is forward mode.)"""
    sde = SDE(
        lambda t, y, p: (p["a"] * torch.cos(y * torch.arange(1.0, 101.0, dtype=F64))).sum(1, keepdim=True),
        lambda t, y, p: torch.ones_like(y),
        {"a": torch.linspace(-0.1, 0.1, 100, dtype=F64)},
    )
    problem = Problem(sde, Digital(0.5), torch.zeros(1, dtype=F64), (0.0, 1.0), 4)
    tile = Tile(problem, Philox(1), 0, 400, 100, 1)
    found = METHODS[method](tile, problem.leaves()).gradients["a"]
    assert found.shape == (4, 100)
    few = {"a": problem.leaves()["a"]}
    one = replace(tile, group=1)
    torch.testing.assert_close(
        METHODS[method](one, few).gradients["a"].view(4, 100, 100).mean(1), found, rtol=1e-9, atol=1e-11
    )


# Components without noise of their own


def test_rho_of_a_discounted_digital():
    """The discount is a state without noise: differentiated through, while the price is held."""
    known = gbm_digital(log=True, n_steps=4)
    exact = known.answers()[1]
    for method in ("likelihood_ratio", "malliavin", "vibrato", "conditional"):
        found = sensitivity(known.problem, n_paths=100_000, method=method, seed=7).gradient
        assert max(z_scores(found, exact).values()) < 4.5, method


def test_running_integral_of_the_noisy_component():
    """A bond on the Vasicek chain: exp(-sum X h) has an exact gradient, and the integral follows the rate."""
    known = vasicek(n_steps=8)
    exact = known.answers("scheme")[1]
    for method in ("likelihood_ratio", "malliavin", "vibrato"):
        found = sensitivity(known.problem, n_paths=100_000, method=method, seed=8).gradient
        assert max(z_scores(found, exact).values()) < 4.5, method


def test_a_jump_in_what_follows_the_noise():
    """1{int X dt > K}: the likelihood ratio holds the path, and so the integral; a weight spread over steps moves it first."""
    rate = SDE(
        lambda t, y, p: p["m"] - y, lambda t, y, p: p["s"] * torch.ones_like(y), {"m": scalar(0.5), "s": scalar(0.4)}
    )
    problem = Problem(
        with_running_integral(rate, lambda t, y, p: y[:, 0]),
        Digital(0.4, component=1),
        torch.tensor([0.3, 0.0], dtype=F64),
        (0.0, 1.0),
        8,
    )
    found = sensitivity(problem, n_paths=200_000, method="likelihood_ratio", wrt=("m", "s"), seed=9).gradient
    # the integral is Gaussian: I = sum_n h X_n with X' = q X + h m + s sqrt(h) Z
    h, q = 1 / 8, 7 / 8
    leaves = {"m": scalar(0.5).requires_grad_(), "s": scalar(0.4).requires_grad_()}
    mean_x, mean_i, C = scalar(0.3), scalar(0.0), torch.zeros(2, 2, dtype=F64)
    L = torch.tensor([[q, 0.0], [h, 1.0]], dtype=F64)
    for _ in range(8):
        mean_i, mean_x = mean_i + h * mean_x, q * mean_x + h * leaves["m"]
        C = L @ C @ L.T + torch.stack((torch.stack((leaves["s"] ** 2 * h, scalar(0.0))), torch.zeros(2, dtype=F64)))
    value = torch.special.ndtr((mean_i - 0.4) / C[1, 1].sqrt())
    exact = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    assert max(z_scores(found, exact).values()) < 4.5
    with pytest.raises(JumpError, match="'likelihood_ratio'"):
        sensitivity(problem, n_paths=1000, method="malliavin", wrt=("m", "s"))
    with pytest.raises(JumpError):
        sensitivity(problem, n_paths=1000, method="vibrato", wrt=("m", "s"))


@dataclass(frozen=True)
class Rewards:
    """Indicators at every output time, as rewards of their own or only in all."""

    level: float = 0.5

    def rewards(self, ys, p):
        return (ys[:, :, 0] > self.level).to(ys.dtype)

    def __call__(self, ys, p):
        return self.rewards(ys, p).sum(0)


def test_causality_takes_variance_off_and_no_bias():
    rate = SDE(lambda t, y, p: p["m"] - y, lambda t, y, p: 0.4 * torch.ones_like(y), {"m": scalar(0.5)})
    ts = [k / 8 for k in range(9)]
    causal = Problem(rate, Rewards(), torch.zeros(1, dtype=F64), ts, 8)
    blunt = replace(causal, functional=Rewards().__call__)
    found, reference = (
        sensitivity(q, n_paths=100_000, method="likelihood_ratio", control=False, seed=10).gradient["m"]
        for q in (causal, blunt)
    )
    error = math.hypot(float(found.standard_error), float(reference.standard_error))
    assert abs(float(found.mean - reference.mean)) < 4.5 * error
    assert float(found.standard_error) < 0.9 * float(reference.standard_error)


# Refusals


def test_a_strike_that_is_differentiated_is_refused_by_all_that_hold_the_path():
    sde = SDE(lambda t, y, p: 0.1 * y, lambda t, y, p: 0.2 * y, {"K": scalar(1.0)})
    problem = Problem(sde, Digital("K"), torch.ones(1, dtype=F64), (0.0, 1.0), 8)
    for method in (*SMOOTHED, "pathwise"):
        with pytest.raises(JumpError, match="'conditional'"):
            sensitivity(problem, n_paths=1000, method=method)
    found = sensitivity(problem, n_paths=20_000, method="auto")
    assert found.method == "conditional"


def test_a_parameter_that_moves_a_step_out_of_the_noise_is_refused():
    """Two components, one Brownian motion along (1, 1): a drift along it has a likelihood ratio, any other has none."""

    def drift(t, y, p):
        return torch.stack((p["along"] + p["across"], p["along"] - p["across"])).expand(len(y), 2)

    params = {"along": scalar(0.1), "across": scalar(0.2)}
    sde = SDE(drift, lambda t, y, p: torch.ones(len(y), 2, 1, dtype=F64), params, noise_type="scalar")
    problem = Problem(sde, Digital(0.2), torch.zeros(2, dtype=F64), (0.0, 1.0), 4)
    with pytest.raises(MethodError, match="'across' moves a step out of their span"):
        sensitivity(problem, n_paths=100, method="likelihood_ratio")
    found = sensitivity(problem, n_paths=100_000, method="likelihood_ratio", wrt="along").gradient["along"]
    # X_1 = 0.3 + W: d/d along P(X > 0.2) = phi(0.1)
    assert abs(float(found.mean) - math.exp(-0.005) / math.sqrt(2 * math.pi)) < 4.5 * float(found.standard_error)
    for method in ("malliavin", "vibrato"):
        with pytest.raises(MethodError, match="likelihood_ratio"):
            sensitivity(problem, n_paths=100, method=method, wrt="along")


def test_a_parameter_of_a_noiseless_component_where_F_jumps_is_refused():
    """Position and velocity: noise in the velocity alone, the indicator looks at the position."""
    sde = SDE(
        lambda t, y, p: torch.stack((p["k"] * y[:, 1], -y[:, 1]), 1),
        lambda t, y, p: torch.stack((0 * y[:, 0], torch.ones_like(y[:, 1])), 1),
        {"k": scalar(1.0)},
    )
    problem = Problem(sde, Digital(0.1), torch.zeros(2, dtype=F64), (0.0, 1.0), 8)
    with pytest.raises(JumpError, match="along a path held fixed"):
        sensitivity(problem, n_paths=100, method="likelihood_ratio")
    smooth_one = replace(problem, functional=Moment(2))
    exact = sensitivity(smooth_one, n_paths=50_000, seed=1).gradient["k"]
    found = sensitivity(smooth_one, n_paths=50_000, seed=2, method="likelihood_ratio").gradient["k"]
    error = math.hypot(float(found.standard_error), float(exact.standard_error))
    assert abs(float(found.mean - exact.mean)) < 4.5 * error


def test_noise_that_vanishes_on_some_paths():
    """Full truncation: where the variance is at zero its drift still moves, and there is no density."""
    problem = heston(n_steps=16, xi=0.8).problem
    with pytest.raises(MethodError, match="the noise vanishes"):
        sensitivity(problem, n_paths=2000, method="likelihood_ratio", wrt="kappa", audit=False)
    with pytest.raises(NonFiniteError, match="the noise vanishes"):
        sensitivity(problem, n_paths=2000, method="malliavin", wrt="s0", audit=False)
    # the initial price acts in the first step, where the variance is known to be positive
    found = sensitivity(problem, n_paths=20_000, method="likelihood_ratio", wrt="s0", audit=False, seed=3).gradient[
        "s0"
    ]
    exact = sensitivity(problem, n_paths=20_000, wrt="s0", audit=False, seed=4).gradient["s0"]
    error = math.hypot(float(found.standard_error), float(exact.standard_error))
    assert abs(float(found.mean - exact.mean)) < 4.5 * error


def test_conditional_needs_a_declaration_and_noise_in_the_last_step():
    with pytest.raises(MethodError, match="conditional\\(ys, covariance, p\\)"):
        sensitivity(GBM(n_steps=4).problem(), n_paths=100, method="conditional")
    problem = cir(n_steps=8, sigma=0.6).problem
    jump = replace(problem, functional=Digital(0.05))
    with pytest.raises(NonFiniteError, match="last step has no noise"):
        sensitivity(jump, n_paths=4000, method="conditional", audit=False)


def test_a_step_of_its_own_has_no_transitions():
    for method in (*SMOOTHED, "conditional"):
        with pytest.raises(MethodError, match="`step` of its own"):
            sensitivity(cir_lamperti(n_steps=4).problem, n_paths=100, method=method)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("vibrato", {"draws": 0}, "`draws` must be a positive int, got 0"),
        ("malliavin", {"window": 1.5}, "`window` must be a positive int"),
        ("vibrato", {"window": 3}, "no argument `window`"),
        ("likelihood_ratio", {"controls": False}, "did you mean `control`"),
        ("pathwise", {"audit": "loud"}, "`audit` must be 'warn', 'allow' or False"),
        ("pathwise", {"bias": -1.0}, "`bias` must be True, False or a weak order"),
    ],
)
def test_options_that_make_no_sense(method, options, message):
    with pytest.raises((ArgumentError, TypeError), match=message):
        sensitivity(gbm_call(n_steps=4).problem, n_paths=100, method=method, **options)


# Noise, division of the work


@pytest.mark.parametrize("method", [*SMOOTHED, "conditional"])
def test_same_bits_however_the_work_is_divided(method):
    problem = gbm_digital(n_steps=4).problem
    whole = sensitivity(problem, n_paths=20_000, method=method, seed=1)
    halves = merge(*(sensitivity(problem, n_paths=10_000, first_path=k, method=method, seed=1) for k in (0, 10_000)))
    tiled = sensitivity(problem, n_paths=20_000, method=method, seed=1, tile_paths=1600)
    for other in (halves, tiled):
        for name, g in whole.gradient.items():
            assert torch.equal(g.mean, other.gradient[name].mean)
            assert torch.equal(g.standard_error, other.gradient[name].standard_error)


@pytest.mark.parametrize("method", SMOOTHED)
def test_antithetic_pairs(method):
    known = gbm_digital(log=True, n_steps=2)
    result = sensitivity(known.problem, n_paths=40_000, method=method, noise=Antithetic(Philox(3)))
    assert max(z_scores(result.gradient, known.answers()[1]).values()) < 4.5


def test_given_noise_has_no_draws_beside_the_paths():
    noise = GivenNoise(Philox(1).normals(0, 100, 0, 4, 1, dtype=F64, device=torch.device("cpu")))
    problem = gbm_digital(n_steps=4).problem
    with pytest.raises(ArgumentError, match="holds the normals of the paths and no others"):
        sensitivity(problem, n_paths=100, method="vibrato", noise=noise)
    assert sensitivity(problem, n_paths=100, method="likelihood_ratio", noise=noise).n_paths == 100


def test_functions_that_vmap_cannot_take_give_the_same_numbers():
    def awkward(t, y, p):
        out = torch.empty_like(y)
        out[:] = p["sigma"] * y
        return out

    model = GBM(n_steps=4)
    plain = model.problem()
    looped = replace(plain, sde=SDE(plain.sde.drift, awkward, plain.sde.params), functional=terminal)
    for method in ("likelihood_ratio", "vibrato"):
        one = sensitivity(plain, n_paths=200, method=method, seed=1, audit=False)
        with pytest.warns(Warning, match="vectorised"):
            two = sensitivity(looped, n_paths=200, method=method, seed=1, audit=False)
        for name, g in one.gradient.items():
            # the control variate's constants come from paths one way and from groups the other, some per cent apart
            assert float((g.mean - two.gradient[name].mean).abs()) < 0.5 * float(g.standard_error)


def test_float32():
    known = gbm_digital(log=True, n_steps=4, dtype=torch.float32)
    for method in (*SMOOTHED, "conditional"):
        found = sensitivity(known.problem, n_paths=20_000, method=method, seed=2).gradient
        assert max(z_scores(found, known.answers()[1]).values()) < 4.5, method


def test_vibrato_with_more_draws_varies_less():
    problem = gbm_digital(n_steps=16).problem
    one, eight = (
        sensitivity(problem, n_paths=20_000, method="vibrato", draws=k, wrt="s0").gradient["s0"] for k in (1, 8)
    )
    assert float(eight.standard_error) < 0.9 * float(one.standard_error)


def test_vibrato_is_the_gradient_of_its_own_surrogate_on_average_only():
    """Its own draws move no path: the first path's state is the plain chain's."""
    problem = gbm_call(n_steps=4).problem
    tile = Tile(problem, Philox(5), 0, 50, 10, 1)
    again = vibrato(tile, problem.leaves(), draws=2)
    assert torch.equal(again.values, vibrato(tile, problem.leaves(), draws=2).values)


# Second derivatives


def test_gamma_of_a_call_is_refused_along_the_path():
    problem = gbm_call(n_steps=8).problem
    with pytest.raises(KinkError, match=r"gamma of a call would be 0.*'conditional', 'likelihood_ratio_pathwise'"):
        hessian(problem, n_paths=100, method="pathwise", wrt="s0")
    # and what it would have been
    zero = hessian(problem, n_paths=100, method="pathwise", wrt="s0", audit=False)["s0", "s0"]
    assert float(zero.mean.abs()) < 1e-12
    with pytest.raises(KinkError, match="a jump"):
        hessian(gbm_digital(n_steps=8).problem, n_paths=100, method="likelihood_ratio_pathwise", wrt="s0")


@pytest.mark.parametrize(
    "method", ["likelihood_ratio_pathwise", "pathwise_likelihood_ratio", "likelihood_ratio", "conditional"]
)
def test_gamma_and_vanna_of_a_call(method):
    found = hessian(gbm_call(log=True, n_steps=4).problem, n_paths=40_000, method=method, wrt=("s0", "sigma"), seed=3)
    exact = {("s0", "s0"): 0.018762017345846895, ("s0", "sigma"): -0.28143026018770345}
    for pair, value in exact.items():
        assert abs(float(found[pair].mean) - value) < 4.5 * float(found[pair].standard_error)
    assert torch.equal(found["sigma", "s0"].mean, found["s0", "sigma"].mean)


def test_hessian_of_a_smooth_functional():
    """E X_N^2 on the GBM chain: x0^2 q^N with q = (1 + mu h)^2 + sigma^2 h; twice along the path against its Hessian."""
    model = GBM(n_steps=6)
    names = ("mu", "sigma", "y0")
    point = {k: v.requires_grad_() for k, v in zip(names, map(scalar, (model.mu, model.sigma, model.x0)), strict=True)}
    h = 1 / 6
    value = point["y0"] ** 2 * ((1 + point["mu"] * h) ** 2 + point["sigma"] ** 2 * h) ** 6
    first = torch.autograd.grad(value, list(point.values()), create_graph=True)
    exact = torch.stack([torch.stack(torch.autograd.grad(g, list(point.values()), retain_graph=True)) for g in first])
    found = hessian(model.problem(2), n_paths=40_000, method="pathwise", wrt=names, seed=4)
    mean, error = found.matrix()
    assert float(((mean - exact).abs() / error.clamp_min(1e-12)).max()) < 4.5
    assert torch.equal(mean, mean.T)


def test_hessian_of_vectors_has_their_shapes():
    problem = smooth("diagonal", 0, n_steps=3, outputs=(0, 3))
    found = hessian(problem, n_paths=64, method="pathwise", wrt=("c", "s"))
    assert found["c", "c"].mean.shape == (3, 3)
    assert found["c", "s"].mean.shape == found["s", "c"].mean.shape == (3,)
    assert found.matrix()[0].shape == (4, 4)
    torch.testing.assert_close(found["c", "c"].mean, found["c", "c"].mean.T)
    # path by path, against differences of the first derivatives on the same noise: 1e-6 of their size
    theta = problem.leaves(("c", "s"))
    step = 1e-5
    bumped = [
        sensitivity(replace(problem, sde=problem.sde.with_params(s=theta["s"] + d)), n_paths=64, wrt="c", audit=False)
        for d in (step, -step)
    ]
    by_difference = (bumped[0].gradient["c"].mean - bumped[1].gradient["c"].mean) / (2 * step)
    torch.testing.assert_close(found["c", "s"].mean, by_difference, rtol=1e-6, atol=1e-8)


def test_hessian_chooses():
    found = hessian(gbm_call(n_steps=4).problem, n_paths=2000, wrt="s0")
    assert found.method in ("conditional", "likelihood_ratio_pathwise")
    assert found.tried["pathwise"].refused
    assert "chosen by trial" in repr(found)
    assert found.to_dict()["second"]["s0, s0"]["n"] == 2000


def test_a_running_integral_that_kinks_is_refused_twice():
    """(I - K)^+ of an integral: with the noisy component held, F still kinks."""
    rate = SDE(lambda t, y, p: p["m"] - y, lambda t, y, p: 0.4 * torch.ones_like(y), {"m": scalar(0.5)})
    integral = with_running_integral(rate, lambda t, y, p: y[:, 0] + p["m"])
    problem = Problem(integral, Call(0.9, component=1), torch.tensor([0.3, 0.0], dtype=F64), (0.0, 1.0), 8)
    with pytest.raises(KinkError):
        hessian(problem, n_paths=100, method="likelihood_ratio_pathwise")


# The tail


@pytest.mark.filterwarnings("ignore::sdesens.HighVarianceWarning")  # the audit sees the square root too
def test_the_tail_of_full_truncation_is_flagged_and_that_of_lamperti_is_not():
    """At 2 kappa theta / sigma^2 = 0.6 the visible tail index of the sigma tangent is about 1.8; Lamperti's is above 5."""
    with pytest.warns(HeavyTailWarning, match="'sigma' looks infinite"):
        heavy = sensitivity(cir(**FELLER, mean=True).problem, n_paths=200_000, method="forward", wrt="sigma", seed=1)
    assert heavy.unreliable == ("sigma",)
    assert heavy.tails["sigma"].index < 2.2
    assert "standard error not reliable" in repr(heavy)
    light = sensitivity(cir_lamperti(**FELLER).problem, n_paths=200_000, method="forward", wrt="sigma", seed=1)
    assert light.unreliable == ()
    assert light.tails["sigma"].index > 4
    g = light.gradient["sigma"]
    # the exact derivative is 0, the chain's by quadrature is the bias of the step
    assert abs(float(g.mean) - lamperti_bias()) < 4.5 * float(g.standard_error)
    assert abs(float(g.mean)) > 4.5 * float(g.standard_error)  # negative control: without it, off


def test_an_order_for_the_bias():
    """bias=a scales the half-step difference by 2^a / (2^a - 1)."""
    problem = GBM(n_steps=4).problem(2)
    one, half = (sensitivity(problem, n_paths=2000, bias=b, seed=2).bias["mu"].mean for b in (True, 0.5))
    torch.testing.assert_close(half / one, scalar(2**0.5 / (2**0.5 - 1) / 2), rtol=1e-12, atol=0)


# Choosing


def test_auto_says_what_was_tried():
    known = gbm_digital(n_steps=16)
    result = sensitivity(known.problem, n_paths=20_000, method="auto", seed=1)
    assert result.method == "conditional"
    assert result.tried["pathwise"].refused.startswith("the functional (or a coefficient) jumps")
    assert result.tried["likelihood_ratio"].work > 2
    assert "chosen by trial: conditional 1" in repr(result)
    assert result.to_dict()["tried"]["conditional"]["work"] == 1.0
    assert result.audit.kind in ("smooth", "kink")


def test_auto_does_not_take_a_detached_gradient_for_a_small_variance():
    """numpy hides the functional from autograd: along the path nothing moves, and nothing varies."""
    problem = Problem(
        SDE(lambda t, y, p: p["m"] - y, lambda t, y, p: 0.4 * torch.ones_like(y), {"m": scalar(0.5)}),
        lambda ys, p: torch.sin(ys[-1, :, 0]).detach(),
        torch.zeros(1, dtype=F64),
        (0.0, 1.0),
        4,
    )
    result = sensitivity(problem, n_paths=4000, method="auto", seed=1)
    assert result.method not in ("pathwise", "forward")
    assert float(result.gradient["m"].mean) > 0.3


def test_auto_without_a_method_that_applies():
    sde = SDE(lambda t, y, p: 0.1 * y, lambda t, y, p: 0.2 * y, {"K": scalar(1.0)})
    problem = Problem(sde, lambda ys, p: (ys[-1, :, 0] > p["K"]).double(), torch.ones(1, dtype=F64), (0.0, 1.0), 4)
    with pytest.raises(MethodError, match="no unbiased method that applies"):
        sensitivity(problem, n_paths=1000, method="auto")


def test_barrier_by_its_bridge_is_the_continuously_watched_one_at_any_step():
    from sdesens.models import barrier

    known = barrier(n_steps=4)
    result = sensitivity(known.problem, n_paths=100_000, method="conditional", seed=3)
    value, exact = known.answers()
    assert abs(float(result.value.mean - value)) < 4.5 * float(result.value.standard_error)
    assert max(z_scores(result.gradient, exact).values()) < 4.5
    with pytest.raises(JumpError, match="'conditional'"):
        sensitivity(known.problem, n_paths=1000)
    assert isinstance(known.problem.functional, BarrierCall)


# Coefficients that jump


def _regimes():
    """The drift changes sign at a level c."""

    def drift(t, y, p):
        return torch.where(y > p["c"], p["a"], -p["a"]) + 0 * p["c"]

    params = {"a": scalar(0.5), "c": scalar(1.1)}
    sde = SDE(drift, lambda t, y, p: 0.3 * torch.ones_like(y), params)
    return Problem(sde, Moment(1), torch.ones(1, dtype=F64), (0.0, 1.0), 8)


def test_a_drift_that_jumps_leaves_the_likelihood_ratio_alone():
    """The path jumps where it crosses the level, so nothing along it is right; its law moves smoothly in a, and not in c."""
    problem = _regimes()
    for method in ("pathwise", "conditional", "vibrato", "malliavin"):
        with pytest.raises(JumpError, match="apply: 'likelihood_ratio'"):
            sensitivity(problem, n_paths=1000, method=method, wrt="a")
    found = sensitivity(problem, n_paths=100_000, method="auto", wrt="a", seed=1)
    assert found.method == "likelihood_ratio"
    # wide central differences, whose error falls with the square of the step
    wide = sensitivity(problem, n_paths=400_000, method="finite_difference", wrt="a", relative_step=0.05, seed=2)
    error = math.hypot(float(found.gradient["a"].standard_error), float(wide.gradient["a"].standard_error))
    assert abs(float(found.gradient["a"].mean - wide.gradient["a"].mean)) < 4.5 * error + 0.01
    with pytest.raises(JumpError, match="that path's density"):
        sensitivity(problem, n_paths=1000, method="likelihood_ratio", wrt="c")


# What hostile use found


def test_noise_that_begins_late_or_is_turned_on_by_a_parameter_is_noise():
    late = SDE(
        lambda t, y, p: -p["a"] * y,
        lambda t, y, p: p["s"] * ((t > 0.1) & (t < 0.4)) * torch.ones_like(y),
        {"a": scalar(1.0), "s": scalar(0.5)},
    )
    problem = Problem(late, Moment(2), torch.ones(1, dtype=F64), (0.0, 1.0), 16)
    for method in ("likelihood_ratio", "malliavin"):
        with pytest.raises((MethodError, NonFiniteError), match="the noise vanishes"):
            sensitivity(problem, n_paths=100, method=method)
    # a volatility that is zero has a derivative all the same
    off = SDE(lambda t, y, p: 0.1 * y, lambda t, y, p: p["s"] * y, {"s": scalar(0.0)})
    with pytest.raises((MethodError, NonFiniteError, JumpError)):  # the density itself is none at 0
        sensitivity(replace(problem, sde=off), n_paths=100, method="likelihood_ratio")


def test_a_start_that_moves_a_step_without_noise_is_refused():
    sde = SDE(lambda t, y, p: -y + 0 * p["m"], lambda t, y, p: (t >= 0.25) * torch.ones_like(y), {"m": scalar(0.5)})
    problem = Problem(sde, Moment(1), lambda p: (2 * p["m"])[None], (0.0, 1.0), 16)
    with pytest.raises(MethodError, match="the noise vanishes"):
        sensitivity(problem, n_paths=100, method="likelihood_ratio")


def test_a_clean_component_does_not_hide_a_missing_direction():
    """dX1 = C dt + dW, dX2 = -C dt + dW, dC = th dt: th moves X1 - X2, which has no noise."""

    def drift(t, y, p):
        return torch.stack((y[:, 2], -y[:, 2], p["th"] + 0 * y[:, 0]), 1)

    def diffusion(t, y, p):
        return torch.tensor([1.0, 1.0, 0.0], dtype=F64).expand(len(y), 3)[..., None]

    sde = SDE(drift, diffusion, {"th": scalar(1.0)}, noise_type="scalar")
    problem = Problem(sde, lambda ys, p: (ys[-1, :, 0] - ys[-1, :, 1]) ** 2, torch.zeros(3, dtype=F64), (0.0, 1.0), 8)
    with pytest.raises(MethodError, match="'th' moves a component without noise"):
        sensitivity(problem, n_paths=100, method="likelihood_ratio")


@dataclass(frozen=True)
class Wrong:
    kind = "kink"
    what: str = "mean"

    def __call__(self, ys, p):
        return ys[-1, :, 0].clamp(min=0)

    def conditional(self, ys, covariance, p):
        return {"mean": 3 * ys[-1, :, 0], "shape": ys[-1], "none": None}[self.what]

    def rewards(self, ys, p):
        return ys[:, :, 0] if self.what == "mean" else ys[-1, :, 0]


def test_declarations_are_held_against_the_functional():
    problem = OU(n_steps=4).problem(1)
    with pytest.raises(MethodError, match="is not the functional's expectation over the last step"):
        sensitivity(replace(problem, functional=Wrong()), n_paths=100, method="conditional")
    for what in ("shape", "none"):
        with pytest.raises(ArgumentError, match="must return one number a path"):
            sensitivity(replace(problem, functional=Wrong(what)), n_paths=100, method="conditional")
    with pytest.raises(MethodError, match="does not add up to the functional"):
        sensitivity(replace(problem, functional=Wrong()), n_paths=100, method="likelihood_ratio")
    with pytest.raises(ArgumentError, match=r"a tensor of shape \(T, B\)"):
        sensitivity(replace(problem, functional=Wrong("shape")), n_paths=100, method="likelihood_ratio")
    assert sensitivity(replace(problem, functional=Wrong()), n_paths=2000, method="auto").method != "conditional"


def test_auto_leaves_the_bridge_of_a_barrier_to_those_who_name_it():
    from sdesens.models import barrier

    found = sensitivity(barrier(n_steps=4).problem, n_paths=2000, method="auto")
    assert found.method != "conditional"
    assert "another number" in found.tried["conditional"].refused


def test_runs_of_other_functionals_do_not_merge():
    problem = gbm_digital(n_steps=2).problem
    one = sensitivity(problem, n_paths=100, method="likelihood_ratio")
    two = sensitivity(
        replace(problem, functional=replace(problem.functional, strike=130.0)),
        n_paths=100,
        first_path=100,
        method="likelihood_ratio",
    )
    with pytest.raises(ArgumentError, match="one problem"):
        merge(one, two)


def test_names_that_results_need_are_refused():
    for name in ("value", "a, b"):
        with pytest.raises(ArgumentError, match="rename it"):
            SDE(lambda t, y, p: y, lambda t, y, p: y, {name: scalar(1.0)})


def test_warnings_point_at_the_caller():
    with pytest.warns(HeavyTailWarning) as said:
        sensitivity(cir(**FELLER, mean=True).problem, n_paths=20_000, method="forward", wrt="sigma", audit=False)
    assert said[0].filename == __file__


def test_a_rare_payoff_is_no_heavy_tail():
    """One path in 200 pays: the smallest payoffs are no tail."""
    found = sensitivity(gbm_call(strike=150.0, n_steps=4).problem, n_paths=100_000, method="likelihood_ratio", seed=1)
    assert found.unreliable == ()
