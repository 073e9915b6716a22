"""Second derivatives of E[F(X)] with their standard errors: gamma, vanna, volga, a Hessian.

    H_ab = d^2/dtheta_a dtheta_b E[ F(X; p) ],                                                   (1)

by the methods of `sdesens.sensitivity.second_order`. Differentiating a path twice is right only where F has a continuous
derivative. For a call it returns 0 for gamma, without a warning from any autograd; here it is a KinkError that names what applies.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdesens.applicable import STRUCTURE, Case
from sdesens.audit import Audit
from sdesens.auto import Candidate, Trial, choose
from sdesens.errors import ArgumentError, ArgumentTypeError, KinkError, SdesensError, UnknownParameterError
from sdesens.estimate import Estimate, total
from sdesens.montecarlo import carry_out, check_counts, check_options, check_units, make_run
from sdesens.noise import Noise
from sdesens.problem import Problem
from sdesens.sensitivity.probe import check_problem, noise_source, survives_vmap
from sdesens.sensitivity.second_order import PAIRS, SECOND, parts_for

MOST = 32  # components of theta: every pair of them is a sweep
ORDER = ("smooth", "kink", "jump")
WORST = {  # that F may be; for the others it must be smooth
    "likelihood_ratio_pathwise": "kink",
    "pathwise_likelihood_ratio": "kink",
    "likelihood_ratio": "jump",
}


@dataclass(frozen=True)
class Hessian:
    """The answer of `hessian`.

    Attributes
    ----------
    value : Estimate
        E[F(X)] for the scheme on this grid.
    gradient : dict of Estimate
        First derivatives by the same method.
    second : dict of Estimate
        By pairs of names (a, b), a not after b in the order of `gradient`; shape (*shape of a, *shape of b). `hessian[a, b]`
        takes them in either order.
    method : str
    n_paths, n_steps : int
    seconds : float
    audit : Audit or None
    tried : dict of Trial
        What method="auto" found.
    """

    value: Estimate
    gradient: dict[str, Estimate]
    second: dict[tuple[str, str], Estimate]
    method: str
    n_paths: int
    n_steps: int
    seconds: float
    audit: Audit | None
    tried: dict[str, Trial]

    def __getitem__(self, names: tuple[str, str]) -> Estimate:
        a, b = names if isinstance(names, tuple) and len(names) == 2 else (names, names)
        if (a, b) in self.second:
            return self.second[a, b]
        if (b, a) not in self.second:
            raise UnknownParameterError(
                f"there is no derivative in {names!r}; there are {', '.join(map(str, self.second))}."
            )
        found, lead = self.second[b, a], self.gradient[b].mean.dim()
        axes = [*range(lead, found.mean.dim()), *range(lead)]
        return Estimate(found.mean.permute(axes), found.standard_error.permute(axes), found.n, found.dof)

    def matrix(self) -> tuple[Tensor, Tensor]:
        """All of it, (P, P), components in the order of `gradient`: means and standard errors."""
        sizes = {k: v.mean.numel() for k, v in self.gradient.items()}

        def block(attribute: str) -> Tensor:
            rows = [
                torch.cat([getattr(self[a, b], attribute).reshape(sizes[a], sizes[b]) for b in sizes], 1) for a in sizes
            ]
            return torch.cat(rows)

        return block("mean"), block("standard_error")

    def to_dict(self) -> dict:
        """Plain numbers."""
        return {
            "method": self.method,
            "n_paths": self.n_paths,
            "n_steps": self.n_steps,
            "seconds": self.seconds,
            "value": self.value.to_dict(),
            "gradient": {k: v.to_dict() for k, v in self.gradient.items()},
            "second": {f"{a}, {b}": v.to_dict() for (a, b), v in self.second.items()},
            "audit": None if self.audit is None else self.audit.to_dict(),
            "tried": {k: v.to_dict() for k, v in self.tried.items()},
        }

    def __repr__(self) -> str:
        rows = {"value": self.value, **{f"d/d {k}": v for k, v in self.gradient.items()}}
        rows |= {f"d2/d {a}2" if a == b else f"d2/d {a} d {b}": v for (a, b), v in self.second.items()}
        width = max(map(len, rows))
        lines = [f"Hessian by {self.method}, {self.n_paths} paths x {self.n_steps} steps, {self.seconds:.2f} s"]
        lines += [f"  {name:<{width}}  {estimate!r}" for name, estimate in rows.items()]
        if self.tried:
            lines.append(f"  chosen by trial: {'; '.join(f'{k} {v!r}' for k, v in self.tried.items())}")
        return "\n".join(lines)


@torch.inference_mode(False)
def hessian(
    problem: Problem,
    *,
    n_paths: int,
    method: str = "auto",
    wrt: Sequence[str] | str | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    executor: Executor | None = None,
    progress: bool | None = None,
    audit: bool = True,
    **options: Any,
) -> Hessian:
    """Estimate second derivatives of E[F(X)], with standard errors.

    Parameters
    ----------
    problem : Problem
    n_paths : int
    method : str
        "pathwise" (F smooth), "conditional" (F declares its expectation over the last step), "likelihood_ratio_pathwise" and
        "pathwise_likelihood_ratio" (F may kink), "likelihood_ratio" (F may jump); or "auto": of those that apply, the one with
        the least variance times seconds in a trial.
    wrt, seed, noise, executor, progress
        As in `sensitivity`. At most 32 components of theta.
    audit : bool
        Whether to look if F is as smooth as the method needs. False computes what may be wrong.
    **options
        `window` of the methods that begin with weights: the steps over which a weight is shared out, all until the next output
        time if left out. Shorter ones vary more, but keep away from places where the noise vanishes.

    Returns
    -------
    Hessian

    Raises
    ------
    KinkError
        If F, or what the method differentiates twice, is not smooth enough.
    MethodError
        If the method cannot be used for this problem, or none can.
    ArgumentError and its kin, NonFiniteError

    Example
    -------
    >>> from sdesens.models import gbm_call
    >>> call = gbm_call(log=True, n_steps=1).problem
    >>> gamma = hessian(call, n_paths=1000, wrt="s0", method="likelihood_ratio_pathwise", seed=1)["s0", "s0"]
    >>> bool((gamma.mean - 0.018762).abs() < 4.5 * gamma.standard_error)
    True
    """
    began = time.perf_counter()
    if not isinstance(problem, Problem):
        raise ArgumentTypeError(f"`problem` must be a Problem, got {type(problem).__name__}.")
    if method not in (*SECOND, "auto"):
        raise ArgumentError(f"`method` must be one of {', '.join(map(repr, SECOND))}, or 'auto', got {method!r}.")
    check_counts(n_paths=(n_paths, 2))
    if not isinstance(audit, bool):
        raise ArgumentTypeError(f"`audit` must be True or False, got {audit!r}.")
    check_options("hessian", hessian, method, SECOND.get(method), options)
    source = noise_source(problem, seed, noise)
    check_units(source, n_paths, 0)
    theta = problem.leaves(wrt)
    if (components := sum(v.numel() for v in theta.values())) > MOST:
        raise ArgumentError(f"`wrt` has {components} components, and {MOST} are the most: name fewer parameters.")
    noise_dim = check_problem(problem, theta, differentiated=method not in ("likelihood_ratio", "conditional", "auto"))
    case = Case(problem, theta, source, noise_dim, survives_vmap(problem, theta, noise_dim), n_paths)
    tried: dict[str, Trial] = {}
    if method == "auto":
        method, tried = choose(case, {m: Candidate(SECOND[m], partial(_refusal, case, m)) for m in SECOND})
    else:
        fault = _fault(case, method, audit)
        if fault is not None:
            others = [m for m in SECOND if m != method and _fault(case, m) is None]
            raise type(fault)(f"{fault} Methods that apply: {', '.join(map(repr, others)) or 'none'}.")
    run = make_run(case, method, SECOND[method], options, copies=1 + 2 * components)
    blocks = carry_out(run, executor, progress)
    names = list(blocks[0].moments)
    found = {k: total(b.moments[k] for b in blocks).estimate(weighted=run.weighted) for k in names}
    pairs = {tuple(k.split(", ")): v for k, v in found.items() if ", " in k}
    seconds = time.perf_counter() - began
    seen = case.plain if audit or tried else None
    return Hessian(
        found["value"],
        {k: found[k] for k in theta},
        {(a, b): v for (a, b), v in pairs.items()},
        method, n_paths, problem.n_steps, seconds, seen, tried,
    )  # fmt: skip


def _fault(case: Case, method: str, audited: bool = True) -> SdesensError | None:
    """Why a method cannot be used; None if it can."""
    try:
        if method == "conditional":
            STRUCTURE["conditional"](case)
        else:
            parts_for(case.pilot(), case.theta, PAIRS[method])
        if not audited:
            return None
        seen = case.seen("conditional" if method == "conditional" else "pathwise")
        held = case.seen("malliavin") if method not in ("pathwise", "conditional") else None
    except SdesensError as error:
        return error
    worst = ORDER.index(WORST.get(method, "smooth"))
    rough = "what it differentiates is {0} ({1}), and its second derivative misses what happens there: gamma of a call would be 0"
    for found, most in ((seen, worst), (held, 0)):
        if found is not None and found.kind in ORDER and ORDER.index(found.kind) > most:
            what = "no smoother than a kink" if found.kind == "kink" else "a jump"
            return KinkError(f"method={method!r} cannot be used: {rough.format(what, found.reason)}.")
    return None


def _refusal(case: Case, method: str) -> str | None:
    fault = _fault(case, method)
    return None if fault is None else str(fault)
