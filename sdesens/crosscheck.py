"""The routes beside each other: every method on the same noise, in one table.

Pathwise and forward sensitivities are the same number, to rounding. Central differences agree with them to O(h^2). The
continuous adjoints do not: they must approach the pathwise gradient as dt shrinks, at order 1/2 a path or better, and only
a refinement study can tell that from an error. Each of these is a verdict:

    relation      passes if, for every component,
    rounding      |g - g_ref| <= 1e4 u,          u = eps x rms of one path's gradient
    differences   |g - g_ref| <= 1e-6 rms (float64), or 0.05 standard errors (a kink moves a few paths by much)
    converges     RMS over paths of G - G_ref falls at order >= 0.35 over two halvings of dt, or is rounding
    scheme        |g_ref - exact| <= 4.5 standard errors, exact answer of the Euler-Maruyama chain
    closed form   the same for the SDE's answer, once the estimated bias is taken off

With 4.5 standard errors a sound table of ten statistical checks raises a false alarm once in about 15,000 runs.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.estimate import Estimate
from sdesens.montecarlo import Sensitivity, sensitivity
from sdesens.noise import Coarsened, Noise, Philox
from sdesens.problem import Problem
from sdesens.sensitivity import METHODS
from sdesens.sensitivity.probe import check_problem, survives_vmap
from sdesens.sensitivity.tile import Tile

ROUNDING_UNITS = 1e4
DIFFERENCE = 1e-6
STANDARD_ERRORS = 4.5
LEAST_ORDER = 0.35
FINER = 16  # with order 1/2 the limit's own error is a quarter of the finest grid's
RELATION = {
    "pathwise": "rounding",
    "forward": "rounding",
    "finite_difference": "differences",
    "adjoint": "converges",
    "torchsde_adjoint": "converges",
}


@dataclass(frozen=True)
class Answer:
    """A known answer to hold the reference against.

    Attributes
    ----------
    value : Tensor, 0-dim
    gradient : dict of Tensor
        By parameter name.
    of_scheme : bool
        True for the Euler-Maruyama chain on this grid, False for the SDE.
    """

    value: Tensor
    gradient: Mapping[str, Tensor]
    of_scheme: bool


@dataclass(frozen=True)
class Comparison:
    """One line of the table: a method's gradient in one parameter, beside the reference's.

    For a parameter with several components this is the one that agrees worst.

    Attributes
    ----------
    method, parameter : str
    component : tuple of int
    gradient, standard_error, difference : float
        difference = gradient minus the reference's.
    rounding_units : float
        |difference| over eps x rms of one path's gradient.
    standard_errors : float
        |difference| over the standard error it is judged by.
    verdict : str
    ok : bool or None
        None where it is not judged.
    """

    method: str
    parameter: str
    component: tuple[int, ...]
    gradient: float
    standard_error: float
    difference: float
    rounding_units: float
    standard_errors: float
    verdict: str
    ok: bool | None

    @property
    def name(self) -> str:
        """The parameter with its component, as in `A[0,1]`."""
        return self.parameter + (f"[{','.join(map(str, self.component))}]" if self.component else "")

    def cells(self, *, reference: bool) -> list[str]:
        """The five numbers as text."""
        numbers = [_short(self.difference, sign=True), _short(self.rounding_units), _short(self.standard_errors)]
        return [f"{self.gradient:.8g}", _short(self.standard_error), *(["", "", ""] if reference else numbers)]


@dataclass(frozen=True)
class Refinement:
    """How the routes behave as dt shrinks, on one set of Brownian paths.

    Attributes
    ----------
    n_steps : tuple of int
    dt : tuple of float
    deviation : dict of tuple
        Method: RMS over paths of its gradient minus the pathwise one on the same grid, relative, for each grid.
    error : dict of tuple
        Method: RMS of its gradient minus the pathwise one on a grid 16 times finer than the finest, which stands for the
        derivative of the SDE's own path.
    """

    n_steps: tuple[int, ...]
    dt: tuple[float, ...]
    deviation: dict[str, tuple[float, ...]]
    error: dict[str, tuple[float, ...]]

    def order(self, method: str, of: str = "deviation") -> float:
        """Fitted slope of log error against log dt; NaN where there is nothing but rounding."""
        rows = {"deviation": self.deviation, "error": self.error}[of][method]
        if min(rows) <= 0:
            return math.nan
        x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (self.dt, rows))
        x = x - x.mean()
        return float((x * y).sum() / (x * x).sum())

    def deviates(self, method: str) -> bool:
        """Whether the method differs from the pathwise gradient by more than rounding."""
        return min(self.deviation[method]) > 1e-9


@dataclass(frozen=True)
class CrossCheck:
    """The answer of `crosscheck`; prints as a table.

    Attributes
    ----------
    reference : str
    results : dict of Sensitivity
        By method.
    peak_memory : dict of int or None
        Bytes that each run added at its peak to the memory of the process; None where the platform does not tell.
    comparisons : tuple of Comparison
    refinement : Refinement or None
    skipped : dict of str
        Methods left out, with the reason.
    """

    reference: str
    results: dict[str, Sensitivity]
    peak_memory: dict[str, int | None]
    comparisons: tuple[Comparison, ...]
    refinement: Refinement | None
    skipped: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(c.ok is not False for c in self.comparisons)

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        refinement = None
        if self.refinement is not None:
            r = self.refinement
            orders = {k: {"deviation": r.order(k), "error": r.order(k, "error")} for k in r.error}
            refinement = {
                "n_steps": r.n_steps,
                "dt": r.dt,
                "deviation": r.deviation,
                "error": r.error,
                "orders": orders,
            }
        return {
            "ok": self.ok,
            "reference": self.reference,
            "results": {k: {**v.to_dict(), "peak_memory": self.peak_memory[k]} for k, v in self.results.items()},
            "comparisons": [{**vars(c), "component": list(c.component)} for c in self.comparisons],
            "refinement": refinement,
            "skipped": self.skipped,
        }

    def table(self, *, narrow: bool = False) -> Table:
        """The comparisons as a rich table; the narrow one leaves out differences and rounding units."""
        value = self.results[self.reference].value
        table = Table(title=f"E[F] = {value!r}", title_justify="left", caption_justify="left", caption=self._caption())
        heads = ["gradient", "std. error", "difference", "rounding units", "std. errors"]
        shown = [heads[0], heads[1], heads[4]] if narrow else heads
        for head in ("parameter", "route", *shown, "verdict"):
            table.add_column(head, justify="right" if head in heads else "left")
        last = None
        for c in self.comparisons:
            if last not in (None, c.parameter):
                table.add_section()
            cells = dict(zip(heads, c.cells(reference=c.method == self.reference), strict=True))
            name = c.name if c.parameter != last or c.component else ""
            style = {True: "", False: "bold red", None: "dim"}[c.ok]
            mark = {True: "ok", False: "FAIL", None: "-"}[c.ok]
            table.add_row(name, c.method, *(cells[h] for h in shown), f"{mark}: {c.verdict}", style=style)
            last = c.parameter
        return table

    def cost_table(self) -> Table:
        """Seconds and memory of each route, and how it behaves as dt shrinks."""
        table = Table(title="Cost, and what happens as dt shrinks", title_justify="left")
        for head in ("route", "seconds", "peak memory", "deviation from pathwise", "order", "error", "order"):
            table.add_column(head, justify="left" if head == "route" else "right")
        for method, result in self.results.items():
            memory = self.peak_memory[method]
            cells = [f"{result.seconds:.2f}", "" if memory is None else f"{memory / 2**20:.0f} MiB"]
            r = self.refinement
            if r is None:
                cells += [""] * 4
            else:
                strong = r.order(method, "error")
                cells += ["" if method == "pathwise" else f"{r.deviation[method][-1]:.1e}"]
                cells += [f"{r.order(method):.2f}" if RELATION[method] == "converges" and r.deviates(method) else ""]
                cells += [f"{r.error[method][-1]:.1e}", "" if math.isnan(strong) else f"{strong:.2f}"]
            table.add_row(method, *cells)
        return table

    def _caption(self) -> str:
        result = self.results[self.reference]
        lines = [f"{result.n_paths:,} paths x {result.n_steps} steps, the same noise for every route."]
        lines += [f"{k} left out: {why}" for k, why in self.skipped.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        out = io.StringIO()
        console = Console(width=150, file=out)
        console.print(self.table())
        console.print(self.cost_table())
        return out.getvalue()


def crosscheck(
    problem: Problem,
    *,
    methods: Sequence[str] | None = None,
    wrt: Sequence[str] | str | None = None,
    n_paths: int = 20_000,
    seed: int = 0,
    refine: bool = True,
    refine_paths: int = 1000,
    answers: Mapping[str, Answer] | None = None,
    progress: bool | None = None,
) -> CrossCheck:
    """Run several methods on the same noise and say whether they agree.

    Parameters
    ----------
    problem : Problem
    methods : names, optional
        Keys of `sdesens.METHODS`; all that apply if left out. The reference is "pathwise" if it is among them, else the
        first.
    wrt : names, optional
        As in `sensitivity`.
    n_paths, seed : int
    refine : bool
        Whether to follow the routes over grids of n/4, n/2 and n steps (n, 2n, 4n if 4 does not divide n), on
        `refine_paths` paths. Without it the adjoints are shown but not judged.
    answers : mapping of str to Answer, optional
        Known answers by label. For an answer of the SDE, the bias of the grid is estimated and taken into account.
    progress : bool, optional
        As in `sensitivity`.

    Returns
    -------
    CrossCheck

    Raises
    ------
    Whatever `sensitivity` raises.

    Example
    -------
    >>> from sdesens import SDE, Problem
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> sde = SDE(lambda t, y, p: -p["k"] * y, lambda t, y, p: 0.1 * y, {"k": 0.5 * one[0]})
    >>> problem = Problem(sde, lambda ys, p: ys[-1, :, 0], y0=one, ts=(0.0, 1.0), n_steps=16)
    >>> crosscheck(problem, methods=("pathwise", "forward", "adjoint"), n_paths=400).ok
    True
    """
    answers = answers or {}
    theta = problem.leaves(wrt)
    chosen, skipped = _choose(methods, theta)
    reference = "pathwise" if "pathwise" in chosen else chosen[0]
    names = tuple(theta)
    results, memory = {}, {}
    for method in chosen:
        # a first small run takes the one-time costs of torch.func out of the seconds
        sensitivity(problem, n_paths=2, method=method, wrt=names, seed=seed, progress=False)
        bias = method == reference and any(not a.of_scheme for a in answers.values())
        measure = PeakMemory()
        results[method] = sensitivity(
            problem, n_paths=n_paths, method=method, wrt=names, seed=seed, bias=bias, progress=progress
        )  # fmt: skip
        memory[method] = measure.bytes()
    refinement = _refine(problem, chosen, theta, refine_paths, seed) if refine else None
    eps = torch.finfo(problem.initial({}).dtype).eps
    comparisons = []
    for name in names:
        comparisons += [_compare(m, name, results, reference, refinement, eps) for m in chosen]
        comparisons += [
            _hold_against(label, a, name, results[reference]) for label, a in answers.items() if name in a.gradient
        ]
    comparisons += [_hold_against(label, a, "value", results[reference]) for label, a in answers.items()]
    return CrossCheck(reference, results, memory, tuple(comparisons), refinement, skipped)


def _choose(methods: Sequence[str] | None, theta) -> tuple[list[str], dict[str, str]]:
    if methods is None:
        if "t1" in theta:
            return [m for m in METHODS if m != "torchsde_adjoint"], {
                "torchsde_adjoint": "it does not differentiate in t1"
            }
        return list(METHODS), {}
    chosen = [methods] if isinstance(methods, str) else list(dict.fromkeys(methods))
    for method in chosen:
        if method not in METHODS:
            raise ArgumentError(f"`methods` names {method!r}; there are {', '.join(map(repr, METHODS))}.")
    if not chosen:
        raise ArgumentError("`methods` is empty: name at least one, or leave it out for all.")
    return chosen, {}


def _compare(method, name, results, reference, refinement, eps) -> Comparison:
    """One method's line for one parameter."""
    g, ref = results[method].gradient[name], results[reference].gradient[name]
    difference = g.mean - ref.mean
    rms = _rms(ref)
    ok: bool | None
    at = _worst(difference.abs() / rms.clamp_min(1e-300))
    gap, scale, error = float(difference[at].abs()), float(rms[at]), float(ref.standard_error[at])
    relation = "differences" if "finite_difference" in (method, reference) else RELATION[method]
    if method == reference:
        zero = not bool(ref.mean.any()) and not bool(ref.standard_error.any())
        ok, verdict = (False, "exactly zero on every path: a jump?") if zero else (True, "the reference")
    elif relation == "rounding":
        ok = gap <= ROUNDING_UNITS * eps * scale
        verdict = "the same to rounding" if ok else "not the same number"
    elif relation == "differences":
        smooth = gap <= max(DIFFERENCE, 200 * eps ** (2 / 3)) * scale
        ok = smooth or gap <= 0.05 * error
        verdict = "the same to O(h^2)" if smooth else "within 0.05 std. errors" if ok else "not the same derivative"
    else:
        ok, verdict = _convergence(method, gap, scale, eps, refinement)
    return Comparison(
        method, name, at, float(g.mean[at]), float(g.standard_error[at]), float(difference[at]),
        gap / (eps * scale) if scale > 0 else 0.0, gap / error if error > 0 else math.nan, verdict, ok,
    )  # fmt: skip


