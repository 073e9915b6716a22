"""d/dtheta E[F(X)] with its standard error: a map over blocks of paths.

A run is cut into blocks of `BLOCK` consecutive paths, at multiples of `BLOCK` whatever the run. A block's moments are
computed on their own and added in block order, so the bits do not depend on who computed a block or when: one thread or
eight processes, one call over 100,000 paths or ten calls over 10,000 each that are merged.

Inside a block, reverse-mode methods return the mean gradient of each group of `GROUP` paths; the spread between groups
gives the standard error, with a t quantile for their finite number. Methods that know every path's gradient use that.
"""

import difflib
import inspect
import math
import pickle
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from tqdm import tqdm

from sdesens.applicable import AUDIT, Case, judge
from sdesens.audit import Audit
from sdesens.auto import Trial, candidates, choose
from sdesens.blocks import BLOCK, ROW, Block, Run, sizes, tangents
from sdesens.errors import ArgumentError, ArgumentTypeError, HeavyTailWarning, NonFiniteError, ZeroGradientWarning
from sdesens.estimate import Estimate, Moments, total
from sdesens.integrate.compiled import wanted
from sdesens.noise import Noise, independent
from sdesens.problem import Problem
from sdesens.sensitivity import COMPILED, METHODS, SETTLE, SMOOTHED
from sdesens.sensitivity.probe import check_problem, noise_source, survives_vmap
from sdesens.sensitivity.tile import Contributions
from sdesens.tails import Tail, tail


@dataclass(frozen=True)
class Sensitivity:
    """The answer of `sensitivity`.

    Attributes
    ----------
    value : Estimate
        E[F(X)] for the scheme on this grid.
    gradient : dict of Estimate
        Its derivative by parameter name, each of the parameter's shape.
    bias : dict of Estimate, or None
        Discretisation bias of "value" and of each gradient: estimate minus the SDE's own number. It is resolved where it
        exceeds two of its standard errors; otherwise those standard errors bound it.
    method : str
    n_paths, n_steps, first_path : int
    seconds : float
        Of which `looked` went by before the run, on checks and the audit.
    """

    value: Estimate
    gradient: dict[str, Estimate]
    bias: dict[str, Estimate] | None
    method: str
    n_paths: int
    n_steps: int
    first_path: int
    seconds: float
    blocks: tuple[Block, ...]
    weighted: bool = False
    fingerprint: str = ""  # of problem and noise: runs that merge have the same
    audit: Audit | None = None
    tried: Mapping[str, Trial] = field(default_factory=dict)
    looked: float = 0.0

    @cached_property
    def tails(self) -> dict[str, Tail]:
        """The tail of each gradient, where the run is long enough to tell: 5,000 paths, or 400 groups of them."""
        found = {}
        for k, g in self.gradient.items():
            spread = float(g.standard_error.norm()) * math.sqrt(self.n_paths)
            found[k] = tail((b.largest[k] for b in self.blocks if k in b.largest), spread)
        return {k: v for k, v in found.items() if v is not None}

    @property
    def unreliable(self) -> tuple[str, ...]:
        """Parameters whose gradient seems to have no finite variance: their standard errors mean nothing."""
        return tuple(k for k, v in self.tails.items() if v.heavy)

    def to_dict(self) -> dict:
        """Plain numbers."""
        return {
            "method": self.method,
            "n_paths": self.n_paths,
            "n_steps": self.n_steps,
            "seconds": self.seconds,
            "value": self.value.to_dict(),
            "gradient": {k: v.to_dict() for k, v in self.gradient.items()},
            "bias": None if self.bias is None else {k: v.to_dict() for k, v in self.bias.items()},
            "tails": {k: v.to_dict() for k, v in self.tails.items()},
            "audit": None if self.audit is None else self.audit.to_dict(),
            "tried": {k: v.to_dict() for k, v in self.tried.items()},
        }

    def __repr__(self) -> str:
        lines = [f"Sensitivity by {self.method}, {self.n_paths} paths x {self.n_steps} steps, {self.seconds:.2f} s"]
        if self.audit is not None and self.looked > max(1.0, 0.5 * self.seconds):
            lines[0] += f", {self.looked:.2f} s of them to look for jumps (audit=False does not)"
        rows = {"value": self.value, **{f"d/d {k}": v for k, v in self.gradient.items()}}
        width = max(map(len, rows))
        bias = (
            {}
            if self.bias is None
            else {"value": self.bias["value"], **{f"d/d {k}": self.bias[k] for k in self.gradient}}
        )
        for name, estimate in rows.items():
            lines.append(f"  {name:<{width}}  {estimate!r}" + (f", bias {bias[name]!r}" if bias else ""))
        lines += [f"  d/d {k}: standard error not reliable, {self.tails[k]!r}" for k in self.unreliable]
        if self.tried:
            lines.append(f"  chosen by trial: {'; '.join(f'{k} {v!r}' for k, v in self.tried.items())}")
        return "\n".join(lines)


