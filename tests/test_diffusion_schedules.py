"""Schedules: closed forms, moment equations, inverses, derivatives in their parameters, tables of discrete models, bad input."""

import math

import numpy as np
import pytest
import torch
from diffusion_cases import D, call, scalar
from scipy.integrate import quad
from torch import nn
from torch.func import functional_call, jacfwd, jacrev

from sdesens import Philox
from sdesens.diffusion import EDM, VE, VP, CondOT, Cosine, Discrete, LogSNR, Schedule, SubVP, Table
from sdesens.diffusion.values import like
from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, GridError, PriorGapWarning, ShapeError

EPS = 2.0**-53


def ddpm(T: int) -> torch.Tensor:
    """The linear betas of DDPM."""
    return torch.linspace(1e-4, 0.02, T, dtype=D)


def bent(t, p):
    """A log-SNR without closed form for anything else: from `top`, straight and then steeper."""
    return p["top"] - p["slope"] * t - p["bend"] * t**3 + torch.sin(p["bend"] * t)


def bent_at(top=10.0, slope=15.0, bend=3.0) -> LogSNR:
    return LogSNR(bent, {"top": scalar(top), "slope": scalar(slope), "bend": scalar(bend)})


def vp_log_snr(t, p):
    """That of VP, infinite at t = 0."""
    return -torch.log(torch.expm1(t * (p["beta_min"] + (p["beta_max"] - p["beta_min"]) * t / 2)))


SCHEDULES = {
    "VP": VP(),
    "VP from rate 0": VP(0.0, 12.0),
    "VP, one rate": VP(7.0, 7.0),
    "SubVP": SubVP(),
    "Cosine": Cosine(),
    "VE": VE(),
    "EDM": EDM(),
    "CondOT": CondOT(),
    "LogSNR": bent_at(),
    "Table": Table.from_betas(ddpm(1000)),
    "short Table": Table(scalar([0.9, 0.7, 0.4, 0.1, 0.01])),
}
EVERY = pytest.mark.parametrize("schedule", list(SCHEDULES.values()), ids=list(SCHEDULES))


def times(schedule: Schedule, n: int = 1500) -> torch.Tensor:
    """The whole range: from 1e-6 t_max, and evenly; up to t_max, or to where f becomes infinite, 1e-6 before CondOT's end."""
    last = schedule.t_max * (1 - 1e-6 * isinstance(schedule, CondOT))
    low = 10 ** torch.linspace(-6, 0, n, dtype=D)
    return last * torch.cat((low, torch.linspace(1e-3, 1, n, dtype=D)))


def largest(error: torch.Tensor, scale: torch.Tensor) -> float:
    """The largest error relative to its scale; both 0 count as exact."""
    error, scale = error.detach().abs(), scale.detach().abs()
    return torch.where(error == 0, 0.0, error / scale).max().item()


