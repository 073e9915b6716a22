"""First derivatives of a chain as functions of parameters and noise: tangents, and Malliavin weights.

A weight is integration by parts in the noise of one step. With Phi_n the Euler-Maruyama step, m_n = b_n dt, s_n = sigma_n sqrt(dt),
and a tangent V of the state that is to be taken over from step n on,

    E[ F_x(X_N) Y_{N,n+1} V_{n+1} ] = E[ F ( s_n^+ V_{n+1} . Z_n - tr(s_n^+ s_n'[V_n]) ) ],       (1)
    V_{n+1} = V_n + m_n'[V_n] + s_n'[V_n] Z_n,

since dF/dZ_n = s_n' Y_{N,n+1}' F_x and V_{n+1} depends on Z_n itself; the trace is that dependence. Any step between the one where
a parameter acts and the next time at which F looks at the path will do. So the derivative is shared out, over these steps evenly:

    initial state, diffusion    V_{n+1} = V_n + m'[V_n] + s'[V_n] Z_n + s_theta Z_n / L_n,   V_0 = dx_0/dtheta / L_0,
    drift                       all at its own step, s_n^+ m_theta . Z_n,                        (2)

L_n being the number of steps from n to the next output time. As dt falls, (1) and (2) are the weights of Bismut, Elworthy and Li,

    dE f(X_T)/dx = E[ f(X_T) 1/T int_0^T (sigma^-1 Y_t)' dW_t ],

with the difference that they are exact for the chain at any dt. With L_n = 1 they are the likelihood ratio. The variance stays
bounded as dt falls for initial state and drift, and grows like log(1 / dt) for the diffusion.

Components without noise of their own are run along and F is differentiated through them: it must not jump there. They follow the
parameters, and the noisy components until these are handed over: at step n, L_n shares are still to come, so by L_n m'[V_n].

Reference: K. D. Elworthy, X.-M. Li, J. Funct. Anal. 125 (1994) 252; N. Chen, P. Glasserman, Stoch. Proc. Appl. 117 (2007) 1689.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from sdesens.integrate.chunk import Dynamics
from sdesens.problem import Theta
from sdesens.sde import noise_product
from sdesens.sensitivity.tile import Tile
from sdesens.sensitivity.transition import Parts, increments, linear_log_density, right_inverse, strays
from sdesens.tensors import basis, jvp


@dataclass(frozen=True)
class Rows:
    """First derivatives of every path, P being the number of components of theta.

    Attributes
    ----------
    ys : Tensor, shape (T, B, *event)
    values : Tensor, shape (B,)
    direct : Tensor, shape (B, P)
        The derivative along the path: all of it, or what weights do not cover.
    weights : Tensor, shape (B, P)
        F times the weight is the rest; zero without weights.
    log_q : Tensor, shape (B,)
        Log density of a path held fixed; zero if none is.
    """

    ys: Tensor
    values: Tensor
    direct: Tensor
    weights: Tensor
    log_q: Tensor

    @property
    def gradients(self) -> Tensor:
        """Of every path and component, shape (B, P)."""
        return self.direct + self.values[:, None] * self.weights


def stops(outputs: tuple[int, ...], window: int | None) -> list[int]:
    """Steps before which what was taken up is to be handed over: output times, and multiples of the window."""
    marks = set(outputs[1:])
    if window is not None:
        marks |= set(range(window, outputs[-1], window))
    return sorted(marks)


def first_order(
    tile: Tile,
    theta: Theta,
    parts: Parts | None,
    *,
    weighted: bool,
    window: int | None = None,
    fixed_at: Theta | None = None,
) -> Rows:
    """Every path's derivative in every component of theta: a pure function of theta, to be differentiated again.

    Parameters
    ----------
    parts : Parts, optional
        Needed for weights, and for paths held fixed.
    weighted : bool
        By weights, equations (1) and (2); else by the tangents of the path.
    window : int, optional
        Steps over which a weight is shared out at most; 1 is the likelihood ratio.
    fixed_at : mapping of str to Tensor, optional
        Parameters whose paths are held fixed: the noise is then what takes theta along those, and `log_q` is their density.
    """
    outputs, each = tile.outputs, _over_directions(tile)
    vectors = basis({k: v.detach() for k, v in theta.items()})
    units = {k: torch.stack([u[k] for u in vectors]) for k in theta}  # (P, *shape)
    dynamics, y, plain = tile.dynamics(theta), tile.start(theta), tile.start({})
    S = each(lambda unit: jvp(lambda th: tile.start(th) + 0, (theta,), (unit,))[1], units)  # (P, B, *event)
    path, tangents = {0: y}, {0: S}
    ends, begun = stops(outputs, window), 0
    taken, weights = torch.zeros_like(S), S.new_zeros(S.shape[:2])
    if weighted and ends:
        assert parts is not None
        taken, S = torch.where(parts.noisy, S / ends[0], 0.0), torch.where(parts.noisy, 0.0, S)
    log_q = y.new_zeros(y.shape[0])
    base, fixed = (None, None) if fixed_at is None else (tile.dynamics(fixed_at), tile.start(fixed_at))
    for chunk in tile.chunks:
        for k, z in enumerate(tile.driver.normals(chunk, tile.count, plain)):
            n = chunk.start + k
            if base is not None and fixed is not None:
                assert parts is not None
                moved, s0 = increments(base, n, fixed)
                goal = fixed + moved + noise_product(tile.problem.sde, s0, z)
                z, log = _solved(parts, dynamics, n, y, goal)
                log_q, fixed = log_q + log, goal
            if weighted:
                assert parts is not None
                while ends[begun] <= n:
                    begun += 1
                y, taken, S, gained = _weigh(tile, parts, theta, each, units, n, y, z, taken, S, ends[begun] - n)
                weights = weights + gained
                if n + 1 == ends[begun]:
                    taken = torch.zeros_like(taken)
            else:
                y, S = _carry(tile, theta, each, units, n, y, z, S)
            if n + 1 in outputs:
                path[n + 1], tangents[n + 1] = y, S
    ys, moved_by = torch.stack([path[i] for i in outputs]), torch.stack([tangents[i] for i in outputs], 1)
    direct = each(lambda unit, dys: jvp(tile.values, (theta, ys), (unit, dys))[1], units, moved_by)
    return Rows(ys, tile.values(theta, ys), direct.mT, weights.mT, log_q)


def _over_directions(tile: Tile) -> Callable:
    """A function of one direction applied to all, stacked along axis 0: by vmap, or one by one."""

    def each(function: Callable, *stacked):
        if tile.vectorised:
            return vmap(function)(*stacked)
        count = len(tree_leaves(stacked)[0])
        rows = [function(*tree_map(lambda x, i=i: x[i], stacked)) for i in range(count)]
        return tree_map(lambda *parts: torch.stack(parts), *rows)

    return each


def _carry(tile: Tile, theta: Theta, each: Callable, units: Theta, n: int, y: Tensor, z: Tensor, S: Tensor):
    """A step of the state and of its tangents (P, B, *event)."""

    def step(th: Theta, y: Tensor) -> Tensor:
        drift, s = increments(tile.dynamics(th), n, y)
        return y + drift + noise_product(tile.problem.sde, s, z)

    return step(theta, y), each(lambda unit, v: jvp(step, (theta, y), (unit, v))[1], units, S)


def _weigh(
    tile: Tile,
    parts: Parts,
    theta: Theta,
    each: Callable,
    units: Theta,
    n: int,
    y: Tensor,
    z: Tensor,
    taken: Tensor,
    clean: Tensor,
    length: int,
):
    """A step of equations (1) and (2): state, V and clean components' tangents (P, B, *event), and weights (P, B).

    A clean component moves with the parameters, and with the share of the noisy ones that is still to be handed over.
    """
    sde = tile.problem.sde

    def law(th: Theta, y: Tensor) -> tuple[Tensor, Tensor]:
        return increments(tile.dynamics(th), n, y)

    drift, s = law(theta, y)
    inverse, alive = right_inverse(parts, s)
    stray = strays(parts, s)
    still = {k: torch.zeros_like(v) for k, v in theta.items()}

    def along(unit: Theta, V: Tensor, T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drift_y, s_y = jvp(law, (theta, y), (still, V))[1]
        drift_p, s_p = jvp(law, (theta, y), (unit, T))[1]
        turned = s_y + s_p / length
        V = V + torch.where(parts.noisy, drift_y, 0.0) + noise_product(sde, turned, z)
        u = V + torch.where(parts.noisy, drift_p, 0.0)
        pushed = ((u != 0) & parts.noisy).flatten(1).any(1) | (turned != 0).flatten(1).any(1)
        gain = torch.where(alive, _contract(parts, inverse, u, turned, z), torch.where(pushed, torch.nan, 0.0))
        gain = torch.where(stray, torch.nan, gain)
        return V, T + torch.where(parts.noisy, 0.0, drift_p + length * drift_y), gain

    return y + drift + noise_product(sde, s, z), *each(along, units, taken, clean)


def _contract(parts: Parts, inverse: Tensor, u: Tensor, turned: Tensor, z: Tensor) -> Tensor:
    """s^+ u . Z - tr(s^+ s'), shape (B,)."""
    if parts.diagonal:
        return (inverse * (u * z.reshape(u.shape) - turned)).flatten(1).sum(1)
    rows = parts.rows
    along = (inverse @ u.index_select(1, rows)[..., None])[..., 0]
    return (along * z).sum(1) - (inverse.mT * turned.index_select(1, rows)).sum((1, 2))


def _solved(parts: Parts, dynamics: Dynamics, n: int, y: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """The normals that take y to `goal` in its noisy components, (B, m), and the log density of that step."""
    drift, s = increments(dynamics, n, y)
    inverse, alive = right_inverse(parts, s)
    gap = goal - y - drift
    if parts.diagonal:
        z = (inverse * gap).flatten(1)
    else:
        z = (inverse @ gap.index_select(1, parts.rows)[..., None])[..., 0]
    z = torch.where((alive & ~strays(parts, s))[:, None], z, torch.nan)  # without noise nothing takes it there
    return z, linear_log_density(parts, goal, y + drift, s)[0]
