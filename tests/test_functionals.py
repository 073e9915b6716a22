"""Functionals: their numbers, their explicit dependence on parameters, and what jumps and horizons do to them."""

import math
import pickle

import pytest
import torch
from torch.func import jvp, vjp, vmap

from sdesens import SDE, Problem, sensitivity
from sdesens.functionals import (
    AsianCall,
    Call,
    ConstantRate,
    Digital,
    Discount,
    Laplace,
    Moment,
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
