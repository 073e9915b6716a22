"""Data on a grid as data with a density: for cells of width w and U uniform,

    -log_2 P(k) / d  <=  -(E log p(y) + d log w) / (d log 2),     y = low + (k + U) w,            (1)

by Jensen's inequality (L. Theis et al., 1511.01844).
"""

import math

import torch
from torch import Tensor

from sdesens.diffusion.checks import number, whole
from sdesens.diffusion.draws import check_items, item_normals
from sdesens.diffusion.streams import CELLS
from sdesens.errors import ArgumentError


def bits_per_dim(log_prob: Tensor | float, d: int) -> Tensor | float:
    """Bits a dimension from nats, -log_prob / (d log 2).

    Those of a density depend on the unit of x. For data on a grid give log_prob + log_volume, see `dequantise`.

    Example
    -------
    >>> bits_per_dim(-8 * math.log(2), 4)
    2.0
    """
    whole("d", d, hint="it is the number of dimensions, x[0].numel()")
    return -log_prob / (d * math.log(2))


def dequantise(
    x: Tensor,
    levels: int,
    low: float,
    high: float,
    *,
    seed: int = 0,
    first_item: int = 0,
    dtype: torch.dtype | None = None,
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
    seed, first_item : int
        The place of row i in its cell is a function of (seed, first_item + i) alone.
    dtype : torch.dtype, optional
        Left out, x's own, or torch's default for integers.

    Returns
    -------
    y : Tensor, shape (B, *event)
    log_volume : float
        d log w, nats: E log p(y) + log_volume <= log P(x).

    Raises
    ------
    ArgumentError
        For x that are no whole numbers 0 ... levels - 1, levels below 2, low not below high.

    Example
    -------
    >>> y, log_volume = dequantise(torch.tensor([[0, 255]]), 256, -1.0, 1.0)
    >>> ((y + 1) * 128).floor(), log_volume == 2 * math.log(2 / 256)
    (tensor([[  0., 255.]]), True)
    """
    whole("levels", levels, 2, hint="256 for 8-bit images")
    low = number("low", low, hint="it is the outer edge of the first cell")
    high = number("high", high, low, hint="`low` must be below `high`")
    check_items("x", x, floating=False)
    k = x.detach().to(torch.float64)
    if not bool(((k == k.floor()) & (k >= 0) & (k < levels)).all()):
        raise ArgumentError(
            f"`x` must hold whole numbers 0 ... {levels - 1}, got values in [{float(k.min()):g}, {float(k.max()):g}]: give the data "
            "before they were scaled."
        )
    U, w = torch.special.ndtr(item_normals(x, 1, seed, first_item, CELLS)[0]), (high - low) / levels
    dtype = dtype or (x.dtype if x.is_floating_point() else torch.get_default_dtype())
    return (low + (k + U) * w).to(dtype), x[0].numel() * math.log(w)
