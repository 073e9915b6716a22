"""Problems whose answer is known: a problem beside the formula of its expectation.

    exact(theta)   E F(X) of the SDE,                                                            (1)
    scheme(theta)  E F(X^h) of the Euler-Maruyama chain on the problem's own grid.               (2)

Each formula is written once, in differentiable torch; every gradient is its derivative by autograd. Against (2) an
estimator has no discretisation bias, so its own error stands alone; (2) minus (1) is that bias. This file runs no path.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdesens.errors import ArgumentError
from sdesens.problem import Problem, Theta


@dataclass(frozen=True, eq=False)
class Known:
    """A problem whose answer is known.

    Attributes
    ----------
    problem : Problem
    exact, scheme : callable theta -> 0-dim float64 tensor, or None
        Equations (1) and (2), differentiable by autograd. theta maps names to tensors: parameters of the SDE and "t1", the
        horizon; what it leaves out is taken from the problem. None where no formula is known.
    notes : str
        What a reader of a check should know.

    Example
    -------
    >>> from sdesens.models import brownian
    >>> value, gradient = brownian(mu=1.0, sigma=2.0, x0=0.5, t1=1.0).answers(wrt=("mu", "sigma", "t1"))
    >>> float(value)                                 # (x0 + mu t)^2 + sigma^2 t
    6.25
    >>> {k: float(v) for k, v in gradient.items()}
    {'mu': 3.0, 'sigma': 4.0, 't1': 7.0}
    """

    problem: Problem
    exact: Callable[[Theta], Tensor] | None = None
    scheme: Callable[[Theta], Tensor] | None = None
    notes: str = ""

    @classmethod
    def from_formulas(
        cls,
        problem: Problem,
        exact: Callable[[Mapping[str, Tensor], Tensor], Tensor] | None = None,
        scheme: Callable[[Mapping[str, Tensor], Tensor, int], Tensor] | None = None,
        notes: str = "",
    ) -> "Known":
        """From plain formulas `exact(p, T)` and `scheme(p, T, n_steps)` of float64 parameters and the horizon T = t1 - t0."""
        return cls(
            problem,
            None if exact is None else Formula(problem, exact),
            None if scheme is None else Formula(problem, scheme, (problem.n_steps,)),
            notes,
        )

    def answers(self, which: str = "exact", wrt: tuple[str, ...] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The expectation and its derivatives, float64.

        Parameters
        ----------
        which : {"exact", "scheme"}
        wrt : names, optional
            As in `sensitivity`: all parameters of the SDE if left out; "t1" is the horizon.

        Raises
        ------
        ArgumentError
            If there is no such formula.
        """
        formulas = {"exact": self.exact, "scheme": self.scheme}
        if which not in formulas:
            raise ArgumentError(f"`which` must be 'exact' or 'scheme', got {which!r}.")
        formula = formulas[which]
        if formula is None:
            raise ArgumentError(f"no {which} formula is known for this problem: {self.notes or 'it has none'}")
        leaves = {k: v.to(torch.float64).detach().clone() for k, v in self.problem.leaves(wrt).items()}
        with torch.enable_grad():
            value = formula({k: v.requires_grad_() for k, v in leaves.items()})
            # a formula may not use a parameter that does not matter: its derivative is zero, not missing
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return value.detach(), dict(zip(leaves, found, strict=True))


@dataclass(frozen=True, eq=False)
class Formula:
    """function(p, T, *rest) as a function of theta."""

    problem: Problem
    function: Callable[..., Tensor]
    rest: tuple[int, ...] = ()

    def __call__(self, theta: Theta) -> Tensor:
        p = {k: v.to(torch.float64) for k, v in self.problem.params(theta).items()}
        t1 = theta.get("t1", self.problem.times[-1])
        return self.function(p, t1.to(torch.float64) - self.problem.t0, *self.rest)


def parameters(dtype: torch.dtype, **values) -> dict[str, Tensor]:
    """Numbers or tensors as parameters of one dtype."""
    return {name: torch.as_tensor(value, dtype=dtype) for name, value in values.items()}


def horizon(t1: float) -> Tensor:
    """Output times 0 and t1."""
    return torch.tensor([0.0, t1], dtype=torch.float64)
