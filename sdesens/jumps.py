"""Does a function of one number jump, on some of many paths? Seen from values alone, on common noise.

For second differences of each path's F along a direction,

    d_i(e) = F_i(e) - 2 F_i(0) + F_i(-e),                                                        (1)
    size(e) = sum d^2 / sum |d|,     share(e) = (sum |d|)^2 / (n sum d^2),                       (2)

size is that of a typical contribution and share the part of the paths that contribute. As e falls,

    smooth   size ~ e^2   share constant         kink   size ~ e   share ~ e
    jump     size constant, share ~ e            steep but smooth: size and share constant until e is below its width

so a jump is told from everything else at the smallest usable e: size does not fall there, and few paths contribute, or ever fewer. A
jump that is only a part of F wins there, since the rest's size falls.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# steps that are always tried; odd numbers, for a step that is a whole number of roundings would see none
LARGEST, SMALLEST, RATIO = 0.0371931, 0.0005, 4.0
FINEST = 2e-6  # below it, numbers that are rounded to float32 somewhere would look like jumps
FEW = 4  # paths that must contribute for a step to be usable
ROUNDING = 16.0  # units of rounding of F below which a difference is not looked at


def jumps(F: Callable[[float], Tensor]) -> bool:
    """Whether F jumps near 0 on some paths.

    Parameters
    ----------
    F : callable float -> Tensor, shape (n,)
        Every path's number at a place along the direction, in units in which 1 is a large move. The same noise at all places.

    Returns
    -------
    bool
        False too where nothing can be said: too few paths change, or F is not finite.

    Example
    -------
    >>> z = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    >>> [jumps(lambda e, f=f: f(z + e)) for f in (torch.sin, torch.relu, lambda x: (x > 0.3).double())]
    [False, False, True]
    """
    with torch.no_grad():
        here = F(0.0).double()
        floor = _rounding(F, here)
        usable: list[tuple[float, float, float]] = []
        e = LARGEST
        while e >= SMALLEST or (e >= FINEST and _unsettled(usable)):
            d = (F(e).double() - 2 * here + F(-e).double()).abs()
            d = torch.where(torch.isfinite(d) & (d > floor), d, 0.0)
            first, second = float(d.sum()), float(d.square().sum())
            if second > 0 and first**2 / second >= FEW:
                usable.append((e, second / first, first**2 / second / len(d)))
            e /= RATIO
        while len(usable) > 1 and usable[-1][2] > 3 * usable[-2][2]:
            usable.pop()  # no path happens to jump within so small an e, and the rest of F is all that is left
        if len(usable) < 2:
            return False
        size, share = _slopes(usable)
        return size < 0.35 and (usable[-1][2] < 0.1 or share > 0.4)


def _rounding(F: Callable[[float], Tensor], here: Tensor) -> Tensor:
    """Differences that rounding makes, of F itself and of what F is computed from: seen where nothing else can move."""
    eps = torch.finfo(F(0.0).dtype).eps
    tiny = [F(k * eps).double() - 2 * here + F(-k * eps).double() for k in (8.0, 64.0)]
    seen = torch.stack(tiny).abs().nan_to_num(0, 0, 0).amax(0)
    return ROUNDING * eps * here.abs().nan_to_num(0, 0, 0) + 8 * seen.quantile(0.99)


def _slopes(usable: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Logarithmic slopes of size and share between the two smallest usable e."""
    (e1, size1, share1), (e0, size0, share0) = usable[-2:]
    per_step = math.log(e1 / e0)
    return math.log(size1 / size0) / per_step, math.log(share1 / share0) / per_step


def _unsettled(usable: list[tuple[float, float, float]]) -> bool:
    """Whether size has not begun to fall although many paths contribute: jumps on a scale finer than e, or a steep slope."""
    return bool(usable) and usable[-1][2] >= 0.1 and (len(usable) < 2 or _slopes(usable)[0] < 0.35)
