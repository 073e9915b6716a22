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

STEPS = (0.04, 0.01, 0.0025, 0.000625)
FEW = 4  # paths that must contribute for a step to be usable
ROUNDING = 1e3  # units of rounding below which a difference is not looked at


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
        floor = ROUNDING * torch.finfo(F(0.0).dtype).eps * here.abs().nan_to_num(0, 0, 0)
        usable = []
        for e in STEPS:
            d = (F(e).double() - 2 * here + F(-e).double()).abs()
            d = torch.where(torch.isfinite(d) & (d > floor), d, 0.0)
            first, second = float(d.sum()), float(d.square().sum())
            if second > 0 and first**2 / second >= FEW:
                usable.append((e, second / first, first**2 / second / len(d)))
        while len(usable) > 1 and usable[-1][2] > 3 * usable[-2][2]:
            usable.pop()  # no path happens to jump within so small an e, and the rest of F is all that is left
        if len(usable) < 2:
            return False
        (e1, size1, share1), (e0, size0, share0) = usable[-2:]
        per_step = math.log(e1 / e0)
        stays = math.log(size1 / size0) / per_step < 0.35
        return stays and (share0 < 0.1 or math.log(share1 / share0) / per_step > 0.4)
