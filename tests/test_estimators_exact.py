"""Estimators against exact means and variances, and the coverage of their intervals.

The authorities are closed forms: moments of normals, enumeration of coins, quadrature.
"""

import math
from functools import partial

import pytest
import torch
import torch.distributions as td
from estimator_cases import N11, coin, quadratic, squared_distance, variance_of_draw, vector
from problems import F64, scalar

from sdesens.estimators import (
    Bernoulli,
    Categorical,
    LogNormal,
    MultivariateNormal,
    Normal,
    expectation_gradient,
    sample_tangents,
)
from sdesens.estimators.exact import normal_variances

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
