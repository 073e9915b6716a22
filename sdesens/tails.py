"""Is the variance finite? The tail index of one path's gradient, from the largest of a run.

Where P(|G| > x) falls like x^-alpha, Hill's estimate from the k largest of n values of |G - median|,

    1 / alpha = 1/k sum_{i <= k} log(x_(i) / x_(k+1)),    standard deviation alpha / sqrt(k),     (1)

tells whether G has a variance: only if alpha > 2. Where it has none a standard error means nothing, however small it looks: the
next path may be larger than all before together. The tangent of a square root near zero is like that (Cox-Ingersoll-Ross by full
truncation), and no sample shows it by its spread.

Reverse mode yields means of groups only. A mean of many has the tail of its terms, but further out: fewer of them say less.

Reference: B. Hill, Ann. Statist. 3 (1975) 1163; A. Vehtari et al., Pareto smoothed importance sampling, arXiv:1507.02646. This
file is an estimate from a sample: a tail that begins beyond the sample is not seen.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

PAIR = 2  # an antithetic pair tells as much as a path
KEPT = 100  # of the largest units of a block
SHARE, LEAST, SHORTEST = 0.002, 25, 5_000  # of single paths: part that is tail, at least so many, of at least so many
GROUPS_SHARE, GROUPS_LEAST, GROUPS_SHORTEST = 0.02, 20, 400  # the same of groups


@dataclass(frozen=True)
class Tail:
    """The tail of a gradient.

    Attributes
    ----------
    index : float
        alpha of equation (1).
    k : int
        Values that it is taken from.
    size : int
        Paths in each: 1, or a group.

    Example
    -------
    >>> Tail(index=1.6, k=100, size=1).heavy, Tail(index=3.0, k=100, size=1).heavy
    (True, False)
    """

    index: float
    k: int
    size: int

    @property
    def deviation(self) -> float:
        """Standard deviation of the index."""
        return self.index / math.sqrt(self.k)

    @property
    def heavy(self) -> bool:
        """Whether the variance looks infinite. Of groups, which hide a tail, an index of 2 within a deviation is enough."""
        return self.index - (self.deviation if self.size > PAIR else 0.0) < 2.0

    def to_dict(self) -> dict:
        """Plain numbers."""
        return {"index": self.index, "k": self.k, "size": self.size, "heavy": self.heavy}

    def __repr__(self) -> str:
        of = "paths" if self.size == 1 else f"groups of {self.size}"
        return f"tail index {self.index:.2f} +/- {self.deviation:.2f} (the {self.k} largest {of})"


@dataclass(frozen=True, eq=False)
class Largest:
    """The largest |G - median| of a block's units, and how many units there were, each of `size` paths."""

    values: Tensor
    units: int
    size: int

    @classmethod
    def of(cls, means: Tensor, size: int) -> "Largest":
        """From the units' means (U, *shape): the norm over a parameter's components, centred."""
        flat = means.detach().double().reshape(len(means), -1)
        sizes = (flat - flat.median(0).values).norm(dim=1)
        return cls(sizes.topk(min(KEPT, len(sizes))).values, len(sizes), size)


def tail(blocks: Iterable[Largest], spread: float) -> Tail | None:
    """Equation (1) over blocks; None where a sample is too small to tell, or has no spread.

    `spread` is the standard deviation of a path. What is not beyond that of a unit is no tail: where few paths pay at all, the
    others would be taken for one. And of three thresholds, each with half as many values beyond, the lightest tail counts: that of
    a power law is the same at all, that of few payoffs thins out.
    """
    found = list(blocks)
    size = max((b.size for b in found), default=1)
    found = [b for b in found if b.size == size]
    units = sum(b.units for b in found)
    share, least, shortest = (SHARE, LEAST, SHORTEST) if size <= PAIR else (GROUPS_SHARE, GROUPS_LEAST, GROUPS_SHORTEST)
    if units < shortest:
        return None
    k = max(int(share * units), least)
    top = torch.cat([b.values for b in found]).sort(descending=True).values
    k = min(k, int((top > max(spread / math.sqrt(size), 0.0)).sum()) - 1)
    if k < least:
        return None
    return max((_hill(top, j, size) for j in {k, max(k // 2, least), max(k // 4, least)}), key=lambda t: t.index)


def _hill(top: Tensor, k: int, size: int) -> Tail:
    """Equation (1) from values in falling order."""
    mean = float((top[:k] / top[k]).log().mean())
    return Tail(math.inf if mean == 0 else 1.0 / mean, k, size)
