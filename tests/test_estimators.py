"""Gradient estimators without time, against exact means and variances.

The authorities are closed forms (moments of normals, enumeration of coins), quadrature, and the SDE part on the same noise.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributions as td
from problems import F64, OU, scalar

from sdesens import SDE, Antithetic, GivenNoise, Philox, Problem, sensitivity
from sdesens.estimators import (
    Bernoulli,
    Categorical,
    LogNormal,
    MultivariateNormal,
    Normal,
    Reparameterised,
    Sampler,
    compare,
    decompose,
    expectation_gradient,
    sample_tangents,
    surrogate,
    variance_study,
)
from sdesens.estimators.exact import normal_variances
from sdesens.estimators.methods import choose
from sdesens.estimators.model import ask, detached
from sdesens.estimators.run import Task, answer, noise_of
from sdesens.estimators.study import crossing

N11 = {"mean": scalar(1.0), "scale": scalar(1.0)}


def vector(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


def quadratic(z, p):
    return z.square()


def squared_distance(z, p):
    return (z - 0.45).square().reshape(len(z), -1).sum(1)


def variance_of_draw(result, name):
    e = result.gradient[name]
    return (e.standard_error.square() * e.n).item()


# How a draw moves


def test_derivatives_of_a_gaussian_draw_are_one_and_eps():
    """dz/dmu = 1 and dz/dsigma = eps: equal, not close."""
    draws = sample_tangents(Normal, {"mean": scalar(0.3), "scale": scalar(1.7)}, n_samples=1000, seed=2)
    assert (draws.tangents["mean"] == 1).all()
    assert torch.equal(draws.tangents["scale"], draws.eps)
    assert torch.equal(draws.z, 0.3 + 1.7 * draws.eps)


def test_derivatives_of_vector_draws():
    mean, factor = vector(0.1, -0.4), torch.tensor([[1.0, 0.0], [0.5, 0.8]], dtype=F64)
    draws = sample_tangents(MultivariateNormal, {"mean": mean, "scale_tril": factor}, n_samples=50, seed=2)
    assert torch.equal(draws.tangents["mean"], torch.eye(2, dtype=F64).expand(50, 2, 2))
    # dz_i / dL_jk = 1{i = j} eps_k in the lower triangle, 0 above
    wanted = torch.einsum("ij,bk->bijk", torch.eye(2, dtype=F64), draws.eps) * torch.ones(2, 2, dtype=F64).tril()
    assert torch.equal(draws.tangents["scale_tril"], wanted)
    lognormal = sample_tangents(LogNormal, N11, n_samples=50, seed=2)
    torch.testing.assert_close(lognormal.tangents["mean"], lognormal.z, rtol=1e-15, atol=0)


# Exact variances. At 4e6 draws a sampled variance has a relative sd of ((kurtosis - 1) / 4e6)^(1/2). Kurtosis by quadrature: at most
# 357 (the scale's score at the optimal constant, f = z^2), 0.95 %, so that 3 % is 3.2 sd there and more than 3.8 sd elsewhere.

DRAWS = 4_000_000


def quadratic_closed_form(m, s):
    """Variances of one draw for f = (z - k)^2, m = mean - k, by method, for the mean and the scale."""
    return {
        ("pathwise", None): (4 * s**2, 4 * m**2 + 8 * s**2),
        ("score_function", "none"): (m**4 / s**2 + 14 * m**2 + 15 * s**2, 2 * m**4 / s**2 + 60 * m**2 + 74 * s**2),
        ("score_function", m**2 + s**2): (8 * m**2 + 10 * s**2, 40 * m**2 + 56 * s**2),
        ("score_function", "optimal"): (8 * m**2 + 6 * s**2, 40 * m**2 + 24 * s**2),
        ("rloo", None): (
            16 * m**2 + 12 * s**2,
            48 * m**2 + 64 * s**2,
        ),  # K = 2: twice the variance of a pair's estimate
        ("measure_valued", None): (4 * m**2 * (4 - math.pi) / math.pi, 4 * m**2 + 4 * s**2),
    }


def check_variances(f, params, method, options, wanted):
    result = expectation_gradient(Normal, f, params, n_samples=DRAWS, method=method, seed=3, check=False, **options)
    for name, variance in zip(params, wanted, strict=True):
        assert variance_of_draw(result, name) == pytest.approx(variance, rel=0.03), name
    return result


@pytest.mark.parametrize("key", list(quadratic_closed_form(1.0, 1.0)), ids=str)
def test_variances_for_a_quadratic(key):
    method, baseline = key
    options = {"group": 2} if method == "rloo" else {} if baseline is None else {"baseline": baseline}
    result = check_variances(quadratic, N11, method, options, quadratic_closed_form(1.0, 1.0)[key])
    for name in N11:  # both gradients are 2; |z| < 5: false alarm 6e-7 each
        assert abs(result.gradient[name].mean - 2) < 5 * result.gradient[name].standard_error


def test_the_table_of_quadratic_variances_holds_the_published_numbers():
    """f = z^2, N(1, 1): 4 and 12; 30 and 136; 18 and 96; 14 and 64; K = 2 pairs 14 and 56; 1.09 and 8."""
    found = list(quadratic_closed_form(1.0, 1.0).values())
    flat = [x for pair in found for x in pair]
    assert flat == pytest.approx([4, 12, 30, 136, 18, 96, 14, 64, 28, 112, 1.0930, 8], rel=1e-4)


def cos_closed_form(k, mu, s):
    """(gradients, pathwise variances, score variances) for cos(kz)."""
    a, c2 = k**2 * s**2, math.cos(2 * k * mu)
    E1, E2 = math.exp(-a), math.exp(-2 * a)
    S, C = math.sin(k * mu) ** 2, math.cos(k * mu) ** 2
    gradient = -k * math.exp(-a / 2) * math.sin(k * mu), -(k**2) * s * math.exp(-a / 2) * math.cos(k * mu)
    path = (
        k**2 * ((1 - c2 * E2) / 2 - E1 * S),
        0.5 * k**2 * (1 - c2 * (1 - 4 * a) * E2) - k**4 * s**2 * E1 * C,
    )
    score = (
        (1 + c2 * (1 - 4 * a) * E2) / (2 * s**2) - k**2 * E1 * S,
        (2 + c2 * (2 - 16 * a + 16 * a**2) * E2) / (2 * s**2) - k**4 * s**2 * E1 * C,
    )
    return gradient, path, score


def exp_closed_form(k, mu, s):
    """The same for exp(-k z^2)."""

    def G(c):
        return (1 + 2 * c * s**2) ** -0.5 * math.exp(-c * mu**2 / (1 + 2 * c * s**2))

    q = 1 + 4 * k * s**2
    m, v = mu / q, s**2 / q
    d, w = m - mu, 1 + 2 * k * s**2
    g = -2 * k * mu / w * G(k), G(k) * (-2 * k * s / w + 4 * k**2 * s * mu**2 / w**2)
    path = (
        4 * k**2 * G(2 * k) * (m**2 + v) - g[0] ** 2,
        4 * k**2 * G(2 * k) * (m**2 * d**2 + v * (m**2 + d**2 + 4 * m * d) + 3 * v**2) / s**2 - g[1] ** 2,
    )
    score = (
        G(2 * k) * (d**2 + v) / s**4 - g[0] ** 2,
        G(2 * k) * ((d**4 + 6 * d**2 * v + 3 * v**2) / s**4 - 2 * (d**2 + v) / s**2 + 1) / s**2 - g[1] ** 2,
    )
    return g, path, score


COSTS = {
    "cos": (lambda z, k: torch.cos(k * z), cos_closed_form),
    "exp": (lambda z, k: torch.exp(-k * z * z), exp_closed_form),
}


@pytest.mark.parametrize("method", ["pathwise", "score_function"])
@pytest.mark.parametrize(("cost", "k"), [("cos", 0.7), ("cos", 2.0), ("exp", 0.5), ("exp", 2.0)])
def test_variances_for_cos_and_exp(cost, k, method):
    f, closed = COSTS[cost]
    _, path, score = closed(k, 1.0, 1.0)
    check_variances(lambda z, p: f(z, k), N11, method, {}, path if method == "pathwise" else score)


@pytest.mark.parametrize(("mean", "scale"), [(1.0, 1.0), (0.7, 1.3)])
def test_quadrature_reproduces_every_closed_form(mean, scale):
    """Two independent ways to the exact numbers, to rounding of the quadrature."""
    for k in (-1.0, 0.5):
        found = normal_variances(lambda z, k=k: (z - k) ** 2, mean, scale)
        table = quadratic_closed_form(mean - k, scale)
        names = {("score_function", "optimal"): "score_function (baseline=optimal)", ("rloo", None): "rloo (group=2)"}
        for key, wanted in table.items():
            name = names.get(key, key[0])
            if key[1] in (None, "none", "optimal"):
                assert [found[p].variance[name] for p in found] == pytest.approx(wanted, rel=1e-10)
    for f, closed in COSTS.values():
        for k in (0.4, 1.3, 3.0):
            gradient, path, score = closed(k, mean, scale)
            found = normal_variances(lambda z, f=f, k=k: f(z, k), mean, scale)
            assert [found[p].gradient for p in found] == pytest.approx(gradient, rel=1e-10, abs=1e-12)
            assert [found[p].variance["pathwise"] for p in found] == pytest.approx(path, rel=1e-9)
            assert [found[p].variance["score_function"] for p in found] == pytest.approx(score, rel=1e-9)


# Coins


def coin(z, p):
    """f(0) = 1.5, f(1) = 4."""
    return 1.5 + 2.5 * z


def test_variances_for_a_coin():
    """In the logit, q = p (1 - p), D = f(1) - f(0). The kurtosis is below 10 here: 3 % is more than 20 sd at 4e6 draws."""
    logit, D = 0.6, 2.5
    p = 1 / (1 + math.exp(-logit))
    q = p * (1 - p)
    mu4 = q * (1 - 3 * q)

    def rloo_variance(K):
        return K * D**2 * (mu4 / K - q**2 * (K - 3) / (K * (K - 1)))  # a draw: K times that of the estimate

    cases = [
        ("score_function", {}, q * ((1 - p) * 4.0 + p * 1.5) ** 2),
        ("rloo", {"group": 2}, rloo_variance(2)),
        ("rloo", {"group": 5}, rloo_variance(5)),
        ("arm", {}, D**2 * (2 / 3 * (1 / 8 - abs(p - 0.5) ** 3) - q**2)),
    ]
    for method, options, wanted in cases:
        result = expectation_gradient(
            Bernoulli, coin, {"logits": scalar(logit)}, n_samples=DRAWS, method=method, seed=1, check=False, **options
        )
        estimate = result.gradient["logits"]
        assert variance_of_draw(result, "logits") == pytest.approx(wanted, rel=0.03), method
        assert abs(estimate.mean - q * D) < 5 * estimate.standard_error
    assert rloo_variance(2) == pytest.approx(D**2 * q * (1 - 2 * q))
    for method in ("measure_valued", "enumerate"):
        result = expectation_gradient(Bernoulli, coin, {"logits": scalar(logit)}, n_samples=1000, method=method)
        assert result.gradient["logits"].mean.item() == pytest.approx(q * D, rel=1e-14)
        assert result.gradient["logits"].standard_error < 1e-15


def test_the_best_constant_leaves_a_coin_without_variance():
    """c* = (1 - p) f(1) + p f(0): exactly no variance; the pilot's constant is that number to rounding."""
    result = expectation_gradient(
        Bernoulli, coin, {"probs": scalar(0.3)}, n_samples=1000, method="score_function", baseline="optimal"
    )
    assert result.gradient["probs"].mean.item() == pytest.approx(2.5, rel=1e-12)
    assert result.gradient["probs"].standard_error < 1e-12


