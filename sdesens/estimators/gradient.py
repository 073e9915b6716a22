"""The gradient of an expectation in the parameters of its law, with its standard error.

    J(p) = E_{z ~ q_p}[ f(z, p) ],    grad J = int f grad q dz + E[ grad f ].                    (1)

`expectation_gradient` is to a law what `sdesens.sensitivity` is to an SDE. `surrogate` is the same estimator inside a training
loop: a tensor to call backward() on.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from tqdm import tqdm

from sdesens.errors import ArgumentError, ArgumentTypeError, MethodError, ZeroGradientWarning
from sdesens.estimate import Estimate
from sdesens.estimators.checks import check_functions, check_method, pathwise_jump
from sdesens.estimators.laws import Law
from sdesens.estimators.methods import Choice, applicable, choose
from sdesens.estimators.model import Function, Question, ask
from sdesens.estimators.run import Task, answer, exactly, regression, vectorises
from sdesens.noise import Noise, Philox, independent
from sdesens.problem import Problem
from sdesens.sensitivity.probe import check_problem

NO_CHOICE = Choice("", {}, False)
PILOT = 2_000  # draws that a method is tried on
CONSTANT = 10_000  # draws that the optimal constant is computed from


@dataclass(frozen=True)
class ExpectationGradient:
    """The answer of `expectation_gradient`.

    Attributes
    ----------
    value : Estimate
        E[f]; the mean over items, if there are any.
    gradient : dict of Estimate
        Its derivative by parameter name, each of the parameter's shape.
    method : str
        With those options that are not the default.
    biased : bool
        Whether the gradient's mean is another number than the derivative of E[f]. The standard error does not cover that.
    n_samples : int
        Draws; of each item, if there are any.
    seconds : float
    tried : dict
        For method="auto": the total variance of one draw's gradient, or the reason why not, by method.
    """

    value: Estimate
    gradient: dict[str, Estimate]
    method: str
    biased: bool
    n_samples: int
    seconds: float
    tried: dict[str, float | str]

    def to_dict(self) -> dict:
        """Plain numbers."""
        return {
            "method": self.method,
            "biased": self.biased,
            "n_samples": self.n_samples,
            "seconds": self.seconds,
            "value": self.value.to_dict(),
            "gradient": {k: v.to_dict() for k, v in self.gradient.items()},
            "tried": dict(self.tried),
        }

    def __repr__(self) -> str:
        bias = ", BIASED" if self.biased else ""
        lines = [f"ExpectationGradient by {self.method}{bias}, {self.n_samples} draws, {self.seconds:.2f} s"]
        rows = {"value": self.value, **{f"d/d {k}": v for k, v in self.gradient.items()}}
        width = max(map(len, rows))
        return "\n".join(lines + [f"  {name:<{width}}  {estimate!r}" for name, estimate in rows.items()])


@torch.inference_mode(False)
def expectation_gradient(
    model: Any,
    f: Function | None = None,
    params: Mapping[str, Tensor] | None = None,
    *,
    n_samples: int,
    method: str = "auto",
    wrt: Sequence[str] | str | None = None,
    x: Tensor | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    check: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> ExpectationGradient:
    """Estimate E[f(z)] and its gradient in the parameters of z's law, with standard errors.

    Parameters
    ----------
    model : class, callable or Problem
        The law of z. A class (`Normal`, `torch.distributions.Gamma`) takes the parameters named like its arguments; a function
        p -> law, or (x, p) -> law, builds one; `Reparameterised` and `Sampler` are the user's own. A `Problem` is its
        Euler-Maruyama chain, with its own functional and parameters; "y0" and "t1" may then stand in `wrt`.
    f : callable (z, p) -> (B,), or (z, x, p) -> (B,)
        z has shape (B, *event), one draw a row. It may depend on the parameters. Leave it out for a Problem.
    params : mapping of str to Tensor
        Floating tensors of one dtype, the dtype of the computation. Leave it out for a Problem.
    n_samples : int
        Draws, at least 2; of each item, if there are any.
    method : str
        "auto", or "pathwise", "score_function" (baseline="none" | "leave_one_out" | "optimal" | number, group=K), "rloo" (group=K),
        "measure_valued", "enumerate" (max_states=), "arm", "gumbel_softmax" (temperature=, straight_through=),
        "straight_through" (temperature=). "auto" takes the unbiased method whose gradient varies least in a pilot of
        2,000 draws on other noise, enumeration if that can be done; `result.tried` says what was found.
    wrt : names, optional
        Parameters to differentiate in; all if left out.
    x : Tensor, shape (N, ...), optional
        Items the law is conditioned on. The estimate is the mean over these items; its standard error is that of the draws.
    seed : int
        Seed of the Philox noise, 0 if left out.
    noise : Noise, optional
        Instead of `seed`. A law that draws from torch's generator needs a seed.
    check : bool
        Probe the question first: functions that are none, parameters that do not reach the result, jumps. Some 10 ms.
    progress : bool, optional
        A progress bar on standard error; by default for runs of several seconds.

    Returns
    -------
    ExpectationGradient

    Raises
    ------
    ArgumentError, ArgumentTypeError, ShapeError, DtypeError, MethodError, UnknownParameterError, UnusedParameterError,
    DetachedError, NotAFunctionError, JumpError, NonFiniteError

    Warns
    -----
    ZeroGradientWarning
        If a gradient is exactly zero on every draw.

    Example
    -------
    >>> from sdesens.estimators import Normal
    >>> params = {"mean": torch.tensor(1.0), "scale": torch.tensor(1.0)}
    >>> result = expectation_gradient(Normal, lambda z, p: z**2, params, n_samples=10_000, method="pathwise", seed=1)
    >>> result.gradient["mean"]                                                  # exact: 2
    2.0... +/- 0.0... (95% CI, n=10000)
    """
    began = time.perf_counter()
    question = _detached(ask(model, f, params, wrt, x))
    source = check_noise(seed, noise)
    check_samples(n_samples, source)
    if check and isinstance(model, Problem):
        check_problem(model, question.theta, differentiated=method == "pathwise")
    law = question.law(question.theta)
    if check:
        check_functions(Task(question, NO_CHOICE, source, law, False))
    tried: dict[str, float | str] = {}
    if method == "auto":
        if options:
            raise ArgumentTypeError(
                f"method='auto' takes no options, got {', '.join(options)}: name the method they belong to."
            )
        choice, tried = _best(question, law, source, n_samples)
    else:
        choice = choose(method, options, _with_graph(question), x is not None, n_samples)
    task = Task(question, choice, source, law, False)
    if check:
        check_method(task)
    if choice.exact:
        found = exactly(task)
    else:
        task = replace(task, vectorised=vectorises(task))

        def bar(parts):
            return tqdm(parts, desc=choice.name, unit="part", delay=2.0, leave=False, disable=None if progress is None else not progress)  # fmt: skip

        found = answer(task, n_samples, _constants(task, n_samples), bar)
    value = found.pop("value")
    zero = [k for k, e in found.items() if not e.mean.any() and not e.standard_error.any()]
    if zero and check and not choice.exact and source.unit == 1:  # a mirrored pair may well add up to zero
        warnings.warn(
            f"the {choice.name} gradient with respect to {', '.join(map(repr, zero))} is exactly zero on every draw: either the "
            "result does not depend on it, or f jumps and its derivative misses the jump: compare with method='score_function'.",
            ZeroGradientWarning,
            stacklevel=2,
        )
    return ExpectationGradient(value, found, str(choice), choice.biased, n_samples, time.perf_counter() - began, tried)


def surrogate(
    model: Any,
    f: Function,
    params: Mapping[str, Tensor],
    *,
    n_samples: int = 1,
    method: str = "pathwise",
    x: Tensor | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    **options: Any,
) -> Tensor:
    """The Monte Carlo mean of f as a 0-dim tensor whose backward() gives the estimator's gradient: for training loops.

    Arguments are those of `expectation_gradient`. The parameters keep their graph, nothing is probed, and there is no standard
    error: take another seed at each step, and `expectation_gradient` when you want to know how certain a gradient is.

    Example
    -------
    >>> from sdesens.estimators import Normal
    >>> mean = torch.tensor(1.0, requires_grad=True)
    >>> loss = surrogate(Normal, lambda z, p: z**2, {"mean": mean, "scale": torch.tensor(1.0)}, n_samples=1000, seed=3)
    >>> loss.backward()
    >>> bool((mean.grad - 2).abs() < 0.3)
    True
    """
    question = ask(model, f, params, None, x)
    source = check_noise(seed, noise)
    if n_samples < 1 or n_samples % source.unit:
        raise ArgumentError(f"`n_samples` must be a positive multiple of {source.unit}, got {n_samples}.")
    law = question.law(question.theta)
    choice = choose(method, options, law, x is not None, n_samples, n_groups=1)
    if options.get("baseline") == "optimal":
        raise MethodError(
            "baseline='optimal' needs a pilot run: give its constant as a number, or use 'leave_one_out'."
        )
    task = Task(question, choice, source, law, False)
    eps, extra = task.normals(0, n_samples)
    with task.generator(0):
        made = choice(task.draws(question.theta, eps, extra, x))
    mean = made.surrogate.mean()
    return made.values.mean() + (mean - mean.detach())


class SampleTangents(NamedTuple):
    """Draws (B, *event), the noise (B, *noise) they are made of, and by name their derivatives (B, *event, *shape)."""

    z: Tensor
    eps: Tensor
    tangents: dict[str, Tensor]


def sample_tangents(
    model: Any,
    params: Mapping[str, Tensor],
    *,
    n_samples: int,
    wrt: Sequence[str] | str | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
) -> SampleTangents:
    """How each draw moves with the parameters, its noise held fixed: dz/dp of z = g(eps; p).

    Raises
    ------
    MethodError
        If the draw is not a function of noise.

    Example
    -------
    >>> from sdesens.estimators import Normal
    >>> params = {"mean": torch.tensor(1.0), "scale": torch.tensor(2.0)}
    >>> draws = sample_tangents(Normal, params, n_samples=5)
    >>> bool((draws.tangents["mean"] == 1).all()), bool((draws.tangents["scale"] == draws.eps).all())
    (True, True)
    """
    question = _detached(ask(model, _nothing, params, wrt, None))
    law = question.law(question.theta)
    task = Task(question, choose("pathwise", {}, law, False, 2), check_noise(seed, noise), law, True)
    if task.opaque:
        raise MethodError(
            f"the draws of {type(law).__name__} are not made from our noise: their derivatives are inside torch's rsample."
        )
    eps, extra = task.normals(0, n_samples)

    def one(theta: Mapping[str, Tensor], e: Tensor) -> tuple[Tensor, Tensor]:
        z = task.draws(theta, e[None], extra[:1], None).made()[0]
        return z, z

    tangents, z = vmap(jacrev(one, has_aux=True), in_dims=(None, 0))(question.theta, eps)
    return SampleTangents(z, eps, tangents)


def _nothing(z: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return z.flatten(1).sum(1)


def check_noise(seed: int | None, noise: Noise | None) -> Noise:
    """The noise of a run: the source given, or Philox of the seed (0 if left out)."""
    if noise is not None and seed is not None:
        raise ArgumentError("give `seed` or `noise`, not both: the seed is part of the noise.")
    source = Philox(0 if seed is None else seed) if noise is None else noise
    if not isinstance(source, Noise) or isinstance(source, type):
        raise ArgumentTypeError(f"`noise` must be a noise source such as Philox(seed), got {type(noise).__name__}.")
    if source.weights(0, 1, dtype=torch.float64, device=torch.device("cpu")) is not None:
        raise ArgumentError("`noise` has path weights, which are for an SDE's Problem and `sdesens.sensitivity`.")
    return source


def check_samples(n_samples: int, source: Noise) -> None:
    """Raise unless so many draws have a standard error."""
    if isinstance(n_samples, bool) or not isinstance(n_samples, int):
        raise ArgumentTypeError(f"`n_samples` must be an int, got {n_samples!r}: use int(...).")
    if n_samples < 2 * source.unit or n_samples % source.unit:
        raise ArgumentError(
            f"`n_samples` must be at least {2 * source.unit}"
            + (f" and a multiple of {source.unit}" if source.unit > 1 else "")
            + f", got {n_samples}: fewer have no standard error."
        )


def question_of(
    model: Any,
    f: Function | None,
    params: Mapping[str, Tensor] | None,
    wrt: Sequence[str] | str | None,
    x: Tensor | None,
) -> tuple[Question, Law]:
    """The question with its parameters detached, and the law at them, which sees what of it depends on them."""
    question = _detached(ask(model, f, params, wrt, x))
    return question, _with_graph(question)


def example_draws(question: Question, law: Law, count: int) -> Tensor:
    """Some draws, to see where a law is."""
    task = Task(question, NO_CHOICE, Philox(0), law, False)
    with torch.no_grad(), task.generator(0):
        return law.draw(task.normals(0, count)[0])


def _detached(q: Question) -> Question:
    params = {k: v.detach() for k, v in q.params.items()}
    return replace(q, params=params, theta={k: v.detach() for k, v in q.theta.items()})


def _with_graph(q: Question) -> Law:
    """The law with its graph, so that it can see which of its tensors depend on the parameters."""
    with torch.enable_grad():
        return q.law({k: v.detach().requires_grad_() for k, v in q.theta.items()})


def _constants(task: Task, n_samples: int) -> dict[str, Tensor] | None:
    """Multiples of the control, from draws of their own: computed from the same draws they would bias the result."""
    if not task.controlled:
        return None
    other = independent(task.noise)
    if other is task.noise:
        raise ArgumentError(
            "baseline='optimal' computes its constant from other noise, which given noise has not: give `seed`."
        )
    count = max(min(n_samples, CONSTANT), 100)
    return regression(replace(task, noise=other), count - count % task.unit)


def _best(question: Question, law: Law, noise: Noise, n_samples: int) -> tuple[Choice, dict[str, float | str]]:
    """The unbiased method whose gradient varies least, and what was found of each."""
    with_items, graph = question.x is not None, _with_graph(question)
    names = applicable(graph, with_items)
    if "enumerate" in names:
        return choose("enumerate", {}, law, with_items, n_samples), {"enumerate": 0.0}
    if not names:
        choose("score_function", {}, graph, with_items, n_samples)  # says why it cannot be used
    other = independent(noise)
    count = min(n_samples, PILOT)
    count -= count % (2 * noise.unit)
    candidates = [choose(k, {}, law, with_items, count) for k in names if k != "rloo"]
    if "score_function" in names and other is not noise:
        candidates.append(choose("score_function", {"baseline": "optimal"}, law, with_items, count))
    tried: dict[str, float | str] = {}
    spread: list[tuple[float, Choice]] = []
    for choice in candidates:
        task = Task(question, choice, other, law, False)
        if choice.name == "pathwise" and pathwise_jump(task):
            tried[str(choice)] = "f jumps along the draw"
            continue
        task = replace(task, vectorised=vectorises(task))
        found = answer(task, count, _constants(task, count))
        variance = sum(float(e.standard_error.square().sum()) * e.n for k, e in found.items() if k != "value")
        tried[str(choice)] = variance
        spread.append((variance, choice))
    best = min(spread, key=lambda found: found[0])[1]
    return choose(best.name, best.options, law, with_items, n_samples), tried
