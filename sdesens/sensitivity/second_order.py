"""Second derivatives: two methods in a row.

    H_ab = d/dtheta_b E[ G_a ],    G_a one path's first derivative in theta_a,                    (1)

where G_a is the pathwise derivative, or F times a weight. The outer derivative is taken again in one of two ways,

    noise fixed (pathwise)             E[ dG_a/dtheta_b ],                                        (2)
    path fixed (likelihood ratio)      E[ G_a s_b + dG_a/dtheta_b ],                              (3)

s being the score of the chain. For (3) G_a is a function of parameters and noise evaluated along a fixed path: the noise is what
takes theta along it. What F must be:

    pathwise                      both pathwise: F has a continuous derivative. Of a call it gives 0, which is wrong;
    likelihood_ratio_pathwise     weights first, then (2): F is continuous;
    pathwise_likelihood_ratio     pathwise first, then (3): F is continuous;
    likelihood_ratio              weights first, then (3): F may jump;
    conditional                   both pathwise, of the conditional expectation of F over the last step.

Weights are those of `sdesens.sensitivity.weights`: with `window=1` the likelihood ratio itself, else shared out over more steps,
which varies less. H is made symmetric path by path.

Reference: M. Broadie, P. Glasserman, Management Science 42 (1996) 269; G. Pages, O. Pironneau, G. Sall, Vibrato and automatic
differentiation for high order derivatives, arXiv:1606.06143.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdesens.errors import MethodError
from sdesens.problem import Theta
from sdesens.sensitivity.conditional import smoothed
from sdesens.sensitivity.malliavin import check_window
from sdesens.sensitivity.tile import Contributions, Tile
from sdesens.sensitivity.transition import Parts, reached
from sdesens.sensitivity.weights import Rows, first_order
from sdesens.tensors import basis, jvp, split


@dataclass(frozen=True)
class Pair:
    """Two methods in a row.

    Attributes
    ----------
    weighted : bool
        Whether the first derivative is by weights.
    fixed : bool
        Whether the second holds the path fixed, equation (3).
    """

    weighted: bool
    fixed: bool


PAIRS = {
    "pathwise": Pair(False, False),
    "likelihood_ratio_pathwise": Pair(True, False),
    "pathwise_likelihood_ratio": Pair(False, True),
    "likelihood_ratio": Pair(True, True),
}


def second_order(tile: Tile, theta: Theta, pair: Pair, window: int | None = None) -> Contributions:
    """Every path's second derivatives by equation (2) or (3).

    Returns
    -------
    Contributions
        Its gradients are "a" for first derivatives and "a, b" for second ones, (B, *shape of a, *shape of b), b not before a.
    """
    theta = {k: v.detach() for k, v in theta.items()}
    parts = parts_for(tile, theta, pair, window)
    fixed_at = theta if pair.fixed else None

    def first(th: Theta) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows: Rows = first_order(tile, th, parts, weighted=pair.weighted, window=window, fixed_at=fixed_at)
        return rows.gradients, rows.log_q, rows.values, rows.ys

    columns, gradients, values, ys = [], torch.empty(0), torch.empty(0), torch.empty(0)
    with torch.no_grad():
        for unit in basis(theta):
            (gradients, _, values, ys), (moved, score, _, _) = jvp(first, (theta,), (unit,))
            columns.append(moved + gradients * score[:, None])
    tile.check(theta, ys, values)
    H = torch.stack(columns, 2).double()
    return Contributions(values, named(gradients.double(), 0.5 * (H + H.mT), theta))


def parts_for(tile: Tile, theta: Theta, pair: Pair, window: int | None = None) -> Parts | None:
    """The parts of the state, where a pair needs them.

    Raises
    ------
    MethodError
        If there is not noise in every direction, or a path does not determine its noise where it is to be held fixed.
    """
    if not (pair.weighted or pair.fixed):
        return None
    check_window(window)
    parts = reached(tile.problem, tile.noise_dim, "a second derivative by weights or on a path held fixed")
    noisy = int(parts.noisy.sum())
    if pair.fixed and not parts.diagonal and tile.noise_dim != noisy:
        raise MethodError(
            f"a path that is held fixed must determine its noise, but there are {tile.noise_dim} Brownian motions for {noisy} "
            "components with noise: use method='likelihood_ratio_pathwise', or write the diffusion with as many Brownian motions "
            "as components (a Cholesky factor)."
        )
    return parts


def named(gradients: Tensor, H: Tensor, theta: Theta) -> dict[str, Tensor]:
    """First derivatives (B, P) and second ones (B, P, P) by the names of parameters."""
    sizes = [v.numel() for v in theta.values()]
    found = split(gradients, theta)
    rows = dict(zip(theta, H.split(sizes, 1), strict=True))
    names = list(theta)
    for i, a in enumerate(names):
        for b, block in zip(names[i:], rows[a].split(sizes, 2)[i:], strict=True):
            found[f"{a}, {b}"] = block.reshape(-1, *theta[a].shape, *theta[b].shape)
    return found


def pathwise(tile: Tile, theta: Theta) -> Contributions:
    """The second derivative of the scheme's own path."""
    return second_order(tile, theta, PAIRS["pathwise"])


def conditional(tile: Tile, theta: Theta) -> Contributions:
    """The same of the conditional expectation of F."""
    measure = smoothed(tile.problem, theta, tile.noise_dim, twice=True)
    return second_order(replace(tile, measure=measure), theta, PAIRS["pathwise"])


def likelihood_ratio_pathwise(tile: Tile, theta: Theta, *, window: int | None = None) -> Contributions:
    """Weights first, then along the path."""
    return second_order(tile, theta, PAIRS["likelihood_ratio_pathwise"], window)


def pathwise_likelihood_ratio(tile: Tile, theta: Theta) -> Contributions:
    """Along the path first, then the likelihood ratio of the chain."""
    return second_order(tile, theta, PAIRS["pathwise_likelihood_ratio"])


def likelihood_ratio(tile: Tile, theta: Theta, *, window: int | None = None) -> Contributions:
    """Weights first, then the likelihood ratio of the chain."""
    return second_order(tile, theta, PAIRS["likelihood_ratio"], window)


SECOND: dict[str, Callable[..., Contributions]] = {
    "pathwise": pathwise,
    "conditional": conditional,
    "likelihood_ratio_pathwise": likelihood_ratio_pathwise,
    "pathwise_likelihood_ratio": pathwise_likelihood_ratio,
    "likelihood_ratio": likelihood_ratio,
}