# Gumbel-Softmax: biased by known amounts


def binary(f, temperature, *, logit=0.0, n=400_000, **options):
    return expectation_gradient(
        Bernoulli,
        f,
        {"logits": scalar(logit)},
        n_samples=n,
        method="gumbel_softmax",
        seed=4,
        temperature=temperature,
        check=False,
        **options,
    ).gradient["logits"]


def test_gumbel_softmax_has_its_exact_bias_and_variance_at_temperature_one():
    """p = 1/2, slope D: gradient D / 6 instead of D / 4, variance D^2 / 180."""
    found = binary(coin, 1.0)
    assert abs(found.mean - 2.5 / 6) < 5 * found.standard_error  # false alarm 6e-7
    assert abs(found.mean - 2.5 / 4) > 100 * found.standard_error
    # the kurtosis of 6 (y (1 - y)) is below 3: the variance of 4e5 draws is known to 0.3 %
    assert found.standard_error.square().item() * found.n == pytest.approx(2.5**2 / 180, rel=0.02)


def test_bias_of_gumbel_softmax_falls_with_the_temperature_as_its_variance_grows():
    """Bias about pi^2 tau^2 q (1 - 6 q) D / 6, variance about q D^2 / (6 tau)."""
    found = {t: binary(coin, t, n=2_000_000) for t in (1.0, 0.5, 0.25, 0.1)}
    bias = {t: float(e.mean) - 2.5 / 4 for t, e in found.items()}
    assert all(abs(bias[a]) > 2 * abs(bias[b]) for a, b in ((1.0, 0.5), (0.5, 0.25)))
    assert abs(bias[0.1] + 0.00201 * 2.5) < 5 * found[0.1].standard_error
    variance = [float(e.standard_error**2) * e.n for e in found.values()]
    assert variance == sorted(variance)
    second_moment = variance[-1] + float(found[0.1].mean) ** 2
    assert second_moment == pytest.approx(0.25 * 2.5**2 / 0.6, rel=0.02)  # leading order in tau


