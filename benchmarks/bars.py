"""The numbered claims at full size: `python benchmarks/bars.py [1 2 ...]`, one line a figure, exit status 1 if one fails.

    1  pathwise, forward and central differences are one derivative (noise held fixed)
    2  gradients of GBM and OU against the exact chain, a million paths
    3  orders of convergence: strong, weak, and of the continuous adjoint
    4  coverage of the 95 % intervals over 400 seeds
    5  the same bits however the work is divided
    6  memory of 10,000 paths by 10,000 steps

The measurements are those of the tests, in tests/measure.py, at larger sizes.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from measure import (
    adjoint_errors,
    coverage,
    peak_megabytes,
    scores,
    strong_errors,
    weak_errors_by_coupling,
    weak_errors_by_quadrature,
)
from problems import GBM, NOISE_DIM, OU, D, slope, smooth, smooth_functional, worst, wrt_all

from sdesens import Philox, Problem, merge, sensitivity, with_running_integral
from sdesens.sensitivity import finite_difference, forward, pathwise
from sdesens.sensitivity.tile import Tile

Row = tuple[str, float, str, bool]  # what, figure, limit, whether it holds


def below(what: str, figure: float, limit: float) -> Row:
    return what, figure, f"< {limit:g}", figure < limit


def above(what: str, figure: float, limit: float) -> Row:
    return what, figure, f"> {limit:g}", figure > limit


def within(what: str, figure: float, low: float, high: float) -> Row:
    return what, figure, f"[{low:g}, {high:g}]", low <= figure <= high


def agreement() -> Iterator[Row]:
    for noise_type, m in NOISE_DIM.items():
        figures = {"jacobians": 0.0, "directions": 0.0, "differences": 0.0}
        bits = True
        for seed in range(3):
            problem = smooth(noise_type, seed, n_steps=50, outputs=(0, 3, 25, 50))
            tile = Tile(problem, Philox(seed), 0, 1000, 20, m)
            theta = problem.leaves(wrt_all(problem))
            swept = pathwise(tile, theta)
            thinned = pathwise(tile, theta, budget=0)
            bits &= all(torch.equal(swept.gradients[k], thinned.gradients[k]) for k in theta)
            found = {
                "jacobians": forward(tile, theta, strategy="jacobians"),
                "directions": forward(tile, theta, strategy="directions"),
                "differences": finite_difference(tile, theta),
            }
            for name, contributions in found.items():
                figures[name] = max(figures[name], worst(swept.gradients, contributions.gradients))
        yield below(f"{noise_type}: pathwise against forward by Jacobians, relative", figures["jacobians"], 1e-11)
        yield below(f"{noise_type}: pathwise against forward by directions, relative", figures["directions"], 1e-11)
        yield below(f"{noise_type}: pathwise against central differences, relative", figures["differences"], 1e-6)
        yield within(f"{noise_type}: checkpoints give the same bits", float(bits), 1, 1)


def gbm_exact(model: GBM) -> dict[str, tuple[float, float]]:
    return {k: (model.scheme(1)[k], v) for k, v in model.variances().items()}


def exact_chain() -> Iterator[Row]:
    cases = {
        "GBM X": (GBM().problem(1), gbm_exact(GBM())),
        "OU X": (OU().problem(1), OU().exact(1)),
        "OU X^2": (OU().problem(2), OU().exact(2)),
    }
    for case, (problem, exact) in cases.items():
        for method in ("pathwise", "forward"):
            for name, (z, ratio) in scores(exact, problem, method, 1_000_000, seed=2024).items():
                if exact[name][1] > 0:
                    yield within(f"{case}, {method}, {name}: standard scores from the exact chain", z, -4, 4)
                    yield within(f"{case}, {method}, {name}: reported / exact standard error", ratio, 0.9, 1.1)
                else:
                    yield below(f"{case}, {method}, {name}: relative error (no variance)", z, 1e-12)


def orders() -> Iterator[Row]:
    model = GBM(mu=0.1, sigma=0.5, x0=1.0)
    steps = (16, 64, 256, 1024)
    for name, e in strong_errors(model, steps, 20_000, seed=3).items():
        yield within(f"strong order of the pathwise derivative in {name}", slope(steps, e), 0.4, 0.6)
    steps = (4, 8, 16)
    for name, e in weak_errors_by_quadrature(model, steps).items():
        yield within(f"weak order of d/d{name} E X^2, quadrature", slope(steps, e), 0.85, 1.15)
    steps = (4, 8, 16, 32)
    for name, estimates in weak_errors_by_coupling(model, steps, 1_000_000, seed=5).items():
        errors = [abs(float(e.mean)) for e in estimates]
        yield within(f"weak order of d/d{name} E X^2, coupled paths", slope(steps, errors), 0.85, 1.15)
    steps = (16, 64, 256, 1024)
    for name, e in adjoint_errors(model.problem(), 1, 2000, steps, ("mu", "sigma", "t1")).items():
        yield above(f"adjoint against pathwise, GBM, {name}: order", slope(steps, e), 0.5)
        yield below(f"adjoint against pathwise, GBM, {name}: RMS at 1024 steps", e[-1], 0.03)
    for name, e in adjoint_errors(model.problem(), 1, 2000, steps, ("mu", "sigma"), corrected=False).items():
        yield within(f"without the correction, GBM, {name}: order (must fail)", slope(steps, e), -0.1, 0.1)
    base = smooth("general", 1, n_steps=16, outputs=(0, 8, 16), span=0.8)
    start = torch.cat((base.y0, base.y0.new_zeros(1)))
    sde = with_running_integral(base.sde, lambda t, y, p: (y**2).sum(1) * p["s"] + torch.cos(t))
    problem = Problem(sde, _with_integral, start, base.ts, 16)
    for name, e in adjoint_errors(problem, NOISE_DIM["general"], 200, steps, (*sde.params, "y0", "t1")).items():
        yield above(f"adjoint, non-commuting noise and integral, {name}: order", slope(steps, e), 0.5)
    wrong = adjoint_errors(problem, NOISE_DIM["general"], 200, steps, ("s", "K"), corrected=False)
    for name, e in wrong.items():
        yield within(f"without the correction, non-commuting, {name}: order (must fail)", slope(steps, e), -0.1, 0.2)


def _with_integral(ys, p):
    return smooth_functional(ys[..., :D], p) + torch.sin(ys[-1, :, D]) * p["s"]


def coverages() -> Iterator[Row]:
    cases = {
        "GBM X": (GBM().problem(1), gbm_exact(GBM())),
        "OU X^2": (OU().problem(2), OU().exact(2)),
    }
    for case, (problem, exact) in cases.items():
        for method in ("pathwise", "forward"):
            for name, hits in coverage(exact, problem, method, 2000, range(400)).items():
                yield within(f"{case}, {method}, {name}: coverage of the 95 % interval", hits, 0.92, 0.98)


class Backwards(Executor):
    """Last block first."""

    def map(self, fn, *iterables, **_):
        tasks = list(zip(*iterables, strict=True))
        results = [fn(*task) for task in reversed(tasks)]
        return iter(results[::-1])


def bits() -> Iterator[Row]:
    coupled = smooth("general", 0, n_steps=8, outputs=(0, 2, 8))  # matrix products, whose order of summation may vary
    for name, problem, n in (("GBM", replace(GBM(), n_steps=20).problem(2), 100_000), ("coupled", coupled, 40_000)):
        for method in ("pathwise", "forward", "adjoint"):
            yield from _divided(f"{name}, {method}", problem, n, method)


def _divided(label: str, problem: Problem, n: int, method: str) -> Iterator[Row]:
    def run(**changes):
        return sensitivity(problem, **{"n_paths": n, "seed": 9, "method": method, **changes})

    whole = run()
    block = 10_000
    runs: dict[str, Callable] = {
        "blocks in reverse": lambda: run(executor=Backwards()),
        "tiles of 1600 paths": lambda: run(tile_paths=1600),
        "tiles of 9999 paths": lambda: run(tile_paths=9999),
        f"{n // block} merged runs": lambda: merge(
            *(run(n_paths=block, first_path=k) for k in range(0, n, block)),
        ),
    }
    for what, again in runs.items():
        yield within(f"{label}: {what}", float(_same(whole, again())), 1, 1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        yield within(f"{label}: {threads} threads of torch", float(_same(whole, run())), 1, 1)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(2) as pool:
        yield within(f"{label}: two worker threads", float(_same(whole, run(executor=pool))), 1, 1)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield within(f"{label}: two worker processes", float(_same(whole, run(executor=pool))), 1, 1)
    yield within(f"{label}: another seed (must differ)", float(_same(whole, run(seed=10))), 0, 0)


def _same(a, b) -> bool:
    pairs = [(a.value, b.value), *((a.gradient[k], b.gradient[k]) for k in a.gradient)]
    return all(torch.equal(x.mean, y.mean) and torch.equal(x.standard_error, y.standard_error) for x, y in pairs)


def memory() -> Iterator[Row]:
    for method in ("pathwise", "forward", "adjoint"):
        yield below(f"{method}: MB above a warm process", peak_megabytes(method, 10_000, 10_000), 300)


BARS = {1: agreement, 2: exact_chain, 3: orders, 4: coverages, 5: bits, 6: memory}


def main(chosen: list[str], bars: dict[int, Callable[[], Iterator[Row]]] = BARS) -> int:
    """Print the figures of the bars chosen, or of all; the exit status."""
    failed = 0
    for number in map(int, chosen) if chosen else bars:
        began = time.perf_counter()
        for what, figure, limit, ok in bars[number]():
            failed += not ok
            print(f"{number}, {what}, {figure:.4g}, {limit}, {'ok' if ok else 'FAILED'}", flush=True)
        print(f"# bar {number}: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"# {failed} failed" if failed else "# all hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
