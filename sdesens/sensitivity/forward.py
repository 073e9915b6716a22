"""Forward sensitivity: the auxiliary SDE of the tangent S = dX/dtheta, solved beside the state.

    dS = (b_y S + b_theta) dt + sum_j (s^j_y S + s^j_theta) dW^j,    S_0 = dy_0/dtheta,           (1)
    dF/dtheta = sum_n F_{y_n} S_n + F_theta.                                                      (2)

The Euler-Maruyama scheme applied to (1) is the derivative of the scheme applied to X: the numbers agree with the pathwise
sweep to rounding, and every path has its own. Memory does not grow with the number of steps.

Two ways to take S over a chunk, y -> Phi(y, theta):

    directions   S_k <- dPhi[S_k, e_k], one Jacobian-vector product for each component k of theta;
    jacobians    S <- Phi_y S + Phi_theta, with the Jacobians of the chunk by reverse mode, path by path:
                 d sweeps whatever the number of parameters.

Reference: H. Kunita, Stochastic Flows and Stochastic Differential Equations, 1990; P. Glasserman, Monte Carlo Methods in
Financial Engineering, 2003, section 7.2.
"""

import math

import torch
from torch import Tensor
from torch.func import grad_and_value, jacrev, vmap
from torch.nn.functional import pad

from sdesens.integrate.chunk import Chunk, advance, steps
from sdesens.integrate.compiled import merged, normals
from sdesens.integrate.kernel import Clock, Stretch
from sdesens.noise.source import Draw
from sdesens.problem import Theta
from sdesens.sde import SDE
from sdesens.sensitivity.tile import Contributions, Tile
from sdesens.tensors import basis, jvp, split

Tangents = dict[str, Tensor]


def forward(tile: Tile, theta: Theta, *, strategy: str | None = None) -> Contributions:
    """Every path's gradient by equations (1) and (2).

    Parameters
    ----------
    tile : Tile
    theta : mapping of str to Tensor
    strategy : {"directions", "jacobians"}, optional
        By default the cheaper one, as measured: Jacobians where theta has at least an eighth of the state's components.

    Raises
    ------
    NonFiniteError
    """
    theta = {k: v.detach() for k, v in theta.items()}
    components, states = sum(v.numel() for v in theta.values()), tile.start(theta)[0].numel()
    with torch.no_grad():
        if tile.compiled:
            return _by_kernels(tile, theta, strategy or ("jacobians" if components >= states else "directions"))
        if strategy is None:
            strategy = "jacobians" if tile.vectorised and 8 * components >= states else "directions"
        return (_by_jacobians if strategy == "jacobians" else _by_directions)(tile, theta)


def _by_directions(tile: Tile, theta: dict[str, Tensor]) -> Contributions:
    units = basis(theta)
    y = tile.start(theta)
    tangents = [jvp(lambda th: tile.start(th) + 0, (theta,), (unit,))[1] for unit in units]
    ys, S = [y] * len(tile.outputs), [list(tangents) for _ in tile.outputs]  # S[output][direction]
    for chunk in tile.chunks:
        z = tile.driver.normals(chunk, tile.count, y)

        def run(th: Theta, x: Tensor, chunk: Chunk = chunk, z: Tensor = z) -> tuple[Tensor, ...]:
            return tuple(advance(tile.dynamics(th), chunk, x, z))

        states: tuple[Tensor, ...] = ()
        for k, unit in enumerate(units):
            states, moved = jvp(run, (theta, y), (unit, tangents[k]))
            tangents[k] = moved[-1]
            for mark, output in chunk.outputs:
                S[output][k] = moved[mark]
        for mark, output in chunk.outputs:
            ys[output] = states[mark]
        y = states[-1]
    path = torch.stack(ys)
    values, rows = tile.values(theta, path), []
    for k, unit in enumerate(units):
        tangent = torch.stack([S[output][k] for output in range(len(ys))])
        values, row = jvp(tile.values, (theta, path), (unit, tangent))
        rows.append(row.double())
    tile.check(theta, path, values)
    return Contributions(values, split(torch.stack(rows, 1), theta))


def _by_jacobians(tile: Tile, theta: dict[str, Tensor]) -> Contributions:
    y = tile.start(theta)
    d, B = math.prod(y.shape[1:]), tile.count
    S = _tangents_at_start(tile, theta, y)
    ys, tangents = [y] * len(tile.outputs), [S] * len(tile.outputs)
    for chunk in tile.chunks:

        def run(th: Theta, x: Tensor, z: Tensor, chunk: Chunk = chunk) -> tuple[Tensor, Tensor]:
            states = advance(tile.dynamics(th), chunk, x[None], z[:, None])
            stacked = torch.cat(states)  # (marks, *event)
            return stacked, stacked

        jacobians = vmap(jacrev(run, argnums=(0, 1), has_aux=True), in_dims=(None, 0, 1))
        (by_theta, by_y), states = jacobians(theta, y, tile.driver.normals(chunk, tile.count, y))
        by_y = by_y.reshape(B, -1, d, d)
        by_theta = _flatten(by_theta, B, len(chunk.marks), d).to(y.dtype)  # (B, marks, d, P)
        moved = by_y @ S[:, None] + by_theta
        for mark, output in chunk.outputs:
            ys[output], tangents[output] = states[:, mark], moved[:, mark]
        y, S = states[:, -1], moved[:, -1]
    return _weighed(tile, theta, torch.stack(ys), tangents)


