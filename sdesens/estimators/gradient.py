"""The gradient of an expectation in the parameters of its law, with its standard error.

    J(p) = E_{z ~ q_p}[ f(z, p) ],    grad J = int f grad q dz + E[ grad f ].                    (1)

`expectation_gradient` is to a law what `sdesens.sensitivity` is to an SDE. `surrogate` is the same estimator inside a training
loop: a tensor to call backward() on.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdesens.errors import ArgumentError, ArgumentTypeError, MethodError, ZeroGradientWarning
from sdesens.estimate import Estimate
from sdesens.estimators.checks import check_functions, check_method, divisible
from sdesens.estimators.methods import choose
from sdesens.estimators.model import Function, ask, detached, with_graph
from sdesens.estimators.pilot import best, constants
from sdesens.estimators.run import (
    NO_CHOICE,
    Task,
    answer,
    check_groups,
    check_multiple,
    check_samples,
    exactly,
    noise_of,
    vectorises,
)
from sdesens.noise import Noise
from sdesens.problem import Problem
from sdesens.sensitivity.probe import check_problem


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
        draws = "no draws" if self.method.startswith("enumerate") else f"{self.n_samples} draws"
        lines = [f"ExpectationGradient by {self.method}{bias}, {draws}, {self.seconds:.2f} s"]
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
        Probe the question first: functions that are none, parameters that do not reach the result, jumps. Some 20 ms.
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
    question = detached(ask(model, f, params, wrt, x))
    source = noise_of(seed, noise)
    check_samples(n_samples, source)
    if check and isinstance(model, Problem):
        check_problem(model, question.theta, differentiated=False)
    law = question.law(question.theta)
    bare = Task(question, NO_CHOICE, source, law, False)
    apart = divisible(bare)
    if check:
        check_functions(bare)
    tried: dict[str, float | str] = {}
    if method == "auto":
        if options:
            raise ArgumentTypeError(
                f"method='auto' takes no options, got {', '.join(options)}: name the method they belong to."
            )
        choice, tried = best(replace(bare, divisible=apart), n_samples)
    else:
        choice = choose(method, options, with_graph(question), x is not None, n_samples)
    task = replace(bare, choice=choice, divisible=apart)
    check_groups(choice, source)
    if check:
        check_method(task)
    if choice.exact:
        found = exactly(task)
    else:
        task = replace(task, vectorised=vectorises(task))

        def bar(parts):
            return tqdm(parts, desc=choice.name, unit="part", delay=2.0, leave=False, disable=None if progress is None else not progress)  # fmt: skip

        found = answer(task, n_samples, constants(task, n_samples), bar)
    value = found.pop("value")
    zero = [k for k, e in found.items() if not e.mean.any() and not e.standard_error.any()]
    if zero and check and not choice.exact and source.unit == 1:  # a mirrored pair may well add up to zero
        warnings.warn(
            f"the {choice.name} gradient with respect to {', '.join(map(repr, zero))} is exactly zero on every draw: the result does "
            "not depend on it"
            + (
                ", or f jumps and its derivative misses the jump: compare with method='score_function'."
                if choice.name == "pathwise"
                else ", or f is the same number on every draw: take more."
            ),
            ZeroGradientWarning,
            stacklevel=3,  # inference_mode's wrapper stands between
        )
    return ExpectationGradient(value, found, str(choice), choice.biased, n_samples, time.perf_counter() - began, tried)


def surrogate(
    model: Any,
    f: Function | None = None,
    params: Mapping[str, Tensor] | None = None,
    *,
    n_samples: int = 1,
    method: str = "pathwise",
    x: Tensor | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    **options: Any,
) -> Tensor:
    """The Monte Carlo mean of f as a 0-dim tensor whose backward() gives the estimator's gradient: for training loops.

    Arguments are those of `expectation_gradient`, but that `seed` (or `noise`) must be given, another one at each step, and that
    `method` is "pathwise" unless another is named; there is no "auto", and no pilot for baseline="optimal". The parameters keep
    their graph, nothing is probed, and there is no standard error: `expectation_gradient` says how certain a gradient is.

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
    if seed is None and noise is None:
        raise ArgumentError(
            "give `seed`, another one at each step: the same noise again and again would be learnt by heart."
        )
    source = noise_of(seed, noise)
    check_multiple(n_samples, source.unit)
    law = question.law(question.theta)
    choice = choose(method, options, law, x is not None, n_samples, n_groups=1)
    if options.get("baseline") == "optimal":
        raise MethodError(
            "baseline='optimal' needs a pilot run: give its constant as a number, or use 'leave_one_out'."
        )
    check_groups(choice, source)
    task = Task(question, choice, source, law, False)
    eps, extra = task.normals(0, n_samples)
    with task.generator(0):
        made = choice(task.draws(question.theta, eps, extra, x))
    mean = made.surrogate.mean()
    return made.values.mean() + (mean - mean.detach())
