"""Functionals: their numbers, their explicit dependence on parameters, what jumps and horizons do to them, and their means
over the last step and between grid points."""

import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec
from torch.func import jvp, vjp, vmap

from sdesens import SDE, Philox, Problem, sdeint, sensitivity
from sdesens.errors import ArgumentError, ArgumentTypeError, MethodError, ShapeError
from sdesens.functionals import (
    AsianCall,
    BarrierCall,
    BasketCall,
    Call,
    ConstantRate,
    Digital,
    Discount,
    FloatingLookback,
    GeometricAsianCall,
    Laplace,
    LookbackCall,
    Moment,
    Put,
    SumOfSquares,
)
from sdesens.models.black_scholes import log_diffusion, log_drift, log_initial, rate
from sdesens.rewrite import with_running_integral

D = torch.float64
EVERY = [
    Moment(3, component=1),
    SumOfSquares(),
    Laplace(0.7),
    Discount(),
    Call(1.0),
    Call("K", component=1, discount=ConstantRate("r", 2.0), log=True),
    Digital("K", discount=Discount()),
    AsianCall(1.1, discount=0.9),
    AsianCall("K", component=1, discount=Discount(0), log=True),
    Put(2.0, component=1, discount=ConstantRate("r", 2.0)),
    Put(6.0, log=True),
    GeometricAsianCall("K", discount=Discount()),
    GeometricAsianCall(3.0, component=1, log=True),
    LookbackCall("K", discount=Discount()),
    LookbackCall(3.0, component=1, log=True),
    FloatingLookback(component=1, discount=ConstantRate("r", 2.0)),
    FloatingLookback(discount=0.5, log=True),
    BasketCall("K", (0.3, 0.6), discount=ConstantRate("r", 2.0)),
    BasketCall(2.0, (0.3, 0.4), log=True, geometric=True),
    BasketCall(1.1, (0.6, 0.4), geometric=True),
    BarrierCall("K", barrier=1.0, discount=Discount()),
    BarrierCall(2.0, barrier=4.2, direction="up", knock="in", component=1, log=True),
]


def paths() -> torch.Tensor:
    """Three times, four paths, two components."""
    return torch.linspace(0.3, 1.9, 24, dtype=D).sin().reshape(3, 4, 2) + 0.5


def parameters() -> dict[str, torch.Tensor]:
    return {"r": torch.tensor(0.3, dtype=D), "K": torch.tensor(1.2, dtype=D)}


