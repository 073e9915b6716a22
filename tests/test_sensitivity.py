"""The gradient methods against each other, against plain autograd, against differences, and against exact numbers.

Here the noise is the same on both sides, so nothing is statistical except where a test says so. Rounding bounds: the
methods differentiate one and the same arithmetic and reach 1e-15 relative; 1e-11 leaves room for longer sums.
"""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from measure import adjoint_errors
from problems import (
    CPU,
    F64,
    GBM,
    NOISE_DIM,
    OU,
    D,
    by_path,
    gauss_hermite,
    gbm_diffusion,
    gbm_drift,
    plain_gradients,
    plain_paths,
    scalar,
    slope,
    smooth,
    smooth_functional,
    smooth_start,
    terminal,
    worst,
    wrt_all,
)
from torch import nn

from sdesens import SDE, Philox, Problem, as_sde, sdeint, sensitivity, to_ito, with_running_integral
from sdesens.errors import (
    ArgumentError,
    JumpError,
    JumpWarning,
    NonFiniteError,
    SlowPathWarning,
    ZeroGradientWarning,
)
from sdesens.sensitivity import METHODS, adjoint, finite_difference, forward, pathwise, torchsde_adjoint
from sdesens.sensitivity.tile import Tile

ROUNDING = 1e-11
COUNT, GROUP = 12, 4
NOISE = Philox(5)
ONE_THING = ("pathwise", "forward", "adjoint", "torchsde_adjoint", "finite_difference")


def tile_of(problem, noise_dim, *, count=COUNT, group=GROUP, noise=NOISE, vectorised=True):
    return Tile(problem, noise, 0, count, group, noise_dim, vectorised)


def reference(problem, noise_dim):
    theta = problem.leaves(wrt_all(problem))
    return theta, plain_gradients(problem, theta, by_path(NOISE, problem, COUNT, noise_dim))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("noise_type", list(NOISE_DIM))
