"""The machinery of the estimators: the same numbers however they are made, the default, decomposition and study."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributions as td
from estimator_cases import N11, quadratic, squared_distance, vector
from problems import F64, scalar

from sdesens import Antithetic, GivenNoise, Philox
from sdesens.estimators import (
    Bernoulli,
    Categorical,
    LogNormal,
    MultivariateNormal,
    Normal,
    compare,
    decompose,
    expectation_gradient,
    surrogate,
    variance_study,
)
from sdesens.estimators.exact import normal_variances
from sdesens.estimators.methods import choose
from sdesens.estimators.model import ask, detached
from sdesens.estimators.run import Task, answer, noise_of
from sdesens.estimators.study import crossing

# The same numbers, however they are made


def both_ways(model, f, params, method, n=600, **options):
    question = detached(ask(model, f, params, None, options.pop("x", None)))
    law = question.law(question.theta)
    choice = choose(method, options, law, question.x is not None, n)
    return [answer(Task(question, choice, noise_of(5, None), law, way), n) for way in (True, False)]


@pytest.mark.parametrize("method", ["pathwise", "score_function", "rloo", "measure_valued"])
def test_vmap_and_loop_agree(method):
    """One vmap over units, or one by one: another order of summation alone."""
    params = {"mean": vector(0.3, 1.0), "scale": vector(0.5, 2.0)}
    for options in ({}, {"x": torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))}):
        if options:
            model = lambda x, p: Normal(x * p["mean"], p["scale"].expand(len(x), 2))  # noqa: E731
            f = lambda z, x, p: torch.sin(z * x).sum(1)  # noqa: E731
        else:
            model, f = Normal, lambda z, p: torch.sin(z).prod(1)  # type: ignore[assignment]
        vmapped, looped = both_ways(model, f, params, method, **options)
        for k in ("value", *params):
            torch.testing.assert_close(vmapped[k].mean, looped[k].mean, rtol=1e-12, atol=1e-14)


def test_same_seed_same_bits_whatever_the_threads():
    run = partial(expectation_gradient, Normal, quadratic, N11, n_samples=100_000, method="score_function", seed=9)
    threads = torch.get_num_threads()
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        found.append(run())
    torch.set_num_threads(threads)
    for k in N11:
        assert torch.equal(found[0].gradient[k].mean, found[1].gradient[k].mean)
        assert torch.equal(found[0].gradient[k].standard_error, found[1].gradient[k].standard_error)
    other = expectation_gradient(Normal, quadratic, N11, n_samples=100_000, method="score_function", seed=10)
    assert not torch.equal(other.gradient["mean"].mean, found[0].gradient["mean"].mean)


def test_methods_share_their_draws():
    """Common random numbers: the value is the same number whatever the method."""
    methods = ("pathwise", "score_function", "rloo", "measure_valued")
    values = [expectation_gradient(Normal, quadratic, N11, n_samples=400, method=m, seed=2).value.mean for m in methods]
    assert all(torch.equal(v, values[0]) for v in values)


def test_antithetic_pairs_are_one_unit():
    """f = z: the pairs' mean is exact, so no error is left; and for f = z^2 pairs change nothing but the count of units."""
    exact = expectation_gradient(
        Normal, lambda z, p: z + 0 * p["scale"], N11, n_samples=1000, method="pathwise", noise=Antithetic(Philox(1))
    )
    assert exact.value.standard_error < 1e-15
    assert exact.gradient["scale"].standard_error < 1e-15
    x = vector(1.0, 2.0, 3.0)[:, None]
    items = expectation_gradient(
        lambda x, p: Normal(p["m"] * x[:, 0], torch.ones(len(x), dtype=F64)),
        lambda z, x, p: z,
        {"m": scalar(1.0)},
        x=x,
        n_samples=100,
        method="pathwise",
        noise=Antithetic(Philox(1)),
    )
    assert items.value.mean.item() == pytest.approx(2.0, rel=1e-14)


def test_given_noise_is_used():
    z = torch.randn(1, 500, 1, dtype=F64, generator=torch.Generator().manual_seed(1))
    result = expectation_gradient(Normal, quadratic, N11, n_samples=500, method="pathwise", noise=GivenNoise(z))
    assert result.gradient["scale"].mean.item() == pytest.approx((2 * (1 + z) * z).mean().item(), rel=1e-13)