def test_straight_through_has_another_limit():
    """b^3 at p = 1/2: q (f'(0) + f'(1)) / 2 = .375 instead of .25; (b - .45)^2: .0167 at tau = 1, .0248 at .1, true .025."""
    cubic = binary(lambda z, p: z**3, 0.05, straight_through=True)
    assert abs(cubic.mean - 0.375) < 5 * cubic.standard_error + 0.002  # of order tau^2
    for tau, wanted in ((1.0, 0.0167), (0.1, 0.0248)):
        found = binary(squared_distance, tau, straight_through=True)
        assert abs(found.mean - wanted) < 5 * found.standard_error + 5e-5  # printed digits
    by_name = expectation_gradient(
        Bernoulli, squared_distance, {"logits": scalar(0.0)}, n_samples=400_000, method="straight_through", temperature=1.0, seed=4
    )  # fmt: skip
    assert by_name.gradient["logits"].mean == binary(squared_distance, 1.0, straight_through=True).mean


def test_biased_methods_say_so():
    params = {"logits": vector(0.1, 0.5, -0.3)}
    for method, biased in (("gumbel_softmax", True), ("straight_through", True), ("rloo", False), ("enumerate", False)):
        result = expectation_gradient(
            Categorical, lambda z, p: z[:, 0] ** 2 + z[:, 1], params, n_samples=400, method=method
        )
        assert result.biased is biased
        assert ("BIASED" in repr(result)) is biased
        assert result.to_dict()["biased"] is biased
    theirs = expectation_gradient(
        td.OneHotCategoricalStraightThrough, lambda z, p: z[:, 0] ** 2, params, n_samples=400, method="pathwise"
    )
    assert td.OneHotCategoricalStraightThrough.has_rsample  # the claim
    assert theirs.biased
    auto = expectation_gradient(td.OneHotCategoricalStraightThrough, lambda z, p: z[:, 0], params, n_samples=400)
    assert not auto.biased


