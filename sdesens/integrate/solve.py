"""`sdeint`: the readable, differentiable face of the integrator.

Euler-Maruyama on a fixed grid, or the SDE's own `step`, with noise that is an argument. Fix the noise and the result is an ordinary function of
the parameters, the initial state and the last time: autograd and torch.func differentiate it like any other.
"""

from collections.abc import Callable
from secrets import randbits

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, GridError, NonFiniteError, ShapeError
from sdesens.integrate.checks import check_finite_params, check_sde, check_shapes
from sdesens.integrate.chunk import Driver
from sdesens.integrate.compiled import Flow, kernel_length, wanted
from sdesens.integrate.kernel import Clock
from sdesens.noise import GivenNoise, Noise, Philox
from sdesens.problem import check_state, check_times, grid_positions
from sdesens.sde import SDE, as_sde, require_ito
from sdesens.tensors import concrete, describe, transforming

METHODS = ("euler",)


def sdeint(
    sde,
    y0: Tensor,
    ts,
    *,
    bm: Noise | Tensor | Callable | None = None,
    method: str = "euler",
    dt: float | None = None,
    n_steps: int | None = None,
    seed: int | None = None,
    check: bool = True,
    compile: bool | str = "auto",
) -> Tensor:
    """Solve an SDE on a fixed grid; differentiable in `sde.params`, `y0` and the last time.

    Parameters
    ----------
    sde : SDE, or a torchsde-style object
    y0 : Tensor, shape (B, *event)
        Initial states, one row a path. Its dtype is the dtype of the computation.
    ts : sequence of T >= 2 increasing times, or Tensor of shape (T,)
        Output times. Each must lie on the grid. A tensor that requires grad is differentiated in its last entry, the
        horizon, every time keeping its step number.
    bm : Noise, Tensor or callable, optional
        The Brownian motion: a source such as `Philox(seed)`; a tensor of increments dW, shape (n_steps, B, m); or a
        torchsde-style `bm(ta, tb)` that returns the increment (B, m).
    method : {"euler"}
        An SDE that brings a `step` moves by that.
    dt, n_steps : float, int
        The step, or the number of steps from ts[0] to ts[-1]; give one. There is no default.
    seed : int, optional
        Seed of the Philox noise when `bm` is None. Left out, a fresh one is taken from the operating system, as numpy's
        `default_rng()` does: torch's global generator is neither read nor advanced.
    check : bool
        Probe the coefficients and look for non-finite paths (one host synchronisation). Turn it off inside a training
        loop once it has passed.
    compile : {"auto", True, False}
        Whether chunks of steps are fused by `torch.compile`, with their noise inside; "auto" does so where the work repays
        the seconds that it takes. The numbers agree to rounding. A training loop, whose steps are small but many, gains
        from True. Compiled states can be pulled back once: for `retain_graph` or second derivatives take False. Under
        forward mode and transforms of torch.func nothing is compiled.

    Returns
    -------
    Tensor, shape (T, B, *event)
        The states at `ts`; the first is y0.

    Raises
    ------
    ArgumentError and its kin (shapes, grid, calculus, noise structure), NonFiniteError

    Example
    -------
    >>> mu = torch.tensor(0.1, requires_grad=True)
    >>> gbm = SDE(lambda t, y, p: p["mu"] * y, lambda t, y, p: 0.2 * y, {"mu": mu})
    >>> ys = sdeint(gbm, torch.ones(1000, 1), (0.0, 1.0), n_steps=50, seed=1)
    >>> ys.shape
    torch.Size([2, 1000, 1])
    >>> (grad,) = torch.autograd.grad(ys[-1].mean(), mu)
    """
    sde = sde if isinstance(sde, SDE) else as_sde(sde)
    if method not in METHODS:
        raise ArgumentError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    require_ito(sde, "method='euler'")
    check_state("y0", y0, batched=True)
    times = check_times(ts)
    n_steps = resolve_steps(times, dt, n_steps)
    outputs = grid_positions(times, n_steps)
    t1 = ts[-1] if isinstance(ts, Tensor) else times[-1]
    step = (t1.to(torch.float64) - float(times[0])) / n_steps
    p, t0 = sde.params, float(times[0])
    with torch.no_grad():
        noise_dim = check_shapes(sde, p, torch.tensor(t0, dtype=y0.dtype, device=y0.device), y0.detach())
    if check:
        check_finite_params(p)
        if not transforming() and all(map(concrete, (y0, step, *p.values()))):
            check_sde(sde, p, t0, step, y0[0], noise_dim, 0)
    driver = Driver(as_noise(bm, seed, times, n_steps, (y0.shape[0], noise_dim)), 0, noise_dim)
    clock = Clock.of(t0, t1.to(y0.device, torch.float64), n_steps, y0.device)
    compiled = wanted(compile, len(y0) * n_steps) and not transforming()
    flow = Flow(sde, dict(p), clock, driver, kernel_length(noise_dim, len(y0)) if compiled else 0)
    if compiled and torch.is_grad_enabled() and any(v.requires_grad for v in (*p.values(), t1)):
        y0 = y0 + torch.zeros((), dtype=y0.dtype, device=y0.device, requires_grad=True)  # all chunks alike: one kernel
    ys = flow.solve(outputs, y0)
    if check and concrete(ys):
        check_finite_paths(ys, flow, outputs, y0)
    return ys