def test_float32_agrees_to_rounding():
    low = {k: v.float() for k, v in N11.items()}
    for method in ("pathwise", "score_function", "measure_valued"):
        a = expectation_gradient(Normal, quadratic, low, n_samples=20_000, method=method, seed=1)
        b = expectation_gradient(Normal, quadratic, N11, n_samples=20_000, method=method, seed=1)
        assert a.gradient["mean"].mean.item() == pytest.approx(b.gradient["mean"].mean.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "f", "params", "method"),
    [
        (Normal, quadratic, N11, "pathwise"),
        (Normal, quadratic, N11, "measure_valued"),
        (Bernoulli, squared_distance, {"logits": vector(0.2, -0.5)}, "rloo"),
        (Bernoulli, squared_distance, {"logits": vector(0.2, -0.5)}, "enumerate"),
        (Bernoulli, squared_distance, {"probs": vector(0.2, 0.5)}, "arm"),
    ],
)
def test_the_surrogate_has_the_estimators_gradient(model, f, params, method):
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    loss = surrogate(model, f, leaves, n_samples=64, method=method, seed=6)
    loss.backward()
    result = expectation_gradient(model, f, params, n_samples=64, method=method, seed=6)
    assert loss.item() == pytest.approx(result.value.mean.item(), rel=1e-12)
    for k, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, result.gradient[k].mean, rtol=1e-12, atol=1e-15)


# The default


def test_the_default_is_the_unbiased_method_that_varies_least():
    assert expectation_gradient(Normal, quadratic, N11, n_samples=4000).method == "measure_valued"  # 9.1 against 16
    assert (
        expectation_gradient(Bernoulli, squared_distance, {"logits": vector(0.1, 0.4)}, n_samples=100).method
        == "enumerate"
    )
    many = expectation_gradient(Bernoulli, squared_distance, {"logits": torch.zeros(20, dtype=F64)}, n_samples=400)
    assert many.method in ("measure_valued", "arm", "score_function (baseline=optimal)")
    gamma = expectation_gradient(
        td.Gamma, quadratic, {"concentration": scalar(2.0), "rate": scalar(1.0)}, n_samples=1000
    )
    assert gamma.method == "pathwise"
    # sharp cosine: pathwise k^2 / 2 = 50, score function 1/2 and 1
    steep = expectation_gradient(
        lambda p: MultivariateNormal(p["mean"][None], p["scale"][None, None]), lambda z, p: torch.cos(10 * z[:, 0]), N11, n_samples=2000
    )  # fmt: skip
    assert steep.method.startswith("score_function")
    assert steep.tried["pathwise"] > 10 * steep.tried["score_function"]


def test_the_default_knows_a_jump():
    """Pathwise has no variance at all here, and is wrong: E 1{z > 0} moves with the mean by the density at 0."""
    result = expectation_gradient(Normal, lambda z, p: (z > 0).to(z.dtype) + 0 * z, N11, n_samples=100_000, seed=1)
    assert result.tried["pathwise"] == "f jumps along z"
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    assert abs(result.gradient["mean"].mean - density) < 4.5 * result.gradient["mean"].standard_error


def test_the_default_leaves_out_what_autograd_does_not_see():
    """A part of f without a graph would lower the variance of the pathwise gradient, and its mean."""

    def f(z, p):
        with torch.no_grad():
            hidden = torch.sin(3 * z)
        return hidden - 0.1 * z**2

    result = expectation_gradient(Normal, f, N11, n_samples=40_000, seed=1)
    assert result.tried["pathwise"] == "f is cut off from z in part"
    exact = normal_variances(lambda z: torch.sin(3 * z) - 0.1 * z**2, 1.0, 1.0)["mean"].gradient
    assert abs(result.gradient["mean"].mean - exact) < 4.5 * result.gradient["mean"].standard_error
    constant = expectation_gradient(Normal, lambda z, p: torch.ones_like(z), N11, n_samples=400, check=False)
    assert constant.gradient["mean"].mean.abs() < 5 * constant.gradient["mean"].standard_error + 1e-12


@pytest.mark.parametrize("form", ["numpy", "branches", "masks"])
def test_black_boxes_by_the_score_function(form):
    """Functions that vmap cannot take: f = sin z on z > 0, else z; against the same written for vmap."""

    def f(z, p):
        if form == "numpy":
            x = z.detach().numpy()
            return torch.as_tensor(np.where(x > 0, np.sin(x), x))
        if form == "branches":
            return torch.stack([torch.sin(v) if float(v) > 0 else v for v in z.detach()])
        out = z.clone()
        out[z > 0] = torch.sin(z[z > 0])
        return out

    run = partial(expectation_gradient, Normal, params=N11, n_samples=1600, method="rloo", group=4, seed=2)
    ours, theirs = run(f=f), run(f=lambda z, p: torch.where(z > 0, torch.sin(z), z))
    assert ours.gradient["mean"].mean.item() == pytest.approx(theirs.gradient["mean"].mean.item(), rel=1e-12)


