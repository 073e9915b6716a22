"""Data on a grid as data with a density: for cells of width w and U uniform,

    -log_2 P(k) / d  <=  -(E log p(y) + d log w) / (d log 2),     y = low + (k + U) w,            (1)

by Jensen's inequality (L. Theis et al., 1511.01844).
"""

import math

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, DtypeError, ShapeError
from sdesens.noise import Philox
from sdesens.tensors import describe

CELL_STREAM = 0x7FFFFF02  # away from any stream that samplers and losses use


def bits_per_dim(log_prob: Tensor | float, d: int) -> Tensor | float:
    """Bits a dimension from nats, -log_prob / (d log 2).

    Those of a density depend on the unit of x. For data on a grid give log_prob + log_volume, see `dequantise`.

    Example
    -------
    >>> bits_per_dim(-8 * math.log(2), 4)
    2.0
    """
    check_int("d", d, 1, "it is the number of dimensions, x[0].numel()")
    return -log_prob / (d * math.log(2))


def dequantise(
    x: Tensor, levels: int, low: float, high: float, *, seed: int = 0, first: int = 0, dtype: torch.dtype | None = None
) -> tuple[Tensor, float]:
    """Data on a grid as data with a density: uniform in their cells, equation (1).

    Parameters
    ----------
    x : Tensor, shape (B, *event)
        Whole numbers 0 ... levels - 1, of any dtype.
    levels : int
    low, high : float
        The outer edges of the first and the last cell. Data scaled as 2 x / (levels - 1) - 1 have cells of width
        2 / (levels - 1): low = -1, high = 1 + 2 / (levels - 1).
    seed, first : int
        The place of row i in its cell is a function of (seed, first + i) alone.
    dtype : torch.dtype, optional
        Left out, x's own, or torch's default for integers.

    Returns
    -------
    y : Tensor, shape (B, *event)
    log_volume : float
        d log w, nats: E log p(y) + log_volume <= log P(x).

    Example
    -------
    >>> y, log_volume = dequantise(torch.tensor([[0, 255]]), 256, -1.0, 1.0)
    >>> ((y + 1) * 128).floor(), log_volume == 2 * math.log(2 / 256)
    (tensor([[  0., 255.]]), True)
    """
    check_int("levels", levels, 2, "256 for 8-bit images")
    if not -math.inf < low < high < math.inf:
        raise ArgumentError(f"`low` must be below `high`, both finite, got {low!r} and {high!r}.")
    check_rows(x)
    k = x.detach().to(torch.float64)
    if not bool(((k == k.floor()) & (k >= 0) & (k < levels)).all()):
        raise ArgumentError(
            f"`x` must hold whole numbers 0 ... {levels - 1}, got values in [{float(k.min()):g}, {float(k.max()):g}]: give the data "
            "before they were scaled."
        )
    U, w = torch.special.ndtr(item_normals(x, 1, seed, first, CELL_STREAM)[0]), (high - low) / levels
    dtype = dtype or (x.dtype if x.is_floating_point() else torch.get_default_dtype())
    return (low + (k + U) * w).to(dtype), x[0].numel() * math.log(w)


def item_normals(x: Tensor, n: int, seed: int, first: int, stream: int) -> Tensor:
    """n normals an entry, (n, B, *event), float64."""
    check_int("first", first, 0, "it is the index of the first row")
    z = Philox(seed, stream).normals(first, len(x), 0, n, x[0].numel(), dtype=torch.float64, device=x.device)
    return z.reshape(n, *x.shape)


def check_rows(x) -> None:
    if not isinstance(x, Tensor) or x.is_complex():
        raise DtypeError(f"`x` must be a real tensor, got {describe(x)}.")
    if x.dim() < 2 or x.numel() == 0:
        raise ShapeError(f"`x` must have shape (B, *event), not empty, got {tuple(x.shape)}: x[:, None] for numbers.")


def check_int(name: str, value, least: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"`{name}` must be an int of at least {least}, got {value!r}: {remedy}.")
