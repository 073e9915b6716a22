"""Fits by transition moments beside closed forms, simulated worlds and bad input."""

import math

import pytest
import torch

from sdesens import SDE, Philox, sdeint
from sdesens.errors import (
    ArgumentError,
    ArgumentTypeError,
    DtypeError,
    HighVarianceWarning,
    NonFiniteError,
    ShapeError,
    UnknownParameterError,
)
from sdesens.examples.lynx_hare import fit_pelts, pelts, period, simulate
from sdesens.examples.neural_sde import curves, fit_neural
from sdesens.fit import fit_transitions
from sdesens.models.tbill import fit_vasicek, treasury_bill_rate
from sdesens.transitions import transitions

D = torch.float64


def numbers(**values):
    return {k: torch.tensor(v, dtype=D) for k, v in values.items()}


def ou(**start):
    return SDE(
        lambda t, y, p: p["kappa"] * (p["m"] - y),
        lambda t, y, p: p["sigma"].expand_as(y),
        numbers(**{"kappa": 0.5, "m": 0.03, "sigma": 0.05, **start}),
    )


@pytest.fixture(scope="module")
def rate():
    return torch.tensor(treasury_bill_rate())[:, None]


@pytest.mark.parametrize("n_steps", [1, 4])
def test_least_squares_of_the_treasury_bill_rate(rate, n_steps):
    """Linear drift: the chain's transitions are normal, and its likelihood is that of an autoregression, in closed form."""
    exact = fit_vasicek(rate[:, 0].numpy(), 0.25)
    found = fit_transitions(ou(), rate, 0.25, n_steps=n_steps, positive=("kappa", "sigma"), n_paths=1000, seed=2)
    e, h = math.exp(-0.25 * exact.kappa), 0.25 / n_steps
    q = e ** (1 / n_steps)  # 1 - kappa h of the chain
    variance = exact.sigma**2 * (1 - e**2) / (2 * exact.kappa)
    wanted = {
        "kappa": (1 - q) / h,
        "m": exact.m,
        "sigma": math.sqrt(variance * (1 - q**2) / (1 - q ** (2 * n_steps)) / h),
    }
    residual = rate[1:] - exact.m - (rate[:-1] - exact.m) * e
    tail = float((residual**4).mean() / (residual**2).mean() ** 2)  # 3 if normal, and much more here
    for name, value in wanted.items():
        noise = 4 / math.sqrt(1000) * float(found.standard_errors[name])  # of the simulation, twice the documented
        if name == "sigma":  # a weighted mean of squares, its weights known to sqrt(2/500); 4 standard errors
            noise = 4 * value / 2 * math.sqrt(2 / 500 * tail / 202)
        assert abs(float(found.sde.params[name]) - value) < noise, name
    # errors: the chain's parameters by the delta method from those of the exact law; kappa moves by dq/dkappa, some 10 %
    for i, name in enumerate(wanted):
        assert float(found.standard_errors[name]) == pytest.approx(float(exact.covariance[i, i].sqrt()), rel=0.15), name
    normal = torch.distributions.Normal(exact.m + (rate[:-1] - exact.m) * e, math.sqrt(variance))
    assert found.log_likelihood == pytest.approx(
        float(normal.log_prob(rate[1:]).sum()), abs=2.5
    )  # V's noise, 202 of 0.06


