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


def advance(sde: SDE, p: Params, t0: float, dt: Tensor, chunk: Chunk, y: Tensor, z: Tensor) -> list[Tensor]:
    """States at the marks of a chunk.

    Parameters
    ----------
    t0 : float
        Time at grid index 0.
    dt : 0-dim float64 tensor
        Step. A derivative with respect to the horizon flows through it.
    y : Tensor, shape (B, *event)
        State at the chunk's start.
    z : Tensor, shape (count, B, m)
        Standard normals of its steps; dW = sqrt(dt) z.
    """
    index = torch.arange(chunk.start, chunk.start + chunk.count, dtype=torch.float64, device=y.device)
    times = (t0 + index * dt).to(y.dtype).unbind()
    increments = (z * dt.sqrt().to(y.dtype)).unbind()
    dt, states = dt.to(y.dtype), []
    for k, (t, dW) in enumerate(zip(times, increments, strict=True), start=1):
        y = euler.step(sde, p, t, dt, y, dW)
        if k in chunk.marks:
            states.append(y)
    return states


def normals(noise: Noise, first: int, count: int, chunk: Chunk, noise_dim: int, like: Tensor) -> Tensor:
    """The chunk's noise for `count` paths from `first`, shape (chunk.count, count, noise_dim)."""
    return noise.normals(first, count, chunk.start, chunk.count, noise_dim, dtype=like.dtype, device=like.device)


def sweep(
    sde: SDE,
    p: Params,
    t0: float,
    dt: Tensor,
    chunks: list[Chunk],
    y: Tensor,
    noise: Noise,
    first: int,
    noise_dim: int,
) -> Iterator[tuple[Chunk, list[Tensor]]]:
    """Advance y (B, *event), paths `first ... first + B - 1`, over the chunks; yields each with its states at the marks."""
    for chunk in chunks:
        states = advance(sde, p, t0, dt, chunk, y, normals(noise, first, y.shape[0], chunk, noise_dim, y))
        y = states[-1]
        yield chunk, states
