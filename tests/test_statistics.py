"""Do the error bars tell the truth, and do the numbers converge at the orders they should?

Statistical tests have fixed seeds; the false-alarm rate in a comment is the chance that correct code fails on a fresh
seed. Exact means and variances are those of the Euler-Maruyama chain, so no discretisation error hides in them.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from measure import adjoint_errors, coverage, scores, strong_errors, weak_errors_by_coupling, weak_errors_by_quadrature
from problems import F64, GBM, OU, brownian_end, scalar, slope, terminal

from sdesens import SDE, Antithetic, Estimate, Philox, Problem, sensitivity
from sdesens.estimate import Moments, total
from sdesens.sensitivity import forward
from sdesens.sensitivity.tile import Tile

BOTH = pytest.mark.parametrize("method", ["pathwise", "forward"])


def gbm_exact(model: GBM) -> dict[str, tuple[float, float]]:
    """(mean, variance of one path) of X_N and its gradient."""
    return {k: (model.scheme(1)[k], v) for k, v in model.variances().items()}


CASES = {
    "GBM, X": (GBM().problem(1), gbm_exact(GBM())),
    "OU, X": (OU().problem(1), OU().exact(1)),
    "OU, X^2": (OU().problem(2), OU().exact(2)),
}


def test_exact_formulas_against_published_values():
    """The authority of this file, against numbers computed elsewhere to the printed digits."""
    variances = GBM(mu=0.08, sigma=0.3, x0=1.3, t1=1.0, n_steps=50).variances()
    assert variances["mu"] == pytest.approx(0.177694, rel=1e-5)
    assert variances["sigma"] == pytest.approx(2.34753, rel=1e-5)
    assert variances["y0"] == pytest.approx(0.110028, rel=1e-5)
    assert OU().exact(1)["kappa"] == pytest.approx((-0.116351719716, 0.026467752607), rel=1e-10)
    assert OU().exact(2)["kappa"] == pytest.approx((-0.177313035702, 0.057948852732), rel=1e-10)
    assert OU().exact(2)["sigma"] == pytest.approx((0.395697454592, 0.639958366310), rel=1e-10)


# Means and standard errors


@BOTH
@pytest.mark.parametrize("case", list(CASES))
def test_gradients_and_standard_errors_against_the_exact_chain(case, method):
    problem, exact = CASES[case]
    for name, (z, ratio) in scores(exact, problem, method, 100_000, seed=11).items():
        # 24 comparisons of |z| < 4: false alarm 1.5e-3
        assert abs(z) < 4, (name, z)
        # 500 groups know the standard error to 3.2 %, so 10 % is 3.1 sd; eight such names: false alarm 1.5e-2
        assert abs(ratio - 1) < 0.1, (name, ratio)


def test_a_wrong_gradient_does_not_pass():
    """Negative control: the same scores against the gradient of the SDE instead of the chain's, at a coarse step."""
    model = GBM(mu=0.5, n_steps=4)
    shifted = {k: (model.sde(1)[k], v) for k, v in model.variances().items()}
    assert abs(scores(shifted, model.problem(1), "pathwise", 100_000, seed=11)["mu"][0]) > 10


# Coverage


SEEDS = range(400)


@BOTH
@pytest.mark.parametrize("model", [GBM(n_steps=10), OU(n_steps=10)], ids=["GBM", "OU"])
def test_intervals_cover_as_often_as_they_say(model, method):
    gbm = isinstance(model, GBM)
    exact = gbm_exact(model) if gbm else model.exact(2)
    found = coverage(exact, model.problem(1 if gbm else 2), method, 1000, SEEDS)
    for name, hits in found.items():
        # binomial sd 1.09 %: the band is 2.75 sd wide on both sides, false alarm 0.6 % a name
        assert 0.92 <= hits <= 0.98, (name, hits)


def test_intervals_around_the_wrong_number_do_not_cover():
    model = GBM(mu=0.5, n_steps=4)  # negative control: the SDE's gradient, not the chain's
    shifted = {k: (model.sde(1)[k], v) for k, v in model.variances().items() if k == "mu"}
    assert coverage(shifted, model.problem(1), "pathwise", 10_000, range(60))["mu"] < 0.5


def test_few_groups_need_the_t_quantile():
    """Two paths to a run: one degree of freedom, where a normal quantile would cover 70 % of the time."""
    model = OU(n_steps=1)  # X is Gaussian, so the t interval is exact
    hits = normal = 0
    for seed in SEEDS:
        estimate = sensitivity(model.problem(1), n_paths=2, seed=seed, method="forward").value
        assert estimate.dof == 1
        low, high = estimate.confidence_interval(0.95)
        hits += bool(low <= model.exact(1)["value"][0] <= high)
        normal += bool(abs(float(estimate.mean) - model.exact(1)["value"][0]) < 1.96 * float(estimate.standard_error))
    assert 0.92 <= hits / len(SEEDS) <= 0.98  # false alarm 0.6 %
    assert normal / len(SEEDS) < 0.8


