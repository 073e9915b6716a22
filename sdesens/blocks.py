"""The work of a Monte Carlo run, block by block: what is computed at once, and what is kept of it.

A block of `BLOCK` consecutive paths is the unit of the result: its moments are computed on their own. A tile is the unit of
computing, as many groups of paths as fit the cache: a part of a block, or several. Where tiles end does not show in the
numbers.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, NonFiniteError
from sdesens.estimate import Moments, total
from sdesens.noise import Coarsened, Noise
from sdesens.problem import Problem, Theta
from sdesens.sensitivity.tile import Contributions, Tile
from sdesens.tails import Largest

BLOCK = 10_000  # paths a block; a multiple of GROUP
GROUP = 200  # paths a group in reverse mode
ROW = 8  # tiles are cut at multiples of so many groups, see `_tiles`
TILE_BYTES = 480_000  # one state tensor of a tile: a few of them fit the second-level cache
TILE_OUTPUT_BYTES = 64 * 2**20  # states (and tangents) kept for the functional


@dataclass(frozen=True)
class Block:
    """Moments of one block: "value" and the parameters by name; of the half-step differences too, if asked for.

    `largest` holds what the tails of the gradients are judged by.
    """

    first: int
    moments: dict[str, Moments]
    bias: dict[str, Moments] | None
    largest: dict[str, Largest]


@dataclass(frozen=True)
class Run:
    """Everything a worker needs to compute a block."""

    problem: Problem
    method: str
    compute: Callable[..., Contributions]
    theta: dict[str, Tensor]
    noise: Noise
    fine_noise: Noise | None  # a source for 2 n_steps, if the bias is wanted
    order: float  # weak order that the bias is estimated with
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
            whole = 2.0**self.order / (2.0**self.order - 1.0)  # of the bias, over its part that halving takes off
            gaps = [
                (first, size, {k: whole * (c[k] - f[k]) for k in c})
                for (first, size, c), (_, _, f) in zip(coarse, fine, strict=True)
            ]
        unit = self.noise.unit
        edges = [start, *range((start // BLOCK + 1) * BLOCK, end, BLOCK), end]
        found = []
        for a, b in pairwise(edges):
            units = _units(_cut(rows, a, b), unit)
            bias = _moments(_units(_cut(gaps, a, b), unit)) if gaps else None
            largest = {} if self.weighted else {k: _largest(v) for k, v in units.items() if k != "value"}
            found.append(Block(a, _moments(units), bias, largest))
        return found

    def _contributions(self, problem: Problem, noise: Noise, start: int, end: int) -> "list[_Row]":
        rows = []
        for first, count, group in _tiles(start, end, self.tile_paths, self.group):
            lanes = self.group if self.compiled else 0
            tile = Tile(problem, noise, first, count, group, self.noise_dim, self.vectorised, lanes)
            contributions = self.compute(tile, self.theta, **self.options)
            _check_finite(contributions, tile, self.method)
            rows.append((first, count, _weigh(contributions, tile, self.n_paths, self.weighted)))
        return rows

    def fingerprint(self) -> str:
        """A digest of what is computed, to tell runs that belong together from those that do not."""
        q, sde = self.problem, self.problem.sde
        names = [_named(f) for f in (sde.drift, sde.diffusion, sde.step, q.functional)]
        noise = repr(self.noise) if self.noise.n_steps is None else type(self.noise).__qualname__
        digest = hashlib.sha256(
            repr((names, sde.noise_type, q.times.tolist(), q.n_steps, noise, self.options, self.order)).encode()
        )
        for value in (q.initial({}), *sde.params.values()):
            digest.update(value.detach().cpu().double().numpy().tobytes())
        return digest.hexdigest()


def _named(function: Any) -> str:
    """What tells functions apart: all that a dataclass holds, the name of others."""
    return repr(function) if is_dataclass(function) else getattr(function, "__qualname__", type(function).__qualname__)


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
                else "the noise vanishes there where the parameter moves the path: use method='pathwise', a shorter `window`, or a "
                "scheme that stays away from zero"
                if "malliavin" in method or "likelihood_ratio" in method
                else "a coefficient or the functional has no finite derivative there (a square root or a norm at 0, a 0/0 "
                "hidden by torch.where): give the branch that is not taken a safe argument"
            )
            raise NonFiniteError(
                f"the {method} gradient with respect to {name!r} is NaN or infinite on {where}, though the path is finite: "
                f"{cause}.",
                paths=(first,),
                n_bad=bad.numel() * size,
            )


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


_Units = dict[str, dict[int, Tensor]]  # by name: means by the units' size, since where a tile ends must not show


def _units(rows: list[_Row], unit: int) -> _Units:
    found: dict[str, dict[int, list[Tensor]]] = {name: {} for name in rows[0][2]}
    for _, paths, row in rows:
        for name, means in row.items():
            size = paths // means.shape[0]
            if size < unit:  # paths of one unit are not independent: average them first
                means, size = means.unflatten(0, (-1, unit // size)).mean(1), unit
            found[name].setdefault(size, []).append(means)
    return {name: {size: torch.cat(means) for size, means in sizes.items()} for name, sizes in found.items()}


def _moments(units: _Units) -> dict[str, Moments]:
    return {k: total(Moments.of_units(means, size) for size, means in v.items()) for k, v in units.items()}


def _largest(sizes: dict[int, Tensor]) -> Largest:
    size, means = max(sizes.items(), key=lambda item: len(item[1]))  # a last odd group is none of them
    return Largest.of(means, size)


def tangents(method: str, theta: Theta) -> int:
    """How many states' worth of numbers a path carries: the tangents of the forward methods count."""
    return 1 + (sum(v.numel() for v in theta.values()) if method in ("forward", "malliavin") else 0)


def sizes(problem, copies, y0, noise_dim, end, unit, weighted, compiled) -> tuple[int, int]:
    """Paths a group and paths a tile, from the sizes of state, noise, outputs and tangents."""
    kept = y0.numel() * copies * len(problem.outputs) * y0.element_size()
    cached = TILE_BYTES // (y0.element_size() * max(y0.numel(), noise_dim))
    most = max(min(cached, TILE_OUTPUT_BYTES // kept, end if compiled else BLOCK), 1)
    group = GROUP if end >= BLOCK else max(end // 50, 1)  # a small first run still gets 50 groups
    group = 1 if weighted else min(group, max(most // ROW, 1))
    group = max(group // unit, 1) * unit
    while BLOCK % group:  # groups may not straddle blocks
        group -= unit
    tile = max(most // (ROW * group), 1) * ROW * group
    return group, tile if tile < BLOCK else tile // BLOCK * BLOCK