def test_values_by_hand():
    ys = torch.tensor([[[9.0, 9.0]], [[1.0, 2.0]], [[3.0, 0.5]]], dtype=D)
    p = {"r": torch.tensor(0.1, dtype=D), "K": torch.tensor(2.5, dtype=D)}
    expected = {
        Moment(): 3.0,
        Moment(2, component=1): 0.25,
        SumOfSquares(): 9.25,
        Laplace(2.0, component=1): math.exp(-1.0),
        Discount(): math.exp(-0.5),
        Call(2.0): 1.0,
        Call("K"): 0.5,
        Call(2.0, discount=0.9): 0.9,
        Call(2.0, discount=ConstantRate("r", 4.0)): math.exp(-0.4),
        Call(2.0, discount=Discount()): math.exp(-0.5),
        Call(2.0, log=True): math.exp(3.0) - 2.0,
        Call(4.0): 0.0,
        Digital(2.0, discount=Discount()): math.exp(-0.5),
        Digital(3.0): 0.5,  # at the strike
        Digital(1.7, component=1, log=True): 0.0,
        AsianCall(1.5): 0.5,  # the mean of 1 and 3: the initial state does not count
        AsianCall(1.5, log=True): (math.exp(1.0) + math.exp(3.0)) / 2 - 1.5,
        Put(4.0, discount=0.5): 0.5,
        Put(4.0, component=1, log=True): 4.0 - math.exp(0.5),
        GeometricAsianCall(1.5): math.sqrt(3.0) - 1.5,
        GeometricAsianCall(1.5, log=True): math.exp(2.0) - 1.5,
        LookbackCall(2.5): 6.5,  # the initial state counts
        LookbackCall(2.5, log=True): math.exp(9.0) - 2.5,
        FloatingLookback(): 2.0,
        FloatingLookback(component=1): 0.0,
        BasketCall(2.0, [1.0, 2.0]): 2.0,
        BasketCall(2.0, (1.0, 2.0), log=True, geometric=True): math.exp(4.0) - 2.0,
        BasketCall(0.5, (1.0, 2.0), geometric=True): 0.25,
        BasketCall(2.0, (1.0,)): 1.0,  # of the first component alone
        BarrierCall("K", barrier=0.9): 0.5,
        BarrierCall("K", barrier=1.0): 0.0,  # dead at the barrier
        BarrierCall("K", barrier=1.0, knock="in"): 0.5,
        BarrierCall("K", barrier=9.5, direction="up"): 0.5,
        BarrierCall("K", barrier=9.0, direction="up"): 0.0,  # the initial state counts
        BarrierCall("K", barrier=2.7, log=True): math.exp(3.0) - 2.5,
    }
    for functional, value in expected.items():
        # one exponential and a sum: a few units of rounding
        torch.testing.assert_close(
            functional(ys, p), torch.tensor([value], dtype=D), rtol=1e-15, atol=0, msg=repr(functional)
        )


@pytest.mark.parametrize("functional", EVERY, ids=repr)
def test_one_number_a_path_that_pickles(functional):
    ys, p = paths(), parameters()
    values = pickle.loads(pickle.dumps(functional))(ys, p)
    assert values.shape == (4,)
    alone = torch.cat([functional(ys[:, i : i + 1], p) for i in range(4)])
    torch.testing.assert_close(values, alone, rtol=0, atol=0)
    assert functional(ys.float(), {k: v.float() for k, v in p.items()}).dtype == torch.float32


@pytest.mark.parametrize("functional", EVERY, ids=repr)
def test_derivatives_in_path_and_parameters(functional):
    ys, p = paths(), parameters()
    step = torch.linspace(-1, 1, 24, dtype=D).reshape(3, 4, 2)
    dp = {"r": torch.tensor(0.7, dtype=D), "K": torch.tensor(-0.4, dtype=D)}
    _, forward = jvp(functional, (ys, p), (step, dp))
    _, pull = vjp(functional, ys, p)
    ys_bar, p_bar = pull(torch.ones(4, dtype=D))
    reverse = (ys_bar * step).sum() + sum(p_bar[k] * dp[k] for k in p)
    torch.testing.assert_close(forward.sum(), reverse, rtol=1e-13, atol=1e-13)  # rounding only

    h = 1e-5  # truncation h^2 = 1e-10, cancellation 1e-16 / h = 1e-11
    up, down = (functional(ys + s * step, {k: p[k] + s * dp[k] for k in p}) for s in (h, -h))
    torch.testing.assert_close(forward, (up - down) / (2 * h), rtol=1e-8, atol=1e-8)
    assert forward.abs().max() > 1e-3  # a gradient of zeros would test nothing

    batched = vmap(functional, in_dims=(None, 0))(ys, {k: v.expand(2) for k, v in p.items()})
    torch.testing.assert_close(batched[1], functional(ys, p), rtol=0, atol=0)


def black_scholes(functional, n_steps: int, **extra: float) -> Problem:
    values = {"r": 0.05, "sigma": 0.2, "s0": 100.0, **extra}
    params = {k: torch.tensor(v, dtype=D) for k, v in values.items()}
    sde = with_running_integral(SDE(log_drift, log_diffusion, params, noise_type="scalar"), rate)
    return Problem(sde, functional, log_initial, (0.0, 1.0), n_steps)