def test_the_gradient_is_that_of_the_loss(rate):
    task = transitions(ou(), rate, 0.25, 2, None, 50, 0)

    def loss(x):
        return task.loss(dict(zip(("kappa", "m", "sigma"), x, strict=True)))

    x = torch.tensor([0.3, 0.05, 0.02], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(loss, x, eps=1e-6, rtol=1e-6)


def test_standard_errors_are_the_spread_over_worlds():
    """Estimates from 40 simulated series, each of 200 transitions: their spread is known to 11 %, 4 of those."""
    truth = ou(kappa=2.0, m=1.0, sigma=0.7)
    ts = [0.1 * i for i in range(201)]
    worlds = sdeint(truth, torch.ones(40, 1, dtype=D), ts, n_steps=200, seed=4)
    fits = [
        fit_transitions(truth, worlds[:, j], 0.1, n_steps=1, positive=("kappa", "sigma"), n_paths=60, seed=j)
        for j in range(40)
    ]
    for name in ("kappa", "m", "sigma"):
        z = torch.stack([(f.sde.params[name] - truth.params[name]) / f.standard_errors[name] for f in fits])
        assert abs(float(z.std()) - 1) < 0.45 + 0.05, name  # and 2/sqrt(60) of simulation
        assert abs(float(z.mean())) < 4 / math.sqrt(40) + 0.4, (
            name
        )  # kappa is biased upwards by some 0.3 of its error: T = 20


def test_several_series_are_not_joined(rate):
    halves = [rate[:100], rate[100:]]
    one, two = (transitions(ou(), s, 0.25, 1, None, 50, 0) for s in (rate, halves))
    assert len(one.starts) == 202
    assert len(two.starts) == 201
    assert torch.equal(two.starts, torch.cat((one.starts[:99], one.starts[100:])))


# examples


def test_the_data_are_the_published_ones():
    assert pelts().shape == (21, 2)
    assert pelts().sum(0).tolist() == pytest.approx([715.7, 423.5])
    assert [round(float(p), 1) for p in period(pelts())] == [10.3, 9.8]


def test_lotka_volterra_from_three_starts():
    fits = [
        fit_pelts(
            pelts(), dict(zip(("alpha", "beta", "gamma", "delta", "sigma1", "sigma2"), x, strict=True)), n_paths=100
        )
        for x in ((0.5, 0.03, 0.8, 0.03, 0.3, 0.3), (1.0, 0.05, 0.5, 0.01, 0.5, 0.5), (0.2, 0.01, 1.2, 0.05, 0.2, 0.2))
    ]
    for other in fits[1:]:
        assert other.converged
        for k, v in fits[0].sde.params.items():
            assert float(other.sde.params[k]) == pytest.approx(float(v), rel=1e-4), k
    # a Bayesian fit of the ODE with errors of observation has 0.545, 0.028, 0.803, 0.024 (Carpenter 2018): another model, near
    for k, v in {"alpha": 0.545, "beta": 0.028, "gamma": 0.803, "delta": 0.024}.items():
        assert abs(float(fits[0].sde.params[k]) - v) < 2 * float(fits[0].standard_errors[k]), k
    paths = simulate(fits[0], pelts()[0], 20, n_paths=500, seed=1)
    assert bool((paths > 0).all())
    for seen, model in ((pelts().mean(0), paths.mean(0)), (period(pelts()), period(paths))):
        assert bool(((seen - model.mean(0)).abs() < 2 * model.std(0)).all())


def test_a_neural_sde_finds_the_volatility_that_made_the_series():
    """dr = (1 - r) dt + 0.4 r dW, 800 steps of 0.1: the network's volatility is 0.4 r where the series has been."""
    truth = SDE(lambda t, y, p: 1 - y, lambda t, y, p: p["s"] * y, numbers(s=0.4))
    series = sdeint(truth, torch.ones(1, 1, dtype=D), [0.1 * i for i in range(801)], n_steps=3200, seed=5)[:, 0]
    fit = fit_neural(series, 0.1, n_paths=60, max_iterations=60)
    levels = series.quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=D))[:, None]
    found = curves(fit, levels)
    # a volatility is known to 1/sqrt(2 n) from n steps: 160 around each level, 6 %; 2.5 of those, and 2 steps for 4
    assert bool(((found.volatility / (0.4 * levels[:, 0]) - 1).abs() < 0.17).all())
    assert float(found.drift[0]) > 0 > float(found.drift[-1])


# bad input


GOOD = torch.linspace(0.1, 1, 20, dtype=D)[:, None]


