"""Likelihood ratio: the path is held fixed and its law moves.

    dJ/dtheta = E[ F s ] + E[ F_theta ],    s = sum_n d/dtheta log q(X_{n+1} | X_n; theta),       (1)

q being the Gaussian law of an Euler-Maruyama step, equation (2) of `sdesens.sensitivity.transition`. Nothing is asked of F
along the path: it may jump. Exact for the chain. The variance of s is bounded as dt falls for a parameter of the drift; it
grows like 1 / dt for one of the diffusion (every step has a share) and for the initial state (the first step carries it all).

Components without noise of their own cannot be held fixed against the parameters. They are run again along the fixed path of
the others and F is differentiated through them: the derivative of a discount, of a running integral. F must not jump there.

Control variate: E s = 0, so F s - c s has the same mean; c = E[F s^2] / E[s^2], a number a component of theta, from other
noise. Causality: a reward gained before a step owes nothing to it. A functional that declares its `rewards(ys, p)` (T, B), whose
sum over output times it is, has each reward multiplied with the scores of the steps before it alone.

Reference: P. Glasserman, Monte Carlo Methods in Financial Engineering, 2003, section 7.3; J. Yang, H. Kushner, SIAM J. Control
Optim. 29 (1991) 1216 (diffusions); R. Williams, Machine Learning 8 (1992) 229 (causality).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdesens.errors import MethodError, ShapeError
from sdesens.integrate.chunk import steps
from sdesens.problem import Theta
from sdesens.sensitivity.pathwise import backwards, forwards, segmented
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
from sdesens.sensitivity.transition import Parts, check_span, increments, linear_log_density, parts_of, strays
from sdesens.tensors import describe

EACH = 64  # components of theta up to which every path has its own score; beyond, each group


def likelihood_ratio(
    tile: Tile, theta: Theta, *, control: bool = True, constants: dict[str, Tensor] | None = None
) -> Contributions:
    """Gradients by equation (1), of every path where theta has few components, else of every group.

    Parameters
    ----------
    tile : Tile
    theta : mapping of str to Tensor
    control : bool
        Whether a run settles the constants of the control variate beforehand, from other noise.
    constants : dict of Tensor, optional
        Those constants, of the parameters' shapes; none are used where they are left out.

    Raises
    ------
    MethodError
        If a parameter moves a component where it has no noise: the laws are then mutually singular.
    NonFiniteError
    """
    values, gradients, scores = scored(tile, theta, with_scores=constants is not None)
    if constants is not None:
        gradients = {k: g - constants[k].double() * scores[k] for k, g in gradients.items()}
    return Contributions(values, gradients)


def scored(
    tile: Tile, theta: Theta, *, with_scores: bool = True
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Values (B,), and for each unit (path or group) the means of F s + F_theta and, if wanted, of s itself."""
    theta = {k: v.detach() for k, v in theta.items()}
    problem = tile.problem
    each = tile.vectorised and sum(v.numel() for v in theta.values()) <= EACH
    tile = replace(tile, lanes=0, group=1 if each else tile.group)
    parts = parts_of(problem, tile.noise_dim, "method='likelihood_ratio'")
    y0 = tile.start(theta)
    tile = tile.holding_noise(y0)
    segments = segmented(tile.chunks, y0)
    with torch.no_grad():
        ys, checkpoints, boundaries = forwards(tile, theta, segments, y0)
        values = tile.values(theta, ys)
        weights = _weights(tile, theta, ys, values)
    leaves = group_leaves(tile, theta)
    values, ys_bar, explicit = functional_pullback(tile, leaves, ys)
    tile.check(theta, ys, values)
    clean = ~parts.noisy
    gained = _Sweep(explicit, torch.zeros_like(ys_bar[-1]))  # F s + F_theta
    score = _Sweep({k: torch.zeros_like(v) for k, v in explicit.items()}, torch.zeros_like(ys_bar[-1]))
    one = torch.ones_like(weights[0])
    for chunk, start in backwards(tile, theta, segments, checkpoints, boundaries):

        def run(th: Theta, y: Tensor, xs: Tensor, chunk=chunk) -> list[Tensor]:
            return _retrace(tile, parts, th, chunk.start, y, xs)

        with torch.no_grad():
            z = tile.driver.normals(chunk, tile.count, start)
            xs = torch.stack(steps(tile.dynamics(theta), chunk.start, start, z.unbind()))
        y = tile.per_group(start).detach().requires_grad_()
        with torch.enable_grad():
            *logs, lost, alive, stray, states = tile.map_groups(run, (0, 0, 1))(leaves, y, tile.per_group(xs, 1))
        inputs, targets = [y, *leaves.values()], [*logs, states]
        if bool(stray.any()):
            raise MethodError(
                "method='likelihood_ratio' cannot be used: a component of the state that has no noise at first has some later, on "
                "few paths. Use method='pathwise' if the functional does not jump."
            )
        if not bool(alive.all()):
            _check_lost(tile, leaves, clean, chunk.start, pull(lost, inputs, torch.ones_like(lost), retain_graph=True))
        for sweep, w in ((gained, weights), (score, [one] * len(weights)))[: 1 + with_scores]:
            bars = torch.zeros_like(states)
            bars[:, :, -1] = sweep.y_bar
            if sweep is gained:
                for mark, output in chunk.outputs:
                    bars[:, :, chunk.marks[mark] - 1] += torch.where(clean, ys_bar[output], 0.0)
            own = [tile.per_group(w[chunk.start + k]) for k in range(chunk.count)]
            found = pull(targets, inputs, [*own, bars], retain_graph=sweep is gained and with_scores)
            accumulate(sweep.totals, found[1:])
            y_bar = torch.zeros_like(y) if found[0] is None else found[0]
            sweep.y_bar = y_bar if chunk.start == 0 else torch.where(clean, y_bar, 0.0)
    initial_pullback(tile, leaves, gained.y_bar + ys_bar[0], gained.totals)
    if with_scores:
        initial_pullback(tile, leaves, score.y_bar, score.totals)
    return values, group_means(tile, gained.totals), group_means(tile, score.totals)