def test_every_exact_method_is_the_derivative_of_the_scheme(noise_type, seed):
    problem, m = smooth(noise_type, seed), NOISE_DIM[noise_type]
    theta, plain = reference(problem, m)
    tile = tile_of(problem, m)
    swept = pathwise(tile, theta)
    assert set(swept.gradients) == {*problem.sde.params, "y0", "t1"}
    assert all(plain[k].abs().max() > 1e-3 for k in plain)  # a gradient of zero would test nothing
    assert worst(swept.gradients, plain) < ROUNDING
    tangents = forward(tile, theta, strategy="jacobians")
    assert tangents.gradients["A"].shape == (COUNT, D, D)
    assert worst(tangents.gradients, plain) < ROUNDING
    # central differences at the cube root of the rounding unit: truncation and cancellation are both near 1e-10
    assert worst(finite_difference(tile, theta).gradients, plain) < 1e-6
    z = by_path(NOISE, problem, COUNT, m)
    values = smooth_functional(plain_paths(problem, {}, z), problem.sde.params)
    for found in (swept, tangents):
        assert torch.allclose(found.values, values, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("noise_type", list(NOISE_DIM))
def test_both_ways_to_carry_the_tangent_agree(noise_type):
    problem, m = smooth(noise_type, 1, n_steps=9, outputs=(0, 5, 9)), NOISE_DIM[noise_type]
    theta, plain = reference(problem, m)
    tile = tile_of(problem, m)
    assert worst(forward(tile, theta, strategy="directions").gradients, plain) < ROUNDING
    assert worst(forward(tile, theta, strategy="jacobians").gradients, plain) < ROUNDING


@pytest.mark.parametrize("noise_type", ["diagonal", "scalar", "general"])
def test_a_corrected_drift_is_differentiated_too(noise_type):
    """Stratonovich equations: the drift holds a derivative of the diffusion, and the methods differentiate that again."""
    ito = smooth(noise_type, 1, n_steps=5, outputs=(0, 2, 5))
    problem, m = replace(ito, sde=to_ito(replace(ito.sde, sde_type="stratonovich"))), NOISE_DIM[noise_type]
    theta, plain = reference(problem, m)
    tile = tile_of(problem, m)
    assert worst(pathwise(tile, theta).gradients, plain) < ROUNDING
    assert worst(forward(tile, theta, strategy="jacobians").gradients, plain) < ROUNDING
    assert worst(forward(tile, theta, strategy="directions").gradients, plain) < ROUNDING
    assert worst(finite_difference(tile, theta).gradients, plain) < 1e-6
    assert worst(pathwise(tile_of(ito, m), theta).gradients, plain) > 1e-3  # the correction matters


@pytest.mark.parametrize("noise_type", ["scalar", "general"])
@pytest.mark.parametrize("n_steps", [1, 5, 40])
def test_checkpoints_do_not_change_the_bits(noise_type, n_steps):
    problem = smooth(noise_type, 0, n_steps=n_steps, outputs=tuple(sorted({0, n_steps // 3, n_steps})))
    tile, theta = tile_of(problem, NOISE_DIM[noise_type]), problem.leaves(wrt_all(problem))
    kept, thinned = pathwise(tile, theta), pathwise(tile, theta, budget=0)
    assert torch.equal(kept.values, thinned.values)
    for k in theta:
        assert torch.equal(kept.gradients[k], thinned.gradients[k])


@pytest.mark.parametrize(
    "outputs", [(0, 17), (0, 1, 17), (0, 16, 17), (0, 4, 8, 12, 16, 17), (0, 7, 8, 9, 17), tuple(range(18))]
)
def test_wherever_the_functional_looks(outputs):
    problem = smooth("general", 2, n_steps=17, outputs=outputs)
    theta, plain = reference(problem, 2)
    tile = tile_of(problem, 2)
    assert worst(pathwise(tile, theta).gradients, plain) < ROUNDING
    assert worst(pathwise(tile, theta, budget=0).gradients, plain) < ROUNDING
    assert worst(forward(tile, theta).gradients, plain) < ROUNDING


def test_initial_state_computed_from_parameters():
    problem = smooth("scalar", 1, y0=smooth_start)
    theta, plain = reference(problem, 1)
    tile = tile_of(problem, 1)
    assert worst(pathwise(tile, theta).gradients, plain) < ROUNDING
    assert worst(forward(tile, theta, strategy="jacobians").gradients, plain) < ROUNDING
    assert worst(forward(tile, theta, strategy="directions").gradients, plain) < ROUNDING
    frozen = replace(problem, y0=smooth_start(problem.sde.params))  # the same path, without the dependence
    assert worst(pathwise(tile_of(frozen, 1), theta).gradients, plain) > 1e-2


def test_states_that_are_matrices():
    def drift(t, y, p):
        return torch.tanh(torch.einsum("ij,bjk->bik", p["A"], y)) + p["v"] * torch.sin(t)

    def diffusion(t, y, p):
        return 0.3 * torch.cos(y * p["v"]) + 0.2 * t

    A, v = torch.tensor([[0.3, -1.0], [0.8, 0.5]], dtype=F64), torch.linspace(-1.0, 1.0, 6, dtype=F64).reshape(2, 3)
    y0 = torch.linspace(0.2, 1.0, 6, dtype=F64).reshape(2, 3)
    sde = SDE(drift, diffusion, {"A": A, "v": v})
    problem = Problem(sde, lambda ys, p: (ys[-1] * ys[1]).sum((1, 2)), y0, (0.0, 0.5, 1.0), 6)
    theta, plain = reference(problem, 6)
    tile = tile_of(problem, 6)
    for strategy in ("directions", "jacobians"):
        assert worst(forward(tile, theta, strategy=strategy).gradients, plain) < ROUNDING
    assert worst(pathwise(tile, theta).gradients, plain) < ROUNDING
    assert worst(finite_difference(tile, theta).gradients, plain) < 1e-6
    fine, direct = problem.with_steps(64), {k: v for k, v in theta.items() if k != "t1"}
    exact = pathwise(tile_of(fine, 6), direct).gradients
    for method in (adjoint, torchsde_adjoint):  # their own error, O(sqrt dt): 1/8 here
        assert worst(method(tile_of(fine, 6), direct).gradients, exact) < 0.1


@pytest.mark.parametrize("noise_type", list(NOISE_DIM))
def test_single_precision(noise_type):
    double, m = smooth(noise_type, 0), NOISE_DIM[noise_type]
    sde = replace(double.sde, params={k: v.float() for k, v in double.sde.params.items()})
    single = replace(double, sde=sde, y0=double.y0.float())
    theta, theta32 = double.leaves(wrt_all(double)), single.leaves(wrt_all(single))
    exact, tile = pathwise(tile_of(double, m), theta).gradients, tile_of(single, m)
    assert theta32["t1"].dtype == F64  # the horizon stays exact
    found = {
        "pathwise": pathwise(tile, theta32),
        "jacobians": forward(tile, theta32, strategy="jacobians"),
        "directions": forward(tile, {k: theta32[k] for k in ("s", "y0", "t1")}, strategy="directions"),
        "differences": finite_difference(tile, theta32),
    }
    for name, contributions in found.items():
        assert contributions.values.dtype == torch.float32
        for k, g in contributions.gradients.items():
            assert g.dtype == F64, name
            g = g.unflatten(0, (COUNT // GROUP, -1)).mean(1)
            # 21 steps of rounding units 6e-8; the differences lose the two thirds of the digits that they always lose
            bound = 1e-2 if name == "differences" else 1e-5
            assert float((g - exact[k]).abs().max() / exact[k].abs().max()) < bound, (name, k)
    assert worst(pathwise(tile, theta32).gradients, exact) > 1e-10  # it really was single precision


def test_layout_of_a_parameter_does_not_matter():
    problem = smooth("general", 0, n_steps=5, outputs=(0, 5))
    A = problem.sde.params["A"]
    turned = replace(problem, sde=problem.sde.with_params(A=A.mT.contiguous().mT))
    theta, plain = reference(problem, 2)
    tile = tile_of(turned, 2)
    theta = turned.leaves(wrt_all(turned))
    assert not theta["A"].is_contiguous()
    for strategy in ("directions", "jacobians"):
        assert worst(forward(tile, theta, strategy=strategy).gradients, plain) < ROUNDING
    assert worst(pathwise(tile, theta).gradients, plain) < ROUNDING
    assert worst(finite_difference(tile, theta).gradients, plain) < 1e-6


def adjoint_by_hand(problem, z, *, transposed=True, left=True):
    """d/d(A, y0) of one path by lambda_n = J_n' lambda_{n+1}; z (N, 1, m), a functional of the last state only."""
    p, h = dict(problem.sde.params), problem.step_size({})

    def step(n, y, A):
        q = {**p, "A": A}
        t = problem.t0 + n * h
        g = problem.sde.diffusion(t, y[None], q)[0]
        return y + problem.sde.drift(t, y[None], q)[0] * h + g @ (h.sqrt() * z[n, 0])

    ys = [problem.y0]
    for n in range(problem.n_steps):
        ys.append(step(n, ys[-1], p["A"]))

    def value(y, A):
        return problem.functional(torch.stack([problem.y0, y])[:, None], {**p, "A": A})[0]

    lam, A_bar = torch.func.grad(value, argnums=(0, 1))(ys[-1], p["A"])
    for n in reversed(range(problem.n_steps)):
        J, J_A = torch.func.jacrev(lambda y, A, n=n: step(n, y, A), argnums=(0, 1))(ys[n if left else n + 1], p["A"])
        A_bar = A_bar + torch.einsum("i,ijk->jk", lam, J_A)
        lam = (J.T if transposed else J) @ lam
    first = torch.func.grad(lambda y0: problem.functional(torch.stack([y0, ys[-1]])[:, None], p)[0])(problem.y0)
    return {"A": A_bar[None], "y0": (lam + first)[None]}


def test_discrete_adjoint_by_hand_and_its_two_classic_errors():
    problem = smooth("general", 1, n_steps=12, outputs=(0, 12))
    z = by_path(NOISE, problem, 1, 2)
    found = pathwise(tile_of(problem, 2, count=1, group=1), problem.leaves(("A", "y0"))).gradients
    assert worst(found, adjoint_by_hand(problem, z)) < ROUNDING
    # negative controls: a Jacobian not transposed, and one taken at the right end of its step
    assert worst(found, adjoint_by_hand(problem, z, transposed=False)) > 1e-2
    assert worst(found, adjoint_by_hand(problem, z, left=False)) > 1e-2


# Exact numbers without sampling


@pytest.mark.parametrize("method", ["pathwise", "forward", "finite_difference"])
@pytest.mark.parametrize("power", [1, 2])
def test_quadrature_paths_give_the_exact_gradient_of_the_chain(method, power):
    model = GBM(n_steps=5, sigma=0.4)
    noise = gauss_hermite(3, 5)  # degree 5 in each normal; X_5^2 has degree 2
    result = sensitivity(
        model.problem(power), n_paths=3**5, method=method, noise=noise, wrt=("mu", "sigma", "y0", "t1")
    )
    exact = model.scheme(power)
    # sums of 243 numbers of order 1; differences lose two thirds of the digits
    bound = 1e-8 if method == "finite_difference" else 1e-13
    assert float(result.value.mean) == pytest.approx(exact["value"], rel=1e-13)
    for name, estimate in result.gradient.items():
        assert estimate.mean.flatten().item() == pytest.approx(exact[name], rel=bound, abs=bound)
        assert math.isnan(estimate.standard_error.flatten().item())  # nothing was sampled
    assert math.isnan(float(result.value.standard_error))


@pytest.mark.parametrize("method", ["pathwise", "forward"])
def test_quadrature_paths_on_ornstein_uhlenbeck(method):
    model = OU(n_steps=6)
    result = sensitivity(
        model.problem(2), n_paths=2**6, method=method, noise=gauss_hermite(2, 6), wrt=("kappa", "m", "sigma", "y0")
    )
    for name, (mean, _) in model.exact(2).items():
        found = result.value if name == "value" else result.gradient[name]
        assert found.mean.flatten().item() == pytest.approx(mean, rel=1e-13)


def test_one_path_of_geometric_brownian_motion_by_hand():
    """Per path: X = x0 prod(1 + mu h + sigma dW), so each derivative is X times a sum of ratios."""
    model = GBM(n_steps=7)
    problem = model.problem()
    theta = problem.leaves(("mu", "sigma", "y0", "t1"))
    h, z = model.t1 / 7, by_path(NOISE, problem, COUNT, 1)[:, :, 0]
    factors = 1 + model.mu * h + model.sigma * math.sqrt(h) * z
    x = model.x0 * factors.prod(0)
    by_hand = {
        "mu": x * (h / factors).sum(0),
        "sigma": x * (math.sqrt(h) * z / factors).sum(0),
        "y0": (x / model.x0)[:, None],
        "t1": x * ((model.mu + model.sigma * z / (2 * math.sqrt(h))) / 7 / factors).sum(0),
    }
    found = forward(tile_of(problem, 1), theta).gradients
    for k, g in by_hand.items():
        assert torch.allclose(found[k], g, rtol=1e-13, atol=1e-14)


def test_rescaled_time_is_the_same_path():
    """(b, s, T) -> (c b, sqrt(c) s, T / c) with the same normals: one Euler-Maruyama path, gradients scaled by hand."""
    c, model = 2.7, GBM(n_steps=12)
    scaled = replace(model, mu=c * model.mu, sigma=math.sqrt(c) * model.sigma, t1=model.t1 / c)
    a, b = (
        forward(tile_of(m.problem(2), 1), m.problem(2).leaves(("mu", "sigma", "y0", "t1"))) for m in (model, scaled)
    )
    assert torch.allclose(a.values, b.values, rtol=1e-13)
    for name, factor in (("mu", c), ("sigma", math.sqrt(c)), ("y0", 1.0), ("t1", 1 / c)):
        assert torch.allclose(a.gradients[name], factor * b.gradients[name], rtol=1e-12, atol=1e-14)


def test_call_minus_put_is_the_forward_on_every_path():
    problem = GBM(n_steps=9).problem()

    def gradients(functional):
        return forward(tile_of(replace(problem, functional=functional), 1), problem.leaves(("mu", "sigma", "y0")))

    call = gradients(lambda ys, p: torch.relu(ys[-1, :, 0] - 1.3)).gradients
    put = gradients(lambda ys, p: torch.relu(1.3 - ys[-1, :, 0])).gradients
    line = gradients(terminal).gradients
    assert 0 < int((call["mu"] != 0).sum()) < COUNT  # both sides of the strike occur
    for k in line:
        assert torch.allclose(call[k] - put[k], line[k], rtol=1e-13, atol=1e-15)


# The continuous adjoint


STEPS = (16, 64, 256)


def test_adjoint_falls_towards_the_pathwise_gradient():
    problem = GBM(mu=0.1, sigma=0.5, x0=1.0).problem()
    errors = adjoint_errors(problem, 1, 400, STEPS, ("mu", "sigma", "t1"))
    for name, e in errors.items():
        assert slope(STEPS, e) > 0.45, (name, e)  # order 1/2, with 5 % for the fit at 400 paths
    assert errors["mu"][-1] < 0.02  # 256 steps, volatility 0.5: 1.3 % and 3.7 % are to be expected
    assert errors["sigma"][-1] < 0.06


def test_adjoint_without_its_correction_is_wrong_at_every_step():
    problem = GBM(mu=0.1, sigma=0.5, x0=1.0).problem()
    errors = adjoint_errors(problem, 1, 400, STEPS, ("mu", "sigma"), corrected=False)
    for name, e in errors.items():
        assert abs(slope(STEPS, e)) < 0.1, (name, e)
        assert e[-1] > 0.1
    fine = problem.with_steps(256)
    tile, theta = tile_of(fine, 1, count=4000, group=4000), fine.leaves(("mu",))
    ratio = float(adjoint(tile, theta, corrected=False).gradients["mu"] / pathwise(tile, theta).gradients["mu"])
    s2 = 0.25
    # known in closed form; sampling error of the ratio is below 1 % at 4000 paths
    assert ratio == pytest.approx((1 - math.exp(-s2)) / s2, abs=0.02)


@pytest.mark.parametrize("noise_type", ["diagonal", "scalar", "additive", "general"])
def test_adjoint_on_coupled_problems_with_a_running_integral(noise_type):
    """Non-commuting noise, time-dependent coefficients, looks in mid-path, an integral, the horizon: all at once."""
    base = smooth(noise_type, 1, n_steps=16, outputs=(0, 8, 16), span=0.8)

    def functional(ys, p):
        return smooth_functional(ys[..., :D], p) + torch.sin(ys[-1, :, D]) * p["s"]

    sde = with_running_integral(base.sde, lambda t, y, p: (y**2).sum(1) * p["s"] + torch.cos(t))
    problem = Problem(sde, functional, torch.cat((base.y0, torch.zeros(1, dtype=F64))), base.ts, 16)
    m = NOISE_DIM[noise_type] + (noise_type == "diagonal")  # the integral's own noise is zero
    steps = (16, 64, 256)
    wrt = (*sde.params, "y0", "t1")
    errors = adjoint_errors(problem, m, 40, steps, wrt)
    for name, e in errors.items():
        assert slope(steps, e) > 0.35, (name, e)  # order 1/2 fitted to 40 paths; the negative control below has 0
    if noise_type == "additive":
        return  # nothing to correct
    wrong = adjoint_errors(problem, m, 40, steps, ("s",), corrected=False)
    assert slope(steps, wrong["s"]) < 0.2, wrong


@pytest.mark.parametrize("noise_type", ["diagonal", "scalar", "additive", "general"])
def test_torchsde_converges_to_the_same_gradient(noise_type):
    problem = smooth(noise_type, 1, n_steps=16, outputs=(0, 8, 16), span=0.8)
    wrt = (*problem.sde.params, "y0")
    steps = (16, 128)
    theirs = adjoint_errors(problem, NOISE_DIM[noise_type], 20, steps, wrt, torchsde_adjoint)
    ours = adjoint_errors(problem, NOISE_DIM[noise_type], 20, steps, wrt)
    for name in wrt:
        # both are O(sqrt dt) from the pathwise gradient: over a factor 8 that is 2.8; 20 paths leave room for 1.7
        assert theirs[name][1] < theirs[name][0] / 1.7, (name, theirs[name])
        assert theirs[name][1] < 0.15
        assert ours[name][1] < 0.15


def test_torchsde_does_not_do_the_horizon():
    problem = GBM(n_steps=4).problem()
    with pytest.raises(ArgumentError, match="t1"):
        torchsde_adjoint(tile_of(problem, 1), problem.leaves(("t1",)))


# Finite differences


def test_difference_error_is_quadratic_in_the_step():
    problem = smooth("scalar", 0)
    theta = problem.leaves(("A", "s", "t1"))
    exact = pathwise(tile_of(problem, 1), theta).gradients
    errors = [
        worst(
            {
                k: g.unflatten(0, (3, 4)).mean(1)
                for k, g in finite_difference(tile_of(problem, 1), theta, relative_step=h).gradients.items()
            },
            exact,
        )
        for h in (4e-2, 2e-2, 1e-2)
    ]
    assert slope((1, 2, 4), errors) == pytest.approx(2.0, abs=0.1)  # smooth: the next term is O(h^4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_at_a_parameter_that_is_zero(dtype):
    sde = SDE(gbm_drift, gbm_diffusion, {"mu": torch.zeros((), dtype=dtype), "sigma": torch.tensor(0.3, dtype=dtype)})
    problem = Problem(sde, terminal, torch.ones(1, dtype=dtype), (0.0, 1.0), 8)
    theta = problem.leaves(("mu",))
    tile = tile_of(problem, 1, count=400, group=400)
    found = finite_difference(tile, theta).gradients["mu"].mean()
    exact = pathwise(tile, theta).gradients["mu"].mean()
    # truncation and rounding are both near eps^(2/3): 2e-5 and 4e-11, times constants of order 1
    assert float(found) == pytest.approx(float(exact), rel=2e-4 if dtype == torch.float32 else 1e-9)


# Functions that torch.func cannot see through


def _in_place_drift(t, y, p):
    out = torch.zeros(y.shape, dtype=y.dtype)
    out[:, 0] = p["a"] * y[:, 1]
    out[:, 1] = torch.sin(y[:, 0]) - p["a"]
    return out


def _in_place_diffusion(t, y, p):
    out = torch.empty(y.shape, dtype=y.dtype)
    for i in range(2):
        out[:, i] = p["s"][i] * torch.cos(y[:, i])
    return out


def _branching_functional(ys, p):
    if float(ys.detach().sum()) > 1e9:  # looks at a value
        return ys[-1, :, 0]
    return ys[-1, :, 0] * ys[-1, :, 1]


def _drift(t, y, p):
    return torch.stack((p["a"] * y[:, 1], torch.sin(y[:, 0]) - p["a"]), 1)


def _diffusion(t, y, p):
    return p["s"] * torch.cos(y)


def _functional(ys, p):
    return ys[-1, :, 0] * ys[-1, :, 1]


@pytest.mark.parametrize("method", ONE_THING)
@pytest.mark.parametrize("awkward", ["coefficients", "functional"])
def test_functions_that_cannot_be_vectorised_take_the_slow_path_to_the_same_numbers(method, awkward):
    params = {"a": scalar(0.7), "s": torch.tensor([0.3, 0.5], dtype=F64)}
    y0 = torch.tensor([0.3, 0.8], dtype=F64)
    plain = Problem(SDE(_drift, _diffusion, params), _functional, y0, (0.0, 1.0), 6)
    if awkward == "coefficients":
        slow = replace(plain, sde=SDE(_in_place_drift, _in_place_diffusion, params))
    else:
        slow = replace(plain, functional=_branching_functional)
    wrt = ("a", "s", "y0")
    expected = sensitivity(plain, n_paths=40, method=method, wrt=wrt)
    # central differences do not go through vmap
    with nullcontext() if method == "finite_difference" else pytest.warns(SlowPathWarning):
        found = sensitivity(slow, n_paths=40, method=method, wrt=wrt)
    for k in wrt:
        # the same arithmetic in another order; differences amplify its rounding by the inverse of their step
        bound = 1e-8 if method == "finite_difference" else 1e-11
        assert torch.allclose(found.gradient[k].mean, expected.gradient[k].mean, rtol=bound, atol=bound)
        assert torch.allclose(found.gradient[k].standard_error, expected.gradient[k].standard_error, rtol=1e-6)


# Jumps


def _digital(ys, p):
    x = ys[-1, :, 0]
    return torch.where(x > 1.3, torch.ones_like(x), torch.zeros_like(x)) + 0 * x


@pytest.mark.parametrize("method", ["pathwise", "forward", "adjoint"])
def test_a_jump_is_reported_and_not_passed_off_as_zero(method):
    problem = replace(GBM(n_steps=4).problem(), functional=_digital)
    with pytest.raises(JumpError, match="apply: 'vibrato', 'malliavin', 'likelihood_ratio'; method='auto'"):
        sensitivity(problem, n_paths=200, method=method)
    with pytest.warns(ZeroGradientWarning, match="sigma"), pytest.warns(JumpWarning, match="misses it"):
        result = sensitivity(problem, n_paths=200, method=method, audit="allow")
    assert float(result.gradient["mu"].mean) == 0.0


def test_wide_differences_see_a_jump():
    model = GBM(n_steps=1)
    problem = replace(model.problem(), functional=_digital)
    tile = tile_of(problem, 1, count=200_000, group=200_000)
    found = finite_difference(tile, problem.leaves(("mu",)), relative_step=0.5).gradients["mu"]
    d = (model.x0 * (1 + model.mu) - 1.3) / (model.x0 * model.sigma)
    exact = math.exp(-d * d / 2) / math.sqrt(2 * math.pi) / model.sigma  # one Gaussian step
    # z below 4 (false alarm 6e-5); a step of 0.04 in mu leaves a truncation error below 1 %
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / math.sqrt(200_000) + 0.01 * exact


# Torch modules


class Net(nn.Module):
    noise_type, sde_type = "general", "ito"

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inner, self.outer, self.spread = nn.Linear(2, 5), nn.Linear(5, 2), nn.Linear(2, 6)
        self.double()
        with torch.no_grad():
            for w in self.parameters():
                w.copy_(0.5 * torch.randn(w.shape, generator=generator, dtype=F64))

    def f(self, t, y):
        return self.outer(torch.tanh(self.inner(y) + t))

    def g(self, t, y):
        return 0.3 * torch.tanh(self.spread(y)).unflatten(1, (2, 3))


@pytest.mark.parametrize("method", ["pathwise", "forward"])
def test_a_module_gets_the_gradient_that_autograd_gives_its_parameters(method):
    net, y0, n = Net(), torch.tensor([0.4, -0.2], dtype=F64), 60
    ys = sdeint(net, y0.expand(n, 2), (0.0, 0.5, 1.0), n_steps=10, bm=NOISE)
    (ys[-1].prod(1) + ys[1, :, 0]).mean().backward()
    problem = Problem(as_sde(net), lambda ys, p: ys[-1].prod(1) + ys[1, :, 0], y0, (0.0, 0.5, 1.0), 10)
    result = sensitivity(problem, n_paths=n, noise=NOISE, method=method)
    assert set(result.gradient) == set(dict(net.named_parameters()))
    for name, w in net.named_parameters():
        assert torch.allclose(result.gradient[name].mean, w.grad, rtol=1e-11, atol=1e-13)
        assert w.grad.abs().max() > 1e-4


# Paths that break


def _explosive(t, y, p):
    return p["a"] * y**3


@pytest.mark.parametrize("method", [m for m in METHODS if m != "conditional"])  # which the functional does not declare
def test_a_path_that_blows_up_is_named(method):
    params = {"a": scalar(40.0), "sigma": scalar(0.1)}
    problem = Problem(SDE(_explosive, gbm_diffusion, params), terminal, torch.ones(1, dtype=F64), (0.0, 1.0), 20)
    with pytest.raises(NonFiniteError) as caught:
        METHODS[method](tile_of(problem, 1), problem.leaves(("a",)))
    assert caught.value.n_bad == COUNT
    assert caught.value.step is not None
    z = by_path(NOISE, problem, COUNT, 1)
    y = torch.ones(COUNT, 1, dtype=F64)
    for n in range(caught.value.step):
        assert bool(torch.isfinite(y).all())
        y = y + 40.0 * y**3 * 0.05 + 0.1 * y * math.sqrt(0.05) * z[n]
    assert not bool(torch.isfinite(y).all())


def test_noise_of_the_tile_starts_at_its_first_path():
    problem = GBM(n_steps=6).problem()
    theta = problem.leaves(("sigma",))
    all_paths = forward(tile_of(problem, 1), theta).gradients["sigma"]
    part = forward(Tile(problem, NOISE, 4, 8, 4, 1), theta).gradients["sigma"]
    assert torch.equal(part, all_paths[4:])
    z = NOISE.normals(4, 8, 0, 6, 1, dtype=F64, device=CPU)
    assert torch.equal(z, by_path(NOISE, problem, COUNT, 1)[:, 4:])
