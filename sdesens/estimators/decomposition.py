"""The two terms of the gradient of an expectation, each by quadrature and by Monte Carlo.

    grad E[f] = int f(z, p) grad q(z; p) dz  +  int q(z; p) grad f(z, p) dz                      (1)

The second integral is an expectation, whatever the law. The first is not one as it stands: that needs a density whose gradient can
be written as q times something (the score function), or a draw that moves with the parameters (pathwise). Here it is computed as
the integral it is, beside both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table
from scipy import integrate
from torch import Tensor

from sdesens.errors import ArgumentError, DetachedError, JumpError, MethodError
from sdesens.estimate import Estimate
from sdesens.estimators.checks import refuse_explicit_jump
from sdesens.estimators.draws import evaluate
from sdesens.estimators.enumeration import values_of_component
from sdesens.estimators.gradient import expectation_gradient
from sdesens.estimators.laws import Law
from sdesens.estimators.model import Function, Question, ask, detached, law_at, with_graph
from sdesens.estimators.run import NO_CHOICE, Task, example_draws
from sdesens.noise import Philox
from sdesens.tables import as_text
from sdesens.tensors import coordinate_names

TOLERANCE = 1e-9
DISAGREE = 8.0  # standard errors
SUBDIVISIONS = 20_000
POSITIONED = 2_000  # draws that say where the law is


@dataclass(frozen=True)
class Term:
    """One parameter's share of equation (1): the two integrals, and Monte Carlo estimates of both and of their sum by method."""

    density: Tensor
    explicit: Tensor
    density_by: dict[str, Estimate]
    explicit_by: dict[str, Estimate]
    total_by: dict[str, Estimate]

    @property
    def total(self) -> Tensor:
        return self.density + self.explicit


@dataclass(frozen=True)
class Decomposition:
    """The answer of `decompose`.

    Attributes
    ----------
    terms : dict of Term
        By parameter.
    error : float
        Estimated error of the integrals.
    refused : dict of str
        Monte Carlo methods that f forbids, and why.
    """

    terms: dict[str, Term]
    error: float
    refused: dict[str, str]

    def table(self) -> Table:
        """One line for each coordinate and term."""
        methods = list(next(iter(self.terms.values())).total_by)
        table = Table("d/d", "term", "quadrature", *(f"Monte Carlo: {m}" for m in methods))
        for name, term in self.terms.items():
            lines = (
                ("int f grad q dz", term.density, term.density_by),
                ("E grad f", term.explicit, term.explicit_by),
                ("sum", term.total, term.total_by),
            )
            for i, where in enumerate(coordinate_names(name, term.density.shape)):
                for label, integral, by in lines:
                    found = [f"{e.mean.flatten()[i]:.6g} +- {e.standard_error.flatten()[i]:.2g}" for e in by.values()]
                    table.add_row(where, label, f"{integral.flatten()[i]:.8g}", *found)
        return table

    def __repr__(self) -> str:
        return as_text(self.table())


def decompose(
    model: Any, f: Function, params: Mapping[str, Tensor], *, n_samples: int = 100_000, seed: int | None = None
) -> Decomposition:
    """Both terms of equation (1) for a continuous law in one or two dimensions.

    Parameters
    ----------
    model, f, params
        As for `expectation_gradient`; the law needs a density.
    n_samples, seed
        Of the Monte Carlo runs: pathwise where the draw is reparameterised, and the score function.

    Raises
    ------
    ArgumentError
        If the law has no density, is discrete or has more than two dimensions, or if an integral does not converge.
    JumpError
        If f jumps in the parameters at a fixed draw: the second integral would miss the jump.

    Example
    -------
    >>> from sdesens.estimators import Normal
    >>> params = {k: torch.tensor(v, dtype=torch.float64) for k, v in {"mean": 1.0, "scale": 1.0, "a": 3.0}.items()}
    >>> found = decompose(Normal, lambda z, p: p["a"] * z**2, params, n_samples=1000)
    >>> round(float(found.terms["mean"].density), 6), round(float(found.terms["a"].explicit), 6)
    (6.0, 2.0)
    """
    question = detached(ask(model, f, params, None, None))
    law = with_graph(question)
    reason = law.no_density()
    if reason is not None:
        raise ArgumentError(f"the law has no density to integrate: {reason}.")
    z = example_draws(question, law, POSITIONED)
    if values_of_component(law) is not None or bool((z == z.round()).all()):
        raise ArgumentError("the law is discrete: its integral is the sum that method='enumerate' takes.")
    p = question.params
    refuse_explicit_jump(Task(question, NO_CHOICE, Philox(0), law, False))
    density, explicit, error = _integrals(question, law, z)

    def frozen_law(_: Mapping[str, Tensor]) -> Law:
        return law_at(model, None, p)

    by: dict[str, tuple[dict[str, Estimate], ...]] = {}
    refused = {}
    for m in ("pathwise", "score_function"):
        run = partial(expectation_gradient, params=p, n_samples=n_samples, seed=seed, method=m)
        try:
            whole = run(model, f)
        except (DetachedError, JumpError, MethodError) as reason_why:
            refused[m] = str(reason_why)
            continue
        first = run(model, lambda z, _: f(z, p), check=False)
        second = run(frozen_law, f, check=False)
        by[m] = first.gradient, second.gradient, whole.gradient
    _check_agreement(density, explicit, by)
    terms = {k: Term(density[k], explicit[k], *({m: g[i][k] for m, g in by.items()} for i in range(3))) for k in p}
    return Decomposition(terms, error, refused)


