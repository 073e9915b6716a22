"""The density of a diffusion model: the likelihood of its probability-flow ODE.

With u the velocity of the ODE, along the path that starts from the data x at t_min,

    dx/dt = u(x, t),     log p(x) = log N(x_T; 0, prior_std^2 I) + int_{t_min}^{t_max} div u(x_t, t) dt,     (1)
    div u = sum_k e_k . J e_k  exactly,   or   v . J v  with E v v^T = I,   J = du/dx.                        (2)

(1) is solved as one ODE for x and its log-determinant. The signs v of (2) stay the same along a path, so that the mean over
v of the result is the exact one. Two things are taken for granted: that x is a draw at t_min, and x_T one of the prior. For
eight Gaussians of width .15 under VP each costs 3e-5 nats a point with t_min = 1e-5, but 4e-3 with t_min = 1e-3.

References: Y. Song et al., 2011.13456 (1); M. Hutchinson, Commun. Stat. 18 (1989) 1059, W. Grathwohl et al., 1810.01367 (2).
The solver is torchdiffeq's; its accepted steps are differentiated.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint

from sdesens.diffusion.dequantise import check_int, check_rows, item_normals
from sdesens.diffusion.predict import Denoiser, Predictor, check_predictor
from sdesens.errors import (
    ArgumentError,
    DetachedError,
    DtypeError,
    GridError,
    MethodError,
    NonFiniteError,
    NotAFunctionError,
)

T_MIN = 1e-5  # of t_max
EXACT_UP_TO, PROBES = 64, 8
FIRST_STEP = 1e-3  # of the time span; a constant, for gradients would flow through a step that torchdiffeq chooses
PROBE_STREAM = 0x7FFFFF01  # away from any stream that samplers and losses use
ADAPTIVE = ("dopri5", "dopri8", "bosh3")


@dataclass(frozen=True, eq=False)
class LogProb:
    """What `log_prob` found.

    Attributes
    ----------
    log_prob : Tensor, shape (B,), float64
        Nats.
    standard_error : Tensor, shape (B,), float64, or None
        Of an estimated divergence, from the spread of its probes; neither the solver's error nor the model's is in it. NaN
        for one probe, None for the exact divergence.
    x_T : Tensor, shape (B, *event)
        The latent, where the path ends at t_max.
    evaluations : int
        Evaluations of the velocity by the solver, each with one backward pass a direction.
    """

    log_prob: Tensor
    standard_error: Tensor | None
    x_T: Tensor
    evaluations: int


def log_prob(
    denoiser: Predictor,
    x: Tensor,
    *,
    t_min: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    probes: int | None = None,
    exact_up_to: int = EXACT_UP_TO,
    seed: int = 0,
    first: int = 0,
    method: str = "dopri5",
    vectorise: bool = True,
    max_evaluations: int = 10_000,
) -> LogProb:
    """log p(x) by the probability-flow ODE, equation (1).

    Parameters
    ----------
    denoiser : Predictor
        It is called in x's dtype; the ODE around it is solved in float64.
    x : Tensor, shape (B, *event)
    t_min : float, optional
        Left out, 1e-5 t_max.
    rtol, atol : float
        For x and for the log-determinant, of the row with the largest error: all rows share its steps. So a row's value
        differs from batch to batch, within the tolerance. A float32 network is good for 1e-6.
    probes : int, optional
        Directions of an estimated divergence, equation (2): signs, those of row i a function of (seed, first + i) alone.
        Left out, the divergence is exact in up to `exact_up_to` dimensions, and has 8 probes beyond.
    exact_up_to, seed, first : int
    method : {"dopri5", "dopri8", "bosh3"}
    vectorise : bool
        Whether all directions go backwards at once, which is faster for few rows. False: one after the other, for little
        memory, many rows, or a network that torch cannot vectorise.
    max_evaluations : int
        Where to give up.

    Returns
    -------
    LogProb
        Differentiable in x and in parameters; memory then grows with evaluations times directions. Nothing is kept under
        torch.no_grad(), or where nothing requires a gradient.

    Raises
    ------
    NonFiniteError
        If x or the velocity is infinite or NaN.
    DetachedError, NotAFunctionError
        If a network is cut off from x (no_grad, detach), is random or mixes rows (dropout, batch norm in training).
    ArgumentError
        For tolerances that cannot be met and other bad arguments; GridError for t_min.

    Example
    -------
    >>> from sdesens.diffusion import VP, Denoiser
    >>> normal = Denoiser(lambda x, t: x * VP().sigma(t)[:, None].to(x), VP(), "eps")  # exact for N(0, I)
    >>> log_prob(normal, torch.zeros(1, 2)).log_prob  # -log 2 pi
    tensor([-1.8379], dtype=torch.float64)
    """
    span = _check(denoiser, x, t_min)
    _check_solver(rtol, atol, method, max_evaluations)
    d, exact = x[0].numel(), probes is None and x[0].numel() <= exact_up_to
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False):  # this turns recording on
        _check_networks(denoiser, x)
        keep = recording and _wants_gradient(denoiser, x)
        directions = _basis(x) if exact else _signs(x, PROBES if probes is None else probes, seed, first)
        flow = _Flow(denoiser, x, directions, exact, keep, vectorise, max_evaluations)
        with torch.set_grad_enabled(keep):
            start = torch.zeros(len(x), 1 if exact else len(directions), dtype=torch.float64, device=x.device)
            state = torch.cat((x.flatten(1).to(torch.float64), start), 1)
            end, dets = _solve(flow, state, span, rtol, atol, method).tensor_split([d], 1)
            std = denoiser.schedule.prior_std.to(end)
            prior = -((end / std) ** 2).sum(1) / 2 - d * (torch.log(std) + math.log(2 * math.pi) / 2)
            value, x_T = prior + dets.mean(1), end.reshape(x.shape).to(x.dtype)
    return LogProb(value, None if exact else _standard_error(dets.detach()), x_T, flow.evaluations)


@dataclass(eq=False)
class _Flow:
    """Right-hand side of (1) for states (B, d + K), x and K log-determinants."""

    denoiser: Predictor
    x: Tensor  # of the shape and dtype that the network knows
    directions: Tensor  # (K, B or 1, *event)
    exact: bool
    keep: bool  # whether gradients are to flow through the result
    vectorise: bool
    limit: int
    evaluations: int = 0

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        if self.evaluations >= self.limit:
            raise ArgumentError(
                f"`max_evaluations` = {self.limit} are used up at t = {float(t):.3g}: raise it, or `rtol` and `atol`. A network with jumps, or in "
                "float32 with tolerances below 1e-6, needs many."
            )
        self.evaluations += 1
        with torch.enable_grad():
            rows = state[:, : self.x[0].numel()]
            rows = rows if self.keep and rows.requires_grad else rows.detach().requires_grad_()
            x = rows.reshape(self.x.shape).to(self.x.dtype)
            u = self.denoiser.velocity(x, t)
            traces = (self.directions * self._pull(u, x)).to(torch.float64).flatten(2).sum(2)
            traces = traces.sum(0, keepdim=True) if self.exact else traces
            out = torch.cat((u.flatten(1).to(torch.float64), traces.T), 1)
        what = f"the velocity or its divergence is not finite at t = {float(t):.6g}"
        _check_finite(out, what, "look at the network there, or raise `t_min`", float(t))
        return out if self.keep else out.detach()

    def _pull(self, u: Tensor, x: Tensor) -> Tensor:
        """J^T v for every direction, (K, B, *event)."""
        v = self.directions.expand(-1, *u.shape)
        if not self.vectorise:
            return torch.cat(
                [torch.autograd.grad(u, x, w, retain_graph=True, create_graph=self.keep)[0][None] for w in v]
            )
        try:
            return torch.autograd.grad(u, x, v, create_graph=self.keep, is_grads_batched=True)[0]
        except RuntimeError as error:
            raise MethodError(
                f"{len(v)} directions could not go backwards through the network at once: use vectorise=False, or fewer `probes`. torch "
                f"says: {error}"
            ) from error


def _solve(flow: _Flow, state: Tensor, span: tuple[float, float], rtol: float, atol: float, method: str) -> Tensor:
    """The state at the end of the span."""
    d = flow.x[0].numel()

    def worst_row(error: Tensor) -> Tensor:
        error = error.detach().square()
        return torch.maximum(error[:, :d].mean(1), error[:, d:].mean(1)).max().sqrt()

    t = torch.tensor(span, dtype=torch.float64, device=state.device)
    # `step_t`: the last step is to end at t_max, beyond which there is no schedule
    options = {"first_step": FIRST_STEP * (span[1] - span[0]), "step_t": t[1:], "norm": worst_row}
    try:
        return odeint(flow, state, t, rtol=rtol, atol=atol, method=method, options=options)[-1]
    except AssertionError as error:
        if "underflow in dt" not in str(error):
            raise
        raise ArgumentError(
            f"`rtol` = {rtol:g} and `atol` = {atol:g} cannot be met, steps fell to rounding: use 1e-12 or more, and 1e-6 or more with a "
            "float32 network."
        ) from error


def _standard_error(dets: Tensor) -> Tensor:
    K = dets.shape[1]
    return dets.std(1) / math.sqrt(K) if K > 1 else torch.full_like(dets[:, 0], math.nan)


def _signs(x: Tensor, probes: int, seed: int, first: int) -> Tensor:
    """(K, B, *event)."""
    check_int("probes", probes, 1, "leave it out for the exact divergence in up to `exact_up_to` dimensions")
    return torch.where(item_normals(x, probes, seed, first, PROBE_STREAM) > 0, 1.0, -1.0).to(x.dtype)


def _basis(x: Tensor) -> Tensor:
    """The unit vectors, the same in all rows: (d, 1, *event)."""
    d = x[0].numel()
    return torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:])


def _networks(predictor: Predictor) -> Iterator[Denoiser]:
    """The networks in a predictor, inside wrappers too."""
    if isinstance(predictor, Denoiser):
        yield predictor
    for name in ("inner", "conditional", "unconditional"):
        branch = getattr(predictor, name, None)
        if isinstance(branch, Predictor):
            yield from _networks(branch)


def _wants_gradient(denoiser: Predictor, x: Tensor) -> bool:
    """Whether anything requires a gradient."""
    with torch.enable_grad():
        return x.requires_grad or denoiser.velocity(x.detach().clone(), denoiser.schedule.t_max / 2).requires_grad


def _check_networks(denoiser: Predictor, x: Tensor) -> None:
    """Raise unless every network is a differentiable function of its row alone."""
    t, x = denoiser.schedule.t_max / 2, x.detach().clone()
    others_moved = torch.cat((x[:1], x[1:] + 1))
    for network in _networks(denoiser):
        with torch.enable_grad():
            here = x.clone().requires_grad_()
            out = network.raw(here, t)
            if not out.requires_grad or torch.autograd.grad(out.sum(), here, allow_unused=True)[0] is None:
                raise DetachedError(
                    "the network's result is cut off from x, and its part of the divergence would be missing: take torch.no_grad(), "
                    "inference_mode or detach() out of it."
                )
            again = network.raw(others_moved, t)
        close = 100 * torch.finfo(x.dtype).eps * (1 + out[0].abs().max())
        if bool(((again[0] - out[0]).abs() > close).any()):
            raise NotAFunctionError(
                "the network gives one row two values, so it is random, or depends on the other rows: net.eval() turns off dropout and "
                "batch statistics."
            )


def _check(denoiser, x, t_min) -> tuple[float, float]:
    """The time span; raise unless the rest is fit for use."""
    check_predictor("denoiser", denoiser)
    check_rows(x)
    if not x.is_floating_point():
        raise DtypeError(f"`x` must be floating, got {x.dtype}: data on a grid have no density, see `dequantise`.")
    _check_finite(x, "`x` holds infinite or NaN values", "remove them")
    t_max = denoiser.schedule.t_max
    t_min = T_MIN * t_max if t_min is None else t_min
    if isinstance(t_min, bool) or not isinstance(t_min, int | float) or not 0 < t_min < t_max:
        raise GridError(
            f"`t_min` must lie strictly between 0 and t_max = {t_max:g}, got {t_min!r}: at 0 there is no score, {T_MIN * t_max:g} is usual."
        )
    return float(t_min), t_max


def _check_finite(values: Tensor, what: str, remedy: str, time: float | None = None) -> None:
    bad = (~torch.isfinite(values.detach())).flatten(1).any(1).nonzero()[:, 0].tolist()
    if bad:
        message = f"{what}, in {len(bad)} of {len(values)} rows, the first of them row {bad[0]}: {remedy}."
        raise NonFiniteError(message, paths=tuple(bad[:5]), n_bad=len(bad), time=time)


def _check_solver(rtol, atol, method, max_evaluations) -> None:
    for name, value in (("rtol", rtol), ("atol", atol), ("max_evaluations", max_evaluations)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ArgumentError(f"`{name}` must be a positive number, got {value!r}: leave it out for the usual one.")
    if method not in ADAPTIVE:
        raise ArgumentError(f"`method` must be one of {', '.join(ADAPTIVE)}, which choose their steps, got {method!r}.")
