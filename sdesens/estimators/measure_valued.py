"""Measure-valued, or weak, derivatives: the derivative of a density is a difference of two densities.

    d/dp E f = c ( E f(z+) - E f(z-) ).                                                          (1)

One coordinate moves at a time, the others stay where they were drawn. The two draws are coupled through shared noise:

    normal, mean     c = 1 / (s sqrt(2 pi))   z+- = mean +- s R         R Rayleigh: |(e1, e2)|
    normal, scale    c = 1 / s                z+ = mean + s D, z- = mean + s D U   D double-sided Maxwell: +-|(e1, e2, e3)|
    coin, p          c = 1                    z+ = 1, z- = 0

f need not be continuous. The cost is 4 evaluations of f a coordinate (2 for a coin). A log-normal is its normal's, with f(exp).
References: G. Pflug, Computing 42 (1989) 315; S. Mohamed et al., JMLR 21 (2020) 132, section 6.
"""

import math

import torch
from torch import Tensor
from torch.special import ndtr

from sdesens.estimators.discrete import Bernoulli
from sdesens.estimators.draws import Draws, Surrogate
from sdesens.estimators.gaussian import LogNormal, Normal
from sdesens.estimators.laws import Law

TRIED = 32  # coordinates up to which it is tried by default
NORMALS = 6  # a coordinate: two for R, three for D, one for U


def measure_valued(draws: Draws) -> Surrogate:
    """Equation (1) for each coordinate, carried to the parameters by the law's own tensors."""
    law = draws.law
    if isinstance(law, Bernoulli):
        z = draws.fixed()
        on, off = _moved(draws, z, torch.ones_like(z)), _moved(draws, z, torch.zeros_like(z))
        slope = on - off
        return _carried(draws, z, slope * law.p)
    assert isinstance(law, Normal | LogNormal)
    normal, shown = law.gaussian()
    mean, scale = (t.expand(normal.shape) for t in (normal.mean, normal.scale))
    at, s = mean.detach(), scale.detach()
    z = normal.draw(draws.eps).detach()
    e = draws.extra.reshape(*z.shape, NORMALS)
    r = e[..., :2].square().sum(-1).sqrt()
    # the sign is taken from e3 and kept by |.|, which would otherwise be lost
    d = torch.copysign(e[..., 2:5].square().sum(-1).sqrt(), e[..., 4])
    around = [
        _moved(draws, z, move, shown) for move in (at + s * r, at - s * r, at + s * d, at + s * d * ndtr(e[..., 5]))
    ]
    by_mean = (around[0] - around[1]) / (s * math.sqrt(2 * math.pi))
    by_scale = (around[2] - around[3]) / s
    return _carried(draws, shown(z), by_mean * mean + by_scale * scale)


def _moved(draws: Draws, z: Tensor, to: Tensor, shown=lambda z: z) -> Tensor:
    """f with each coordinate of z (L, [N,] *event) moved in turn: shape of z."""
    lead = 1 if draws.x is None else 2
    flat, target = z.flatten(lead) if z.dim() > lead else z[..., None], to.reshape(*z.shape[:lead], -1)
    count = flat.shape[-1]
    here = torch.eye(count, dtype=torch.bool, device=z.device).reshape(count, *[1] * lead, count)
    moved = torch.where(here, target, flat)  # (count, L, [N,] count)
    values = draws.value(shown(moved).reshape(-1, *z.shape[1:]))  # (count L, n)
    per_coordinate = values.detach().unflatten(0, (count, -1)).movedim(0, -1)  # (L, n, count)
    return per_coordinate.reshape(z.shape)


def _carried(draws: Draws, z: Tensor, parts: Tensor) -> Surrogate:
    """Surrogate whose law part is the sum of `parts`, each linear in one of the law's tensors."""
    values = draws.value(draws.law.fixed(z))
    return Surrogate(values.detach(), draws.per_item(parts) + values)


def has_triple(law: Law) -> str | None:
    """Why (1) cannot be used."""
    if isinstance(law, Normal | LogNormal | Bernoulli):
        return None
    return "it is written for independent normals, log-normals and coins"


def too_many(law: Law, with_items: bool) -> str | None:
    """Why it is not tried unless it is named: its cost grows with the coordinates of a draw."""
    coordinates = math.prod(law.noise[with_items:])
    return (
        f"{coordinates} coordinates, several evaluations of f for each: name it to run it"
        if coordinates > TRIED
        else None
    )


def normals_needed(law: Law) -> int:
    """Normals a coordinate beyond the law's own."""
    return 0 if isinstance(law, Bernoulli) else NORMALS