def test_strike_and_rate_as_parameters():
    """Monte Carlo against Black-Scholes. 5 comparisons at z < 4.5, 99 degrees of freedom: false alarm 1e-4."""
    problem = black_scholes(Call("K", discount=ConstantRate("r", 1.0), log=True), 1, K=100.0)
    result = sensitivity(problem, n_paths=20_000, seed=4)
    exact = {
        "r": 53.232481545376345,
        "sigma": 37.52403469169379,
        "s0": 0.6368306511756191,
        "K": -0.5323248154537634,
    }
    assert abs(result.value.mean - 10.450583572185565) < 4.5 * result.value.standard_error
    for name, value in exact.items():
        assert abs(result.gradient[name].mean - value) < 4.5 * result.gradient[name].standard_error, name


def test_only_a_discount_in_the_state_moves_with_the_horizon():
    run = {
        kind: sensitivity(black_scholes(Call(95.0, discount=d, log=True), 4), n_paths=400, wrt=("r", "t1"), seed=1)
        for kind, d in (("state", Discount()), ("number", ConstantRate("r", 1.0)))
    }
    # the same paths, so these hold to rounding: same value, same d/dr, and d/dt1 apart by -r times the value
    torch.testing.assert_close(run["state"].value.mean, run["number"].value.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(run["state"].gradient["r"].mean, run["number"].gradient["r"].mean, rtol=1e-11, atol=0)
    gap = run["state"].gradient["t1"].mean - run["number"].gradient["t1"].mean
    torch.testing.assert_close(gap, -0.05 * run["state"].value.mean, rtol=1e-10, atol=0)


def test_a_jump_has_derivative_zero_and_stays_in_the_graph():
    ys = paths().requires_grad_()
    values = Digital(float(ys[-1, :, 0].detach().mean()))(ys, {})
    assert 0 < values.sum() < 4  # some paths on each side
    (gradient,) = torch.autograd.grad(values.sum(), ys)
    assert not gradient.any()


def test_each_says_how_it_depends_on_the_path():
    kinds = {type(f).__name__: f.kind for f in EVERY}
    smooth, jump = {"Moment", "SumOfSquares", "Laplace", "Discount"}, {"Digital", "BarrierCall"}
    assert kinds == {k: "smooth" if k in smooth else "jump" if k in jump else "kink" for k in kinds}
    assert ConstantRate.kind == "smooth"
    assert Call("K") == Call("K", 0, 1.0, False)  # a fact about the class, no option


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (partial(BasketCall, 1.0, ()), ArgumentError, "`weights` must be finite numbers, at least one"),
        (partial(BasketCall, 1.0, (0.5, math.nan)), ArgumentError, "`weights` must be finite"),
        (partial(BasketCall, 1.0, "ab"), ArgumentTypeError, "`weights` must be numbers"),
        (partial(BasketCall, 1.0, 0.5), ArgumentTypeError, "`weights` must be numbers"),
        (partial(BarrierCall, 1.0, 0.9, direction="left"), ArgumentError, "`direction` must be 'down' or 'up'"),
        (partial(BarrierCall, 1.0, 0.9, knock="off"), ArgumentError, "`knock` must be 'out' or 'in', got 'off'"),
        (partial(BarrierCall, 1.0, -0.1, log=True), ArgumentError, "not its logarithm"),
    ],
)
def test_bad_options_are_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_basket_of_more_components_than_there_are():
    with pytest.raises(ShapeError, match="has 3 numbers, but the state has 2"):
        BasketCall(1.0, (1.0, 1.0, 1.0))(paths(), {})


# --- means over the last step -----------------------------------------------------------------------------------------