@torch.inference_mode(False)
def sensitivity(
    problem: Problem,
    *,
    n_paths: int,
    method: str = "pathwise",
    wrt: Sequence[str] | str | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    first_path: int = 0,
    bias: bool | float = False,
    executor: Executor | None = None,
    progress: bool | None = None,
    tile_paths: int | None = None,
    compile: bool | str = "auto",
    check: bool = True,
    audit: str | bool = "warn",
    **options: Any,
) -> Sensitivity:
    """Estimate E[F(X)] and its derivatives, with standard errors.

    Parameters
    ----------
    problem : Problem
    n_paths : int
        At least 2, and even for antithetic noise.
    method : str
        A key of `sdesens.METHODS`: "pathwise" (reverse mode, any number of parameters), "forward" (tangent SDE, each path's
        own gradient), "adjoint", "torchsde_adjoint", "finite_difference"; where the functional jumps "conditional", "vibrato",
        "malliavin", "likelihood_ratio". Or "auto": the unbiased method that applies and has the least variance times seconds
        in a trial on other noise; `tried` of the result says what was found of each.
    wrt : names, optional
        Parameters of the SDE, "y0", "t1"; "net.*" are all whose names begin so. All parameters of the SDE if left out. "t1" moves the horizon and every output
        time in proportion; a functional that mentions the horizon itself must carry it as a state.
    seed : int
        Seed of the Philox noise, 0 if left out.
    noise : Noise, optional
        Instead of `seed`: Antithetic(Philox(seed)), GivenNoise(z, weights), ...
    first_path : int
        Index of the first path. Runs that start at multiples of 10,000 can be merged to the same bits as one run.
    bias : bool or float
        Estimate the discretisation bias too, from coupled runs with n_steps and 2 n_steps on the same Brownian paths; three
        times the work on top. For weak order a, bias = 2^a / (2^a - 1) (G_h - G_{h/2}): a = 1 if True, or the number given, for
        schemes whose order is lower (square roots near zero).
    executor : concurrent.futures.Executor, optional
        Maps over blocks. A process pool needs a problem that pickles: functions of a module, not lambdas.
    progress : bool, optional
        A progress bar on standard error; by default for runs of several seconds on a terminal.
    tile_paths : int, optional
        Paths worked on at once. Chosen from the state's size if left out; it does not change the numbers.
    compile : {"auto", True, False}
        Whether chunks of steps are fused by `torch.compile`, with their noise inside: several times faster after some
        seconds of compiling, once for each kind of SDE, method and dtype in a process. "auto" does so where the work
        repays it, and never below 1e7 path-steps. The numbers agree to rounding. Where it cannot be done, a
        SlowPathWarning says why.
    check : bool
        Probe the problem first, some 20 ms: structure, names, parameters that do not reach the result. Turn it off in a
        loop that solves the same problem many times, once it has passed. Nothing is audited then either.
    audit : {"warn", "allow", False}
        Whether to look, on up to 6 x 20,000 paths of other noise, if what the method differentiates along the path jumps
        (see `sdesens.audit`). "warn": a jump is a JumpError, a steep or singular functional a HighVarianceWarning. "allow":
        a jump is a JumpWarning. False: nothing is looked at.
    **options
        Of the method itself, such as `relative_step` of "finite_difference", `draws` of "vibrato", `window` of "malliavin",
        `control` of "likelihood_ratio" and "malliavin"; unknown names raise.

    Returns
    -------
    Sensitivity

    Raises
    ------
    ArgumentError and its kin
        Bad shapes, names, structure: see `sdesens.errors`.
    UnusedParameterError
        If the result cannot depend on a parameter in `wrt`.
    NonFiniteError
        With the path, step and time of the first bad state.
    JumpError
        If the functional jumps where the method differentiates it; it names the methods that apply.
    MethodError
        If the method cannot be used for this problem.

    Warns
    -----
    ZeroGradientWarning
        If a gradient is exactly zero on every path.
    HighVarianceWarning
        If the functional is steep, or singular.
    HeavyTailWarning
        If a gradient seems to have no finite variance, so that its standard error means nothing.

    Example
    -------
    >>> from sdesens import SDE, Problem
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> sde = SDE(lambda t, y, p: -p["k"] * y, lambda t, y, p: 0.1 * torch.ones_like(y), {"k": 0.5 * one[0]})
    >>> problem = Problem(sde, lambda ys, p: ys[-1, :, 0], y0=one, ts=(0.0, 1.0), n_steps=16)
    >>> result = sensitivity(problem, n_paths=1000, seed=1)
    >>> float(result.gradient["k"].mean)        # exact for the scheme: -(1 - 0.5/16)^15 = -0.6211
    -0.6...
    """
    began = time.perf_counter()
    run, seen, tried = _prepare(
        problem, n_paths, method, wrt, seed, noise, first_path, bias, tile_paths, compile, check, audit, options
    )  # fmt: skip
    looked = time.perf_counter() - began
    blocks = carry_out(run, executor, progress)
    return replace(_assemble(blocks, run, time.perf_counter() - began), audit=seen, tried=tried, looked=looked)