# Moments


def test_estimate_is_the_textbook_one():
    x = np.random.default_rng(0).normal(size=(500, 2, 3))
    estimate = Estimate.from_samples(torch.tensor(x))
    assert np.allclose(estimate.mean, x.mean(0), rtol=1e-13)
    assert np.allclose(estimate.standard_error, x.std(0, ddof=1) / math.sqrt(500), rtol=1e-12)
    assert estimate.dof == 499


def test_moments_add_up_to_those_of_the_whole():
    x = torch.tensor(np.random.default_rng(1).normal(size=(60, 2)) + 1e3)
    whole = Moments.of_units(x, 1)
    parts = total(Moments.of_units(p, 1) for p in x.split([1, 7, 40, 12]))
    assert (parts.n, parts.units) == (60, 60)
    assert torch.allclose(parts.mean, whole.mean, rtol=1e-14)
    assert torch.allclose(parts.m2, whole.m2, rtol=1e-10)  # 6 of 16 digits go with the square of the mean


def test_group_means_give_the_variance_of_one_path():
    """Equation: M2 / (U - 1) estimates a path's variance whatever the groups, also when the last one is smaller."""
    x = torch.tensor(np.random.default_rng(2).normal(size=(100_000,)))
    for size in (1, 10, 100):
        moments = Moments.of_units(x.unflatten(0, (-1, size)).mean(1), size)
        # relative sd sqrt(2 / 999) = 4.5 % with the fewest units; 4 sd
        assert float(moments.m2 / (moments.units - 1)) == pytest.approx(1.0, abs=0.18)
    ragged = Moments.of_units(x[:99_000].unflatten(0, (-1, 100)).mean(1), 100) + Moments.of_units(x[99_000:], 1)
    assert float(ragged.m2 / (ragged.units - 1)) == pytest.approx(1.0, abs=0.13)  # 1990 units: 3.2 %, 4 sd


# Antithetic pairs


@BOTH
@pytest.mark.parametrize(
    ("model", "power"), [(GBM(n_steps=4), 1), (OU(n_steps=4, m=0.0, x0=0.0), 2)], ids=["monotone", "even"]
)
def test_antithetic_standard_errors_are_honest(model, power, method):
    """The spread of the mean over many seeds is what each run says it is; paths taken as independent would lie.

    On a monotone functional mirrored paths cancel; on an even one they repeat each other and help nothing.
    """
    seeds, n = 300, 400
    wrt = ("sigma",) if power == 2 else ("mu",)
    runs = [
        sensitivity(model.problem(power), n_paths=n, method=method, wrt=wrt, noise=Antithetic(Philox(s)))
        for s in range(seeds)
    ]
    for pick in (lambda r: r.value, lambda r: r.gradient[wrt[0]]):
        means = torch.stack([pick(r).mean for r in runs])
        claimed = float(torch.stack([pick(r).standard_error ** 2 for r in runs]).mean())
        # variance over 300 seeds has relative sd sqrt(2 / 299) = 8 %: 4 sd, false alarm 1e-4 each
        assert float(means.var()) == pytest.approx(claimed, rel=0.33)
    tile = Tile(model.problem(power), Antithetic(Philox(0)), 0, 20_000, 20_000, 1)
    paths = forward(tile, model.problem(power).leaves(wrt)).values
    naive = float(paths.var() / n)  # negative control
    true = float(torch.stack([r.value.mean for r in runs]).var())
    assert naive / true > 2 if power == 1 else naive / true < 0.7


def test_antithetic_pairs_count_once():
    problem, noise = GBM(n_steps=4).problem(), Antithetic(Philox(1))
    swept, tangents = (sensitivity(problem, n_paths=500, noise=noise, method=m) for m in ("pathwise", "forward"))
    assert tangents.gradient["mu"].dof == 249  # one unit a pair
    assert swept.gradient["mu"].dof == 49  # 50 groups of five whole pairs
    assert swept.value.dof == tangents.value.dof == 249
    assert torch.allclose(swept.gradient["mu"].mean, tangents.gradient["mu"].mean, rtol=1e-13)


# Orders of convergence


def test_strong_order_of_the_pathwise_derivative():
    steps = (16, 64, 256, 1024)
    errors = strong_errors(GBM(mu=0.1, sigma=0.5, x0=1.0), steps, 1000, seed=3)
    # a fit through four points over a factor 64; RMS over 1000 paths is good to about 4 % a point
    assert slope(steps, errors["sigma"]) == pytest.approx(0.5, abs=0.1)
    assert slope(steps, errors["mu"]) == pytest.approx(0.5, abs=0.1)
    # published RMS errors of the derivative in sigma
    for e, known in zip(errors["sigma"], (0.247, 0.126, 0.065, 0.032), strict=True):
        assert e == pytest.approx(known, rel=0.2)


