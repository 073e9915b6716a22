"""A closer look: jumps and kinks that lie so close together that a path crosses many as its parameters move a little.

A price that is rounded at each of 250 dates, or a drift that is rounded at every step, changes in so many small jumps that they look
smooth from a distance. So the functional is looked at again along straight lines between paths,

    F(X + e w X'; theta + e w u),    X' = how the path moves,    w = 1/20, 1/400,                 (1)

and the coefficients by themselves, at states of these paths, at w = 1 too. None of this solves a path.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from sdesens.problem import Problem, Theta
from sdesens.zoom import KINDS, Finding, Paths, examine, paths_looked_at

WIDTHS = (1 / 20, 1 / 400)  # of the moves that the path itself was solved at
COARSEST = 1e-3  # of the interval that a section must be able to fall to
Moved = Callable[[Theta, Theta, Tensor, Tensor], dict[str, Tensor]]


def look_closer(
    problem: Problem,
    theta: Theta,
    directions: Theta,
    moved: Moved,
    ys: Tensor,
    moving: Tensor,
    *,
    unit: float,
    finest: float,
) -> tuple[str, Finding] | None:
    """What is roughest, the functional or a coefficient, and how rough; None if neither jumps nor kinks.

    Parameters
    ----------
    directions, moved
        theta + e * direction of a path, as `sdesens.audit.moved` makes it.
    ys, moving : Tensor, shape (T, n, *event)
        States at the output times, and how they move with e.
    unit, finest
        As in `sdesens.zoom.examine`, at w = 1.
    """
    n = ys.shape[1]
    rows = 6 * n
    while paths_looked_at(rows) > n:
        rows -= 6
    looks: list[tuple[str, float, Paths]] = [("the functional", w, _functional(problem, w, ys, moving)) for w in WIDTHS]
    if len(ys) > 1:
        looks += [("a coefficient", w, _coefficients(problem, w, ys, moving)) for w in (1.0, *WIDTHS)]
    worst: tuple[str, Finding] | None = None
    for what, w, F in looks:
        if finest / w > COARSEST:  # float32: rounding is a staircase of its own at this width
            continue

        def at(e: Tensor, paths: Tensor, F=F, w=w) -> Tensor:
            return F(e, paths, moved(theta, directions, w * e, paths))

        found = examine(at, rows=rows, unit=unit, finest=finest / w)
        if found.kind not in ("kink", "jump"):
            continue
        if worst is None or KINDS.index(found.kind) > KINDS.index(worst[1].kind):
            worst = what, found
    return worst


def _functional(problem: Problem, w: float, ys: Tensor, moving: Tensor) -> Callable:
    def F(e: Tensor, paths: Tensor, there: Theta) -> Tensor:
        x = ys[:, paths] + (w * e).to(ys.dtype).view(1, -1, *[1] * (ys.dim() - 2)) * moving[:, paths]
        return vmap(lambda th, y: problem.functional(y[:, None], problem.params(th)), in_dims=(0, 1))(
            there, x
        ).flatten()

    return F


def _coefficients(problem: Problem, w: float, ys: Tensor, moving: Tensor) -> Callable:
    """Drift and diffusion of each path at one of the output times, in one number."""
    n = ys.shape[1]
    which = 1 + torch.arange(n, device=ys.device) % (len(ys) - 1)
    y, dy = ys[which, torch.arange(n)], moving[which, torch.arange(n)]  # (n, *event)
    times = problem.times.to(ys.device, ys.dtype)[which]

    def values(th: Theta, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        p = problem.params(th)
        b, s = problem.sde.drift(t, x[None], p), problem.sde.diffusion(t, x[None], p)
        return _mixed(b), _mixed(s)

    b0, s0 = vmap(lambda t, x: values({}, t, x))(times, y)
    scale_b, scale_s = (torch.where(x.std() > 0, x.std(), 1.0) for x in (b0, s0))

    def F(e: Tensor, paths: Tensor, there: Theta) -> Tensor:
        x = y[paths] + (w * e).to(ys.dtype).view(-1, *[1] * (ys.dim() - 2)) * dy[paths]
        b, s = vmap(values)(there, times[paths], x)
        return b / scale_b + s / scale_s

    return F


def _mixed(x: Tensor) -> Tensor:
    """One number that every entry has a part in, 0-dim."""
    return (x.flatten() * torch.linspace(1.0, 2.0, x.numel(), dtype=x.dtype, device=x.device)).sum()