def test_torchs_multivariate_normal_by_the_default():
    """E |z|^2 = |loc|^2 + trace: a covariance cannot be moved entry by entry, and it does not matter."""
    params = {"loc": vector(0.0, 1.0), "covariance_matrix": torch.tensor([[1.0, 0.5], [0.5, 4.0]], dtype=F64)}
    result = expectation_gradient(td.MultivariateNormal, lambda z, p: (z**2).sum(1), params, n_samples=20_000, seed=1)
    z = (result.gradient["loc"].mean - 2 * params["loc"]) / result.gradient["loc"].standard_error
    assert (z.abs() < 4.5).all()
    trace = result.gradient["covariance_matrix"]
    assert ((trace.mean - torch.eye(2)).abs() < 4.5 * trace.standard_error + 1e-12).all()


def test_probabilities_at_the_edge():
    """Enumeration is right at 0 and 1, where no draw tells: derivative f(1) - f(0), and f_i - E f."""
    coin_at_one = expectation_gradient(Bernoulli, lambda z, p: 2 * z, {"probs": scalar(1.0)}, n_samples=100)
    assert coin_at_one.gradient["probs"].mean == 2.0
    result = expectation_gradient(
        Categorical, lambda z, p: 2 * z[:, 0] + z[:, 1], {"probs": vector(0.0, 0.5, 0.5)}, n_samples=100
    )
    torch.testing.assert_close(result.gradient["probs"].mean, vector(1.5, 0.5, -0.5), rtol=1e-14, atol=0)


def test_masked_choices():
    """A logit of minus infinity is never drawn, and the others are a choice among themselves."""
    mask = vector(0.0, -math.inf, 0.0)
    f = lambda z, p: z @ vector(1.0, 50.0, 3.0)  # noqa: E731
    params = {"logits": vector(0.2, 0.7, -0.4)}
    for method in ("enumerate", "rloo", "gumbel_softmax"):
        result = expectation_gradient(
            lambda p: Categorical(logits=p["logits"] + mask), f, params, n_samples=20_000, method=method, seed=1
        )
        p = torch.softmax(vector(0.2, -0.4), 0)
        q = float(p[0] * p[1])
        wanted = vector(-2 * q, 0.0, 2 * q)
        if method == "gumbel_softmax":
            assert result.gradient["logits"].mean[1] == 0
        else:
            gap = (result.gradient["logits"].mean - wanted).abs()
            assert (gap < 4.5 * result.gradient["logits"].standard_error + 1e-14).all()


def test_comparison_of_what_cannot_be_grouped_or_shown():
    found = compare(Normal, quadratic, N11, n_samples=1009)
    assert "`n_samples` = 1009 cannot be cut" in found.refused["rloo"]
    wide = {"mean": torch.zeros(10, dtype=F64), "scale": torch.ones(10, dtype=F64)}
    shown = repr(compare(Normal, lambda z, p: z.square().sum(1), wide, n_samples=400, methods=["pathwise"]))
    assert "... 4 more" in shown
    some = compare(Bernoulli, squared_distance, {"logits": vector(0.1)}, n_samples=400, methods=["gumbel_softmax"])
    assert some.exact is not None  # found by enumeration all the same
    hidden = compare(
        Normal, lambda z, p: torch.where(z > p["a"], z * p["a"], z), {**N11, "a": scalar(0.5)}, n_samples=400
    )
    assert set(hidden.refused.values()) == {"`f` jumps as a function of the parameters themselves, at a fixed draw"}


# The two terms, by quadrature


def test_decomposition_of_a_normal_expectation():
    """f = a z^2 + m: int f grad q = (2 a m, 2 a s, 0), E grad f = (1, 0, m^2 + s^2). Quadrature to 1e-8, Monte Carlo to 4.5 se."""
    params = {"mean": scalar(0.8), "scale": scalar(1.3), "a": scalar(2.0)}
    found = decompose(Normal, lambda z, p: p["a"] * z**2 + p["mean"], params, n_samples=50_000, seed=1)
    assert found.error < 1e-7
    wanted = {"mean": (3.2, 1.0), "scale": (5.2, 0.0), "a": (0.0, 0.64 + 1.69)}
    for name, (density, explicit) in wanted.items():
        term = found.terms[name]
        assert float(term.density) == pytest.approx(density, abs=1e-8)
        assert float(term.explicit) == pytest.approx(explicit, abs=1e-8)
        for estimates, truth in (
            (term.density_by, density),
            (term.explicit_by, explicit),
            (term.total_by, density + explicit),
        ):
            assert set(estimates) == {"pathwise", "score_function"}
            for e in estimates.values():
                assert abs(e.mean - truth) <= 4.5 * e.standard_error + 1e-15
    assert found.table().row_count == 9


