"""The claims about functionals that jump, at full size: `python benchmarks/jumps.py [1 2 ...]`, one line a figure.

    1  the audit on its whole list of functionals, 50 seeds each
    2  Black-Scholes: every derivative by every method, a million paths, against the exact value and the exact deviation
    3  second moment of the digital's delta against the step
    4  method="auto" against the best method, a million paths, everything included
    5  gamma: what is refused, and what agrees
    6  Cox-Ingersoll-Ross below the Feller bound: the tail that is flagged, and the scheme that has none

Exit status 1 if one fails. The measurements are those of the tests, in tests/measure_jumps.py, at larger sizes.
"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from audit_cases import CASES, confusion
from bars import Row, below, main, within
from measure_jumps import (
    FELLER,
    exactly,
    first_order,
    fitted,
    lamperti_bias,
    second_moments,
    second_order,
    ten,
    work,
)

from sdesens import HeavyTailWarning, KinkError, hessian, sensitivity
from sdesens.applicable import UNBIASED
from sdesens.errors import SdesensError
from sdesens.models import cir, cir_lamperti, gbm_call, heston

MILLION = 1_000_000


def audits() -> Iterator[Row]:
    table, wrong = confusion(range(50))
    yield within("functionals", len(CASES), 40, 1000)
    for (expected, found), count in sorted(table.items()):
        yield within(f"{expected}, found to be {found}", count, *((1, 10**6) if expected == found else (0, 0)))
    for what, count in sorted(wrong.items()):
        yield below(f"not right: {what}", count, 1)
    yield below("wrong verdicts in all, steepness and singularities counted", sum(wrong.values()), 1)


def black_scholes() -> Iterator[Row]:
    for what, z, ratio in (*first_order(MILLION, 1), *second_order(MILLION, 2)):
        yield within(f"{what}: standard errors from the exact value", z, -4, 4)
        yield within(f"{what}: deviation of a path over the exact one", ratio, 0.97, 1.03)
    for what, error in exactly(1000):
        yield below(f"{what}: relative error, nothing is sampled", error, 1e-12)


def slopes() -> Iterator[Row]:
    steps = (8, 16, 32, 64, 128)
    wanted = {"likelihood_ratio": -1.0, "vibrato": -0.5, "conditional": -0.5, "malliavin": 0.0}
    for method, values in second_moments(steps, 400_000, 3).items():
        shown = " ".join(f"{v:.3g}" for v in values)
        exponent = fitted(steps, values)
        yield within(
            f"{method}: exponent of dt in E G^2 ({shown})", exponent, wanted[method] - 0.1, wanted[method] + 0.1
        )


def choices() -> Iterator[Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (problem, wrt) in ten().items():
            found = {}
            for method in UNBIASED:
                if method == "conditional" and hasattr(problem.functional, "bridge"):
                    continue  # another number: that of a barrier watched all the time
                try:
                    found[method] = min(work(problem, wrt, method, 100_000, 4)[0] for _ in range(2))
                except SdesensError:
                    continue
            best = sorted(found, key=found.__getitem__)[:2]
            sizes = {m: work(problem, wrt, m, MILLION, 4)[0] for m in best}
            least = min(sizes, key=sizes.__getitem__)
            own, chosen = work(problem, wrt, "auto", MILLION, 4)
            yield below(f"{name}: auto ({chosen}) over the best ({least})", own / sizes[least], 1.5)


def gammas() -> Iterator[Row]:
    call = gbm_call(n_steps=16).problem
    try:
        hessian(call, n_paths=1000, method="pathwise", wrt="s0")
        refused = 0
    except KinkError:
        refused = 1
    yield within("twice along the path, call: refused", refused, 1, 1)
    log_call = gbm_call(log=True, n_steps=16).problem
    for method in ("likelihood_ratio_pathwise", "pathwise_likelihood_ratio", "likelihood_ratio", "conditional"):
        exact = {("s0", "s0"): 0.018762017345846895, ("s0", "sigma"): -0.28143026018770345}
        found = hessian(log_call, n_paths=200_000, method=method, wrt=("s0", "sigma"), seed=5)
        for pair, value in exact.items():
            z = float((found[pair].mean - value) / found[pair].standard_error)
            yield within(f"call, {method}, {pair}: standard errors from the closed form", z, -4, 4)
    reference = 0.018246991668314
    for n, window in ((64, 1), (128, 3)):  # beyond, the variance may have come to zero, where there is no weight
        found = hessian(
            heston(n_steps=n).problem, n_paths=400_000, method="likelihood_ratio_pathwise", wrt="s0", seed=6, window=window
        )  # fmt: skip
        gamma = found["s0", "s0"]
        gap, error = float(gamma.mean - reference), float(gamma.standard_error)
        yield within(
            f"Heston gamma, {n} steps: {float(gamma.mean):.6f} +- {error:.6f}, standard errors off", gap / error, -4, 4
        )


def tails() -> Iterator[Row]:
    bias = lamperti_bias()
    for method in ("forward", "pathwise"):
        for name, problem in (
            ("full truncation", cir(**FELLER, mean=True).problem),
            ("Lamperti", cir_lamperti(**FELLER).problem),
        ):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                result = sensitivity(problem, n_paths=MILLION, method=method, wrt="sigma", seed=7)
            flagged = any(w.category is HeavyTailWarning for w in said)
            yield within(f"{name}, {method}: flagged ({result.tails['sigma']!r})", flagged, *(2 * [name != "Lamperti"]))
            if name == "Lamperti":
                g = result.gradient["sigma"]
                what = f"Lamperti, {method}: {g!r}, of which {bias:.6f} is the step's; standard errors from the exact 0 without it"
                yield within(what, float((g.mean - bias) / g.standard_error), -4, 4)
    try:
        cir_lamperti(**{**FELLER, "sigma": (2 * 0.04 / 0.45) ** 0.5})
        refused = 0
    except SdesensError:
        refused = 1
    yield within("Lamperti at a ratio of 0.45: refused", refused, 1, 1)


BARS = {1: audits, 2: black_scholes, 3: slopes, 4: choices, 5: gammas, 6: tails}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], BARS))
