"""From what a user calls a model to the law at given parameters.

a class        Normal, torch.distributions.Gamma: its arguments are parameters of the same names
a function     p -> law, or (x, p) -> law for items x; a law of ours or a torch distribution
a Problem      the Euler-Maruyama chain of an SDE, with the problem's own functional
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdesens.errors import ArgumentError, ArgumentTypeError, DtypeError, ShapeError, UnknownParameterError
from sdesens.estimators.chain import Chain
from sdesens.estimators.laws import Law
from sdesens.estimators.torch_law import as_law
from sdesens.integrate.checks import check_finite_params
from sdesens.problem import Problem
from sdesens.sde import Params, check_function, check_parameter
from sdesens.sensitivity.probe import check_problem
from sdesens.tensors import describe

Function = Callable[..., Tensor]


def law_at(model: Any, x: Tensor | None, p: Params) -> Law:
    """The law that a model gives at parameters p, conditioned on items x if there are any.

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError
    """
    if isinstance(model, type):
        law = _construct(model, p)
    elif callable(model):
        law = model(p) if x is None else model(x, p)
    else:
        raise ArgumentTypeError(
            "`model` must be a law's class, a function of the parameters that returns a law, or a Problem, got "
            f"{describe(model)}."
        )
    if isinstance(law, torch.distributions.Distribution):
        law = as_law(law)
    if not callable(getattr(law, "draw", None)) or not callable(getattr(law, "log_prob", None)):
        raise ArgumentTypeError(
            f"`model` must give a law (Normal, Bernoulli, ..., or a torch.distributions.Distribution), got {describe(law)}."
        )
    if x is not None and (not law.noise or law.noise[0] != x.shape[0]):
        raise ShapeError(
            f"`model(x, p)` must give a law whose first axis runs over the {x.shape[0]} items, got one whose noise has shape "
            f"{law.noise}."
        )
    return law


def of_problem(problem: Problem, noise_dim: int) -> tuple[Callable[[Params], Law], Function]:
    """Model and f of an SDE problem, functions of theta: parameters, "y0", "t1"."""

    def model(theta: Params) -> Law:
        return Chain(problem, theta, noise_dim)

    def f(z: Tensor, theta: Params) -> Tensor:
        return problem.functional(z.movedim(1, 0)[list(problem.outputs)], problem.params(theta))

    return model, f


def _construct(law: type, p: Params) -> Any:
    names = [k for k in inspect.signature(law).parameters if k != "validate_args"]
    given = {k: v for k, v in p.items() if k in names}
    try:
        return law(**given)
    except TypeError as error:
        raise ArgumentError(
            f"`params` has {', '.join(map(repr, p)) or 'nothing'}, but {law.__name__} needs {', '.join(map(repr, names))}: name the "
            "parameters after its arguments, or give a function p -> law."
        ) from error
    except ValueError as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"`params` are refused by {law.__name__}: {error}") from error


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked: the law, what is averaged over it, and the tensors to differentiate in.

    Attributes
    ----------
    model : class or callable
    f : callable (z, p) or (z, x, p) -> (B,)
    params, theta : dict of Tensor
        All parameters, and those to differentiate in; detached, of one dtype.
    x : Tensor, shape (N, ...), or None
    """

    model: Any
    f: Function
    params: dict[str, Tensor]
    theta: dict[str, Tensor]
    x: Tensor | None

    def law(self, theta: Params) -> Law:
        """The law at theta."""
        return law_at(self.model, self.x, {**self.params, **theta})

    @property
    def p(self) -> dict[str, Tensor]:
        """What f and the model are given."""
        return {**self.params, **self.theta}

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the computation."""
        return next(iter(self.params.values()))

    @property
    def n_items(self) -> int:
        return 1 if self.x is None else self.x.shape[0]


def ask(model: Any, f: Function | None, params: Any, wrt: Sequence[str] | str | None, x: Tensor | None) -> Question:
    """Check and bring together what a user asks; parameters keep their graph.

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError, DtypeError, NonFiniteError, UnknownParameterError
    """
    if isinstance(model, Problem):
        if f is not None or params is not None or x is not None:
            raise ArgumentError("a Problem has its own functional and parameters: leave out `f`, `params` and `x`.")
        theta = model.leaves(wrt)
        theta |= {k: v for k, v in model.sde.params.items() if k in theta}  # with their graph
        if "y0" in theta and isinstance(model.y0, Tensor):
            theta["y0"] = model.y0
        noise_dim = check_problem(model, theta, thorough=False)
        law, functional = of_problem(model, noise_dim)
        return Question(law, functional, theta, dict(theta), None)
    if not isinstance(params, Mapping) or not params:
        raise ArgumentTypeError(
            f"`params` must map names to tensors, got {params!r:.80}: use {{'mean': torch.tensor(0.0)}}."
        )
    for name, value in params.items():
        check_parameter(name, value)
    check_finite_params(params)
    kinds = {(v.dtype, v.device) for v in params.values()}
    if len(kinds) > 1:
        raise DtypeError(
            f"`params` must share one dtype and device, got {', '.join(sorted(map(str, kinds)))}: convert them with .to(...)."
        )
    if next(iter(kinds))[0] not in (torch.float32, torch.float64):
        raise DtypeError(
            f"`params` must be float32 or float64, got {next(iter(kinds))[0]}: a coin needs more than its 8 or 11 bits."
        )
    check_function("f", f, ("z", "p") if x is None else ("z", "x", "p"))
    if not isinstance(model, type) and callable(model):
        check_function("model", model, ("p",) if x is None else ("x", "p"))
    if x is not None and (not isinstance(x, Tensor) or x.dim() < 1 or x.shape[0] == 0):
        raise ShapeError(f"`x` must be a tensor of items, one a row, got {describe(x)}.")
    if x is not None and isinstance(model, type):
        raise ArgumentTypeError(
            f"with items `x` the model must be a function (x, p) -> law, got the class {model.__name__}."
        )
    names = tuple(params) if wrt is None else (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in names:
        if name not in params:
            raise UnknownParameterError(f"`wrt` names {name!r}, which is none of {', '.join(map(repr, params))}.")
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"`wrt` must name parameters, each once, got {names!r}.")
    assert f is not None  # checked above
    return Question(model, f, dict(params), {k: params[k] for k in names}, x)


def detached(q: Question) -> Question:
    """The question with its parameters cut off from any graph."""

    def own(v: Tensor) -> Tensor:
        return v.clone() if v.is_inference() else v.detach()

    return replace(q, params={k: own(v) for k, v in q.params.items()}, theta={k: own(v) for k, v in q.theta.items()})


def with_graph(q: Question) -> Law:
    """The law with its graph, so that it can see which of its tensors depend on the parameters."""
    with torch.enable_grad():
        return q.law({k: v.detach().requires_grad_() for k, v in q.theta.items()})