CONDITIONAL = [
    *[Moment(k, component=1) for k in range(6)],
    SumOfSquares(),
    Laplace(0.7),
    Laplace(-1.3, component=1),
    Discount(1),
    Call("K"),
    Call("K", component=1, discount=ConstantRate("r", 2.0), log=True),
    Call(1.1, discount=Discount()),
    Put("K", discount=Discount()),
    Put(3.0, component=1, log=True),
    Digital("K", discount=Discount()),
    Digital(3.0, component=1, log=True),
    AsianCall("K", discount=Discount()),
    AsianCall(-0.5),
    AsianCall("K", component=1, discount=Discount(), log=True),  # the shifted strike is negative on every path
    AsianCall(3.4, component=1, log=True),
    GeometricAsianCall("K", discount=Discount(), log=True),
    GeometricAsianCall(3.3, component=1, log=True),
    LookbackCall("K", discount=Discount()),
    LookbackCall(4.4, component=1, log=True),
    FloatingLookback(discount=Discount()),
    FloatingLookback(component=1, discount=ConstantRate("r", 2.0), log=True),
    BasketCall("K", (0.7, 0.4), discount=Discount()),
    BasketCall(2.0, (0.3, 0.4), log=True, geometric=True),
]
CASES = pytest.mark.parametrize("functional", CONDITIONAL, ids=repr)


def last_step() -> tuple[torch.Tensor, torch.Tensor]:
    """Four times, three paths, three components, and a factor L (B, d, 2) of the last covariance: the third has no noise."""
    ys = torch.linspace(0.3, 4.1, 36, dtype=D).sin().reshape(4, 3, 3) * 0.4 + 1.1
    L = torch.linspace(1.0, 2.7, 18, dtype=D).cos().reshape(3, 3, 2) * torch.tensor([0.3, 0.12], dtype=D)
    L[..., 0] += 0.4  # so that what is left after the first integral is smooth on the scale of the second
    L[:, 2] = 0
    return ys, L


def mean_over(functional, ys, L, p):
    """conditional, for a covariance LL'."""
    return functional.conditional(ys, L @ L.mT, p)


NODES = 20  # the second normal moves the state by a third of what the first does at most: the remainder is below 1e-12


