"""What is checked about a question before it is answered, on a few draws.

    functions    draws and f depend on what they are given alone, row by row
    reach        every parameter is reached by the graph of the result
    `density`    a score has mean zero, and belongs to the draw
    `hidden`     autograd sees all of a function
    `jumping`    nothing jumps where a derivative is taken

A parameter that is not reached, a part that is detached or a jump would give a number that looks like an answer.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sdesens.errors import DetachedError, JumpError, MethodError, NotAFunctionError, UnusedParameterError
from sdesens.estimators.density import density_fault
from sdesens.estimators.draws import Draws, evaluate
from sdesens.estimators.hidden import check_along, check_explicit, check_law
from sdesens.estimators.jumping import explicit_jump, pathwise_jump
from sdesens.estimators.laws import Law
from sdesens.estimators.methods import applicable
from sdesens.estimators.model import law_at
from sdesens.estimators.probe import PROBE, draws_of
from sdesens.estimators.run import Task
from sdesens.sensitivity.tile import pull

ROWS = 4  # draws, and items, that are looked at one by one
THROUGH_SCORE = ("score_function", "rloo")
THROUGH_F = ("pathwise", "gumbel_softmax", "straight_through")  # methods that differentiate f in z


def check_functions(task: Task) -> None:
    """Raise unless draws and f are functions of what they are given, row by row.

    Raises
    ------
    NotAFunctionError, ShapeError, ArgumentTypeError, DtypeError
    """
    probe = replace(task, noise=PROBE)
    with probe.generator(0):
        _check_rows(probe)
    if probe.opaque:
        _check_generator(probe)


def divisible(task: Task) -> bool:
    """Whether an item alone has the law and the f that it has among the others."""
    x = task.question.x
    if x is None or len(x) == 1:
        return True
    probe = replace(task, noise=PROBE)
    with torch.no_grad(), probe.generator(0):
        try:
            return not _items_differ(probe, x)
        except (ValueError, RuntimeError, IndexError, TypeError):
            return False  # parameters with a row for each item


def check_method(task: Task) -> None:
    """Raise unless the task's method gives the gradient of every parameter asked for.

    Raises
    ------
    DetachedError, UnusedParameterError, JumpError, MethodError
    """
    if task.choice.name in THROUGH_SCORE:
        fault = density_fault(task)
        if fault is not None:
            raise MethodError(f"method={task.choice.name!r} cannot be used for this model: {fault}.")
    probe = replace(task, noise=PROBE)
    with probe.generator(0):
        _check_reached(probe)
        refuse_explicit_jump(probe)
        check_explicit(probe)
        check_law(probe)
        if task.choice.name in THROUGH_F:
            check_along(probe)
        if task.choice.name == "pathwise" and pathwise_jump(probe):
            others = [k for k in applicable(task.law, task.question.x is not None) if k != "pathwise"]
            raise JumpError(
                "`f` jumps along z (a comparison, a rounding, a sign), so the pathwise gradient misses a part of the answer, or "
                f"all of it. Unbiased methods that apply: {', '.join(map(repr, others)) or 'none; give the model a log_prob'}. "
                "If f is continuous but very steep, check=False skips this check."
            )


def refuse_explicit_jump(task: Task) -> None:
    """Raise JumpError if f jumps as a function of the parameters at fixed draws."""
    if explicit_jump(task):
        raise JumpError(
            "`f` jumps as a function of the parameters themselves, at a fixed draw: E[grad f], which every method needs, "
            "misses the jump. Move the parameter into the law (a threshold on z is a shift of z)."
        )


def refuses_pathwise(task: Task) -> str | None:
    """Why the pathwise gradient of a reparameterised law would miss something; None if it would not."""
    probe = replace(task, noise=PROBE)
    with probe.generator(0):
        draws = draws_of(probe, ROWS)
        if cut_off(draws):
            return "f is cut off from z"
        try:
            check_along(probe)
        except DetachedError:
            return "f is cut off from z in part"
        return "f jumps along z" if pathwise_jump(probe) else None


# Functions of what they are given


def _check_rows(task: Task) -> None:
    q, p = task.question, task.question.p
    with torch.no_grad():
        draws = draws_of(task, ROWS)
        z = draws.made()
        if not task.opaque and not (torch.equal(z, draws.made()) and torch.equal(z, draws_of(task, ROWS).made())):
            raise NotAFunctionError(
                "the model drew two different results from the same noise: it may not draw random numbers of its own. Write it as "
                "a function of eps, or use Sampler for a draw that is not one."
            )
        held = z.clone()
        values = draws.value(z)
        if not torch.equal(z, held):
            raise NotAFunctionError(
                "`f` writes into z, which others read after it: use abs, clamp, ... without the underscore."
            )
        if not torch.equal(values.nan_to_num(), draws.value(z).nan_to_num()):
            raise NotAFunctionError(
                "`f` gave two different results for the same draws: it may not draw random numbers."
            )
        if not task.opaque:
            alone = torch.cat([draws.law.draw(e[None]) for e in draws.eps])
            if _differ(alone, z):
                raise NotAFunctionError(
                    "the model mixes rows of its noise: a draw alone is another one than in a batch. Reduce over components, never "
                    "over the first axis of eps."
                )
        if _differ(torch.cat([evaluate(q.f, row[None], q.x, p) for row in z]), values):
            raise NotAFunctionError(
                "`f` mixes draws: a draw alone gives another number than in a batch. Reduce over components, never over the "
                "first axis of z."
            )


def _items_differ(task: Task, x: Tensor) -> bool:
    q, p = task.question, task.question.p
    draws = draws_of(task, ROWS)
    z = draws.made()
    values = draws.value(z)
    for i in range(min(len(x), ROWS)):
        one, here = x[i : i + 1], slice(i, i + 1)
        law = law_at(q.model, one, p)
        if task.opaque:
            dense = law.no_density() is None
            moved = dense and _differ(_log_prob(law, z[:, here]), _log_prob(draws.law, z)[:, here])
        else:
            moved = _differ(law.draw(draws.eps[:, here]), z[:, here])
        if moved or _differ(evaluate(q.f, z[:, here], one, p), values[:, here]):
            return True
    return False


def _log_prob(law: Law, z: Tensor) -> Tensor:
    return law.log_prob(z).reshape(*z.shape[:2], -1).sum(-1)


def _differ(a: Tensor, b: Tensor) -> bool:
    scale = torch.finfo(b.dtype).eps ** 0.5 * (1 + b.abs().nan_to_num())
    return a.shape != b.shape or bool(((a - b).abs().nan_to_num() > scale).any())


def _check_generator(task: Task) -> None:
    """An opaque sampler draws from torch's generator, which is what `seed` sets."""
    with torch.no_grad():
        law, rows = task.law, task.normals(0, 64)[0]
        draws = []
        for first in (0, 0, 1):
            with task.generator(first):
                draws.append(law.draw(rows))
    constant = bool((draws[0] == draws[0][:1]).all())
    if not torch.equal(draws[0], draws[1]) or (torch.equal(draws[0], draws[2]) and not constant):
        raise NotAFunctionError(
            "`sample` does not draw from torch's generator, so `seed` has no hold of it: use torch.rand and its like, not random or "
            "numpy."
        )