class _Sweep:
    """What a backward sweep carries: totals by parameter, and the derivative in the states at the chunk's end."""

    def __init__(self, totals: dict[str, Tensor], y_bar: Tensor):
        self.totals, self.y_bar = totals, y_bar


def _retrace(tile: Tile, parts: Parts, th: Theta, start: int, y: Tensor, xs: Tensor) -> list[Tensor]:
    """Along known states xs (steps, B, *event): log densities of the steps, and the states with clean components moving.

    Returns log q of each step (B,), a number whose derivative shows what moves where there is no density, whether all have
    one, whether a component without noise has some after all, and the states (B, steps, *event).
    """
    dynamics, logs, states = tile.dynamics(th), [], []
    lost, alive = y.new_zeros(y.shape[0]), y.new_ones(y.shape[0], dtype=torch.bool)
    stray = ~alive
    for k, x in enumerate(xs):
        drift, s = increments(dynamics, start + k, y)
        mean = y + drift
        log_q, live = linear_log_density(parts, x, mean, s)
        moved = torch.where(parts.noisy, mean, 0.0).flatten(1).sum(1) + s.flatten(1).square().sum(1)
        lost = lost + torch.where(live, 0.0, moved)
        alive = alive & live
        stray = stray | strays(parts, s)
        logs.append(log_q)
        y = torch.where(parts.noisy, x, mean)
        states.append(y)
    return [*logs, lost, alive, stray, torch.stack(states, 1)]


def _weights(tile: Tile, theta: Theta, ys: Tensor, values: Tensor) -> list[Tensor]:
    """What multiplies the score of each step, (B,) each: F, or the rewards that are gained after it."""
    rewards = getattr(tile.problem.functional, "rewards", None)
    if rewards is None or tile.measure is not None:
        return [values] * tile.problem.n_steps
    gained = rewards(ys, tile.problem.params(theta))  # (T, B)
    if not isinstance(gained, Tensor) or gained.shape != ys.shape[:2]:
        raise ShapeError(
            f"`functional.rewards(ys, p)` must return what is gained at each output time, a tensor of shape (T, B) = "
            f"{tuple(ys.shape[:2])}, got {describe(gained)}."
        )
    gap = (gained.sum(0) - values).abs()
    if bool((gap > torch.finfo(values.dtype).eps ** 0.5 * (gained.abs().sum(0) + values.abs())).any()):
        raise MethodError(
            "`functional.rewards(ys, p)` does not add up to the functional: summed over output times (axis 0) it must be F on every "
            f"path, and it is off by up to {float(gap.max()):.3g}."
        )
    to_go = gained.flip(0).cumsum(0).flip(0)
    bounds = zip(tile.outputs[:-1], tile.outputs[1:], strict=True)
    return [to_go[j + 1] for j, (begin, end) in enumerate(bounds) for _ in range(begin, end)]


def _check_lost(tile: Tile, leaves: dict[str, Tensor], clean: Tensor, start: int, found: list[Tensor | None]) -> None:
    totals = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in leaves.items()}
    accumulate(totals, found[1:])
    if found[0] is not None and start == 0:
        initial_pullback(tile, leaves, found[0], totals)
    names = [k for k, g in totals.items() if bool(g.any())]
    if found[0] is not None and start > 0 and bool(torch.where(clean, found[0], 0.0).any()):
        names = list(leaves)  # they may move what has no noise, and that the step
    if names:
        raise MethodError(
            f"method='likelihood_ratio' cannot be used for {', '.join(map(repr, names))}: on some paths the noise vanishes (a "
            "square root at zero) where the parameter moves the step, so the laws have no density against each other. Use a "
            "scheme that stays away from zero, or method='pathwise' if the functional does not jump."
        )


def settle(tile: Tile, theta: Theta, options: dict[str, Any]) -> dict[str, Any]:
    """Options for a run: the constants of the control variate, from the paths of a pilot tile.

    Raises
    ------
    MethodError
        If a parameter moves a step in a direction without noise.
    """
    check_span(tile.problem, theta, tile.noise_dim, "method='likelihood_ratio'")
    if not options.get("control", True) or "constants" in options:
        return options
    _, gradients, scores = scored(tile, theta)
    return {**options, "constants": constants(gradients, scores)}


def constants(gradients: dict[str, Tensor], scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """c = E[F s^2] / E[s^2] of each component, from the means of units."""
    found = {}
    for name, s in scores.items():
        square = s.square().mean(0)
        found[name] = torch.where(square > 0, (gradients[name] * s).mean(0) / torch.where(square > 0, square, 1.0), 0.0)
    return found
