"""Pathwise gradient: the Euler-Maruyama map, differentiated directly (discretise, then differentiate).

    lambda_N = dF/dy_N,    lambda_n = (dPhi_n/dy)' lambda_{n+1} + dF/dy_n,                        (1)
    dF/dtheta = F_theta + (dy_0/dtheta)' lambda_0 + sum_n (dPhi_n/dtheta)' lambda_{n+1},          (2)

with y_{n+1} = Phi_n(y_n, theta, Z_n) and Z held fixed. The derivative of the scheme, without error, for every noise type;
an unbiased estimate of the derivative of E F where F is continuous along the path, and silently wrong where it jumps.

The sweep runs backwards over chunks. States are kept at chunk boundaries only, each chunk's own graph is built, used and
dropped, and its noise is generated again. Where even the boundaries are too many, they are kept at O(sqrt N) checkpoints
and the stretch between two of them is run once more (A. Griewank, A. Walther, ACM TOMS 26 (2000) 19, with one level).

Reference: M. Giles, P. Glasserman, Smoking adjoints, Risk 2006.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import vjp, vmap

from sdesens.integrate.chunk import Chunk, advance, steps
from sdesens.integrate.compiled import Flow, merged, normals
from sdesens.integrate.kernel import Clock, Stretch
from sdesens.noise.source import Draw
from sdesens.problem import Theta
from sdesens.sde import SDE
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

STATE_BUDGET = 48 * 2**20  # bytes of boundary states before checkpoints are thinned out


def pathwise(tile: Tile, theta: Theta, *, budget: int = STATE_BUDGET) -> Contributions:
    """Group means of the gradient by equations (1) and (2).

    Parameters
    ----------
    tile : Tile
    theta : mapping of str to Tensor
    budget : int
        Bytes that chunk-boundary states may take; beyond it, O(sqrt N) checkpoints and one more forward run.

    Raises
    ------
    NonFiniteError
    """
    y0 = tile.start(theta, tile.width)
    segments = segmented(tile.chunks, y0, budget)
    tile = tile.holding_noise(y0)
    with torch.no_grad():
        ys, checkpoints, boundaries = forwards(tile, theta, segments, y0)
    ys = ys[:, : tile.count]
    leaves = group_leaves(tile, theta)
    values, ys_bar, theta_bar = functional_pullback(tile, leaves, ys)
    tile.check(theta, ys, values)
    del ys
    pull_chunk, flow = _kernel_pullback if tile.compiled else _plain_pullback, tile.flow(theta)
    bars = tile.widened(ys_bar)
    y_bar, totals = torch.zeros_like(bars[-1]), tile.zeros(theta)
    for chunk, start in backwards(tile, theta, segments, checkpoints, boundaries):
        y_bar, totals = pull_chunk(tile, flow, theta, leaves, chunk, start, y_bar, bars, totals)
    accumulate(theta_bar, [total[: tile.n_groups] for total in totals.values()])
    initial_pullback(tile, leaves, tile.narrowed(y_bar) + ys_bar[0], theta_bar)
    return Contributions(values, group_means(tile, theta_bar))


def segmented(chunks: list[Chunk], y: Tensor, budget: int = STATE_BUDGET) -> list[list[Chunk]]:
    """The chunks, cut where states like y are kept: all in one if their boundary states fit the budget, else O(sqrt N)."""
    n = len(chunks)
    length = n if n * y.numel() * y.element_size() <= budget else math.isqrt(n - 1) + 1
    return [chunks[i : i + length] for i in range(0, n, max(length, 1))]


def forwards(
    tile: Tile, theta: Theta, segments: list[list[Chunk]], y: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs, the state at each segment's start, and the boundary states of the last segment."""
    ys = [y] * len(tile.outputs)
    checkpoints, boundaries = [], []
    for segment in segments:
        checkpoints.append(y)
        boundaries = [y]
        for chunk, states in tile.sweep(theta, segment, y):
            for mark, output in chunk.outputs:
                ys[output] = states[mark]
            y = states[-1]
            if segment is segments[-1]:
                boundaries.append(y)
    return torch.stack(ys), checkpoints, boundaries[:-1]


def backwards(
    tile: Tile, theta: Theta, segments: list[list[Chunk]], checkpoints: list[Tensor], boundaries: list[Tensor]
) -> Iterator[tuple[Chunk, Tensor]]:
    """Chunks from the last to the first, each with the states at its start, from what `forwards` kept."""
    for segment in reversed(segments):
        start = checkpoints.pop()
        if not boundaries:  # those of the last segment are at hand, the others are run again
            with torch.no_grad():
                boundaries = _boundaries(tile, theta, segment, start)
        for chunk in reversed(segment):
            yield chunk, boundaries.pop()


