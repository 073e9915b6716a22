"""d/dtheta E[F(X)] with its standard error: a map over blocks of paths.

A run is cut into blocks of `BLOCK` consecutive paths, at multiples of `BLOCK` whatever the run. A block's moments are
computed on their own and added in block order, so the bits do not depend on who computed a block or when: one thread or
eight processes, one call over 100,000 paths or ten calls over 10,000 each that are merged.

Inside a block, reverse-mode methods return the mean gradient of each group of `GROUP` paths; the spread between groups
gives the standard error, with a t quantile for their finite number. Methods that know every path's gradient use that.
"""

import difflib
import hashlib
import inspect
import pickle
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdesens.errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    ZeroGradientWarning,
)
from sdesens.estimate import Estimate, Moments, total
from sdesens.integrate.compiled import wanted
from sdesens.noise import Coarsened, Noise, independent
from sdesens.problem import Problem, Theta
from sdesens.sensitivity import METHODS
from sdesens.sensitivity.probe import check_problem, noise_source, survives_vmap
from sdesens.sensitivity.tile import Contributions, Tile

BLOCK = 10_000  # paths a block; a multiple of GROUP
GROUP = 200  # paths a group in reverse mode
ROW = 8  # tiles are cut at multiples of so many groups, see `_tiles`
TILE_NUMBERS = KERNEL_NUMBERS = (
    40_000  # numbers in one state tensor of a tile: a few of them fit the second-level cache
)
TILE_OUTPUT_BYTES = 64 * 2**20  # states (and tangents) kept for the functional


@dataclass(frozen=True)
class Block:
    """Moments of one block: "value" and the parameters by name; of the half-step differences too, if asked for."""

    first: int
    moments: dict[str, Moments]
    bias: dict[str, Moments] | None


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
        }

    def __repr__(self) -> str:
        lines = [f"Sensitivity by {self.method}, {self.n_paths} paths x {self.n_steps} steps, {self.seconds:.2f} s"]
        rows = {"value": self.value, **{f"d/d {k}": v for k, v in self.gradient.items()}}
        width = max(map(len, rows))
        bias = (
            {}
            if self.bias is None
            else {"value": self.bias["value"], **{f"d/d {k}": self.bias[k] for k in self.gradient}}
        )
        for name, estimate in rows.items():
            lines.append(f"  {name:<{width}}  {estimate!r}" + (f", bias {bias[name]!r}" if bias else ""))
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
    bias: bool = False,
    executor: Executor | None = None,
    progress: bool | None = None,
    tile_paths: int | None = None,
    compile: bool | str = "auto",
    check: bool = True,
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
        own gradient), "adjoint", "torchsde_adjoint", "finite_difference".
    wrt : names, optional
        Parameters of the SDE, "y0", "t1". All parameters of the SDE if left out. "t1" moves the horizon and every output
        time in proportion; a functional that mentions the horizon itself must carry it as a state.
    seed : int
        Seed of the Philox noise, 0 if left out.
    noise : Noise, optional
        Instead of `seed`: Antithetic(Philox(seed)), GivenNoise(z, weights), ...
    first_path : int
        Index of the first path. Runs that start at multiples of 10,000 can be merged to the same bits as one run.
    bias : bool
        Estimate the discretisation bias too, from coupled runs with n_steps and 2 n_steps on the same Brownian paths; three
        times the work on top. With weak order 1, bias = 2 (G_h - G_{h/2}).
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
        loop that solves the same problem many times, once it has passed.
    **options
        Of the method itself, such as `relative_step` of "finite_difference"; unknown names raise.

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

    Warns
    -----
    ZeroGradientWarning
        If a gradient is exactly zero on every path.

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
    run = _prepare(problem, n_paths, method, wrt, seed, noise, first_path, bias, tile_paths, compile, check, options)
    stretches = run.stretches()
    mapped = map(run.blocks, stretches) if executor is None else _executed(executor, run, stretches)
    hidden = None if progress is None else not progress
    bar = tqdm(mapped, total=len(stretches), desc=method, unit="part", delay=2.0, disable=hidden, leave=False)
    blocks = tuple(block for part in bar for block in part)
    return _assemble(blocks, run, time.perf_counter() - began)


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