def _tangents_at_start(tile: Tile, theta: dict[str, Tensor], y: Tensor) -> Tensor:
    """S_0 of every path, shape (B, d, P)."""
    d = y[0].numel()
    S0 = _flatten(jacrev(lambda th: tile.problem.initial(th) + 0)(theta), 1, d)
    return S0.to(y.dtype).expand(tile.count, -1, -1)


def _weighed(tile: Tile, theta: dict[str, Tensor], path: Tensor, tangents: list[Tensor]) -> Contributions:
    """Equation (2), from states (T, B, *event) and the tangents (B, d, P) at each of the T times."""

    def value(th: Theta, x: Tensor) -> Tensor:
        return tile.values(th, x[:, None])[0]

    (explicit, ys_bar), values = vmap(grad_and_value(value, argnums=(0, 1)), in_dims=(None, 1))(theta, path)
    tile.check(theta, path, values)
    B = tile.count
    total = _flatten(explicit, B).double()  # (B, P)
    for output, tangent in enumerate(tangents):
        total += (ys_bar[:, output].reshape(B, 1, -1) @ tangent)[:, 0]
    return Contributions(values, split(total, theta))


def _by_kernels(tile: Tile, theta: dict[str, Tensor], strategy: str) -> Contributions:
    names = [*(k for k in theta if k != "y0"), *(k for k in theta if k == "y0")]
    ordered = {k: theta[k] for k in names}  # a kernel knows nothing of y0: its columns come last
    flow, y = tile.flow(theta), tile.start(theta)
    S = _tangents_at_start(tile, ordered, y)
    ys, tangents = [y] * len(tile.outputs), [S] * len(tile.outputs)
    stored = _paths_inside(S)
    for chunk in tile.chunks:
        every = chunk.marks != (chunk.count,)
        states, moved = flow.launch(
            tangent_kernel, ordered, chunk, y, stored, rows=tile.count, count=tile.count, every=every, strategy=strategy
        )
        for mark, output in chunk.outputs:
            k = chunk.marks[mark] - 1 if every else 0
            ys[output], tangents[output] = states[k], moved[k].permute(2, 1, 0)
        y, stored = states[-1], moved[-1].flatten().view(stored.shape)  # axes of one have the same strides each time
    done = _weighed(tile, ordered, torch.stack(ys), tangents)
    return Contributions(done.values, {k: done.gradients[k] for k in theta})


def tangent_kernel(
    sde: SDE,
    rest: Theta,
    theta: Theta,
    clock: Clock,
    at: Stretch,
    y: Tensor,
    stored: Tensor,
    *,
    draw: Draw,
    dim: int,
    length: int,
    every: bool,
    strategy: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """States y (B, *event) and tangents, stored as (P, d, B), after each step of a chunk, or after the last alone."""
    z = normals(draw, at, y.shape[:1], length, dim, y)
    P, d, B = stored.shape
    S = stored.permute(2, 1, 0)

    def run(th: Theta, x: Tensor, *z: Tensor) -> tuple[Tensor, ...]:
        states = steps(clock.at(th).dynamics(sde, merged(rest, th)), at.start, x, z, at.active)
        return tuple(states if every else states[-1:])

    if strategy == "directions":
        own = basis(theta)
        units = own + [{k: torch.zeros_like(v) for k, v in theta.items()}] * (P - len(own))
        directions = zip(units, stored, strict=True)
        pairs = [
            jvp(lambda th, x: run(th, x, *z), (theta, y), (u, column.T.reshape(y.shape))) for u, column in directions
        ]
        states, results = pairs[0][0], [moved for _, moved in pairs]
        columns = zip(*results, strict=True)
        return list(states), [torch.stack([c.reshape(B, d).T for c in row]) for row in columns]

    def one(th: Theta, x: Tensor, *z: Tensor) -> tuple[Tensor, Tensor]:
        # stacked: of a tuple, torch 2.13 compiles wrong Jacobians of all states but the last
        states = torch.stack([state[0] for state in run(th, x[None], *(normal[None] for normal in z))])
        return states, states

    in_dims = (None, 0, *[0] * len(z))
    (by_theta, by_y), states = vmap(jacrev(one, argnums=(0, 1), has_aux=True), in_dims=in_dims)(theta, y, *z)
    marks = length if every else 1
    by_y, by_theta = by_y.reshape(B, marks, d, d), _flatten(by_theta, B, marks, d).to(y.dtype)
    tangents = []
    for k in range(marks):
        driven = pad(by_theta[:, k], (0, P - by_theta.shape[-1]))  # y0 drives nothing
        tangents.append(_paths_inside(_product(by_y[:, k], S) + driven))
    return [states[:, k].contiguous() for k in range(marks)], tangents


def _paths_inside(S: Tensor) -> Tensor:
    """S (B, d, P) as (P, d, B), which is how a fused loop runs over it."""
    return S.permute(2, 1, 0).flatten().view(S.shape[::-1])


def _product(J: Tensor, S: Tensor) -> Tensor:
    """J (B, d, d) times S (B, d, P): written out where a batched product of small matrices would be a slow kernel."""
    return J * S if J.shape[-1] == 1 else (J[..., None] * S[:, None]).sum(2) if J.shape[-1] <= 4 else J @ S


def _flatten(tree: Tangents, *lead: int) -> Tensor:
    """Concatenate the parameters' own axes of each entry into one last axis, on the states' device if some parameters stay on the CPU."""
    device = next((v.device for v in tree.values() if v.device.type != "cpu"), None)
    return torch.cat([v.reshape(*lead, -1).to(device) for v in tree.values()], dim=-1)