def _convergence(method, gap, scale, eps, refinement: Refinement | None) -> tuple[bool | None, str]:
    if gap <= ROUNDING_UNITS * eps * scale:
        return True, "the same to rounding"
    if refinement is None:
        return None, "O(dt^1/2) a path, not judged without refinement"
    if refinement.deviation[method][-1] <= ROUNDING_UNITS * eps:
        return True, "the same to rounding"
    order = refinement.order(method)
    if order >= LEAST_ORDER:
        return True, f"{gap / scale:.1e} off, order {order:.2f}"
    return False, f"{gap / scale:.1e} off, order {order:.2f}: does not converge"


def _hold_against(label: str, answer: Answer, name: str, result: Sensitivity) -> Comparison:
    """The reference beside a known answer, in one parameter or in "value"."""
    estimate = result.value if name == "value" else result.gradient[name]
    exact = (answer.value if name == "value" else answer.gradient[name]).detach().to(estimate.mean)
    mean, error = estimate.mean, estimate.standard_error
    if not answer.of_scheme:
        assert result.bias is not None
        mean = mean - result.bias[name].mean
        error = (error.square() + result.bias[name].standard_error.square()).sqrt()
    z = ((mean - exact).abs() - 1e-12 * exact.abs()).clamp_min(0) / error.clamp_min(1e-300)
    at = _worst(z)
    ok = bool(z[at] <= STANDARD_ERRORS)
    verdict = f"{float(z[at]):.1f} std. errors" + ("" if answer.of_scheme else ", less the bias")
    return Comparison(
        label, name, at, float(exact[at]), math.nan, float(exact[at] - estimate.mean[at]), math.nan, float(z[at]), verdict, ok
    )  # fmt: skip


