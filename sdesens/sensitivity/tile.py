"""What every gradient method is given, and what it gives back.

A `Tile` is a stretch of paths small enough to be worked on at once. A method is a function

    method(tile, theta) -> Contributions                                                         (1)

of the tile and of the tensors theta to differentiate in. Reverse mode yields sums over paths only, so a tile is cut into
groups of equal size and the parameters are given one copy a group: one sweep then returns the mean gradient of every
group, at the cost of one. The spread between groups is what the standard error is made of.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.func import vmap

from sdesens.errors import NonFiniteError
from sdesens.integrate.chunk import Chunk, Driver, Dynamics
from sdesens.integrate.compiled import Flow, kernel_length
from sdesens.integrate.kernel import Clock
from sdesens.integrate.solve import check_finite_paths
from sdesens.noise import Held, Noise, apart
from sdesens.problem import Problem, Theta

HELD_BYTES = 32 * 2**20  # noise kept between two sweeps


class Measure(Protocol):
    """Another number of each path than the problem's own functional, such as its expectation over the last step.

    Attributes
    ----------
    outputs : tuple of int
        Grid points at which it looks, the first being 0.
    draws : int
        Normals of its own that it needs a path, each of `noise_dim` components.
    """

    @property
    def outputs(self) -> tuple[int, ...]: ...

    @property
    def draws(self) -> int: ...

    def __call__(self, theta: Theta, ys: Tensor, own: Tensor | None) -> Tensor:
        """The number, shape (B,), from states ys (len(outputs), B, *event) and normals `own` (draws, B, noise_dim)."""
        ...


@dataclass(frozen=True)
class Tile:
    """Paths `first ... first + count - 1` of a problem, in `count / group` groups.

    Attributes
    ----------
    problem : Problem
    noise : Noise
    first, count, group : int
    noise_dim : int
        Number of Brownian motions.
    vectorised : bool
        Whether the user's functions survive `torch.func.vmap`; if not, groups are visited one by one.
    lanes : int
        0 to compute plainly; else by compiled kernels, which take whole groups of so many paths, at least two.
    measure : Measure, optional
        What is taken of a path instead of the problem's functional.
    """

    problem: Problem
    noise: Noise
    first: int
    count: int
    group: int
    noise_dim: int
    vectorised: bool = True
    lanes: int = 0
    measure: Measure | None = None

    @property
    def outputs(self) -> tuple[int, ...]:
        """Grid points at which the functional, or the measure, looks."""
        return self.problem.outputs if self.measure is None else self.measure.outputs

    @property
    def n_groups(self) -> int:
        return self.count // self.group

    @property
    def compiled(self) -> bool:
        return self.lanes > 0

    @property
    def chunks(self) -> list[Chunk]:
        return self.flow({}).chunks(self.outputs)

    @property
    def driver(self) -> Driver:
        return Driver(self.noise, self.first, self.noise_dim)

    def flow(self, theta: Theta) -> Flow:
        """What moves these paths, at theta."""
        q = self.problem
        clock = Clock.of(q.t0, theta.get("t1", q.t1), q.n_steps, q.initial({}).device)
        return Flow(q.sde, q.params(theta), clock, self.driver, kernel_length(self.noise_dim) if self.compiled else 0)

    def dynamics(self, theta: Theta) -> Dynamics:
        """The SDE at theta, on its grid."""
        q = self.problem
        return Dynamics(q.sde, q.params(theta), q.t0, q.step_size(theta))

    def normals(self, y: Tensor) -> Tensor:
        """All noise of the tile for states like y (count, *event): shape (n_steps, count, noise_dim)."""
        none = y.new_empty(0, self.count, self.noise_dim)  # a measure may look at the initial state alone
        return torch.cat([none, *(self.driver.normals(chunk, self.count, y) for chunk in self.chunks)])

    def holding_noise(self, y: Tensor) -> "Tile":
        """This tile with its noise kept in memory if that is cheap: a method that sweeps twice then draws it once."""
        numbers = self.problem.n_steps * self.count * self.noise_dim
        if self.compiled or numbers * y.element_size() > HELD_BYTES:  # a kernel makes its noise faster than it reads it
            return self
        return replace(self, noise=Held(self.noise, self.normals(y), self.first))

    def start(self, theta: Theta, rows: int | None = None) -> Tensor:
        """Initial states, shape (count, *event), or of so many rows."""
        y0 = self.problem.initial(theta)
        y = y0.expand(rows or self.count, *y0.shape)
        return y.contiguous() if self.compiled else y  # a kernel takes one layout

    def sweep(self, theta: Theta, chunks: list[Chunk], y: Tensor) -> Iterator[tuple[Chunk, list[Tensor]]]:
        """Advance y (count or width, *event) over the chunks; yields each with its states at the marks."""
        return self.flow(theta).sweep(chunks, y, self.count)

    def paths(self, theta: Theta) -> Tensor:
        """States at the output times, shape (T, count, *event)."""
        return self.flow(theta).solve(self.outputs, self.start(theta))

    def values(self, theta: Theta, ys: Tensor, own: Tensor | None = None) -> Tensor:
        """The functional, or the measure, on ys, shape (count,)."""
        if self.measure is not None:
            return self.measure(theta, ys, own)
        return self.problem.functional(ys, self.problem.params(theta))

    def own_normals(self, y: Tensor) -> Tensor | None:
        """What the measure draws for itself, shape (draws, count, noise_dim): from noise that moves no path."""
        draws = 0 if self.measure is None else self.measure.draws
        if not draws:
            return None
        source = apart(self.noise)
        return source.normals(self.first, self.count, 0, draws, self.noise_dim, dtype=y.dtype, device=y.device)

    def check(self, theta: Theta, ys: Tensor, values: Tensor) -> None:
        """Raise NonFiniteError if a path or a value of the functional is NaN or infinite."""
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(ys).all()):
            return
        check_finite_paths(ys, self.flow(theta), self.outputs, self.start(theta))
        bad = (~torch.isfinite(values)).nonzero().flatten()
        cause = (
            "Check its domain (log or sqrt of a state that may be negative)."
            if self.measure is None
            else "The last step has no noise there (a square root at zero), so there is no expectation to take: use a scheme that "
            "stays away from zero, or another method."
        )
        raise NonFiniteError(
            f"`functional(ys, p)` is NaN or infinite on {bad.numel()} of {values.numel()} paths, though the paths are finite; "
            f"first path {self.first + int(bad[0])}. {cause}",
            paths=tuple(self.first + int(i) for i in bad[:8]),
            n_bad=bad.numel(),
        )

    @property
    def layout(self) -> tuple[int, int]:
        """Groups and paths a group of a batch in reverse mode. Kernels take groups of one size and at least two."""
        fits = not self.compiled or (self.group == self.lanes and self.n_groups > 1)
        return (self.n_groups, self.group) if fits else (max(2, -(-self.count // self.lanes)), self.lanes)

    @property
    def width(self) -> int:
        """Rows of a batch in reverse mode: the paths, and copies of the last where a kernel's groups need them."""
        return math.prod(self.layout)

    def widened(self, x: Tensor, *, copies: bool = False) -> Tensor:
        """x (T, n_groups, group, *event) as (T, *layout, *event): rows that are no paths get zeros, or copies of the last."""
        flat = x.flatten(1, 2)
        more = self.width - self.count
        if more:
            fill = flat[:, -1:].expand(-1, more, *flat.shape[2:])
            flat = torch.cat((flat, fill if copies else torch.zeros_like(fill)), 1)
        return flat.unflatten(1, self.layout)

    def narrowed(self, x: Tensor) -> Tensor:
        """The paths of x (*layout, *event), in groups."""
        return self.per_group(x.flatten(0, 1)[: self.count])

    def zeros(self, theta: Theta) -> dict[str, Tensor]:
        """Totals for each group of the layout, float64."""
        return {k: v.new_zeros(self.layout[0], *v.shape, dtype=torch.float64) for k, v in theta.items()}

    def per_group(self, x: Tensor, axis: int = 0) -> Tensor:
        """Split the path axis into (n_groups, group)."""
        return x.unflatten(axis, (self.n_groups, self.group))

    def map_groups(self, function: Callable, in_dims: tuple) -> Callable:
        """`function` of one group's arguments, applied to all groups; results gain a leading group axis."""
        if self.vectorised:
            return vmap(function, in_dims=in_dims)
        return _loop(function, in_dims, self.n_groups)