def by_quadrature(functional, ys, L, p) -> np.ndarray:
    """The functional itself, integrated over both normals: one adaptively, which finds its kinks, the other on nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    B, n = ys.shape[1], len(nodes)
    across = ys.repeat_interleave(n, 1)
    across[-1] += L[..., 1].repeat_interleave(n, 0) * torch.tensor(np.tile(nodes, B))[:, None]
    along = L[..., 0].repeat_interleave(n, 0)

    def value(z) -> torch.Tensor:
        return functional(torch.cat((across[:-1], (across[-1] + along * z)[None])), p)

    if functional.kind == "jump":  # no rule converges: where it is, and the probability beyond
        low, high = (torch.full((B * n, 1), z, dtype=D) for z in (-10.0, 10.0))
        for _ in range(60):
            middle = 0.5 * (low + high)
            beyond = value(middle)[:, None] > 0
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        inner = (value(10.0) * torch.special.ndtr(-high[:, 0])).numpy()
    else:
        inner = quad_vec(
            lambda z: value(z).numpy() * math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi),
            -10,
            10,
            epsabs=1e-12,
            epsrel=1e-12,
            norm="max",
            limit=5000,
        )[0]
    return (inner.reshape(B, n) * weights / weights.sum()).sum(1)


@CASES
def test_conditional_is_the_mean_over_the_last_step(functional):
    ys, L = last_step()
    p = parameters()
    found = mean_over(functional, ys, L, p)
    # the quadrature stops at 1e-12 and the nodes resolve the second normal to 1e-13; what lies beyond z = 10 is below 1e-15
    np.testing.assert_allclose(found.numpy(), by_quadrature(functional, ys, L, p), rtol=1e-10, atol=1e-11)


@CASES
def test_conditional_has_derivatives_in_both_modes(functional):
    ys, L = last_step()
    p = parameters()
    steps = (
        torch.linspace(-1, 1, 36, dtype=D).reshape(4, 3, 3),
        torch.linspace(1, -0.5, 18, dtype=D).reshape(3, 3, 2) * torch.tensor([1.0, 1.0, 0.0], dtype=D)[:, None],
        {"r": torch.tensor(0.7, dtype=D), "K": torch.tensor(-0.4, dtype=D)},
    )
    f = partial(mean_over, functional)
    values, forward = jvp(f, (ys, L, p), steps)
    ys_bar, L_bar, p_bar = vjp(f, ys, L, p)[1](torch.ones(3, dtype=D))
    reverse = (ys_bar * steps[0]).sum() + (L_bar * steps[1]).sum() + sum(p_bar[k] * steps[2][k] for k in p)
    torch.testing.assert_close(forward.sum(), reverse, rtol=1e-12, atol=1e-13)  # rounding only

    h = 1e-5  # truncation h^2 = 1e-10 times third derivatives of 10, cancellation 1e-16 / h = 1e-11
    moved = [f(ys + s * steps[0], L + s * steps[1], {k: p[k] + s * steps[2][k] for k in p}) for s in (h, -h)]
    torch.testing.assert_close(forward, (moved[0] - moved[1]) / (2 * h), rtol=1e-7, atol=1e-8)
    if functional != Moment(0, component=1):
        assert forward.abs().max() > 1e-3  # a gradient of zeros would test nothing

    batched = vmap(f, in_dims=(None, None, 0))(ys, L, {k: v.expand(2) for k, v in p.items()})
    torch.testing.assert_close(batched[1], values, rtol=1e-14, atol=0)
    singles = vmap(lambda x, factor: f(x[:, None], factor[None], p)[0], in_dims=(1, 0))(ys, L)
    torch.testing.assert_close(singles, values, rtol=1e-13, atol=1e-15)
    assert f(ys.float(), L.float(), {k: v.float() for k, v in p.items()}).dtype == torch.float32


@CASES
def test_conditional_without_variance_is_the_functional(functional):
    """The first path has no noise at all: its value and derivatives are those of F at the mean, and there is no NaN."""
    ys, L = last_step()
    p = parameters()
    L[0] = 0
    covariance = (L @ L.mT).requires_grad_()
    values, pull_back = vjp(lambda x, c, q: functional.conditional(x, c, q), ys, covariance, p)
    torch.testing.assert_close(values[:1], functional(ys[:, :1], p), rtol=1e-14, atol=1e-15)
    ys_bar, covariance_bar, p_bar = pull_back(torch.ones(3, dtype=D))
    assert all(bool(torch.isfinite(x).all()) for x in (ys_bar, covariance_bar, *p_bar.values()))
    own = vjp(functional, ys[:, :1], p)[1](torch.ones(1, dtype=D))[0]
    torch.testing.assert_close(ys_bar[:, :1], own, rtol=1e-13, atol=1e-15)

    step = torch.linspace(-1, 1, 36, dtype=D).reshape(4, 3, 3)
    both = (step, torch.ones_like(covariance), {k: torch.ones_like(v) for k, v in p.items()})
    _, forward = jvp(functional.conditional, (ys, covariance.detach(), p), both)
    reverse = (ys_bar * step).sum() + covariance_bar.sum() + sum(p_bar.values())
    torch.testing.assert_close(forward.sum(), reverse, rtol=1e-12, atol=1e-13)


def test_at_the_strike_without_variance():
    ys, covariance = torch.ones(2, 1, 1, dtype=D), torch.zeros(1, 1, 1, dtype=D)
    for functional, value in ((Digital(1.0), 0.5), (Call(1.0), 0.0), (Put(1.0), 0.0)):
        x = ys.clone().requires_grad_()
        found = functional.conditional(x, covariance, {})
        assert found.item() == value
        assert bool(torch.isfinite(torch.autograd.grad(found, x)[0]).all())


def test_a_forward_keeps_its_derivative_in_a_variance_that_vanishes():
    """In the money E e^X depends on the variance at 0 too: d/dv = e^m / 2, the limit of small variances."""
    ys = torch.full((2, 1, 1), 0.3, dtype=D)
    for v in (0.0, 1e-6):
        covariance = torch.full((1, 1, 1), v, dtype=D, requires_grad=True)
        (slope,) = torch.autograd.grad(Call(1.0, log=True).conditional(ys, covariance, {}), covariance)
        assert slope.item() == pytest.approx(0.5 * math.exp(0.3), rel=1e-6)  # v / 2 of it


def test_digital_of_a_strike_that_is_never_reached_from_above():
    ys, covariance = torch.ones(2, 1, 1, dtype=D), torch.ones(1, 1, 1, dtype=D)
    for strike in (0.0, -1.0):
        assert Digital(strike, log=True).conditional(ys, covariance, {}).item() == 1.0


def test_far_tails_have_finite_derivatives():
    """Strikes a million standard deviations away: no overflow of a square comes back as NaN."""
    ys = torch.tensor([0.0, 1e6, -1e6], dtype=D).reshape(1, 3, 1).expand(2, 3, 1).clone().requires_grad_()
    covariance = torch.full((3, 1, 1), 1e-300, dtype=D, requires_grad=True)
    for functional in (Call(0.1), Put(0.1), Digital(0.1)):
        values = functional.conditional(ys, covariance, {})
        torch.testing.assert_close(values, functional(ys, {}), rtol=1e-15, atol=0)
        slopes = torch.autograd.grad(values.sum(), (ys, covariance))
        assert all(bool(torch.isfinite(x).all()) for x in slopes)


@pytest.mark.parametrize(
    ("functional", "message"),
    [
        (Call(1.0, discount=Discount(1)), "noise of its own in the last step"),
        (BasketCall(1.0, (1.0,), discount=Discount(0)), "with_running_integral"),
        (Call(1.0, discount=Laplace(1.0)), "use a number, Discount\\(\\) or ConstantRate"),
        (BasketCall(1.0, (1.0, 1.0), log=True), "geometric=True, or write the SDE for S itself"),
        (BasketCall(1.0, (1.0, 1.0), geometric=True), "geometric=False, or write the SDE for log S"),
        (GeometricAsianCall(1.0), "write the SDE for log S"),
        (Moment(-1), "needs a power 0, 1, 2"),
        (Moment(0.5), "needs a power 0, 1, 2"),
    ],
    ids=repr,
)
def test_what_has_no_closed_form_says_so(functional, message):
    ys, L = last_step()
    with pytest.raises(MethodError, match=message):
        mean_over(functional, ys, L, {})


# --- barriers between grid points -------------------------------------------------------------------------------------


def test_bridge_of_one_step_by_hand():
    ys = torch.tensor([[[100.0], [100.0], [80.0], [100.0]], [[110.0], [110.0], [110.0], [85.0]]], dtype=D)
    covariance = torch.tensor([50.0, 0.0, 50.0, 50.0], dtype=D).reshape(1, 4, 1, 1)
    stays = 1 - math.exp(-2 * 10 * 20 / 50)
    for knock, expected in (("out", [stays, 1.0, 0.0, 0.0]), ("in", [1 - stays, 0.0, 1.0, 0.0])):
        payoff = BarrierCall(100.0, barrier=90.0, knock=knock)
        found = payoff.bridge(ys, covariance, {})
        torch.testing.assert_close(found, 10 * torch.tensor(expected, dtype=D), rtol=1e-14, atol=1e-13)
    mirrored = BarrierCall(-200.0, barrier=-90.0, direction="up", component=0).bridge(-ys, covariance, {})
    expected = (200 - ys[-1, :, 0]) * torch.tensor([stays, 1.0, 0.0, 0.0], dtype=D)
    torch.testing.assert_close(mirrored, expected, rtol=1e-14, atol=0)


def test_bridge_against_simulated_bridges():
    """Brownian bridges on 512 points a step, the barrier moved by .5826 sigma sqrt(dt) for the time between them.

    M. Broadie, P. Glasserman, S. Kou, Mathematical Finance 7 (1997) 325: what is left is o(512^-1/2), 1e-3 here. One
    comparison for each direction and path at z < 4.
    """
    m, count = 512, 4000
    x = torch.tensor([[0.2, 0.5], [0.2, 0.2], [0.35, 0.15]], dtype=D)  # (N + 1, paths)
    variance = torch.tensor([[0.04, 0.09], [0.16, 0.04]], dtype=D)
    z = Philox(3).normals(0, count * 2, 0, 2, m, dtype=D, device=torch.device("cpu")).reshape(2, count, 2, m)
    W = (z / math.sqrt(m)).cumsum(-1)
    s = torch.arange(1, m + 1, dtype=D) / m
    root = variance.sqrt()[:, None, :, None]
    inside = x[:-1, None, :, None] + s * (x[1:] - x[:-1])[:, None, :, None] + root * (W - s * W[..., -1:])
    shifted = inside + 0.5826 * root / math.sqrt(m) * -1  # down: a barrier that is higher by so much
    stays = (shifted.amin(-1) > 0).all(0).double()  # (count, paths)
    expected, error = stays.mean(0), stays.std(0) / math.sqrt(count)
    for sign, direction in ((1.0, "down"), (-1.0, "up")):
        ys = (sign * x + 3.0)[..., None]
        payoff = BarrierCall(-5.0, barrier=3.0, direction=direction)
        found = payoff.bridge(ys, variance[..., None, None], {}) / (ys[-1, :, 0] + 5.0)
        assert bool(((found - expected).abs() < 4 * error).all())
        assert bool((found > 0.1).all())
        assert bool((found < 0.9).all())


def grid_paths(n_steps: int, n_paths: int, sigma, s0, r, t1=1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-Euler paths of geometric Brownian motion with the running integral of the rate, and their covariances."""
    problem = black_scholes(Discount(), n_steps)
    params = {"r": r, "sigma": sigma, "s0": s0}
    sde = problem.sde.with_params(**{k: torch.as_tensor(v, dtype=D) for k, v in params.items()})
    ts = [t1 * k / n_steps for k in range(n_steps + 1)]
    ys = sdeint(sde, log_initial(sde.params).expand(n_paths, 2), ts, n_steps=n_steps, bm=Philox(6), check=False)
    g = torch.stack((sde.params["sigma"], torch.zeros((), dtype=D)))
    return ys, (g[:, None] * g * t1 / n_steps).expand(n_steps, n_paths, 2, 2)


