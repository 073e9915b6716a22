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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint

from sdesens.diffusion.attached import check_derivative, check_networks
from sdesens.diffusion.checks import number, whole
from sdesens.diffusion.draws import check_items, first_time, item_normals
from sdesens.diffusion.predict import Predictor, check_predictor
from sdesens.diffusion.schedule import Schedule
from sdesens.diffusion.streams import PROBES
from sdesens.diffusion.values import bad_rows, like
from sdesens.errors import ArgumentError, MethodError, NonFiniteError

EXACT_UP_TO, N_PROBES = 64, 8
FIRST_STEP = 1e-3  # of the time span; a constant, for gradients would flow through a step that torchdiffeq chooses
ADAPTIVE = ("dopri5", "dopri8", "bosh3")


@dataclass(frozen=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        mean, n = float(self.log_prob.detach().mean()), len(self.log_prob)
        return f"LogProb({n} rows, mean {mean:.6g} nats, {self.evaluations} evaluations)"


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
    first_item: int = 0,
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
        Directions of an estimated divergence, equation (2): signs, those of row i a function of (seed, first_item + i) alone.
        Left out, the divergence is exact in up to `exact_up_to` dimensions, and has 8 probes beyond.
    exact_up_to, seed, first_item : int
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
    ArgumentError, ArgumentTypeError
        For tolerances that cannot be met and other bad arguments; GridError for t_min, ShapeError and DtypeError for x.
    MethodError
        If torch cannot take all directions backwards at once.

    Example
    -------
    >>> from sdesens.diffusion import VP, Denoiser
    >>> normal = Denoiser(lambda x, t: x * VP().sigma(t)[:, None].to(x), VP(), "eps")  # exact for N(0, I)
    >>> log_prob(normal, torch.zeros(1, 2)).log_prob  # -log 2 pi
    tensor([-1.8379], dtype=torch.float64)
    """
    _check(denoiser, x, rtol, atol, exact_up_to, method, max_evaluations)
    span = first_time(denoiser.schedule, t_min, allow_zero=False), denoiser.schedule.t_max
    d, exact = x[0].numel(), probes is None and x[0].numel() <= exact_up_to
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False):  # this turns recording on
        check_networks(denoiser, x)
        check_derivative(denoiser, x)
        keep = recording and _wants_gradient(denoiser, x)
        directions = _basis(x) if exact else _signs(x, N_PROBES if probes is None else probes, seed, first_item)
        clock, span = _clock(denoiser.schedule, *span)
        flow = _Flow(denoiser, clock, x, directions, exact, keep, vectorise, max_evaluations)
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
    clock: Callable[[Tensor], tuple[Tensor, Tensor]]  # t, and its speed
    x: Tensor  # of the shape and dtype that the network knows
    directions: Tensor  # (K, B or 1, *event)
    exact: bool
    keep: bool  # whether gradients are to flow through the result
    vectorise: bool
    limit: int
    evaluations: int = 0

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        t, speed = self.clock(t.cpu())  # a device is asked for the time once
        if self.evaluations >= self.limit:
            raise ArgumentError(
                f"`max_evaluations` = {self.limit} are used up at t = {t.item():.3g}: raise it, or `rtol` and `atol`. A network with jumps, or in "
                "float32 with tolerances below 1e-6, needs many."
            )
        self.evaluations += 1
        with torch.enable_grad():
            rows = state[:, : self.x[0].numel()]
            rows = rows if self.keep and rows.requires_grad else rows.detach().requires_grad_()
            x = rows.reshape(self.x.shape).to(self.x.dtype)
            u = self.denoiser.velocity(x, t) * like(speed, x)
            traces = (self.directions * self._pull(u, x)).to(torch.float64).flatten(2).sum(2)
            traces = traces.sum(0, keepdim=True) if self.exact else traces
            out = torch.cat((u.flatten(1).to(torch.float64), traces.T), 1)
        what = f"the velocity or its divergence is not finite at t = {t.item():.6g}"
        _check_finite(out, what, "look at the network there, or raise `t_min`", t.item())
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


def _clock(schedule: Schedule, t_min: float, t_max: float) -> tuple[Callable, tuple[float, float]]:
    """The solver's time: t, or log-SNR on (0, 1) where rates jump. There the velocity jumps in t, but not in log-SNR."""
    if schedule.smooth:
        return lambda t: (t, torch.ones_like(t)), (t_min, t_max)
    high, low = schedule.log_snr(t_min), schedule.log_snr(t_max)

    def clock(s: Tensor) -> tuple[Tensor, Tensor]:
        t = schedule.t_of_log_snr(high + s * (low - high))
        return t, (low - high) / schedule.log_snr_rate(t)

    return clock, (0.0, 1.0)


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


def _signs(x: Tensor, probes: int, seed: int, first_item: int) -> Tensor:
    """(K, B, *event)."""
    whole("probes", probes, hint="leave it out for the exact divergence in up to `exact_up_to` dimensions")
    return torch.where(item_normals(x, probes, seed, first_item, PROBES) > 0, 1.0, -1.0).to(x.dtype)


def _basis(x: Tensor) -> Tensor:
    """The unit vectors, the same in all rows: (d, 1, *event)."""
    d = x[0].numel()
    return torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:])


def _wants_gradient(denoiser: Predictor, x: Tensor) -> bool:
    """Whether anything requires a gradient."""
    with torch.enable_grad():
        return x.requires_grad or denoiser.velocity(x.detach().clone(), denoiser.schedule.t_max / 2).requires_grad


def _check_finite(values: Tensor, what: str, remedy: str, time: float | None = None) -> None:
    bad = bad_rows(values)
    if bad:
        message = f"{what}, in {len(bad)} of {len(values)} rows, the first of them row {bad[0]}: {remedy}."
        raise NonFiniteError(message, paths=tuple(bad[:5]), n_bad=len(bad), time=time)


def _check(denoiser, x, rtol, atol, exact_up_to, method, max_evaluations) -> None:
    check_predictor("denoiser", denoiser)
    check_items("x", x)
    _check_finite(x, "`x` holds infinite or NaN values", "remove them")
    for name, value in (("rtol", rtol), ("atol", atol)):
        number(name, value, 0.0, hint="leave it out for the usual one")
    whole("exact_up_to", exact_up_to, 0)
    whole("max_evaluations", max_evaluations, hint="leave it out for the usual one")
    if method not in ADAPTIVE:
        raise ArgumentError(f"`method` must be one of {', '.join(ADAPTIVE)}, which choose their steps, got {method!r}.")