# Do intervals tell the truth? 400 seeds, 95 %: binomial sd 1.09 %, so 92 ... 98 % has a false-alarm rate of 0.6 % a case.

SEEDS = 400


def quartic_root(z, p):
    return torch.exp(-0.5 * z.square()) + 0.3 * z


def covers(model, f, params, exact, *, n_samples, method, **options):
    hits = 0
    for seed in range(SEEDS):
        e = expectation_gradient(
            model, f, params, n_samples=n_samples, method=method, seed=seed, check=False, **options
        ).gradient
        low, high = e[exact[0]].confidence_interval(0.95)
        hits += bool((low <= exact[1]).all() and (exact[1] <= high).all())
    return hits / SEEDS


EXACT_NORMAL = normal_variances(lambda z: torch.exp(-0.5 * z.square()) + 0.3 * z, 1.0, 1.0)
NORMAL_METHODS = [
    ("pathwise", {}),
    ("score_function", {}),
    ("score_function", {"baseline": "leave_one_out", "group": 4}),
    ("score_function", {"baseline": "optimal"}),
    ("score_function", {"baseline": 0.7}),
    ("measure_valued", {}),
]


@pytest.mark.parametrize(("method", "options"), NORMAL_METHODS, ids=str)
@pytest.mark.parametrize("name", ["mean", "scale"])
def test_intervals_of_a_normal_law_cover(method, options, name):
    exact = name, EXACT_NORMAL[name].gradient
    found = covers(Normal, quartic_root, N11, exact, n_samples=800, method=method, wrt=name, **options)
    assert 0.92 <= found <= 0.98


COINS = {"logits": scalar(0.6)}
COIN_P = 1 / (1 + math.exp(-0.6))


@pytest.mark.parametrize(("method", "options"), [("score_function", {}), ("rloo", {}), ("arm", {}), ("score_function", {"baseline": "leave_one_out", "group": 2})], ids=str)  # fmt: skip
def test_intervals_of_a_coin_cover(method, options):
    exact = "logits", 2.5 * COIN_P * (1 - COIN_P)
    assert 0.92 <= covers(Bernoulli, coin, COINS, exact, n_samples=800, method=method, **options) <= 0.98


@pytest.mark.parametrize("method", ["pathwise", "score_function"])
def test_intervals_of_a_gamma_law_cover(method):
    """E z^2 = a (a + 1) / b^2, derivative in b -2 a (a + 1) / b^3; a law that is looped over."""
    params = {"concentration": scalar(5.0), "rate": scalar(1.5)}
    f = partial(lambda z, p: torch.sqrt(z))
    exact = (
        "rate",
        -0.5 * math.gamma(5.5) / math.gamma(5.0) * 1.5**-1.5,
    )  # of E z^(1/2) = Gamma(a + 1/2) / Gamma(a) b^(-1/2)
    assert 0.92 <= covers(td.Gamma, f, params, exact, n_samples=60, method=method, wrt="rate") <= 0.98


@pytest.mark.parametrize("method", ["pathwise", "score_function", "rloo"])
def test_intervals_cover_where_items_are_strata(method):
    """Mean over four very different items of E z^2 = (w x)^2 + s^2: derivative in w 2 w mean x^2, known from few draws an item."""
    x = vector(0.0, 1.0, 2.0, 5.0)[:, None]

    def model(x, p):
        return Normal(p["w"] * x[:, 0], torch.ones(len(x), dtype=F64))

    exact = "w", 2 * 0.5 * 7.5
    found = covers(model, lambda z, x, p: z**2, {"w": scalar(0.5)}, exact, n_samples=100, method=method, x=x)
    assert 0.92 <= found <= 0.98


def test_gumbel_softmax_does_not_cover():
    """The control: the same test must fail a biased estimator."""
    found = covers(Bernoulli, coin, COINS, ("logits", 2.5 * COIN_P * (1 - COIN_P)), n_samples=800, method="gumbel_softmax", temperature=1.0)  # fmt: skip
    assert found < 0.5


# The Euler-Maruyama chain is the same object with more steps


def drift(t, y, p):
    return -p["k"] * y


def diffusion(t, y, p):
    return p["s"] * torch.ones_like(y)


def chain(n_steps):
    sde = SDE(drift, diffusion, {"k": scalar(0.5), "s": scalar(0.3)})
    return Problem(sde, lambda ys, p: ys[-1, :, 0] ** 2 * p["k"] + ys[0, :, 0], vector(1.0), (0.0, 1.0), n_steps)


ALL = ("k", "s", "y0", "t1")


