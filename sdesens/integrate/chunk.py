"""A path in chunks: a few steps at a time, as one pure function of state, parameters and noise.

The grid is cut into chunks of at most `length` steps. `advance` takes the state over one chunk and returns it at the
chunk's marks: the grid points where the functional looks, and the chunk's end. Every gradient method is a sweep over
these chunks, forwards or backwards, and differentiates `advance` alone.

Times are whole numbers times a step, in float64, cast to the state's dtype only when handed to the user's functions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdesens.integrate import scheme
from sdesens.noise import Noise
from sdesens.sde import SDE, Params


@dataclass(frozen=True)
class Chunk:
    """Steps `start ... start + count - 1` of the grid.

    Attributes
    ----------
    marks : tuple of int
        Local step counts after which the state is returned; the last is `count`.
    outputs : tuple of (int, int)
        Pairs (index into marks, index into the output times).
    """

    start: int
    count: int
    marks: tuple[int, ...]
    outputs: tuple[tuple[int, int], ...]


def plan(outputs: tuple[int, ...], length: int) -> list[Chunk]:
    """Chunks of at most `length` steps, aligned at multiples of `length`, for outputs at these grid indices.

    Example
    -------
    >>> [(c.start, c.count, c.marks, c.outputs) for c in plan((0, 3, 8), 4)]
    [(0, 4, (3, 4), ((0, 1),)), (4, 4, (4,), ((0, 2),))]
    """
    chunks, reached = [], 1  # output 0 is the initial state
    for start in range(0, outputs[-1], length):
        count = min(length, outputs[-1] - start)
        seen = {}
        while reached < len(outputs) and outputs[reached] <= start + count:
            seen[outputs[reached] - start] = reached
            reached += 1
        marks = tuple(sorted({*seen, count}))
        chunks.append(Chunk(start, count, marks, tuple((marks.index(m), i) for m, i in seen.items())))
    return chunks


def chunk_length(noise_dim: int) -> int:
    """Steps a chunk: a multiple of 4, so that it uses whole Philox calls, and about 16 normals a path."""
    return max(4, 16 // noise_dim // 4 * 4)


@dataclass(frozen=True, eq=False)
class Dynamics:
    """An SDE at given parameters, on the grid t_n = t0 + n dt.

    Attributes
    ----------
    sde : SDE
    p : mapping of str to Tensor
    t0 : float or 0-dim float64 tensor
    dt : 0-dim float64 tensor
        A derivative with respect to the horizon flows through it.
    """

    sde: SDE
    p: Params
    t0: float | Tensor
    dt: Tensor


@dataclass(frozen=True)
class Driver:
    """The Brownian motions that drive a batch of paths: paths `first ...` of a source, `noise_dim` components."""

    noise: Noise
    first: int
    noise_dim: int

    def normals(self, chunk: Chunk, count: int, y: Tensor) -> Tensor:
        """Normals of a chunk for the first `count` paths, shape (chunk.count, count, noise_dim), of the kind of y."""
        return self.noise.normals(
            self.first, count, chunk.start, chunk.count, self.noise_dim, dtype=y.dtype, device=y.device
        )


def steps(
    dynamics: Dynamics, start: int | Tensor, y: Tensor, z: Iterable[Tensor], active: Tensor | None = None
) -> list[Tensor]:
    """States after each step of a stretch of the grid.

    Parameters
    ----------
    start : int or 0-dim int64 tensor
        Grid index of y.
    y : Tensor, shape (B, *event)
    z : tensors of shape (B, m), one a step
        Standard normals; dW = sqrt(dt) z.
    active : 0-dim int64 tensor, optional
        Steps beyond so many are not taken: the state stays as it is. A compiled kernel has a fixed number of steps, a grid
        any. The coefficients of a step that is not taken are evaluated where the stretch began, a point known to be sound:
        what is thrown away must hold no NaN that a derivative could pick up.
    """
    dt, root = dynamics.dt.to(y.dtype), dynamics.dt.sqrt().to(y.dtype)
    states, x = [], y
    for k, normals in enumerate(z):
        n, at, live = start + k, x, None if active is None else k < active
        if live is not None:
            n, at = torch.where(live, n, start), torch.where(live, x, y)
        t = (dynamics.t0 + n * dynamics.dt).to(y.dtype)
        moved = scheme.step(dynamics.sde, dynamics.p, t, dt, at, normals * root)
        x = moved if live is None else torch.where(live, moved, x)
        states.append(x)
    return states


def advance(dynamics: Dynamics, chunk: Chunk, y: Tensor, z: Tensor) -> list[Tensor]:
    """States at the marks of a chunk, from y (B, *event), with normals z (chunk.count, B, m)."""
    states = steps(dynamics, chunk.start, y, z.unbind())
    return [states[mark - 1] for mark in chunk.marks]
