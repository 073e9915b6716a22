"""The tangent process itself: S_t = dX_t/dtheta along each path.

The derivative of the scheme's states with the noise held fixed, by one forward-mode sweep for each component of theta.
It solves the sensitivity SDE of `sdesens.sensitivity.forward`; this file is for looking at S, not for averaging it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.noise import Noise
from sdesens.problem import Problem
from sdesens.sensitivity.probe import check_problem, noise_source
from sdesens.sensitivity.tile import Tile
from sdesens.tensors import basis, jvp


class TangentPaths(NamedTuple):
    """States and their derivatives along paths."""

    ts: Tensor
    ys: Tensor
    tangents: dict[str, Tensor]


def tangent_paths(
    problem: Problem,
    *,
    n_paths: int,
    wrt: Sequence[str] | str | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    every_step: bool = False,
) -> TangentPaths:
    """Paths X and their parameter derivatives dX/dtheta.

    Parameters
    ----------
    problem : Problem
        Its functional is not used.
    n_paths : int
    wrt : names, optional
        As in `sensitivity`.
    seed, noise
        As in `sensitivity`: the same paths as there.
    every_step : bool
        Return every grid point instead of `problem.ts`.

    Returns
    -------
    TangentPaths
        ts (T,), ys (T, B, *event), tangents[name] (T, B, *event, *shape of the parameter); units [x]/[theta].

    Example
    -------
    >>> from sdesens import SDE, Problem
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> gbm = SDE(lambda t, y, p: p["mu"] * y, lambda t, y, p: 0.2 * y, {"mu": 0.1 * one[0]})
    >>> problem = Problem(gbm, lambda ys, p: ys[-1, :, 0], y0=one, ts=(0.0, 1.0), n_steps=50)
    >>> tangent_paths(problem, n_paths=3, every_step=True).tangents["mu"].shape
    torch.Size([51, 3, 1])
    """
    theta = problem.leaves(wrt)
    source = noise_source(problem, seed, noise)
    if isinstance(n_paths, bool) or not isinstance(n_paths, int) or n_paths < 1:
        raise ArgumentError(f"`n_paths` must be a positive int, got {n_paths!r}.")
    if every_step:
        grid = problem.t0 + torch.arange(problem.n_steps + 1, dtype=torch.float64) * problem.dt
        grid[-1] = problem.t1
        dense = replace(problem, ts=grid)
    else:
        dense = problem
    noise_dim = check_problem(problem, theta)
    tile = Tile(dense, source, 0, n_paths, n_paths, noise_dim)
    ys, columns = torch.empty(0), []
    with torch.no_grad():
        for unit in basis(theta):
            ys, column = jvp(tile.paths, (theta,), (unit,))
            columns.append(column)
    tile.check(theta, ys, ys.flatten(2).sum((0, 2)))
    tangents, reached = {}, 0
    for name, value in theta.items():
        mine = columns[reached : reached + value.numel()]
        tangents[name] = torch.stack(mine, -1).reshape(*ys.shape, *value.shape)
        reached += value.numel()
    return TangentPaths(dense.times, ys, tangents)