@pytest.mark.parametrize("n_steps", [1, 6])
def test_pathwise_through_the_chain_is_the_sde_parts_own(n_steps):
    """The same noise, draw by draw: values, gradients and standard errors, to rounding."""
    ours = expectation_gradient(chain(n_steps), n_samples=4000, method="pathwise", wrt=ALL, seed=4)
    theirs = sensitivity(chain(n_steps), n_paths=4000, method="forward", wrt=ALL, seed=4)
    pathwise = sensitivity(chain(n_steps), n_paths=4000, method="pathwise", wrt=ALL, seed=4)
    assert ours.value.mean.item() == pytest.approx(theirs.value.mean.item(), rel=1e-12)
    for k in ALL:
        torch.testing.assert_close(ours.gradient[k].mean, theirs.gradient[k].mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(ours.gradient[k].mean, pathwise.gradient[k].mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(
            ours.gradient[k].standard_error, theirs.gradient[k].standard_error, rtol=1e-10, atol=0
        )


@pytest.mark.parametrize("method", ["pathwise", "score_function", "rloo"])
def test_one_step_is_a_gaussian_draw(method):
    """X_1 = N(y0 (1 - k), s): law and chain give the same numbers from the same noise."""
    params = {"k": scalar(0.5), "s": scalar(0.3), "y": scalar(1.0)}
    gaussian = expectation_gradient(
        lambda p: Normal(p["y"] - p["k"] * p["y"], p["s"]), lambda z, p: z**2 * p["k"] + p["y"], params, n_samples=4000, method=method, seed=4
    )  # fmt: skip
    path = expectation_gradient(chain(1), n_samples=4000, method=method, wrt=("k", "s", "y0"), seed=4)
    for a, b in (("k", "k"), ("s", "s"), ("y", "y0")):
        one, other = gaussian.gradient[a], path.gradient[b]
        assert one.mean.item() == pytest.approx(other.mean.item(), rel=1e-12)
        assert one.standard_error.item() == pytest.approx(other.standard_error.item(), rel=1e-10)


def test_score_of_a_chain_has_its_exact_variance():
    """Ornstein-Uhlenbeck, F = X_N, a = E X_N, v = Var X_N, p = 1 - kappa h; per path:

    m (a^2 + v) kappa^2 T / sigma^2 + (1 - p^N)^2;   y0 (a^2 + v) p^2 / (sigma^2 h) + p^(2N);   sigma (a^2 + v) 2 N / sigma^2 + 8 v / sigma^2
    """
    model = OU()
    h, N = model.t1 / model.n_steps, model.n_steps
    p = 1 - model.kappa * h
    a, v = model.exact(1)["value"]
    second = (a * a + v) / model.sigma**2
    wanted = {
        "m": second * model.kappa**2 * model.t1 + (1 - p**N) ** 2,
        "y0": second * p**2 / h + p ** (2 * N),
        "sigma": second * 2 * N + 8 * v / model.sigma**2,
    }
    result = expectation_gradient(
        model.problem(1), n_samples=200_000, method="score_function", wrt=tuple(wanted), seed=1, check=False
    )
    means = {"m": 1 - p**N, "y0": p**N, "sigma": 0.0}
    for name, variance in wanted.items():
        e = result.gradient[name]
        # kurtosis of a product of two normals is at most 9, and about 60 for the chi-squared score: 4 % is more than 2.3 sd of the worst
        assert (e.standard_error**2 * e.n).item() == pytest.approx(variance, rel=0.04), name
        assert abs(e.mean - means[name]).item() < 4.5 * e.standard_error.item()  # three of them: false alarm 2e-5


def test_score_of_a_chain_with_correlated_noise():
    """General noise, two components: pathwise and score function agree on independent seeds; false alarm 6e-5 for each of 6 numbers."""
    L = torch.tensor([[0.3, 0.0], [0.1, 0.2]], dtype=F64)
    sde = SDE(
        lambda t, y, p: torch.sin(y) @ p["A"].mT,
        lambda t, y, p: p["c"] * L.expand(len(y), 2, 2),
        {"A": torch.tensor([[-0.5, 0.2], [0.1, -0.3]], dtype=F64), "c": scalar(1.2)},
        noise_type="general",
    )  # fmt: skip
    problem = Problem(sde, lambda ys, p: ys[-1].square().sum(1), vector(0.5, -0.2), (0.0, 1.0), 4)
    a = expectation_gradient(problem, n_samples=20_000, method="pathwise", seed=1)
    b = expectation_gradient(problem, n_samples=200_000, method="score_function", seed=2)
    for k in ("A", "c"):
        z = (a.gradient[k].mean - b.gradient[k].mean) / (a.gradient[k].standard_error.square() + b.gradient[k].standard_error.square()).sqrt()  # fmt: skip
        assert (z.abs() < 4).all(), (k, z)


# Laws of torch.distributions

TORCH = {
    "gamma": (td.Gamma, {"concentration": 2.0, "rate": 1.5}, lambda p: p["concentration"] * (p["concentration"] + 1) / p["rate"] ** 2),
    "beta": (
        td.Beta,
        {"concentration1": 2.0, "concentration0": 1.5},
        lambda p: p["concentration1"] * (p["concentration1"] + 1) / ((p["concentration1"] + p["concentration0"]) * (p["concentration1"] + p["concentration0"] + 1)),
    ),
    "student": (
        lambda p: td.StudentT(torch.tensor(12.0, dtype=F64), p["loc"], p["scale"]),
        {"loc": 0.5, "scale": 1.2},
        lambda p: p["loc"] ** 2 + p["scale"] ** 2 * 12 / 10,
    ),
    "laplace": (td.Laplace, {"loc": 0.5, "scale": 1.2}, lambda p: p["loc"] ** 2 + 2 * p["scale"] ** 2),
    "poisson": (td.Poisson, {"rate": 2.0}, lambda p: p["rate"] * (p["rate"] + 1)),
    "lognormal": (td.LogNormal, {"loc": 0.1, "scale": 0.4}, lambda p: torch.exp(2 * p["loc"] + 2 * p["scale"] ** 2)),
    "independent": (lambda p: td.Independent(td.Normal(p["loc"].expand(1), 1.0), 1), {"loc": 0.5}, lambda p: p["loc"] ** 2 + 1),
}  # fmt: skip


@pytest.mark.parametrize("law", list(TORCH))
def test_torch_laws_against_their_moments(law):
    """E z^2 by each sampling method that applies; |z| < 4.5: false alarm 7e-6 each."""
    model, values, moment = TORCH[law]
    params = {k: scalar(v) for k, v in values.items()}
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    exact = dict(zip(leaves, torch.autograd.grad(moment(leaves), list(leaves.values())), strict=True))
    f = lambda z, p: z.square().reshape(len(z))  # noqa: E731
    found = compare(model, f, params, n_samples=40_000, seed=5, exact=exact)
    assert {"score_function", "rloo (group=16)"} <= set(found.results)
    assert ("pathwise" in found.results) == (law != "poisson")
    for row in found.rows():
        assert abs(row["bias"]) < 4.5 * row["standard_error"], row


def test_dirichlet_by_pathwise():
    """E z_0^2 = a0 (a0 + 1) / (S (S + 1)), S the sum."""
    a = vector(1.0, 2.0, 3.0).requires_grad_()
    exact = torch.autograd.grad(a[0] * (a[0] + 1) / (a.sum() * (a.sum() + 1)), a)[0]
    result = expectation_gradient(
        td.Dirichlet, lambda z, p: z[:, 0] ** 2, {"concentration": a.detach()}, n_samples=40_000, method="pathwise", seed=1
    )  # fmt: skip
    z = (result.gradient["concentration"].mean - exact) / result.gradient["concentration"].standard_error
    assert (z.abs() < 4.5).all()


def test_torchs_generator_is_seeded_and_put_back():
    params = {"concentration": scalar(2.0), "rate": scalar(1.5)}
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one = expectation_gradient(td.Gamma, quadratic, params, n_samples=1000, method="pathwise", seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    again = expectation_gradient(td.Gamma, quadratic, params, n_samples=1000, method="pathwise", seed=3)
    other = expectation_gradient(td.Gamma, quadratic, params, n_samples=1000, method="pathwise", seed=4)
    assert torch.equal(one.gradient["rate"].mean, again.gradient["rate"].mean)
    assert not torch.equal(one.gradient["rate"].mean, other.gradient["rate"].mean)


# The user's own


def test_a_function_of_noise_with_and_without_a_density():
    """z = a + e^3: E z^2 = a^2 + 15, derivative 2 a."""
    model = Reparameterised(lambda eps, p: p["a"] + eps[:, 0] ** 3, noise_shape=1)
    result = expectation_gradient(model, quadratic, {"a": scalar(0.7)}, n_samples=100_000, seed=1)
    assert result.method == "pathwise"
    assert abs(result.gradient["a"].mean - 1.4) < 4 * result.gradient["a"].standard_error
    with_density = Reparameterised(
        lambda eps, p: p["a"] + p["s"] * eps[:, 0],
        1,
        lambda z, p: -0.5 * ((z - p["a"]) / p["s"]) ** 2 - torch.log(p["s"]),
    )
    params = {"a": scalar(1.0), "s": scalar(1.0)}
    own = expectation_gradient(with_density, quadratic, params, n_samples=2000, method="score_function", seed=1)
    ours = expectation_gradient(Normal, quadratic, N11, n_samples=2000, method="score_function", seed=1)
    for a, b in (("a", "mean"), ("s", "scale")):
        torch.testing.assert_close(own.gradient[a].mean, ours.gradient[b].mean, rtol=1e-12, atol=0)


def test_an_opaque_sampler_by_its_density():
    """Poisson, E z^2 = r^2 + r."""
    poisson = Sampler(
        lambda n, p: torch.poisson(p["rate"].expand(n)),
        lambda z, p: z * p["rate"].log() - p["rate"] - torch.lgamma(z + 1),
    )
    for method in ("score_function", "rloo"):
        result = expectation_gradient(
            poisson, quadratic, {"rate": scalar(2.0)}, n_samples=40_000, method=method, seed=1
        )
        assert abs(result.gradient["rate"].mean - 5.0) < 4.5 * result.gradient["rate"].standard_error


# Parameters of f, items


def test_f_may_depend_on_the_parameters():
    """E[a z^2 + m] with z ~ N(m, s): derivative 2 a m + 1, 2 a s, m^2 + s^2."""
    params = {"mean": scalar(0.8), "scale": scalar(1.3), "a": scalar(2.0)}
    exact = {"mean": 2 * 2 * 0.8 + 1, "scale": 2 * 2 * 1.3, "a": 0.8**2 + 1.3**2}
    found = compare(Normal, lambda z, p: p["a"] * z**2 + p["mean"], params, n_samples=100_000, seed=2, exact=exact)
    assert len(found.results) == 5
    for row in found.rows():
        assert abs(row["bias"]) < 4.5 * row["standard_error"], row  # 15 of them: false alarm 1e-4


def test_items_by_every_method():
    """Three coins an item, probabilities from the item: enumeration is the authority."""
    x = torch.tensor([[0.0, 1.0], [1.0, 2.0], [3.0, 1.0], [2.0, 2.0]], dtype=F64)
    params = {"w": vector(0.5, 0.2), "s": scalar(0.7)}

    def model(x, p):
        return Bernoulli(logits=(x @ p["w"])[:, None] * torch.ones(3, dtype=F64))

    def f(z, x, p):
        return (z.sum(1) - x[:, 0]) ** 2 * p["s"]

    found = compare(model, f, params, n_samples=20_000, x=x, seed=3)
    assert found.exact is not None
    assert [m for m, r in found.results.items() if r.biased] == ["gumbel_softmax", "straight_through"]
    for row in found.rows():
        if not row["biased"] and row["method"] != "enumerate":
            assert abs(row["bias"]) < 4.5 * row["standard_error"], row
    by_item = [
        expectation_gradient(model, f, params, n_samples=4, method="enumerate", x=item[None]).gradient["w"].mean
        for item in x
    ]
    torch.testing.assert_close(found.exact["w"], torch.stack(by_item).mean(0), rtol=1e-13, atol=0)


def test_standard_error_of_items_is_that_of_the_draws():
    """Items differ by much more than draws do, and it does not show: Var of (z_i + 100 x_i) is that of z."""
    x = torch.arange(10, dtype=F64)[:, None]

    def model(x, p):
        return Normal(p["m"].expand(len(x)), torch.ones(len(x), dtype=F64))

    result = expectation_gradient(
        model,
        lambda z, x, p: z**2 / 2 + 100 * x[:, 0] * z,
        {"m": scalar(0.0)},
        x=x,
        n_samples=5000,
        method="pathwise",
        seed=1,
    )
    # the gradient of a draw is z + 100 x: variance 1 over draws; 5,000 x 10 draws know it to 0.6 %, so 5 % is 8 sd
    assert result.gradient["m"].standard_error.item() == pytest.approx((1 / 50_000) ** 0.5, rel=0.025)
    assert result.gradient["m"].n == 50_000
    # the value: Var(z^2 / 2 + 100 x z) = 1/2 + 1e4 x^2, averaged over items, over n
    assert result.value.standard_error.item() == pytest.approx(((0.5 + 1e4 * 28.5) / 50_000) ** 0.5, rel=0.05)


def test_items_that_look_at_each_other():
    """Features centred over the batch, f = z x: exact value 2 and gradient 1.5; and enumeration of a policy on centred features."""
    x = vector(0.0, 2.0)[:, None]

    def model(x, p):
        return Normal(p["a"] * (x[:, 0] - 0.5 * x[:, 0].mean()), torch.ones(len(x), dtype=F64))

    for method in ("pathwise", "score_function", "measure_valued"):
        result = expectation_gradient(
            model, lambda z, x, p: z * x[:, 0], {"a": scalar(1.0)}, x=x, n_samples=20_000, method=method, seed=1
        )
        assert abs(result.value.mean - 1.5) < 4.5 * result.value.standard_error
        assert abs(result.gradient["a"].mean - 1.5) < 4.5 * result.gradient["a"].standard_error + 1e-12
    # the standard error of the value: a draw for both items is one unit, z1 x1 / 2 with x1 = 2 has variance 1
    assert result.value.standard_error.item() == pytest.approx((1 / 20_000) ** 0.5, rel=0.05)

    def policy(x, p):
        return Categorical(logits=(x - x.mean(0)) @ p["W"])

    params = {"W": torch.tensor([[0.3, -0.2, 0.5]], dtype=F64)}
    rows = torch.arange(4, dtype=F64)[:, None]
    found = compare(policy, lambda z, x, p: (z * x).sum(1) ** 2 + z[:, 0], params, x=rows, n_samples=20_000, seed=2)
    for row in found.rows():
        if not row["biased"] and row["method"] != "enumerate":
            assert abs(row["bias"]) < 4.5 * row["standard_error"], row


def test_parameters_with_a_row_for_each_item():
    x = torch.arange(4, dtype=F64)[:, None]
    params = {"m": vector(0.1, 0.2, 0.3, 0.4), "s": torch.ones(4, dtype=F64)}
    result = expectation_gradient(
        lambda x, p: Normal(p["m"], p["s"]),
        lambda z, x, p: z**2,
        params,
        x=x,
        n_samples=20_000,
        method="pathwise",
        seed=1,
    )
    z = (result.gradient["m"].mean - params["m"] / 2) / result.gradient["m"].standard_error
    assert (z.abs() < 4.5).all()


def test_right_methods_survive_a_wrong_density():
    """A support that moves makes the score wrong, not the draw: E sin(loc + e), e exponential: sin' = (cos + ...) by pathwise."""

    def shifted(p):
        return td.TransformedDistribution(
            td.Exponential(torch.ones((), dtype=F64)), [td.AffineTransform(p["loc"], 1.0)]
        )

    result = expectation_gradient(shifted, lambda z, p: torch.sin(z), {"loc": scalar(1.0)}, n_samples=20_000, seed=1)
    assert result.method == "pathwise"
    exact = (math.cos(1.0) - math.sin(1.0)) / 2  # E cos(1 + e) = Re e^i / (1 - i)
    assert abs(result.gradient["loc"].mean - exact) < 4.5 * result.gradient["loc"].standard_error


def test_draws_of_many_numbers():
    """3,072 coordinates, E |z|^2 with exact gradients 2 mean and 2 scale: nothing may take memory with their square."""
    params = {"mean": torch.linspace(-1, 1, 3072, dtype=F64), "scale": torch.ones(3072, dtype=F64)}
    result = expectation_gradient(Normal, lambda z, p: z.square().sum(1), params, n_samples=400, seed=1)
    assert result.method == "pathwise"
    assert "3072 coordinates" in result.tried["measure_valued"]
    z = (result.gradient["mean"].mean - 2 * params["mean"]) / result.gradient["mean"].standard_error
    assert z.abs().max() < 6  # 3,072 of them: false alarm 6e-6
    assert "measure_valued" in compare(Normal, lambda z, p: z.square().sum(1), params, n_samples=64).refused


def test_clamped_draws_are_left_to_pathwise():
    """Beta(a, a) with a = 0.05: torch clamps a sixth of its draws. E z = 1/2, derivative in the second -1/(4 a) = -5."""
    params = {"concentration1": scalar(0.05), "concentration0": scalar(0.05)}
    result = expectation_gradient(td.Beta, lambda z, p: z, params, n_samples=20_000, seed=1)
    assert result.method == "pathwise"
    assert "clamps" in result.tried["score_function"]
    assert abs(result.gradient["concentration0"].mean + 5) < 4.5 * result.gradient["concentration0"].standard_error


def test_the_default_with_given_noise_tries_what_it_suffices_for():
    noise = GivenNoise(torch.randn(1, 500, 1, dtype=F64, generator=torch.Generator().manual_seed(1)))
    result = expectation_gradient(Normal, quadratic, N11, n_samples=500, noise=noise)
    assert result.method == "pathwise"
    assert "components" in result.tried["measure_valued"]


def test_straight_through_inside_a_transform_is_biased_too():
    result = expectation_gradient(
        lambda p: td.TransformedDistribution(td.OneHotCategoricalStraightThrough(logits=p["l"]), [td.AffineTransform(0.0, 2.0, event_dim=1)]),
        lambda z, p: 4 * z[:, 0] ** 2 + z[:, 1], {"l": vector(0.3, 0.1, 0.2)}, n_samples=400, method="pathwise", check=False,
    )  # fmt: skip
    assert result.biased


def test_smooth_functions_of_float32_are_not_taken_for_jumps():
    params = {"mean": torch.tensor(-0.657), "scale": torch.tensor(0.193)}
    for f in (
        lambda z, p: (z - p["mean"]) ** 2,
        lambda z, p: (z - 5) ** 2 * 1e3,
        lambda z, p: torch.relu(z + 0.6) + 1e4,
    ):
        expectation_gradient(Normal, f, params, n_samples=200, method="pathwise", wrt="scale")


def test_threads_share_torchs_generator_in_turn():
    from concurrent.futures import ThreadPoolExecutor

    params = {"concentration": scalar(2.0), "rate": scalar(1.5)}

    def run(seed):
        return expectation_gradient(
            td.Gamma, quadratic, params, n_samples=400, method="pathwise", seed=seed, check=False
        )

    before = torch.random.get_rng_state()
    alone = [run(seed).gradient["rate"].mean for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = [r.gradient["rate"].mean for r in pool.map(run, range(8))]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    expectation_gradient(td.Gamma, quadratic, params, n_samples=400, method="score_function", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_decomposition_without_grad_mode():
    with torch.no_grad():
        found = decompose(Normal, quadratic, N11, n_samples=400)
    assert float(found.terms["mean"].total) == pytest.approx(2.0, abs=1e-8)


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


def test_a_problem_in_a_training_loop():
    """The surrogate of a chain carries the graph of the SDE's parameters."""
    k = scalar(0.5).requires_grad_()
    sde = SDE(drift, diffusion, {"k": k, "s": scalar(0.3)})
    problem = Problem(sde, lambda ys, p: ys[-1, :, 0] ** 2, vector(1.0), (0.0, 1.0), 4)
    surrogate(problem, n_samples=500, seed=3).backward()
    result = expectation_gradient(problem, n_samples=500, seed=3, method="pathwise", wrt="k")
    assert k.grad.item() == pytest.approx(result.gradient["k"].mean.item(), rel=1e-12)


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
