"""Everything about a problem that can be checked before a run, on a few short paths.

Names, shapes, structure of the SDE, that the functional gives one number a path, and that every parameter asked for is
reached by the graph of the result. A parameter that is not reached would get a missing gradient, or a zero that looks
like an answer.
"""

import warnings

import torch
from torch import Tensor

from sdesens.errors import (
    ArgumentError,
    DetachedError,
    NotAFunctionError,
    SdesensError,
    ShapeError,
    SlowPathWarning,
    UnusedParameterError,
)
from sdesens.integrate.checks import PROBE_PATHS, PROBE_STREAM, check_finite_params, check_sde, check_shapes
from sdesens.integrate.chunk import Chunk, Dynamics, advance
from sdesens.noise import Noise, Philox, settle
from sdesens.problem import Problem, Theta
from sdesens.sde import require_ito
from sdesens.sensitivity.tile import Tile, group_leaves
from sdesens.tensors import describe


def noise_source(problem: Problem, seed: int | None, noise: Noise | None) -> Noise:
    """The noise of a run: the source given, or Philox of the seed (0 if left out).

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If both are given, the source is none, or it holds another number of steps than the problem has.
    """
    source = settle(seed, noise)
    if source.n_steps not in (None, problem.n_steps):
        raise ArgumentError(
            f"the given noise holds {source.n_steps} steps, the problem has n_steps = {problem.n_steps}."
        )
    return source


def check_problem(problem: Problem, theta: Theta, *, differentiated: bool = True, thorough: bool = True) -> int:
    """Run every cheap check on a problem; returns the noise dimension.

    `differentiated` says whether autograd is to go through the functional; central differences do not need it. Unless
    `thorough`, only the coefficients' shapes are looked at.

    Raises
    ------
    CalculusError, ShapeError, DtypeError, NonFiniteError, NotAFunctionError, NoiseStructureError, DetachedError,
    UnusedParameterError
    """
    sde = problem.sde
    require_ito(sde, "Euler-Maruyama")
    p = problem.params({})
    check_finite_params(p)
    y0 = problem.initial({}).detach()
    dt = problem.step_size({})
    batch = y0.expand(PROBE_PATHS, *y0.shape)
    with torch.no_grad():
        noise_dim = check_shapes(sde, p, torch.tensor(problem.t0, dtype=y0.dtype, device=y0.device), batch)
    if not thorough:
        return noise_dim
    check_sde(sde, p, problem.t0, dt, y0, noise_dim, 0)
    _check_functional(problem, theta, noise_dim, differentiated)
    if differentiated:
        _check_attached(problem, theta, noise_dim)
    return noise_dim


def _probe(problem: Problem, theta: Theta, noise_dim: int) -> Tensor:
    """States (T, PROBE_PATHS, *event) of a short made-up path whose graph has every ingredient: first, middle, last step."""
    y0 = problem.initial(theta)
    y = y0.expand(PROBE_PATHS, *y0.shape)
    states = [y]
    dynamics = Dynamics(problem.sde, problem.params(theta), problem.t0, problem.step_size(theta))
    for n in _looked_at(problem):
        z = Philox(0, PROBE_STREAM).normals(0, PROBE_PATHS, n, 1, noise_dim, dtype=y.dtype, device=y.device)
        y = advance(dynamics, _single_step(n), y, z)[-1]
        states.append(y)
    return torch.stack(
        [states[0]] + [states[min(i, len(states) - 1)] for i in range(1, len(problem.outputs) - 1)] + [y]
    )


