"""Models with a known answer: the answers against reference digits and independent formulas, the chains against the answers.

The authorities, strongest first: digits computed elsewhere; another route to the same number (an ordinary differential
equation, a law, a quadrature); exhaustive Gauss-Hermite enumeration of the chain; Monte Carlo.
"""

import itertools
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from scipy import integrate, linalg, stats

from sdesens import GivenNoise, Philox, ZeroGradientWarning, sdeint, sensitivity
from sdesens.errors import ArgumentError, MethodError
from sdesens.functionals import Moment
from sdesens.functionals.last_step import normal_moment, positive_sqrt
from sdesens.models import (
    MODELS,
    Known,
    asian,
    barrier,
    basket,
    brownian,
    cir,
    cir_lamperti,
    gbm,
    gbm_call,
    gbm_digital,
    heston,
    lotka_volterra,
    ou,
    ou_nd,
    vasicek,
)

D = torch.float64


def names(known, *, horizon=True) -> tuple[str, ...]:
    """All a problem can be differentiated in."""
    return (*known.problem.sde.params, "t1") if horizon else tuple(known.problem.sde.params)


def gauss_hermite(n_nodes: int, n_steps: int, noise_dim: int = 1) -> GivenNoise:
    """Every path whose normals are nodes: exact for polynomials of degree 2 n_nodes - 1 in each normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n_nodes)
    weights = weights / weights.sum()
    count = n_steps * noise_dim
    index = np.array(list(itertools.product(range(n_nodes), repeat=count)))  # (paths, count)
    z = torch.tensor(nodes[index]).reshape(-1, n_steps, noise_dim).transpose(0, 1)
    return GivenNoise(z.contiguous(), torch.tensor(weights[index].prod(1)))


def enumerate_chain(known, n_nodes: int, noise_dim: int = 1):
    """Value and gradient of the chain, all parameters and the horizon, by enumeration."""
    noise = gauss_hermite(n_nodes, known.problem.n_steps, noise_dim)
    return sensitivity(known.problem, n_paths=noise.z.shape[1], wrt=names(known), noise=noise, audit=False)


def central(f, p: dict[str, float], relative: float = 1e-4) -> dict[str, float]:
    """Fourth-order central differences of a function of a dict of numbers."""
    gradient = {}
    for k, v in p.items():
        h = relative * max(abs(v), 0.1)
        at = [f({**p, k: v + j * h}) for j in (-2, -1, 1, 2)]
        gradient[k] = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
    return gradient


def check(answers, value, gradient, rtol, atol=0.0):
    torch.testing.assert_close(answers[0], torch.as_tensor(value, dtype=D), rtol=rtol, atol=atol)
    for name, g in gradient.items():
        torch.testing.assert_close(
            answers[1][name], torch.as_tensor(g, dtype=D), rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


# --- exact answers ---------------------------------------------------------------------------------------------------

REFERENCE = {
    "call": (
        gbm_call,
        10.450583572185565,
        {
            "r": 53.232481545376345,
            "sigma": 37.52403469169379,
            "s0": 0.6368306511756191,
            "t1": 6.414027546438197,
        },
    ),
    "digital": (
        gbm_digital,
        0.5323248154537634,
        {"r": 1.343876919130926, "sigma": -0.6566706071046413, "s0": 0.01876201734584689},
    ),
    "vasicek": (
        vasicek,
        0.8227627109836,
        {
            "kappa": -0.0881347810756,
            "m": -1.983215103192,
            "sigma": 0.256803614267,
            "x0": -2.130598451725,
        },
    ),
    "heston": (
        heston,
        10.368685937787,
        {
            "s0": 0.67852868878061,
            "r": 57.484182940274,
            "t1": 6.4348323405029,
            "kappa": 0.062313984499213,
            "theta": 52.939621308802,
            "xi": -0.87859314337126,
            "rho": -0.14378735209322,
            "v0": 39.549707878751,
        },
    ),
}
SHORTER = {  # digits given to 10 places: model, value, gradient
    "barrier": (
        barrier(),
        8.665471658246,
        {"s0": 0.8301694456, "r": 47.76539748, "sigma": 11.28142230, "t1": 3.516412104},
    ),
    "asian": (
        asian(fixings=12, n_steps=12),
        5.94020022163352,
        {"s0": 0.5851429483567, "sigma": 21.1342171041, "r": 25.7550428144},
    ),
    "basket": (
        basket(),
        8.896076311035,
        {"s0": [0.1979922553, 0.2199913948, 0.1799929594], "sigma": [7.632795143, 7.826492637, 6.063201854]},
    ),
}


@pytest.mark.parametrize("case", REFERENCE)
def test_reference_digits(case):
    model, value, gradient = REFERENCE[case]
    known = model()
    # the digits are given to 13 or 14 places; cancellation in the formulas costs a few units more
    check(known.answers(wrt=names(known)), value, gradient, rtol=3e-12)


@pytest.mark.parametrize("case", SHORTER)
def test_shorter_reference_digits(case):
    known, value, gradient = SHORTER[case]
    answers = known.answers(wrt=names(known))
    assert float(answers[0]) == pytest.approx(value, rel=1e-12)  # given to 13 digits
    check(answers, value, gradient, rtol=5e-10)  # half a unit of the tenth digit


def test_one_correlation_of_the_basket():
    assert float(basket().answers()[1]["rho"][0]) == pytest.approx(1.738896037, rel=1e-9)


def test_an_asian_of_one_fixing_is_a_call():
    one, european = (m.answers(wrt=("r", "sigma", "s0", "t1")) for m in (asian(fixings=1), gbm_call()))
    check(one, european[0], european[1], rtol=1e-12)  # rounding


def test_a_barrier_far_below_is_no_barrier():
    far, european = (m.answers(wrt=("r", "sigma", "s0", "t1")) for m in (barrier(barrier=20.0), gbm_call()))
    check(far, european[0], european[1], rtol=1e-9)  # eight standard deviations away


@pytest.mark.parametrize(
    ("known", "gamma"),
    [
        (gbm_call(), 0.018762017345846895),
        (gbm_digital(), -0.00032833530355232067),
        (heston(), 0.018246991668314),
        (asian(fixings=12, n_steps=12), 0.03066688063119),
    ],
)
def test_second_derivative_of_a_formula(known, gamma):
    p = {k: v.requires_grad_() for k, v in known.problem.leaves().items()}
    (delta,) = torch.autograd.grad(known.exact(p), p["s0"], create_graph=True)
    (second,) = torch.autograd.grad(delta, p["s0"])
    torch.testing.assert_close(second, torch.tensor(gamma, dtype=D), rtol=1e-11, atol=0)  # digits given to 13 places


def test_ou_chain_digits():
    """Derivatives of E X_N^2 for the Euler-Maruyama chain with h = 0.05, N = 40."""
    known = ou(kappa=1.3, m=0.4, sigma=0.5, x0=1.2, t1=2.0, n_steps=40)
    expected = {"kappa": -0.177313035702, "sigma": 0.395697454592, "m": 0.846997544211, "x0": 0.061791313724}
    answers = known.answers("scheme")
    check((answers[0], answers[1]), answers[0], expected, rtol=0, atol=1e-12)  # digits given to 12 decimals


def test_gbm_by_hand():
    mu, sigma, x0, T, N = 0.1, 0.5, 1.2, 1.5, 7
    known = gbm(mu=mu, sigma=sigma, x0=x0, t1=T, n_steps=N)
    second = x0**2 * math.exp((2 * mu + sigma**2) * T)
    gradient = {
        "mu": 2 * T * second,
        "sigma": 2 * sigma * T * second,
        "x0": 2 * second / x0,
        "t1": (2 * mu + sigma**2) * second,
    }
    check(known.answers(wrt=names(known)), second, gradient, rtol=1e-14)  # rounding
    h = T / N
    p, q = 1 + mu * h, (1 + mu * h) ** 2 + sigma**2 * h
    chain = {
        "mu": 2 * x0**2 * N * h * p * q ** (N - 1),
        "sigma": 2 * x0**2 * N * sigma * h * q ** (N - 1),
        "x0": 2 * x0 * q**N,
    }
    check(known.answers("scheme"), x0**2 * q**N, chain, rtol=1e-14)  # rounding


@pytest.mark.parametrize("power", [1, 2, 3, 4, 7])
def test_normal_moments_against_quadrature(power):
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)  # exact to degree 15
    expected = float((weights / weights.sum() * (0.7 + math.sqrt(0.3) * nodes) ** power).sum())
    found = normal_moment(torch.tensor(0.7, dtype=D), torch.tensor(0.3, dtype=D), power)
    assert float(found) == pytest.approx(expected, rel=1e-13)  # rounding


def linear_moments(p: dict[str, float]) -> float:
    """E X_T^2 of Ornstein-Uhlenbeck from the moment equations m1' = k(m - m1), m2' = 2k(m m1 - m2) + s^2."""

    def rhs(t, y):
        return [p["kappa"] * (p["m"] - y[0]), 2 * p["kappa"] * (p["m"] * y[0] - y[1]) + p["sigma"] ** 2]

    start = [p["x0"], p["x0"] ** 2]
    return integrate.solve_ivp(rhs, (0, p["t1"]), start, method="DOP853", rtol=1e-13, atol=1e-14).y[1, -1]


def test_ou_against_moment_equations():
    p = {"kappa": 0.7, "m": -0.4, "sigma": 0.9, "x0": 1.5, "t1": 1.3}
    # 1e-13 of the solver over a difference step of 1e-4: 1e-9
    known = ou(**p)
    check(known.answers(wrt=names(known)), linear_moments(p), central(linear_moments, p), rtol=3e-9)


def riccati_bond(p: dict[str, float]) -> float:
    """E exp(-int X) of Cox-Ingersoll-Ross from B' = 1 - k B - s^2 B^2 / 2, (log A)' = -k theta B."""

    def rhs(t, y):
        return [1 - p["kappa"] * y[0] - 0.5 * p["sigma"] ** 2 * y[0] ** 2, -p["kappa"] * p["theta"] * y[0]]

    B, log_A = integrate.solve_ivp(rhs, (0, p["t1"]), [0, 0], method="DOP853", rtol=1e-13, atol=1e-15).y[:, -1]
    return math.exp(log_A - B * p["x0"])


def test_cir_bond_against_riccati_equations():
    p = {"kappa": 0.8, "theta": 0.3, "sigma": 0.5, "x0": 0.2, "t1": 2.0}
    known = cir(**p)
    # as for the moment equations
    check(known.answers(wrt=names(known)), riccati_bond(p), central(riccati_bond, p), rtol=3e-8, atol=1e-10)


def chi_square_laplace(p: dict[str, float], u: float) -> float:
    """E exp(-u X_T) by quadrature over the non-central chi-square law."""
    e = math.exp(-p["kappa"] * p["t1"])
    c = p["sigma"] ** 2 * (1 - e) / (4 * p["kappa"])
    law = stats.ncx2(4 * p["kappa"] * p["theta"] / p["sigma"] ** 2, p["x0"] * e / c, scale=c)
    end = law.ppf(1 - 1e-14)
    return integrate.quad(lambda x: math.exp(-u * x) * law.pdf(x), 0, end, epsabs=1e-12, epsrel=1e-12, limit=200)[0]


def test_cir_laplace_against_its_law():
    p = {"kappa": 1.2, "theta": 0.5, "sigma": 0.6, "x0": 0.3, "t1": 1.0}
    known = cir(**p, u=1.5)

    def oracle(q):
        return chi_square_laplace(q, 1.5)

    # the density is good to about 1e-12, over a difference step of 1e-3: 1e-9
    check(known.answers(wrt=names(known)), oracle(p), central(oracle, p, 1e-3), rtol=1e-7, atol=1e-9)


def test_cir_mean_by_hand():
    e = math.exp(-0.8 * 2.0)
    for known in (cir(kappa=0.8, theta=0.3, sigma=0.5, x0=0.2, t1=2.0, mean=True), cir_lamperti(kappa=0.8, theta=0.3, sigma=0.5, x0=0.2, t1=2.0)):  # fmt: skip
        gradient = {"kappa": 2 * 0.1 * e, "theta": 1 - e, "sigma": 0.0, "x0": e, "t1": 0.8 * 0.1 * e}
        check(known.answers(wrt=names(known)), 0.3 - 0.1 * e, gradient, rtol=1e-14)  # rounding
    assert cir(mean=True).problem.functional == Moment()


def gaussian_square(p: dict[str, np.ndarray]) -> float:
    """E |X_T|^2 of the linear SDE by matrix exponential and quadrature of the covariance."""
    A, G, T = p["A"], p["G"], float(p["t1"])
    mean = p["mu"] + linalg.expm(A * T) @ (p["x0"] - p["mu"])
    nodes, weights = np.polynomial.legendre.leggauss(20)
    S = sum(
        0.5 * T * w * np.square(linalg.expm(A * 0.5 * T * (1 + s)) @ G).sum()
        for s, w in zip(nodes, weights, strict=True)
    )
    return float(mean @ mean + S)


def test_ou_nd_against_quadrature():
    known = ou_nd(t1=1.7)
    value, gradient = known.answers(wrt=names(known))
    p = {k: v.numpy().copy() for k, v in known.problem.leaves(names(known)).items()}
    assert float(value) == pytest.approx(gaussian_square(p), rel=1e-13)  # rounding
    for name, g in gradient.items():
        for i in np.ndindex(*p[name].shape):
            at, h = [], 1e-3
            for j in (-2, -1, 1, 2):
                shifted = {k: v.copy() for k, v in p.items()}
                shifted[name][i] += j * h
                at.append(gaussian_square(shifted))
            expected = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
            # truncation h^4 = 1e-12, cancellation 1e-15 / h = 1e-12
            assert float(g[i]) == pytest.approx(expected, rel=1e-9, abs=1e-10), (name, i)


def test_ou_nd_in_one_dimension_is_ou():
    one = ou(kappa=1.3, m=0.4, sigma=0.5, x0=1.2, n_steps=9)
    many = ou_nd(A=[[-1.3]], mu=[0.4], G=[[0.5]], x0=[1.2], n_steps=9)
    for which in ("exact", "scheme"):
        value, g = one.answers(which, wrt=names(one))
        found, f = many.answers(which, wrt=names(many))
        torch.testing.assert_close(found, value, rtol=1e-13, atol=0)  # rounding
        pairs = {"A": -g["kappa"], "mu": g["m"], "G": g["sigma"], "x0": g["x0"], "t1": g["t1"]}
        for name, expected in pairs.items():
            torch.testing.assert_close(f[name].reshape(()), expected, rtol=1e-12, atol=0)


def heston_by_probabilities(p: dict[str, float], strike: float) -> float:
    """The same price by another formula, S P1 - K e^{-rT} P2, with Gauss-Legendre panels and numpy."""
    kappa, theta, xi, rho, v0, r, T = (p[k] for k in ("kappa", "theta", "xi", "rho", "v0", "r", "t1"))

    def phi(u):  # E exp(iu log(S_T / s0))
        b = kappa - 1j * rho * xi * u
        d = np.sqrt(b * b + xi * xi * (1j * u + u * u))
        g, decay = (b - d) / (b + d), np.exp(-d * T)
        C = 1j * u * r * T + kappa * theta / xi**2 * ((b - d) * T - 2 * np.log((1 - g * decay) / (1 - g)))
        return np.exp(C + (b - d) / xi**2 * (1 - decay) / (1 - g * decay) * v0)

    nodes, weights = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(0, 400, 801)
    u = (0.5 * (edges[1:, None] + edges[:-1, None]) + 0.25 * nodes).ravel()
    w = np.tile(0.25 * weights, 800)
    k = math.log(strike / p["s0"])
    P1 = 0.5 + (w * (np.exp(-1j * u * k) * phi(u - 1j) / (1j * u * math.exp(r * T))).real).sum() / math.pi
    P2 = 0.5 + (w * (np.exp(-1j * u * k) * phi(u) / (1j * u)).real).sum() / math.pi
    return p["s0"] * P1 - strike * math.exp(-r * T) * P2


@pytest.mark.parametrize(
    ("p", "strike"),
    [
        ({"kappa": 1.5, "theta": 0.09, "xi": 0.8, "rho": -0.8, "v0": 0.06, "r": 0.02, "t1": 0.5, "s0": 90.0}, 100.0),
        ({"kappa": 0.5, "theta": 0.05, "xi": 1.0, "rho": 0.3, "v0": 0.1, "r": 0.0, "t1": 5.0, "s0": 120.0}, 80.0),
    ],
)
def test_heston_away_from_the_money(p, strike):
    def oracle(q):
        return heston_by_probabilities(q, strike)

    known = heston(**p, strike=strike)
    # both integrals lose about 1e-12 of a price near 10; differences divide that by a step of 1e-4 and more
    check(known.answers(wrt=names(known)), oracle(p), central(oracle, p, 1e-3), rtol=1e-7, atol=1e-7)


def test_heston_nodes_suffice(monkeypatch):
    short = heston(t1=0.02, v0=0.01, theta=0.01, rho=-0.9, xi=0.5, strike=101.0)
    coarse = short.answers(wrt=names(short))
    module = sys.modules["sdesens.models.heston"]  # the package exports the function under the same name
    monkeypatch.setattr(module, "SPACING", 1 / 128)
    monkeypatch.setattr(module, "NODES", 1536)
    check(coarse, *short.answers(wrt=names(short)), rtol=1e-9, atol=1e-12)


# --- the chain --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "n_nodes", "noise_dim", "rtol"),
    [
        (brownian(n_steps=5), 5, 1, 1e-13),
        (brownian(n_steps=5, power=3), 5, 1, 1e-13),
        (gbm(n_steps=5), 5, 1, 1e-13),
        (gbm(n_steps=5, power=4), 5, 1, 1e-13),
        (ou(n_steps=5), 5, 1, 1e-13),
        (ou_nd(n_steps=4), 3, 2, 1e-12),  # degree 2 in each normal; entries of d/dA cancel
        # an exponential: the remainder of 5 nodes is (sd)^10 5! / 10!, below 1e-17 for a sd of 0.09
        (vasicek(n_steps=5), 5, 1, 1e-12),
        # log price: the call is a kink, not a polynomial, but one step and its own law leave only E of a smooth
        # function when the strike is far below every node
        (gbm_call(n_steps=3, log=True, strike=1e-6), 7, 1, 1e-9),
    ],
    ids=["brownian", "brownian^3", "gbm", "gbm^4", "ou", "ou-nd", "vasicek", "call"],
)
def test_scheme_against_enumeration(known, n_nodes, noise_dim, rtol):
    """Paths through every Gauss-Hermite node, weighted: no sampling error, so only rounding is left."""
    result = enumerate_chain(known, n_nodes, noise_dim)
    value, gradient = known.answers("scheme", wrt=names(known))
    torch.testing.assert_close(result.value.mean, value, rtol=rtol, atol=0)
    for name, expected in gradient.items():
        found = result.gradient[name].mean
        scale = float(expected.abs().max().clamp(min=float(value.abs()) * 1e-3))
        torch.testing.assert_close(
            found, expected, rtol=0, atol=rtol * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("model", [gbm, ou, vasicek, ou_nd])
def test_scheme_tends_to_exact_with_order_one(model):
    steps = np.array([64, 128, 256, 512])
    errors = {}
    for n in steps:
        known = model(n_steps=int(n))
        exact, scheme = (known.answers(which, wrt=names(known)) for which in ("exact", "scheme"))
        errors.setdefault("value", []).append(float((scheme[0] - exact[0]).abs()))
        for name in exact[1]:
            errors.setdefault(name, []).append(float((scheme[1][name] - exact[1][name]).norm()))
    for name, gaps in errors.items():
        if max(gaps) < 1e-11:  # no bias at all to fit
            continue
        order = -np.polyfit(np.log(steps), np.log(gaps), 1)[0]
        assert order == pytest.approx(1, abs=0.1), name  # the next term is a hundredth of the first at 64 steps


def riccati_recursion(p: dict[str, float], n: int) -> float:
    """E exp(-h sum X_k) of the untruncated Euler chain: E exp(-u X') = exp(-u k theta h - (u (1 - k h) - u^2 s^2 h / 2) X)."""
    h, u, log_A = p["t1"] / n, 0.0, 0.0
    for _ in range(n):
        log_A -= u * p["kappa"] * p["theta"] * h
        u = h + u * (1 - p["kappa"] * h) - 0.5 * (u * p["sigma"]) ** 2 * h
    return math.exp(log_A - u * p["x0"])


def test_cir_chain_against_its_recursion():
    """Gauss-Hermite nodes keep the chain positive at these parameters, so truncation never acts."""
    p = {"kappa": 0.8, "theta": 0.09, "sigma": 0.1, "x0": 0.1, "t1": 2.0}
    result = enumerate_chain(cir(**p, n_steps=5), 5)

    def oracle(q):
        return riccati_recursion(q, 5)

    assert float(result.value.mean) == pytest.approx(
        oracle(p), rel=1e-12
    )  # 5-node remainder for an exponent of sd 0.04
    for name, expected in central(oracle, p).items():
        assert float(result.gradient[name].mean) == pytest.approx(expected, rel=1e-8, abs=1e-10), name  # differencing


def test_heston_chain_keeps_the_discounted_price():
    """E e^{-rT} S_T = s0 for the log-Euler chain, whatever the variance does: with strike 0 every other derivative is 0."""
    known = heston(strike=0.0, n_steps=2, xi=0.5, v0=0.05)
    noise = gauss_hermite(7, 2, 2)
    wrt = ("kappa", "theta", "xi", "rho", "s0", "v0", "t1")  # r cancels path by path, and would warn
    result = sensitivity(known.problem, n_paths=noise.z.shape[1], wrt=wrt, noise=noise, audit=False)
    # remainder of 7 nodes for E e^{aZ}, a^2 = v h up to 0.1: a^14 7! / 14! s0 = 1e-12; derivatives take a few powers more
    assert float(result.value.mean) == pytest.approx(100.0, abs=1e-8)
    for name, estimate in result.gradient.items():
        assert float(estimate.mean) == pytest.approx(1.0 if name == "s0" else 0.0, abs=1e-5), name


def test_heston_covariance():
    known = heston(rho=-0.6, xi=0.4)
    y = torch.tensor([[4.6, 0.09, 0.0], [4.6, -0.01, 0.0]], dtype=D)
    g = known.problem.sde.diffusion(torch.tensor(0.0, dtype=D), y, known.problem.params({}))
    covariance = 0.09 * torch.tensor([[1.0, -0.24, 0.0], [-0.24, 0.16, 0.0], [0.0, 0.0, 0.0]], dtype=D)
    torch.testing.assert_close((g @ g.mT)[0], covariance, rtol=1e-14, atol=1e-17)
    assert not g[1].any()  # a negative variance makes no noise


def coefficients(known, y):
    """Drift and diffusion at the states y."""
    sde, t, p = known.problem.sde, torch.tensor(0.0, dtype=D), known.problem.params({})
    return sde.drift(t, y, p), sde.diffusion(t, y, p)


def test_full_truncation_of_a_negative_state():
    """Below zero the drift is that at zero, there is no noise, and the integral of the rate stands still."""
    b, g = coefficients(cir(kappa=1.5, theta=0.06), torch.tensor([[-0.02, 0.1]], dtype=D))
    torch.testing.assert_close(b, torch.tensor([[1.5 * 0.06, 0.0]], dtype=D))
    assert not g.any()
    b, g = coefficients(heston(r=0.05, kappa=2.0, theta=0.04), torch.tensor([[4.6, -0.02, 0.1]], dtype=D))
    torch.testing.assert_close(b, torch.tensor([[0.05, 2.0 * 0.04, 0.05]], dtype=D))
    assert not g.any()


def test_positive_sqrt_has_a_derivative_everywhere():
    x = torch.tensor([-1.0, 0.0, 4.0], dtype=D, requires_grad=True)
    y = positive_sqrt(x)
    expected = torch.tensor([0.0, 0.0, 0.25], dtype=D)
    assert y.tolist() == [0.0, 0.0, 2.0]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    assert torch.equal(torch.func.jvp(positive_sqrt, (x.detach(),), (torch.ones(3, dtype=D),))[1], expected)


def test_lotka_volterra_noise():
    _, g = coefficients(lotka_volterra(sigma1=0.1, sigma2=0.3), torch.tensor([[2.0, 5.0]], dtype=D))
    torch.testing.assert_close(g, torch.tensor([[0.2, 1.5]], dtype=D))


def test_lotka_volterra_without_noise_is_the_ode():
    p = {"alpha": 1.0, "beta": 0.5, "gamma": 0.8, "delta": 0.4, "prey0": 2.0, "predator0": 1.0}

    def ode(q):
        def rhs(t, y):
            return [y[0] * (q["alpha"] - q["beta"] * y[1]), y[1] * (q["delta"] * y[0] - q["gamma"])]

        start = [q["prey0"], q["predator0"]]
        return integrate.solve_ivp(rhs, (0, 3), start, method="DOP853", rtol=1e-12, atol=1e-13).y[0, -1]

    runs = []
    for n in (512, 1024):
        problem = lotka_volterra(**p, sigma1=0.0, sigma2=0.0, n_steps=n).problem
        result = sensitivity(problem, n_paths=2, wrt=tuple(p))
        runs.append([float(result.value.mean)] + [float(result.gradient[k].mean) for k in p])
    expected = np.array([ode(p), *central(ode, p).values()])
    coarse, fine = np.array(runs)
    assert np.abs(fine - expected).max() > 0.05  # the error of explicit Euler is O(h) ...
    np.testing.assert_allclose(2 * fine - coarse, expected, atol=1e-3)  # ... and extrapolated O(h^2), 3e-5 times O(10)


# --- Monte Carlo ------------------------------------------------------------------------------------------------------

# Each comparison: |z| < 4.5 with 99 degrees of freedom or more, false alarm 2e-5. About 110 comparisons below: 2e-3 for one
# unlucky choice of seeds, which are fixed.
Z, PATHS = 4.5, 20_000


def assert_close(result, value, gradient):
    pairs = {"value": (result.value, value), **{k: (result.gradient[k], g) for k, g in gradient.items()}}
    for name, (estimate, expected) in pairs.items():
        z = (estimate.mean - expected) / estimate.standard_error.clamp(min=1e-300)
        assert bool((z.abs() < Z).all()), f"{name}: {estimate!r}, expected {expected}"


@pytest.mark.parametrize(
    "known",
    [
        brownian(n_steps=16),
        gbm(n_steps=16),
        ou(n_steps=16),
        vasicek(n_steps=16),
        ou_nd(n_steps=16),
        gbm_call(n_steps=16, log=True),
        asian(n_steps=16),
        basket(n_steps=4),
    ],
    ids=["brownian", "gbm", "ou", "vasicek", "ou-nd", "call", "asian", "basket"],
)
def test_pathwise_against_the_scheme(known):
    result = sensitivity(known.problem, n_paths=PATHS, wrt=names(known), method="pathwise", seed=11)
    assert_close(result, *known.answers("scheme", wrt=names(known)))


def test_lotka_volterra_against_enumeration():
    known = lotka_volterra(t1=0.9, sigma1=0.4, sigma2=0.5, n_steps=3)
    two, three = (enumerate_chain(known, n, 2) for n in (2, 3))
    for name in two.gradient:  # after 3 steps degree 2 in each normal: two nodes are enough, and exact to rounding
        torch.testing.assert_close(two.gradient[name].mean, three.gradient[name].mean, rtol=1e-12, atol=1e-13)
        assert bool(two.gradient[name].mean.abs() > 1e-4)
    result = sensitivity(known.problem, n_paths=PATHS, wrt=names(known), seed=12)
    assert_close(result, two.value.mean, {k: e.mean for k, e in two.gradient.items()})


@pytest.mark.parametrize(
    "known", [gbm_call(n_steps=16), cir(n_steps=16), cir(u=5.0, n_steps=16), heston(n_steps=16)], ids=["call", "cir", "laplace", "heston"]
)  # fmt: skip
def test_pathwise_without_bias_against_the_exact_answer(known):
    """Where the chain has no formula, take the estimated bias off; what remains of order h^2 is within the noise."""
    result = sensitivity(known.problem, n_paths=PATHS, wrt=names(known), seed=13, bias=True, audit=False)
    value, gradient = known.answers(wrt=names(known))
    pairs = {"value": (result.value, value), **{k: (result.gradient[k], g) for k, g in gradient.items()}}
    for name, (estimate, expected) in pairs.items():
        bias = result.bias[name]
        spread = torch.hypot(estimate.standard_error, bias.standard_error)
        assert bool(((estimate.mean - bias.mean - expected).abs() < Z * spread).all()), name


def test_barrier_pathwise_misses_the_jump_and_watches_the_grid_alone():
    known = barrier(n_steps=16)
    assert known.problem.outputs == tuple(range(17))
    result = sensitivity(known.problem, n_paths=PATHS, seed=16, audit=False)
    value, gradient = known.answers()
    # dearer by the barrier's move of .5826 sigma sqrt(h) to 90 exp(-.0291) = 87.4, a shift that is good to o(sqrt(h))
    assert result.value.mean - value > 5 * result.value.standard_error
    shifted = barrier(barrier=90 * math.exp(-0.5826 * 0.2 / 4)).answers()[0]
    assert abs(result.value.mean - shifted) < 4 * result.value.standard_error
    # the paths that the barrier takes count in d/d s0, but not for the pathwise method
    assert gradient["s0"] - result.gradient["s0"].mean > 20 * result.gradient["s0"].standard_error


def test_digital_pathwise_misses_the_jump():
    known = gbm_digital(log=True, n_steps=4, t1=2.0)
    with pytest.warns(ZeroGradientWarning, match="'sigma', 's0'"):
        result = sensitivity(known.problem, n_paths=PATHS, seed=14, audit=False)
    value, gradient = known.answers("scheme")
    assert abs(result.value.mean - value) < Z * result.value.standard_error
    assert not result.gradient["s0"].mean.any()
    assert float(gradient["s0"]) > 0.01
    # d/dr: the discount's part alone, -T times the value, and far from the truth
    torch.testing.assert_close(result.gradient["r"].mean, -2.0 * result.value.mean, rtol=1e-12, atol=0)
    assert abs(result.gradient["r"].mean - gradient["r"]) > 100 * result.gradient["r"].standard_error


@pytest.mark.parametrize(
    "known",
    [
        cir(kappa=0.5, theta=0.02, sigma=0.6, x0=0.02, t1=2.0, n_steps=32),
        heston(kappa=0.5, xi=1.0, v0=0.02, n_steps=32),
    ],
    ids=["cir", "heston"],
)
def test_truncated_paths_have_finite_tangents_both_ways(known):
    """Far below the Feller bound most paths touch zero; forward and reverse mode still agree, path by path and finite."""
    run = {m: sensitivity(known.problem, n_paths=200, method=m, seed=15, audit=False) for m in ("pathwise", "forward")}
    variance = 0 if known.problem.initial({}).numel() == 2 else 1
    p = known.problem
    ys = sdeint(p.sde, p.initial({}).expand(200, -1), p.ts, n_steps=32, bm=Philox(15))
    assert bool((ys[-1, :, variance] <= 0).any())  # the test reaches what it claims to test
    for name, estimate in run["pathwise"].gradient.items():
        other = run["forward"].gradient[name].mean
        torch.testing.assert_close(
            estimate.mean, other, rtol=1e-9, atol=1e-12 * float(other.abs().max() + 1)
        )  # rounding


# --- every model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_pickles_and_describes_itself(name):
    model = MODELS[name]
    assert len((model.__doc__ or "").splitlines()[0]) > 20
    known = model(n_steps=8)
    assert known.problem.n_steps == 8
    assert known.problem.initial({}).dtype == D
    runs = []
    for problem in (known.problem, pickle.loads(pickle.dumps(known)).problem):
        wrt = ("r", "t1") if name == "digital" else names(known)  # the jump's other derivatives warn
        runs.append(
            sensitivity(problem, n_paths=100, wrt=wrt, seed=3, audit=False)
        )  # warnings are errors: no slow path
    for k, estimate in runs[0].gradient.items():
        assert torch.equal(estimate.mean, runs[1].gradient[k].mean)
        assert bool(estimate.mean.any())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_in_float32(name):
    known = MODELS[name](n_steps=4, dtype=torch.float32)
    assert all(v.dtype == torch.float32 for v in known.problem.sde.params.values())
    result = sensitivity(known.problem, n_paths=100, wrt=next(iter(known.problem.sde.params)), seed=3, audit=False)
    double = sensitivity(MODELS[name](n_steps=4).problem, n_paths=100, wrt=tuple(result.gradient), seed=3, audit=False)
    # same noise; float32 rounds at 6e-8, amplified by logarithms of prices and by cancellation, and may flip one kink
    torch.testing.assert_close(result.value.mean, double.value.mean, rtol=1e-3, atol=1e-4)
    if known.exact is not None:
        value, gradient = known.answers()
        assert value.dtype == D
        assert all(g.dtype == D for g in gradient.values())


@pytest.mark.parametrize("name", [n for n in MODELS if n != "lotka-volterra"])
def test_default_answers_are_not_zero(name):
    known = MODELS[name]()
    for which in ("exact", "scheme") if known.scheme else ("exact",):
        value, gradient = known.answers(which, wrt=names(known))
        assert set(gradient) == set(names(known))
        for k, g in gradient.items():
            if (name, k) == ("cir-lamperti", "sigma"):  # the mean does not depend on it
                continue
            assert bool((g.abs() > 1e-4 * value.abs()).all()), k  # a zero gradient would test nothing
            assert g.shape == known.problem.leaves((k,))[k].shape


def test_answers_take_names_and_refuse_what_is_unknown():
    known = gbm()
    value, gradient = known.answers(wrt=("sigma", "t1"))
    assert list(gradient) == ["sigma", "t1"]
    # theta may be partial: the rest comes from the problem
    torch.testing.assert_close(known.exact({"sigma": torch.tensor(0.5, dtype=D)}), value, rtol=0, atol=0)
    longer = known.exact({"t1": torch.tensor(2.0, dtype=D)})
    torch.testing.assert_close(longer, gbm(t1=2.0).answers()[0], rtol=1e-15, atol=0)
    with pytest.raises(ArgumentError, match="do not close"):
        lotka_volterra().answers()
    with pytest.raises(ArgumentError, match="scheme"):
        cir().answers("scheme")
    with pytest.raises(ArgumentError, match="'exact' or 'scheme'"):
        known.answers("limit")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: cir(u=1.0, mean=True), ArgumentError, "`u` or `mean`, not both"),
        (lambda: cir_lamperti(u=1.0, bond=True), ArgumentError, "`u` or `bond`, not both"),
        (lambda: cir_lamperti(x0=0.0), ArgumentError, "`x0` must be positive"),
        (lambda: cir_lamperti(kappa=1.0, theta=0.25, sigma=1.0), MethodError, "tangents have no mean"),  # at equality
        (lambda: cir_lamperti(sigma=0.7), MethodError, "exact sampling"),
        (lambda: barrier(barrier=101.0), ArgumentError, "at most the strike"),
        (lambda: barrier(s0=90.0), ArgumentError, "below the price today"),
        (lambda: barrier(barrier=0.0), ArgumentError, "must be positive"),
        (lambda: asian(fixings=12), ArgumentError, "use n_steps=72"),
        (lambda: asian(fixings=0), ArgumentError, "multiple of `fixings`"),
        (lambda: basket(weights=()), ArgumentError, "`weights`"),
    ],
)
def test_options_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_parameter_that_does_not_matter_has_derivative_zero():
    known = Known.from_formulas(gbm().problem, exact=mean_of_gbm)
    value, gradient = known.answers(wrt=("mu", "sigma"))
    torch.testing.assert_close(gradient["mu"], value)
    assert float(gradient["sigma"]) == 0.0


def mean_of_gbm(p, T):
    return p["x0"] * torch.exp(p["mu"] * T)