@pytest.mark.parametrize(
    ("model", "params", "exact"),
    [
        (
            LogNormal,
            {"mean": scalar(0.2), "scale": scalar(0.5)},
            {"mean": 2 * math.exp(0.9), "scale": 2 * math.exp(0.9)},
        ),
        (
            td.Gamma,
            {"concentration": scalar(2.0), "rate": scalar(1.5)},
            {"concentration": 5 / 2.25, "rate": -12 / 1.5**3},
        ),
        (td.Beta, {"concentration1": scalar(2.0), "concentration0": scalar(2.0)}, None),
    ],
)
def test_decomposition_on_other_supports(model, params, exact):
    """E z^2 of laws on half-lines and intervals; the last against autograd of a (a + 1) / (s (s + 1))."""
    found = decompose(model, quadratic, params, n_samples=2000, seed=1)
    if exact is None:
        a, b = (v.clone().requires_grad_() for v in params.values())
        g = torch.autograd.grad(a * (a + 1) / ((a + b) * (a + b + 1)), (a, b))
        exact = dict(zip(params, map(float, g), strict=True))
    for name, value in exact.items():
        assert float(found.terms[name].density) == pytest.approx(value, abs=2e-7)


def test_decomposition_in_two_dimensions_and_far_from_zero():
    """E z0 z1 = m0 m1 + L00 L10, a law at 1000 with spread 1."""
    params = {"mean": vector(1000.0, -3.0), "scale_tril": torch.tensor([[1.0, 0.0], [0.5, 0.7]], dtype=F64)}
    found = decompose(MultivariateNormal, lambda z, p: z[:, 0] * z[:, 1], params, n_samples=2000)
    torch.testing.assert_close(found.terms["mean"].density, vector(-3.0, 1000.0), rtol=1e-6, atol=0)
    wanted = torch.tensor([[0.5, 0.0], [1.0, 0.0]], dtype=F64)
    torch.testing.assert_close(found.terms["scale_tril"].density, wanted, rtol=0, atol=1e-5)


def test_decomposition_of_a_jump_has_no_pathwise_column():
    found = decompose(Normal, lambda z, p: (z > 0.5).to(z.dtype) * z, N11, n_samples=2000)
    assert set(found.refused) == {"pathwise"}
    assert set(found.terms["mean"].total_by) == {"score_function"}
    # d/dm E[z 1{z > c}] = P(z > c) + c q(c)
    q = math.exp(-0.125) / math.sqrt(2 * math.pi)
    assert float(found.terms["mean"].density) == pytest.approx(0.5 * math.erfc(-0.5 / math.sqrt(2)) + 0.5 * q, abs=1e-7)


# The study


def test_crossings_of_pathwise_and_score_function():
    """cos(kz): near k = 1 / s, where both are known to five digits; found from samples within 3 %."""
    assert crossing("cos", "mean", 1.0, 1.0, 0.5, 2.0) == pytest.approx(1.06380, abs=2e-5)
    assert crossing("cos", "scale", 1.0, 1.0, 0.9, 2.0) == pytest.approx(1.29735, abs=2e-5)
    assert crossing("exp", "mean", 1.0, 1.0, 0.5, 2.0) == pytest.approx(0.86995, abs=2e-5)
    assert crossing("cos", "mean", 2.0, 2.0, 0.25, 1.0) == pytest.approx(1.06380 / 2, abs=1e-5)  # k s is what counts
    study = variance_study(n_samples=40_000, costs=("cos",), seed=1)
    for parameter, exact in (("mean", 1.06380), ("scale", 1.29735)):
        found, by_root = study.crossings["cos", parameter]
        assert by_root == pytest.approx(exact, abs=2e-5)
        assert found == pytest.approx(exact, rel=0.03)
    for p in (
        study.points
    ):  # kurtosis up to 27 and twice that for pairs: 3.5 % sd at 4e4 draws, 10 ... 2 sd; 30 of them the worst
        for method, v in p.variance.items():
            assert v == pytest.approx(p.exact.variance[method], rel=0.15, abs=1e-12), (p.k, p.parameter, method)
    assert len(study.rows()) == 13 * 2 * 5
