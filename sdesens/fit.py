"""Fitting an SDE to a series observed at equal intervals, by the moments of its transitions.

With h the coordinates in which moments are taken (h = log for populations), m_k(theta) and V_k(theta) mean and covariance of h(X) one
interval after X = Y_k, and r_k = h(Y_{k+1}) - m_k, the estimate minimises

    L(theta) = sum_k r_k^T V_k^-1 r_k / 2 + log det V_k / 2.                                       (1)

Its slope has mean zero where m_k and V_k are the data's own conditional moments, whatever the rest of their law; if h(X) is normal
given Y_k, (1) is minus the log-likelihood. Moments come from M antithetic paths a transition, on noise that stays: (1) is then a smooth
function of theta, whose gradient is that of the integrator, and an optimiser that wants smooth functions converges to its last digits.
For normal h(X) the mean is exact and V_hat has nu = M/2 degrees of freedom, so that

    E[V_hat^-1] = V^-1 nu/(nu - d - 1),    E[log det V_hat] = log det V + sum_{i<d} psi((nu - i)/2) + d log(2/nu),       (2)

psi being the digamma function (T. Anderson, An Introduction to Multivariate Statistical Analysis, 2003, sections 7.5 and 7.7). The first
term of (1) is divided by the one, and the log-likelihood freed of the other.

Standard errors are those of the expected information,

    I = sum_k (dm_k)^T V_k^-1 dm_k + tr(V_k^-1 dV_k V_k^-1 dV_k) / 2,      covariance = I^-1,      (3)

right where h(X) is about normal given Y_k, and the series long enough for the estimate to be about normal too.

Reference: H. White, Econometrica 50 (1982) 1, estimates by a normal likelihood where the law is another;
A. Pedersen, Scand. J. Statist. 22 (1995) 55, transitions by simulation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, NonFiniteError, UnknownParameterError
from sdesens.sde import SDE, as_sde, matching
from sdesens.transitions import split, transitions

MOST_WITH_ERRORS = 64  # parameters
RESTARTS = 8
WALL = 1.0  # how steep the bowl is, in units of the misfit
FLAT = 1e-5  # largest slope of a minimum, in units of the misfit


@dataclass(frozen=True, eq=False)
class Fit:
    """An SDE fitted to a series.

    Attributes
    ----------
    sde : SDE
        With the estimates as its parameters.
    standard_errors : dict of Tensor
        By name, equation (3); empty where they were not wanted.
    covariance : Tensor (P, P) or None
        Of the estimates, in the order of `names`.
    names : tuple of str
        What was fitted; a parameter of several numbers takes as many places.
    loss : float
        Equation (1).
    log_likelihood : float
        -(1) with the normal's constant, in the coordinates h, freed of the bias that sampled V give it; `seed` moves it by some
        d sqrt(K/M), K transitions.
    n : int
        Transitions.
    iterations : int
    converged : bool
        Whether it stands where (1) is flat; the optimiser's own words in `message`.
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


