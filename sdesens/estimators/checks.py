"""What is checked about a question before it is answered, on a few draws.

That draws and f are functions of what they are given, row by row; that every parameter is reached by the graph of the result; and
that nothing jumps where a derivative is taken. A parameter that is not reached, or a jump, would give a zero that looks like an
answer.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import biject_to

from sdesens.audit import jumps
from sdesens.errors import DetachedError, JumpError, NotAFunctionError, UnusedParameterError
from sdesens.estimators.draws import Draws, evaluate
from sdesens.estimators.methods import applicable
from sdesens.estimators.run import Task
from sdesens.estimators.torch_law import TorchLaw
from sdesens.noise import Philox
from sdesens.sde import Params

PROBE = Philox(0, 0xFFFFFFFE)  # away from any stream that a run uses
ROWS = 4  # draws that are looked at one by one
AUDITED = 8192  # draws that are looked at for jumps


def check_functions(task: Task) -> None:
    """Raise unless draws and f are functions of what they are given, row by row, whatever the method.

    Raises
    ------
    NotAFunctionError, ShapeError, ArgumentTypeError, DtypeError
    """
    probe = replace(task, noise=PROBE)
    with probe.generator(0):
        _check_functions(probe)


def check_method(task: Task) -> None:
    """Raise unless the task's method gives the gradient of every parameter asked for.

    Raises
    ------
    DetachedError, UnusedParameterError, JumpError
    """
    probe = replace(task, noise=PROBE)
    with probe.generator(0):
        _check_reached(probe)
        if explicit_jump(probe):
            raise JumpError(
                "`f` jumps as a function of the parameters themselves, at a fixed draw: E[grad f], which every method needs, "
                "misses the jump. Move the parameter into the law (a threshold on z is a shift of z)."
            )
        if task.choice.name == "pathwise" and pathwise_jump(probe):
            others = [k for k in applicable(task.law, task.question.x is not None) if k != "pathwise"]
            raise JumpError(
                "`f` jumps along z (a comparison, a rounding, a sign), so the pathwise gradient misses a part of the answer, or "
                f"all of it. Unbiased methods that apply: {', '.join(map(repr, others)) or 'none; give the model a log_prob'}. "
                "If f is continuous but very steep, check=False skips this check."
            )


def _draws(task: Task, count: int, theta: Params | None = None) -> Draws:
    eps, extra = task.normals(0, count + count % task.noise.unit)
    return task.draws(task.question.theta if theta is None else theta, eps, extra, task.question.x)


def _check_functions(task: Task) -> None:
    with torch.no_grad():
        draws = _draws(task, ROWS)
        z = draws.made()
        if not task.opaque and not torch.equal(z, draws.made()):
            raise NotAFunctionError(
                "the model drew two different results from the same noise: it may not draw random numbers of its own. Write it as "
                "a function of eps, or use Sampler for a draw that is not one."
            )
        q = task.question
        values = draws.value(z)
        if not torch.equal(values.nan_to_num(), draws.value(z).nan_to_num()):
            raise NotAFunctionError(
                "`f` gave two different results for the same draws: it may not draw random numbers."
            )
        alone = torch.cat([evaluate(q.f, z[i : i + 1], q.x, {**q.params, **q.theta}) for i in range(len(z))])
        scale = torch.finfo(values.dtype).eps ** 0.5 * (1 + values.abs().nan_to_num())
        if bool(((alone - values).abs().nan_to_num() > scale).any()):
            raise NotAFunctionError(
                "`f` mixes draws: a draw alone gives another number than in a batch. Reduce over components, never over the "
                "first axis of z."
            )


def _check_reached(task: Task) -> None:
    leaves = {k: v.detach().requires_grad_() for k, v in task.question.theta.items()}
    with torch.enable_grad():
        draws = _draws(task, task.unit * ROWS, leaves)
        surrogate = task.choice(draws).surrogate
        found = torch.autograd.grad(surrogate.sum(), list(leaves.values()), allow_unused=True) if surrogate.requires_grad else [None] * len(leaves)  # fmt: skip
        missing = [k for k, g in zip(leaves, found, strict=True) if g is None]
        if not missing:
            return
        if task.choice.name in ("pathwise", "gumbel_softmax", "straight_through"):
            z = draws.made().detach().requires_grad_()
            if (
                not draws.value(z).requires_grad
                or torch.autograd.grad(draws.value(z).sum(), z, allow_unused=True)[0] is None
            ):
                raise DetachedError(
                    "`f` returned a tensor that is cut off from z (a comparison, detach(), .item(), numpy, or a cast): its "
                    f"{task.choice.name} gradient would be missing, not zero. Use a method that needs no derivative of f, such as "
                    "'score_function'."
                )
    raise UnusedParameterError(
        f"the result cannot depend on {', '.join(map(repr, missing))}: it enters neither the law nor f as a tensor (or only "
        "detached). Leave it out of `wrt`, or use it."
    )


def explicit_jump(task: Task) -> bool:
    """Whether f jumps in the parameters at fixed draws."""
    q = task.question
    direction = {
        k: _signs(v, i) * (v.detach().abs() + v.detach().abs().mean()) for i, (k, v) in enumerate(q.theta.items())
    }
    with torch.no_grad():
        z = _draws(task, _audited(task)).made()
    return _jumps(lambda e: evaluate(q.f, z, q.x, {**q.params, **_moved(q.theta, direction, e)}).flatten())


def pathwise_jump(task: Task) -> bool:
    """Whether f jumps along the draws, as they move with the parameters."""
    q, count = task.question, _audited(task)
    p = {**q.params, **q.theta}
    with torch.no_grad():
        if isinstance(task.law, TorchLaw):  # its sampler may be a rejection: two runs need not be close
            z = _draws(task, count).made()
            try:
                free = biject_to(task.law.distribution.support)
            except NotImplementedError:
                return False  # no way to move about in it
            u = free.inv(z)
            step = u.std(0) * _signs(u[0], 0)
            return _jumps(lambda e: evaluate(q.f, free(u + e * step), q.x, p).flatten())
        z = _draws(task, count).made()
        direction = {k: _signs(v, i) * (v.detach().abs() + 0.1) for i, (k, v) in enumerate(q.theta.items())}
        nudge = 1e-4
        moved = _draws(task, count, _moved(q.theta, direction, nudge)).made()
        size = float((moved - z).square().mean().sqrt() / z.std()) / nudge  # in spreads of the draws
        if not 0 < size < float("inf"):
            return False
        direction = {k: v / size for k, v in direction.items()}
        return _jumps(lambda e: _along(task, count, _moved(q.theta, direction, e)))


def _along(task: Task, count: int, theta: Params) -> Tensor:
    draws = _draws(task, count, theta)
    return draws.value(draws.made()).flatten()


def _jumps(F: Callable[[float], Tensor]) -> bool:
    try:
        return jumps(F)
    except (ValueError, RuntimeError, ArithmeticError):
        return False  # the parameters cannot be moved freely: nothing to compare with


def _moved(theta: Params, direction: Params, e: float) -> Params:
    return {k: v.detach() + e * direction[k] for k, v in theta.items()}


def _signs(like: Tensor, stream: int) -> Tensor:
    """Signs and sizes of a made-up direction."""
    z = PROBE.normals(0, like.numel(), stream, 1, 1, dtype=like.dtype, device=like.device)
    return z.reshape(like.shape)


def _audited(task: Task) -> int:
    return max(AUDITED // task.question.n_items, 2)
