"""Laws: the Euler-Maruyama chain, torch's distributions, the user's own, items and edges.

The authorities are the SDE part on the same noise, closed-form moments, and enumeration.
"""

import math

import pytest
import torch
import torch.distributions as td
from estimator_cases import N11, quadratic, vector
from problems import F64, OU, scalar

from sdesens import SDE, GivenNoise, Problem, sensitivity
from sdesens.estimators import (
    Bernoulli,
    Categorical,
    Normal,
    Reparameterised,
    Sampler,
    compare,
    decompose,
    expectation_gradient,
    surrogate,
)

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


def test_a_problem_in_a_training_loop():
    """The surrogate of a chain carries the graph of the SDE's parameters."""
    k = scalar(0.5).requires_grad_()
    sde = SDE(drift, diffusion, {"k": k, "s": scalar(0.3)})
    problem = Problem(sde, lambda ys, p: ys[-1, :, 0] ** 2, vector(1.0), (0.0, 1.0), 4)
    surrogate(problem, n_samples=500, seed=3).backward()
    result = expectation_gradient(problem, n_samples=500, seed=3, method="pathwise", wrt="k")
    assert k.grad.item() == pytest.approx(result.gradient["k"].mean.item(), rel=1e-12)


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
