"""An equation with a scheme of its own: it is used everywhere that a path is made or differentiated, and refused elsewhere."""

import math
import os
import pickle
import shutil
from dataclasses import replace

import pytest
import torch

from sdesens import SDE, Philox, Problem, sdeint, sensitivity, to_ito, to_stratonovich, with_running_integral
from sdesens.errors import (
    ArgumentTypeError,
    CalculusError,
    DtypeError,
    MethodError,
    NotAFunctionError,
    ShapeError,
)
from sdesens.integrate import euler, scheme
from sdesens.integrate.kernel import _identity
from sdesens.models import cir_lamperti
from sdesens.sensitivity import adjoint, forward, pathwise, torchsde_adjoint
from sdesens.sensitivity.tile import Tile

D = torch.float64
NEAR = {"kappa": 1.0, "theta": 0.04, "x0": 0.04, "t1": 1.0}  # with sigma: 2 kappa theta / sigma^2 = .08 / sigma^2


def near(ratio: float, **options):
    """The process at this value of 2 kappa theta / sigma^2."""
    return cir_lamperti(**NEAR, sigma=math.sqrt(0.08 / ratio), **options)


def decay(t, y, p):
    return -p["k"] * y


def unit_noise(t, y, p):
    return p["s"].expand_as(y)


def implicit(sde, p, t, dt, y, dW):
    """Implicit Euler for `decay`."""
    return (y + p["s"] * dW) / (1 + p["k"] * dt)


def twice(sde, p, t, dt, y, dW):
    """Two Euler-Maruyama steps of half the length, the noise in the first."""
    half = 0.5 * dt
    y = euler.step(sde, p, t, half, y, dW)
    return y + sde.drift(t + half, y, p) * half


def relaxing(step=implicit, **options) -> SDE:
    params = {"k": torch.tensor(1.2, dtype=D), "s": torch.tensor(0.4, dtype=D)}
    return SDE(decay, unit_noise, params, step=step, **options)


def last(ys, p):
    return ys[-1, :, 0]


def square_of_last(ys, p):
    return ys[-1].square().sum(-1)


def problem(step=implicit, n_steps=20) -> Problem:
    return Problem(relaxing(step), square_of_last, torch.tensor([1.0], dtype=D), (0.0, 0.6, 1.0), n_steps)


def test_the_step_is_taken():
    """Implicit Euler on a linear equation, written out."""
    sde, h, z = relaxing(), 0.05, Philox(2).normals(0, 3, 0, 20, 1, dtype=D, device=torch.device("cpu"))
    y = torch.ones(3, 1, dtype=D)
    for n in range(20):
        y = (y + 0.4 * math.sqrt(h) * z[n]) / (1 + 1.2 * h)
    found = sdeint(sde, torch.ones(3, 1, dtype=D), (0.0, 1.0), n_steps=20, bm=Philox(2))[-1]
    torch.testing.assert_close(found, y, rtol=1e-14, atol=0)  # rounding
    plain = sdeint(replace(sde, step=None), torch.ones(3, 1, dtype=D), (0.0, 1.0), n_steps=20, bm=Philox(2))[-1]
    assert (found - plain).abs().max() > 1e-3


def test_euler_as_a_step_of_its_own_changes_nothing():
    runs = [sensitivity(problem(step), n_paths=100, seed=1) for step in (euler.step, None)]
    for k in ("k", "s"):
        assert torch.equal(runs[0].gradient[k].mean, runs[1].gradient[k].mean)


def test_a_step_sees_the_parameters_of_the_moment_and_pickles():
    sde = relaxing(twice).with_params(k=torch.tensor(0.0, dtype=D))
    assert sde.step is twice
    again = pickle.loads(pickle.dumps(sde))
    assert again.step is twice
    assert again.params["k"] == 0.0
    ys = sdeint(again, torch.ones(2, 1, dtype=D), (0.0, 1.0), n_steps=4, bm=torch.zeros(4, 2, 1, dtype=D))
    assert torch.equal(ys[-1], torch.ones(2, 1, dtype=D))  # neither decay nor noise


def integrand(t, y, p):
    return p["k"] * y[:, 0] + t


