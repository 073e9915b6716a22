"""Measurements of the methods for jumps, at a size that fits a test and, by `benchmarks/jumps.py`, at full size."""

import math
import time
from collections.abc import Iterable

import black_scholes
import numpy as np
import torch
from problems import F64
from scipy.interpolate import CubicSpline

from sdesens import SDE, Problem, hessian, sensitivity
from sdesens.functionals import AsianCall
from sdesens.models import barrier, basket, gbm_call, gbm_digital, ou

MODELS = {"call": gbm_call, "digital": gbm_digital}
# without a control variate, and with one antithetic pair: what the exact standard deviations are for
BARE = {"likelihood_ratio": {"control": False}, "malliavin": {"control": False}, "vibrato": {"draws": 1}}


def first_order(n_paths: int, seed: int) -> Iterable[tuple[str, float, float]]:
    """(estimator, z against the exact derivative, reported over exact deviation) of one exact step of Black-Scholes."""
    rows = [*black_scholes.first_order(), *map(black_scholes.vibrato_delta, MODELS)]
    for (kind, method), group in _grouped(rows).items():
        problem = MODELS[kind](log=True, n_steps=1).problem
        names = tuple(r.name for r in group)
        result = sensitivity(problem, n_paths=n_paths, method=method, wrt=names, seed=seed, **BARE.get(method, {}))
        for row in group:
            yield (f"{kind}, {method}, d/d {row.name}", *_score(result.gradient[row.name], row))


def exactly(n_paths: int) -> Iterable[tuple[str, float]]:
    """(estimator, relative error) where one exact step leaves nothing to sample."""
    for kind, make in MODELS.items():
        problem = make(log=True, n_steps=1).problem
        result = sensitivity(problem, n_paths=n_paths, method="conditional", wrt=("s0", "sigma", "r"))
        for name, estimate in result.gradient.items():
            yield f"{kind}, conditional, d/d {name}", abs(float(estimate.mean) / black_scholes.EXACT[kind][name] - 1)
        gamma = hessian(problem, n_paths=n_paths, method="conditional", wrt="s0")["s0", "s0"]
        yield f"{kind}, conditional, gamma", abs(float(gamma.mean) / black_scholes.EXACT[kind]["s0, s0"] - 1)


def second_order(n_paths: int, seed: int) -> Iterable[tuple[str, float, float]]:
    """The same for gamma, by two methods in a row."""
    for row in black_scholes.second_order():
        problem = MODELS[row.kind](log=True, n_steps=1).problem
        estimate = hessian(problem, n_paths=n_paths, method=row.method, wrt="s0", seed=seed)["s0", "s0"]
        yield (f"{row.kind}, {row.method}, gamma", *_score(estimate, row))


def _grouped(rows) -> dict[tuple[str, str], list]:
    found: dict[tuple[str, str], list] = {}
    for row in rows:
        found.setdefault((row.kind, row.method), []).append(row)
    return found


def _score(estimate, row) -> tuple[float, float]:
    error = float(estimate.standard_error)
    return (float(estimate.mean) - row.exact) / error, error * math.sqrt(estimate.n) / row.deviation


def second_moments(steps, n_paths: int, seed: int) -> dict[str, list[float]]:
    """E G^2 of the digital's delta, price itself simulated, on each grid."""
    moments: dict[str, list[float]] = {}
    for n in steps:
        problem = gbm_digital(n_steps=n).problem
        for method in ("likelihood_ratio", "vibrato", "conditional", "malliavin"):
            result = sensitivity(problem, n_paths=n_paths, method=method, wrt="s0", seed=seed, **BARE.get(method, {}))
            g = result.gradient["s0"]
            moments.setdefault(method, []).append(float(g.standard_error**2 * n_paths + g.mean**2))
    return moments


def fitted(steps, values) -> float:
    """Exponent of the step size dt = 1 / n in these values."""
    return float(-np.polyfit(np.log(steps), np.log(values), 1)[0])


# Ten problems for method="auto"


def _params(**values: float) -> dict[str, torch.Tensor]:
    return {k: torch.tensor(v, dtype=F64) for k, v in values.items()}


def first_passage(ys, p):
    """Whether the path was above a level at one of the output times."""
    return (ys[:, :, 0].amax(0) > 1.3).to(ys.dtype)


def above(ys, p):
    return (ys[-1, :, 0] > 0.8).to(ys.dtype)


def in_a_quarter(ys, p):
    """Both components positive."""
    return ((ys[-1, :, 0] > 0) & (ys[-1, :, 1] > 0)).to(ys.dtype)


def pull(t, y, p):
    return p["kappa"] * (p["m"] - y)


def constant(t, y, p):
    return p["sigma"] * torch.ones_like(y)


