"""Chunks as compiled kernels: the same functions of `chunk.py`, fused by `torch.compile` with their noise inside.

A kernel is a pure function of tensors. What changes from chunk to chunk, run to run or seed to seed is a tensor (the key of
the noise, the first path, the first step, the number of steps to take, the times), so that none of it compiles again; the
number of paths is dynamic. What is left, the coefficients, the shapes of states and parameters and their dtype, makes one
kernel each, kept for the life of the process.

This file knows nothing of gradients: a method brings its own kernel function.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sdesens.errors import ArgumentError
from sdesens.integrate.chunk import Chunk, Driver, Dynamics, advance, chunk_length, plan, steps
from sdesens.integrate.kernel import Clock, Shortcut, Stretch, kernel, tensors_of
from sdesens.noise.source import Draw, Fused, fused
from sdesens.sde import RESERVED, SDE, Params

COMPILE = ("auto", True, False)
SMALL = 40_000  # normals a kernel, at least, where a batch alone is smaller
LEAST = 10_000_000  # path-steps below which "auto" never compiles
REPAYS = 100_000_000  # path-steps, times tangents, whose time uncompiled is about that of compiling


def wanted(compile: bool | str, path_steps: int, tangents: int = 1) -> bool:
    """Whether to compile, for what the caller asked and the work ahead.

    Raises
    ------
    ArgumentError
        If `compile` is none of "auto", True, False.
    """
    if not any(compile is choice or (isinstance(compile, str) and compile == choice) for choice in COMPILE):
        raise ArgumentError(f"`compile` must be 'auto', True or False, got {compile!r}.")
    if compile != "auto":
        return bool(compile)
    return path_steps >= LEAST and path_steps * tangents >= REPAYS


def kernel_length(noise_dim: int, rows: int | None = None) -> int:
    """Steps a kernel: the fewest that use whole Philox calls of four. More made the gradient's kernel slower.

    But a call costs as much as some 20,000 normals, so a small batch of so many rows takes more steps at a time.
    """
    least = 4 // math.gcd(4, noise_dim)
    worth = 1 if rows is None else SMALL // (least * noise_dim * rows)
    return least * max(1, min(worth, 8 // least))


def handed_in(
    key: list[Tensor], paths: Tensor, step: Tensor, n_steps: int, dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """The `Draw` of noise that was made outside the kernel: `key` is the noise itself."""
    return [x.reshape(*paths.shape, dim) for x in key]


def normals(draw: Draw, at: Stretch, shape: tuple, n_steps: int, dim: int, y: Tensor) -> list[Tensor]:
    """Inside a kernel: normals (*shape, dim) of each step, for paths laid out as `shape`."""
    paths = torch.clamp(at.first + torch.arange(math.prod(shape), device=y.device), max=at.last).reshape(shape)
    return draw(at.noise, paths, at.start, n_steps, dim, y.dtype)


def merged(rest: Params, theta: Params) -> dict[str, Tensor]:
    """The dict p that coefficients see, from the parameters differentiated in and the rest."""
    return {**rest, **{k: v for k, v in theta.items() if k not in RESERVED}}


def forward_kernel(
    sde: SDE,
    rest: Params,
    theta: Params,
    clock: Clock,
    at: Stretch,
    y: Tensor,
    *,
    draw: Draw,
    dim: int,
    length: int,
    every: bool,
) -> list[Tensor]:
    """States after each step of a chunk, or after the last alone."""
    z = normals(draw, at, y.shape[:1], length, dim, y)
    states = steps(clock.at(theta).dynamics(sde, merged(rest, theta)), at.start, y, z, at.active)
    return states if every else states[-1:]


@dataclass(frozen=True, eq=False)
class Flow:
    """An SDE at given parameters, on a grid, driven by given Brownian motions: all that moves a batch of paths.

    Attributes
    ----------
    sde : SDE
    p : dict of Tensor
    clock : Clock
    driver : Driver
    length : int
        Steps a kernel; 0 to compute plainly.
    """

    sde: SDE
    p: dict[str, Tensor]
    clock: Clock
    driver: Driver
    length: int = 0
    _launched: dict = field(default_factory=dict, init=False)
    _shortcuts: dict = field(default_factory=dict, init=False)

    @cached_property
    def dynamics(self) -> Dynamics:
        """The SDE on its grid."""
        return self.clock.dynamics(self.sde, self.p)

    def chunks(self, outputs: tuple[int, ...]) -> list[Chunk]:
        """The grid in chunks, for outputs at these indices."""
        return plan(outputs, self.length or chunk_length(self.driver.noise_dim))

    def sweep(self, chunks: list[Chunk], y: Tensor, count: int | None = None) -> Iterator[tuple[Chunk, list[Tensor]]]:
        """Advance y (B, *event) over the chunks; yields each with its states at the marks.

        The first `count` rows are paths of their own, the rest fill the batch up.
        """
        for chunk in chunks:
            states = self._kernel(chunk, y, count or len(y)) if self.length else self._plain(chunk, y)
            y = states[-1]
            yield chunk, states

    def _plain(self, chunk: Chunk, y: Tensor) -> list[Tensor]:
        return advance(self.dynamics, chunk, y, self.driver.normals(chunk, len(y), y))

    def _kernel(self, chunk: Chunk, y: Tensor, count: int) -> list[Tensor]:
        every = chunk.marks != (chunk.count,)
        states = self.launch(forward_kernel, {}, chunk, y.contiguous(), rows=len(y), count=count, every=every)
        return [states[mark - 1] for mark in chunk.marks] if every else states

    @cached_property
    def _inputs(self) -> tuple[dict[str, Tensor], Tensor, Fused | None]:
        """Parameters, clock and noise as kernels take them: numbers with an axis in front.

        torch.compile reads the value of a 0-dim tensor on the CPU as if it were a number, and then reasons about it. Not so
        with a Parameter; and a module knows its own only by identity.
        """
        clock = torch.stack([x.to(torch.float64) for x in self.clock])
        p = {k: v if v.dim() or isinstance(v, nn.Parameter) else v[None] for k, v in self.p.items()}
        return p, clock, fused(self.driver.noise, clock.device)

    def launch(
        self, function: Callable, theta: Params, chunk: Chunk, y: Tensor, *args, rows: int, count: int, **static
    ):
        """A kernel function's result for one chunk.

        Parameters
        ----------
        function : callable (sde, rest, theta, clock, at, y, *args, draw, dim, length, **static)
            See `forward_kernel`. theta holds the tensors to differentiate in, rest the other parameters.
        y : Tensor
            States at the chunk's start, of `rows` paths; the first `count` are paths of their own.
        static
            What belongs to the kernel itself: a new value makes a new kernel.
        """
        p, clock, form = self._inputs
        where = [self.driver.first, self.driver.first + count - 1, chunk.start, chunk.count]
        if form is None:
            z = self.driver.normals(chunk, count, y)
            z = torch.cat((z, z[:, -1:].expand(-1, rows - count, -1)), 1)
            key: Any = list(pad(z, (0, 0, 0, 0, 0, self.length - chunk.count)).unbind())
            draw: Callable = handed_in
        else:
            draw, key = form.draw, form.key
        about = (function, tuple(theta), tuple(static.items()))
        if about not in self._launched:
            rest = {k: v for k, v in p.items() if k not in theta}
            inside = {k: p.get(k, v[None]) for k, v in theta.items() if k != "y0"}  # t1 is not in p
            numbers = frozenset(k for k in (*rest, *inside) if k not in self.p or p[k].dim() > self.p[k].dim())
            static |= {"draw": draw, "dim": self.driver.noise_dim, "length": self.length}
            go = kernel(function, self.sde, {**rest, **inside}, numbers, y, static)
            self._launched[about] = go, rest, inside
        go, rest, inside = self._launched[about]
        at = torch.tensor(where, device=y.device)
        changing = tensors_of((at, key, y, *args))
        kind = (about, *[(x.shape, x.stride(), x.requires_grad) for x in changing])
        if kind in self._shortcuts:
            return self._shortcuts[kind](changing)
        result = go(self.sde, rest, inside, clock, at, key, y, *args)
        shortcut = Shortcut.of(changing, result)
        if shortcut is not None:
            self._shortcuts[kind] = shortcut
        return result

    def solve(self, outputs: tuple[int, ...], y: Tensor, count: int | None = None) -> Tensor:
        """States at the grid indices `outputs`, shape (T, B, *event), from y (B, *event)."""
        ys: list[Tensor] = [y] * len(outputs)
        for chunk, states in self.sweep(self.chunks(outputs), y, count):
            for mark, output in chunk.outputs:
                ys[output] = states[mark]
        return torch.stack(ys)
