"""Central differences on common random numbers.

    G_k = [ F(theta + h_k e_k) - F(theta - h_k e_k) ] / (2 h_k),   the same Z in both runs.      (1)

Error O(h^2) against the scheme's own derivative where F is smooth. h_k = eps^(1/3) |theta_k| balances truncation against
rounding and never leaves the domain of a positive parameter; one that is zero has no scale of its own, and 1 stands in for
|theta_k|. At a jump the mean is right as h -> 0 but its variance is O(1/h).
"""

import torch
from torch import Tensor

from sdesens.problem import Theta
from sdesens.sensitivity.tile import Contributions, Tile


def finite_difference(tile: Tile, theta: Theta, *, relative_step: float | None = None) -> Contributions:
    """Every path's central difference, equation (1).

    Parameters
    ----------
    relative_step : float, optional
        h_k / |theta_k|, or h_k itself at theta_k = 0; by default the cube root of the dtype's rounding unit.

    Raises
    ------
    NonFiniteError
    """
    theta = {k: v.detach() for k, v in theta.items()}
    tile = tile.holding_noise(tile.start(theta))
    with torch.no_grad():
        ys = tile.paths(theta)
        values = tile.values(theta, ys)
        tile.check(theta, ys, values)
        gradients = {}
        for name, value in theta.items():
            eps = max(torch.finfo(ys.dtype).eps, torch.finfo(value.dtype).eps)
            columns, steps = [], bump(value, eps) if relative_step is None else relative_step * _size(value)
            for i in range(value.numel()):
                step = float(steps.flatten()[i])
                up, down = (_bumped(theta, name, i, s) for s in (step, -step))
                width = float(up[name].flatten()[i].double() - down[name].flatten()[i].double())  # as represented
                columns.append((_values(tile, up).double() - _values(tile, down).double()) / width)
            gradients[name] = torch.stack(columns, 1).reshape(-1, *value.shape)
    return Contributions(values, gradients)


def bump(value: Tensor, eps: float) -> Tensor:
    """The step h of each component of a parameter, for a computation with rounding unit eps."""
    return eps ** (1 / 3) * _size(value)


def _size(value: Tensor) -> Tensor:
    size = value.detach().abs()
    return torch.where(size > 0, size, 1.0)


def _bumped(theta: Theta, name: str, i: int, step: float) -> Theta:
    bumped = theta[name].clone(memory_format=torch.contiguous_format)
    bumped.view(-1)[i] += step
    return {**theta, name: bumped}


def _values(tile: Tile, theta: Theta):
    return tile.values(theta, tile.paths(theta))