# Reach


def _check_reached(task: Task) -> None:
    leaves = {k: v.detach().requires_grad_() for k, v in task.question.theta.items()}
    with torch.enable_grad():
        draws = draws_of(task, task.unit * ROWS, leaves)
        surrogate = task.choice(draws).surrogate
        total = surrogate.sum()
        found = pull(total, list(leaves.values()), torch.ones_like(total))
        missing = [k for k, g in zip(leaves, found, strict=True) if g is None]
        if missing and task.choice.name in THROUGH_F and cut_off(draws):
            raise DetachedError(
                "`f` returned a tensor that is cut off from z (a comparison, detach(), .item(), numpy, or a cast): its "
                f"{task.choice.name} gradient would be missing, not zero. Use a method that needs no derivative of f, such as "
                "'score_function'."
            )
    if missing:
        raise UnusedParameterError(
            f"the result cannot depend on {', '.join(map(repr, missing))}: it enters neither the law nor f as a tensor (or only "
            "detached). Leave it out of `wrt`, or use it."
        )


def cut_off(draws: Draws) -> bool:
    """Whether autograd sees no way from z to f."""
    with torch.enable_grad():
        z = draws.made().detach().requires_grad_()
        values = draws.value(z)
    return pull(values, [z], torch.ones_like(values))[0] is None