def resolve_steps(times: Tensor, dt: float | None, n_steps: int | None) -> int:
    """The number of steps from either of the two ways to give it."""
    if n_steps is not None and dt is None:
        return n_steps
    if dt is None or n_steps is not None:
        raise ArgumentTypeError("give one of `dt` and `n_steps`: the step is part of the question, it has no default.")
    if isinstance(dt, bool) or not isinstance(dt, int | float):
        raise ArgumentTypeError(f"`dt` must be a float, got {dt!r}: use float(...), or give `n_steps`.")
    span = float(times[-1] - times[0])
    if not dt > 0 or not span / dt < 2**53:
        raise GridError(f"`dt` must be a positive number that fits the span of `ts`, got {dt!r}: or give `n_steps`.")
    count = round(span / dt)
    if count < 1 or abs(span / dt - count) > 1e-6 * max(1.0, count):
        raise GridError(
            f"`dt` = {dt!r} does not divide the span {span!r} of `ts` ({span / dt:.6g} steps): choose dt = span / n, or give "
            "`n_steps`."
        )
    return count


def as_noise(bm, seed: int | None, times: Tensor, n_steps: int, shape: tuple[int, int]) -> Noise:
    """A source of noise from what the caller passed as `bm` and `seed`; `shape` is (B, m), that of one increment."""
    if bm is None:
        return Philox(randbits(63) if seed is None else seed)
    if seed is not None:
        raise ArgumentError("give `bm` or `seed`, not both: the noise is either one.")
    if isinstance(bm, Noise) and not isinstance(bm, type):
        if bm.n_steps not in (None, n_steps):
            raise ShapeError(
                f"`bm` holds {bm.n_steps} steps, but the grid has {n_steps}: give noise made for this grid."
            )
        return bm
    if isinstance(bm, type) or not (isinstance(bm, Tensor) or callable(bm)):
        raise ArgumentTypeError(
            f"`bm` must be a noise source, a tensor of increments or bm(ta, tb), got {describe(bm)}: use Philox(seed), or "
            "torch.as_tensor(...) for an array."
        )
    t0, dt = float(times[0]), float(times[-1] - times[0]) / n_steps
    if callable(bm):
        steps = [bm(t0 + n * dt, t0 + (n + 1) * dt) for n in range(n_steps)]
        if not all(isinstance(dW, Tensor) and dW.shape == shape for dW in steps):
            raise ShapeError(
                f"`bm(ta, tb)` must return the increment, a tensor (B, m) = {shape}, got {describe(steps[0])}."
            )
        bm = torch.stack(steps)
    if bm.shape != (n_steps, *shape):
        raise ShapeError(
            f"`bm` must hold increments of shape (n_steps, B, m) = {(n_steps, *shape)}, got {tuple(bm.shape)}: give one for "
            "each step, path and Brownian motion."
        )
    return GivenNoise.from_increments(bm, dt)


def check_finite_paths(ys: Tensor, flow: Flow, outputs: tuple[int, ...], y0: Tensor) -> None:
    """Raise NonFiniteError, with path, step and time, if a state in ys (T, B, *event) is NaN or infinite."""
    bad = ~torch.isfinite(ys.detach()).flatten(2).all(2).all(0)  # (B,)
    if not bool(bad.any()):
        return
    with torch.no_grad():
        where = bad.nonzero().flatten()
        everywhere = tuple(range(outputs[-1] + 1))
        step, culprit = outputs[-1], int(where[0])
        for chunk, states in flow.sweep(flow.chunks(everywhere), y0.detach()):
            broken = ~torch.isfinite(torch.stack(states)).flatten(2).all(2)  # (steps, B)
            if bool(broken.any()):
                k = int(broken.any(1).nonzero()[0])
                step, culprit = chunk.start + k + 1, int(broken[k].nonzero()[0])
                break
    first, time = flow.driver.first, float(flow.clock.t0 + step * flow.clock.dt)
    raise NonFiniteError(
        f"{int(bad.sum())} of {bad.numel()} paths became NaN or infinite; first path {first + culprit} in step {step} of "
        f"{outputs[-1]} (t = {time:.6g}). The step may be too long for these coefficients (raise `n_steps`), or a "
        "coefficient was evaluated outside its domain (a square root of a negative state).",
        paths=tuple(first + int(i) for i in where[:8]),
        n_bad=int(bad.sum()),
        step=step,
        time=time,
    )
