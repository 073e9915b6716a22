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
from torch.func import vjp, vmap

from sdesens.integrate.chunk import Dynamics
from sdesens.integrate.compiled import merged, normals
from sdesens.integrate.kernel import Clock, Stretch
from sdesens.noise.source import Draw
from sdesens.problem import Theta
from sdesens.rewrite import diffusion_derivative
from sdesens.sde import LEFT, SDE, noise_product, require_euler
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
    MethodError
        If the SDE brings a `step` of its own: equation (2) reverses Euler-Maruyama.
    NonFiniteError
    """
    require_euler(tile.problem.sde, "method='adjoint'")
    problem, tile = tile.problem, tile.holding_noise(tile.start(theta))
    with torch.no_grad():
        ys = tile.paths(theta)
    leaves = group_leaves(tile, theta)
    values, ys_bar, theta_bar = functional_pullback(tile, leaves, ys)
    tile.check(theta, ys, values)
    bars, flow = tile.widened(ys_bar), tile.flow(theta)
    x, A, totals = tile.widened(tile.per_group(ys, 1), copies=True)[-1], bars[-1], tile.zeros(theta)
    output_at = {step: bars[i] for i, step in enumerate(problem.outputs[:-1])}
    retreat = _by_kernel if tile.compiled else _step_by_step
    for chunk in reversed(tile.chunks):
        x, A, totals = retreat(tile, flow, theta, leaves, chunk, x, A, totals, output_at, corrected)
    accumulate(theta_bar, [total[: tile.n_groups] for total in totals.values()])
    initial_pullback(tile, leaves, tile.narrowed(A), theta_bar)
    return Contributions(values, group_means(tile, theta_bar))


def _step_by_step(tile, flow, theta, leaves, chunk, x, A, totals, output_at, corrected):
    """x, A and totals at the start of a chunk, from those at its end."""
    z = tile.per_group(tile.driver.normals(chunk, tile.count, x), 1)
    for n in reversed(range(chunk.start, chunk.start + chunk.count)):

        def move(th: Theta, x: Tensor, z: Tensor, n: int = n) -> Tensor:
            return increment(tile.dynamics(th), n, x, z, corrected)

        x = x.detach().requires_grad_()
        with torch.enable_grad():
            M = tile.map_groups(move, (0, 0, 0))(leaves, x, z[n - chunk.start])
        x_bar, *bars = pull(M, [x, *leaves.values()], A)
        accumulate(totals, bars)
        x = (x - M).detach()
        A = A if x_bar is None else A + x_bar
        A = A + output_at[n] if n in output_at else A
    return x, A, totals


def _by_kernel(tile, flow, theta, leaves, chunk, x, A, totals, output_at, corrected):
    """The same by one compiled kernel."""
    inside = range(chunk.start + 1, chunk.start + chunk.count)
    every = any(n in output_at for n in inside)
    jumps = [output_at.get(chunk.start + k, torch.zeros_like(A)) for k in range(flow.length)] if every else []
    x, A, totals = flow.launch(
        retreat_kernel, theta, chunk, x, A, totals, jumps, rows=tile.width, count=tile.count, corrected=corrected
    )
    return x, A + output_at[chunk.start] if chunk.start in output_at and not every else A, totals


def retreat_kernel(
    sde: SDE,
    rest: Theta,
    theta: Theta,
    clock: Clock,
    at: Stretch,
    x: Tensor,
    A: Tensor,
    totals: Theta,
    jumps: list[Tensor],
    *,
    draw: Draw,
    dim: int,
    length: int,
    corrected: bool,
) -> tuple[Tensor, Tensor, Theta]:
    """Equation (2) over a chunk, for x and A (n_groups, group, *event); jumps are dF/dy at the start of every step."""
    z = normals(draw, at, x.shape[:2], length, dim, x)
    copies = {k: v.expand(x.shape[0], *v.shape) for k, v in theta.items()}
    for k in reversed(range(len(z))):
        live = k < at.active  # a step that is not taken is evaluated where the first that is will be
        n = torch.where(live, at.start + k, at.start + at.active - 1)

        def move(th: Theta, x: Tensor, z: Tensor, n: Tensor = n) -> Tensor:
            return increment(clock.at(th).dynamics(sde, merged(rest, th)), n, x, z, corrected)

        M, pull_back = vjp(vmap(move), copies, x, z[k])[:2]
        theta_bar, x_bar, _ = pull_back(A)
        totals = {
            name: total + torch.where(live, theta_bar[name], 0.0) if name in theta_bar else total
            for name, total in totals.items()
        }
        x, A = torch.where(live, x - M, x), torch.where(live, A + x_bar, A)
        A = A + jumps[k] if jumps else A
    return x, A, totals


def increment(dynamics: Dynamics, n: int | Tensor, x: Tensor, z: Tensor, corrected: bool) -> Tensor:
    """Equation (1) for the step from t_n to t_{n+1}, at x (B, *event) with normals z (B, m)."""
    sde, p, dt = dynamics.sde, dynamics.p, dynamics.dt.to(x.dtype)
    t = (dynamics.t0 + (n + 1 - (LEFT if sde.piecewise else 0.0)) * dynamics.dt).to(x.dtype)
    root = dt.sqrt()
    g = sde.diffusion(t, x, p)
    M = sde.drift(t, x, p) * dt + noise_product(sde, g, z * root)
    if corrected and sde.noise_type != "additive":
        # v = s(x) sqrt(dt) is held fixed: differentiating it too would count the correction twice
        M = M - diffusion_derivative(sde, t, x, p, (g * root).detach()) * root
    return M