def merge(*results: Sensitivity) -> Sensitivity:
    """One result from runs over consecutive stretches of paths.

    To the bit the same as a single run if the stretches begin at multiples of 10,000 paths.

    Raises
    ------
    ArgumentError
        If the runs differ in method, steps or parameters, or their paths do not follow each other without gap or overlap.
    """
    if not results:
        raise ArgumentError("`merge` needs at least one result.")
    if not all(isinstance(r, Sensitivity) for r in results):
        raise ArgumentTypeError("`merge` takes results of `sensitivity` one by one: merge(*results) for a list.")
    ordered = sorted(results, key=lambda r: r.first_path)
    first = ordered[0]
    expected = first.first_path
    for r in ordered:
        same = (r.method, r.n_steps, r.weighted, tuple(r.gradient), r.bias is None)
        if same != (first.method, first.n_steps, first.weighted, tuple(first.gradient), first.bias is None):
            raise ArgumentError(
                "`merge` needs results of one method, number of steps, choice of parameters and `bias`."
            )
        if r.fingerprint != first.fingerprint:
            raise ArgumentError(
                "`merge` needs runs of one problem on one noise: parameters, state, grid or seed differ."
            )
        if r.first_path != expected:
            raise ArgumentError(
                f"`merge` needs consecutive paths: a run starts at path {r.first_path} where {expected} was expected; set "
                "`first_path` of each run to the end of the one before."
            )
        expected += r.n_paths
    blocks = tuple(block for r in ordered for block in r.blocks)
    seconds = sum(r.seconds for r in ordered)
    return _result(blocks, first.method, first.n_steps, first.first_path, seconds, first.weighted, first.fingerprint)


def carry_out(run: Run, executor: Executor | None, progress: bool | None) -> tuple[Block, ...]:
    """All blocks of a run, in order."""
    stretches = run.stretches()
    mapped = map(run.blocks, stretches) if executor is None else _executed(executor, run, stretches)
    hidden = None if progress is None else not progress
    bar = tqdm(mapped, total=len(stretches), desc=run.method, unit="part", delay=2.0, disable=hidden, leave=False)
    return tuple(block for part in bar for block in part)