def fit_transitions(
    sde,
    series: Tensor | Sequence[Tensor],
    dt: float,
    *,
    n_steps: int,
    wrt: Sequence[str] | str | None = None,
    positive: Sequence[str] | str = (),
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
    wrt : names or patterns ("net.*"), optional
        What is fitted; all parameters if left out.
    positive : names
        Of those that stay above 0; they are sought in their logarithm. A volatility that is not among them may come out negative, which is the
        same law.
    transform : callable (B, d) -> (B, d), optional
        h; `torch.log` for what is positive. The state itself if left out.
    n_paths : int
        M, even; the estimate varies with `seed` by some 2/sqrt(M) of its standard error, more if residuals are heavy-tailed.
    seed : int
    ridge : float
        For networks: ridge |theta|^2 / 2 is added to (1), a normal prior of variance 1/ridge on each weight. Without it a network finds
        places where few transitions start, and gives them no volatility.
    errors : bool
        Whether to compute equation (3); not for networks.
    max_iterations : int
        Of L-BFGS (scipy).

    Returns
    -------
    Fit

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError, UnknownParameterError
    NonFiniteError
        If the model cannot leave the data where the search starts: equation (1), or its slope, is not finite there.

    Warns
    -----
    HighVarianceWarning
        If the series does not tell the parameters apart; the fit then has no standard errors.

    Example
    -------
    >>> from sdesens import sdeint
    >>> ou = SDE(lambda t, y, p: -p["k"] * y, lambda t, y, p: p["s"].expand_as(y), {k: torch.tensor(1.0, dtype=torch.float64) for k in "ks"})
    >>> series = sdeint(ou, torch.zeros(1, 1, dtype=torch.float64), [0.1 * i for i in range(201)], n_steps=200, seed=3)[:, 0]
    >>> fit = fit_transitions(ou, series, 0.1, n_steps=1, positive=("k", "s"), n_paths=100)
    >>> fit.converged, bool((fit.sde.params["s"] - 1).abs() < 3 * fit.standard_errors["s"])
    (True, True)
    """
    sde = sde if isinstance(sde, SDE) else as_sde(sde)
    names, positive = _names(sde, wrt, positive)
    task = transitions(sde, series, dt, n_steps, transform, n_paths, seed)
    _check_options(ridge, errors, max_iterations, sum(sde.params[k].numel() for k in names))
    start = {k: sde.params[k].detach().clone() for k in names}
    for k in positive:
        if not bool((start[k] > 0).all()):
            raise ArgumentError(f"`positive` names {k!r}, which starts at {start[k].tolist()}: start above 0.")
    units = {k: 1.0 if k in positive else float(v.abs().max()) or 1.0 for k, v in start.items()}

    def params(x: Tensor) -> dict[str, Tensor]:
        return {k: v.exp() if k in positive else units[k] * v for k, v in split(x, start).items()}

    def value_and_slope(x: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.enable_grad():
            at = torch.tensor(x, requires_grad=True)
            theta = params(at)
            value = task.loss(theta) + ridge * sum(v.square().sum() for v in theta.values()) / 2
            if not bool(torch.isfinite(value)):
                return math.inf, x
            (slope,) = torch.autograd.grad(value, at)
        return (float(value.detach()) if bool(torch.isfinite(slope).all()) else math.inf), slope.numpy()

    x0 = torch.cat([(v.log() if k in positive else v / units[k]).flatten() for k, v in start.items()]).numpy()
    found = _search(value_and_slope, x0, max_iterations)
    best = params(torch.from_numpy(found.x))
    n, d = task.ends.shape
    with torch.no_grad():
        loss = float(task.loss(best))
    covariance = task.covariance(best) if errors else None
    own = {} if covariance is None else split(covariance.diagonal().sqrt(), best)
    likelihood = -loss + n * task.log_det_bias / 2 - n * d / 2 * math.log(2 * math.pi)
    fitted = sde.with_params(**{k: v.detach().clone() for k, v in {**sde.params, **best}.items()})
    return Fit(fitted, own, covariance, names, loss, likelihood, n, found.iterations, found.converged, found.message)


class _Found(NamedTuple):
    x: np.ndarray
    iterations: int
    converged: bool
    message: str


def _search(value_and_slope: Callable, x0: np.ndarray, max_iterations: int) -> _Found:
    """L-BFGS, begun anew from the best point while that is not flat: it may be led astray where the misfit is not finite."""
    best = [*value_and_slope(x0), x0]
    if not math.isfinite(best[0]):
        raise NonFiniteError(
            "the misfit, or its slope, is not finite at the parameters that `sde` has: start where the model can reach the data, or take more steps.",
            step=0,
        )

    def walled(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = value_and_slope(x)
        if value < best[0]:
            best[:] = [value, slope, x.copy()]
        if math.isfinite(value):
            return value, slope
        back = x - best[2]  # a bowl around the best point, which sends a line search back
        return best[0] + WALL * (1 + abs(best[0])) * (1 + float(back @ back)), 2 * WALL * (1 + abs(best[0])) * back

    done, message = 0, ""
    for _ in range(RESTARTS):
        options = {"maxiter": max_iterations - done, "maxfun": 20 * max_iterations, "ftol": 1e-14, "gtol": 1e-8}
        found = minimize(walled, best[2], jac=True, method="L-BFGS-B", options=options)
        done, message = done + max(int(found.nit), 1), str(found.message)
        if _flat(best) or done >= max_iterations:
            break
    return _Found(best[2], done, _flat(best), message)


def _flat(best: list) -> bool:
    return float(np.abs(best[1]).max()) < FLAT * max(1.0, abs(best[0]))


def _check_options(ridge, errors, max_iterations, size: int) -> None:
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < math.inf:
        raise ArgumentError(f"`ridge` must be a number, 0 or more, got {ridge!r}.")
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int) or max_iterations < 1:
        raise ArgumentError(f"`max_iterations` must be an int, 1 or more, got {max_iterations!r}.")
    if not isinstance(errors, bool):
        raise ArgumentTypeError(f"`errors` must be True or False, got {errors!r}.")
    if errors and size > MOST_WITH_ERRORS:
        raise ArgumentError(f"`errors` is for up to {MOST_WITH_ERRORS} numbers, got {size}: errors=False.")


def _names(sde: SDE, wrt, positive) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for what, given, among in (("wrt", "*" if wrt is None else wrt, tuple(sde.params)), ("positive", positive, None)):
        patterns = (given,) if isinstance(given, str) else given
        if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
            raise ArgumentTypeError(f"`{what}` must be a name or a tuple of names, got {given!r:.60}.")
        known = found[0] if among is None else among
        matched = [matching(p, known) for p in patterns]
        if (missing := [p for p, m in zip(patterns, matched, strict=True) if not m]) and (known or among is None):
            raise UnknownParameterError(f"`{what}` names {missing[0]!r}, which is none of {', '.join(known)}.")
        found.append(tuple(name for m in matched for name in m))
    if not found[0] or len(set(found[0])) < len(found[0]):
        raise ArgumentError(f"`wrt` must name one parameter or more, each once, got {wrt!r:.60}.")
    return found[0], found[1]
