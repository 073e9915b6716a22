"""The routes beside each other: every method on the same noise, in one table.

Pathwise and forward sensitivities are the same number, to rounding. Central differences agree with them to O(h^2). The
continuous adjoints do not: they must approach the pathwise gradient as dt shrinks, at order 1/2 a path or better, and only
a refinement study can tell that from an error. `sdesens.verdict` says what passes; this file runs the routes and shows them.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from sdesens.applicable import ALONG, Case
from sdesens.audit import Audit
from sdesens.blocks import BLOCK, tangents
from sdesens.errors import ArgumentError, NonFiniteError
from sdesens.integrate.compiled import wanted
from sdesens.memory import PeakMemory
from sdesens.montecarlo import Sensitivity, sensitivity
from sdesens.noise import Philox
from sdesens.problem import Problem, Theta
from sdesens.refinement import Refinement
from sdesens.refinement import refine as run_refinement
from sdesens.sensitivity import METHODS, SMOOTHED
from sdesens.sensitivity.probe import check_problem, survives_vmap
from sdesens.tables import as_text
from sdesens.verdict import RELATION, Answer, Comparison, Evidence, compare, failed, farthest, hold_against

MANY = 50  # components of theta beyond which central differences, two runs each, are left out unless asked for


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
    audit : Audit
        Whether the functional jumps.
    """

    reference: str
    results: dict[str, Sensitivity]
    peak_memory: dict[str, int | None]
    comparisons: tuple[Comparison, ...]
    refinement: Refinement | None
    skipped: dict[str, str]
    audit: Audit

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
            "audit": self.audit.to_dict(),
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
            if r is None or method not in r.error:
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
        lines.append(f"Audit: {self.audit.kind}{', steep' if self.audit.steep else ''}: {self.audit.reason}.")
        lines += [f"{k} left out: {why}" for k, why in self.skipped.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return as_text(self.table(), self.cost_table())


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
    compile: bool | str = "auto",
) -> CrossCheck:
    """Run several methods on the same noise and say whether they agree.

    Parameters
    ----------
    problem : Problem
    methods : names, optional
        Keys of `sdesens.METHODS`. If left out: the routes along the path, and central differences; but where the functional
        jumps, the methods that apply all the same, beside "pathwise" and "forward", which are shown and refused. The reference
        is "pathwise" if it is among them and nothing jumps, else the first that is not refused.
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
    compile : {"auto", True, False}
        As in `sensitivity`. The seconds in the table are those of computing, a first run on few paths having compiled.

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
    case = _case(problem, theta, n_paths, seed)
    chosen, skipped = _choose(methods, theta, case)
    refused = tuple(m for m in chosen if m in ALONG) if case.plain.kind == "jump" else ()
    sound = [m for m in chosen if m not in refused] or chosen
    reference = "pathwise" if "pathwise" in sound else sound[0]
    refine = refine and case.plain.kind != "jump"
    names = tuple(theta)
    results: dict[str, Sensitivity] = {}
    memory: dict[str, int | None] = {}
    failures: dict[str, str] = {}
    for method in chosen:
        bias = method == reference and any(not a.of_scheme for a in answers.values())
        how: dict[str, Any] = {"method": method, "wrt": names, "seed": seed, "audit": False}
        how["compile"] = wanted(compile, n_paths * problem.n_steps, tangents(method, theta))
        try:
            with warnings.catch_warnings():  # two paths say nothing about zeros
                warnings.simplefilter("ignore")
                # a first small run, of the same kernels, takes one-time costs out of the seconds
                sensitivity(problem, n_paths=2, first_path=BLOCK, progress=False, **how)
            measure = PeakMemory()
            results[method] = sensitivity(problem, n_paths=n_paths, bias=bias, progress=progress, **how)
            memory[method] = measure.bytes()
        except NonFiniteError:
            if method == reference:
                raise
            failures[method] = "not finite"
        except RuntimeError as error:  # torch has no rule for something in the user's functions
            if method == reference or methods is not None:
                raise
            skipped[method] = "torch: " + str(error).strip().splitlines()[0][:100]
    refinement = None
    if refine:
        refinement = run_refinement(
            problem, [m for m in chosen if m in results and m not in SMOOTHED], theta, refine_paths, seed
        )
    eps = max(torch.finfo(v.dtype).eps for v in (problem.initial({}), *theta.values()))
    comparisons = []
    for name in names:
        at = farthest(name, reference, results)
        apart = hasattr(problem.functional, "bridge")
        evidence = Evidence(name, reference, results, at, eps, theta[name], refinement, refused, apart)
        comparisons += [
            compare(m, evidence) if m in results else failed(m, name, at, failures[m])
            for m in chosen
            if m not in skipped
        ]
        comparisons += [
            hold_against(label, a, name, at, results[reference]) for label, a in answers.items() if name in a.gradient
        ]
    comparisons += [hold_against(label, a, "value", (), results[reference]) for label, a in answers.items()]
    return CrossCheck(reference, results, memory, tuple(comparisons), refinement, skipped, case.plain)


def _case(problem: Problem, theta: Theta, n_paths: int, seed: int) -> Case:
    noise_dim = check_problem(problem, theta, differentiated=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each run says what it has to say of vmap itself
        vectorised = survives_vmap(problem, theta, noise_dim)
    return Case(problem, dict(theta), Philox(seed), noise_dim, vectorised, n_paths)


def _choose(methods: Sequence[str] | None, theta: Theta, case: Case) -> tuple[list[str], dict[str, str]]:
    """The methods to run, and those left out with the reason."""
    if methods is None and case.plain.kind == "jump":
        order = ("conditional", "vibrato", "malliavin", "likelihood_ratio")
        reasons = {m: case.refusal(m) for m in order}
        skipped = {m: why.split(": ")[0] for m, why in reasons.items() if why is not None}
        along = [] if case.detached else ["pathwise", "forward"]  # to show what they miss
        return [*along, *(m for m in order if reasons[m] is None)], skipped
    if methods is None:
        skipped = {}
        if case.problem.sde.step is not None:
            why = "it reverses Euler-Maruyama, and this SDE brings a step of its own"
            skipped = {"adjoint": why, "torchsde_adjoint": why}
        if "t1" in theta:
            skipped["torchsde_adjoint"] = "it does not differentiate in t1"
        if (components := sum(v.numel() for v in theta.values())) > MANY:
            skipped["finite_difference"] = (
                f"two runs for each of {components} components; name it in `methods` to have it"
            )
        return [m for m in METHODS if m not in skipped and m not in SMOOTHED], skipped
    chosen = [methods] if isinstance(methods, str) else list(dict.fromkeys(methods))
    for method in chosen:
        if method not in METHODS:
            raise ArgumentError(f"`methods` names {method!r}; there are {', '.join(map(repr, METHODS))}.")
    if not chosen:
        raise ArgumentError("`methods` is empty: name at least one, or leave it out for all.")
    return chosen, {}