def _boundaries(tile: Tile, theta: Theta, segment: list[Chunk], y: Tensor) -> list[Tensor]:
    """States at the start of each chunk of a segment."""
    return [y, *(states[-1] for _, states in tile.sweep(theta, segment[:-1], y))]


Totals = dict[str, Tensor]


def _plain_pullback(
    tile: Tile,
    flow: Flow,
    theta: Theta,
    leaves: Totals,
    chunk: Chunk,
    y: Tensor,
    y_bar: Tensor,
    ys_bar: Tensor,
    totals: Totals,
) -> tuple[Tensor, Totals]:
    """Equation (1) over one chunk, and the totals with its share of (2), by autograd on the chunk's own graph."""

    def run(th: Theta, y: Tensor, z: Tensor) -> list[Tensor]:
        return advance(tile.dynamics(th), chunk, y, z)

    z = tile.per_group(tile.driver.normals(chunk, tile.count, y), 1)
    y = tile.per_group(y).detach().requires_grad_()
    with torch.enable_grad():
        states = tile.map_groups(run, (0, 0, 1))(leaves, y, z)
    bars = [torch.zeros_like(y_bar) for _ in states]
    bars[-1] = y_bar
    for mark, output in chunk.outputs:
        bars[mark] = bars[mark] + ys_bar[output]
    out = pull(states, [y, *leaves.values()], bars)
    accumulate(totals, out[1:])
    return torch.zeros_like(y) if out[0] is None else out[0], totals


def _kernel_pullback(
    tile: Tile,
    flow: Flow,
    theta: Theta,
    leaves: Totals,
    chunk: Chunk,
    y: Tensor,
    y_bar: Tensor,
    ys_bar: Tensor,
    totals: Totals,
) -> tuple[Tensor, Totals]:
    """The same by one compiled kernel."""
    every = chunk.marks != (chunk.count,)
    if every:
        none = y_bar.new_zeros(flow.length - 1, *y_bar.shape)
        bars = [*none.unbind(), y_bar]  # steps that are not taken pass theirs on
        for mark, output in chunk.outputs:
            bars[chunk.marks[mark] - 1] = bars[chunk.marks[mark] - 1] + ys_bar[output]
    else:
        bars = [sum((ys_bar[output] for _, output in chunk.outputs), y_bar)]
    y_bar, moved = flow.launch(
        pullback_kernel, theta, chunk, y.view(y_bar.shape), bars, totals, rows=tile.width, count=tile.count, every=every
    )
    return y_bar, moved


def pullback_kernel(
    sde: SDE,
    rest: Theta,
    theta: Theta,
    clock: Clock,
    at: Stretch,
    y: Tensor,
    bars: list[Tensor],
    totals: Totals,
    *,
    draw: Draw,
    dim: int,
    length: int,
    every: bool,
) -> tuple[Tensor, Totals]:
    """`_plain_pullback` as a pure function, for y (n_groups, group, *event) and bars of its end, or of every step."""
    # A parameter no larger than the state has a copy for each path: the copies' derivatives are added up over the steps
    # inside the fused loop and summed over a group once. Larger ones have a copy for each group.
    each = all(v.numel() <= y[0, 0].numel() for v in theta.values())
    lead = (y.shape[0] * y.shape[1],) if each else y.shape[:2]

    def flat(x: Tensor) -> Tensor:
        return x.reshape(*lead, *x.shape[2:])

    def run(th: Theta, y: Tensor, *z: Tensor) -> list[Tensor]:
        if each:
            y, z = y[None], tuple(x[None] for x in z)
        states = steps(clock.at(th).dynamics(sde, merged(rest, th)), at.start, y, z, at.active)
        return [state[0] if each else state for state in (states if every else states[-1:])]

    z = normals(draw, at, lead, length, dim, y)
    copies = {k: v.expand(lead[0], *v.shape) for k, v in theta.items()}
    pull_back = vjp(vmap(run), copies, flat(y), *z)[1]
    theta_bar, y_bar, *_ = pull_back([flat(bar) for bar in bars])
    if each:
        theta_bar = {k: bar.reshape(*y.shape[:2], *bar.shape[1:]).sum(1) for k, bar in theta_bar.items()}
    return y_bar.reshape(y.shape), {k: v + theta_bar[k] if k in theta_bar else v for k, v in totals.items()}
