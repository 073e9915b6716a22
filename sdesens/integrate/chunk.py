"""A path in chunks: a few steps at a time, as one pure function of state, parameters and noise.

The grid is cut into chunks of at most `length` steps. `advance` takes the state over one chunk and returns it at the
chunk's marks: the grid points where the functional looks, and the chunk's end. Every gradient method is a sweep over
these chunks, forwards or backwards, and differentiates `advance` alone.

Times are whole numbers times a step, in float64, cast to the state's dtype only when handed to the user's functions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdesens.integrate import euler
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
    t0 : float
    dt : 0-dim float64 tensor
        A derivative with respect to the horizon flows through it.
    """

    sde: SDE
    p: Params
    t0: float
    dt: Tensor


@dataclass(frozen=True)
class Driver:
    """The Brownian motions that drive a batch of paths: paths `first ...` of a source, `noise_dim` components."""

    noise: Noise
    first: int
    noise_dim: int

    def normals(self, chunk: Chunk, y: Tensor) -> Tensor:
        """Normals of a chunk for the batch y (B, *event), shape (chunk.count, B, noise_dim)."""
        return self.noise.normals(
            self.first, y.shape[0], chunk.start, chunk.count, self.noise_dim, dtype=y.dtype, device=y.device
        )


def advance(dynamics: Dynamics, chunk: Chunk, y: Tensor, z: Tensor) -> list[Tensor]:
    """States at the marks of a chunk.

    Parameters
    ----------
    y : Tensor, shape (B, *event)
        State at the chunk's start.
    z : Tensor, shape (chunk.count, B, m)
        Standard normals of its steps; dW = sqrt(dt) z.
    """
    index = torch.arange(chunk.start, chunk.start + chunk.count, dtype=torch.float64, device=y.device)
    times = (dynamics.t0 + index * dynamics.dt).to(y.dtype).unbind()
    increments = (z * dynamics.dt.sqrt().to(y.dtype)).unbind()
    dt, states = dynamics.dt.to(y.dtype), []
    for k, (t, dW) in enumerate(zip(times, increments, strict=True), start=1):
        y = euler.step(dynamics.sde, dynamics.p, t, dt, y, dW)
        if k in chunk.marks:
            states.append(y)
    return states


def sweep(dynamics: Dynamics, chunks: list[Chunk], y: Tensor, driver: Driver) -> Iterator[tuple[Chunk, list[Tensor]]]:
    """Advance y (B, *event) over the chunks; yields each with its states at the marks."""
    for chunk in chunks:
        states = advance(dynamics, chunk, y, driver.normals(chunk, y))
        y = states[-1]
        yield chunk, states