def _integrals(question: Question, law: Law, z: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Both integrals by parameter, and the estimated error; some draws z say where the law is."""
    event, ndim = z.shape[1:], z[0].numel()
    if ndim > 2:
        raise ArgumentError(
            f"quadrature is for draws of one or two numbers, the law's have {ndim}: compare Monte Carlo methods."
        )
    middle, spread = (t.flatten().double().numpy() for t in (z.mean(0), z.std(0)))
    low, high = ((np.full(ndim, edge) - middle) / spread for edge in law.bounds)

    @torch.enable_grad()
    def integrand(u: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(middle + spread * u).to(z.dtype).reshape(-1, *event)
        leaves = {k: v.detach().requires_grad_() for k, v in question.theta.items()}
        q = torch.exp(question.law(leaves).log_prob(at).reshape(len(at), -1).sum(1))
        value = evaluate(question.f, at, None, leaves)[:, 0]
        parts = (_jacobian(q, leaves) * value[:, None], _jacobian(value, leaves) * q[:, None], q[:, None])
        rows = torch.cat(parts, 1)
        return np.nan_to_num(rows.detach().double().numpy()) * spread.prod()

    tolerance = max(TOLERANCE, 50 * torch.finfo(z.dtype).eps)
    try:
        with np.errstate(all="ignore"):  # what is infinite is refused below
            found = integrate.cubature(
                integrand, low, high, rtol=tolerance, atol=tolerance, max_subdivisions=SUBDIVISIONS
            )
    except ValueError as reason:
        raise ArgumentError(
            f"the density cannot be integrated over {law.bounds}: {str(reason).splitlines()[0]}"
        ) from reason
    error = float(np.max(found.error))
    if found.status != "converged" or not math.isfinite(error):
        raise ArgumentError(
            f"an integral did not converge, its error is about {error:.1g}: f or the density is too rough."
        )
    mass = float(found.estimate[-1])
    if abs(mass - 1) > 1e-4:
        raise ArgumentError(
            f"the density integrates to {mass:.6g} instead of 1: it is not normalised, is no density, or its mass lies in places "
            "that quadrature does not find."
        )
    integrals = torch.from_numpy(found.estimate[:-1])
    halves = integrals.split(len(integrals) // 2)
    parts = [
        dict(zip(question.theta, h.split([v.numel() for v in question.theta.values()]), strict=True)) for h in halves
    ]
    density, explicit = ({k: g.reshape(question.theta[k].shape) for k, g in part.items()} for part in parts)
    return density, explicit, error


def _check_agreement(density: Mapping[str, Tensor], explicit: Mapping[str, Tensor], by: Mapping) -> None:
    """Raise where quadrature and Monte Carlo contradict each other: a spike of f that the nodes miss."""
    for method, (first, second, _) in by.items():
        for integrals, estimates in ((density, first), (explicit, second)):
            for k, integral in integrals.items():
                e = estimates[k]
                gap = (e.mean - integral).abs() - 1e-6 * (1 + integral.abs())
                if bool((gap > DISAGREE * e.standard_error).any()):
                    raise ArgumentError(
                        f"quadrature and {method} contradict each other for {k!r} by more than {DISAGREE:g} standard errors: f has a "
                        "feature that is too narrow for the nodes, or too rare for the draws."
                    )


def _jacobian(y: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    """dy/dtheta for y (n,), shape (n, P), one parameter at a time: the transpose of the transpose."""
    width = sum(v.numel() for v in leaves.values())
    if not y.requires_grad:
        return torch.zeros(len(y), width, dtype=y.dtype)
    w = torch.zeros_like(y, requires_grad=True)
    found = torch.autograd.grad(y, list(leaves.values()), w, create_graph=True, allow_unused=True)
    columns = []
    for g, v in zip(found, leaves.values(), strict=True):
        if g is None:
            columns += [torch.zeros_like(y)] * v.numel()
        else:
            columns += [torch.autograd.grad(part, w, retain_graph=True)[0] for part in g.flatten()]
    return torch.stack(columns, 1)
