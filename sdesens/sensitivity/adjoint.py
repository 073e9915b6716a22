"""The continuous stochastic adjoint, solved backwards on the same noise (differentiate, then discretise).

In reversed time the Ito equations of the state X, of A = dF/dX and of the gradient G are, each step from t_{n+1} to t_n,

    M(x, theta) = b dt - sum_j (ds_j/dx) v_j dt + sum_j s_j dW^j_n      at (t_{n+1}, x), v_j = s_j(x) held fixed,   (1)
    X <- X - M,    A <- A + (dM/dx)' A,    G <- G + (dM/dtheta)' A.                                                (2)

The middle term of (1) turns the Ito equation round in time. It is twice the Ito-Stratonovich correction: once to leave
Ito calculus forwards, once to enter it backwards. Without it the result is wrong at every step size
(`corrected=False`, kept as a negative control).

Memory is O(1) in the number of steps. The price: X is reconstructed, not remembered, so a path's gradient differs from
the scheme's own by O(sqrt dt), its mean by O(dt). A method to compare with, not the default.

Reference: X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, Scalable gradients for stochastic differential equations,
AISTATS 2020, arXiv:2001.01328.
"""

import torch
from torch import Tensor

from sdesens.problem import Theta
from sdesens.rewrite import diffusion_derivative
from sdesens.sde import noise_product
from sdesens.sensitivity.tile import (
    Contributions,
    Tile,
    accumulate,
    functional_pullback,
    group_leaves,
    group_means,
    initial_pullback,
    pull,
)


def adjoint(tile: Tile, theta: Theta, *, corrected: bool = True) -> Contributions:
    """Group means of the gradient by equations (1) and (2).

    Raises
    ------
    NonFiniteError
    """
    problem, tile = tile.problem, tile.holding_noise(tile.start(theta))
    with torch.no_grad():
        ys = tile.paths(theta)
    leaves = group_leaves(tile, theta)
    values, ys_bar, theta_bar = functional_pullback(tile, leaves, ys)
    tile.check(theta, ys, values)
    x, A = tile.per_group(ys[-1]), ys_bar[-1]
    output_at = {step: i for i, step in enumerate(problem.outputs[:-1])}
    for chunk in reversed(tile.chunks):
        z = tile.per_group(tile.driver.normals(chunk, tile.count, x), 1)
        for k in reversed(range(chunk.count)):
            n = chunk.start + k
            move = tile.map_groups(lambda th, x, z, n=n: _increment(tile, th, n, x, z, corrected), (0, 0, 0))
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                M = move(leaves, x, z[k])
            x_bar, *bars = pull(M, [x, *leaves.values()], A)
            accumulate(theta_bar, bars)
            x = (x - M).detach()
            A = A if x_bar is None else A + x_bar
            if n in output_at:
                A = A + ys_bar[output_at[n]]
    initial_pullback(tile, leaves, A, theta_bar)
    return Contributions(values, group_means(tile, theta_bar))


def _increment(tile: Tile, theta: Theta, n: int, x: Tensor, z: Tensor, corrected: bool) -> Tensor:
    """Equation (1) for the step from t_n to t_{n+1}, at x (group, *event) with normals z (group, m)."""
    problem, sde = tile.problem, tile.problem.sde
    p, dt = problem.params(theta), problem.step_size(theta)
    t = (problem.t0 + (n + 1) * dt).to(x.dtype)
    dt = dt.to(x.dtype)
    root = dt.sqrt()
    g = sde.diffusion(t, x, p)
    M = sde.drift(t, x, p) * dt + noise_product(sde, g, z * root)
    if corrected and sde.noise_type != "additive":
        # v = s(x) sqrt(dt) is held fixed: differentiating it too would count the correction twice
        M = M - diffusion_derivative(sde, t, x, p, (g * root).detach()) * root
    return M