def _executed(executor: Executor, run: Run, stretches: list[tuple[int, int]]):
    if not isinstance(executor, Executor):
        raise ArgumentTypeError(
            f"`executor` must be a concurrent.futures.Executor, got {executor!r:.60}: such as ThreadPoolExecutor(2)."
        )
    if isinstance(executor, ProcessPoolExecutor):
        try:
            pickle.dumps(run)
        except Exception as error:
            raise ArgumentError(
                f"`problem` does not pickle, as a process pool needs ({error}): write drift, diffusion and functional as "
                "functions of a module, not lambdas, and parameters as leaves; or use a ThreadPoolExecutor."
            ) from error
    return executor.map(run.blocks, stretches)


def _assemble(blocks: tuple[Block, ...], run: Run, seconds: float) -> Sensitivity:
    result = _result(
        blocks, run.method, run.problem.n_steps, run.first, seconds, run.weighted, run.fingerprint()
    )  # fmt: skip
    moments = {k: total(b.moments[k] for b in blocks) for k in result.gradient}
    zero = []
    for name, m in moments.items():
        still = (m.mean == 0) & (m.m2 == 0)
        if bool(still.any()):
            some = "" if bool(still.all()) else f" ({int(still.sum())} of its {still.numel()} components)"
            zero.append(f"{name!r}{some}")
    if zero:
        warnings.warn(
            f"the {run.method} gradient with respect to {', '.join(zero)} is exactly zero on every path. Either "
            "the result does not depend on it, or the functional jumps (an indicator, a rounding, a comparison) and its "
            "pathwise derivative misses the jump: compare with method='auto', or with wide central differences.",
            ZeroGradientWarning,
            stacklevel=4,
        )
    for name in result.unreliable:
        warnings.warn(
            f"the variance of the {run.method} gradient with respect to {name!r} looks infinite ({result.tails[name]!r}; above 2 it "
            "is finite): its standard error is not reliable, whatever the number of paths. The usual cause is a square root near "
            "zero. Use a scheme that stays away from it (models.cir_lamperti), or another method.",
            HeavyTailWarning,
            stacklevel=4,
        )
    return result


def _result(
    blocks: tuple[Block, ...], method: str, n_steps: int, first: int, seconds: float, weighted: bool, fingerprint: str
) -> Sensitivity:
    def collect(pick: Callable[[Block], dict[str, Moments]]) -> dict[str, Estimate]:
        return {k: total(pick(b)[k] for b in blocks).estimate(weighted=weighted) for k in pick(blocks[0])}

    gradient = collect(lambda b: b.moments)
    value = gradient.pop("value")
    bias = None if blocks[0].bias is None else collect(lambda b: b.bias or {})
    return Sensitivity(value, gradient, bias, method, value.n, n_steps, first, seconds, blocks, weighted, fingerprint)


def _prepare(
    problem, n_paths, method, wrt, seed, noise, first_path, bias, tile_paths, compile, check, audit, options
) -> tuple[Run, Audit | None, dict[str, Trial]]:  # fmt: skip
    """Check everything that can be checked before work starts; settle the method and its options."""
    if not isinstance(problem, Problem):
        raise ArgumentTypeError(f"`problem` must be a Problem, got {type(problem).__name__}.")
    if method not in (*METHODS, "auto"):
        raise ArgumentError(f"`method` must be one of {', '.join(map(repr, METHODS))}, or 'auto', got {method!r}.")
    check_counts(n_paths=(n_paths, 2), first_path=(first_path, 0), tile_paths=(tile_paths, 1))
    if not any(audit is a or (isinstance(audit, str) and audit == a) for a in AUDIT):
        raise ArgumentError(f"`audit` must be 'warn', 'allow' or False, got {audit!r}.")
    check_options("sensitivity", sensitivity, method, METHODS.get(method), options)
    source = noise_source(problem, seed, noise)
    check_units(source, n_paths, first_path)
    if not (bias is False or (isinstance(bias, bool | int | float) and 0.1 <= bias <= 8)):
        raise ArgumentError(f"`bias` must be True, False or a weak order, a number from 0.1 to 8, got {bias!r}.")
    if bias and source.n_steps is not None:
        raise ArgumentError("`bias` runs n_steps and 2 n_steps, so it needs noise for any grid, such as Philox(seed).")
    theta = problem.leaves(wrt)
    differentiated = method not in SMOOTHED and method not in ("finite_difference", "auto")
    noise_dim = check_problem(problem, theta, differentiated=differentiated, thorough=check)
    vectorised = method == "finite_difference" or survives_vmap(problem, theta, noise_dim)
    case = Case(problem, theta, source, noise_dim, vectorised, n_paths)
    tried: dict[str, Trial] = {}
    if method == "auto":
        method, tried = choose(case, candidates(case))
    seen = judge(case, method, options, allow=audit == "allow") if check and audit else None
    if method in SETTLE:
        with suppress(NonFiniteError):  # the run itself will say which of its own paths
            options = SETTLE[method](case.pilot(), theta, options)
    compiled = method in COMPILED and vectorised and wanted(compile, n_paths * problem.n_steps, tangents(method, theta))
    copies = tangents(method, theta)
    run = make_run(case, method, METHODS[method], options, first_path, tile_paths, compiled, copies, bias)
    return run, seen, tried