def growth(t, y, p):
    return p["mu"] * y


def relative(t, y, p):
    return p["sigma"] * y


def coupled(t, y, p):
    return torch.tanh(y @ torch.tensor([[0.2, -0.8], [0.5, 0.1]], dtype=y.dtype)) + p["mu"]


def coupled_noise(t, y, p):
    turn = torch.tensor([[1.0, 0.0], [0.5, 0.8]], dtype=y.dtype)
    return p["sigma"] * (1 + 0.2 * torch.sin(y))[..., None] * turn


def ten() -> dict[str, tuple[Problem, tuple[str, ...]]]:
    """Problem and what to differentiate in, by name; 32 steps each."""
    pulled = SDE(pull, constant, _params(kappa=1.0, m=0.9, sigma=0.4))
    grown = SDE(growth, relative, _params(mu=0.1, sigma=0.4))
    plane = SDE(coupled, coupled_noise, _params(mu=0.1, sigma=0.5), noise_type="general")
    one, n = torch.ones(1, dtype=F64), 32
    quarters = (0.0, 0.25, 0.5, 0.75, 1.0)
    return {
        "call": (gbm_call(n_steps=n).problem, ("s0", "sigma", "r")),
        "digital": (gbm_digital(n_steps=n).problem, ("s0", "sigma", "r")),
        "digital, log price": (gbm_digital(log=True, n_steps=n).problem, ("s0", "sigma")),
        "barrier": (barrier(n_steps=n).problem, ("s0", "sigma", "r")),
        "basket": (basket(n_steps=n).problem, ("s0", "sigma")),
        "Ornstein-Uhlenbeck, X^2": (ou(n_steps=n).problem, ("kappa", "m", "sigma")),
        "Asian call": (Problem(grown, AsianCall(1.0), one, quarters, n), ("mu", "sigma", "y0")),
        "indicator": (Problem(pulled, above, one, (0.0, 1.0), n), ("kappa", "m", "sigma")),
        "first passage": (Problem(pulled, first_passage, one, quarters, n), ("kappa", "m")),
        "indicator in the plane": (
            Problem(plane, in_a_quarter, torch.zeros(2, dtype=F64), (0.0, 1.0), n),
            ("mu", "sigma"),
        ),
    }


def work(problem: Problem, wrt, method: str, n_paths: int, seed: int) -> tuple[float, str]:
    """Geometric mean over components of the variance of one path, times seconds a path; and the method."""
    began = time.perf_counter()
    result = sensitivity(problem, n_paths=n_paths, method=method, wrt=wrt, seed=seed, progress=False)
    seconds = time.perf_counter() - began
    variance = torch.cat([g.standard_error.flatten() for g in result.gradient.values()]).square() * n_paths
    return float(variance.clamp_min(1e-300).log().mean().exp()) * seconds / n_paths, result.method


# Cox-Ingersoll-Ross below the Feller bound

FELLER = {"kappa": 1.0, "theta": 0.04, "x0": 0.04, "sigma": math.sqrt(2 * 0.04 / 0.6), "t1": 1.0, "n_steps": 64}


def lamperti_mean(sigma: float, *, kappa: float, theta: float, x0: float, t1: float, n_steps: int) -> float:
    """E Y_N^2 of the drift-implicit chain itself, by quadrature backwards in time: nothing is sampled.

    v_n(y) = E v_{n+1}(Y'), Y' = [b + (b^2 + c h (4 kappa theta - sigma^2) / 2)^(1/2)] / 2c, b = y + sigma dW / 2, c = 1 + kappa h / 2;
    v on 1,200 nodes, closer together near 0, by cubic splines, the normal by 60 nodes. Doubling either moves the derivative in
    sigma by less than 1e-7.
    """
    h = t1 / n_steps
    c = 1 + kappa * h / 2
    nodes = 2.2 * np.linspace(0, 1, 1200) ** 2
    x, w = np.polynomial.hermite_e.hermegauss(60)
    b = nodes[:, None] + 0.5 * sigma * math.sqrt(h) * x
    there = (b + np.sqrt(b * b + c * h * (4 * kappa * theta - sigma**2) / 2)) / (2 * c)
    v = nodes**2
    for _ in range(n_steps):
        v = CubicSpline(nodes, v)(there) @ (w / w.sum())
    return float(CubicSpline(nodes, v)(math.sqrt(x0)))


def lamperti_bias(step: float = 1e-4) -> float:
    """d/dsigma of the chain's mean; that of the process is 0."""
    rest = {k: v for k, v in FELLER.items() if k != "sigma"}
    up, down = (lamperti_mean(FELLER["sigma"] + s, **rest) for s in (step, -step))
    return (up - down) / (2 * step)