def rate(value: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The derivative of value(t) by autograd; a constant has none."""
    found = torch.autograd.grad(value.sum(), t, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(t) if found is None else found


# Closed forms and identities


def vp_in_long_double(t, b0=0.1, b1=20.0):
    """alpha and sigma by the plain formulas in 64-bit mantissas: 1 - alpha^2 = 1e-7 at t = 1e-6 costs 7 of 19 digits."""
    t, b0, b1 = np.longdouble(t.numpy()), np.longdouble(b0), np.longdouble(b1)
    alpha = np.exp(-(b0 * t + (b1 - b0) * t * t / 2) / 2)
    return alpha, np.sqrt(1 - alpha * alpha)


def closed_forms():
    pi = np.longdouble(2) * np.arccos(np.longdouble(0))
    yield VP(), vp_in_long_double
    yield SubVP(), lambda t: (vp_in_long_double(t)[0], vp_in_long_double(t)[1] ** 2)
    yield Cosine(), lambda t: (np.cos(pi * np.longdouble(t.numpy()) / 2), np.sin(pi * np.longdouble(t.numpy()) / 2))
    yield VE(), lambda t: (1.0 + 0 * t.numpy(), np.longdouble(0.01) * np.longdouble(5000) ** t.numpy())
    yield EDM(), lambda t: (1.0 + 0 * t.numpy(), t.numpy())
    yield CondOT(), lambda t: (1 - np.longdouble(t.numpy()), t.numpy())


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 2e-19, reason="long double is double here")
@pytest.mark.parametrize(("schedule", "formula"), list(closed_forms()), ids=lambda x: type(x).__name__)
def test_closed_forms(schedule, formula):
    t = times(schedule)
    alpha, sigma = formula(t)
    # double rounding; long double's own 1e-19 / 1e-7 = 1e-12 of the difference above; cos at its zero, 1e-16 / 5e-5
    for found, exact in ((schedule.alpha(t), alpha), (schedule.sigma(t), sigma)):
        assert np.max(np.abs(found.numpy() / exact - 1)) < 1e-11
    # |lambda| <= 28, half a unit in its last place and 1e-11 from above
    exact = 2 * np.log(alpha / np.longdouble(sigma))
    assert np.max(np.abs(schedule.log_snr(t).numpy() - exact)) < 1e-10


@EVERY
def test_moment_equations_and_rates_everywhere(schedule):
    """f = alpha'/alpha, (sigma^2)' = 2 f sigma^2 + g^2 and g^2 = -sigma^2 lambda', derivatives by autograd.

    1e-10 is asked for; measured 4e-12 and below. Within one step of a table its derivative is that of the step.
    """
    t = times(schedule).requires_grad_()
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    da, ds, dl = (rate(v, t) for v in (alpha, sigma, log_snr))
    f, g2, (alpha_rate, sigma_rate) = schedule.f(t), schedule.g2(t), schedule.rates(t)
    assert largest(f * alpha - da, da) < 1e-10
    # near the end of a variance-preserving schedule the two terms, up to 1e9, cancel: relative to them
    assert largest(2 * f * sigma**2 + g2 - 2 * sigma * ds, (2 * f * sigma**2).abs() + g2) < 1e-10
    assert largest(g2 + sigma**2 * dl, g2) < 1e-10
    assert largest(alpha_rate - da, da) < 1e-10
    assert largest(sigma_rate - ds, ds) < 1e-10
    assert largest(schedule.log_snr_rate(t) - dl, dl) < 1e-10
    assert largest(schedule.g(t) ** 2 - g2, g2) < 1e-15
    assert largest(torch.exp(log_snr) * (sigma / alpha) ** 2 - 1, alpha / alpha) < 1e-10
    assert all(v.dtype == D for v in (alpha, sigma, log_snr, f, g2, alpha_rate, sigma_rate))


def test_a_wrong_coefficient_does_not_pass():
    """Negative control: SubVP's moments with VP's noise."""
    t = times(SubVP()).requires_grad_()
    sigma = SubVP().sigma(t)
    f, g2 = SubVP().f(t), VP().g2(t)
    assert largest(2 * f * sigma**2 + g2 - 2 * sigma * rate(sigma, t), (2 * f * sigma**2).abs() + g2) > 0.1


@EVERY
def test_the_inverse_of_the_log_snr(schedule):
    t = times(schedule)
    log_snr = schedule.log_snr(t)
    # what the rounding of lambda itself moves t by: 1e-10 t at t = 1e-6 where lambda starts at a finite value
    floor = 4 * EPS * (1 + log_snr.abs()) / schedule.log_snr_rate(t).abs()
    assert bool(((schedule.t_of_log_snr(log_snr) - t).abs() <= 1e-10 * t + floor).all())
    # beyond the ends, the ends; LogSNR halves its way there 60 times
    ends = schedule.t_of_log_snr(scalar([math.inf, 1e4, -1e4, -math.inf]))
    assert ends.tolist() == pytest.approx([0.0, 0.0, schedule.t_max, schedule.t_max], rel=0, abs=2**-60)


def test_the_inverse_far_beyond_pure_noise():
    """B up to 100: log(1 + e^-lambda) to rounding, neither overflowing nor cut off."""
    t = torch.linspace(0.01, 1, 300, dtype=D)
    for schedule in (VP(0.1, 200.0), SubVP(0.1, 200.0)):
        torch.testing.assert_close(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=1e-13, atol=0)


def test_priors():
    assert {k: v.prior_std.item() for k, v in SCHEDULES.items() if v.prior_std != 1} == {"VE": 50.0, "EDM": 80.0}


def test_ends():
    """t = 0 and t_max, where some coefficients are infinite: no NaN, and the limits of the formulas."""
    inf = math.inf
    for schedule in (VP(), VP(0.0, 12.0), SubVP(), Cosine(), EDM(), CondOT(), Table.from_betas(ddpm(50))):
        at = {k: getattr(schedule, k)(0.0).item() for k in ("alpha", "sigma", "log_snr", "log_snr_rate")}
        assert at == {"alpha": 1.0, "sigma": 0.0, "log_snr": inf, "log_snr_rate": -inf}
        values = [getattr(schedule, k)(t) for k in ("f", "g", "g2") for t in (0.0, schedule.t_max)]
        values += [x for t in (0.0, schedule.t_max) for x in schedule.rates(t) if not schedule.same_as(VP(0.0, 12.0))]
        assert not bool(torch.stack(values).isnan().any())
    # sigma' at 0: beta of SubVP, and the square root's infinity of VP
    assert [x.item() for x in SubVP().rates(0.0)] == [-0.05, 0.1]
    assert [x.item() for x in VP().rates(0.0)] == [-0.05, inf]
    assert [x.item() for x in CondOT().rates(1.0)] == [-1.0, 1.0]
    assert (CondOT().f(1.0).item(), CondOT().g2(1.0).item(), CondOT().log_snr(1.0).item()) == (-inf, inf, -inf)
    assert VE().sigma(0.0).item() == 0.01


def test_log_snr_reproduces_vp():
    """A schedule given by VP's log-SNR alone is VP; rounding of lambda, 28 x 1e-16, and of its derivative."""
    vp, made = VP(), LogSNR(vp_log_snr, VP().params)
    t = times(vp)
    for name in ("alpha", "sigma", "log_snr", "f", "g", "g2", "log_snr_rate"):
        exact = getattr(vp, name)(t)
        assert largest(getattr(made, name)(t) - exact, exact) < 1e-11, name
    assert (made.alpha(0.0).item(), made.sigma(0.0).item()) == (1.0, 0.0)
    with pytest.raises(GridError, match="start at 1e-5"):
        made.g(0.0)


# Derivatives in the parameters


FUNCTIONS = ("alpha", "sigma", "log_snr", "f", "g", "g2", "alpha'", "sigma'", "log_snr_rate", "inverse")
PARAMETRISED = {k: SCHEDULES[k] for k in ("VP", "VP, one rate", "SubVP", "VE", "LogSNR", "short Table")}


def evaluate(schedule: Schedule, name: str, t: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    if name == "inverse":
        return schedule.t_of_log_snr(log_snr)
    if name.endswith("'"):
        return schedule.rates(t)[name == "sigma'"]
    return getattr(schedule, name)(t)


def five_point(function, x: torch.Tensor, h: float, least: float = 0.0) -> torch.Tensor:
    """df/dx for each component of x, last axes; steps of h |x| or h `least`: error h^4/30 of the fifth derivative."""
    columns = []
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=D)
        step[i] = h * max(abs(float(x.flatten()[i])), least)
        step = step.reshape(x.shape)
        wide, near = function(x + 2 * step) - function(x - 2 * step), function(x + step) - function(x - step)
        columns.append((8 * near - wide) / (12 * float(step.sum())))
    return torch.stack(columns, -1).reshape((*columns[0].shape, *x.shape))


@pytest.mark.parametrize("name", list(PARAMETRISED))
def test_derivatives_in_parameters_against_finite_differences(name):
    schedule = PARAMETRISED[name]
    inner = scalar([1e-6, 0.03, 0.2, 0.37, 0.8, 1.0])  # 0.2 and 0.8 are knots of the short table
    log_snr = schedule.log_snr(scalar([0.01, 0.11, 0.45, 0.93]))  # off the knots: there the inverse has a kink
    for function in FUNCTIONS:
        at_zero = evaluate(schedule, function, scalar([0.0]), log_snr).isfinite().all() and function != "inverse"
        t = torch.cat((scalar([0.0]), inner)) if at_zero else inner
        for parameter, value in schedule.params.items():

            def of(x, parameter=parameter, function=function, t=t):
                return evaluate(schedule.with_params({parameter: x}), function, t, log_snr)

            # truncation h^4 / 30 x 15^5 = 4e-11 where values go as e^-15, and cancellation 1e-16 / h = 5e-13
            h = 2e-4
            authority = five_point(of, value, h)
            terms = of(value).abs()
            if function == "sigma'":  # f sigma and g^2 / (2 sigma) cancel where all is noise
                terms = terms + (schedule.f(t) * schedule.sigma(t)).abs()
            size = authority.abs() + terms[(..., *[None] * value.dim())] / value.abs()
            for derivative in (jacrev(of)(value), jacfwd(of)(value), torch.autograd.functional.jacobian(of, value)):
                # an order above the two errors
                error = (derivative - authority).abs()
                assert bool((error <= 1e-9 * size + 1e-12).all()), (function, parameter, derivative, authority)


def test_a_parameter_has_no_influence_at_time_zero():
    """alpha = 1 and sigma = 0 whatever the rates; the derivative is 0, not the 0 x inf of a square root."""
    for make in (VP, SubVP):
        rates = scalar([0.1, 20.0]).requires_grad_()
        schedule = make(rates[0], rates[1])
        for value, exact in (
            (schedule.alpha(0.0), [0, 0]),
            (schedule.sigma(0.0), [0, 0]),
            (schedule.g(0.0), [0.5 / math.sqrt(0.1) if make is VP else 0, 0]),
        ):
            (found,) = torch.autograd.grad(value, rates, retain_graph=True)
            torch.testing.assert_close(found, scalar(exact, D) + 0.0, rtol=1e-14, atol=0)


def test_the_inverse_of_a_log_snr_by_implicit_differentiation():
    """dt/dlambda = 1/lambda', dt/dp = -lambda_p/lambda', at many times; rounding of the two sides."""
    schedule = bent_at()
    p = {k: v.clone().requires_grad_() for k, v in schedule.params.items()}
    exact_t = torch.linspace(0.01, 0.99, 99, dtype=D)
    log_snr = bent(exact_t, schedule.params).requires_grad_()
    t = schedule.with_params(p).t_of_log_snr(log_snr)
    torch.testing.assert_close(t.detach(), exact_t, rtol=1e-14, atol=4 * EPS)  # lambda = 10 is rounded, and falls by 15
    slope = schedule.log_snr_rate(exact_t)
    found = torch.autograd.grad(t.sum(), [log_snr, *p.values()])
    torch.testing.assert_close(found[0], 1 / slope, rtol=1e-12, atol=0)
    at = exact_t.clone().requires_grad_()
    for name, gradient in zip(p, found[1:], strict=True):
        (explicit,) = torch.autograd.grad((bent(at, p) / -slope).sum(), p[name])
        torch.testing.assert_close(gradient, explicit, rtol=1e-12, atol=0, msg=name)


def test_a_learned_log_snr():
    """A network with falling output as the log-SNR: names with dots, gradients that reach it through f and g."""
    net = nn.Sequential(nn.Linear(1, 4), nn.Softplus(), nn.Linear(4, 1)).double()
    for k, parameter in enumerate(net.parameters()):
        parameter.data = torch.linspace(0.3, 0.9 + k / 10, parameter.numel(), dtype=D).reshape(parameter.shape)

    def fall(t, p):
        return 9 - 20 * t - functional_call(net, p, (t.reshape(-1, 1),)).reshape(t.shape)

    schedule = LogSNR(fall, dict(net.named_parameters()))
    assert set(schedule.params) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    schedule.g2(torch.linspace(0.1, 0.9, 5, dtype=D)).sum().backward()
    t = torch.linspace(0.1, 0.9, 5, dtype=D)
    weight = net[0].weight
    by_hand = five_point(lambda w: schedule.with_params({"0.weight": w}).g2(t).sum(), weight.detach(), 1e-3, 1.0)
    torch.testing.assert_close(weight.grad, by_hand, rtol=1e-9, atol=1e-12)  # as in the test above


# Precision and form of the arguments


@EVERY
def test_times_of_every_kind_are_worked_on_in_double(schedule):
    """Narrow times and parameters mean the doubles they stand for; a Python number means itself."""
    t = torch.linspace(0.05, 0.95, 7) * schedule.t_max
    narrow = schedule.with_params({k: v.float() for k, v in schedule.params.items()})
    wide = schedule.with_params({k: v.float().double() for k, v in schedule.params.items()})
    for name in ("alpha", "sigma", "log_snr", "f", "g2", "log_snr_rate"):
        found = getattr(narrow, name)(t)
        assert found.dtype == D
        torch.testing.assert_close(found, getattr(wide, name)(t.double()), rtol=4 * EPS, atol=0)
        assert getattr(schedule, name)(0.3 * schedule.t_max) == getattr(schedule, name)(scalar(0.3 * schedule.t_max))
    x = schedule.log_snr(t)
    torch.testing.assert_close(
        narrow.t_of_log_snr(x.float()), wide.t_of_log_snr(x.float().double()), rtol=8 * EPS, atol=0
    )
    assert schedule.t_of_log_snr(0.3) == schedule.t_of_log_snr(scalar(0.3))
    assert schedule.alpha([[0.1, 0.2]]).shape == (1, 2)
    assert schedule.alpha(np.float64(0.3)) == schedule.alpha(0.3)
    end = torch.tensor(schedule.t_max, dtype=D) * (1 + 5e-7)  # a narrow time just past the end means the end
    assert schedule.alpha(end) == schedule.alpha(schedule.t_max)


def test_double_matters():
    """Negative control: alphas_cumprod accumulated in single precision puts sigma off by 8e-5 near t = 0."""
    betas = ddpm(1000).float()
    exact = np.sqrt(1 - np.cumprod(1 - betas.numpy().astype(np.longdouble)))
    single = (1 - torch.cumprod(1 - betas, 0)).sqrt().double().numpy()
    ours = Table.from_betas(betas).sigma(Discrete(VP(), 1000).times).numpy()
    assert 5e-5 < np.max(np.abs(single / exact - 1)) < 2e-4
    assert np.max(np.abs(ours / exact - 1)) < 1e-12  # 1 - beta in double: 1e-16 / 1e-4


def test_parameters_are_replaced_by_name():
    vp, beta = VP(), scalar(5.0)
    assert vp.with_params({"beta_max": vp.beta_max, "net.weight": beta}) is vp
    moved = vp.with_params({"beta_max": beta})
    assert moved.beta_max is beta
    assert vp.beta_max.item() == 20.0
    assert moved.same_as(VP(0.1, 5.0))
    assert not moved.same_as(vp)
    assert not vp.same_as(SubVP())
    assert bent_at().same_as(bent_at())
    assert not bent_at().same_as(bent_at(bend=2.0))
    assert Table.from_betas(ddpm(10)).same_as(Table.from_betas(ddpm(10)))
    assert not Table.from_betas(ddpm(10)).same_as(Table.from_betas(ddpm(11)))
    assert EDM().same_as(EDM(80.0))
    assert repr(VP(scalar(0.25).requires_grad_(), 20)) == "VP(beta_min=0.25, beta_max=20)"
    assert repr(bent_at()) == "LogSNR(function=bent, parameters={...})"


# Tables and discrete times


def test_ddpm_is_vp_at_i_plus_one_over_t():
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    t = np.arange(1, 1001) / 1000
    off_alpha, off_sigma = np.abs(VP().alpha(t).numpy() - alpha).max(), np.abs(VP().sigma(t).numpy() - sigma).max()
    # published for this pair: 1.0e-3 and 1.3e-3, to the printed digits
    assert off_alpha == pytest.approx(1.0e-3, abs=5e-5)
    assert off_sigma == pytest.approx(1.3e-3, abs=5e-5)
    # negative control: i/999, the other reading of the index, is ten times worse and has no noise at all at first
    t = np.arange(1000) / 999
    assert np.abs(VP().sigma(t).numpy() - sigma).max() == pytest.approx(1.0e-2, abs=5e-4)
    assert VP().log_snr(t[0]) == math.inf
    torch.testing.assert_close(Discrete(VP(), 1000).times, torch.arange(1, 1001, dtype=D) / 1000, rtol=EPS, atol=0)


@pytest.mark.parametrize("T", [5, 50, 1000])
def test_a_table_is_exact_at_its_knots_and_moves_by_the_ddpm_transition(T):
    betas = torch.linspace(0.02, 0.3, T, dtype=D) if T == 5 else ddpm(T)
    table = Table.from_betas(betas)
    view = Discrete(table, T)
    abar = torch.from_numpy(np.cumprod(1 - betas.numpy()))
    # T products of 1 - beta, each rounded; sigma^2 >= 1e-4 and B >= 1e-4, from logs whose argument is within 1e-4 of 1
    torch.testing.assert_close(table.alphas_cumprod, abar, rtol=4 * T * EPS, atol=0)
    torch.testing.assert_close(table.alpha(view.times) ** 2, table.alphas_cumprod, rtol=1e-14, atol=0)
    torch.testing.assert_close(table.sigma(view.times) ** 2, 1 - abar, rtol=2e-12, atol=0)
    torch.testing.assert_close(view.alphas_cumprod, table.alphas_cumprod, rtol=1e-14, atol=0)
    torch.testing.assert_close(view.betas, betas, rtol=2e-12, atol=0)  # 1e-16 / 1e-4
    assert torch.equal(view.index(view.times), torch.arange(T))
    # the exact solution of the SDE over a step: x_i = r x_{i-1} + noise, r and its variance from the table's own moments
    t = torch.cat((scalar([0.0]), view.times))
    alpha, s2 = table.alpha(t), table.sigma(t) ** 2
    ratio = alpha[1:] / alpha[:-1]
    torch.testing.assert_close(ratio, (1 - betas).sqrt(), rtol=1e-14, atol=0)
    torch.testing.assert_close(s2[1:] - ratio**2 * s2[:-1], betas, rtol=0, atol=32 * EPS)  # B <= 10 rounded, twice
    # and from its coefficients: int f dt and int (alpha_t/alpha_s)^2 g_s^2 ds, quadrature to 1e-13
    for i in (0, T // 2, T - 1):
        a, b = float(t[i]), float(t[i + 1])

        def spread(s, b=b):
            return (table.g2(s) * (table.alpha(b) / table.alpha(s)) ** 2).item()

        inside = b - 1e-14  # the last point of the step, not the first of the next
        assert quad(lambda s: table.f(s).item(), a + 1e-13, inside)[0] == pytest.approx(float(ratio[i].log()), rel=1e-9)
        assert quad(spread, a + 1e-13, inside)[0] == pytest.approx(float(betas[i]), rel=1e-9)


def test_a_table_interpolates_between_its_knots():
    """The rate is constant within a step, B a straight line: the table's schedule is a VP of that rate, piece by piece."""
    abar = scalar([0.9, 0.5])
    table = Table(abar)
    first, second = -math.log(0.9) * 2, -math.log(0.5 / 0.9) * 2
    for t, B, beta in ((0.2, 0.2 * first, first), (0.5, 0.5 * first, first), (0.8, 0.5 * first + 0.3 * second, second)):
        assert table.g2(t).item() == pytest.approx(beta, rel=1e-14)  # a knot belongs to the step before it
        assert table.f(t).item() == pytest.approx(-beta / 2, rel=1e-14)
        assert table.log_snr(t).item() == pytest.approx(-math.log(math.expm1(B)), rel=1e-13)


def test_the_prior_gap():
    """Against the KL divergence that torch has, and the published gap of a table of 1,000 steps cut to 50."""
    normal = torch.distributions.MultivariateNormal
    root = torch.linspace(-1, 2, 9, dtype=D).sin().reshape(3, 3)
    m, C = root[0] - 0.7, root @ root.mT + torch.eye(3, dtype=D)
    for schedule in (VP(), VP(0.1, 2.0), VE(0.01, 3.0), EDM(5.0), CondOT(0.9), Cosine(-3.0), bent_at(bend=1.0)):
        a, s, p = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max), schedule.prior_std
        for c in (C, C.diagonal(), scalar(0.3)):
            full = c if c.dim() == 2 else torch.diag(c.expand(3))
            eye = torch.eye(3, dtype=D)
            kl = torch.distributions.kl_divergence(normal(a * m, a**2 * full + s**2 * eye), normal(0 * m, p**2 * eye))
            # v - 1 - log v cancels: 1e-16, and Cholesky against eigenvalues
            torch.testing.assert_close(schedule.prior_gap(m, c), kl / 3, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(schedule.prior_gap(), schedule.prior_gap(mean=1.0, cov=0.0), rtol=0, atol=0)
    beta = scalar(2.0).requires_grad_()
    (found,) = torch.autograd.grad(VP(0.1, beta).prior_gap(m, C), beta)
    by_hand = five_point(lambda b: VP(0.1, b).prior_gap(m, C), beta.detach(), 1e-3)
    torch.testing.assert_close(found, by_hand, rtol=1e-9, atol=0)


def test_rates_for_a_thousand_steps_do_not_suit_fifty():
    short, long = Table.from_betas(ddpm(50)), Table.from_betas(ddpm(1000))
    assert short.alphas_cumprod[-1].item() == pytest.approx(0.603, abs=5e-4)
    with pytest.warns(PriorGapWarning, match="rates for T steps do not suit another T"):
        found = short.summary(mean=1.0, cov=0.25)
    assert found.prior_gap == pytest.approx(0.376, abs=5e-4)
    assert found.terminal_snr == pytest.approx(1.5, abs=0.05)
    summary = long.summary(mean=1.0, cov=0.25)  # warnings are errors here
    assert summary.prior_gap == pytest.approx(2e-5, abs=5e-6)
    assert summary.log_snr[1] == pytest.approx(math.log(summary.terminal_snr), rel=1e-12)
    assert "nats a dimension" in repr(summary)
    for schedule in (VP(), SubVP(), Cosine(), EDM(), CondOT()):
        schedule.summary(mean=1.0, cov=0.25)


def test_zero_terminal_snr():
    nothing = Table(scalar([0.9, 0.5, 0.0]))
    assert nothing.zero_terminal_snr
    assert (nothing.sigma(1.0).item(), nothing.alpha(1.0).item() < 2e-15) == (1.0, True)
    assert Table.from_betas(scalar([0.1, 0.5, 1.0])).alphas_cumprod[-1] == 0
    assert CondOT().zero_terminal_snr
    assert Cosine(-math.inf).zero_terminal_snr
    for schedule in (VP(), SubVP(), Cosine(), VE(), EDM(), CondOT(end=0.999), bent_at(), Table.from_betas(ddpm(1000))):
        assert not schedule.zero_terminal_snr


# Bad input


def falls(t, p):
    return 10 - 20 * t


BAD_TIMES = {
    "past the end": (1.01, GridError, "outside"),
    "an index": (500, GridError, r"\(i \+ 1\) / T"),
    "negative": (-0.1, GridError, "time 0 is the data"),
    "NaN": (math.nan, GridError, "nan"),
    "one NaN": (scalar([0.1, math.nan]), GridError, "nan"),
    "bool": (True, DtypeError, "float64"),
    "bools": (torch.tensor([True, False]), DtypeError, "float64"),
    "complex": (0.5j, DtypeError, "float64"),
    "text": ("noon", ArgumentTypeError, "torch.tensor"),
    "nothing": (None, ArgumentTypeError, "torch.tensor"),
}


@pytest.mark.parametrize("bad", list(BAD_TIMES))
def test_bad_times(bad):
    t, error, words = BAD_TIMES[bad]
    for name in ("alpha", "sigma", "log_snr", "f", "g", "g2", "rates", "log_snr_rate"):
        with pytest.raises(error, match=words):
            getattr(VP(), name)(t)
    x = torch.zeros(2, 1)
    with pytest.raises(error, match=words):
        VP().reparameterise(x, t, x)


def test_times_of_another_shape():
    x = torch.zeros(3, 2)
    for t in (scalar([0.1, 0.2]), scalar([0.1]), scalar([[0.1], [0.2], [0.3]])):
        with pytest.raises(ShapeError, match="give each row its own, or one for all"):
            VP().reparameterise(x, t, x)


BAD = {
    "VP falls": (call(VP, 20.0, 0.1), ArgumentError, "beta_min <= beta_max"),
    "VP negative": (call(VP, -0.1, 20.0), ArgumentError, "0 <= beta_min"),
    "VP nothing": (call(VP, 0.0, 0.0), ArgumentError, "beta_max"),
    "VP infinite": (call(VP, 0.1, math.inf), ArgumentError, "beta_max"),
    "VP text": (call(VP, "0.1"), ArgumentTypeError, "`beta_min` must be a number"),
    "VP bool": (call(VP, True), ArgumentTypeError, "`beta_min` must be a number"),
    "VP vector": (call(VP, scalar([0.1, 0.2])), ShapeError, "0-dim"),
    "VP integer tensor": (call(VP, torch.tensor(1)), DtypeError, "float64"),
    "SubVP NaN": (call(SubVP, 0.1, math.nan), ArgumentError, "beta_max"),
    "VE falls": (call(VE, 1.0, 0.5), ArgumentError, "sigma_min < sigma_max"),
    "VE zero": (call(VE, 0.0, 0.5), ArgumentError, "0 < sigma_min"),
    "VE none": (call(VE, None), ArgumentTypeError, "`sigma_min` must be a number"),
    "EDM negative": (call(EDM, -80.0), ArgumentError, "80 is usual"),
    "EDM text": (call(EDM, "80"), ArgumentTypeError, "a number"),
    "EDM NaN": (call(EDM, math.nan), ArgumentError, "80 is usual"),
    "CondOT past 1": (call(CondOT, 1.5), ArgumentError, "1 is pure noise"),
    "CondOT none": (call(CondOT, None), ArgumentTypeError, "a number"),
    "Cosine positive": (call(Cosine, 20.0), ArgumentError, "-20"),
    "Cosine NaN": (call(Cosine, math.nan), ArgumentError, "-20"),
    "Cosine text": (call(Cosine, "low"), ArgumentTypeError, "a number"),
    "table rises": (call(Table, scalar([0.5, 0.6])), ArgumentError, "fall from below 1"),
    "table flat": (call(Table, scalar([0.5, 0.5])), ArgumentError, "fall from below 1"),
    "table at 1": (call(Table, scalar([1.0, 0.5])), ArgumentError, "fall from below 1"),
    "table negative": (call(Table, scalar([0.5, -0.1])), ArgumentError, "0 or more"),
    "table NaN": (call(Table, scalar([0.5, math.nan])), ArgumentError, "fall from below 1"),
    "table list": (call(Table, [0.5, 0.1]), ShapeError, "floating tensor"),
    "table of integers": (call(Table, torch.tensor([3, 1])), ShapeError, "floating tensor"),
    "table empty": (call(Table, scalar([])), ShapeError, r"shape \(T,\)"),
    "table 2-D": (call(Table, scalar([[0.5]])), ShapeError, r"shape \(T,\)"),
    "betas zero": (call(Table.from_betas, scalar([0.0, 0.1])), ArgumentError, r"\(0, 1\]"),
    "betas past 1": (call(Table.from_betas, scalar([0.1, 1.1])), ArgumentError, r"\(0, 1\]"),
    "betas text": (call(Table.from_betas, "linear"), ArgumentTypeError, "tensor"),
    "all noise twice": (call(Table.from_betas, scalar([1.0, 1.0])), ArgumentError, "fall"),
    "log-SNR rises": (call(LogSNR, lambda t, p: 20 * t), ArgumentError, "must fall in t"),
    "log-SNR turns": (call(LogSNR, lambda t, p: -((t - 0.5) ** 2)), ArgumentError, "must fall in t"),
    "log-SNR NaN": (call(LogSNR, lambda t, p: torch.sqrt(-t)), ArgumentError, "must fall in t"),
    "log-SNR a number": (call(LogSNR, lambda t, p: 1.0), ShapeError, "shape of t"),
    "log-SNR summed": (call(LogSNR, lambda t, p: -t.sum()), ShapeError, "shape of t"),
    "log-SNR no function": (call(LogSNR, 3.0), ArgumentTypeError, r"function of \(t, p\)"),
    "log-SNR of t alone": (call(LogSNR, lambda t: -t), ArgumentTypeError, r"function of \(t, p\)"),
    "log-SNR number": (call(LogSNR, falls, {"top": 3.0}), ArgumentTypeError, "torch.tensor"),
    "log-SNR list": (call(LogSNR, falls, [scalar(3.0)]), ArgumentTypeError, "use a dict"),
    "log-SNR taken": (call(LogSNR, falls, {"eta": scalar(3.0)}), ArgumentError, "rename"),
    "log-SNR reserved": (call(LogSNR, falls, {"t1": scalar(3.0)}), ArgumentError, "rename"),
    "T of 0": (call(Discrete, VP(), 0), ArgumentError, "at least 1"),
    "T of 10.0": (call(Discrete, VP(), 10.0), ArgumentTypeError, "must be an int"),
    "T of a name": (call(Discrete, "VP", 10), ArgumentTypeError, "such as VP"),
    "eps of another shape": (
        call(VP().reparameterise, torch.zeros(2, 1), 0.5, torch.zeros(2)), ShapeError, "one shape",
    ),
    "eps a number": (call(VP().reparameterise, torch.zeros(2, 1), 0.5, 0.0), ShapeError, "one shape"),
    "x0 of integers": (
        call(VP().reparameterise, torch.zeros(2, 1, dtype=torch.uint8), 0.5, torch.zeros(2, 1)), DtypeError, "float",
    ),
    "path to no signal": (
        call(CondOT().sample_path, torch.zeros(2, 1), (0.5, 1.0), Philox(1)), GridError, "stop before it",
    ),
    "path back": (call(VP().sample_path, torch.zeros(2, 1), (0.5, 0.2), Philox(1)), GridError, "increase strictly"),
    "path standing": (call(VP().sample_path, torch.zeros(2, 1), (0.5, 0.5), Philox(1)), GridError, "increase strictly"),
    "path at one time": (call(VP().sample_path, torch.zeros(2, 1), 0.5, Philox(1)), GridError, r"shape \(T,\)"),
    "path of a seed": (call(VP().sample_path, torch.zeros(2, 1), (0.5,), 1), ArgumentTypeError, r"Philox\(seed\)"),
    "path past the end": (call(VP().sample_path, torch.zeros(2, 1), (0.5, 2.0), Philox(1)), GridError, "outside"),
    "gap of two sizes": (call(VP().prior_gap, torch.zeros(2), torch.ones(3)), ShapeError, "same dimensions"),
    "gap of an image": (call(VP().prior_gap, torch.zeros(2, 2)), ShapeError, "flatten"),
}  # fmt: skip


@pytest.mark.parametrize("bad", list(BAD))
def test_bad_input(bad):
    act, error, words = BAD[bad]
    with pytest.raises(error, match=words) as caught:
        act()
    assert caught.type is error


def test_coefficients_line_up_with_rows():
    x = torch.zeros(2, 3, 4)
    assert like(scalar([1.0, 2.0]), x).shape == (2, 1, 1)
    assert like(scalar(1.0), x).shape == ()
    assert like(scalar(1.0), x).dtype == torch.float32