def make_run(
    case: Case,
    method: str,
    compute: Callable[..., Contributions],
    options: dict[str, Any],
    first_path: int = 0,
    tile_paths: int | None = None,
    compiled: bool = False,
    copies: int = 1,
    bias: bool | float = False,
) -> Run:
    """A run of a method that is settled; `copies` is how many states' worth of numbers it carries a path."""
    problem, source, n_paths = case.problem, case.noise, case.n_paths
    y0 = problem.initial({})
    weights = source.weights(first_path, n_paths, dtype=torch.float64, device=y0.device)
    weighted = weights is not None
    if weights is not None and not abs(float(weights.sum()) - 1.0) < 1e-6:
        raise ArgumentError(
            f"the weights of paths {first_path} ... {first_path + n_paths - 1} sum to {float(weights.sum())!r}, not 1: a "
            "weighted sum needs all its paths in one run."
        )
    group, tile = sizes(problem, copies, y0, case.noise_dim, first_path + n_paths, source.unit, weighted, compiled)
    if tile_paths is not None:
        tile = max(tile_paths // (ROW * group), 1) * ROW * group
        tile = tile if tile < BLOCK else tile // BLOCK * BLOCK
    fine = independent(source) if bias else None  # so that value and bias have independent errors
    return Run(
        problem, method, compute, case.theta, source, fine, float(bias), first_path, n_paths, group, tile, case.noise_dim,
        case.vectorised, weighted, compiled, options,
    )  # fmt: skip


def check_counts(**numbers: tuple[Any, int]) -> None:
    """Raise unless each number is an int and at least its bound; None is left alone where it is the tile's."""
    for name, (number, least) in numbers.items():
        if number is None and name == "tile_paths":
            continue
        if isinstance(number, bool) or not isinstance(number, int):
            raise ArgumentTypeError(f"`{name}` must be an int, got {number!r}.")
        if number < least:
            raise ArgumentError(f"`{name}` must be at least {least}, got {number}.")


def check_options(caller: str, function: Callable, method: str, compute: Callable | None, options: Mapping) -> None:
    """Raise ArgumentTypeError for a name that neither the caller nor the method knows."""
    parameters = {} if compute is None else inspect.signature(compute).parameters
    known = [k for k, v in parameters.items() if v.kind is v.KEYWORD_ONLY and k != "constants"]  # those are settled
    if not isinstance(options.get("control", True), bool):
        raise ArgumentTypeError(f"`control` must be True or False, got {options['control']!r}.")
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*inspect.signature(function).parameters, *known], 1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; method {method!r} has options {known}."
            raise ArgumentTypeError(f"`{caller}` has no argument `{name}`{hint}")


def check_units(source: Noise, n_paths: int, first_path: int) -> None:
    """Raise ArgumentError if antithetic pairs would be torn apart."""
    if n_paths % source.unit or first_path % source.unit:
        raise ArgumentError(f"antithetic paths come in pairs: `n_paths` = {n_paths} and `first_path` must be even.")