@pytest.mark.parametrize(
    ("series", "options", "error", "words"),
    [
        (GOOD.float(), {}, ArgumentTypeError, "float64"),
        (GOOD[:, 0], {}, ShapeError, r"x\[:, None\]"),
        (GOOD[:1], {}, ShapeError, "one transition or more"),
        ([], {}, ArgumentTypeError, "a list of them"),
        ([GOOD, GOOD.expand(20, 2)], {}, ShapeError, "one d for all"),
        (GOOD - 0.5, {"transform": torch.log}, ArgumentError, "beyond `transform` in .* rows, the first is row 0"),
        (GOOD, {"transform": lambda y: y[:, 0]}, ShapeError, "`transform` must keep the shape"),
        (GOOD, {"dt": 0.0}, ArgumentError, "`dt`"),
        (GOOD, {"n_paths": 41}, ArgumentError, "even int, 40 or more, got 41"),
        (GOOD, {"wrt": ("rate",)}, UnknownParameterError, "`wrt` names 'rate'"),
        (GOOD, {"wrt": ("m", "m")}, ArgumentError, "each once"),
        (GOOD, {"wrt": ("m",), "positive": ("sigma",)}, UnknownParameterError, "`positive` names 'sigma'"),
        (GOOD, {"positive": ("m",), "sde": ou(m=-1.0)}, ArgumentError, r"starts at -1\.0: start above 0"),
        (GOOD, {"sde": ou(sigma=0.0), "wrt": ("m",)}, NonFiniteError, "not finite at the parameters"),
        (GOOD, {"sde": SDE(lambda t, y, p: t * p["a"] * y, lambda t, y, p: y, numbers(a=1.0))}, ArgumentError, "must not depend on time"),
        (GOOD, {"sde": SDE(lambda t, y, p: p["a"] * torch.sin(6 * t) - y, lambda t, y, p: y, numbers(a=0.0))}, ArgumentError, "must not depend on time"),
        (GOOD - 0.5, {"sde": SDE(lambda t, y, p: p["a"] - y, lambda t, y, p: y.sqrt(), numbers(a=1.0))}, NonFiniteError, "coefficients .* at 9 of the 19 starts"),
        (GOOD.expand(20, 1) * 0 + 1, {}, ArgumentError, "never changes"),
        (GOOD, {"transform": lambda y: torch.cat((y, y), 1)}, ShapeError, "keep the shape"),
        (GOOD, {"transform": 3}, ArgumentTypeError, "`transform` must be a function"),
        (GOOD, {"max_iterations": 0}, ArgumentError, "`max_iterations`"),
        (GOOD, {"ridge": -1.0}, ArgumentError, "`ridge`"),
        (GOOD, {"errors": "no"}, ArgumentTypeError, "`errors`"),
        (GOOD, {"wrt": 3}, ArgumentTypeError, "`wrt` must be a name"),
        (GOOD, {"sde": SDE(lambda t, y, p: -p["k"] * y, lambda t, y, p: y, {"k": torch.ones(())})}, DtypeError, "module.double"),
        (GOOD, {"sde": SDE(lambda t, y, p: p["a"].sum() - y, lambda t, y, p: y, {"a": torch.zeros(65, dtype=D)})}, ArgumentError, "up to 64 numbers, got 65"),
    ],
)  # fmt: skip
def test_what_is_refused(series, options, error, words):
    given = {"dt": 0.1, "n_steps": 1, "n_paths": 40, "sde": ou(), **options}
    with pytest.raises(error, match=words):
        fit_transitions(given.pop("sde"), series, given.pop("dt"), **given)