def _looked_at(problem: Problem) -> list[int]:
    """The first, the middle and the last step."""
    return sorted({0, problem.n_steps // 2, problem.n_steps - 1})


def probe_states(problem: Problem, theta: Theta, noise_dim: int) -> list[tuple[int, Tensor]]:
    """A few states (PROBE_PATHS, *event) of the made-up path, each with the step that starts there."""
    y0 = problem.initial(theta)
    y = y0.expand(PROBE_PATHS, *y0.shape)
    dynamics = Dynamics(problem.sde, problem.params(theta), problem.t0, problem.step_size(theta))
    found = []
    for n in _looked_at(problem):
        found.append((n, y))
        z = Philox(0, PROBE_STREAM).normals(0, PROBE_PATHS, n, 1, noise_dim, dtype=y.dtype, device=y.device)
        y = advance(dynamics, _single_step(n), y, z)[-1]
    return found


def check_number(problem: Problem, noise_dim: int) -> None:
    """Raise ShapeError unless the functional gives one number a path, on the made-up path; nothing is differentiated."""
    with torch.no_grad():
        ys = _probe(problem, {}, noise_dim)
        values = problem.functional(ys, problem.params({}))
    if not isinstance(values, Tensor) or values.shape != ys.shape[1:2]:
        raise ShapeError(
            f"`functional(ys, p)` must return one number a path, shape ({ys.shape[1]},) for ys of shape {tuple(ys.shape)}, got "
            f"{describe(values)}."
        )


def _single_step(n: int) -> Chunk:
    return Chunk(n, 1, (1,), ())


def _check_functional(problem: Problem, theta: Theta, noise_dim: int, differentiated: bool) -> None:
    leaves = {k: v.detach().requires_grad_() for k, v in theta.items()}
    with torch.enable_grad():
        ys = _probe(problem, leaves, noise_dim)
        if not ys.requires_grad:  # so that a functional which lets go of it is seen all the same
            ys.requires_grad_()
        values = problem.functional(ys, problem.params(leaves))
    wanted = f"one number a path, shape ({PROBE_PATHS},) for ys of shape {tuple(ys.shape)}"
    if not isinstance(values, Tensor):
        raise ShapeError(f"`functional(ys, p)` must return a tensor, {wanted}, got {type(values).__name__}.")
    if values.shape != (PROBE_PATHS,):
        raise ShapeError(
            f"`functional(ys, p)` returned shape {tuple(values.shape)}, but must return {wanted}: ys is (T, B, *event), so a "
            "terminal value is ys[-1, :, 0], without a mean over paths."
        )
    if not values.is_floating_point():
        raise DetachedError(
            f"`functional(ys, p)` returned {values.dtype}: a comparison or a cast cuts it off from the path and its pathwise "
            "derivative is zero. Return floating numbers that depend on the path smoothly."
        )
    with torch.no_grad():
        rows = [problem.functional(ys[:, i : i + 1], problem.params(theta)) for i in range(PROBE_PATHS)]
    if any(row.shape != (1,) for row in rows):
        raise ShapeError(
            f"`functional(ys, p)` returned shape {tuple(rows[0].shape)} for one path: it must keep the axis of paths, so do "
            "not squeeze() it; index the component instead, ys[-1, :, 0]."
        )
    alone = torch.cat(rows)
    scale = torch.finfo(ys.dtype).eps ** 0.5 * (1 + values.detach().abs().nan_to_num())
    if bool(((alone - values.detach()).abs().nan_to_num() > scale).any()):
        raise NotAFunctionError(
            "`functional(ys, p)` mixes paths or is random: a path alone gives another number than in a batch. Reduce over "
            "times and components, never over paths (dim 1 of ys)."
        )
    if not theta:
        raise ArgumentError(
            "there is nothing to differentiate in: name parameters in `wrt`, or give the SDE some; for states alone use `sdeint`."
        )
    if not values.requires_grad:
        if not differentiated:
            return
        raise DetachedError(
            "`functional(ys, p)` returned a tensor that is cut off from the path and from the parameters (a comparison, "
            "detach(), .item(), numpy, or a cast): its gradient would be missing, not zero. If it jumps, use "
            "method='auto', which tries the methods for jumps; else smooth it, or use method='finite_difference' with a wide "
            "relative_step, such as 0.01."
        )
    ones = torch.ones_like(values)
    found = torch.autograd.grad(values, list(leaves.values()), ones, allow_unused=True)
    unused = [name for name, g in zip(leaves, found, strict=True) if g is None]
    if unused and not _taken_up(problem, leaves, unused, noise_dim):
        raise UnusedParameterError(
            f"the result cannot depend on {', '.join(map(repr, unused))}: it enters neither drift, diffusion, initial state "
            "nor functional as a tensor (or only detached). Remove it from `wrt`, or use it through p."
        )


def _check_attached(problem: Problem, theta: Theta, noise_dim: int) -> None:
    """Check that autograd sees all of a parameter's influence, against a central difference on a short path.

    A coefficient that uses p["r"].item() moves with r, but its gradient does not. The parameter is moved a little off its
    value first, so that a kink which sits exactly there (a ReLU with zero bias) is not taken for a fault. Only a gross
    difference, in every path of the probe that moves, counts: a kink or a jump may lie within the difference of one.
    """
    for name, value in theta.items():
        size = value.detach().abs() + 1e-2
        u, v = (
            Philox(k, PROBE_STREAM)
            .normals(0, value.numel(), 0, 1, 1, dtype=value.dtype, device=value.device)
            .reshape(value.shape)
            for k in (1, 2)
        )
        base, direction = value.detach() + 1e-3 * size * u, size * v

        def values(s: Tensor, base=base, direction=direction, name=name) -> Tensor:
            at = {**theta, name: base + s * direction}
            return problem.functional(_probe(problem, at, noise_dim), problem.params(at)).double()

        try:
            step = torch.finfo(problem.initial({}).dtype).eps ** (1 / 3)
            s = torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True)
            with torch.enable_grad():
                F = values(s)
                own = [torch.autograd.grad(x, s, retain_graph=True, allow_unused=True)[0] for x in F]
            with torch.no_grad():
                by_difference = (values(s + step) - values(s - step)) / (2 * step)
        except (SdesensError, RuntimeError, ArithmeticError):
            continue  # the parameter cannot be moved freely (a correlation matrix): nothing to compare with
        by_autograd = torch.stack(
            [torch.zeros_like(by_difference[0]) if g is None else g.to(by_difference) for g in own]
        )
        gap = (by_autograd - by_difference).abs()
        noise = 1e3 * step**2 * F.detach().abs()
        wrong = gap > 0.05 * torch.maximum(by_autograd.abs(), by_difference.abs()) + noise
        moves = (by_autograd != 0) | (by_difference.abs() > noise)
        if bool(moves.any()) and bool((wrong | ~moves).all()) and bool(torch.isfinite(gap).all()):
            raise DetachedError(
                f"{name!r} moves the result by {float(by_difference[moves][0]):.4g} (central difference on a short path, in one "
                f"direction), but autograd sees {float(by_autograd[moves][0]):.4g}: a coefficient or the functional uses it "
                "detached (.item(), float(), .detach(), numpy, no_grad), or a custom backward is wrong. Use p[...] as a "
                "tensor throughout."
            )


def _taken_up(problem: Problem, leaves: Theta, names: list[str], noise_dim: int) -> bool:
    """Whether each of these parameters enters some step of the path, as one for a stretch of time does."""
    wanted = set(names)
    dynamics = Dynamics(problem.sde, problem.params(leaves), problem.t0, problem.step_size(leaves).detach())
    y = problem.initial(leaves).detach()[None]
    for n in range(problem.n_steps):
        z = Philox(0, PROBE_STREAM).normals(0, 1, n, 1, noise_dim, dtype=y.dtype, device=y.device)
        with torch.enable_grad():
            moved = advance(dynamics, _single_step(n), y, z)[-1]
        if moved.requires_grad:
            order = sorted(wanted)
            found = torch.autograd.grad(moved.sum(), [leaves[k] for k in order], allow_unused=True)
            wanted -= {k for k, g in zip(order, found, strict=True) if g is not None}
        if not wanted:
            return True
        y = moved.detach()
    return False


def survives_vmap(problem: Problem, theta: Theta, noise_dim: int) -> bool:
    """Whether the user's functions can be vectorised over groups; warns if not."""
    tile = Tile(problem, Philox(0, PROBE_STREAM), 0, PROBE_PATHS, 2, noise_dim)

    def run(th: Theta, z: Tensor) -> Tensor:
        y0 = problem.initial(th)
        states = [y0.expand(2, *y0.shape)]
        for n, step_noise in zip(steps, z, strict=True):
            states.append(advance(tile.dynamics(th), _single_step(n), states[-1], step_noise[None])[-1])
        return tile.values(th, torch.stack([states[0], *[states[-1]] * (len(problem.outputs) - 1)]))

    steps = _looked_at(problem)
    y = tile.start({})
    z = torch.cat([tile.driver.normals(_single_step(n), tile.count, y) for n in steps])
    try:
        tile.map_groups(run, (0, 1))(group_leaves(tile, theta), tile.per_group(z, 1))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"a coefficient or the functional cannot be vectorised by torch.func.vmap ({reason:.200}); groups of paths are "
            "visited one by one, uncompiled, which is slower. The usual causes: writing into a fresh tensor (use torch.stack), and Python "
            "branches on values (use torch.where).",
            SlowPathWarning,
            stacklevel=4,
        )
        return False
    return True