@dataclass(frozen=True)
class _Run:
    """Everything a worker needs to compute a block."""

    problem: Problem
    method: str
    theta: dict[str, Tensor]
    noise: Noise
    fine_noise: Noise | None  # a source for 2 n_steps, if the bias is wanted
    first: int
    n_paths: int
    group: int
    tile_paths: int
    noise_dim: int
    vectorised: bool
    weighted: bool
    compiled: bool
    options: dict[str, Any]

    def stretches(self) -> list[tuple[int, int]]:
        """The paths, cut into (first, end) of as many whole blocks as make a tile."""
        end = self.first + self.n_paths
        aligned = -(-self.first // BLOCK) * BLOCK
        cuts = [self.first, *range(aligned, end, BLOCK * max(self.tile_paths // BLOCK, 1)), end]
        return list(pairwise(dict.fromkeys(cuts)))

    def blocks(self, stretch: tuple[int, int]) -> list[Block]:
        """The moments of each block in a stretch of paths."""
        start, end = stretch
        rows = self._contributions(self.problem, self.noise, start, end)
        gaps: list[_Row] = []
        if self.fine_noise is not None:
            coarse = self._contributions(self.problem, Coarsened(self.fine_noise, 2), start, end)
            fine = self._contributions(self.problem.with_steps(2 * self.problem.n_steps), self.fine_noise, start, end)
            gaps = [
                (first, size, {k: 2.0 * (c[k] - f[k]) for k in c})
                for (first, size, c), (_, _, f) in zip(coarse, fine, strict=True)
            ]
        unit = self.noise.unit
        edges = [start, *range((start // BLOCK + 1) * BLOCK, end, BLOCK), end]
        return [
            Block(a, _moments(_cut(rows, a, b), unit), _moments(_cut(gaps, a, b), unit) if gaps else None)
            for a, b in pairwise(edges)
        ]

    def _contributions(self, problem: Problem, noise: Noise, start: int, end: int) -> "list[_Row]":
        rows = []
        for first, count, group in _tiles(start, end, self.tile_paths, self.group):
            lanes = self.group if self.compiled else 0
            tile = Tile(problem, noise, first, count, group, self.noise_dim, self.vectorised, lanes)
            contributions = METHODS[self.method](tile, self.theta, **self.options)
            _check_finite(contributions, tile, self.method)
            rows.append((first, count, _weigh(contributions, tile, self.n_paths, self.weighted)))
        return rows

    def fingerprint(self) -> str:
        """A digest of what is computed, to tell runs that belong together from those that do not."""
        q, sde = self.problem, self.problem.sde
        names = [getattr(f, "__qualname__", type(f).__qualname__) for f in (sde.drift, sde.diffusion, q.functional)]
        noise = repr(self.noise) if self.noise.n_steps is None else type(self.noise).__qualname__
        digest = hashlib.sha256(
            repr((names, sde.noise_type, q.times.tolist(), q.n_steps, noise, self.options)).encode()
        )
        for value in (q.initial({}), *sde.params.values()):
            digest.update(value.detach().cpu().double().numpy().tobytes())
        return digest.hexdigest()


def _check_finite(c: Contributions, tile: Tile, method: str) -> None:
    """Raise NonFiniteError if a gradient is NaN or infinite although the paths are finite."""
    for name, g in c.gradients.items():
        bad = (~torch.isfinite(g)).reshape(g.shape[0], -1).any(1).nonzero().flatten()
        if bad.numel():
            size = tile.count // g.shape[0]
            first = tile.first + int(bad[0]) * size
            where = f"path {first}" if size == 1 else f"paths {first} ... {first + size - 1}"
            cause = (
                "the state reconstructed backwards left its domain or blew up: use method='pathwise'"
                if "adjoint" in method
                else "a bumped run left the domain: take a smaller `relative_step`"
                if method == "finite_difference"
                else "a coefficient or the functional has no finite derivative there (a square root or a norm at 0, a 0/0 "
                "hidden by torch.where): give the branch that is not taken a safe argument"
            )
            raise NonFiniteError(
                f"the {method} gradient with respect to {name!r} is NaN or infinite on {where}, though the path is finite: "
                f"{cause}.",
                paths=(first,),
                n_bad=bad.numel() * size,
            )


def _executed(executor: Executor, run: _Run, stretches: list[tuple[int, int]]):
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


def _tiles(start: int, end: int, tile_paths: int, group: int):
    """(first, count, group) covering start ... end - 1; a last odd group becomes a tile of its own.

    A batched matrix product takes neighbouring rows two (float64) or four (float32) at a time, and a lone row in another
    order of summation. So that the bits do not depend on `tile_paths`, it is a multiple of ROW groups, and a lone group
    that would be left over goes with the tile before it.
    """
    while start < end:
        whole = (end - start) // group * group
        rest = max(group, tile_paths // 4)  # not worth a tile of its own: an operation costs much the same on few paths
        count = (whole if whole <= tile_paths + rest else tile_paths) if whole else end - start
        yield start, count, group if whole else count
        start += count


def _weigh(c: Contributions, tile: Tile, n_paths: int, weighted: bool) -> dict[str, Tensor]:
    if not weighted:
        return {"value": c.values.detach().double(), **c.gradients}
    w = tile.noise.weights(tile.first, tile.count, dtype=torch.float64, device=c.values.device)
    assert w is not None
    w = w * n_paths

    def apply(g: Tensor) -> Tensor:
        if g.shape[0] != tile.count:
            raise ArgumentError("weighted paths need groups of one path in reverse mode.")
        return g * w.reshape(-1, *[1] * (g.dim() - 1))

    return {"value": c.values.detach().double() * w, **{k: apply(g) for k, g in c.gradients.items()}}


_Row = tuple[int, int, dict[str, Tensor]]  # first path, number of paths, unit means of "value" and each parameter


def _cut(rows: list[_Row], start: int, end: int) -> list[_Row]:
    """The part of the rows that belongs to paths start ... end - 1."""
    parts = []
    for first, count, row in rows:
        low, high = max(start, first), min(end, first + count)
        if low < high:
            part = {k: v[(low - first) * len(v) // count : (high - first) * len(v) // count] for k, v in row.items()}
            parts.append((low, high - low, part))
    return parts


def _moments(rows: list[_Row], unit: int) -> dict[str, Moments]:
    moments = {}
    for name in rows[0][2]:
        units: dict[int, list[Tensor]] = {}  # means by the units' size: where a tile ends must not show
        for _, paths, row in rows:
            means = row[name]
            size = paths // means.shape[0]
            if size < unit:  # paths of one unit are not independent: average them first
                means, size = means.unflatten(0, (-1, unit // size)).mean(1), unit
            units.setdefault(size, []).append(means)
        moments[name] = total(Moments.of_units(torch.cat(means), size) for size, means in units.items())
    return moments


def _assemble(blocks: tuple[Block, ...], run: _Run, seconds: float) -> Sensitivity:
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
            "pathwise derivative misses the jump: compare with method='finite_difference'.",
            ZeroGradientWarning,
            stacklevel=3,
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


def _prepare(problem, n_paths, method, wrt, seed, noise, first_path, bias, tile_paths, compile, check, options) -> _Run:
    """Check everything that can be checked before work starts."""
    if not isinstance(problem, Problem):
        raise ArgumentTypeError(f"`problem` must be a Problem, got {type(problem).__name__}.")
    if method not in METHODS:
        raise ArgumentError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    for name, number, least in (("n_paths", n_paths, 2), ("first_path", first_path, 0), ("tile_paths", tile_paths, 1)):
        if number is None and name == "tile_paths":
            continue
        if isinstance(number, bool) or not isinstance(number, int):
            raise ArgumentTypeError(f"`{name}` must be an int, got {number!r}.")
        if number < least:
            raise ArgumentError(f"`{name}` must be at least {least}, got {number}.")
    known = [k for k, v in inspect.signature(METHODS[method]).parameters.items() if v.kind is v.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*inspect.signature(sensitivity).parameters, *known], 1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; method {method!r} has options {known}."
            raise ArgumentTypeError(f"`sensitivity` has no argument `{name}`{hint}")
    source = noise_source(problem, seed, noise)
    if n_paths % source.unit or first_path % source.unit:
        raise ArgumentError(f"antithetic paths come in pairs: `n_paths` = {n_paths} and `first_path` must be even.")
    if bias and source.n_steps is not None:
        raise ArgumentError("`bias` runs n_steps and 2 n_steps, so it needs noise for any grid, such as Philox(seed).")
    theta = problem.leaves(wrt)
    differentiated = method != "finite_difference"
    noise_dim = check_problem(problem, theta, differentiated=differentiated, thorough=check)
    vectorised = not differentiated or survives_vmap(problem, theta, noise_dim)
    y0 = problem.initial({})
    weights = source.weights(first_path, n_paths, dtype=torch.float64, device=y0.device)
    weighted = weights is not None
    if weights is not None and not abs(float(weights.sum()) - 1.0) < 1e-6:
        raise ArgumentError(
            f"the weights of paths {first_path} ... {first_path + n_paths - 1} sum to {float(weights.sum())!r}, not 1: a "
            "weighted sum needs all its paths in one run."
        )
    compiled = wanted(compile, n_paths * problem.n_steps, tangents(method, theta)) and vectorised
    group, tile = _sizes(
        problem, tangents(method, theta), y0, noise_dim, first_path + n_paths, source.unit, weighted, compiled
    )
    if tile_paths is not None:
        tile = max(tile_paths // (ROW * group), 1) * ROW * group
        tile = tile if tile < BLOCK else tile // BLOCK * BLOCK
    fine = independent(source) if bias else None  # so that value and bias have independent errors
    return _Run(
        problem, method, theta, source, fine, first_path, n_paths, group, tile, noise_dim, vectorised, weighted, compiled,
        options,
    )  # fmt: skip


def tangents(method: str, theta: Theta) -> int:
    """How many states' worth of numbers a path carries: the tangents of the forward method count."""
    return 1 + (sum(v.numel() for v in theta.values()) if method == "forward" else 0)


def _sizes(problem, copies, y0, noise_dim, end, unit, weighted, compiled) -> tuple[int, int]:
    """Paths a group and paths a tile, from the sizes of state, noise, outputs and tangents."""
    kept = y0.numel() * copies * len(problem.outputs) * y0.element_size()
    cached = (KERNEL_NUMBERS if compiled else TILE_NUMBERS) // max(y0.numel(), noise_dim)
    most = max(min(cached, TILE_OUTPUT_BYTES // kept, end if compiled else BLOCK), 1)
    group = GROUP if end >= BLOCK else max(end // 50, 1)  # a small first run still gets 50 groups
    group = 1 if weighted else min(group, max(most // ROW, 1))
    group = max(group // unit, 1) * unit
    while BLOCK % group:  # groups may not straddle blocks
        group -= unit
    tile = max(most // (ROW * group), 1) * ROW * group
    return group, tile if tile < BLOCK else tile // BLOCK * BLOCK
