"""Measurements that a test makes at a size that fits and `benchmarks/bars.py` at full size."""

import math
import subprocess
import sys

import torch
from problems import CPU, F64, GBM, brownian_end, gauss_hermite, rms

from sdesens import Coarsened, Estimate, Philox, sensitivity
from sdesens.sensitivity import adjoint, forward, pathwise
from sdesens.sensitivity.tile import Tile


def scores(exact: dict[str, tuple[float, float]], problem, method: str, n_paths: int, seed: int):
    """By name: (z of the estimate in its own standard errors, reported over exact standard error).

    Names whose exact variance is zero give (relative error, 1).
    """
    names = tuple(k for k in exact if k != "value")
    result = sensitivity(problem, n_paths=n_paths, method=method, wrt=names, seed=seed)
    found = {}
    for name, (mean, variance) in exact.items():
        estimate = result.value if name == "value" else result.gradient[name]
        m, se = estimate.mean.flatten().item(), estimate.standard_error.flatten().item()
        if variance == 0.0:
            found[name] = (abs(m / mean - 1.0), 1.0 + se)
        else:
            found[name] = ((m - mean) / se, se / math.sqrt(variance / n_paths))
    return found


def coverage(exact: dict[str, tuple[float, float]], problem, method: str, n_paths: int, seeds) -> dict[str, float]:
    """By name: how often the 95 % interval holds the chain's exact number."""
    names = tuple(k for k, (_, variance) in exact.items() if variance > 0)
    hits = dict.fromkeys(names, 0)
    wrt = tuple(k for k in names if k != "value")
    for seed in seeds:
        result = sensitivity(problem, n_paths=n_paths, method=method, wrt=wrt, seed=seed)
        for name in names:
            low, high = (result.value if name == "value" else result.gradient[name]).confidence_interval(0.95)
            hits[name] += bool(low <= exact[name][0] <= high)
    return {k: n / len(seeds) for k, n in hits.items()}


def strong_errors(model: GBM, steps, count: int, seed: int) -> dict[str, list[float]]:
    """RMS over paths of the scheme's derivative of X_T minus the exact one, on one Brownian path for all grids."""
    fine = Philox(seed)
    exact = model.path_derivatives(brownian_end(fine, count, steps[-1], model.t1))
    errors: dict[str, list[float]] = {k: [] for k in ("mu", "sigma")}
    for n in steps:
        problem = model.problem().with_steps(n)
        tile = Tile(problem, Coarsened(fine, steps[-1] // n), 0, count, count, 1)
        found = forward(tile, problem.leaves(("mu", "sigma"))).gradients
        for k, e in errors.items():
            e.append(float((found[k] - exact[k]).square().mean().sqrt()))
    return errors


def weak_errors_by_quadrature(model: GBM, steps, method: str = "pathwise") -> dict[str, list[float]]:
    """|gradient of E X_N^2 minus that of E X_T^2| by name, without sampling: two nodes a step are exact for X^2."""
    exact = model.sde(2)
    errors: dict[str, list[float]] = {k: [] for k in ("mu", "sigma", "y0", "t1")}
    for n in steps:
        problem = model.problem(2).with_steps(n)
        result = sensitivity(problem, n_paths=2**n, method=method, wrt=tuple(errors), noise=gauss_hermite(2, n))
        for k, e in errors.items():
            e.append(abs(result.gradient[k].mean.flatten().item() - exact[k]))
    return errors


def weak_errors_by_coupling(model: GBM, steps, n_paths: int, seed: int) -> dict[str, list[Estimate]]:
    """Mean of the scheme's gradient of X^2 minus the exact path's on the same Brownian path: little variance."""
    samples: dict[str, list[list[torch.Tensor]]] = {k: [[] for _ in steps] for k in ("mu", "sigma")}
    fine, most = Philox(seed), 20_000
    for first in range(0, n_paths, most):
        count = min(most, n_paths - first)
        z = fine.normals(first, count, 0, steps[-1], 1, dtype=F64, device=CPU)
        exact = model.path_derivatives(z[:, :, 0].sum(0) * math.sqrt(model.t1 / steps[-1]))
        for i, n in enumerate(steps):
            problem = model.problem(2).with_steps(n)
            tile = Tile(problem, Coarsened(fine, steps[-1] // n), first, count, count, 1)
            found = forward(tile, problem.leaves(("mu", "sigma"))).gradients
            for k in samples:
                samples[k][i].append(found[k] - 2 * exact["value"] * exact[k])
    return {k: [Estimate.from_samples(torch.cat(s)) for s in rows] for k, rows in samples.items()}


def adjoint_errors(problem, noise_dim: int, count: int, steps, wrt, method=adjoint, seed: int = 5, **options):
    """Relative RMS over paths of a continuous adjoint minus pathwise, by name, on one Brownian path for all grids."""
    errors = []
    for n in steps:
        fine = problem.with_steps(n)
        tile = Tile(fine, Coarsened(Philox(seed), steps[-1] // n), 0, count, 1, noise_dim)
        theta = fine.leaves(wrt)
        errors.append(rms(method(tile, theta, **options).gradients, pathwise(tile, theta).gradients))
    return {k: [e[k] for e in errors] for k in errors[0]}


MEMORY = """
import sys, torch
sys.path[:0] = {path!r}
from problems import GBM
from sdesens import sensitivity
from dataclasses import replace

def peak():  # of this program alone: getrusage would count the memory of the process that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

problem = replace(GBM(), n_steps={n_steps}).problem()
sensitivity(problem.with_steps(20), n_paths=400, method={method!r}, compile=False)  # the first call loads code
before = peak()
result = sensitivity(problem, n_paths={n_paths}, method={method!r}, compile=False)
after = peak()
assert torch.isfinite(result.gradient["sigma"].mean)
print((after - before) / 1024)
"""


def peak_megabytes(method: str, n_paths: int, n_steps: int) -> float:
    """Peak resident memory of a gradient above that of a warm process, in a process of its own (Linux: KiB units)."""
    script = MEMORY.format(path=sys.path, method=method, n_paths=n_paths, n_steps=n_steps)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout)