@pytest.mark.parametrize("step", [implicit, twice])
def test_a_running_integral_goes_by_left_points_beside_the_step(step):
    sde = relaxing(step)
    both = with_running_integral(sde, integrand)
    h, n = 0.1, 10
    ts = [h * k for k in range(n)] + [1.0]
    ys = sdeint(both, torch.tensor([[1.0, 0.0]], dtype=D).expand(5, 2), ts, n_steps=n, bm=with_silent(Philox(4), n))
    alone = sdeint(sde, torch.ones(5, 1, dtype=D), ts, n_steps=n, bm=Philox(4))
    torch.testing.assert_close(ys[..., :1], alone, rtol=1e-14, atol=0)  # rounding
    rates = 1.2 * alone[:-1, :, 0] + h * torch.arange(n, dtype=D)[:, None]
    torch.testing.assert_close(ys[-1, :, 1], h * rates.sum(0), rtol=1e-13, atol=0)
    assert pickle.loads(pickle.dumps(both)).step.step is step


def with_silent(noise, n_steps: int) -> torch.Tensor:
    """Increments of the noise, and zeros for the Brownian motion that diagonal noise has for the integral."""
    z = noise.normals(0, 5, 0, n_steps, 1, dtype=D, device=torch.device("cpu")) / math.sqrt(n_steps)
    return torch.cat((z, torch.zeros_like(z)), -1)


@pytest.mark.parametrize(
    "known",
    [near(0.65, n_steps=24), near(0.65, n_steps=24, u=5.0), near(4.5, n_steps=24, bond=True)],
    ids=["mean", "laplace", "bond"],
)
def test_reverse_forward_and_differences_agree(known):
    q = known.problem
    theta = q.leaves(("kappa", "theta", "sigma", "x0", "t1"))
    tile = Tile(q, Philox(3), 0, 64, 1, 1)
    reverse = pathwise(tile, theta).gradients
    for strategy in ("directions", "jacobians"):
        ahead = forward(tile, theta, strategy=strategy).gradients
        for k, g in ahead.items():
            torch.testing.assert_close(
                g, reverse[k], rtol=1e-11, atol=1e-12 * float(reverse[k].abs().max())
            )  # rounding
    runs = {
        m: sensitivity(q, method=m, wrt=tuple(theta), n_paths=500, seed=5) for m in ("pathwise", "finite_difference")
    }
    for k, estimate in runs["pathwise"].gradient.items():
        other = runs["finite_difference"].gradient[k].mean
        torch.testing.assert_close(estimate.mean, other, rtol=1e-6, atol=1e-6 * float(other.abs()))


def test_a_path_stays_positive_where_euler_does_not():
    known = near(0.51, n_steps=8)
    ys = sdeint(known.problem.sde, torch.full((2000, 1), 0.2, dtype=D), (0.0, 1.0), n_steps=8, seed=1)
    assert bool((ys > 0).all())
    x = ys[-1, :, 0].square()
    assert bool((x < 1e-4).any())  # it comes near


@pytest.mark.parametrize(("ratio", "bias"), [(0.65, -0.0065), (0.55, -0.0125)])
def test_the_mean_does_not_depend_on_sigma_but_for_the_bias_of_the_grid(ratio, bias):
    """64 steps; the exact derivative is 0. The bias is known to half a unit of 5e-4, the run to 5e-4: z < 4, two looks."""
    known = near(ratio, n_steps=64)
    result = sensitivity(known.problem, n_paths=100_000, seed=1, compile=False)
    found = result.gradient["sigma"]
    assert abs(found.mean - bias) < 4 * found.standard_error + 5e-4
    assert found.mean < -8 * found.standard_error  # the bias is real
    value, gradient = known.answers()
    assert gradient["sigma"] == 0
    assert abs(result.value.mean - value) < 1e-3  # the bias of the mean itself


def test_the_bias_goes_away_with_the_step():
    """Far from the boundary: weak order 1, so twice the coupled difference takes it off. Four numbers and five looks a run."""
    for options in ({}, {"u": 5.0}, {"bond": True}):
        known = cir_lamperti(n_steps=16, **options)
        result = sensitivity(known.problem, n_paths=20_000, seed=13, bias=True)
        value, gradient = known.answers()
        pairs = {"value": (result.value, value), **{k: (result.gradient[k], g) for k, g in gradient.items()}}
        for name, (estimate, expected) in pairs.items():
            bias = result.bias[name]
            spread = torch.hypot(estimate.standard_error, bias.standard_error)
            assert abs(estimate.mean - bias.mean - expected) < 4.5 * spread, (options, name)