def test_strong_order_needs_the_same_brownian_path():
    """Negative control: against another path's derivative nothing converges."""
    model, steps = GBM(mu=0.1, sigma=0.5, x0=1.0), (16, 64, 256)
    other = model.path_derivatives(brownian_end(Philox(99), 500, 256, 1.0))["sigma"]
    errors = []
    for n in steps:
        problem = model.problem().with_steps(n)
        found = forward(Tile(problem, Philox(3), 0, 500, 500, 1), problem.leaves(("sigma",))).gradients["sigma"]
        errors.append(float((found - other).square().mean().sqrt()))
    assert abs(slope(steps, errors)) < 0.1


@BOTH
def test_weak_order_of_the_gradient_without_sampling(method):
    steps = (4, 8, 16) if method == "pathwise" else (4, 8, 12)
    errors = weak_errors_by_quadrature(GBM(mu=0.1, sigma=0.5, x0=1.0), steps, method)
    for name, e in errors.items():
        # exact numbers: what is left of the distance from 1 is the next term of the expansion, O(h)
        assert slope(steps, e) == pytest.approx(1.0, abs=0.15), (name, e)


def test_weak_order_of_the_gradient_in_coupled_paths():
    model, steps = GBM(mu=0.1, sigma=0.5, x0=1.0), (4, 8, 16, 32)
    found = weak_errors_by_coupling(model, steps, 40_000, seed=5)
    exact = model.sde(2)
    for name, estimates in found.items():
        for n, e in zip(steps, estimates, strict=True):
            bias = replace(model, n_steps=n).scheme(2)[name] - exact[name]
            assert abs(float(e.mean) - bias) < 4 * float(e.standard_error), (name, n)  # false alarm 5e-4 in all
    mu = [abs(float(e.mean)) for e in found["mu"]]
    assert slope(steps, mu) == pytest.approx(1.0, abs=0.15)  # each point is good to 7 % or better


def test_adjoint_mean_is_closer_than_its_paths():
    """The continuous adjoint's mean converges faster than a path of it: its bias is a fraction of its RMS error."""
    model = GBM(mu=0.1, sigma=0.5, x0=1.0)
    errors = adjoint_errors(model.problem(), 1, 300, (16, 64, 256), ("sigma",))
    assert slope((16, 64, 256), errors["sigma"]) > 0.4
    result = sensitivity(model.problem().with_steps(256), n_paths=4000, method="adjoint", wrt=("mu",), seed=2)
    exact = replace(model, n_steps=256).scheme(1)["mu"]
    # bias O(h), a fraction of a percent here, on top of 4 standard errors
    assert abs(float(result.gradient["mu"].mean) - exact) < 4 * float(result.gradient["mu"].standard_error) + 0.01


# Discretisation bias


@BOTH
def test_half_step_bias_is_the_bias(method):
    model = GBM(mu=0.3, sigma=0.4, n_steps=10)
    half = replace(model, n_steps=20)
    result = sensitivity(model.problem(2), n_paths=40_000, method=method, wrt=("mu", "sigma", "y0"), bias=True, seed=7)
    assert set(result.bias) == {"value", "mu", "sigma", "y0"}
    for name, estimate in result.bias.items():
        m, se = estimate.mean.flatten().item(), estimate.standard_error.flatten().item()
        # what the coupled run estimates without bias of its own; 8 comparisons in all: false alarm 5e-4
        assert abs(m - 2 * (model.scheme(2)[name] - half.scheme(2)[name])) < 4 * se, name
        # and the bias itself, which differs from that in the next term of the expansion, of relative size O(h)
        true = model.scheme(2)[name] - model.sde(2)[name]
        assert abs(m - true) < 4 * se + 0.15 * abs(true), name
        if name != "sigma":
            assert abs(m) > 4 * se, name  # resolved, so the test could have failed


def test_a_scheme_without_bias_reports_none():
    """Constant coefficients: the chain is exact in law, and coarse and fine runs end in one point."""
    sde = SDE(_constant_drift, _constant_diffusion, {"mu": scalar(0.2), "sigma": scalar(0.3)})
    problem = Problem(sde, terminal, torch.ones(1, dtype=F64), (0.0, 1.0), 8)
    result = sensitivity(problem, n_paths=500, bias=True)
    for estimate in result.bias.values():
        assert abs(float(estimate.mean)) < 1e-14


def _constant_drift(t, y, p):
    return p["mu"] * torch.ones_like(y)


def _constant_diffusion(t, y, p):
    return p["sigma"] * torch.ones_like(y)


def test_bias_does_not_change_the_estimate():
    problem = GBM(n_steps=4).problem()
    with_bias, without = (sensitivity(problem, n_paths=500, bias=b, seed=3) for b in (True, False))
    assert without.bias is None
    assert torch.equal(with_bias.gradient["sigma"].mean, without.gradient["sigma"].mean)