def test_it_prints():
    z = Philox(1).normals(0, 1, 0, 60, 1, dtype=D, device=torch.device("cpu"))[:, 0]
    found = fit_transitions(ou(m=0.0), z, 0.1, n_steps=1, wrt=("m",), n_paths=40)
    assert "Fit to 59 transitions, log-likelihood" in repr(found)
    assert "m " in repr(found)
    assert "NOT converged" in repr(fit_transitions(ou(), z, 0.1, n_steps=1, n_paths=40, max_iterations=1, errors=False))


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("positive", [(), ("k", "s")])
def test_the_answer_knows_no_units_and_no_bad_start(unit, positive):
    """The least squares of an autoregression, from starts where a full first step would leave the volatility at 0 or below."""
    plain = SDE(lambda t, y, p: -p["k"] * y, lambda t, y, p: p["s"].expand_as(y), numbers(k=1.0, s=1.0))
    y = sdeint(plain, torch.zeros(1, 1, dtype=D), [0.1 * i for i in range(201)], n_steps=200, seed=3)[:, 0]
    q = float((y[1:] * y[:-1]).sum() / y[:-1].square().sum())
    k, s = (1 - q) / 0.1, float((y[1:] - q * y[:-1]).square().mean().sqrt()) / math.sqrt(0.1)
    for first in (1.0, 0.9, 100.0):
        found = fit_transitions(
            plain.with_params(**numbers(k=2.0, s=first * unit)),
            unit * y,
            0.1,
            n_steps=1,
            positive=positive,
            n_paths=400,
        )
        assert found.converged
        assert abs(float(found.sde.params["s"])) / unit == pytest.approx(s, rel=0.02)  # simulation: 0.1 of 5 %
        assert abs(float(found.sde.params["k"]) - k) < 0.15 * float(found.standard_errors["k"])
    exact = -100 * math.log(2 * math.pi * 0.1 * s**2) - 100
    assert found.log_likelihood + 200 * math.log(unit) == pytest.approx(
        exact, abs=4 * math.sqrt(200 / 400)
    )  # d sqrt(K/M)


def test_likelihoods_have_no_bias_from_sampled_variances():
    """Means over 24 seeds of what sampled V make of the likelihood at fixed parameters, beside the exact one; 4 standard errors."""
    plain = ou(kappa=1.0, m=0.0, sigma=1.0)
    y = sdeint(plain, torch.zeros(1, 1, dtype=D), [0.1 * i for i in range(201)], n_steps=200, seed=3)[:, 0]
    exact = torch.distributions.Normal(0.9 * y[:-1], math.sqrt(0.1)).log_prob(y[1:]).sum()
    found = []
    for seed in range(24):
        task = transitions(plain, y, 0.1, 1, None, 60, seed)
        found.append(-task.loss(plain.params) + 200 * task.log_det_bias / 2 - 100 * math.log(2 * math.pi) - exact)
    found = torch.stack(found)
    assert abs(float(found.mean())) < 4 * float(found.std()) / math.sqrt(24)
    assert 100 * abs(task.log_det_bias) > 4 * float(found.std()) / math.sqrt(
        24
    )  # negative control: without the correction


def test_parameters_that_are_not_told_apart_have_no_errors():
    both = SDE(lambda t, y, p: (p["a"] + p["b"]) - y, lambda t, y, p: torch.ones_like(y), numbers(a=1.0, b=1.0))
    with pytest.warns(HighVarianceWarning, match="does not tell the parameters apart"):
        found = fit_transitions(both, GOOD, 0.1, n_steps=1, n_paths=40)
    assert found.covariance is None
    assert found.converged


def test_the_callers_module_is_left_alone():
    net = torch.nn.Linear(1, 1).double()

    class Model(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def __init__(self):
            super().__init__()
            self.net, self.noise = net, torch.nn.Parameter(torch.ones((), dtype=D))

        def f(self, t, y):
            return self.net(y)

        def g(self, t, y):
            return self.noise.expand_as(y)

    before = [p.detach().clone() for p in net.parameters()]
    z = Philox(1).normals(0, 1, 0, 60, 1, dtype=D, device=torch.device("cpu"))[:, 0]
    with torch.no_grad():
        found = fit_transitions(Model(), z, 0.1, n_steps=1, wrt="net.*", n_paths=40)
    assert found.names == ("net.weight", "net.bias")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert not any(p.requires_grad for p in found.sde.params.values())
    assert found.sde.params["noise"].data_ptr() != Model().noise.data_ptr()