@dataclass(frozen=True)
class Contributions:
    """What a tile adds to a Monte Carlo mean.

    Attributes
    ----------
    values : Tensor, shape (count,)
        The functional, path by path.
    gradients : dict of Tensor, shape (U, *shape of the parameter)
        Mean gradient of each of U equal consecutive stretches of paths: U = count if the method knows each path's own,
        U = n_groups in reverse mode. float64.
    """

    values: Tensor
    gradients: dict[str, Tensor]


def group_leaves(tile: Tile, theta: Theta) -> dict[str, Tensor]:
    """One differentiable copy of theta for each group, shape (n_groups, *shape)."""
    return {k: v.detach().expand(tile.n_groups, *v.shape).requires_grad_() for k, v in theta.items()}


def functional_pullback(tile: Tile, leaves: dict[str, Tensor], ys: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Values of the functional, and the derivatives of its sum over each group.

    Returns
    -------
    values : Tensor, shape (count,)
    ys_bar : Tensor, shape (T, n_groups, group, *event)
        dF/dys of each path.
    theta_bar : dict of Tensor, shape (n_groups, *shape), float64
        Explicit dependence on the parameters, summed over each group.
    """
    own = tile.own_normals(ys)
    ys = tile.per_group(ys.detach(), 1).requires_grad_()
    given = (leaves, ys) if own is None else (leaves, ys, tile.per_group(own, 1))
    with torch.enable_grad():
        values = tile.map_groups(tile.values, (0, 1, 1)[: len(given)])(*given)
    bars = pull(values, [ys, *leaves.values()], torch.ones_like(values))
    ys_bar = torch.zeros_like(ys) if bars[0] is None else bars[0]
    theta_bar = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in leaves.items()}
    accumulate(theta_bar, bars[1:])
    return values.detach().flatten(), ys_bar, theta_bar


def initial_pullback(tile: Tile, leaves: dict[str, Tensor], y_bar: Tensor, theta_bar: dict[str, Tensor]) -> None:
    """Add the derivative through the initial state, given y_bar (n_groups, group, *event), to theta_bar."""
    with torch.enable_grad():
        y0 = tile.map_groups(lambda th: tile.problem.initial(th) + 0, (0,))(leaves)
    accumulate(theta_bar, pull(y0, list(leaves.values()), y_bar.sum(1)))


def group_means(tile: Tile, theta_bar: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over groups to means."""
    return {k: v / tile.group for k, v in theta_bar.items()}


def pull(outputs, inputs: list[Tensor], cotangents, *, retain_graph: bool = False) -> list[Tensor | None]:
    """Vector-Jacobian product; None for inputs that the outputs do not reach, or where nothing is reached."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    cotangents = [cotangents] if isinstance(cotangents, Tensor) else cotangents
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outs, cots = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outs, inputs, cots, retain_graph=retain_graph or None, allow_unused=True))


def accumulate(theta_bar: dict[str, Tensor], bars: list[Tensor | None]) -> None:
    """theta_bar += bars, in float64, in the order of the dict."""
    for total, bar in zip(theta_bar.values(), bars, strict=True):
        if bar is not None:
            total += bar


def _loop(function: Callable, in_dims: tuple, n: int) -> Callable:
    def pick(x, dim, i):
        return {k: v[i] for k, v in x.items()} if isinstance(x, dict) else x if dim is None else x.select(dim, i)

    def mapped(*args):
        results = [function(*(pick(x, dim, i) for x, dim in zip(args, in_dims, strict=True))) for i in range(n)]
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    return mapped
