"""Fitting an SDE to a series observed at equal intervals, by the moments of its transitions.

With h the coordinates in which moments are taken (h = log for populations), m_k(theta) and V_k(theta) mean and covariance of h(X) one
interval after X = Y_k, and r_k = h(Y_{k+1}) - m_k, the estimate minimises

    L(theta) = sum_k r_k^T V_k^-1 r_k / 2 + log det V_k / 2.                                       (1)

Its slope has mean zero where m_k and V_k are the data's own conditional moments, whatever the rest of their law; if h(X) is normal
given Y_k, (1) is minus the log-likelihood. Moments come from M antithetic paths a transition, on noise that stays: (1) is then a smooth
function of theta, whose gradient is that of the integrator, and an optimiser that wants smooth functions converges to its last digits.
For normal h(X) the mean is exact and V_hat has M/2 degrees of freedom, so that E[V_hat^-1] = V^-1 (M/2)/(M/2 - d - 1)
(T. Anderson, An Introduction to Multivariate Statistical Analysis, 2003, section 7.7); the first term of (1) is divided by that.

Standard errors are those of the expected information,

    I = sum_k (dm_k)^T V_k^-1 dm_k + tr(V_k^-1 dV_k V_k^-1 dV_k) / 2,      covariance = I^-1,      (2)

right where h(X) is about normal given Y_k, and the series long enough for the estimate to be about normal too.

Reference: H. White, Econometrica 50 (1982) 1, estimates by a normal likelihood where the law is another;
A. Pedersen, Scand. J. Statist. 22 (1995) 55, transitions by simulation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import minimize
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, NonFiniteError, ShapeError, UnknownParameterError
from sdesens.integrate import sdeint
from sdesens.noise import Antithetic, Philox
from sdesens.sde import SDE, as_sde
from sdesens.tensors import describe

MOST_WITH_ERRORS = 64  # parameters


@dataclass(frozen=True, eq=False)
class Fit:
    """An SDE fitted to a series.

    Attributes
    ----------
    sde : SDE
        With the estimates as its parameters.
    standard_errors : dict of Tensor
        By name, equation (2); empty where they were not wanted.
    covariance : Tensor (P, P) or None
        Of the estimates, in the order of `names`.
    names : tuple of str
        What was fitted; a parameter of several numbers takes as many places.
    loss : float
        Equation (1).
    log_likelihood : float
        -(1) with the normal's constant, in the coordinates h.
    n : int
        Transitions.
    iterations : int
    converged : bool
        Whether the optimiser was content; its own words in `message`.
    message : str
    """

    sde: SDE
    standard_errors: dict[str, Tensor]
    covariance: Tensor | None
    names: tuple[str, ...]
    loss: float
    log_likelihood: float
    n: int
    iterations: int
    converged: bool
    message: str

    def __repr__(self) -> str:
        lines = [
            f"Fit to {self.n} transitions, log-likelihood {self.log_likelihood:.4f}, {self.iterations} iterations{'' if self.converged else ', NOT converged'}"
        ]
        for name in self.names:
            value = self.sde.params[name]
            if value.numel() > 1:
                lines.append(f"  {name}: {tuple(value.shape)}")
            elif name in self.standard_errors:
                lines.append(
                    f"  {name:<12} {float(value):.4g} +/- {1.96 * float(self.standard_errors[name]):.2g} (95%)"
                )
            else:
                lines.append(f"  {name:<12} {float(value):.4g}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Transitions:
    """Equation (1) as a function of the parameters."""

    sde: SDE
    starts: Tensor
    ends: Tensor
    dt: float
    n_steps: int
    n_paths: int
    transform: Callable[[Tensor], Tensor]
    seed: int

    def moments(self, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """m (K, d) and V (K, d, d)."""
        start = self.starts.repeat_interleave(self.n_paths, 0)
        sde = self.sde.with_params(**params)
        ends = sdeint(sde, start, (0.0, self.dt), n_steps=self.n_steps, bm=Antithetic(Philox(self.seed)), check=False)[
            -1
        ]
        x = self.transform(ends).unflatten(0, (-1, self.n_paths))
        mean = x.mean(1)
        off = x - mean[:, None]
        return mean, off.mT @ off / self.n_paths

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        """Equation (1)."""
        mean, V = self.moments(params)
        half, d = self.n_paths / 2, mean.shape[1]
        root, failed = torch.linalg.cholesky_ex(V)
        if bool(failed.any()):
            return torch.full((), math.inf, dtype=mean.dtype)
        residual = (self.transform(self.ends) - mean)[..., None]
        w = torch.linalg.solve_triangular(root, residual, upper=False)
        inflated = half / (half - d - 1)
        return w.square().sum() / (2 * inflated) + root.diagonal(dim1=1, dim2=2).log().sum()


def fit_transitions(
    sde,
    series: Tensor | Sequence[Tensor],
    dt: float,
    *,
    n_steps: int,
    wrt: Sequence[str] | None = None,
    positive: Sequence[str] = (),
    transform: Callable[[Tensor], Tensor] | None = None,
    n_paths: int = 400,
    seed: int = 0,
    ridge: float = 0.0,
    errors: bool = True,
    max_iterations: int = 500,
) -> Fit:
    """Fit an SDE to a series, equation (1).

    Parameters
    ----------
    sde : SDE, or a torchsde-style module
        Its parameters are where the search starts. Its coefficients may not depend on time: every transition starts at t = 0.
    series : Tensor (K + 1, d), float64, or a list of such
        What was observed, in order; several series share the model and are not joined.
    dt : float
        Time between observations.
    n_steps : int
        Euler-Maruyama steps an interval.
    wrt : names, optional
        What is fitted; all parameters if left out.
    positive : names
        Of those that stay above 0; they are sought in their logarithm.
    transform : callable (B, d) -> (B, d), optional
        h; `torch.log` for what is positive. The state itself if left out.
    n_paths : int
        M, even; the estimate varies with `seed` by some 2/sqrt(M) of its standard error, more if residuals are heavy-tailed.
    seed : int
    ridge : float
        For networks: ridge |theta|^2 / 2 is added to (1), a normal prior of variance 1/ridge on each weight. Without it a network finds
        places where few transitions start, and gives them no volatility.
    errors : bool
        Whether to compute equation (2); not for networks.
    max_iterations : int
        Of L-BFGS (scipy).

    Returns
    -------
    Fit

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError, UnknownParameterError
    NonFiniteError
        If the model cannot leave the data where the search starts: equation (1) is not finite there.

    Example
    -------
    >>> from sdesens import Philox
    >>> ou = SDE(lambda t, y, p: -p["k"] * y, lambda t, y, p: p["s"].expand_as(y), {k: torch.tensor(1.0, dtype=torch.float64) for k in "ks"})
    >>> series = sdeint(ou, torch.zeros(1, 1, dtype=torch.float64), [0.1 * i for i in range(201)], n_steps=200, seed=3)[:, 0]
    >>> fit = fit_transitions(ou, series, 0.1, n_steps=1, positive=("k", "s"), n_paths=100)
    >>> fit.converged, bool((fit.sde.params["s"] - 1).abs() < 3 * fit.standard_errors["s"])
    (True, True)
    """
    sde = sde if isinstance(sde, SDE) else as_sde(sde)
    names = _names(sde, wrt, positive)
    task = _task(sde, series, dt, n_steps, transform, n_paths, seed)
    start = {k: sde.params[k].detach().to(torch.float64) for k in names}
    logs = {k: k in positive for k in names}
    for k in positive:
        if not bool((start[k] > 0).all()):
            raise ArgumentError(f"`positive` names {k!r}, which starts at {start[k].tolist()}: start above 0.")

    def params(x: Tensor) -> dict[str, Tensor]:
        parts = x.split([start[k].numel() for k in names])
        values = {k: part.reshape(start[k].shape) for k, part in zip(names, parts, strict=True)}
        return {k: v.exp() if logs[k] else v for k, v in values.items()}

    def value_and_slope(x):
        at = torch.tensor(x, requires_grad=True)
        loss = task.loss(params(at)) + ridge * at.square().sum() / 2
        if not bool(torch.isfinite(loss)):
            return math.inf, 0 * x
        return float(loss.detach()), torch.autograd.grad(loss, at)[0].numpy()

    x0 = torch.cat([(v.log() if logs[k] else v).flatten() for k, v in start.items()]).numpy()
    if not math.isfinite(value_and_slope(x0)[0]):
        raise NonFiniteError(
            "the misfit is not finite at the parameters that `sde` has: start where the model can reach the data, or take more steps.",
            step=0,
        )
    found = minimize(value_and_slope, x0, jac=True, method="L-BFGS-B", options={"maxiter": max_iterations, "maxfun": 10 * max_iterations, "ftol": 1e-13, "gtol": 1e-7})  # fmt: skip
    with torch.no_grad():
        best = {k: v.to(sde.params[k].dtype) for k, v in params(torch.from_numpy(found.x)).items()}
    n, d = task.ends.shape
    covariance = _covariance(task, best) if errors else None
    own = {} if covariance is None else _split(covariance.diagonal().sqrt(), best)
    with torch.no_grad():
        loss = float(task.loss(best))
    likelihood = -loss - n * d / 2 * math.log(2 * math.pi)
    return Fit(sde.with_params(**best), own, covariance, names, loss, likelihood, n, int(found.nit), bool(found.success), str(found.message))  # fmt: skip


def _covariance(task: Transitions, params: dict[str, Tensor]) -> Tensor:
    """The inverse of equation (2)."""
    flat = torch.cat([v.flatten() for v in params.values()])
    if len(flat) > MOST_WITH_ERRORS:
        raise ArgumentError(f"`errors` is for up to {MOST_WITH_ERRORS} numbers, got {len(flat)}: errors=False.")

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return task.moments(_split(x, params))

    dm, dV = torch.autograd.functional.jacobian(moments, flat)
    with torch.no_grad():
        inverse = torch.linalg.inv(moments(flat)[1])
        half = torch.einsum("kij,kjlp->kilp", inverse, dV)
        information = torch.einsum("kip,kij,kjq->pq", dm, inverse, dm) + torch.einsum("kijp,kjiq->pq", half, half) / 2
        if not bool((torch.linalg.eigvalsh(information) > 1e-12 * information.diagonal().max()).all()):
            raise ArgumentError(
                "the series does not tell the parameters apart, their information is singular: fit fewer (`wrt`), or errors=False."
            )
        return torch.linalg.inv(information)


def _split(x: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = x.split([v.numel() for v in like.values()])
    return {k: part.reshape(v.shape) for (k, v), part in zip(like.items(), parts, strict=True)}


def _names(sde: SDE, wrt, positive) -> tuple[str, ...]:
    names = tuple(sde.params) if wrt is None else (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name, among, what in (
        *((k, tuple(sde.params), "wrt") for k in names),
        *((k, names, "positive") for k in positive),
    ):
        if name not in among:
            raise UnknownParameterError(f"`{what}` names {name!r}, which is none of {', '.join(among)}.")
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"`wrt` must name one parameter or more, each once, got {names!r}.")
    return names


def _task(sde: SDE, series, dt, n_steps, transform, n_paths, seed) -> Transitions:
    several = [series] if isinstance(series, Tensor) else series
    if not isinstance(several, list | tuple) or not several:
        raise ArgumentTypeError(f"`series` must be a tensor (K + 1, d), or a list of them, got {describe(series)}.")
    h = transform or (lambda y: y)
    for one in several:
        _check_series(one, several[0], h)
    starts, ends = (torch.cat([one[part] for one in several]) for part in (slice(None, -1), slice(1, None)))
    if isinstance(dt, bool) or not isinstance(dt, int | float) or not (0 < dt < math.inf):
        raise ArgumentError(f"`dt` must be a time above 0, got {dt!r}.")
    least = 2 * (h(ends).shape[1] + 2)
    if isinstance(n_paths, bool) or not isinstance(n_paths, int) or n_paths < least or n_paths % 2:
        raise ArgumentError(f"`n_paths` must be an even int, {least} or more, got {n_paths!r}: 400 is usual.")
    for coefficient in (sde.drift, sde.diffusion):
        early, late = (coefficient(torch.tensor(t, dtype=torch.float64), starts, sde.params) for t in (0.0, 0.7 * dt))
        if not torch.equal(early, late):
            raise ArgumentError(
                "`sde` must not depend on time, as every transition starts at t = 0: make time a state."
            )
    return Transitions(sde, starts, ends, float(dt), n_steps, n_paths, h, seed)


def _check_series(series, first, transform: Callable[[Tensor], Tensor]) -> None:
    if not isinstance(series, Tensor) or series.dtype != torch.float64:
        raise ArgumentTypeError(
            f"`series` must be float64 tensors (K + 1, d), got {describe(series)}: torch.tensor(..., dtype=torch.float64)."
        )
    if series.dim() != 2 or len(series) < 2 or not series.shape[1] or series.shape[1] != first.shape[1]:
        raise ShapeError(
            f"`series` must have shape (K + 1, d), one transition or more and one d for all, got {tuple(series.shape)}: x[:, None] for one number a time."
        )
    seen = transform(series)
    if not isinstance(seen, Tensor) or seen.dim() != 2 or len(seen) != len(series):
        raise ShapeError(f"`transform` must keep the rows of (B, d), got {describe(seen)} of {tuple(series.shape)}.")
    if bad := (~torch.isfinite(seen)).any(1).nonzero().flatten().tolist():
        raise ArgumentError(
            f"`series` is NaN, infinite, or beyond `transform` in {len(bad)} rows, the first is row {bad[0]}: {series[bad[0]].tolist()}."
        )
