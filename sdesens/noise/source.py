"""Where the noise of a path comes from: a few sources behind one small protocol.

A source answers one question: the standard normals Z of these paths at these steps,

    dW_n^j(path) = sqrt(dt) Z(path, step n, component j).                                       (1)

The answer is a function of its arguments alone. Nothing is drawn "next", so the same numbers come back whatever
the order, the batch, the thread or the direction of time, and a run can be replayed backwards for nothing.

Normals are the Box-Muller transform of Philox words (s1, s2), read as signed 32-bit integers:

    u = (s1 + 1/2) / 2^32 mod 1,   a = 2 pi (s2 + 1/2) / 2^32,   (Z, Z') = sqrt(-2 log u) (cos a, sin a).   (2)

Computed so that a float32 normal is the float64 one to rounding, also where u is near 1. The largest |Z| is 6.7.

Reference: G. Box, M. Muller, Ann. Math. Statist. 29 (1958) 610. This file knows nothing of SDEs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, ShapeError
from sdesens.noise import elementary
from sdesens.noise.philox import MASK, philox4x32
from sdesens.tensors import concrete, describe


@runtime_checkable
class Noise(Protocol):
    """What a method needs from a source of noise. It never asks which one it has.

    Attributes
    ----------
    unit : int
        How many neighbouring paths form one independent unit: 1, or 2 for antithetic pairs.
    n_steps : int or None
        How many steps the source holds; None if it has an answer for any step of any grid.
    """

    @property
    def unit(self) -> int: ...

    @property
    def n_steps(self) -> int | None: ...

    def normals(
        self, first: int, count: int, step: int, n_steps: int, dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Normals of paths `first ... first+count-1` at steps `step ... step+n_steps-1`, shape (n_steps, count, dim)."""
        ...

    def weights(self, first: int, count: int, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Probability weights of those paths, shape (count,), or None where every path counts alike."""
        ...


Draw = Callable[[Tensor, Tensor, Tensor, int, int, torch.dtype], list[Tensor]]


class Fused(NamedTuple):
    """A source in the form that a compiled kernel can take in: normals are made there, in registers, and never stored.

    Attributes
    ----------
    draw : callable (key, paths, step, n_steps, dim, dtype) -> list of n_steps tensors, shape (*paths.shape, dim)
        Pure and hashable. `paths` are int64 indices of any shape, `step` is a 0-dim int64 tensor, and step * dim a multiple
        of 4, as n_steps * dim is.
    key : Tensor, shape (3,), int64
        What changes with the seed: a new one needs no new kernel.
    """

    draw: Draw
    key: Tensor


def philox_steps(key: Tensor, paths: Tensor, step: Tensor, n_steps: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """The normals of `Philox` for whole calls of four, see `Fused`."""
    if dtype not in (torch.float32, torch.float64):
        return [z.to(dtype) for z in philox_steps(key, paths, step, n_steps, dim, torch.float32)]
    first, calls = step * dim // 4, n_steps * dim // 4
    if calls <= 4:  # unrolled, nothing is stored
        words = [philox4x32((paths, paths >> 32, first + q, key[2]), (key[0], key[1])) for q in range(calls)]
        z = [normal for quad in words for normal in box_muller(quad, dtype)]
        return [torch.stack(z[k * dim : (k + 1) * dim], -1) if dim > 1 else z[k][..., None] for k in range(n_steps)]
    quads = (first + torch.arange(calls, device=paths.device)).reshape(-1, *[1] * paths.dim())
    flat = torch.stack(box_muller(philox4x32((paths, paths >> 32, quads, key[2]), (key[0], key[1])), dtype), 1)
    return list(flat.reshape(n_steps, dim, *paths.shape).movedim(1, -1).unbind())


def box_muller(words: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Standard normals from an even number of int32 words, pair by pair, equation (2)."""
    normals: list[Tensor] = []
    for s1, s2 in zip(words[::2], words[1::2], strict=True):
        if torch.compiler.is_compiling():  # the same numbers to rounding, by arithmetic that a fused loop likes
            radius = torch.sqrt(elementary.minus_two_log(s1, dtype))
            cos, sin = elementary.cos_sin(s2, dtype)
        else:
            radius = torch.sqrt((-2.0 * torch.log(elementary.uniform(s1))).to(dtype))
            angle = (s2.to(dtype) + 0.5) * elementary.RADIANS
            cos, sin = torch.cos(angle), torch.sin(angle)
        normals += [radius * cos, radius * sin]
    return tuple(normals)


@dataclass(frozen=True)
class Philox:
    """Counter-based standard normals: a pure function of (seed, stream, path, step, component).

    Flat index j = step * dim + component; Philox counter (path low, path high, j // 4, stream); key = the seed.
    The four words of one call give the normals j = 4q ... 4q + 3, so none is thrown away.

    Parameters
    ----------
    seed : int
        Any 64-bit integer, signed or unsigned; the two spellings of the same 64 bits, s and s + 2^64, are one seed.
    stream : int
        0 ... 2^32 - 1: an independent set of normals for the same seed.

    Example
    -------
    >>> z = Philox(seed=1).normals(0, 3, 0, 4, 1, dtype=torch.float64, device=torch.device("cpu"))
    >>> z.shape                                     # (steps, paths, components)
    torch.Size([4, 3, 1])
    """

    seed: int
    stream: int = 0
    unit: ClassVar[int] = 1
    n_steps: ClassVar[None] = None

    def __post_init__(self):
        for name, low, high in (("seed", -(2**63), 2**64), ("stream", 0, 2**32)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(
                    f"`{name}` must be an int, got {value!r} ({type(value).__name__}): use int(...)."
                )
            if not low <= value < high:
                raise ArgumentError(f"`{name}` must lie in [{low}, {high}), got {value}: reduce it modulo {high}.")

    def normals(self, first, count, step, n_steps, dim, *, dtype, device):
        if first < 0 or first + count > 2**63:
            raise ArgumentError(f"paths {first} ... {first + count - 1} lie outside 0 ... 2^63 - 1.")
        return self.at(first + torch.arange(count, dtype=torch.int64, device=device), step, n_steps, dim, dtype)

    def at(self, paths: Tensor, step: int, n_steps: int, dim: int, dtype: torch.dtype) -> Tensor:
        """Normals of any paths, int64 indices (count,), on their device: shape (n_steps, count, dim), as `normals`."""
        begin, end = step * dim, (step + n_steps) * dim  # flat indices j
        if step < 0 or end > 2**34:
            raise ArgumentError(
                f"steps x noise dimension = {end} exceeds 2^34 normals a path: use fewer steps, or another `stream`."
            )
        quads = torch.arange(begin // 4, -(-end // 4), dtype=torch.int64, device=paths.device)[:, None]
        stream = torch.full((), self.stream, dtype=torch.int64, device=paths.device)
        words = philox4x32((paths, paths >> 32, quads, stream), (self.seed & MASK, (self.seed >> 32) & MASK))
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        z = torch.stack(box_muller(words, wide), dim=1).flatten(0, 1)  # (4 quads, count)
        z = z[begin % 4 : begin % 4 + end - begin].to(dtype)
        return z.view(n_steps, dim, len(paths)).transpose(1, 2).contiguous()

    def fused(self, device: torch.device) -> Fused:
        """This source inside a kernel."""
        key = [self.seed & MASK, (self.seed >> 32) & MASK, self.stream]
        return Fused(philox_steps, torch.tensor(key, dtype=torch.int64, device=device))

    def weights(self, first, count, *, dtype, device):
        return None


@dataclass(frozen=True, eq=False)
class GivenNoise:
    """Noise that the caller brings: a tensor of standard normals, with optional path weights.

    Parameters
    ----------
    z : Tensor, shape (N, B, m)
        Standard normals of N steps, B paths, m components; for increments dW divide by sqrt(dt), or use
        `GivenNoise.from_increments`.
    path_weights : Tensor, shape (B,), optional
        Probabilities that sum to 1: nodes of a quadrature. A weighted sum has no sampling error, so estimates made with
        weights carry NaN as standard error.

    Raises
    ------
    ShapeError, ArgumentError
        If the shapes disagree, the weights do not sum to 1, or more paths or steps are asked for than were given.
    """

    z: Tensor
    path_weights: Tensor | None = None
    unit: ClassVar[int] = 1

    def __post_init__(self):
        if not isinstance(self.z, Tensor) or self.z.dim() != 3 or not self.z.is_floating_point():
            raise ShapeError(
                "`z` must be a floating tensor of shape (steps, paths, noise_dim), got " + describe(self.z)
            )
        if concrete(self.z) and not bool(torch.isfinite(self.z).all()):
            raise ArgumentError("`z` holds NaN or infinite values; every normal must be finite.")
        if self.path_weights is None:
            return
        if not isinstance(self.path_weights, Tensor) or self.path_weights.shape != self.z.shape[1:2]:
            raise ShapeError(
                f"`path_weights` must have shape ({self.z.shape[1]},), one per path, got {describe(self.path_weights)}."
            )
        total = float(self.path_weights.double().sum())
        if not abs(total - 1.0) < 1e-6:
            raise ArgumentError(f"`path_weights` must sum to 1, they sum to {total!r}: divide by their sum.")

    @property
    def n_steps(self) -> int:
        return self.z.shape[0]

    @classmethod
    def from_increments(cls, dW: Tensor, dt: float, path_weights: Tensor | None = None) -> "GivenNoise":
        """Noise from Brownian increments `dW` (N, B, m) over steps of length `dt`."""
        if not isinstance(dW, Tensor) or dW.dim() != 3 or not dW.is_floating_point():
            raise ShapeError(
                "`dW` must be a floating tensor of increments, shape (steps, paths, noise_dim), got " + describe(dW)
            )
        if not 0 < dt < math.inf:
            raise ArgumentError(f"`dt` must be positive and finite, got {dt}: it is the length of one step.")
        return cls(dW / math.sqrt(dt), path_weights)

    def normals(self, first, count, step, n_steps, dim, *, dtype, device):
        steps, paths, width = self.z.shape
        if width != dim:
            raise ShapeError(
                f"the given noise has {width} components, but noise_dim = {dim} is needed: give z of shape (N, B, {dim})."
            )
        if min(first, step) < 0 or first + count > paths or step + n_steps > steps:
            raise ArgumentError(
                f"the given noise holds {paths} paths x {steps} steps, but paths {first} ... {first + count - 1} at steps "
                f"{step} ... {step + n_steps - 1} are needed: ask for n_paths <= {paths}, or give more noise."
            )
        return self.z[step : step + n_steps, first : first + count].to(dtype=dtype, device=device)

    def weights(self, first, count, *, dtype, device):
        return None if self.path_weights is None else self.path_weights[first : first + count].to(device, dtype)


@dataclass(frozen=True)
class Antithetic:
    """Pairs of mirrored paths: path 2i has the normals of the source's path i, path 2i + 1 their negatives.

    A pair is one independent unit (`unit = 2`), and standard errors are computed from pairs.
    """

    source: Noise
    unit: ClassVar[int] = 2

    def __post_init__(self):
        _check_source(self.source)
        if self.source.unit != 1:
            raise ArgumentError("Antithetic pairs the paths of a source whose `unit` is 1: do not mirror twice.")
        if self.source.weights(0, 1, dtype=torch.float64, device=torch.device("cpu")) is not None:
            raise ArgumentError("Antithetic cannot mirror weighted paths: their weights belong to their own nodes.")

    @property
    def n_steps(self) -> int | None:
        return self.source.n_steps

    def normals(self, first, count, step, n_steps, dim, *, dtype, device):
        begin, end = first // 2, -(-(first + count) // 2)
        z = self.source.normals(begin, end - begin, step, n_steps, dim, dtype=dtype, device=device)
        pairs = torch.stack((z, -z), dim=2).flatten(1, 2)
        return pairs[:, first - 2 * begin : first - 2 * begin + count]

    def fused(self, device: torch.device) -> Fused | None:
        """This source inside a kernel, if its own source can be there."""
        inner = fused(self.source, device)
        return None if inner is None else Fused(_Mirrored(inner.draw), inner.key)

    def weights(self, first, count, *, dtype, device):
        return None


def coarsen(z: Tensor, factor: int) -> Tensor:
    """Normals of a grid `factor` times coarser, on the same Brownian path.

        Z_coarse[n] = (Z[n f] + ... + Z[n f + f - 1]) / sqrt(f),  so that  dW_coarse = the sum of the fine dW.

    Parameters
    ----------
    z : Tensor, shape (N, ...)
        Normals of the fine grid; N must be a multiple of `factor`.

    Returns
    -------
    Tensor, shape (N / factor, ...)

    Example
    -------
    >>> coarsen(torch.tensor([1.0, 1.0, 2.0, 0.0, 1.0, 1.0, -1.0, -1.0]), 4)
    tensor([2., 0.])
    """
    _check_factor(factor)
    if z.shape[0] % factor:
        raise ArgumentError(f"`factor` must divide the {z.shape[0]} steps, got {factor}: choose a divisor.")
    return z.unflatten(0, (-1, factor)).sum(1) / math.sqrt(factor)


@dataclass(frozen=True)
class Coarsened:
    """The source's Brownian path seen on a grid `factor` times coarser than the source's own."""

    source: Noise
    factor: int

    def __post_init__(self):
        _check_source(self.source)
        _check_factor(self.factor)
        if self.source.n_steps is not None and self.source.n_steps % self.factor:
            raise ArgumentError(
                f"`factor` = {self.factor} does not divide the {self.source.n_steps} steps that `source` holds: give noise for "
                "a whole number of coarse steps."
            )

    @property
    def unit(self) -> int:
        return self.source.unit

    @property
    def n_steps(self) -> int | None:
        return None if self.source.n_steps is None else self.source.n_steps // self.factor

    def normals(self, first, count, step, n_steps, dim, *, dtype, device):
        f = self.factor
        return coarsen(self.source.normals(first, count, step * f, n_steps * f, dim, dtype=dtype, device=device), f)

    def fused(self, device: torch.device) -> Fused | None:
        """This source inside a kernel, if its own source can be there."""
        inner = fused(self.source, device)
        return None if inner is None else Fused(_Summed(inner.draw, self.factor), inner.key)

    def weights(self, first, count, *, dtype, device):
        return self.source.weights(first, count, dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class Held:
    """Normals of a few paths drawn once and kept, for a method that sweeps over them several times.

    Parameters
    ----------
    source : Noise
    z : Tensor, shape (N, B, m)
        What `source` answers for all steps of paths `first ... first + B - 1`.
    first : int
    """

    source: Noise
    z: Tensor
    first: int

    @property
    def unit(self) -> int:
        return self.source.unit

    @property
    def n_steps(self) -> int:
        return self.z.shape[0]

    def normals(self, first, count, step, n_steps, dim, *, dtype, device):
        begin = first - self.first
        return self.z[step : step + n_steps, begin : begin + count]

    def weights(self, first, count, *, dtype, device):
        return self.source.weights(first, count, dtype=dtype, device=device)


def fused(source: Noise, device: torch.device) -> Fused | None:
    """A source's form for compiled kernels; None if it has none and its normals must be made outside."""
    form = getattr(source, "fused", None)
    return None if form is None else form(device)


@dataclass(frozen=True)
class _Mirrored:
    """`Antithetic` as a `Draw`: the pair of a path is its index halved, the sign its last bit."""

    draw: Draw

    def __call__(self, key, paths, step, n_steps, dim, dtype):
        sign = (1 - 2 * (paths & 1)).to(dtype)[..., None]
        return [sign * z for z in self.draw(key, paths >> 1, step, n_steps, dim, dtype)]


@dataclass(frozen=True)
class _Summed:
    """`Coarsened` as a `Draw`."""

    draw: Draw
    factor: int

    def __call__(self, key, paths, step, n_steps, dim, dtype):
        f = self.factor
        fine = self.draw(key, paths, step * f, n_steps * f, dim, dtype)
        return [sum(fine[k * f + 1 : (k + 1) * f], fine[k * f]) / math.sqrt(f) for k in range(n_steps)]


def settle(seed: int | None, noise: Noise | None) -> Noise:
    """The noise of a run: the source given, or Philox of the seed (0 if left out).

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If both are given, or the source is none.
    """
    if noise is not None and seed is not None:
        raise ArgumentError("give `seed` or `noise`, not both: the seed is part of the noise.")
    source = Philox(0 if seed is None else seed) if noise is None else noise
    if not isinstance(source, Noise) or isinstance(source, type):
        raise ArgumentTypeError(f"`noise` must be a noise source such as Philox(seed), got {type(noise).__name__}.")
    return source


def independent(source: Noise) -> Noise:
    """The same kind of noise on other numbers: the next stream of the Philox beneath."""
    if isinstance(source, Philox):
        return replace(source, stream=(source.stream + 1) % 2**32)
    if isinstance(source, Antithetic | Coarsened):
        return replace(source, source=independent(source.source))
    return source


def apart(source: Noise) -> Noise:
    """Noise for draws beside the paths, of any number a path: another half of the Philox streams.

    Raises
    ------
    ArgumentError
        If the source holds given numbers, which are all there are.
    """
    if isinstance(source, Philox):
        return replace(source, stream=(source.stream + 2**31) % 2**32)
    if isinstance(source, Antithetic):
        return replace(source, source=apart(source.source))
    if isinstance(source, Coarsened | Held):
        return apart(source.source)
    raise ArgumentError(
        f"{type(source).__name__} holds the normals of the paths and no others, but draws beside the paths are needed: use "
        "Philox(seed), or a method without draws of its own (vibrato with draws=1)."
    )


def _check_source(source) -> None:
    if not isinstance(source, Noise) or isinstance(source, type):
        raise ArgumentTypeError(f"`source` must be a noise source such as Philox(seed), got {source!r:.60}.")


def _check_factor(factor) -> None:
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise ArgumentError(
            f"`factor` must be a positive int, got {factor!r}: it is the number of fine steps in a coarse one."
        )