def test_a_step_from_far_below_zero_loses_no_digits():
    """Y' solves c Y'^2 - b Y' - q / (4 c) = 0; where b is negative the textbook root would be all cancellation."""
    q = cir_lamperti()
    p, dt = q.problem.params({}), torch.tensor(0.01, dtype=D)
    y, dW = torch.full((3, 1), 0.2, dtype=D), torch.tensor([[-1e6], [-30.0], [30.0]], dtype=D)
    moved = scheme.step(q.problem.sde, p, torch.tensor(0.0, dtype=D), dt, y, dW)
    b, c = y + 0.1 * dW, 1 + 0.5 * 1.5 * 0.01
    residual = c * moved - b - 0.01 * (4 * 1.5 * 0.06 - 0.04) / 8 / moved
    torch.testing.assert_close(residual / b, torch.zeros_like(b), rtol=0, atol=1e-14)
    assert bool((moved > 0).all())


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_compiled_numbers_are_the_same():
    known = near(0.65, n_steps=10)
    runs = [sensitivity(known.problem, n_paths=4096, seed=2, compile=how) for how in (False, True)]
    for k, estimate in runs[0].gradient.items():
        torch.testing.assert_close(runs[1].gradient[k].mean, estimate.mean, rtol=1e-11, atol=1e-12)  # rounding
    torch.testing.assert_close(runs[1].value.mean, runs[0].value.mean, rtol=1e-12, atol=0)


def test_kernels_tell_steps_apart():
    identities = {
        _identity(step) for step in (None, implicit, twice, with_running_integral(relaxing(), integrand).step)
    }
    identities |= {_identity(with_running_integral(relaxing(twice), integrand).step)}
    assert len(identities) == 5


def test_other_calculus_is_refused():
    sde = relaxing()
    assert to_ito(sde) is sde  # nothing to do
    with pytest.raises(CalculusError, match="brings a `step` of its own"):
        to_stratonovich(sde)
    with pytest.raises(CalculusError, match="give the 'ito' equation a step made for it"):
        to_ito(relaxing(sde_type="stratonovich"))
    assert to_stratonovich(replace(sde, step=None)).sde_type == "stratonovich"  # the remedy


@pytest.mark.parametrize("method", [adjoint, torchsde_adjoint])
def test_continuous_adjoints_are_refused(method):
    with pytest.raises(MethodError, match=f"method='{method.__name__}' is made for Euler-Maruyama"):
        sensitivity(problem(), method=method.__name__, n_paths=10)
    method(Tile(problem(None), Philox(1), 0, 4, 1, 1), problem(None).leaves())  # and not without a step


def narrow(sde, p, t, dt, y, dW):
    return (y + dW)[:, 0]


def single(sde, p, t, dt, y, dW):
    return (y + dW).float()


def mixing(sde, p, t, dt, y, dW):
    return y + dW - y.mean(0)


def random(sde, p, t, dt, y, dW):
    return y + torch.rand_like(y)


def writing(sde, p, t, dt, y, dW):
    return y.add_(dW)


def nothing(sde, p, t, dt, y, dW):
    return None


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (narrow, ShapeError, "must return the next state"),
        (single, DtypeError, "returned torch.float32"),
        (mixing, NotAFunctionError, "mixes paths"),
        (random, NotAFunctionError, "two different results"),
        (writing, NotAFunctionError, "writes into y"),
        (nothing, ShapeError, "must return a tensor, got NoneType"),
    ],
)
def test_a_bad_step_is_found_before_the_run(step, error, message):
    with pytest.raises(error, match=message):
        sdeint(relaxing(step), torch.ones(3, 1, dtype=D), (0.0, 1.0), n_steps=4, seed=1)
    with pytest.raises(error, match=message):
        sensitivity(problem(step), n_paths=10)


def test_what_is_no_step():
    with pytest.raises(ArgumentTypeError, match="`step` must be a function of \\(sde, p, t, dt, y, dW\\)"):
        relaxing(decay)
    with pytest.raises(ArgumentTypeError, match="got 'milstein'"):
        relaxing("milstein")