def test_bridge_has_no_bias_of_the_grid():
    """Four log-Euler steps against the closed form of the call watched all the time; value and gradient, z < 4, 6 looks."""
    exact = {"s0": 0.8301694456, "r": 47.76539748, "sigma": 11.28142230}
    leaves = {k: torch.tensor(v, dtype=D) for k, v in {"s0": 100.0, "r": 0.05, "sigma": 0.2}.items()}
    payoff = BarrierCall(100.0, barrier=90.0, discount=Discount(), log=True)

    def value(p) -> torch.Tensor:
        return payoff.bridge(*grid_paths(4, 40_000, **p), p)

    samples = value(leaves)
    assert abs(samples.mean() - 8.665471658246) < 4 * samples.std() / 200
    for name, slope in exact.items():
        _, rows = jvp(value, (leaves,), ({k: torch.ones_like(v) * (k == name) for k, v in leaves.items()},))
        assert abs(rows.mean() - slope) < 4 * rows.std() / 200, name
    # a negative control: watched at the grid points alone, it is another contract
    watched = payoff(grid_paths(4, 40_000, **leaves)[0], leaves)
    assert watched.mean() - 8.665471658246 > 10 * watched.std() / 200
    # in and out make a call, path by path
    born = BarrierCall(100.0, barrier=90.0, knock="in", discount=Discount(), log=True)
    ys, covariance = grid_paths(4, 100, **leaves)
    both = payoff.bridge(ys, covariance, leaves) + born.bridge(ys, covariance, leaves)
    torch.testing.assert_close(both, Call(100.0, discount=Discount(), log=True)(ys, leaves), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("knock", ["out", "in"])
def test_bridge_derivatives_in_both_modes(direction, knock):
    """Finite on every path: alive, dead at a grid point, at the barrier itself, in a step without noise."""
    payoff = BarrierCall("K", barrier="B", direction=direction, knock=knock, discount=ConstantRate("r", 2.0))
    p = {**parameters(), "B": torch.tensor(1.0, dtype=D), "K": torch.tensor(-4.0, dtype=D)}
    above = torch.tensor([[0.5, 0.3, 0.5, 0.0, 0.2], [0.4, -0.2, 0.0, 0.3, 0.3], [0.6, 0.2, 0.3, 0.4, 0.4]], dtype=D)
    ys = (1.0 + (above if direction == "down" else -above))[..., None]
    covariance = torch.full((2, 5, 1, 1), 0.2, dtype=D)
    covariance[:, 4] = 0
    dys = torch.linspace(-1, 1, 15, dtype=D).cos().reshape(3, 5, 1)
    dc = torch.linspace(0.1, 0.2, 10, dtype=D).reshape(2, 5, 1, 1)
    dp = {"r": torch.tensor(0.7, dtype=D), "K": torch.tensor(-0.4, dtype=D), "B": torch.tensor(0.3, dtype=D)}
    values, forward = jvp(payoff.bridge, (ys, covariance, p), (dys, dc, dp))
    ys_bar, c_bar, p_bar = vjp(payoff.bridge, ys, covariance, p)[1](torch.ones(5, dtype=D))
    assert all(bool(torch.isfinite(x).all()) for x in (values, forward, ys_bar, c_bar, *p_bar.values()))
    reverse = (ys_bar * dys).sum() + (c_bar * dc).sum() + sum(p_bar[k] * dp[k] for k in p)
    torch.testing.assert_close(forward.sum(), reverse, rtol=1e-12, atol=1e-13)  # rounding only
    call = Call("K", discount=ConstantRate("r", 2.0))(ys, p)
    dead = torch.tensor([False, True, True, True, False])
    assert torch.equal(values[dead], (0 * call if knock == "out" else call)[dead])

    h, smooth = 1e-6, torch.tensor([True, True, False, False, True])  # paths at the barrier have a kink there
    up, down = (
        payoff.bridge(ys + s * dys, covariance + s * dc * (covariance > 0), {k: p[k] + s * dp[k] for k in p})
        for s in (h, -h)
    )
    torch.testing.assert_close(forward[smooth], ((up - down) / (2 * h))[smooth], rtol=1e-8, atol=1e-8)
    batched = vmap(payoff.bridge, in_dims=(None, None, 0))(ys, covariance, {k: v.expand(2) for k, v in p.items()})
    torch.testing.assert_close(batched[1], values, rtol=1e-14, atol=0)


def test_bridge_is_continuous_where_a_path_meets_the_barrier():
    payoff = BarrierCall(0.0, barrier=1.0)
    covariance = torch.full((2, 1, 1, 1), 0.2, dtype=D)
    at = [
        payoff.bridge(torch.tensor([2.0, 1.0 + e, 2.0], dtype=D).reshape(3, 1, 1), covariance, {})
        for e in (1e-6, -1e-6, 0.0, 1e-310)
    ]
    assert at[0].item() == pytest.approx(0.0, abs=1e-9)  # (2 1e-6 / .2)^2 times the payoff of 2
    assert at[0].item() > 0
    assert at[1].item() == at[2].item() == at[3].item() == 0.0