def _refine(problem: Problem, methods: list[str], theta, n_paths: int, seed: int) -> Refinement:
    """Per-path gradients of every method on coupled grids."""
    n = problem.n_steps
    grids = (n // 4, n // 2, n) if n % 4 == 0 and _fits(problem, n // 4) else (n, 2 * n, 4 * n)
    finest = FINER * grids[-1]
    noise = Philox(seed)
    noise_dim = check_problem(problem, theta)
    vectorised = survives_vmap(problem, theta, noise_dim)
    n_paths = max(min(n_paths, int(2e7 // max(sum(v.numel() for v in theta.values()), 1))), 1)

    def gradients(method: str, steps: int) -> dict[str, Tensor]:
        source: Noise = noise if steps == finest else Coarsened(noise, finest // steps)
        tile = Tile(problem.with_steps(steps), source, 0, n_paths, 1, noise_dim, vectorised)
        return METHODS[method](tile, theta).gradients

    limit = gradients("pathwise", finest)
    deviation: dict[str, list[float]] = {m: [] for m in methods}
    error: dict[str, list[float]] = {m: [] for m in methods}
    for steps in grids:
        scheme = gradients("pathwise", steps)
        for method in methods:
            own = scheme if method == "pathwise" else gradients(method, steps)
            deviation[method].append(_distance(own, scheme))
            error[method].append(_distance(own, limit))
    return Refinement(
        grids,
        tuple((problem.t1 - problem.t0) / k for k in grids),
        {k: tuple(v) for k, v in deviation.items()},
        {k: tuple(v) for k, v in error.items()},
    )


def _fits(problem: Problem, n_steps: int) -> bool:
    """Whether every output time lies on a coarser grid, with a few steps left."""
    factor = problem.n_steps // n_steps
    return n_steps >= 4 and all(k % factor == 0 for k in problem.outputs)


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """RMS over paths of a - b, relative to the RMS of b: the largest over parameters."""
    worst = 0.0
    for k in b:
        size = float(b[k].double().square().mean().sqrt())
        worst = max(worst, float((a[k] - b[k]).double().square().mean().sqrt()) / size if size > 0 else 0.0)
    return worst


def _rms(e: Estimate) -> Tensor:
    """Root mean square of one path's gradient."""
    return (e.mean.square() + torch.nan_to_num(e.standard_error).square() * e.n).sqrt()


def _worst(x: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(x.flatten().argmax(), x.shape)) if x.dim() else ()


def _short(x: float, *, sign: bool = False) -> str:
    if math.isnan(x):
        return ""
    return f"{x:{'+' if sign else ''}.2g}"


class PeakMemory:
    """Bytes that the process's resident memory rises by, at its peak, from the making of this object on (Linux)."""

    def __init__(self):
        self.start: int | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
            self.start = self._status("VmHWM")
        except OSError:
            pass

    def bytes(self) -> int | None:
        """The rise so far, or None where the platform does not tell."""
        return None if self.start is None else max(self._status("VmHWM") - self.start, 0)

    @staticmethod
    def _status(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0
