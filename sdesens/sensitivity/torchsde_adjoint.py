"""torchsde's own stochastic adjoint, on our noise: an independent witness.

`torchsde.sdeint_adjoint` with Euler steps on our grid, for the forward and the backward solve. Its Brownian motion is an
object that answers with our increments, so it sees the same paths. Its error is its own: O(sqrt dt) a path, like that of
every adjoint that reconstructs the state. torchsde resets the state to the stored one at each output time.

Reference: X. Li et al., arXiv:2001.01328; https://github.com/google-research/torchsde (archived).
"""

import math

import torch
import torchsde
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.problem import Theta
from sdesens.sde import LEFT, require_euler
from sdesens.sensitivity.tile import (
    Contributions,
    Tile,
    functional_pullback,
    group_leaves,
    group_means,
    initial_pullback,
)


def torchsde_adjoint(tile: Tile, theta: Theta) -> Contributions:
    """Group means of the gradient by torchsde's adjoint.

    Raises
    ------
    ArgumentError
        For "t1", which torchsde does not differentiate.
    MethodError
        If the SDE brings a `step` of its own, of which torchsde knows nothing.
    NonFiniteError
    """
    require_euler(tile.problem.sde, "method='torchsde_adjoint'")
    if "t1" in theta:
        raise ArgumentError(
            "`wrt` names 't1', which torchsde does not differentiate: leave out method 'torchsde_adjoint'."
        )
    problem = tile.problem
    leaves = group_leaves(tile, theta)
    # torchsde accumulates parameters' gradients in tensors of their own; an expanded view would alias
    own = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    start = tile.start(theta).detach().flatten(1).requires_grad_()
    increments = tile.normals(start) * math.sqrt(problem.dt)
    ts = torch.tensor([problem.t0 + k * problem.dt for k in problem.outputs], dtype=torch.float64, device=start.device)
    with torch.enable_grad():
        ys = torchsde.sdeint_adjoint(
            _Wrapped(tile, own),
            start,
            ts,
            bm=_Increments(increments, problem.t0, problem.dt),
            method="euler",
            adjoint_method="euler",
            dt=problem.dt,
            adjoint_params=tuple(own.values()),
        )
    path = ys.detach().unflatten(2, tile.start(theta).shape[1:])
    values, ys_bar, theta_bar = functional_pullback(tile, leaves, path)
    tile.check(theta, path, values)
    y_bar, *bars = torch.autograd.grad(ys, [start, *own.values()], ys_bar.flatten(1, 2).flatten(2), allow_unused=True)
    for total, bar in zip(theta_bar.values(), bars, strict=True):
        if bar is not None:
            total += bar
    initial_pullback(tile, leaves, tile.per_group(y_bar.reshape(tile.start(theta).shape)), theta_bar)
    return Contributions(values, group_means(tile, theta_bar))


class _Wrapped:
    """A tile's SDE as torchsde wants it: (B, d) states in, each group seeing its own copy of the parameters."""

    def __init__(self, tile: Tile, leaves: dict[str, Tensor]):
        self.tile, self.leaves = tile, leaves
        self.noise_type, self.sde_type = tile.problem.sde.noise_type, "ito"

    def _call(self, coefficient, t, y):
        tile, problem = self.tile, self.tile.problem
        # torchsde records the graph backwards only, and there it looks at the end of a step
        if problem.sde.piecewise and torch.is_grad_enabled():
            t = t - LEFT * problem.dt
        t = t.to(y.dtype)
        x = tile.per_group(y.reshape(tile.count, *problem.initial({}).shape))

        def evaluate(theta, x, t):
            out = coefficient(t, x, problem.params(theta))
            shared = out.dim() == 2 and coefficient is problem.sde.diffusion and problem.sde.noise_type == "additive"
            return out.expand(x.shape[0], *out.shape) if shared else out

        return tile.map_groups(evaluate, (0, 0, None))(self.leaves, x, t).flatten(0, 1)

    def f(self, t, y):
        return self._call(self.tile.problem.sde.drift, t, y).flatten(1)

    def g(self, t, y):
        g = self._call(self.tile.problem.sde.diffusion, t, y)
        return g.flatten(1) if self.noise_type == "diagonal" else g


class _Increments(torchsde.BaseBrownian):
    """A Brownian motion that is known on the grid: increments (N, B, m), summed between two grid times."""

    def __init__(self, increments: Tensor, t0: float, dt: float):
        self.increments, self.t0, self.dt = increments, t0, dt

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        a, b = (min(max(round((float(t) - self.t0) / self.dt), 0), len(self.increments)) for t in (ta, tb))
        return self.increments[a:b].sum(0)

    def __repr__(self):
        return f"_Increments(t0={self.t0}, dt={self.dt}, steps={len(self.increments)})"

    dtype = property(lambda self: self.increments.dtype)
    device = property(lambda self: self.increments.device)
    shape = property(lambda self: self.increments.shape[1:])
    levy_area_approximation = "none"
