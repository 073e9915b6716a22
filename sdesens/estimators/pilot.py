"""Short runs on other noise that a longer run learns from: which method varies least, and the best constant for the score.

On other noise, so that what is learnt does not depend on the draws it is used for: the run stays unbiased.
"""

from dataclasses import replace

from torch import Tensor

from sdesens.errors import ArgumentError, MethodError, NonFiniteError
from sdesens.estimators.checks import THROUGH_SCORE, refuses_pathwise
from sdesens.estimators.density import density_fault
from sdesens.estimators.measure_valued import too_many
from sdesens.estimators.methods import Choice, applicable, choose
from sdesens.estimators.model import with_graph
from sdesens.estimators.run import Task, answer, regression, vectorises
from sdesens.noise import independent

PILOT = 2_000  # draws that a method is tried on
CONSTANT = 10_000  # draws that the optimal constant is computed from


def constants(task: Task, n_samples: int) -> dict[str, Tensor] | None:
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


def best(bare: Task, n_samples: int) -> tuple[Choice, dict[str, float | str]]:
    """The unbiased method whose gradient varies least, and what was found of each; `bare` is a task without a choice."""
    question, law, noise = bare.question, bare.law, bare.noise
    with_items, graph = question.x is not None, with_graph(question)
    names = applicable(graph, with_items)
    if "enumerate" in names:
        return choose("enumerate", {}, law, with_items, n_samples), {"enumerate": 0.0}
    if not names:
        choose("score_function", {}, graph, with_items, n_samples)  # says why it cannot be used
    tried: dict[str, float | str] = {}
    fault = density_fault(bare) if "score_function" in names else None
    if fault is not None:
        names = [k for k in names if k not in THROUGH_SCORE]
        tried["score_function"] = fault
    costly = too_many(graph, with_items) if "measure_valued" in names else None
    if costly is not None:
        names.remove("measure_valued")
        tried["measure_valued"] = costly
    other = independent(noise)
    count = min(n_samples, PILOT)
    count -= count % (2 * noise.unit)
    candidates = [choose(k, {}, law, with_items, count) for k in names if k != "rloo"]
    if "score_function" in names and other is not noise:
        candidates.append(choose("score_function", {"baseline": "optimal"}, law, with_items, count))
    failed: list[Exception] = []
    spread: list[tuple[float, Choice]] = []
    for choice in candidates:
        task = replace(bare, choice=choice, noise=other)
        reason = refuses_pathwise(task) if choice.name == "pathwise" else None
        if reason is not None:
            tried[str(choice)] = reason
            continue
        try:
            task = replace(task, vectorised=vectorises(task))
            found = answer(task, count, constants(task, count))
        # no derivative in torch, too little noise given, no derivative that is finite
        except (RuntimeError, ArgumentError, NonFiniteError) as error:
            tried[str(choice)] = str(error).splitlines()[0]
            failed.append(error)
            continue
        variance = sum(float(e.standard_error.square().sum()) * e.n for k, e in found.items() if k != "value")
        tried[str(choice)] = variance
        spread.append((variance, choice))
    if not spread and failed and all(isinstance(e, NonFiniteError) for e in failed):
        raise failed[0]
    if not spread:
        reasons = "; ".join(f"{k}: {why}" for k, why in tried.items())
        raise MethodError(
            f"no unbiased method can answer ({reasons}). Give the model a log_prob, so that the score function can."
        )
    least = min(spread, key=lambda found: found[0])[1]
    return choose(least.name, least.options, law, with_items, n_samples), tried
