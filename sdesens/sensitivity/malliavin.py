"""Malliavin weights: integration by parts in the noise, shared out over all the steps at which it can be done.

    dJ/dtheta = E[ F w ] + E[ direct ],                                                         (1)

with the weights w of `sdesens.sensitivity.weights`: for initial state and drift those of Bismut, Elworthy and Li, in a form that
is exact for the Euler-Maruyama chain. Nothing is asked of F at the output times: it may jump. Unlike that of the likelihood ratio
the variance does not grow as dt falls (for a parameter of the diffusion like log(1 / dt)), but it does as the time between two
output times does: the derivative with respect to what happened before must be taken up by the noise until the next.

Control variate: as in `likelihood_ratio`, E w = 0.

Reference: E. Fournie, J.-M. Lasry, J. Lebuchoux, P.-L. Lions, N. Touzi, Finance Stoch. 3 (1999) 391.
"""

from typing import Any

import torch
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.problem import Theta
from sdesens.sensitivity.likelihood_ratio import constants as fitted
from sdesens.sensitivity.tile import Contributions, Tile
from sdesens.sensitivity.transition import reached
from sdesens.sensitivity.weights import first_order
from sdesens.tensors import split


def malliavin(
    tile: Tile,
    theta: Theta,
    *,
    window: int | None = None,
    control: bool = True,
    constants: dict[str, Tensor] | None = None,
) -> Contributions:
    """Every path's gradient by equation (1).

    Parameters
    ----------
    tile : Tile
    theta : mapping of str to Tensor
    window : int, optional
        Steps over which a weight is shared out at most, at least 1; by default all until the next output time. Shorter ones vary
        more, but keep away from places where the noise vanishes; 1 is the likelihood ratio.
    control, constants
        As in `likelihood_ratio`.

    Raises
    ------
    ArgumentError
        If the window is no positive int.
    MethodError
        If the noise does not reach every direction of the components that have some.
    """
    values, gradients, weights = weighted(tile, theta, window)
    if constants is not None:
        gradients = {k: g - constants[k].double() * weights[k] for k, g in gradients.items()}
    return Contributions(values, gradients)


def weighted(tile: Tile, theta: Theta, window: int | None) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Values, gradients without a control variate, and weights, of every path."""
    theta = {k: v.detach() for k, v in theta.items()}
    check_window(window)
    parts = reached(tile.problem, tile.noise_dim, "method='malliavin'")
    with torch.no_grad():
        rows = first_order(tile, theta, parts, weighted=True, window=window)
    tile.check(theta, rows.ys, rows.values)
    return rows.values, split(rows.gradients.double(), theta), split(rows.weights.double(), theta)


def check_window(window: int | None) -> None:
    """Raise ArgumentError unless it is a number of steps, or None."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ArgumentError(f"`window` must be a positive int, a number of steps, got {window!r}.")


def settle(tile: Tile, theta: Theta, options: dict[str, Any]) -> dict[str, Any]:
    """Options for a run: the constants of the control variate, from the paths of a pilot tile."""
    if not options.get("control", True) or "constants" in options:
        return options
    _, gradients, weights = weighted(tile, theta, options.get("window"))
    return {**options, "constants": fitted(gradients, weights)}
